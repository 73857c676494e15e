"""The layouts of checkpoints: what lies where, read slice by slice and never executed.

Read `release` first: which file is which parameter, and `release_pickle`, which finds the arrays in them. `payload`
reads one such array. Then `safetensors`, with the names of its tensors (`safetensors_names`), what its files say of
them (`safetensors_headers`) and how they are written (`safetensors_export`). Our own is `orbax`: `manifest` makes a
folder a checkpoint, `orbax_headers` looks at what lies in it, and `orbax_units` writes and reads its arrays.
"""
