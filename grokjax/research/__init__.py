"""Looks inside a model: reads the values that it computes on its way, and changes them.

Read `tap` first: `Tap` says what is to be read, `observe` runs a model and reads it. `edit` makes a model that computes
something else, which goes wherever a model goes; `ready_made` has the usual changes for it, `router_edits` those of who
is chosen. The sites at which taps and edits work are in `grokjax.model`. `routing` sums up what the router does,
`comparison` how far two models differ; `sums` is what both sums share. `lens` is what a tap makes tokens of.
`attribution` splits a logit into what each part adds to it, `gradients` tells by derivatives what patches would do, and
`recomputed` has what no kernel holds at once: attention patterns, and each expert by itself. `pictures` draws what was
read. `perplexity` scores texts longer than a model reads at once, by `grokjax.score`; `continuations` scores what may
come behind a context. `harness` has a model do the tasks of EleutherAI's evaluation harness, for which `harness_model`
is what it takes for one.
"""

from grokjax.model import SITES, At, Edit
from grokjax.research.attribution import LogitDifference, LogitParts, attribute_logits
from grokjax.research.comparison import Comparison, compare
from grokjax.research.continuations import ContinuationScore, score_continuations
from grokjax.research.edit import edit, edits_of, unedited
from grokjax.research.gradients import estimate_patches, integrate_gradients
from grokjax.research.harness import evaluate_tasks, load_tasks
from grokjax.research.lens import TopTokens, top_tokens
from grokjax.research.perplexity import Perplexity, perplexity
from grokjax.research.pictures import HtmlPicture, colour_text, draw_experts, draw_lens, draw_load, draw_pattern
from grokjax.research.ready_made import mask_heads, patch, project_out, replace, scale_heads, steer
from grokjax.research.recomputed import ExpertOutputs, attention_pattern, expert_outputs
from grokjax.research.router_edits import bias_router, drop_experts, force_experts, limit_experts, scale_experts
from grokjax.research.routing import RouterStats, count_tokens, observe_routing
from grokjax.research.tap import Tap, observe, observe_step

__all__ = [
    "SITES",
    "At",
    "Comparison",
    "ContinuationScore",
    "Edit",
    "ExpertOutputs",
    "HtmlPicture",
    "LogitDifference",
    "LogitParts",
    "Perplexity",
    "RouterStats",
    "Tap",
    "TopTokens",
    "attention_pattern",
    "attribute_logits",
    "bias_router",
    "colour_text",
    "compare",
    "count_tokens",
    "draw_experts",
    "draw_lens",
    "draw_load",
    "draw_pattern",
    "drop_experts",
    "edit",
    "edits_of",
    "estimate_patches",
    "evaluate_tasks",
    "expert_outputs",
    "force_experts",
    "integrate_gradients",
    "limit_experts",
    "load_tasks",
    "mask_heads",
    "observe",
    "observe_routing",
    "observe_step",
    "patch",
    "perplexity",
    "project_out",
    "replace",
    "scale_experts",
    "scale_heads",
    "score_continuations",
    "steer",
    "top_tokens",
    "unedited",
]
