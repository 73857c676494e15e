"""The release's surface, thin over the engine: its `run.py` needs other imports and nothing else.

`runner` has the runners; `parts` the release's configuration classes and pure functions. The names are the release's.
"""

from grokjax.runners.parts import (
    LanguageModelConfig,
    SampleOutput,
    SampleSettings,
    TransformerConfig,
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
    Request,
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
