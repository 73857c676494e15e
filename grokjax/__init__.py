"""Grok-1 in JAX: a Flax NNX model, an explicit cache, pure steps, and checkpoints read straight into shards.

* A model: `GrokConfig`, `init`, `Grok`; where it lies: `make_mesh`, `ShardingRules`; int8 weights: `QuantizedArray`,
  `quantize`, `dequantize`.
* Its steps: `forward`, `prefill`, `decode`, `decode_and_sample`, `generate` (`Generated`), with a `KVCache`.
* Drawing tokens: `SampleSettings`, `sample_token`, `SampleOutput`, `row_keys`.
* Checkpoints: `load`, `load_parameters`, `save`, `describe` (`CheckpointInfo`), `plan_conversion` (`ConversionPlan`),
  `convert`, `verify`, `verify_finite`, `keep_checksums`, `export`; `Progress`, `CheckpointError`.
* Text: `TextGenerator` (`GeneratedText`), `Tokenizer`, `load_tokenizer`, `SentencePieceTokenizer`, `ByteTokenizer`.
* Many requests: `Engine`, `AsyncEngine`, `Request`, `Completion`, `Piece`, `Handle`, `Metrics`, `QueueFullError`;
  over several processes `follow`, `DistributedError`, and `grokjax.distributed.initialize`.
* Machines: `plan` (`Plan`), `suggest` (`Suggestion`).

What takes long tells the logger `grokjax` how far it has come. Nothing is shown unless the program asks for it, as by
`logging.basicConfig(level=logging.INFO)`.
"""

import logging

from grokjax.cache import KVCache
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
    verify,
    verify_finite,
)
from grokjax.config import GrokConfig
from grokjax.distributed import DistributedError
from grokjax.engine import AsyncEngine, Engine, GeneratedText, Handle, Metrics, QueueFullError, TextGenerator, follow
from grokjax.model import Generated, Grok, decode, decode_and_sample, forward, generate, init, prefill
from grokjax.planning import Plan, Suggestion, plan, suggest
from grokjax.quantization import QuantizedArray, dequantize, quantize
from grokjax.request import Completion, Piece, Request
from grokjax.sampling import SampleOutput, SampleSettings, row_keys, sample_token
from grokjax.sharding import ShardingRules, make_mesh
from grokjax.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

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
    "suggest",
    "verify",
    "verify_finite",
]
