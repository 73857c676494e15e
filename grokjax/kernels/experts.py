"""The experts that each token chose: chooses the form for the device."""

import functools
from typing import Any

import jax

from grokjax.kernels import experts_gpu
from grokjax.kernels.cpu_features import summed_rows
from grokjax.kernels.derivatives import with_rule
from grokjax.kernels.experts_backward import evaluate_saving, pull_in_blocks
from grokjax.kernels.experts_blocks import evaluate_in_blocks
from grokjax.kernels.gated_unit import GatedWeights

# Numbers of rows for which a CPU has programs of their own, beside those that it multiplies as sums; at the largest a
# product is fastest, a row.
_CPU_SIZES = (4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384)
# On TPUs, and on GPUs where there is no kernel: those of a decode step's short blocks, fewest and most rows of a block.
_FEW_ROWS, _FEWEST_ROWS, _MOST_ROWS = (1, 2), 8, 128
# On GPUs, where an expert has so many tokens that its weights are cast first: in quarters of a fair share.
_GPU_SIZES = (1, 2, 3, 4, 5, 6, 8)


def evaluate_experts(
    x: jax.Array,
    probabilities: jax.Array,
    experts: jax.Array,
    weights: GatedWeights,
    *,
    layer: jax.Array,
    num_experts: int,
    platform: str,
) -> jax.Array:
    """The sum over each token's experts, weighted by their probabilities.

    On GPUs a few tokens an expert are `experts_gpu.evaluate_in_one_kernel`; all else is
    `experts_blocks.evaluate_in_blocks`.

    Args:
      x: [M, D] in the compute dtype.
      probabilities: float32 [M, X].
      experts: int32 [M, X], numbers of experts in `weights`, those of a token all different; others (below 0, or E and
        above) are left out.
      weights: gate and up [L, E, D, F] and down [L, E, F, D].
      layer: int32 [].
      num_experts: of all devices; tokens are expected to be spread over them.
      platform: "cpu", "gpu" or "tpu", where it will run.

    Returns:
      float32 [M, D].
    """
    num_tokens, per_token = experts.shape
    sizes = block_sizes(num_tokens, per_token=per_token, num_experts=num_experts, platform=platform)
    in_blocks: dict[str, Any] = {"sizes": sizes, "platform": platform}

    def evaluate(
        x: jax.Array, probabilities: jax.Array, experts: jax.Array, weights: GatedWeights, layer: jax.Array
    ) -> jax.Array:
        routed = x, probabilities, experts, weights
        if platform == "gpu" and experts_gpu.fits(x, weights, per_token=per_token, num_experts=num_experts):
            return experts_gpu.evaluate_in_one_kernel(*routed, layer=layer, num_experts=num_experts)
        return evaluate_in_blocks(*routed, layer, **in_blocks)

    run = with_rule(
        evaluate,
        functools.partial(pull_in_blocks, **in_blocks),
        saving=functools.partial(evaluate_saving, **in_blocks),
        smooth=functools.partial(evaluate_in_blocks, **in_blocks),
    )
    out: jax.Array = run(x, probabilities, experts, weights, layer)
    return out


def block_sizes(num_tokens: int, *, per_token: int, num_experts: int, platform: str) -> tuple[int, ...]:
    """Numbers of rows, ascending, that a block of tokens of one expert can be computed with; the last is its room.

    On a CPU a block has room for whatever comes, so that an expert's weights are read, cast and packed once, and is
    computed with the size next to what came. So it is on GPUs where many come, with room for two fair shares. Elsewhere
    it has room for one: a larger one would be filled up with rows of nobody, a smaller one would read the weights more
    often.
    """
    fair_share = max(1, num_tokens * per_token // num_experts)
    if platform == "cpu":
        room = min(num_tokens, _CPU_SIZES[-1])
        sizes = {*range(1, summed_rows() + 1), *_CPU_SIZES}
        return (*(size for size in sorted(sizes) if fair_share / 4 <= size < room), room)
    if platform == "gpu" and not experts_gpu.is_few(num_tokens, per_token=per_token, num_experts=num_experts):
        return tuple(size * (-(-fair_share // 4)) for size in _GPU_SIZES if size * fair_share <= 4 * num_tokens)
    room = min(num_tokens, _MOST_ROWS, max(_FEWEST_ROWS, 1 << (fair_share - 1).bit_length()))
    return (*(size for size in _FEW_ROWS if size < room <= _FEWEST_ROWS), room)
