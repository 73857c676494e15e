"""The pure steps, compiled: forward, prefill, decode. Those that take a cache DONATE it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax.cache import KVCache
from grokjax.model.contexts import in_any_context
from grokjax.model.embedding import as_integers
from grokjax.model.grok import Grok
from grokjax.model.streamed import Compiled
from grokjax.sampling import SampleOutput, SampleSettings


@in_any_context
def forward(model: Grok, tokens: ArrayLike | None = None, *, embeddings: jax.Array | None = None) -> jax.Array:
    """Logits at every position, without a cache.

    It has derivatives with respect to the embeddings and the floats among the parameters, see docs/model.md.

    Args:
      model: the model.
      tokens: integers [B, T] in the vocabulary; padding on the right changes nothing before it.
      embeddings: floats [B, T, D], in place of tokens: what `model.embedding.embed` would make of them.

    Returns:
      float32 [B, T, V].

    Raises:
      ValueError: The shape is not [B, T], or [B, T, D], T exceeds the longest sequence, a token is outside the
        vocabulary, or both tokens and embeddings are given, or neither.
    """
    if tokens is not None:
        tokens = check_tokens(model, tokens, ndim=2)
    _check_embeddings(model, embeddings)
    given = embeddings if tokens is None else tokens
    if given is not None and given.shape[1] > model.config.max_seq_len:
        raise ValueError(f"{given.shape[1]} tokens exceed max_seq_len={model.config.max_seq_len}: pass fewer.")
    return _forward(model, tokens, embeddings)


@in_any_context
def prefill(
    model: Grok, tokens: ArrayLike, lengths: ArrayLike, cache: KVCache, *, rows: ArrayLike | None = None
) -> tuple[jax.Array, KVCache]:
    """Adds prompts, or further chunks of them, to the cache's rows. DONATES `cache`.

    Args:
      model: the model.
      tokens: integers [P, T] in the vocabulary, right-padded.
      lengths: integers [P], real tokens of each row in this call, 0 to T; a row of 0 is left as it is.
      cache: of B rows, made with the model's mesh and rules; each row continues after what it holds.
      rows: integers [P], the cache's rows that the prompts are for, each once; by default all B in order.

    Returns:
      Logits, float32 [P, V], at each row's last real token (meaningless for rows of 0), and the cache.

    Raises:
      ValueError: Shapes disagree, a token is outside the vocabulary, a length is outside 0 ... T, a row has no room,
        is outside the cache or named twice, or the cache was donated to an earlier step. Under a caller's own jit only
        shapes are checked, and what does not fit into a row is dropped.
    """
    tokens, lengths, rows = check_chunks(model, tokens, lengths, cache, rows)
    step = _prefill if _is_concrete(*jax.tree.leaves((model, cache))) else _prefill_keeping
    return step(model, tokens, lengths, cache, rows)


@in_any_context
def decode(
    model: Grok, tokens: ArrayLike, cache: KVCache, *, active: ArrayLike | None = None
) -> tuple[jax.Array, KVCache]:
    """Adds one token to each active row and gives the logits of the next. DONATES `cache`.

    Called as it is, it waits for the cache's lengths to check them. A loop that must not wait puts it under its own
    `jax.jit` and keeps count of the room left; there a row without room stays as it is and its logits are NaN.

    Args:
      model: the model.
      tokens: integers [B] in the vocabulary.
      cache: of B rows, made with the model's mesh and rules.
      active: bool [B]; the other rows stay untouched and their logits mean nothing. All rows by default.

    Returns:
      Logits, float32 [B, V], and the cache.

    Raises:
      ValueError: Shapes disagree, a token is outside the vocabulary, an active row is full, or the cache was donated to
        an earlier step.
    """
    tokens = check_tokens(model, tokens, ndim=1)
    active = jnp.ones(tokens.shape, bool) if active is None else jnp.asarray(active, bool)
    _check_cache(model, cache, tokens.shape[0])
    if active.shape != tokens.shape:
        raise ValueError(f"active has shape {active.shape} and tokens {tokens.shape}: pass one value for each row.")
    if _is_concrete(active, cache.lengths):
        _check_room(cache, active, np.arange(len(tokens)))
    step = _decode if _is_concrete(*jax.tree.leaves((model, cache))) else _decode_keeping
    return step(model, tokens, cache, active)


@in_any_context
@functools.partial(Compiled, donates="cache")
def decode_and_sample(
    model: Grok, tokens: jax.Array, cache: KVCache, settings: SampleSettings, keys: jax.Array
) -> tuple[SampleOutput, KVCache]:
    """`decode`, then a draw of the next token: one step of a host's loop, which never waits. DONATES `cache`.

    Nothing is checked but shapes, and that the cache is there: the caller keeps count of the room left in each row.

    Args:
      model: the model.
      tokens: int32 [B].
      cache: of B rows.
      settings: how to draw; its inactive rows stay untouched.
      keys: a key for each row, [B]; the draw at position p uses `fold_in(key, p)`.

    Returns:
      The drawn tokens and the cache.

    Raises:
      ValueError: Shapes disagree, tokens are no integers, or the cache was donated to an earlier step.
    """
    tokens = check_tokens(model, tokens, ndim=1)
    _check_cache(model, cache, tokens.shape[0])
    logits, cache = decode_step(model, tokens, cache, settings.active)
    return model.sample(logits, settings, keys=keys, positions=cache.lengths), cache


@Compiled
def _forward(model: Grok, tokens: jax.Array | None, embeddings: jax.Array | None = None) -> jax.Array:
    return model.logits(model.hidden_states(tokens, embeddings=embeddings))


def last_logits(model: Grok, hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """Logits, float32 [P, V], at the last of `lengths` [P] tokens; meaningless for rows without one.

    Args:
      model: the model.
      hidden: [P, T, D], what it returned for the tokens.
      lengths: int32 [P].
    """
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])


def prefill_step(
    model: Grok, tokens: jax.Array, lengths: jax.Array, cache: KVCache, rows: jax.Array | None = None
) -> tuple[jax.Array, KVCache]:
    """`prefill` as part of a larger program: nothing is checked."""
    hidden, cache = model(tokens, lengths, cache, rows=rows)
    return last_logits(model, hidden, lengths), cache


def decode_step(model: Grok, tokens: jax.Array, cache: KVCache, active: jax.Array) -> tuple[jax.Array, KVCache]:
    """`decode` as part of a larger program: nothing is checked, and an active row that is full gets logits of NaN."""
    is_full = active & (cache.lengths >= cache.max_len)
    hidden, cache = model(tokens[:, None], active.astype(jnp.int32), cache)
    return jnp.where(is_full[:, None], jnp.nan, model.logits(hidden[:, 0])), cache


_prefill = Compiled(prefill_step, donates="cache")
_decode = Compiled(decode_step, donates="cache")
# For a caller's transformation: a derivative needs the cache again, and under a jit only its own inputs are donated.
_prefill_keeping, _decode_keeping = Compiled(prefill_step), Compiled(decode_step)


def _is_concrete(*arrays: jax.Array) -> bool:
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_texts(model: Grok, tokens: ArrayLike, lengths: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Whole texts, int32 [B, T], and their lengths, int32 [B], checked.

    Raises:
      ValueError: Shapes disagree, a token is outside the vocabulary, a text is empty, or T exceeds max_seq_len.
    """
    tokens = check_tokens(model, tokens, ndim=2)
    if tokens.shape[1] > model.config.max_seq_len:
        raise ValueError(f"{tokens.shape[1]} tokens exceed max_seq_len={model.config.max_seq_len}: pass fewer.")
    return tokens, check_lengths(lengths, tokens, least=1)


def check_chunks(
    model: Grok, tokens: ArrayLike, lengths: ArrayLike, cache: KVCache, rows: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The arguments of `prefill`, checked as it says: tokens int32 [P, T], lengths and rows int32 [P]."""
    tokens = check_tokens(model, tokens, ndim=2)
    lengths = check_lengths(lengths, tokens, least=0)
    _check_cache(model, cache, tokens.shape[0] if rows is None else cache.batch_size)
    rows = None if rows is None else _check_rows(rows, tokens, cache)
    if tokens.shape[1] > cache.max_len:
        raise ValueError(
            f"{tokens.shape[1]} tokens a row exceed the cache's max_len={cache.max_len}: create a longer cache, or "
            "pass fewer."
        )
    named = jnp.arange(len(lengths), dtype=jnp.int32) if rows is None else rows
    if _is_concrete(lengths, cache.lengths, named):
        _check_room(cache, lengths, np.asarray(named))
    return tokens, lengths, rows


def check_tokens(model: Grok, tokens: ArrayLike, *, ndim: int) -> jax.Array:
    """Tokens as int32 [B, T], or [B] of one dimension, checked.

    Raises:
      ValueError: They have another shape, there are none, or one is no integer of the vocabulary.
    """
    tokens = as_integers("tokens", tokens)
    if tokens.ndim != ndim or not tokens.size:
        shape = "[batch, length]" if ndim == 2 else "[batch]"
        raise ValueError(f"tokens must have shape {shape} and not be empty; these have shape {tokens.shape}.")
    if _is_concrete(tokens):
        _check_range("tokens", tokens, model.config.vocab_size - 1)
    return tokens.astype(jnp.int32)


def _check_embeddings(model: Grok, embeddings: jax.Array | None) -> None:
    size = model.config.model_dim
    if embeddings is None:
        return
    if not isinstance(embeddings, jax.Array | np.ndarray) or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        found = getattr(embeddings, "dtype", type(embeddings).__name__)
        raise ValueError(f"embeddings must be an array of floats, such as model.embedding.embed makes, not {found}.")
    if embeddings.ndim != 3 or not embeddings.size or embeddings.shape[2] != size:
        raise ValueError(
            f"embeddings must have shape [batch, length, {size}] and not be empty; these have shape {embeddings.shape}."
        )


def check_lengths(lengths: ArrayLike, tokens: jax.Array, *, least: int) -> jax.Array:
    """Lengths of rows of tokens [B, T] as int32 [B], checked.

    Raises:
      ValueError: There is not one for each row, or one is no integer between `least` and T.
    """
    lengths = as_integers("lengths", lengths)
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths has shape {lengths.shape} and tokens {tokens.shape}: pass one length for each row.")
    if _is_concrete(lengths):
        _check_range("lengths", lengths, tokens.shape[1], least)
    return lengths.astype(jnp.int32)


def _check_rows(rows: ArrayLike, tokens: jax.Array, cache: KVCache) -> jax.Array:
    rows = as_integers("rows", rows)
    if rows.shape != tokens.shape[:1]:
        raise ValueError(f"rows has shape {rows.shape} and tokens {tokens.shape}: name one of the cache for each.")
    if _is_concrete(rows):
        _check_range("rows", rows, cache.batch_size - 1)
        if len(np.unique(rows)) < len(rows):
            raise ValueError(
                f"rows {np.asarray(rows).tolist()} names one twice: prefill its parts one after the other."
            )
    return rows.astype(jnp.int32)


def _check_range(name: str, values: jax.Array, most: int, least: int = 0) -> None:
    known = np.asarray(values)  # by NumPy: under a caller's jit, JAX would only trace what it finds
    low, high = int(known.min()), int(known.max())
    if low < least or high > most:
        raise ValueError(f"{name} must be between {least} and {most}, and one is {high if high > most else low}.")


def _check_cache(model: Grok, cache: KVCache, batch_size: int) -> None:
    if not isinstance(cache, KVCache):
        raise ValueError(
            f"the cache must be a KVCache, such as model.new_cache({batch_size}, max_len) makes, not a "
            f"{type(cache).__name__}."
        )
    heads = model.config.num_kv_heads * model.partitioner.kv_copies(model.config)
    needed = (model.config.num_layers, batch_size, heads, cache.max_len, model.config.head_dim)
    if cache.keys.shape != needed:
        raise ValueError(
            f"the cache holds keys of shape {cache.keys.shape} and this call needs {needed}: create it with the "
            f"model's configuration, mesh and rules, and with batch_size={batch_size}."
        )


def _check_room(cache: KVCache, count: jax.Array, rows: np.ndarray) -> None:
    filled = np.asarray(cache.lengths)[rows]
    needed = filled + np.asarray(count, np.int32)
    if (needed > cache.max_len).any():
        worst = int(needed.argmax())
        raise ValueError(
            f"row {rows[worst]} holds {filled[worst]} tokens of at most {cache.max_len} and has no room for "
            f"{needed[worst] - filled[worst]} more: nothing was written; create a longer cache or end the row."
        )
