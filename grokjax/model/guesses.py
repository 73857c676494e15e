"""More than one token a step: the next tokens are guessed from the text, and one run of the model checks them all.

Nothing that is drawn depends on a guess. The draw at position p uses `fold_in(key, p)` and the logits after the tokens
before it, whichever step computes them. So a guess is right if it is what is drawn in its place, and where it is, the
logits after it are there already. Going back behind a wrong one is a smaller length of the row: entries of the cache
beyond it are never read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from grokjax.cache import KVCache
from grokjax.model.grok import Grok

# From texts, int32 [B, S], their lengths, int32 [B], and G to the next G tokens of each, int32 [B, G], and how many of
# them mean something, int32 [B]. `look_up` is one; a smaller model that runs beside the large one could be another.
Guesser: TypeAlias = Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]

# From logits, float32 [B, V], and the positions of the tokens to draw, int32 [B], to the tokens, int32 [B], and a tree
# of what else is to be known of them, each leaf [B, ...].
Draw: TypeAlias = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]

# How many tokens in a row must have come before, and behind how many others: a text that was copied up to there, and in
# which one token is another, goes on being copied. The first that is found counts.
_GRAMS = ((3, 0), (2, 0), (3, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Checked:
    """What came of the guesses of B rows.

    Attributes:
      tokens: int32 [B, 1 + G], what was drawn; of each row the first `made` mean something.
      drawn: what else the draw told, a tree of [B, 1 + G, ...].
      made: int32 [B], tokens that each row drew, 0 to 1 + G.
      tried: int32 [B], guesses that the model ran over.
      looked: int32 [B], guesses that are compared with what is drawn; where a row has more than it tries, one more, so
        that a row which tries none learns whether it would have been right.
      right: int32 [B], how many of them, from the first on, were drawn.
    """

    tokens: jax.Array
    drawn: Any
    made: jax.Array
    tried: jax.Array
    looked: jax.Array
    right: jax.Array


def look_up(texts: jax.Array, lengths: jax.Array, num_guesses: int) -> tuple[jax.Array, jax.Array]:
    """Guesses that what followed the last three tokens, or else the last two, where they came before, comes again.

    Where neither came before, the last token may be one that was changed in a copy: what followed the three before it,
    behind another token, is guessed. The latest such place counts. Where it is so near that the text ends within the
    guesses, they go on from its own repetition, so a loop of any period is guessed in full.

    Args:
      texts: int32 [B, S].
      lengths: int32 [B], tokens of each text.
      num_guesses: G, 1 or more.

    Returns:
      Guesses, int32 [B, G], and how many of each row mean something, int32 [B]: G, or 0 where no place was found.

    Source: Saxena, "Prompt Lookup Decoding" (2023); the overlapping copy is that of Lempel and Ziv (1977).
    """
    place = jnp.zeros_like(lengths)
    for count, others in _GRAMS:
        end = _latest(texts, lengths - others, count)
        place = jnp.where((place > 0) | (end == 0), place, end + others)
    period = jnp.maximum(lengths - place, 1)[:, None]
    offsets = jnp.arange(num_guesses, dtype=jnp.int32)[None] % period
    return _take(texts, place[:, None] + offsets), jnp.where(place > 0, num_guesses, 0)


def check_guesses(
    model: Grok,
    texts: jax.Array,
    cache: KVCache,
    draw: Draw,
    *,
    ends: jax.Array,
    most: jax.Array,
    num_guesses: int,
    guesser: Guesser = look_up,
) -> tuple[Checked, jax.Array, KVCache]:
    """Guesses tokens, runs the model over the last token and the guesses, and draws up to the first wrong one.

    Args:
      model: the model.
      texts: int32 [B, S]; of each row the tokens in the cache and the last one, which is not yet in it.
      cache: of B rows of S entries.
      draw: draws the tokens of one position.
      ends: int32 [B], tokens that each text may have in all, at most S; a row that has as many stays as it is.
      most: int32 [B], guesses that each row tries, 0 to G.
      num_guesses: G, 0 or more; each is a program of its own.
      guesser: makes the guesses.

    Returns:
      What came of it, the texts with the tokens drawn, and the cache with all of them but the last.
    """
    start = cache.lengths
    left = ends - 1 - start
    guesses, found = guesser(texts, start + 1, max(num_guesses, 1))
    tried = jnp.minimum(jnp.minimum(found, most), jnp.maximum(left - 1, 0))
    looked = jnp.where(left > 0, jnp.minimum(found, tried + 1), 0)
    tokens = jnp.concatenate([_take(texts, start[:, None]), guesses[:, :num_guesses]], axis=1)
    hidden, cache = model(tokens, jnp.where(left > 0, 1 + tried, 0), cache)
    checked = _draw_while_right(model.logits(hidden), draw, start + 1, left > 0, guesses, looked, tried)
    texts = write_tokens(texts, checked.tokens, start + 1, checked.made)
    return checked, texts, dataclasses.replace(cache, lengths=start + checked.made)


def write_tokens(texts: jax.Array, tokens: jax.Array, starts: jax.Array, counts: jax.Array) -> jax.Array:
    """The texts, int32 [B, S], with the first `counts` [B] of the tokens, int32 [B, T], from `starts` [B] on."""
    offsets = jnp.arange(texts.shape[1], dtype=jnp.int32)[None] - starts[:, None]
    return jnp.where((offsets >= 0) & (offsets < counts[:, None]), _take(tokens, offsets), texts)


def _latest(texts: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
    """Where the last `count` tokens of each text ended before, the latest such place, int32 [B]; 0 if nowhere."""
    places = jnp.arange(texts.shape[1], dtype=jnp.int32)[None]
    is_same = (places >= count) & (places < lengths[:, None])
    for back in range(1, count + 1):
        before = jnp.pad(texts, ((0, 0), (back, 0)))[:, : texts.shape[1]]
        is_same &= before == _take(texts, lengths[:, None] - back)
    return jnp.where(is_same, places, 0).max(axis=1)


def _draw_while_right(
    logits: jax.Array,
    draw: Draw,
    positions: jax.Array,
    active: jax.Array,
    guesses: jax.Array,
    looked: jax.Array,
    tried: jax.Array,
) -> Checked:
    """Draws position by position from [B, 1 + G, V], the first at `positions`, for as long as a row was right."""
    nothing = jnp.zeros_like(positions)
    shapes = jax.eval_shape(draw, logits[:, 0], positions)
    buffers = jax.tree.map(lambda one: jnp.zeros((logits.shape[1], *one.shape), one.dtype), shapes)

    def is_running(state: tuple[Any, ...]) -> jax.Array:
        return state[1].any()

    def draw_next(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, running, made, right, buffers = state
        found = draw(lax.dynamic_index_in_dim(logits, i, axis=1, keepdims=False), positions + i)
        buffers = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i, 0), buffers, found)
        guess = lax.dynamic_index_in_dim(guesses, i, axis=1, keepdims=False)  # the last one again behind the last
        is_right = running & (i < looked) & (guess == found[0])
        made, right = made + running.astype(jnp.int32), right + is_right.astype(jnp.int32)
        return i + 1, is_right & (i < tried), made, right, buffers

    state = (jnp.zeros((), jnp.int32), active, nothing, nothing, buffers)
    _, _, made, right, buffers = lax.while_loop(is_running, draw_next, state)
    tokens, drawn = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), buffers)
    return Checked(tokens, drawn, made, tried, looked, right)


def _take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """Values [B, N] at indices [B, M] of each row; those beyond its ends are the nearest one's."""
    return jnp.take_along_axis(values, jnp.clip(indices, 0, values.shape[1] - 1), axis=1)
