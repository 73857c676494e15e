"""The command line, `python -m grokjax` and `grokjax`.

Read `commands`, which has `main`, then the file of a command: `generate`, `score`, `evaluate`, `checkpoints` and
`plan`. `model` is the model that the first three run. For files of prompts, `batch` runs them (`score_batches` where
weights stream and nothing is drawn, and `kept_pass` keeps how far that has come), `prompts` reads them, and `results`
writes what came of them. `console` has what the commands say, `streams` where to, `machine` what they say of the
devices, `options` what their options share.
`cores` says how many devices a CPU is to be, `programs` keeps what JAX has compiled for the next command.
"""

from grokjax.cli.commands import main
from grokjax.cli.cores import use_every_core
from grokjax.cli.options import named_config, read_extents

__all__ = [
    "main",
    "named_config",
    "read_extents",
    "use_every_core",
]
