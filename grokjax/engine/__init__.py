"""Continuous batching: many requests share the rows of one batch, each as if it were alone.

Read `engine` first, which takes requests and tells of their ends, then `stepping`, one step of it. `protocol` is what
it asks of a model; `scheduler` decides who runs where and when, `queue` who is next, by the counts of `fairness`,
`prefixes` what a prompt shares with the rows, and `guessing` how many tokens a step guesses. `intake` makes samples of
a request, `sample` is one of them on its way, `stopping` ends it at a stop string. `shared_steps` are the steps of a
model that spans processes; `warm_up` compiles all steps beforehand; `metrics` counts, and `prometheus` has the names of
it for monitoring; `one_thread` keeps a second thread out. `async_engine` puts the engine behind an event loop; `text`
continues one prompt at a time, with an engine of one slot.
"""

from grokjax.engine.async_engine import AsyncEngine
from grokjax.engine.engine import Engine
from grokjax.engine.intake import Intake
from grokjax.engine.metrics import Histogram, Metrics
from grokjax.engine.protocol import Steps
from grokjax.engine.queue import QueueFullError
from grokjax.engine.sample import Handle, token_scores
from grokjax.engine.shared_steps import SharedSteps, check_same_model, follow
from grokjax.engine.text import GeneratedText, TextGenerator
from grokjax.engine.warm_up import WarmedStep, persistent_cache

__all__ = [
    "AsyncEngine",
    "Engine",
    "GeneratedText",
    "Handle",
    "Histogram",
    "Intake",
    "Metrics",
    "QueueFullError",
    "SharedSteps",
    "Steps",
    "TextGenerator",
    "WarmedStep",
    "check_same_model",
    "follow",
    "persistent_cache",
    "token_scores",
]
