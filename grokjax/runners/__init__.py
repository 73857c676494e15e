"""The release's surface, thin over the engine and the model's steps: its `run.py` needs other imports and nothing else.

Read `configs` first: what a caller writes down. `functions` has the pure functions, `runner` the runners. The names are
the release's.
"""

from grokjax.runners.configs import LanguageModelConfig, Request, TransformerConfig
from grokjax.runners.functions import (
    SampleOutput,
    SampleSettings,
    get_pad_bucket,
    insert_slice,
    pad_to_size,
    sample_token,
    top_p_filter,
)
from grokjax.runners.runner import (
    InferenceRunner,
    ModelRunner,
    OutputText,
    QuantizedWeight8bit,
    sample_from_model,
)
from grokjax.sharding import make_mesh

__all__ = [
    "InferenceRunner",
    "LanguageModelConfig",
    "ModelRunner",
    "OutputText",
    "QuantizedWeight8bit",
    "Request",
    "SampleOutput",
    "SampleSettings",
    "TransformerConfig",
    "get_pad_bucket",
    "insert_slice",
    "make_mesh",
    "pad_to_size",
    "sample_from_model",
    "sample_token",
    "top_p_filter",
]
