"""Grok-1 in JAX: a Flax NNX model, an explicit cache, pure steps, and checkpoints read straight into shards."""

from grokjax.async_engine import AsyncEngine
from grokjax.cache import KVCache
from grokjax.checkpoint import CheckpointInfo, Progress, describe, load, load_parameters, save
from grokjax.config import GrokConfig
from grokjax.conversion import ConversionPlan, convert, export, plan_conversion, verify
from grokjax.distributed import DistributedError
from grokjax.engine import Engine
from grokjax.metrics import Metrics
from grokjax.model import Grok, init
from grokjax.planning import Plan, plan
from grokjax.quantization import QuantizedArray, dequantize, quantize
from grokjax.request import Completion, Piece, Request
from grokjax.sampling import SampleOutput, SampleSettings, row_keys, sample_token
from grokjax.scheduler import QueueFullError
from grokjax.sequence import Handle
from grokjax.sharding import ShardingRules, make_mesh
from grokjax.shared_steps import follow
from grokjax.steps import Generated, decode, decode_and_sample, forward, generate, prefill
from grokjax.stored import CheckpointError
from grokjax.suggestions import Suggestion, suggest
from grokjax.text import GeneratedText, TextGenerator
from grokjax.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

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
]
