"""What a machine would need to run a model and how fast it could be, from compiled programs and no weights."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.planning.accelerators import Accelerator
from grokjax.planning.compiler import Measured, StepCompiler, Traffic, compile_gradient
from grokjax.planning.costs import StepCost
from grokjax.planning.targets import Target
from grokjax.printing import describe_size, display, on_lines
from grokjax.request import check_integer
from grokjax.sharding import ShardingRules

Bound = Literal["memory", "compute", "transfers"]

# Totals that a search for the largest batch or context may ask for beside a small one and that of the plan.
_MAX_TRIES = 4
# Rows beyond which no search goes.
_MOST_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A compiled step on one device.

    Attributes:
      temporary_bytes: what the program allocates besides its arguments and results.
      cost: what it must read and compute.
      traffic: what it sends.
      memory_seconds: to read `cost.num_bytes` at the accelerator's bandwidth; None where that is unknown.
      compute_seconds: for `cost.operations`, likewise.
      transfer_seconds: for `traffic`, on rings, likewise.
      num_tokens: that all devices together process.
    """

    temporary_bytes: int
    cost: StepCost
    traffic: tuple[Traffic, ...]
    memory_seconds: float | None
    compute_seconds: float | None
    transfer_seconds: float | None
    num_tokens: int

    def __repr__(self) -> str:
        if self.seconds is None:
            return f"StepPlan(reads {describe_size(self.cost.num_bytes)} on each device, at an unknown speed)"
        speed = f"{self.tokens_per_second:.3g} tokens/s"
        return f"StepPlan({self.seconds * 1e3:.3g} ms at best, {speed}, bound by {self.bound})"

    __treescope_repr__ = display

    @property
    def seconds(self) -> float | None:
        """The longer of reading and computing, and the transfers: no step is faster. None if a figure is unknown."""
        if self.memory_seconds is None or self.compute_seconds is None or self.transfer_seconds is None:
            return None
        return max(self.memory_seconds, self.compute_seconds) + self.transfer_seconds

    @property
    def tokens_per_second(self) -> float | None:
        """The most that all devices together reach."""
        return None if self.seconds is None else self.num_tokens / self.seconds

    @property
    def bound(self) -> Bound | None:
        """Which of memory, computing and transfers takes longest."""
        if self.memory_seconds is None or self.compute_seconds is None or self.transfer_seconds is None:
            return None
        times: list[tuple[float, Bound]] = [
            (self.memory_seconds, "memory"),
            (self.compute_seconds, "compute"),
            (self.transfer_seconds, "transfers"),
        ]
        return max(times)[1]


@dataclasses.dataclass(frozen=True)
class GradientPlan:
    """What the gradient of a loss needs on each device, with respect to the plain parameters: int8 is constant.

    Attributes:
      num_tokens: of a text; each replica has one.
      gradient_bytes: that the gradients take.
      temporary_bytes: what the program allocates besides its arguments and results.
      total_bytes: all that it takes, weights and gradients included; an optimizer's own arrays come on top.
      fits: whether the total is within what is usable of a device's memory; None if that is unknown.
    """

    num_tokens: int
    gradient_bytes: int
    temporary_bytes: int
    total_bytes: int
    fits: bool | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model needs on each device of a machine, and how fast it could be there.

    Attributes:
      compiler: what has compiled the programs, for which model, machine and mesh.
      batch_size: rows of the cache.
      max_len: tokens that each row holds.
      prompt_len: tokens of each prompt that the prefill takes.
      prefill_rows: prompts that are prefilled together at most.
      decode: a step of all rows, filled.
      prefill: prompts of an engine that has as many.
      weights_bytes: that the model's weights take on each device.
      cache_bytes: that the cache of all rows takes on each device.
      total_bytes: that the step that needs more takes on each device, weights and the whole cache included.
    """

    compiler: StepCompiler
    batch_size: int
    max_len: int
    prompt_len: int
    prefill_rows: int
    decode: StepPlan
    prefill: StepPlan
    weights_bytes: int
    cache_bytes: int
    total_bytes: int

    def __repr__(self) -> str:
        counts = ("batch_size", "max_len", "prompt_len", "prefill_rows")
        sizes = ("weights_bytes", "cache_bytes", "temporary_bytes")
        attributes = {
            "config": repr(self.compiler.config),
            "mesh": repr(self.mesh),
            "rules": repr(self.compiler.rules or ShardingRules()),
            **{name: str(getattr(self, name)) for name in counts},
            **{name: describe_size(getattr(self, name)) for name in sizes},
            "fits": repr(self.fits),
            "decode": repr(self.decode),
            "prefill": repr(self.prefill),
        }
        usable = self.target.accelerator.usable_bytes
        room = "" if usable is None else f" of {describe_size(usable)} usable"
        comment = f"{self.target}: {describe_size(self.total_bytes)}{room} on each device"
        return on_lines(type(self).__name__, comment, attributes)

    __treescope_repr__ = display

    @property
    def target(self) -> Target:
        """The machine."""
        return self.compiler.target

    @property
    def mesh(self) -> tuple[int, int]:
        """(data, model) devices."""
        return self.compiler.mesh

    @property
    def temporary_bytes(self) -> int:
        """Bytes that the step that allocates more takes for a time on each device."""
        return max(self.decode.temporary_bytes, self.prefill.temporary_bytes)

    @property
    def other_bytes(self) -> int:
        """The rest of the total: logits and biases, inputs, results, what layouts add to weights and cache."""
        return self.total_bytes - self.weights_bytes - self.cache_bytes - self.temporary_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the total is within what is usable of a device's memory; None if that is unknown."""
        usable = self.target.accelerator.usable_bytes
        return None if usable is None else self.total_bytes <= usable

    def find_largest_batch_size(self) -> int | None:
        """Compiles some more programs to find how many rows fit with `max_len`.

        0 if none do; None if the memory is unknown.
        """
        usable, data = self.target.accelerator.usable_bytes, self.mesh[0]
        if usable is None:
            return None
        total = functools.partial(self._least_bytes, usable, max_len=self.max_len)
        start, guess = -(-self.batch_size // data), self._likely_rows(usable) if self.fits else 0
        return data * find_largest(lambda n: total(n * data), usable, start, _MOST_ROWS // data, guess)

    def find_largest_max_len(self) -> int | None:
        """Compiles some more programs to find how many tokens a row fit with `batch_size`.

        At most the model's longest sequence, 0 if none do; None if the memory is unknown.
        """
        usable = self.target.accelerator.usable_bytes
        if usable is None:
            return None
        total = functools.partial(self._least_bytes, usable, self.batch_size)
        guess = self.max_len + (usable - self.total_bytes) // self.compiler.cache_bytes(self.batch_size, 1)
        return find_largest(total, usable, self.max_len, self.compiler.config.max_seq_len, guess)

    def plan_gradient(self, num_tokens: int) -> GradientPlan:
        """Compiles one more program to find what the gradient of the mean cross-entropy needs: a step of training.

        Raises:
          ValueError: The number of tokens is not between 2 and the model's longest sequence, or the compiler fails.
        """
        num_tokens = check_integer("num_tokens", num_tokens, 2, self.compiler.config.max_seq_len)
        measured, held = compile_gradient(self.compiler, num_tokens), self.weights_bytes + self.compiler.gradient_bytes
        total, usable = held + measured.temporary_bytes + measured.other_bytes, self.target.accelerator.usable_bytes
        return GradientPlan(
            num_tokens,
            gradient_bytes=self.compiler.gradient_bytes,
            temporary_bytes=measured.temporary_bytes,
            total_bytes=total,
            fits=None if usable is None else total <= usable,
        )

    def _likely_rows(self, usable: int) -> int:
        """Rows of each replica that fit if a prefill's temporaries grow with its prompts, and a decode step's less.

        For the real model it often is the answer, and then no other programs are compiled than those that confirm it,
        side by side. Where temporaries hardly grow it is too low, even below 0.
        """
        data = self.mesh[0]
        prompts = (_prompts(rows, self.prompt_len, self.prefill_rows)[0] for rows in (self.batch_size, _MOST_ROWS))
        now, most = (-(-number // data) for number in prompts)
        temporary = max(self.decode.temporary_bytes, self.prefill.temporary_bytes * most // now)
        other = self.other_bytes // -(-self.batch_size // data)
        return (usable - self.weights_bytes - temporary) // (self.compiler.cache_bytes(data, self.max_len) + other)

    def _least_bytes(self, usable: int, batch_size: int, max_len: int) -> int:
        """The total, or if weights and cache alone are too many bytes, these: no program need be compiled then."""
        held = self.weights_bytes + self.compiler.cache_bytes(batch_size, max_len)
        if held > usable:
            return held
        prompts = _prompts(batch_size, min(self.prompt_len, max_len), self.prefill_rows)
        return _total_bytes(
            self.compiler, batch_size, max_len, *self.compiler.compile_both(batch_size, max_len, prompts)
        )


def plan(
    config: GrokConfig | None = None,
    *,
    target: Target | str = "cpu:8",
    mesh: tuple[int, int] | None = None,
    rules: ShardingRules | None = None,
    batch_size: int = 1,
    max_len: int | None = None,
    prompt_len: int = 1024,
    prefill_rows: int = 4,
    dtype: DTypeLike = jnp.bfloat16,
    cache_dtype: DTypeLike | None = None,
    quantized: bool = True,
    collective_latency: float = 0.0,
) -> Plan:
    """Compiles an engine's prefill and decode for a machine that need not be there; no weight is ever allocated.

    Where the target's own compiler is not installed, that for CPUs stands in: weights and cache are exact then,
    temporaries and transfers those of another compiler. As many CPU devices must be simulated.

    Args:
      config: sizes; Grok-1 by default.
      target: a machine such as "h200:8", "v5p:2x2x2" or "cpu:8".
      mesh: (data, model) devices, as many as the target has; by default as many along model as the sizes allow.
      rules: sharding rules; tensor parallel by default.
      batch_size: rows of the cache.
      max_len: tokens that each row holds; by default the configuration's longest sequence.
      prompt_len: tokens of each prompt of the prefill, at most `max_len`, to which a larger number is lowered.
      prefill_rows: prompts that are prefilled together at most, as in `Engine`; a power of two of them is.
      dtype: compute dtype.
      cache_dtype: of keys and values; by default as an engine's, see `default_cache_dtype`.
      quantized: int8 weights in attention and experts.
      collective_latency: seconds that each transfer takes besides its bytes; none by default.

    Raises:
      ValueError: The target is unknown or has another number of devices, the mesh or the rules do not fit the
        configuration, a size is out of range, or the compiler fails.
    """
    compiler = StepCompiler.create(
        config, target, mesh=mesh, rules=rules, dtype=dtype, cache_dtype=cache_dtype, quantized=quantized
    )
    max_len = compiler.config.max_seq_len if max_len is None else max_len
    prompt_len = min(prompt_len, max_len)
    for rows, length in ((batch_size, max_len), (1, prompt_len)):
        compiler.cache_bytes(rows, length)  # refuses sizes that are out of range, before anything is compiled
    prefill_rows = check_integer("prefill_rows", prefill_rows, 1)
    prompts = _prompts(batch_size, prompt_len, prefill_rows)
    roofline = functools.partial(_roofline, compiler, batch_size, max_len, latency=collective_latency)
    decode, prefill = compiler.compile_both(batch_size, max_len, prompts)
    return Plan(
        compiler,
        batch_size,
        max_len,
        prompt_len,
        prefill_rows,
        decode=roofline(decode),
        prefill=roofline(prefill, prompts),
        weights_bytes=compiler.weights_bytes,
        cache_bytes=compiler.cache_bytes(batch_size, max_len),
        total_bytes=_total_bytes(compiler, batch_size, max_len, decode, prefill),
    )


def _total_bytes(compiler: StepCompiler, batch_size: int, max_len: int, decode: Measured, prefill: Measured) -> int:
    beside = max(decode.temporary_bytes, prefill.temporary_bytes) + decode.other_bytes
    return compiler.weights_bytes + compiler.cache_bytes(batch_size, max_len) + beside


def _prompts(batch_size: int, prompt_len: int, prefill_rows: int) -> tuple[int, int]:
    """Prompts that an engine of so many rows prefills together, a power of two, and their tokens."""
    return 1 << (min(batch_size, prefill_rows).bit_length() - 1), prompt_len


def _roofline(
    compiler: StepCompiler,
    batch_size: int,
    max_len: int,
    measured: Measured,
    prompts: tuple[int, int] | None = None,
    *,
    latency: float,
) -> StepPlan:
    cost = compiler.cost(batch_size, max_len, prompts)
    traffic, accelerator = tuple(measured.traffic.values()), compiler.target.accelerator
    times = [_ring_seconds(one, accelerator, latency) for one in traffic]
    return StepPlan(
        temporary_bytes=measured.temporary_bytes,
        cost=cost,
        traffic=traffic,
        memory_seconds=accelerator.bandwidth and cost.num_bytes / accelerator.bandwidth,
        compute_seconds=accelerator.flops and cost.operations / accelerator.flops,
        transfer_seconds=None if None in times else math.fsum(time for time in times if time is not None),
        num_tokens=batch_size if prompts is None else math.prod(prompts),
    )


def _ring_seconds(traffic: Traffic, accelerator: Accelerator, latency: float) -> float | None:
    """Every device sends its part of the result to the next one, round and round, at the pace of the slowest link."""
    link = accelerator.host_bandwidth if traffic.is_between_hosts else accelerator.link_bandwidth
    parts = (traffic.num_devices - 1) / traffic.num_devices
    # A sum goes round twice; a result that is scattered is a part already; a permutation sends what each holds.
    rounds = {"all-reduce": 2 * parts, "reduce-scatter": traffic.num_devices - 1, "collective-permute": 1}
    return link and traffic.count * latency + rounds.get(traffic.kind, parts) * traffic.num_bytes / link


def find_largest(total_bytes: Callable[[int], int], usable: int, start: int, most: int, guess: int) -> int:
    """The largest n up to `most` whose total is usable, which grows about linearly; 0 if there is none.

    It is confirmed by its total; of what is too much a lower bound does. At most `_MAX_TRIES` totals beside those of
    `start` and maybe 1 are asked for, the first, if that of `start` is usable, that of `guess`, or of twice `start`
    where `guess` is not above it.
    """
    known = {start: total_bytes(start)}
    if known[start] > usable:
        known[1] = total_bytes(1)
    if known.get(1, 0) > usable:
        return 0
    for _ in range(_MAX_TRIES):
        fitting, others = [sorted(n for n in known if (known[n] <= usable) is fits) for fits in (True, False)]
        low = fitting[-1]
        if len(known) > 1:
            high = others[0] if others else fitting[-2]
            slope = max((known[high] - known[low]) / (high - low), 1)
            guess = low + int((usable - known[low]) / slope)
        elif guess <= low:
            guess = 2 * low
        guess = min(most, guess)
        if guess in known:
            break
        known[guess] = total_bytes(guess)
    return max(n for n, needed in known.items() if needed <= usable)
