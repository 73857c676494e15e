"""`generate`: the whole loop on the device, a token a step, or several where they are guessed."""

import dataclasses
import functools
import reprlib
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from grokjax.cache import KVCache, check_cache_dtype
from grokjax.config import GrokConfig
from grokjax.model.contexts import in_any_context
from grokjax.model.grok import Grok
from grokjax.model.guesses import Checked, check_guesses, write_tokens
from grokjax.model.steps import check_lengths, check_tokens, decode_step, prefill_step
from grokjax.model.streamed import Compiled, is_streamed
from grokjax.request import check_integer, is_integer
from grokjax.sampling import SampleSettings, seed_key


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
    tokens = check_tokens(model, tokens, ndim=2)
    lengths = check_lengths(lengths, tokens, least=1)
    batch, longest = tokens.shape
    _check_end(model.config, longest, max_new_tokens, eos_id)
    guesses = check_integer("guesses", guesses, 0)
    settings, keys = _check_draws(batch, settings, keys)
    cache_dtype = None if cache_dtype is None else check_cache_dtype(cache_dtype)
    if not allow_oom:
        model.abstract_cache(batch, longest + max_new_tokens, dtype=cache_dtype).check_fits()
    most_new = int(max_new_tokens)
    task = _Task(lengths, settings, keys, most_new, eos_id, min(guesses, most_new - 1))
    run = _generate_step_by_step if is_streamed(model) else _generate
    return run(model, tokens, task, cache_dtype=cache_dtype)


def _check_end(config: GrokConfig, longest: int, max_new_tokens: int, eos_id: int | None) -> None:
    """Checks what ends the continuations of prompts of at most `longest` tokens."""
    room = config.max_seq_len - longest
    if not is_integer(max_new_tokens) or not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"max_new_tokens={reprlib.repr(max_new_tokens)} must be an integer from 1 to {room}, "
            f"which {longest} prompt tokens leave of max_seq_len={config.max_seq_len}: ask for fewer, or shorten the "
            "prompts."
        )
    if eos_id is not None and not (is_integer(eos_id) and 0 <= eos_id < config.vocab_size):
        raise ValueError(
            f"eos_id={reprlib.repr(eos_id)} is outside the vocabulary of {config.vocab_size} tokens: it would never "
            "come."
        )


def _check_draws(
    batch: int, settings: SampleSettings | None, keys: jax.Array | None
) -> tuple[SampleSettings, jax.Array]:
    """How to draw for each row of a batch, with the defaults of `generate` for what is None."""
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
    return settings, keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Task:
    """What is asked for, as `generate` takes it.

    Attributes:
      lengths: int32 [B], of the prompts.
      settings: how to draw.
      keys: of the rows, [B].
      max_new_tokens: of each row.
      eos_id: token that ends a row; None for none.
      guesses: tokens that a step may guess.
    """

    lengths: jax.Array
    settings: SampleSettings
    keys: jax.Array
    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    eos_id: int | None = dataclasses.field(metadata={"static": True})
    guesses: int = dataclasses.field(metadata={"static": True})

    def draw(
        self, model: Grok, step: jax.Array, active: jax.Array, logits: jax.Array, out: Generated
    ) -> tuple[jax.Array, jax.Array, Generated]:
        """Draws token number `step`, int32 [], of the rows that go on, `active` [B], from logits [B, V].

        Returns:
          The tokens, int32 [B], the rows that go on, bool [B], and the continuations with the tokens.
        """
        drawn = model.sample(logits, self.settings, keys=self.keys, positions=self.lengths + step)
        token = jnp.where(active, drawn.token_id, model.config.pad_id)
        out = _append(out, step, active, token, jnp.where(active, drawn.logprob, 0))
        return token, active if self.eos_id is None else active & (token != self.eos_id), out


# Of a generation without guesses: how many tokens were drawn, int32 [], the last of each row, int32 [B], the rows that
# go on, bool [B], the cache, and the continuations. With guesses: how many tokens each row may guess now, int32 [B],
# the rows that go on, the texts, int32 [B, S], the cache, and the continuations.
_State: TypeAlias = tuple[Any, ...]


@functools.partial(jax.jit, static_argnames="cache_dtype")
def _generate(model: Grok, tokens: jax.Array, task: _Task, *, cache_dtype: jnp.dtype | None) -> Generated:
    """The whole loop as one program."""
    cache = model.new_cache(len(tokens), tokens.shape[1] + task.max_new_tokens, dtype=cache_dtype)
    state = _begin(model, tokens, cache, task)
    go_on = _go_on_guessing if task.guesses else _go_on_decoding
    return go_on(model, state, task)


def _generate_step_by_step(model: Grok, tokens: jax.Array, task: _Task, *, cache_dtype: jnp.dtype | None) -> Generated:
    """The loop for a model whose layers come one after the other: each step is a pass through them."""
    cache = model.new_cache(len(tokens), tokens.shape[1] + task.max_new_tokens, dtype=cache_dtype, allow_oom=True)
    state = _begin_alone(model, tokens, cache, task)
    is_running = _has_rows if task.guesses else _has_room
    while is_running(state):
        num_guesses = task.guesses if task.guesses and _has_guesses(state) else 0
        state = _advance_alone(model, state, task, num_guesses=num_guesses)
    generated: Generated = state[-1]
    return generated


def _begin(model: Grok, tokens: jax.Array, cache: KVCache, task: _Task) -> _State:
    """Prompts read, and the first token of each drawn."""
    logits, cache = prefill_step(model, tokens, task.lengths, cache)
    shape = (len(tokens), task.max_new_tokens)
    out = Generated(
        tokens=jnp.full(shape, model.config.pad_id, jnp.int32),
        lengths=jnp.zeros(shape[:1], jnp.int32),
        logprobs=jnp.zeros(shape, jnp.float32),
    )
    token, active, out = task.draw(model, jnp.zeros((), jnp.int32), task.settings.active, logits, out)
    if not task.guesses:
        return jnp.ones((), jnp.int32), token, active, cache, out
    texts = jnp.pad(tokens, ((0, 0), (0, task.max_new_tokens)))
    texts = write_tokens(texts, token[:, None], task.lengths, jnp.ones_like(task.lengths))
    return jnp.zeros_like(task.lengths), active & (out.lengths < task.max_new_tokens), texts, cache, out


def _advance(model: Grok, state: _State, task: _Task, *, num_guesses: int) -> _State:
    """One step further; with guesses, of at most `num_guesses` tokens."""
    return _check_some(model, state, task, num_guesses) if task.guesses else _decode_one(model, state, task)


_begin_alone = Compiled(_begin, donates="cache")
_advance_alone = Compiled(_advance, donates="state", static=("num_guesses",))


def _has_room(state: _State) -> jax.Array:
    """Whether a row goes on, without guesses."""
    step, _, active, _, out = state
    return (step < out.tokens.shape[1]) & active.any()


def _go_on_decoding(model: Grok, state: _State, task: _Task) -> Generated:
    """Continues texts of which one token was drawn, by a token a step."""
    generated: Generated = lax.while_loop(_has_room, lambda state: _decode_one(model, state, task), state)[-1]
    return generated


def _decode_one(model: Grok, state: _State, task: _Task) -> _State:
    step, token, active, cache, out = state
    logits, cache = decode_step(model, token, cache, active)
    token, active, out = task.draw(model, step, active, logits, out)
    return step + 1, token, active, cache, out


def _has_rows(state: _State) -> jax.Array:
    """Whether a row goes on, with guesses."""
    return state[1].any()


def _has_guesses(state: _State) -> jax.Array:
    """Whether a row that goes on may guess."""
    most, active, *_ = state
    return (active & (most > 0)).any()


def _go_on_guessing(model: Grok, state: _State, task: _Task) -> Generated:
    """Continues texts of which one token was drawn, by steps that guess."""

    def advance_both(state: _State) -> _State:
        # Two loops and not a choice in one: of a choice, XLA:CPU copies the cache.
        decode_one, check_some = (
            lambda state, number=number: _check_some(model, state, task, number) for number in (0, task.guesses)
        )
        state = lax.while_loop(lambda state: _has_rows(state) & ~_has_guesses(state), decode_one, state)
        return lax.while_loop(_has_guesses, check_some, state)

    generated: Generated = lax.while_loop(_has_rows, advance_both, state)[-1]
    return generated


def _check_some(model: Grok, state: _State, task: _Task, num_guesses: int) -> _State:
    """A step that guesses.

    A row earns its guesses: three when the one that it would have made was right, up to all when those were, and none
    after a wrong one. While no row has any, a step is one of decoding.
    """
    most, active, texts, cache, out = state
    most_new, eos_id = task.max_new_tokens, task.eos_id

    def draw(logits: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = model.sample(logits, positions=positions, settings=task.settings, keys=task.keys)
        return drawn.token_id, drawn.logprob

    ends = jnp.where(active, task.lengths + most_new, 0)
    checked, texts, cache = check_guesses(
        model, texts, cache, draw, ends=ends, most=jnp.minimum(most, num_guesses), num_guesses=num_guesses
    )
    made, active = (checked.made, active) if eos_id is None else _up_to_end(checked, active, eos_id)
    out = Generated(
        tokens=write_tokens(out.tokens, checked.tokens, out.lengths, made),
        lengths=out.lengths + made,
        logprobs=write_tokens(out.logprobs, checked.drawn, out.lengths, made),
    )
    is_earned = (checked.looked > 0) & (checked.right == checked.looked)
    most = jnp.where(is_earned, jnp.minimum(4 * most + 3, task.guesses), 0)
    return most, active & (out.lengths < most_new), texts, cache, out


def _up_to_end(checked: Checked, active: jax.Array, eos_id: int) -> tuple[jax.Array, jax.Array]:
    """How many of the tokens that each row drew there are up to the first that ends it, and which rows go on, [B]."""
    width = checked.tokens.shape[1]
    is_end = (checked.tokens == eos_id) & (jnp.arange(width, dtype=jnp.int32)[None] < checked.made[:, None])
    active &= ~is_end.any(axis=1)
    return jnp.where(is_end.any(axis=1), 1 + is_end.argmax(axis=1).astype(jnp.int32), checked.made), active


def _append(out: Generated, step: jax.Array, active: jax.Array, token: jax.Array, logprob: jax.Array) -> Generated:
    """The continuations with number `step` of each row's tokens [B], which only active rows count."""
    write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
    return Generated(
        tokens=write(out.tokens, token[:, None]),
        lengths=out.lengths + active.astype(jnp.int32),
        logprobs=write(out.logprobs, logprob[:, None]),
    )
