"""Looks inside a model: reads the values that it computes on its way, and changes them.

Read `tap` first: `Tap` says what is to be read, `observe` runs a model and reads it. `edit` makes a model that computes
something else, which goes wherever a model goes. The sites at which both work are in `grokjax.model`.
"""

from grokjax.model import SITES, At, Edit
from grokjax.research.edit import (
    bias_router,
    drop_experts,
    edit,
    edits_of,
    force_experts,
    limit_experts,
    mask_heads,
    patch,
    project_out,
    replace,
    scale_experts,
    scale_heads,
    steer,
    unedited,
)
from grokjax.research.tap import Tap, observe, observe_step

__all__ = [
    "SITES",
    "At",
    "Edit",
    "Tap",
    "bias_router",
    "drop_experts",
    "edit",
    "edits_of",
    "force_experts",
    "limit_experts",
    "mask_heads",
    "observe",
    "observe_step",
    "patch",
    "project_out",
    "replace",
    "scale_experts",
    "scale_heads",
    "steer",
    "unedited",
]
