"""Grok-1 in JAX: a Flax NNX model, an explicit cache, pure steps, and the released checkpoint read into shards."""

from grokjax.cache import KVCache
from grokjax.checkpoint import load
from grokjax.config import GrokConfig
from grokjax.model import Grok, init
from grokjax.quantization import QuantizedArray, dequantize, quantize
from grokjax.release import CheckpointError
from grokjax.sampling import SampleOutput, SampleSettings, row_keys, sample_token
from grokjax.sharding import ShardingRules, make_mesh
from grokjax.steps import Generated, decode, decode_and_sample, forward, generate, prefill
from grokjax.text import GeneratedText, TextGenerator
from grokjax.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "CheckpointError",
    "Generated",
    "GeneratedText",
    "Grok",
    "GrokConfig",
    "KVCache",
    "QuantizedArray",
    "SampleOutput",
    "SampleSettings",
    "SentencePieceTokenizer",
    "ShardingRules",
    "TextGenerator",
    "Tokenizer",
    "decode",
    "decode_and_sample",
    "dequantize",
    "forward",
    "generate",
    "init",
    "load",
    "load_tokenizer",
    "make_mesh",
    "prefill",
    "quantize",
    "row_keys",
    "sample_token",
]
