"""The router and the experts: a token is evaluated by the experts that it chose, and by no other."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.layers import gather_embed, weight_param
from grokjax.quantization import Weight, matmul, specs
from grokjax.sharding import Partitioner

# Fewest and most token rows that are multiplied by an expert's weights together.
_FEWEST_ROWS, _MOST_ROWS = 8, 128
# Fair shares from which a block has room for a quarter more, so that most experts need one block only.
_LARGE_SHARE = 32
# Rows of a short block for which there are programs of their own: most experts have as few in a decode step.
_FEW_ROWS = (1, 2)


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
        partitioner = self.partitioner.without_embed()
        params = (self.gate, self.up, self.down)
        weights, indices = zip(*(gather_embed(param, layer, self.partitioner) for param in params), strict=True)
        weight_specs = tuple(specs(w, p.logical_axes, partitioner) for w, p in zip(weights, params, strict=True))
        rows = partitioner.spec(("batch", None, None), x.shape)
        run = partitioner.shard_map(
            self._local,
            in_specs=(rows, rows, rows, PartitionSpec(*rows[:2]), weight_specs, PartitionSpec()),
            out_specs=rows,
        )
        return run(x, gates, experts, valid, weights, indices[0])

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
        block = rows_per_block(len(tokens), per_token=own.shape[1], num_experts=self.config.num_experts)
        out = evaluate_experts(tokens, gates.reshape(own.shape), own, weights, layer=layer, block=block)
        return self.partitioner.psum(out, "experts", "ffn").reshape(x.shape).astype(self.dtype)


def rows_per_block(num_tokens: int, *, per_token: int, num_experts: int) -> int:
    """Rows of a block: a little more than an expert's fair share of the tokens, within limits.

    Larger blocks would be filled up with rows of nobody, smaller ones would read the weights more often.
    """
    fair_share = max(1, num_tokens * per_token // num_experts)
    if fair_share < _LARGE_SHARE:
        return min(num_tokens, max(_FEWEST_ROWS, 1 << (fair_share - 1).bit_length()))
    return min(num_tokens, _MOST_ROWS, -(-fair_share * 5 // 32) * 8)


def evaluate_experts(
    x: jax.Array,
    gates: jax.Array,
    experts: jax.Array,
    weights: tuple[Weight, Weight, Weight],
    *,
    layer: jax.Array,
    block: int,
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
      block: rows of a block, see `rows_per_block`.

    Returns:
      float32 [M, D].
    """
    num_tokens, per_token = experts.shape
    num_experts = weights[0].shape[1]
    flat = experts.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # what is left out sorts last
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=num_experts)
    block_ends = jnp.cumsum(-(-counts // block))
    group_starts = jnp.cumsum(counts) - counts
    order = jnp.pad(order, (0, block))  # the last block reads past the last pair

    def add_block(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(block_ends, i, side="right").astype(jnp.int32)
        done = (i - jnp.where(expert > 0, block_ends[expert - 1], 0)) * block
        pairs = lax.dynamic_slice_in_dim(order, group_starts[expert] + done, block)
        real = done + jnp.arange(block) < counts[expert]
        tokens = jnp.where(real, pairs // per_token, num_tokens)
        rows = x.at[tokens].get(mode="fill", fill_value=0)
        y = _gated_block(rows, weights, at=(layer, expert), num_real=counts[expert] - done)
        y = y * gates.reshape(-1)[pairs][:, None]
        return out.at[tokens].add(y, mode="drop")

    return lax.fori_loop(0, block_ends[-1], add_block, jnp.zeros(x.shape, jnp.float32))


def _gated_block(
    x: jax.Array, weights: tuple[Weight, Weight, Weight], *, at: tuple[jax.Array, ...], num_real: jax.Array
) -> jax.Array:
    """`gated_unit` of a block whose first `num_real` rows are real: a short one in the form for so few rows."""
    block = x.shape[0]
    if block > _FEWEST_ROWS:
        return gated_unit(x, weights, at=at)
    sizes = [size for size in _FEW_ROWS if size < block] + [block]

    def evaluate(size: int) -> Callable[[], jax.Array]:
        return lambda: jnp.pad(gated_unit(x[:size], weights, at=at), ((0, block - size), (0, 0)))

    choice = sum((num_real > size).astype(jnp.int32) for size in sizes[:-1])
    return lax.switch(choice, [evaluate(size) for size in sizes])


def gated_unit(x: jax.Array, weights: tuple[Weight, Weight, Weight], *, at: tuple[jax.Array, ...]) -> jax.Array:
    """`(gelu(x @ gate) * (x @ up)) @ down` with the tanh form of GELU, float32 [M, D], for x [M, D]."""
    gate, up, down = weights
    hidden = jax.nn.gelu(matmul(x, gate, at=at), approximate=True) * matmul(x, up, at=at)
    return matmul(hidden.astype(x.dtype), down, at=at)
