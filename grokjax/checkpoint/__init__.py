"""Checkpoints: read in any layout straight into shards, saved, converted, verified, exported.

Read `parameters` first: the table from which every layout's names derive. Then `stored`: what all layouts share, arrays
that are read slice by slice. The folder `formats` has the layouts, and a reading order of its own; `layouts` finds out
which one a folder has, `beside` what lies beside the files, and `sizes` whether files that cannot tell all sizes are
Grok-1's.
`loading` has `load`: `mapping` says which parameter comes from where, `likeness` whether all processes load the same
weights, `stacks` where each part has its place, and `assembly` puts it there, on CPUs by `in_place`. `streaming` has
`stream`, which leaves the layers in the files, of which `layer_reader` reads what `passes` has need of, pass by pass.
`saving` goes the other way, and `info` tells what a checkpoint holds.
`conversion` goes from checkpoint to checkpoint: `recipe` is what it does with a matrix, `target` the folder that it
writes; `verification` reads both again, and `exporting` writes for other programs. `disk` and `progress` serve all of
them.
"""

from grokjax.checkpoint.beside import find_config, find_tokenizer, tokenizer_places
from grokjax.checkpoint.conversion import ConversionPlan, convert, plan_conversion
from grokjax.checkpoint.disk import check_no_link, lock_file, open_itself, written_whole
from grokjax.checkpoint.exporting import export
from grokjax.checkpoint.formats.release import open_release, parameter_names
from grokjax.checkpoint.formats.safetensors import SafetensorsCheckpoint
from grokjax.checkpoint.formats.safetensors_names import SchemeName, read_config
from grokjax.checkpoint.info import CheckpointInfo, describe
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.likeness import fingerprint
from grokjax.checkpoint.loading import load, load_parameters
from grokjax.checkpoint.parameters import find_parameter, parameter_shapes, parts_of
from grokjax.checkpoint.progress import EARLIER, Progress
from grokjax.checkpoint.recipe import WeightFormat
from grokjax.checkpoint.saving import save
from grokjax.checkpoint.stored import Checkpoint, CheckpointError
from grokjax.checkpoint.streaming import stream
from grokjax.checkpoint.verification import keep_checksums, verify, verify_finite

__all__ = [
    "EARLIER",
    "Checkpoint",
    "CheckpointError",
    "CheckpointInfo",
    "ConversionPlan",
    "Progress",
    "SafetensorsCheckpoint",
    "SchemeName",
    "WeightFormat",
    "check_no_link",
    "convert",
    "describe",
    "export",
    "find_config",
    "find_parameter",
    "find_tokenizer",
    "fingerprint",
    "keep_checksums",
    "load",
    "load_parameters",
    "lock_file",
    "open_checkpoint",
    "open_itself",
    "open_release",
    "parameter_names",
    "parameter_shapes",
    "parts_of",
    "plan_conversion",
    "read_config",
    "save",
    "stream",
    "tokenizer_places",
    "verify",
    "verify_finite",
    "written_whole",
]
