"""The release's pure functions, by its names: sampling, padding, and the three that run a batch."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax import sampling
from grokjax.cache import KVCache
from grokjax.model import Grok, decode, in_any_context, prefill

TOP_K = 8


class SampleSettings(NamedTuple):
    """How each of B rows is sampled: temperature [B], 0 for greedy; nucleus_p [B]; mask [B, V]; active [B]."""

    temperature: ArrayLike
    nucleus_p: ArrayLike
    mask: ArrayLike
    active: ArrayLike


class SampleOutput(NamedTuple):
    """token_id [B, 1] int32, prob [B, 1], top_k_token_ids [B, K] int32 and top_k_probs [B, K], of what was drawn."""

    token_id: jax.Array
    prob: jax.Array
    top_k_token_ids: jax.Array
    top_k_probs: jax.Array


# What a batch keeps beside its cache: the keys, last draws and settings of its rows.
_Rows = tuple[jax.Array, SampleOutput, SampleSettings]
_Tree = TypeVar("_Tree")


@jax.transfer_guard("allow")
def sample_token(rngs: jax.Array, outputs: Any, settings: SampleSettings, *, num_top: int = TOP_K) -> SampleOutput:
    """Draws one token a row with that row's key: temperature, mask, top-p.

    Args:
      rngs: keys, typed [B] or raw uint32 [B, 2].
      outputs: logits [B, 1, V], or an object that has them as `logits`.
      settings: for the B rows.
      num_top: K, most probable tokens to report.
    """
    logits = getattr(outputs, "logits", outputs)[:, -1]
    return _by_its_names(sampling.sample_token(rngs, logits, _ours(settings, len(logits)), num_top=num_top))


def _ours(settings: SampleSettings, batch: int) -> sampling.SampleSettings:
    """The settings of B rows as this package has them."""
    return sampling.SampleSettings(
        temperature=jnp.asarray(settings.temperature, jnp.float32),
        top_p=jnp.asarray(settings.nucleus_p, jnp.float32),
        top_k=jnp.zeros(batch, jnp.int32),
        min_p=jnp.zeros(batch, jnp.float32),
        mask=jnp.asarray(settings.mask, bool),
        active=jnp.ones(batch, bool),  # the release draws for every row
    )


def _by_its_names(drawn: sampling.SampleOutput) -> SampleOutput:
    """What was drawn, with the most probable tokens, as the release gives it."""
    assert drawn.top_k_token_ids is not None
    assert drawn.top_k_probs is not None
    return SampleOutput(drawn.token_id[:, None], drawn.prob[:, None], drawn.top_k_token_ids, drawn.top_k_probs)


@jax.transfer_guard("allow")
def top_p_filter(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """`sampling.top_p_filter` for logits [..., V] and top_p [..., 1], as the release passes them."""
    return sampling.top_p_filter(logits, top_p[..., 0])


class Padded(NamedTuple):
    """Tokens [size], and how many of them are real: what a prefill needs to know of a prompt that was cut."""

    tokens: np.ndarray
    length: int


def pad_to_size(x: ArrayLike, size: int) -> Padded:
    """Pads tokens [n] on the right with 0; of a longer input the last `size` tokens stay."""
    x = np.asarray(x)
    kept = x[max(0, len(x) - size) :]
    return Padded(np.pad(kept, (0, size - len(kept))), len(kept))


def get_pad_bucket(size: int, pad_sizes: Sequence[int]) -> int:
    """The smallest pad size that holds `size` tokens, else the largest."""
    return min((pad for pad in pad_sizes if pad >= size), default=max(pad_sizes))


@jax.transfer_guard("allow")
def insert_slice(memory: KVCache, slice: KVCache, length: ArrayLike, i: jax.Array | int) -> KVCache:
    """The batch's cache with one row replaced.

    Args:
      memory: of all rows.
      slice: a cache of one row, no longer than `memory`.
      length: int32 [], or a number: how many of its entries count.
      i: int32 [], or a number from 0: the row that is replaced.

    Raises:
      ValueError: As `KVCache.insert` says.
    """
    lengths = jnp.asarray(length, jnp.int32).reshape(1)
    return memory.insert(dataclasses.replace(slice, lengths=lengths), i)


def new_memory(params: Grok, batch_size: int, length: int) -> KVCache:
    """An empty cache of `batch_size` rows that hold `length` tokens each, on the model's mesh.

    Raises:
      ValueError: A size is below 1, or `length` exceeds the longest sequence.
    """
    return params.new_cache(batch_size, length)


@in_any_context
def prefill_memory(
    params: Grok,
    rngs: jax.Array,
    memory: KVCache,
    settings: SampleSettings,
    last_output: SampleOutput,
    prompt: ArrayLike,
    length: int,
    rng_seed: int,
    new_settings: SampleSettings,
    i: int,
) -> tuple[jax.Array, SampleOutput, KVCache, SampleSettings]:
    """Gives one row of the batch to a request, and draws the first token of its continuation. DONATES `memory`.

    Arguments and results are the release's, in its order. The draw at position p uses `fold_in(key of the row, p)`, as
    everywhere in this package, so it is the one that the engine makes for the same request. What is asked for is
    checked against `memory`, so this waits for the steps before; `sample_step` does not.

    Args:
      params: the model.
      rngs: the rows' keys, typed [B] or raw uint32 [B, 2].
      memory: cache of B rows; what row `i` held is given up.
      settings: for the B rows.
      last_output: what was drawn last in each of the B rows.
      prompt: integers [T] in the vocabulary, right-padded.
      length: real tokens of the prompt, 1 to T.
      rng_seed: of the request's draws; its low 32 bits count.
      new_settings: for the request: temperature [], nucleus_p [], mask [V], active [].
      i: the row.

    Returns:
      `rngs`, `last_output`, `memory` and `settings`, row `i` of each being the request's.

    Raises:
      ValueError: The prompt is empty, is longer than a row or has tokens outside the vocabulary, or there is no such
        row.
    """
    if length < 1:
        raise ValueError(f"length={length} leaves the prompt empty: give at least one token.")
    lengths = np.array([length], np.int32)
    logits, memory = prefill(params, np.asarray(prompt)[None], lengths, memory.reset(i), rows=np.array([i]))
    batch, seed = (rngs, last_output, settings), np.uint32(int(rng_seed) % 2**32)
    rngs, last_output, settings = _begin_row(params, batch, logits, lengths, seed, new_settings, i)
    return rngs, last_output, memory, settings


@in_any_context
@functools.partial(jax.jit, donate_argnames="memory")
def sample_step(
    params: Grok, rngs: jax.Array, last_output: SampleOutput, memory: KVCache, settings: SampleSettings
) -> tuple[jax.Array, SampleOutput, KVCache]:
    """Adds the last drawn token of each active row to it, and draws the next; never waits. DONATES `memory`.

    Nothing is checked but shapes: the caller keeps count of the room left in each row. The draw at position p uses
    `fold_in(key of the row, p)`, so the keys stay as they are.

    Args:
      params: the model.
      rngs: the rows' keys, typed [B] or raw uint32 [B, 2].
      last_output: what was drawn last in each of the B rows.
      memory: cache of B rows.
      settings: for the B rows; what is drawn for one that is not active means nothing.

    Returns:
      `rngs`, what was drawn, and `memory`.

    Raises:
      ValueError: Shapes disagree.
    """
    logits, memory = decode(params, last_output.token_id[:, 0], memory, active=settings.active)
    drawn, lengths = _draw(params, rngs, memory.lengths, logits, settings), _whole(params, memory.lengths)
    return rngs, drawn, dataclasses.replace(memory, lengths=lengths)


@jax.jit
def _begin_row(
    params: Grok,
    batch: _Rows,
    logits: jax.Array,
    lengths: jax.Array,
    seed: jax.Array,
    new_settings: SampleSettings,
    i: jax.Array,
) -> _Rows:
    """The batch with a request in row `i`, whose first token is drawn from logits [1, V] after `lengths` [1]."""
    rngs = sampling.typed_keys(batch[0])
    key = jax.random.key(seed, impl=jax.random.key_impl(rngs))[None]
    if rngs is not batch[0]:
        key = jax.random.key_data(key)
    settings = jax.tree.map(lambda value: value[None], new_settings)
    row = key, _draw(params, key, lengths, logits, settings), settings
    return _whole(params, jax.tree.map(lambda rows, one: rows.at[i].set(one[0].astype(rows.dtype)), batch, row))


def _draw(
    params: Grok, rngs: jax.Array, lengths: jax.Array, logits: jax.Array, settings: SampleSettings
) -> SampleOutput:
    """Draws the token after each row's `lengths` [B] from its logits [B, V]."""
    ours = _ours(settings, len(logits))
    drawn = params.sample(logits, ours, keys=rngs, positions=lengths, num_top=TOP_K)
    return _whole(params, _by_its_names(drawn))


def _whole(params: Grok, tree: _Tree) -> _Tree:
    """Brings arrays whole onto every device, so that the host of any of them can read them."""
    return jax.tree.map(lambda leaf: params.partitioner.constrain(leaf, (None,) * leaf.ndim), tree)
