"""The layouts of checkpoints, a file for each: what lies where, read slice by slice and never executed.

`release` and its pickles (`release_pickle`); `safetensors`, its names (`safetensors_names`) and its writing
(`safetensors_export`); our own: `manifest` makes a folder a checkpoint, `orbax` holds its arrays.
"""
