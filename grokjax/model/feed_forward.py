"""The router and the experts: a token is evaluated by the experts that it chose, and by no other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.kernels import KERNEL_ROWS, matmul, matmul_gpu, matmuls, numbers_and_scales
from grokjax.model.weights import LayerWeights, weight_param
from grokjax.quantization import Weight
from grokjax.sharding import Partitioner

# Numbers of rows for which a CPU has programs of their own; at the largest a product is fastest, a row.
_CPU_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384)
# On TPUs, and on GPUs where there is no kernel: those of a decode step's short blocks, fewest and most rows of a block.
_FEW_ROWS, _FEWEST_ROWS, _MOST_ROWS = (1, 2), 8, 128
# On GPUs, where an expert has so many tokens that its weights are cast first: in quarters of a fair share.
_GPU_SIZES = (1, 2, 3, 4, 5, 6, 8)


class FeedForward(nnx.Module):
    """Gated feed-forward experts with a softmax router, for a stack of layers; with E = 1 a dense block, no router.

    Parameters: router [L, D, E] in float32, gate and up [L, E, D, F], down [L, E, F, D].
    """

    def __init__(
        self, config: GrokConfig, *, dtype: DTypeLike, quantized: bool, partitioner: Partitioner, rngs: nnx.Rngs
    ):
        self.config, self.dtype, self.partitioner = config, jnp.dtype(dtype), partitioner
        stack = (config.num_layers, config.num_experts)
        weight = functools.partial(weight_param, rngs, dtype=dtype, quantized=quantized)
        if config.num_experts > 1:
            router_shape = (config.num_layers, config.model_dim, config.num_experts)
            self.router = weight_param(rngs, router_shape, ("layers", None, None), dtype=jnp.float32)
        self.gate = weight((*stack, config.model_dim, config.ffn_dim), ("layers", "experts", "embed", "ffn"))
        self.up = weight((*stack, config.model_dim, config.ffn_dim), ("layers", "experts", "embed", "ffn"))
        self.down = weight((*stack, config.ffn_dim, config.model_dim), ("layers", "experts", "ffn", "embed"))

    def __call__(self, x: jax.Array, valid: jax.Array, *, layer: jax.Array) -> jax.Array:
        """Mixes the outputs of each token's experts.

        Args:
          x: [B, T, D] in the compute dtype.
          valid: bool [B, T]; the other tokens evaluate no expert and give 0.
          layer: int32 [], which layer's weights.

        Returns:
          [B, T, D] in the compute dtype.
        """
        gates, experts = self.route(x, layer=layer)
        weights = LayerWeights.of((self.gate, self.up, self.down), layer, self.partitioner)
        rows = self.partitioner.without_embed().spec(("batch", None, None), x.shape)
        run = self.partitioner.shard_map(
            self._local,
            in_specs=(rows, rows, rows, PartitionSpec(*rows[:2]), weights.partition_specs, PartitionSpec()),
            out_specs=rows,
        )
        return run(x, gates, experts, valid, weights.stacks, weights.layer)

    def route(self, x: jax.Array, *, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, best first, and their gates: softmax over all E, not renormalised.

        Args:
          x: [B, T, D].
          layer: int32 [].

        Returns:
          Gates, float32 [B, T, X], and expert numbers, int32 [B, T, X].
        """
        if self.config.num_experts == 1:
            shape = (*x.shape[:2], 1)
            return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
        logits = self.router_logits(x, layer=layer)
        rows = self.partitioner.spec(("batch", None, None), logits.shape)
        # Every device chooses for its own rows: XLA's CPU and GPU backends gather the operand of a top-k.
        choose = self.partitioner.shard_map(self._choose, in_specs=rows, out_specs=(rows, rows))
        gates, experts = choose(logits)
        return gates, experts

    def router_logits(self, x: jax.Array, *, layer: jax.Array) -> jax.Array:
        """The router's scores, float32 [B, T, E], of x [B, T, D], computed in float32."""
        router = lax.dynamic_index_in_dim(self.router[...], layer, keepdims=False)
        return jnp.einsum("btd,de->bte", x.astype(jnp.float32), router, precision=lax.Precision.HIGHEST)

    def _choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.experts_per_token)
        return gates, experts

    def _local(
        self,
        x: jax.Array,
        gates: jax.Array,
        experts: jax.Array,
        valid: jax.Array,
        weights: tuple[Weight, Weight, Weight],
        layer: jax.Array,
    ) -> jax.Array:
        """One device's share of the experts, for its rows."""
        tokens = x.reshape(-1, x.shape[-1])
        own = experts.reshape(tokens.shape[0], -1) - self.partitioner.index("experts") * weights[0].shape[1]
        own = jnp.where(valid.reshape(-1, 1), own, -1)
        counts = {"per_token": own.shape[1], "num_experts": self.config.num_experts}
        platform = self.partitioner.platform
        if platform == "gpu" and fits_kernel(tokens, weights, **counts):
            out = evaluate_together(
                tokens, gates.reshape(own.shape), own, weights, layer=layer, num_experts=self.config.num_experts
            )
        else:
            sizes = block_sizes(len(tokens), **counts, platform=platform)
            place: dict[str, Any] = {"layer": layer, "sizes": sizes, "platform": platform}
            out = evaluate_experts(tokens, gates.reshape(own.shape), own, weights, **place)
        return self.partitioner.psum(out, "experts", "ffn").reshape(x.shape).astype(self.dtype)


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
        return (*(size for size in _CPU_SIZES if fair_share / 4 <= size < room), room)
    if platform == "gpu" and not _is_few(num_tokens, per_token=per_token, num_experts=num_experts):
        return tuple(size * (-(-fair_share // 4)) for size in _GPU_SIZES if size * fair_share <= 4 * num_tokens)
    room = min(num_tokens, _MOST_ROWS, max(_FEWEST_ROWS, 1 << (fair_share - 1).bit_length()))
    return (*(size for size in _FEW_ROWS if size < room <= _FEWEST_ROWS), room)


def _is_few(num_tokens: int, *, per_token: int, num_experts: int) -> bool:
    """Whether the experts of a GPU expect so few tokens each that a kernel casts their weights faster."""
    return num_tokens * per_token <= KERNEL_ROWS * num_experts


def evaluate_experts(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: tuple[Weight, Weight, Weight],
    *,
    layer: jax.Array,
    sizes: tuple[int, ...],
    platform: str | None = None,
) -> jax.Array:
    """The gated sum over each token's experts, one block of tokens of one expert at a time.

    The (token, expert) pairs are sorted by expert and cut into blocks of rows that never mix experts; a loop of as many
    steps as there are blocks reads each block's expert from the stack. An expert that nobody chose is not read; one
    that several tokens chose is read once a block.

    Args:
      x: [M, D] in the compute dtype.
      gates: float32 [M, X].
      experts: int32 [M, X], numbers of experts in `weights`; others (below 0, or E and above) are left out.
      weights: gate and up [L, E, D, F] and down [L, E, F, D].
      layer: int32 [].
      sizes: numbers of rows to compute a block with, see `block_sizes`.
      platform: as for `kernels.matmul`.

    Returns:
      float32 [M, D].
    """
    block = sizes[-1]
    num_tokens, per_token = experts.shape
    num_experts = weights[0].shape[1]
    flat = experts.reshape(-1)
    is_ours = (flat >= 0) & (flat < num_experts)
    flat = jnp.where(is_ours, flat, num_experts)  # what is left out sorts last
    order = jnp.argsort(flat, stable=True)
    places = jnp.argsort(order).reshape(experts.shape)
    counts = jnp.bincount(flat, length=num_experts)
    block_ends = jnp.cumsum(-(-counts // block))
    group_starts = jnp.cumsum(counts) - counts
    tokens = jnp.pad(order // per_token, (0, block))  # the last block reads past the last pair

    def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(block_ends, i, side="right").astype(jnp.int32)
        done = (i - jnp.where(expert > 0, block_ends[expert - 1], 0)) * block
        first = group_starts[expert] + done
        rows = lax.dynamic_slice_in_dim(tokens, first, block)

        def evaluate(size: int) -> Callable[[], jax.Array]:
            def run() -> jax.Array:
                out = gated_unit(x[rows[:size]], weights, at=(layer, expert), platform=platform)
                return jnp.pad(out, ((0, block - size), (0, 0)))

            return run

        # The smallest size that holds the expert's tokens; rows behind them are overwritten by the blocks that follow.
        choice = (counts[expert] - done > jnp.array(sizes[:-1], jnp.int32)).sum()
        return lax.dynamic_update_slice_in_dim(out, lax.switch(choice, [evaluate(size) for size in sizes]), first, 0)

    out = jnp.zeros((num_tokens * per_token + block, x.shape[1]), jnp.float32)
    out = lax.fori_loop(0, block_ends[-1], add_block, out)
    shares = jnp.where(is_ours, gates.reshape(-1), 0).reshape(gates.shape)
    return sum(out[places[:, choice]] * shares[:, choice, None] for choice in range(per_token))


# Most tokens of which every one is computed by every chosen expert: rows that nobody asked for cost a kernel nothing.
_COMMON_ROWS = 16


def fits_kernel(x: jax.Array, weights: tuple[Weight, Weight, Weight], *, per_token: int, num_experts: int) -> bool:
    """Whether `evaluate_together` takes these, and gains: an expert has so few tokens that the kernel is faster."""
    gate, up, down = map(numbers_and_scales, weights)
    is_few = _is_few(len(x), per_token=per_token, num_experts=num_experts)
    return is_few and matmul_gpu.fits(x, [gate, up]) and matmul_gpu.fits(x, [down])


def evaluate_together(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: tuple[Weight, Weight, Weight],
    *,
    layer: jax.Array,
    num_experts: int,
) -> jax.Array:
    """The gated sum over each token's experts, all experts in one kernel for each weight, for GPUs.

    A loop over blocks, as in `evaluate_experts`, would ask the host at every turn whether it goes on. Few tokens are
    all computed by every expert that one of them chose, many are sorted into blocks of one expert each.

    Args:
      x: bfloat16 [M, D].
      gates: float32 [M, X].
      experts: int32 [M, X], as in `evaluate_experts`, those of a token all different.
      weights: gate and up [L, E, D, F] and down [L, E, F, D].
      layer: int32 [].
      num_experts: of all devices; tokens are expected to be spread over them.

    Returns:
      float32 [M, D].
    """
    if len(x) <= _COMMON_ROWS:
        return _evaluate_common(x, gates, experts, weights, layer=layer)
    return _evaluate_sorted(x, gates, experts, weights, layer=layer, num_experts=num_experts)


def _evaluate_common(
    x: jax.Array, gates: jax.Array, experts: jax.Array, weights: tuple[Weight, Weight, Weight], *, layer: jax.Array
) -> jax.Array:
    """All tokens by every expert that one of them chose: rows that nobody asked for are weighted with 0."""
    held = weights[0].shape[1]
    candidates = experts[0] if len(x) == 1 else jnp.arange(held)  # [N]
    is_ours = (candidates >= 0) & (candidates < held)
    choices = (experts[None] == candidates[:, None, None]) & is_ours[:, None, None]  # [N, M, X]
    chosen = choices.any(axis=-1)
    shares = jnp.where(choices, gates[None], 0).sum(axis=-1)
    wanted, most = chosen.any(axis=-1), min(held, experts.size)
    out = _gated_units(x[None], weights, layer=layer, experts=candidates, is_wanted=wanted, num_wanted=most)
    return jnp.where(chosen[..., None], out * shares[..., None], 0).sum(axis=0)  # what is not wanted is no number


def _evaluate_sorted(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: tuple[Weight, Weight, Weight],
    *,
    layer: jax.Array,
    num_experts: int,
) -> jax.Array:
    """The (token, expert) pairs in blocks of one expert each.

    They are few, and comparing each with each is one kernel where a sort is several.
    """
    (num_tokens, per_token), held = experts.shape, weights[0].shape[1]
    pairs = experts.size
    # Room for twice a fair share: that an expert has a second block costs more than rows of nobody.
    tile = matmul_gpu.tile_rows(max(1, 2 * pairs // num_experts))
    most = min(held * -(-num_tokens // tile), pairs // tile + min(held, pairs))
    flat, number = experts.reshape(-1), jnp.arange(pairs)  # [M * X]
    is_ours = (flat >= 0) & (flat < held)
    counts = (flat[None] == jnp.arange(held)[:, None]).sum(axis=1)  # [E]
    ends = jnp.cumsum(-(-counts // tile))  # blocks
    first = ends - -(-counts // tile)
    before = ((flat[None] == flat[:, None]) & (number[None] < number[:, None])).sum(axis=1)  # pairs of the same expert
    places = jnp.where(is_ours, first[jnp.where(is_ours, flat, 0)] * tile + before, most * tile + number)
    tokens = jnp.zeros(most * tile, jnp.int32).at[places].set(number // per_token, mode="drop", unique_indices=True)
    block = jnp.arange(most)
    chosen = jnp.minimum((ends[None] <= block[:, None]).sum(axis=1), held - 1)
    rows = x[tokens].reshape(most, tile, -1)
    expected = max(1, pairs * held // (num_experts * tile) + held // 2)
    out = _gated_units(rows, weights, layer=layer, experts=chosen, is_wanted=block < ends[-1], num_wanted=expected)
    found = out.reshape(most * tile, -1)[places] * gates.reshape(-1, 1)
    return jnp.where(is_ours[:, None], found, 0).reshape(num_tokens, per_token, -1).sum(axis=1)


def _gated_units(
    x: jax.Array,
    weights: tuple[Weight, Weight, Weight],
    *,
    layer: jax.Array,
    experts: jax.Array,
    is_wanted: jax.Array,
    num_wanted: int,
) -> jax.Array:
    """`gated_unit` of rows [N or 1, M, D] with N experts, int32 [N]: float32 [N, M, D]."""
    at = jnp.stack([jnp.broadcast_to(layer, experts.shape), experts], axis=1).astype(jnp.int32)
    multiply = functools.partial(matmul_gpu.stack_matmul, at=at, is_wanted=is_wanted, num_wanted=num_wanted)
    gate, up, down = map(numbers_and_scales, weights)
    inputs, factors = multiply(x, [gate, up])
    hidden = jax.nn.gelu(inputs, approximate=True) * factors
    return multiply(hidden.astype(x.dtype), [down])[0]


def gated_unit(
    x: jax.Array, weights: tuple[Weight, Weight, Weight], *, at: tuple[jax.Array, ...], platform: str | None = None
) -> jax.Array:
    """`(gelu(x @ gate) * (x @ up)) @ down` with the tanh form of GELU, float32 [M, D], for x [M, D]."""
    gate, up, down = weights
    inputs, factors = matmuls(x, (gate, up), at=at, platform=platform)
    hidden = jax.nn.gelu(inputs, approximate=True) * factors
    return matmul(hidden.astype(x.dtype), down, at=at, platform=platform)
