"""Sampling: how each row of a batch is sampled, the filters, and one draw for each row with that row's own key.

Arithmetic is float32 whatever the logits' dtype.

Read `draw` first, which has `sample_token`; then `filters`, the thresholds of top-k, min-p and top-p. `settings` says
what may be asked for in each row, and `keys` which key belongs to which position.
"""

from grokjax.sampling.draw import SampleOutput, log_probs_of, sample_token
from grokjax.sampling.filters import EXCLUDED, min_p_filter, top_k_filter, top_p_filter
from grokjax.sampling.keys import row_keys, seed_key, typed_keys
from grokjax.sampling.settings import SampleSettings

__all__ = [
    "EXCLUDED",
    "SampleOutput",
    "SampleSettings",
    "log_probs_of",
    "min_p_filter",
    "row_keys",
    "sample_token",
    "seed_key",
    "top_k_filter",
    "top_p_filter",
    "typed_keys",
]
