"""The pure steps, compiled: forward, prefill, decode and generate. Those that take a cache DONATE it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from grokjax.cache import KVCache, check_cache_dtype
from grokjax.model.contexts import in_any_context
from grokjax.model.embedding import as_integers
from grokjax.model.grok import Grok
from grokjax.model.guesses import check_guesses, write_tokens
from grokjax.sampling import SampleOutput, SampleSettings, seed_key


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
        tokens = _check_tokens(model, tokens, ndim=2)
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
    tokens = _check_tokens(model, tokens, ndim=1)
    active = jnp.ones(tokens.shape, bool) if active is None else jnp.asarray(active, bool)
    _check_cache(model, cache, tokens.shape[0])
    if active.shape != tokens.shape:
        raise ValueError(f"active has shape {active.shape} and tokens {tokens.shape}: pass one value for each row.")
    if _is_concrete(active, cache.lengths):
        _check_room(cache, active, np.arange(len(tokens)))
    step = _decode if _is_concrete(*jax.tree.leaves((model, cache))) else _decode_keeping
    return step(model, tokens, cache, active)


@in_any_context
@functools.partial(jax.jit, donate_argnames="cache")
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
    tokens = _check_tokens(model, tokens, ndim=1)
    _check_cache(model, cache, tokens.shape[0])
    logits, cache = _decode_step(model, tokens, cache, settings.active)
    return model.sample(logits, settings, keys=keys, positions=cache.lengths), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """Continuations of a batch of prompts.

    Attributes:
      tokens: int32 [B, max_new_tokens], the pad id after each row's end.
      lengths: int32 [B], tokens of each continuation, the end-of-sequence token included.
      logprobs: float32 [B, max_new_tokens], natural log-probability of each token under the model itself, at
        temperature 1 without mask or filter; 0 after the end.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array


@in_any_context
def generate(
    model: Grok,
    tokens: ArrayLike,
    lengths: ArrayLike,
    *,
    max_new_tokens: int,
    settings: SampleSettings | None = None,
    keys: jax.Array | None = None,
    eos_id: int | None = None,
    guesses: int = 0,
    cache_dtype: DTypeLike | None = None,
    allow_oom: bool = False,
) -> Generated:
    """Continues prompts, the whole loop on the device, until every row has ended.

    The draw at position p of a row uses `fold_in(key of the row, p)`, so a row's result does not depend on its
    neighbours, nor on `guesses`.

    Args:
      model: the model.
      tokens: integers [B, T] in the vocabulary, right-padded.
      lengths: integers [B], tokens of each prompt, 1 to T.
      max_new_tokens: longest continuation; T and it together may not exceed the configuration's longest sequence.
      settings: how to draw; greedy by default.
      keys: a key for each row, [B]; by default folded from seed 0 and the row's number.
      eos_id: token that ends a row; none by default, so that every row gets `max_new_tokens`.
      guesses: tokens that a step may guess from the text so far and check together, where the last guesses were right:
        faster for text that repeats itself or its prompt. None by default.
      cache_dtype: as in `Grok.new_cache`.
      allow_oom: try it even where the devices have too little memory left for the cache.

    Raises:
      ValueError: Shapes disagree, a token or `eos_id` is outside the vocabulary, a prompt is empty, there is no room,
        `guesses` is negative, the devices have too little memory left for the cache, or it is called inside a
        `shard_map`.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:  # the compiler of jax 0.10 aborts the process there
        raise ValueError("generate does not run inside a shard_map: call it outside, or loop over decode inside.")
    tokens = _check_tokens(model, tokens, ndim=2)
    lengths = _check_lengths(lengths, tokens, least=1)
    batch, longest = tokens.shape
    most = model.config.max_seq_len - longest
    if not isinstance(max_new_tokens, int | np.integer) or not 1 <= max_new_tokens <= most:
        raise ValueError(
            f"{longest} prompt tokens and max_new_tokens={max_new_tokens!r} must leave at least one new token and fit "
            f"into max_seq_len={model.config.max_seq_len}."
        )
    is_known = eos_id is None or (isinstance(eos_id, int | np.integer) and 0 <= eos_id < model.config.vocab_size)
    if not is_known:
        raise ValueError(
            f"eos_id={eos_id!r} is outside the vocabulary of {model.config.vocab_size} tokens: it would never come."
        )
    if not isinstance(guesses, int | np.integer) or guesses < 0:
        raise ValueError(f"guesses={guesses!r} must be an integer, 0 or more, such as 7.")
    if keys is not None and np.shape(keys)[:1] != (batch,):
        raise ValueError(
            f"keys has shape {np.shape(keys)} for {batch} rows: pass one key for each, such as jax.random.split gives."
        )
    if not isinstance(settings, SampleSettings | None):
        raise ValueError(
            f"settings must be made by SampleSettings.create({batch}, ...), not a {type(settings).__name__}."
        )
    settings = SampleSettings.create(batch, temperature=0.0) if settings is None else settings
    if keys is None:
        keys = jax.vmap(functools.partial(jax.random.fold_in, seed_key(0)))(jnp.arange(batch, dtype=jnp.int32))
    cache_dtype = None if cache_dtype is None else check_cache_dtype(cache_dtype)
    if not allow_oom:
        model.abstract_cache(batch, longest + max_new_tokens, dtype=cache_dtype).check_fits()
    return _generate(
        model,
        tokens,
        lengths,
        settings,
        keys,
        max_new_tokens=int(max_new_tokens),
        eos_id=eos_id,
        guesses=min(int(guesses), int(max_new_tokens) - 1),
        cache_dtype=cache_dtype,
    )


@jax.jit
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


def _prefill_step(
    model: Grok, tokens: jax.Array, lengths: jax.Array, cache: KVCache, rows: jax.Array | None = None
) -> tuple[jax.Array, KVCache]:
    hidden, cache = model(tokens, lengths, cache, rows=rows)
    return last_logits(model, hidden, lengths), cache


def _decode_step(model: Grok, tokens: jax.Array, cache: KVCache, active: jax.Array) -> tuple[jax.Array, KVCache]:
    is_full = active & (cache.lengths >= cache.max_len)
    hidden, cache = model(tokens[:, None], active.astype(jnp.int32), cache)
    return jnp.where(is_full[:, None], jnp.nan, model.logits(hidden[:, 0])), cache


_prefill = jax.jit(_prefill_step, donate_argnames="cache")
_decode = jax.jit(_decode_step, donate_argnames="cache")
# For a caller's transformation: a derivative needs the cache again, and under a jit only its own inputs are donated.
_prefill_keeping, _decode_keeping = jax.jit(_prefill_step), jax.jit(_decode_step)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "eos_id", "guesses", "cache_dtype"))
def _generate(
    model: Grok,
    tokens: jax.Array,
    lengths: jax.Array,
    settings: SampleSettings,
    keys: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    guesses: int,
    cache_dtype: jnp.dtype | None,
) -> Generated:
    batch, longest = tokens.shape
    cache = model.new_cache(batch, longest + max_new_tokens, dtype=cache_dtype)
    logits, cache = _prefill_step(model, tokens, lengths, cache)
    shape = (batch, max_new_tokens)
    out = Generated(
        tokens=jnp.full(shape, model.config.pad_id, jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
    )

    def draw(
        step: jax.Array, active: jax.Array, logits: jax.Array, out: Generated
    ) -> tuple[jax.Array, jax.Array, Generated]:
        drawn = model.sample(logits, settings, keys=keys, positions=lengths + step)
        token = jnp.where(active, drawn.token_id, model.config.pad_id)
        out = _append(out, step, active, token, jnp.where(active, drawn.logprob, 0))
        return token, active if eos_id is None else active & (token != eos_id), out

    def is_running(state: tuple[Any, ...]) -> jax.Array:
        step, _, active, *_ = state
        return (step < max_new_tokens) & active.any()

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        step, token, active, cache, out = state
        logits, cache = _decode_step(model, token, cache, active)
        token, active, out = draw(step, active, logits, out)
        return step + 1, token, active, cache, out

    token, active, out = draw(jnp.zeros((), jnp.int32), settings.active, logits, out)
    if guesses:
        texts = jnp.pad(tokens, ((0, 0), (0, max_new_tokens)))
        texts = write_tokens(texts, token[:, None], lengths, jnp.ones_like(lengths))
        sample = functools.partial(model.sample, settings=settings, keys=keys)
        return _go_on_guessing(model, texts, lengths, active, cache, out, sample, eos_id=eos_id, guesses=guesses)
    state = (jnp.ones((), jnp.int32), token, active, cache, out)
    generated: Generated = lax.while_loop(is_running, advance, state)[-1]
    return generated


def _go_on_guessing(
    model: Grok,
    texts: jax.Array,
    prompt_lengths: jax.Array,
    active: jax.Array,
    cache: KVCache,
    out: Generated,
    sample: Callable[..., SampleOutput],
    *,
    eos_id: int | None,
    guesses: int,
) -> Generated:
    """Continues texts [B, S], of which one token was drawn, by steps that guess.

    A row earns its guesses: three when the one that it would have made was right, up to all when those were, and none
    after a wrong one. While no row has any, a step is one of decoding.
    """
    most_new = out.tokens.shape[1]

    def draw(logits: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = sample(logits, positions=positions)
        return drawn.token_id, drawn.logprob

    def advance(state: tuple[Any, ...], *, num_guesses: int) -> tuple[Any, ...]:
        most, active, texts, cache, out = state
        ends = jnp.where(active, prompt_lengths + most_new, 0)
        checked, texts, cache = check_guesses(
            model, texts, cache, draw, ends=ends, most=jnp.minimum(most, num_guesses), num_guesses=num_guesses
        )
        made = checked.made
        if eos_id is not None:
            is_end = (checked.tokens == eos_id) & (jnp.arange(1 + num_guesses, dtype=jnp.int32)[None] < made[:, None])
            active &= ~is_end.any(axis=1)
            made = jnp.where(is_end.any(axis=1), 1 + is_end.argmax(axis=1).astype(jnp.int32), made)
        out = Generated(
            tokens=write_tokens(out.tokens, checked.tokens, out.lengths, made),
            lengths=out.lengths + made,
            logprobs=write_tokens(out.logprobs, checked.drawn, out.lengths, made),
        )
        is_earned = (checked.looked > 0) & (checked.right == checked.looked)
        most = jnp.where(is_earned, jnp.minimum(4 * most + 3, guesses), 0)
        return most, active & (out.lengths < most_new), texts, cache, out

    def has_guesses(state: tuple[Any, ...]) -> jax.Array:
        most, active, *_ = state
        return (active & (most > 0)).any()

    def is_running(state: tuple[Any, ...]) -> jax.Array:
        return state[1].any()

    def advance_both(state: tuple[Any, ...]) -> tuple[Any, ...]:
        # Two loops and not a choice in one: of a choice, XLA:CPU copies the cache.
        decode_one, check_some = (functools.partial(advance, num_guesses=number) for number in (0, guesses))
        state = lax.while_loop(lambda state: is_running(state) & ~has_guesses(state), decode_one, state)
        return lax.while_loop(has_guesses, check_some, state)

    state = (jnp.zeros_like(prompt_lengths), active & (out.lengths < most_new), texts, cache, out)
    generated: Generated = lax.while_loop(is_running, advance_both, state)[-1]
    return generated


def _append(out: Generated, step: jax.Array, active: jax.Array, token: jax.Array, logprob: jax.Array) -> Generated:
    """The continuations with number `step` of each row's tokens [B], which only active rows count."""
    write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
    return Generated(
        tokens=write(out.tokens, token[:, None]),
        lengths=out.lengths + active.astype(jnp.int32),
        logprobs=write(out.logprobs, logprob[:, None]),
    )


def _is_concrete(*arrays: jax.Array) -> bool:
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_texts(model: Grok, tokens: ArrayLike, lengths: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Whole texts, int32 [B, T], and their lengths, int32 [B], checked.

    Raises:
      ValueError: Shapes disagree, a token is outside the vocabulary, a text is empty, or T exceeds max_seq_len.
    """
    tokens = _check_tokens(model, tokens, ndim=2)
    if tokens.shape[1] > model.config.max_seq_len:
        raise ValueError(f"{tokens.shape[1]} tokens exceed max_seq_len={model.config.max_seq_len}: pass fewer.")
    return tokens, _check_lengths(lengths, tokens, least=1)


def check_chunks(
    model: Grok, tokens: ArrayLike, lengths: ArrayLike, cache: KVCache, rows: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The arguments of `prefill`, checked as it says: tokens int32 [P, T], lengths and rows int32 [P]."""
    tokens = _check_tokens(model, tokens, ndim=2)
    lengths = _check_lengths(lengths, tokens, least=0)
    _check_cache(model, cache, tokens.shape[0] if rows is None else cache.batch_size)
    rows = None if rows is None else _check_rows(rows, tokens, cache)
    if tokens.shape[1] > cache.max_len:
        raise ValueError(f"{tokens.shape[1]} tokens a row exceed the cache's max_len={cache.max_len}.")
    named = jnp.arange(len(lengths), dtype=jnp.int32) if rows is None else rows
    if _is_concrete(lengths, cache.lengths, named):
        _check_room(cache, lengths, np.asarray(named))
    return tokens, lengths, rows


def _check_tokens(model: Grok, tokens: ArrayLike, *, ndim: int) -> jax.Array:
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


def _check_lengths(lengths: ArrayLike, tokens: jax.Array, *, least: int) -> jax.Array:
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
        raise ValueError(f"{name} must be between {least} and {most}; these reach from {low} to {high}.")


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
            f"model's configuration, mesh and rules, and with {batch_size} rows."
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
