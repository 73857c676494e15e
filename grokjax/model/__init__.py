"""Grok-1: its modules in Flax NNX, and the pure steps that run it.

Read `grok` first: the stack of decoder layers, which `stack` runs. Then its parts: `attention`, `feed_forward`,
`embedding`, `layers` and `weights`, which they share; `base` says how all of them print and are viewed, and `contexts`
lets them run under any mesh that a caller has set. `probes` reads and changes their values on the way.
`building` makes models, and `streamed` compiles steps, also those of models whose layers come one after the other.
`steps` has `forward`, `prefill` and `decode`; `generation` has `generate`, the whole loop, in which `guesses` lets a
step make more than one token; `scores` says how probable the tokens of a text are. `slot_steps` has the steps for a
batch whose rows are an engine's slots, `slot_state` what they keep on the devices, and `slots` what an engine and they
say to each other.
"""

from grokjax.model.base import named_parameters
from grokjax.model.building import (
    abstract_model,
    check_weights_fit,
    init,
    init_parameters,
    state_with_values,
    with_quantized_table,
    with_values,
)
from grokjax.model.contexts import in_any_context
from grokjax.model.generation import Generated, generate
from grokjax.model.grok import Grok, check_dtype
from grokjax.model.probes import OUTSIDE_LAYERS, SITES, At, Edit, Edits, Probe, Reader, axes_of
from grokjax.model.scores import Scores, pad_texts, score
from grokjax.model.slot_state import SlotState
from grokjax.model.slot_steps import DeviceResult, ModelSteps, lower_decode, lower_prefill
from grokjax.model.slots import Drawn, DrawnRun, DrawnRuns, DrawnTokens, RowSettings, SlotOptions, SlotSettings
from grokjax.model.steps import (
    check_chunks,
    check_texts,
    decode,
    decode_and_sample,
    forward,
    last_logits,
    prefill,
)
from grokjax.model.streamed import (
    Compiled,
    LayerAtHand,
    LayerSource,
    StreamedLayers,
    TakeLayer,
    is_streamed,
    layers_that_stay,
    share_of_experts,
)

__all__ = [
    "OUTSIDE_LAYERS",
    "SITES",
    "At",
    "Compiled",
    "DeviceResult",
    "Drawn",
    "DrawnRun",
    "DrawnRuns",
    "DrawnTokens",
    "Edit",
    "Edits",
    "Generated",
    "Grok",
    "LayerAtHand",
    "LayerSource",
    "ModelSteps",
    "Probe",
    "Reader",
    "RowSettings",
    "Scores",
    "SlotOptions",
    "SlotSettings",
    "SlotState",
    "StreamedLayers",
    "TakeLayer",
    "abstract_model",
    "axes_of",
    "check_chunks",
    "check_dtype",
    "check_texts",
    "check_weights_fit",
    "decode",
    "decode_and_sample",
    "forward",
    "generate",
    "in_any_context",
    "init",
    "init_parameters",
    "is_streamed",
    "last_logits",
    "layers_that_stay",
    "lower_decode",
    "lower_prefill",
    "named_parameters",
    "pad_texts",
    "prefill",
    "score",
    "share_of_experts",
    "state_with_values",
    "with_quantized_table",
    "with_values",
]
