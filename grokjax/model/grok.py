"""The decoder: four norms around attention and experts, stacked, between the two uses of the embedding table."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import reprlib
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike, DTypeLike

from grokjax.cache import Entries, KVCache, default_cache_dtype
from grokjax.config import GrokConfig
from grokjax.context import own_context
from grokjax.kernels import CachePlace
from grokjax.model.attention import Attention
from grokjax.model.base import Module, view
from grokjax.model.contexts import in_any_context
from grokjax.model.embedding import Embedding
from grokjax.model.feed_forward import FeedForward
from grokjax.model.layers import RMSNorm
from grokjax.model.probes import UNPROBED, At, Edits, Probe
from grokjax.model.stack import Carry, run_observed, run_stack
from grokjax.sampling import SampleOutput, SampleSettings, row_keys, sample_token
from grokjax.sharding import Partitioner


class DecoderLayers(Module):
    """All decoder layers: every parameter has a leading [L] axis and is indexed where it is used.

    `layers[i]` is a view of one layer, the same module with L = 1, for reading: it refuses to be written.
    """

    def __init__(
        self, config: GrokConfig, *, dtype: DTypeLike, quantized: bool, partitioner: Partitioner, rngs: nnx.Rngs
    ):
        self.num_layers, self.partitioner = config.num_layers, partitioner
        self.pre_attention_norm = RMSNorm(config, num_layers=config.num_layers)
        self.attention = Attention(config, dtype=dtype, quantized=quantized, partitioner=partitioner, rngs=rngs)
        self.post_attention_norm = RMSNorm(config, num_layers=config.num_layers)
        self.pre_feed_forward_norm = RMSNorm(config, num_layers=config.num_layers)
        self.feed_forward = FeedForward(config, dtype=dtype, quantized=quantized, partitioner=partitioner, rngs=rngs)
        self.post_feed_forward_norm = RMSNorm(config, num_layers=config.num_layers)

    @own_context()
    def __getitem__(self, index: int) -> "DecoderLayers":
        if not isinstance(index, int | np.integer):
            raise TypeError(f"layers[{index!r}] is not one layer: give its number, from 0 to {self.num_layers - 1}.")
        if not -self.num_layers <= index < self.num_layers:
            raise IndexError(f"layer {index} does not exist: the model has {self.num_layers} layers.")
        index %= self.num_layers
        return view(self, lambda leaf: leaf[index : index + 1], num_layers=1)

    def __call__(
        self,
        x: jax.Array,
        keys: Entries,
        values: Entries,
        *,
        layer: jax.Array,
        place: CachePlace,
        probe: Probe = UNPROBED,
    ) -> tuple[jax.Array, Entries, Entries]:
        """One layer, number `layer`; arguments and results as those of `Attention`."""
        x = probe.at("stream.in", x)
        with jax.named_scope("attention"):
            normed = self.pre_attention_norm(x, layer)
            mixed, keys, values = self.attention(normed, keys, values, layer=layer, place=place, probe=probe)
            x = x + probe.at("attention.out", self.post_attention_norm(mixed, layer))
        x = probe.at("stream.mid", x)
        with jax.named_scope("feed_forward"):
            valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < place.count[:, None]
            mixed = self.feed_forward(self.pre_feed_forward_norm(x, layer), valid, layer=layer, probe=probe)
            x = x + probe.at("feed_forward.out", self.post_feed_forward_norm(mixed, layer))
        return probe.at("stream.out", x), keys, values

    def run(self, carry: Carry, place: CachePlace, *, keeps: bool, probe: Probe) -> Carry:
        """All layers, one after the other.

        Args:
          carry: the first layer's input [P, T, D] in the compute dtype, and the cache's keys and values.
          place: of the tokens in the first layer of the cache.
          keeps: whether each layer has a cache of its own; else all use one of one layer in turn.
          probe: reads and changes values on their way.

        Returns:
          The last layer's output [P, T, D], and the cache's keys and values.
        """
        if not probe.is_idle:
            return self._run_observed(carry, place, keeps=keeps, probe=probe)
        graphdef, parameters = nnx.split(self)

        def run_layer(
            parameters: nnx.State, carry: Carry, layer: jax.Array, place: CachePlace, *, is_pulled: bool
        ) -> Carry:
            layers = nnx.merge(graphdef, parameters)
            if is_pulled:
                for module in (layers.attention, layers.feed_forward):
                    vars(module).update(partitioner=module.partitioner.backwards())  # a view's, too
            x, keys, values = layers(*carry, layer=layer, place=place)
            return self.partitioner.constrain(x, ("batch", None, None)), keys, values

        return run_stack(run_layer, parameters, carry, place, keeps=keeps, platform=self.partitioner.platform)

    def _run_observed(self, carry: Carry, place: CachePlace, *, keeps: bool, probe: Probe) -> Carry:
        """All layers, and what the probe sees in them is carried through their loop."""

        def run_layer(carry: tuple[Carry, Any], layer: jax.Array, place: CachePlace) -> tuple[Carry, Any]:
            (x, keys, values), seen = carry
            here = probe.within(layer, seen)
            x, keys, values = self(x, keys, values, layer=layer, place=place, probe=here)
            return (self.partitioner.constrain(x, ("batch", None, None)), keys, values), here.seen

        found = jax.eval_shape(run_layer, (carry, {}), place.layer, place)[1]
        start = carry, probe.empty(found)
        carry, seen = run_observed(run_layer, start, place, num_layers=self.num_layers, keeps=keeps)
        probe.seen.update(seen)
        return carry


class Grok(Module):
    """Grok-1: a decoder with grouped-query attention and a mixture of experts.

    Make one with `init` or `load`; run it with `forward`, `prefill`, `decode` and `generate`.

    Attributes:
      config: the sizes.
      dtype: compute dtype, float32 or bfloat16; plain weights are held in it too.
      partitioner: mesh and sharding rules.
      edits: what changes its values on their way, None in a model that no one has edited; see docs/research.md.
    """

    edits: Edits | None = None

    def __init__(
        self, config: GrokConfig, *, dtype: DTypeLike, quantized: bool, partitioner: Partitioner, rngs: nnx.Rngs
    ):
        self.config, self.dtype, self.partitioner = config, check_dtype(dtype), partitioner
        self.embedding = Embedding(config, dtype=dtype, partitioner=partitioner, rngs=rngs)
        self.layers = DecoderLayers(config, dtype=dtype, quantized=quantized, partitioner=partitioner, rngs=rngs)
        self.final_norm = RMSNorm(config)

    @property
    def mesh(self) -> Mesh | AbstractMesh:
        """The mesh of devices that the model lies on; its axes are Auto, whatever the kind of those that it was given.

        What is computed with its weights under another mesh of yours belongs into `with jax.set_mesh(model.mesh):`.
        """
        return self.partitioner.mesh

    def __nnx_repr__(self) -> Iterator[Any]:
        head, *parameters = super().__nnx_repr__()
        yield head
        yield reprlib.Attr("config", self.config)
        yield reprlib.Attr("dtype", self.dtype.name, use_raw_value=True)
        yield reprlib.Attr("mesh", dict(self.mesh.shape))
        yield reprlib.Attr("rules", self.partitioner.rules)
        if self.edits is not None:
            yield reprlib.Attr("edits", self.edits.get_value())
        yield from parameters

    @in_any_context
    def __call__(
        self,
        tokens: jax.Array | None,
        count: jax.Array,
        cache: KVCache,
        *,
        rows: jax.Array | None = None,
        embeddings: jax.Array | None = None,
        probe: Probe = UNPROBED,
    ) -> tuple[jax.Array, KVCache]:
        """Runs new tokens through all layers, after what the cache's rows hold already.

        Args:
          tokens: int32 [P, T], right-padded.
          count: int32 [P], real tokens of each row, 0 to T.
          cache: of B rows.
          rows: int32 [P], rows of the cache that the tokens are for, each once; by default all B in order.
          embeddings: floats [P, T, D], in place of tokens (None then): what `embedding.embed` would make of them.
          probe: reads values on their way; what it has seen is in it afterwards.

        Returns:
          Hidden states after the last norm, [P, T, D] in the compute dtype, and the cache with the real tokens added.
        """
        return self._run(self._embed(tokens, embeddings), count, cache, rows=rows, keeps=True, probe=probe)

    @in_any_context
    def hidden_states(
        self,
        tokens: ArrayLike | None = None,
        *,
        embeddings: jax.Array | None = None,
        count: jax.Array | None = None,
        probe: Probe = UNPROBED,
    ) -> jax.Array:
        """Runs whole texts through all layers, and keeps nothing.

        The layers take turns with a cache of one layer.

        Args:
          tokens: integers [B, T].
          embeddings: in place of tokens, as for `__call__`.
          count: int32 [B], real tokens of each row; by default all are.
          probe: as for `__call__`.

        Returns:
          Hidden states after the last norm, [B, T, D] in the compute dtype.

        Raises:
          ValueError: The tokens are no integers, or have another rank.
        """
        embedded = self._embed(tokens, embeddings)
        batch, num_new, _ = embedded.shape
        scratch = self._abstract_cache(self.config.replace(num_layers=1), batch, num_new).allocate(allow_oom=True)
        count = jnp.full((batch,), num_new, jnp.int32) if count is None else count
        hidden, _ = self._run(embedded, count, scratch, rows=None, keeps=False, probe=probe)
        return hidden

    def _embed(self, tokens: ArrayLike | None, embeddings: jax.Array | None) -> jax.Array:
        """What the first layer is given, [B, T, D] in the compute dtype.

        Raises:
          ValueError: Tokens and embeddings are given, or neither.
        """
        if tokens is not None and embeddings is None:
            return self.embedding.embed(tokens)
        if tokens is None and embeddings is not None:
            return embeddings.astype(self.dtype)
        raise ValueError("tokens and embeddings stand for each other: give one of them, and only one.")

    def _run(
        self,
        embedded: jax.Array,
        count: jax.Array,
        cache: KVCache,
        *,
        rows: jax.Array | None,
        keeps: bool,
        probe: Probe,
    ) -> tuple[jax.Array, KVCache]:
        """What `__call__` does with embedded tokens; the layers take turns with one of the cache if it is not kept."""
        start = cache.lengths if rows is None else cache.lengths[rows]
        count = jnp.minimum(count, cache.max_len - start)

        place = CachePlace(layer=jnp.zeros((), jnp.int32), rows=rows, start=start, count=count)
        if self.edits is not None or probe is not UNPROBED:
            edits = () if self.edits is None else self.edits.get_value()
            probe = probe.with_edits(edits, At.of(place, embedded.shape[1]))
        x = self.partitioner.constrain(probe.at("embedding", embedded), ("batch", None, None))
        x, keys, values = self.layers.run((x, cache.keys, cache.values), place, keeps=keeps, probe=probe)
        lengths = start + count if rows is None else cache.lengths.at[rows].set(start + count)
        return probe.at("final", self.final_norm(x)), KVCache(keys, values, lengths)

    @in_any_context
    def new_cache(
        self,
        batch_size: int,
        max_len: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        allow_oom: bool = False,
    ) -> KVCache:
        """An empty cache on the model's mesh, see `KVCache.create`.

        Args:
          batch_size: B, rows.
          max_len: S, entries a row can hold.
          dtype: by default that of `default_cache_dtype`.
          allow_oom: try it even where the devices have too little memory left.

        Raises:
          ValueError: As `KVCache.create` says.
        """
        return self.abstract_cache(batch_size, max_len, dtype=dtype).allocate(allow_oom=allow_oom)

    def abstract_cache(self, batch_size: int, max_len: int | None = None, *, dtype: DTypeLike | None = None) -> KVCache:
        """The cache that `new_cache` makes of these arguments, as `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          ValueError: A size is out of range, or the dtype is another one.
        """
        return self._abstract_cache(self.config, batch_size, max_len, dtype)

    def _abstract_cache(
        self, config: GrokConfig, batch_size: int, max_len: int | None, dtype: DTypeLike | None = None
    ) -> KVCache:
        mesh, rules = self.partitioner.mesh, self.partitioner.rules
        dtype = default_cache_dtype(self.partitioner.platform, self.dtype) if dtype is None else dtype
        return KVCache.abstract(config, batch_size, max_len, dtype=dtype, mesh=mesh, rules=rules)

    @in_any_context
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], of hidden states [..., D] that `__call__` returned."""
        with jax.named_scope("unembed"):
            return self.embedding.unembed(hidden)

    @in_any_context
    def sample(
        self, logits: jax.Array, settings: SampleSettings, *, keys: jax.Array, positions: jax.Array, num_top: int = 0
    ) -> SampleOutput:
        """Draws one token for each row.

        Args:
          logits: float32 [B, V].
          settings: how each row draws.
          keys: of the rows' requests, [B].
          positions: int32 [B], of the drawn tokens; the draw at position p uses `fold_in(key, p)`.
          num_top: how many of the most probable tokens to report as well; static.
        """
        divided, whole = (self.partitioner.sharding(("batch", axis), logits.shape) for axis in ("vocab", None))
        keys = row_keys(keys, positions)
        return sample_token(keys, logits, settings, num_top=num_top, divided=divided, whole=whole)


def check_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The compute dtype as a `numpy.dtype`.

    Raises:
      ValueError: It is neither float32 nor bfloat16.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype={dtype!r} is not a compute dtype: choose float32 or bfloat16.") from error
    if found not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype={found.name} is not a compute dtype: choose float32 or bfloat16.")
    return found
