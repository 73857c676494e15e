"""Grok-1: its modules in Flax NNX, and the pure steps that run it.

Read `grok` first: the stack of decoder layers, which `stack` runs. Then its parts: `attention`, `feed_forward`,
`embedding`, `layers` and `weights`, which they share; `base` says how all of them print and are viewed, and `contexts`
lets them run under any mesh that a caller has set.
`building` makes models. `steps` has `forward`, `prefill`, `decode` and `generate`; `guesses` lets a step make more than
one token; `slot_steps` has the steps for a batch whose rows are an engine's slots, and `slots` what both say to each
other.
"""

from grokjax.model.base import named_parameters
from grokjax.model.building import (
    abstract_model,
    check_weights_fit,
    init,
    init_parameters,
    with_quantized_table,
    with_values,
)
from grokjax.model.contexts import in_any_context
from grokjax.model.grok import Grok, check_dtype
from grokjax.model.slot_steps import (
    DeviceRuns,
    DeviceScores,
    DeviceTokens,
    ModelSteps,
    SlotState,
    lower_decode,
    lower_prefill,
)
from grokjax.model.slots import Drawn, DrawnRun, DrawnRuns, DrawnTokens, RowSettings, SlotSettings
from grokjax.model.steps import Generated, decode, decode_and_sample, forward, generate, prefill

__all__ = [
    "DeviceRuns",
    "DeviceScores",
    "DeviceTokens",
    "Drawn",
    "DrawnRun",
    "DrawnRuns",
    "DrawnTokens",
    "Generated",
    "Grok",
    "ModelSteps",
    "RowSettings",
    "SlotSettings",
    "SlotState",
    "abstract_model",
    "check_dtype",
    "check_weights_fit",
    "decode",
    "decode_and_sample",
    "forward",
    "generate",
    "in_any_context",
    "init",
    "init_parameters",
    "lower_decode",
    "lower_prefill",
    "named_parameters",
    "prefill",
    "with_quantized_table",
    "with_values",
]
