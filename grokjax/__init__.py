"""Grok-1 in JAX: a Flax NNX model, an explicit cache, pure steps, and checkpoints read straight into shards.

* A model: `GrokConfig`, `init`, `Grok`; where it lies: `make_mesh`, `ShardingRules`; int8 weights: `QuantizedArray`,
  `quantize`, `dequantize`.
* Its steps: `forward`, `score` (`Scores`), and with a `KVCache` `prefill`, `decode`, `decode_and_sample`, `generate`
  (`Generated`).
* Drawing tokens: `SampleSettings`, `sample_token`, `SampleOutput`, `row_keys`.
* Checkpoints: `load`, `stream`, `load_parameters`, `save`, `describe` (`CheckpointInfo`), `plan_conversion`
  (`ConversionPlan`), `convert`, `verify`, `verify_finite`, `keep_checksums`, `export`; `Progress`, `CheckpointError`.
* Text: `TextGenerator` (`GeneratedText`), `Tokenizer`, `load_tokenizer`, `SentencePieceTokenizer`, `ByteTokenizer`.
* Many requests: `Engine`, `AsyncEngine`, `Request`, `Completion`, `Piece`, `Handle`, `Metrics`, `QueueFullError`;
  over several processes `follow`, `DistributedError`, and `grokjax.distributed.initialize`.
* Machines: `plan` (`Plan`), `suggest` (`Suggestion`).

The departments `checkpoint`, `engine` and `planning` are imported when one of their names is first used: nobody waits
for what a program does not use.

What takes long tells the logger `grokjax` how far it has come. Nothing is shown unless the program asks for it, as by
`logging.basicConfig(level=logging.INFO)`.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.distributed import DistributedError
from grokjax.model import Generated, Grok, Scores, decode, decode_and_sample, forward, generate, init, prefill, score
from grokjax.quantization import QuantizedArray, dequantize, quantize
from grokjax.request import Completion, Piece, Request
from grokjax.sampling import SampleOutput, SampleSettings, row_keys, sample_token
from grokjax.sharding import ShardingRules, make_mesh
from grokjax.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from grokjax.checkpoint import (
        CheckpointError,
        CheckpointInfo,
        ConversionPlan,
        Progress,
        convert,
        describe,
        export,
        keep_checksums,
        load,
        load_parameters,
        plan_conversion,
        save,
        stream,
        verify,
        verify_finite,
    )
    from grokjax.engine import (
        AsyncEngine,
        Engine,
        GeneratedText,
        Handle,
        Metrics,
        QueueFullError,
        TextGenerator,
        follow,
    )
    from grokjax.planning import Plan, Suggestion, plan, suggest

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

# Department -> the names above that it brings.
_LATER = {
    "checkpoint": (
        "CheckpointError CheckpointInfo ConversionPlan Progress convert describe export keep_checksums load "
        "load_parameters plan_conversion save stream verify verify_finite"
    ),
    "engine": "AsyncEngine Engine GeneratedText Handle Metrics QueueFullError TextGenerator follow",
    "planning": "Plan Suggestion plan suggest",
}


def __getattr__(name: str) -> Any:
    """A department, or one of its names, when it is first used; the package keeps it from then on."""
    for department, names in _LATER.items():
        if name == department or name in names.split():
            module = importlib.import_module(f"{__name__}.{department}")
            globals().update({found: getattr(module, found) for found in names.split()})
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *__all__})


__all__ = [
    "AsyncEngine",
    "ByteTokenizer",
    "CheckpointError",
    "CheckpointInfo",
    "Completion",
    "ConversionPlan",
    "DistributedError",
    "Engine",
    "Generated",
    "GeneratedText",
    "Grok",
    "GrokConfig",
    "Handle",
    "KVCache",
    "Metrics",
    "Piece",
    "Plan",
    "Progress",
    "QuantizedArray",
    "QueueFullError",
    "Request",
    "SampleOutput",
    "SampleSettings",
    "Scores",
    "SentencePieceTokenizer",
    "ShardingRules",
    "Suggestion",
    "TextGenerator",
    "Tokenizer",
    "convert",
    "decode",
    "decode_and_sample",
    "dequantize",
    "describe",
    "export",
    "follow",
    "forward",
    "generate",
    "init",
    "keep_checksums",
    "load",
    "load_parameters",
    "load_tokenizer",
    "make_mesh",
    "plan",
    "plan_conversion",
    "prefill",
    "quantize",
    "row_keys",
    "sample_token",
    "save",
    "score",
    "stream",
    "suggest",
    "verify",
    "verify_finite",
]
