"""The router of a stack of layers, and its experts: a token is evaluated by those that it chose, and by no other."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.kernels import GatedWeights, activate, evaluate_experts, matmuls
from grokjax.model.base import Module
from grokjax.model.contexts import in_any_context
from grokjax.model.probes import UNPROBED, Probe
from grokjax.model.weights import LayerWeights, weight_param
from grokjax.sharding import Partitioner


class FeedForward(Module):
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

    @in_any_context
    def __call__(self, x: jax.Array, valid: jax.Array, *, layer: jax.Array, probe: Probe = UNPROBED) -> jax.Array:
        """Mixes the outputs of each token's experts.

        Args:
          x: [B, T, D] in the compute dtype.
          valid: bool [B, T]; the other tokens evaluate no expert and give 0.
          layer: int32 [], which layer's weights.
          probe: reads and changes what the router gives.

        Returns:
          [B, T, D] in the compute dtype.
        """
        probabilities, experts = self.route(x, layer=layer, probe=probe)
        weights = LayerWeights.of((self.gate, self.up, self.down), layer, self.partitioner)
        rows = self.partitioner.without_embed().spec(("batch", None, None), x.shape)
        run = self.partitioner.shard_map(
            self._evaluate_locally,
            in_specs=(rows, rows, rows, PartitionSpec(*rows[:2]), weights.partition_specs, PartitionSpec()),
            out_specs=rows,
        )
        return run(x, probabilities, experts, valid, weights.stacks, weights.layer)

    @in_any_context
    def route(self, x: jax.Array, *, layer: jax.Array, probe: Probe = UNPROBED) -> tuple[jax.Array, jax.Array]:
        """The experts of each token, best first, and their probabilities: softmax over all E, not renormalised.

        Args:
          x: [B, T, D].
          layer: int32 [].
          probe: reads and changes the logits, the experts and their probabilities, in this order.

        Returns:
          Probabilities, float32 [B, T, X], and expert numbers, int32 [B, T, X].
        """
        if self.config.num_experts == 1:
            shape = (*x.shape[:2], 1)
            return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
        logits = probe.at("router.logits", self.router_logits(x, layer=layer))
        rows = self.partitioner.spec(("batch", None, None), logits.shape)
        # Every device chooses for its own rows: XLA's CPU and GPU backends gather the operand of a top-k.
        choose = self.partitioner.shard_map(self._choose, in_specs=rows, out_specs=(rows, rows))
        probabilities, experts = choose(logits)
        experts = probe.at("router.experts", experts)
        if probe.changes("router.experts"):
            probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), experts, axis=-1)
        probabilities = probe.at("router.probabilities", probabilities, router_logits=logits, experts=experts)
        return probabilities, experts

    @in_any_context
    def router_logits(self, x: jax.Array, *, layer: jax.Array) -> jax.Array:
        """The router's scores, float32 [B, T, E], of x [B, T, D], computed in float32."""
        router = lax.dynamic_index_in_dim(self.router[...], layer, keepdims=False)
        return jnp.einsum("btd,de->bte", x.astype(jnp.float32), router, precision=lax.Precision.HIGHEST)

    @in_any_context
    def evaluate_each(self, x: jax.Array, experts: jax.Array, *, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What some experts of each token make of it, one by one; the weights of one expert are used at a time.

        Args:
          x: [B, T, D] in the compute dtype.
          experts: int32 [B, T, X], their numbers.
          layer: int32 [], which layer's weights.

        Returns:
          Hidden units after activation and gate, float32 [B, T, X, F], and outputs, float32 [B, T, X, D].
        """
        weights = LayerWeights.of((self.gate, self.up, self.down), layer, self.partitioner)
        partitioner = self.partitioner.without_embed()
        rows = partitioner.spec(("batch", None, None), x.shape)
        run = partitioner.shard_map(
            self._evaluate_each_locally,
            in_specs=(rows, rows, weights.partition_specs, PartitionSpec()),
            out_specs=(PartitionSpec(*rows, *partitioner.spec(("ffn",), (self.config.ffn_dim,))), rows),
        )
        return run(x, experts, weights.stacks, weights.layer)

    def _choose(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The largest probabilities of logits [B, T, E] and their experts, both [B, T, X]."""
        probabilities, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), self.config.experts_per_token)
        return probabilities, experts

    def _evaluate_locally(
        self,
        x: jax.Array,
        probabilities: jax.Array,
        experts: jax.Array,
        valid: jax.Array,
        weights: GatedWeights,
        layer: jax.Array,
    ) -> jax.Array:
        """One device's share of the experts, for its rows."""
        tokens = x.reshape(-1, x.shape[-1])
        own = experts.reshape(tokens.shape[0], -1) - self.partitioner.index("experts") * weights[0].shape[1]
        own = jnp.where(valid.reshape(-1, 1), own, -1)
        out = evaluate_experts(
            tokens,
            probabilities.reshape(own.shape),
            own,
            weights,
            layer=layer,
            num_experts=self.config.num_experts,
            platform=self.partitioner.platform,
        )
        return self.partitioner.psum(out, "experts", "ffn").reshape(x.shape).astype(self.dtype)

    def _evaluate_each_locally(
        self, x: jax.Array, experts: jax.Array, weights: GatedWeights, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One device's hidden units, and all of the outputs, of its rows."""
        gate, up, down = weights
        multiply = functools.partial(matmuls, platform=self.partitioner.platform)
        own = experts - self.partitioner.index("experts") * gate.shape[1]

        def add_expert(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            is_it = (own == number)[..., None]  # [B, T, X, 1]

            def evaluate() -> tuple[jax.Array, jax.Array]:
                hidden = activate(*multiply(x, (gate, up), at=(layer, number)))
                (output,) = multiply(hidden.astype(x.dtype), (down,), at=(layer, number))
                return jnp.where(is_it, hidden[:, :, None], found[0]), jnp.where(is_it, output[:, :, None], found[1])

            return lax.cond(is_it.any(), evaluate, lambda: found)

        nothing = (jnp.zeros((*experts.shape, w.shape[-1]), jnp.float32) for w in (gate, down))
        hidden, output = lax.fori_loop(0, gate.shape[1], add_expert, tuple(nothing))
        return self.partitioner.psum(hidden, "experts"), self.partitioner.psum(output, "experts", "ffn")
