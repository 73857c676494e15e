"""Looks inside a model: reads the values that it computes on its way, and changes them.

Read `tap` first: `Tap` says what is to be read, `observe` runs a model and reads it. `edit` makes a model that computes
something else, which goes wherever a model goes, and `ready_made` has the usual changes for it. The sites at which both
work are in `grokjax.model`. `routing` sums up what the router does, and `lens` is what a tap makes tokens of.
"""

from grokjax.model import SITES, At, Edit
from grokjax.research.edit import edit, edits_of, unedited
from grokjax.research.lens import TopTokens, top_tokens
from grokjax.research.ready_made import (
    bias_router,
    drop_experts,
    force_experts,
    limit_experts,
    mask_heads,
    patch,
    project_out,
    replace,
    scale_experts,
    scale_heads,
    steer,
)
from grokjax.research.routing import RouterStats, observe_routing
from grokjax.research.tap import Tap, observe, observe_step

__all__ = [
    "SITES",
    "At",
    "Edit",
    "RouterStats",
    "Tap",
    "TopTokens",
    "bias_router",
    "drop_experts",
    "edit",
    "edits_of",
    "force_experts",
    "limit_experts",
    "mask_heads",
    "observe",
    "observe_routing",
    "observe_step",
    "patch",
    "project_out",
    "replace",
    "scale_experts",
    "scale_heads",
    "steer",
    "top_tokens",
    "unedited",
]
