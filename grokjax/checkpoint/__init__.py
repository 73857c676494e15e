"""Checkpoints: read in any layout straight into shards, saved, converted, verified, exported.

Read `parameters` first: the table from which every layout's names derive. Then `stored`: what all layouts share, arrays
that are read slice by slice. Each file of `formats` is one layout, and `layouts` finds out which one a folder has.
`loading` has `load` and `save`, for which `mapping` says which parameter comes from where and `assembly` builds the
stacks. `conversion` goes from checkpoint to checkpoint: `recipe` is what it does with a matrix, `target` the folder
that it writes.
"""

from grokjax.checkpoint.conversion import EARLIER, ConversionPlan, convert, export, plan_conversion, verify
from grokjax.checkpoint.disk import lock_file
from grokjax.checkpoint.formats.release import open_release, parameter_names
from grokjax.checkpoint.formats.safetensors import SafetensorsCheckpoint
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.loading import CheckpointInfo, Progress, describe, load, load_parameters, save
from grokjax.checkpoint.parameters import find_parameter, parameter_shapes, parts_of
from grokjax.checkpoint.stored import Checkpoint, CheckpointError

__all__ = [
    "EARLIER",
    "Checkpoint",
    "CheckpointError",
    "CheckpointInfo",
    "ConversionPlan",
    "Progress",
    "SafetensorsCheckpoint",
    "convert",
    "describe",
    "export",
    "find_parameter",
    "load",
    "load_parameters",
    "lock_file",
    "open_checkpoint",
    "open_release",
    "parameter_names",
    "parameter_shapes",
    "parts_of",
    "plan_conversion",
    "save",
    "verify",
]
