"""The compiled steps of an engine: a batch whose rows are slots, each with its own sample, settings and key."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from grokjax.cache import KVCache
from grokjax.context import own_context
from grokjax.kernels import copy_row
from grokjax.memory import check_fits
from grokjax.model.grok import Grok
from grokjax.model.guesses import check_guesses
from grokjax.model.scores import Scores, scores_of
from grokjax.model.slot_state import SlotState
from grokjax.model.slots import DrawnRuns, DrawnTokens, SlotOptions, SlotSettings
from grokjax.model.steps import decode, prefill
from grokjax.model.streamed import Compiled, is_streamed
from grokjax.sampling import EXCLUDED, SampleSettings, log_probs_of, seed_key
from grokjax.sharding import device_bytes

V = TypeVar("V")


class ModelSteps:
    """`Steps` of a Grok model; it owns the cache of all slots.

    Args:
      model: the model.
      options: of its slots.

    Attributes:
      has_decoded: see `Steps`.

    Raises:
      ValueError: The devices have too little memory left.
    """

    @own_context()
    def __init__(self, model: Grok, options: SlotOptions):
        self.slots, self.vocab_size, self.num_top = options.slots, model.config.vocab_size, options.num_top
        self._model, self.has_decoded = model, False
        guesses = options.max_guesses > 0
        if not options.allow_oom:
            cache = model.abstract_cache(options.slots, options.max_len, dtype=options.cache_dtype)
            shapes = SlotState.abstract(model, cache, guesses=guesses)
            check_fits(
                f"an engine of slots={options.slots}, max_len={options.max_len}",
                device_bytes(jax.tree.leaves(shapes)),
                model.partitioner.mesh,
                remedy="take fewer slots, a smaller max_len, int8 entries or more devices",
            )
        cache = model.new_cache(options.slots, options.max_len, dtype=options.cache_dtype, allow_oom=True)
        self._state = SlotState.create(model, cache, guesses=guesses)

    @property
    def state(self) -> SlotState:
        """What the devices hold after the steps so far; the next step DONATES it."""
        return self._state

    @own_context()
    def prefill(self, tokens: np.ndarray, counts: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
        """See `Steps`; compiled for each shape of `tokens`."""
        self._state = _prefill_rows(self._model, self._state, tokens, counts, starts, rows)

    @own_context()
    def score(
        self, tokens: np.ndarray, targets: np.ndarray, count: int, start: int, row: int, *, wants_top: bool
    ) -> "DeviceResult[Scores[np.ndarray]]":
        """See `Steps`; compiled for each length of `tokens`, and anew where the most probable tokens are wanted."""
        place, num_top = np.array([count, start, row], np.int32), self.num_top * wants_top
        scores, self._state = _score_row(self._model, self._state, tokens[None], targets[None], place, num_top=num_top)
        return DeviceResult(scores, Scores.unpack)

    @own_context()
    def share(self, source: int, target: int, length: int) -> None:
        """See `Steps`."""
        self._state = _share_row(self._model, self._state, np.array([source, target, length], np.int32))

    @own_context()
    def set_bias(self, row: int, bias: np.ndarray) -> None:
        """See `Steps`."""
        self._state = _set_bias(self._model, self._state, np.int32(row), bias)

    @own_context()
    def begin(self, settings: SlotSettings) -> "DeviceResult[DrawnTokens]":
        """See `Steps`."""
        packed, self._state = _begin(self._model, self._state, settings.packed, num_top=self.num_top)
        return DeviceResult(packed, DrawnTokens.unpack)

    @own_context()
    def decode(self, settings: SlotSettings) -> "DeviceResult[DrawnTokens]":
        """See `Steps`."""
        self.has_decoded = True
        packed, self._state = _decode(self._model, self._state, settings.packed, num_top=self.num_top)
        return DeviceResult(packed, DrawnTokens.unpack)

    @own_context()
    def decode_guesses(self, settings: SlotSettings, limits: np.ndarray, num_guesses: int) -> "DeviceResult[DrawnRuns]":
        """See `Steps`; compiled for each number of guesses."""
        self.has_decoded = True
        packed, self._state = _decode_guesses(
            self._model,
            self._state,
            np.concatenate([settings.packed, limits], axis=1),
            num_top=self.num_top,
            num_guesses=num_guesses,
        )
        return DeviceResult(packed, functools.partial(DrawnRuns.unpack, num_guesses=num_guesses))

    @own_context()
    def lower(self, name: str, shape: tuple[int, ...]) -> Callable[[], object]:
        """See `Steps`."""
        model, state = self._model, self._state
        if is_streamed(model):
            return lambda: None  # its programs are made at their first run
        match name:
            case "prefill":
                return lower_prefill(model, state, (shape[0], shape[1])).compile
            case "score":
                return lower_score(model, state, *shape[1:]).compile
            case "share":
                return lower_share(model, state).compile
            case "decode":
                return lower_decode(model, state, self.num_top).compile
            case "decode_guesses":
                return lower_decode_guesses(model, state, self.num_top, shape[1] - 1).compile
        return lambda: None  # the others are small

    def wait(self) -> None:
        """See `Steps`."""
        jax.block_until_ready(self._state)

    def close(self) -> None:
        """See `Steps`; there is nothing to end."""


class DeviceResult(Generic[V]):
    """What a step makes, before it is there; its copy to the host is under way from the start.

    Args:
      packed: the step's array.
      unpack: what it holds, from its copy.
    """

    def __init__(self, packed: jax.Array, unpack: Callable[[np.ndarray], V]):
        self._packed, self._unpack = packed, unpack
        packed.copy_to_host_async()

    @own_context()
    def read(self) -> V:
        """Waits for the step."""
        return self._unpack(np.asarray(self._packed))


def lower_prefill(model: Grok, state: SlotState, prompts: tuple[int, int]) -> jax.stages.Lowered:
    """The step that prefills (P, T) tokens; model and state may be abstract, here and in the functions below."""
    tokens = jax.ShapeDtypeStruct(prompts, jnp.int32)
    numbers = jax.ShapeDtypeStruct(prompts[:1], jnp.int32)
    return _prefill_rows.lower(model, state, tokens, numbers, numbers, numbers)


def lower_score(model: Grok, state: SlotState, length: int, num_top: int = 0) -> jax.stages.Lowered:
    """The step that prefills `length` tokens of one row and gives the scores of the next ones.

    With `num_top` it also finds so many most probable tokens in the place of each.
    """
    tokens, place = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32)
    return _score_row.lower(model, state, tokens, tokens, place, num_top=num_top)


def lower_share(model: Grok, state: SlotState) -> jax.stages.Lowered:
    """The step that copies the beginning of one row to another."""
    return _share_row.lower(model, state, jax.ShapeDtypeStruct((3,), jnp.int32))


def lower_decode(model: Grok, state: SlotState, num_top: int) -> jax.stages.Lowered:
    """The step that decodes all rows, draws from them and finds the `num_top` most probable tokens."""
    return _decode.lower(model, state, _abstract_settings(state), num_top=num_top)


def lower_decode_guesses(model: Grok, state: SlotState, num_top: int, num_guesses: int) -> jax.stages.Lowered:
    """`lower_decode` of a step that guesses so many tokens of each row and checks them."""
    packed = _abstract_settings(state, num_limits=2)
    return _decode_guesses.lower(model, state, packed, num_top=num_top, num_guesses=num_guesses)


def _abstract_settings(state: SlotState, num_limits: int = 0) -> jax.ShapeDtypeStruct:
    """The settings of all rows as they are packed, with so many limits of each behind them."""
    packed = SlotSettings.of({}, state.cache.batch_size).packed
    return jax.ShapeDtypeStruct((packed.shape[0], packed.shape[1] + num_limits), packed.dtype)


@functools.partial(Compiled, donates="state")
def _prefill_rows(
    model: Grok, state: SlotState, tokens: jax.Array, counts: jax.Array, starts: jax.Array, rows: jax.Array
) -> SlotState:
    logits, cache = prefill(model, tokens, counts, _holding(state.cache, starts, rows), rows=rows)
    state = state.noting(rows, tokens, starts, counts)
    return dataclasses.replace(state, cache=cache, logits=_put_logits(state.logits, logits, rows)).placed(model)


@functools.partial(Compiled, donates="state", static=("num_top",))
def _score_row(
    model: Grok, state: SlotState, tokens: jax.Array, targets: jax.Array, place: jax.Array, *, num_top: int
) -> tuple[jax.Array, SlotState]:
    count, start, row = place[:1], place[1:2], place[2:]
    hidden, cache = model(tokens, count, _holding(state.cache, start, row), rows=row)
    state = state.noting(row, tokens, start, count)
    scores = scores_of(model, hidden, targets, num_top).pack()[0]
    last = lax.dynamic_index_in_dim(hidden[0], count[0] - 1, keepdims=True)
    state = dataclasses.replace(state, cache=cache, logits=_put_logits(state.logits, model.logits(last), row))
    return model.partitioner.constrain(scores, (None, None)), state.placed(model)


@functools.partial(jax.jit, donate_argnames="state")
def _share_row(model: Grok, state: SlotState, place: jax.Array) -> SlotState:
    source, target, length = place
    copy = functools.partial(copy_row, partitioner=model.partitioner, source=source, target=target)
    held = _holding(state.cache, length[None], target[None])
    cache = dataclasses.replace(held, keys=copy(held.keys), values=copy(held.values))
    logits = lax.dynamic_slice_in_dim(state.logits, source, 1)
    logits = _put_logits(state.logits, logits, target[None])
    if state.texts is not None:
        state = dataclasses.replace(state, texts=state.texts.at[target].set(state.texts[source]))
    return dataclasses.replace(state, cache=cache, logits=logits).placed(model)


@functools.partial(jax.jit, donate_argnames="state")
def _set_bias(model: Grok, state: SlotState, row: jax.Array, bias: jax.Array) -> SlotState:
    return dataclasses.replace(state, bias=state.bias.at[row].set(bias)).placed(model)


@functools.partial(jax.jit, donate_argnames="state", static_argnames="num_top")
def _begin(model: Grok, state: SlotState, packed: jax.Array, *, num_top: int) -> tuple[jax.Array, SlotState]:
    return _draw(model, state, state.logits, packed, num_top)


@functools.partial(Compiled, donates="state", static=("num_top",))
def _decode(model: Grok, state: SlotState, packed: jax.Array, *, num_top: int) -> tuple[jax.Array, SlotState]:
    logits, cache = decode(model, state.tokens, state.cache, active=SlotSettings.unpack(packed).active)
    return _draw(model, dataclasses.replace(state, cache=cache), logits, packed, num_top)


@functools.partial(Compiled, donates="state", static=("num_top", "num_guesses"))
def _decode_guesses(
    model: Grok, state: SlotState, packed: jax.Array, *, num_top: int, num_guesses: int
) -> tuple[jax.Array, SlotState]:
    assert state.texts is not None
    row = SlotSettings.unpack(packed)
    ends, most = packed[:, -2], packed[:, -1]

    def draw(logits: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = _drawn(model, logits, state.bias, row, positions, num_top)
        return drawn.token_ids, drawn.pack()

    checked, texts, cache = check_guesses(
        model,
        state.texts,
        state.cache,
        draw,
        ends=jnp.where(row.active, ends, 0),
        most=most,
        num_guesses=num_guesses,
    )
    counts = jnp.stack([checked.made, checked.tried, checked.looked, checked.right], axis=1)
    runs = jnp.concatenate([counts, checked.drawn.reshape(counts.shape[0], -1)], axis=1)
    last = jnp.take_along_axis(texts, jnp.minimum(cache.lengths, cache.max_len - 1)[:, None], axis=1)[:, 0]
    state = dataclasses.replace(state, cache=cache, tokens=last, texts=texts)
    return model.partitioner.constrain(runs, (None, None)), state.placed(model)


def _draw(
    model: Grok, state: SlotState, logits: jax.Array, packed: jax.Array, num_top: int
) -> tuple[jax.Array, SlotState]:
    """Draws for the active rows; gives the `DrawnTokens`, packed, and the state."""
    row, positions = SlotSettings.unpack(packed), state.cache.lengths
    drawn = _drawn(model, logits, state.bias, row, positions, num_top)
    packed_drawn = model.partitioner.constrain(drawn.pack(), (None, None))
    tokens = jnp.where(row.active, drawn.token_ids, state.tokens)
    rows = jnp.arange(len(positions), dtype=jnp.int32)
    state = state.noting(rows, drawn.token_ids[:, None], positions, row.active.astype(jnp.int32))
    return packed_drawn, dataclasses.replace(state, tokens=tokens).placed(model)


def _drawn(
    model: Grok, logits: jax.Array, bias: jax.Array, row: SlotSettings[jax.Array], positions: jax.Array, num_top: int
) -> DrawnTokens[jax.Array]:
    """The tokens at some positions [B], drawn from logits [B, V] as the rows' settings say."""
    settings = SampleSettings(
        temperature=row.temperature,
        top_p=row.top_p,
        min_p=row.min_p,
        top_k=row.top_k,
        mask=None,
        active=row.active,
    )
    with jax.named_scope("bias"):
        adjusted = lax.cond(
            (row.active & row.biased).any(),
            lambda: jnp.where(row.biased[:, None], _biased(logits, bias), logits),
            lambda: logits,
        )
    keys = jax.vmap(seed_key)(row.seed)
    drawn = model.sample(adjusted, settings, keys=keys, positions=positions).token_id
    top = _most_probable(logits, num_top, (row.active & row.wants_top).any())
    return DrawnTokens(drawn, log_probs_of(logits, drawn), *top)


def _biased(logits: jax.Array, bias: jax.Array) -> jax.Array:
    """The sum of both [B, V]; what the bias excludes is so exactly, whatever the logit."""
    return jnp.where(bias <= EXCLUDED, EXCLUDED, logits + bias)


def _most_probable(logits: jax.Array, num_top: int, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable tokens of each row, int32 [B, K], and their log-probabilities, float32; zeros if unwanted."""
    shape = logits.shape[0], num_top
    nothing = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    if not num_top:
        return nothing

    def find() -> tuple[jax.Array, jax.Array]:
        values, ids = lax.top_k(logits, num_top)
        return ids.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    found: tuple[jax.Array, jax.Array] = lax.cond(wanted, find, lambda: nothing)
    return found


def _holding(cache: KVCache, lengths: jax.Array, rows: jax.Array) -> KVCache:
    """The cache whose rows [P] hold so many entries [P]."""
    return dataclasses.replace(cache, lengths=cache.lengths.at[rows].set(lengths))


def _put_logits(kept: jax.Array, logits: jax.Array, rows: jax.Array) -> jax.Array:
    """The logits [B, V] of all rows with those [P, V] of some."""
    for i in range(rows.shape[0]):
        kept = lax.dynamic_update_slice_in_dim(kept, logits[i : i + 1], rows[i], axis=0)
    return kept
