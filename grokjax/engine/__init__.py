"""Continuous batching: many requests share the rows of one batch, each as if it were alone.

Read `engine` first, the loop. `protocol` is what it asks of a model; `scheduler` decides who runs where and when;
`sample` is one sample of a request on its way, `stopping` ends it at a stop string. `shared_steps` are the steps of a
model that spans processes; `warm_up` compiles all steps beforehand; `metrics` counts. `async_engine` puts the engine
behind an event loop; `text` continues one prompt at a time without it.
"""

from grokjax.engine.async_engine import AsyncEngine
from grokjax.engine.engine import Engine
from grokjax.engine.metrics import Metrics
from grokjax.engine.protocol import Steps
from grokjax.engine.sample import Handle
from grokjax.engine.scheduler import QueueFullError
from grokjax.engine.shared_steps import SharedSteps, follow
from grokjax.engine.text import GeneratedText, TextGenerator, check_limits, encode_prompt
from grokjax.engine.warm_up import WarmedStep

__all__ = [
    "AsyncEngine",
    "Engine",
    "GeneratedText",
    "Handle",
    "Metrics",
    "QueueFullError",
    "SharedSteps",
    "Steps",
    "TextGenerator",
    "WarmedStep",
    "check_limits",
    "encode_prompt",
    "follow",
]
