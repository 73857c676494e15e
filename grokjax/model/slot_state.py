"""What the steps of an engine's slots keep on the devices from one call to the next."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from grokjax.cache import CACHE_AXES, Entries, KVCache
from grokjax.model.grok import Grok
from grokjax.model.guesses import write_tokens
from grokjax.sharding import zeros


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotState:
    """What the steps keep on the devices from one call to the next.

    Attributes:
      cache: of B rows.
      tokens: int32 [B], the last that was drawn in each row.
      logits: float32 [B, V], those after each row's prefill, from which its first token is drawn.
      bias: float32 [B, V], what each row's request adds to its logits.
      texts: int32 [B, S], the tokens of each row by position, the last drawn one included; None where no step guesses.
    """

    cache: KVCache
    tokens: jax.Array
    logits: jax.Array
    bias: jax.Array
    texts: jax.Array | None = None

    @classmethod
    def abstract(cls, model: Grok, cache: KVCache, *, guesses: bool = False) -> Self:
        """The state around a cache as `jax.ShapeDtypeStruct`s with shardings: to compile for, without memory.

        Args:
          model: the model.
          cache: of shapes or of arrays.
          guesses: whether there are steps that guess, which need the texts.
        """
        shape = (cache.batch_size, model.config.vocab_size)
        wide = model.partitioner.sharding(("batch", "vocab"), shape)
        whole = model.partitioner.sharding((None,), shape[:1])
        tokens: Any = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=whole)
        logits: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=wide)
        if not guesses:
            return cls(cache, tokens=tokens, logits=logits, bias=logits)
        shape = (cache.batch_size, cache.max_len)
        texts: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=model.partitioner.sharding((None, None), shape))
        return cls(cache, tokens=tokens, logits=logits, bias=logits, texts=texts)

    @classmethod
    def create(cls, model: Grok, cache: KVCache, *, guesses: bool = False) -> Self:
        """The state around a cache before any step; the arguments are those of `abstract`."""
        shapes = cls.abstract(model, cache, guesses=guesses)
        return cls(cache, *zeros((shapes.tokens, shapes.logits, shapes.bias, shapes.texts)))

    def placed(self, model: Grok) -> Self:
        """The state where it began, so that no step is compiled a second time for another placement."""
        wide, constrain = ("batch", "vocab"), model.partitioner.constrain

        def placed(entries: Entries) -> Entries:
            return jax.tree.map(lambda leaf: constrain(leaf, CACHE_AXES[: leaf.ndim]), entries)

        cache = KVCache(placed(self.cache.keys), placed(self.cache.values), constrain(self.cache.lengths, (None,)))
        return type(self)(
            cache,
            constrain(self.tokens, (None,)),
            constrain(self.logits, wide),
            constrain(self.bias, wide),
            None if self.texts is None else constrain(self.texts, (None, None)),
        )

    def noting(self, rows: jax.Array, tokens: jax.Array, starts: jax.Array, counts: jax.Array) -> Self:
        """The state whose texts, if it keeps any, have tokens int32 [P, T] of some rows [P].

        Args:
          rows: int32 [P], their numbers.
          tokens: right-padded.
          starts: int32 [P], the positions of the first ones.
          counts: int32 [P], how many tokens of each row are real.
        """
        if self.texts is None:
            return self
        own = write_tokens(self.texts[rows], tokens, starts, counts)
        return dataclasses.replace(self, texts=self.texts.at[rows].set(own))
