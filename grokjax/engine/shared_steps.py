"""The steps of an engine whose model spans several processes: the first leads, the others follow."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grokjax.distributed import Channel, DistributedError, exchange
from grokjax.engine.protocol import Steps
from grokjax.errors import first_line
from grokjax.model import DeviceResult, DrawnRuns, DrawnTokens, Grok, ModelSteps, Scores, SlotOptions, SlotSettings

_BEGINNING = "the beginning of an engine"


def make_steps(model: Grok, options: SlotOptions) -> Steps:
    """The steps of a model: `SharedSteps` where its mesh spans processes, else `ModelSteps`.

    Raises:
      ValueError: Its mesh spans processes, and this is not the first or another process has another model; or the
        devices have too little memory left.
    """
    kind = SharedSteps if model.partitioner.mesh.is_multi_process else ModelSteps
    return kind(model, options)


class SharedSteps:
    """`Steps` of process 0, which tells each to the other processes before it dispatches it.

    The other processes call `follow(model)`. The arguments are those of `ModelSteps`.
    """

    def __init__(self, model: Grok, options: SlotOptions):
        if jax.process_index():
            raise ValueError(
                f"the model spans {jax.process_count()} processes, and the engine runs on process 0: "
                f"call follow(model) on process {jax.process_index()}."
            )
        self.slots, self.vocab_size, self.num_top = options.slots, model.config.vocab_size, options.num_top
        # Made first: where they are refused for want of memory, the others have been told nothing yet.
        self._steps = ModelSteps(model, options)
        check_same_model(_BEGINNING, model)
        self._channel = Channel.open()
        dtype = "" if options.cache_dtype is None else jnp.dtype(options.cache_dtype).name
        self._channel.send("start", dtype, options.slots, options.max_len, options.num_top, options.max_guesses)

    @property
    def has_decoded(self) -> bool:
        """See `Steps`."""
        return self._steps.has_decoded

    def prefill(self, tokens: np.ndarray, counts: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> None:
        """See `Steps`."""
        self._channel.send("prefill", tokens, counts, starts, rows)
        self._steps.prefill(tokens, counts, starts, rows)

    def score(
        self, tokens: np.ndarray, targets: np.ndarray, count: int, start: int, row: int, *, wants_top: bool
    ) -> DeviceResult[Scores[np.ndarray]]:
        """See `Steps`."""
        self._channel.send("score", tokens, targets, count, start, row, wants_top)
        return self._steps.score(tokens, targets, count, start, row, wants_top=wants_top)

    def share(self, source: int, target: int, length: int) -> None:
        """See `Steps`."""
        self._channel.send("share", source, target, length)
        self._steps.share(source, target, length)

    def set_bias(self, row: int, bias: np.ndarray) -> None:
        """See `Steps`."""
        self._channel.send("set_bias", row, bias)
        self._steps.set_bias(row, bias)

    def begin(self, settings: SlotSettings) -> DeviceResult[DrawnTokens]:
        """See `Steps`."""
        self._channel.send("begin", settings.packed)
        return self._steps.begin(settings)

    def decode(self, settings: SlotSettings) -> DeviceResult[DrawnTokens]:
        """See `Steps`."""
        self._channel.send("decode", settings.packed)
        return self._steps.decode(settings)

    def decode_guesses(self, settings: SlotSettings, limits: np.ndarray, num_guesses: int) -> DeviceResult[DrawnRuns]:
        """See `Steps`."""
        self._channel.send("decode_guesses", settings.packed, limits, num_guesses)
        return self._steps.decode_guesses(settings, limits, num_guesses)

    def lower(self, name: str, shape: tuple[int, ...]) -> Callable[[], object]:
        """See `Steps`; the processes compile each step together, as they first run it."""
        return lambda: None

    def wait(self) -> None:
        """See `Steps`; the other processes need not know."""
        self._steps.wait()

    def close(self) -> None:
        """Lets the other processes return from `follow`."""
        self._channel.send("close")


def follow(model: Grok) -> None:
    """Steps the model as the engine of process 0 says, until that engine is closed: what every other process calls.

    Args:
      model: this process's part of the same model.

    Raises:
      ValueError: This is process 0, the model is another than that of process 0, or it does not span processes.
      DistributedError: Process 0 has gone, or a step failed.
    """
    if not jax.process_index() or not model.partitioner.mesh.is_multi_process:
        raise ValueError(
            f"follow is for the processes after the first, whose model lies on a mesh over all of them; this is "
            f"process {jax.process_index()} with a mesh of {model.partitioner.mesh.size} devices: make an engine."
        )
    check_same_model(_BEGINNING, model)
    channel = Channel.open()
    name, (dtype, *sizes) = channel.receive()
    slots, max_len, num_top, max_guesses = (size.item() for size in sizes)
    # Process 0, whose devices hold as much, has found room or shall try.
    options = SlotOptions(
        slots=slots,
        max_len=max_len,
        num_top=num_top,
        max_guesses=max_guesses,
        cache_dtype=str(dtype) or None,
        allow_oom=True,
    )
    steps = ModelSteps(model, options)
    drawn: DeviceResult[Any] | None = None
    try:
        while name != "close":
            name, values = channel.receive()
            earlier, drawn = drawn, _take_step(steps, name, values) or drawn
            if earlier is not None and earlier is not drawn:
                earlier.read()  # As in an engine, one step is under way while the next is dispatched.
    except jax.errors.JaxRuntimeError as error:
        raise DistributedError(
            f"a step of all processes failed: {first_line(error)}. Another process may have died, or memory was short: "
            "end them all and start them again."
        ) from error


def _take_step(steps: ModelSteps, name: str, values: list[np.ndarray]) -> DeviceResult[Any] | None:
    match name:
        case "begin":
            return steps.begin(SlotSettings.unpack(values[0]))
        case "decode":
            return steps.decode(SlotSettings.unpack(values[0]))
        case "decode_guesses":
            settings, limits, num_guesses = values
            return steps.decode_guesses(SlotSettings.unpack(settings), limits, num_guesses.item())
        case "prefill":
            steps.prefill(*values)
        case "score":
            tokens, targets, *place, wants_top = values
            steps.score(tokens, targets, *(number.item() for number in place), wants_top=wants_top.item())
        case "share":
            steps.share(*(number.item() for number in values))
        case "set_bias":
            steps.set_bias(values[0].item(), values[1])
    return None


def check_same_model(what: str, model: Grok) -> None:
    """Compares what all processes know of their models; they wait for each other.

    Args:
      what: as for `exchange`.
      model: this process's part.

    Raises:
      DistributedError: Another process has gone, or has come to something else.
      ValueError: One has another model than process 0; all of them say so.
    """
    first, *others = exchange(what, _fingerprint(model))
    for number, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(
                f"process 0 has another model: {first}; process {number} has {other}: load the same with the same "
                "mesh, rules and dtype."
            )


def _fingerprint(model: Grok) -> str:
    """What must be the same of a model on all processes; its weights were compared when they were loaded."""
    partitioner = model.partitioner
    kinds = collections.Counter(np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(model))
    stored = ", ".join(f"{count} x {name}" for name, count in sorted(kinds.items()))
    compute = np.dtype(model.dtype).name
    return f"{model.config} {compute} of {stored} {dict(partitioner.mesh.shape)} {partitioner.rules}"
