"""Which mesh and which rules suit a machine: every one that is possible, planned and put in order."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax.numpy as jnp
from humanize import naturalsize
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.planning.compiler import StepCompiler
from grokjax.planning.plans import Plan, plan
from grokjax.planning.targets import Target
from grokjax.printing import describe_size
from grokjax.sharding import RULES


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A mesh with rules.

    Attributes:
      mesh: (data, model) devices.
      rules: a name of `RULES`.
      weights_bytes: on each device.
      cache_bytes: on each device.
      plan: of it; None where weights and cache alone do not fit, which is not compiled.
      reason: why it stands where it does, a sentence.
    """

    mesh: tuple[int, int]
    rules: str
    weights_bytes: int
    cache_bytes: int
    plan: Plan | None
    reason: str


def suggest(
    config: GrokConfig | None = None,
    *,
    target: Target | str,
    batch_size: int = 8,
    max_len: int | None = None,
    prompt_len: int = 1024,
    prefill_rows: int = 4,
    dtype: DTypeLike = jnp.bfloat16,
    cache_dtype: DTypeLike | None = None,
    quantized: bool = True,
    collective_latency: float = 0.0,
    progress: Callable[[Suggestion, int, int], None] | None = None,
) -> tuple[Suggestion, ...]:
    """Plans every mesh and every rule that a machine and a model allow.

    Args:
      config: sizes; Grok-1 by default.
      target: a machine of known memory.
      batch_size: rows that are to run at once.
      max_len: tokens of each; by default the configuration's longest sequence.
      prompt_len: as in `grokjax.plan`, and so are those that follow.
      prefill_rows: prompts that are prefilled together at most.
      dtype: compute dtype.
      cache_dtype: of keys and values; by default as an engine's, see `default_cache_dtype`.
      quantized: int8 weights in attention and experts.
      collective_latency: seconds that each transfer takes besides its bytes.
      progress: called with each as soon as it is planned, how many are, and how many there will be.

    Returns:
      Those that fit first, the fastest decoding first; then the others, the smallest first.

    Raises:
      ValueError: As `grokjax.plan` does, or the memory of the target is unknown.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    if target.accelerator.usable_bytes is None:
        raise ValueError(f"the memory of {target} is unknown: state it, or choose an accelerator of the table.")
    config = GrokConfig.grok_1() if config is None else config
    create = functools.partial(
        StepCompiler.create, config, target, dtype=dtype, cache_dtype=cache_dtype, quantized=quantized
    )
    make_plan = functools.partial(
        plan,
        config,
        target=target,
        batch_size=batch_size,
        max_len=max_len,
        prompt_len=prompt_len,
        prefill_rows=prefill_rows,
        dtype=dtype,
        cache_dtype=cache_dtype,
        quantized=quantized,
        collective_latency=collective_latency,
    )
    allowed = _allowed(config, target, create)
    found: list[Suggestion] = []
    for (mesh, rules), compiler in allowed.items():
        cache_bytes = compiler.cache_bytes(batch_size, max_len or config.max_seq_len)
        found.append(_suggestion(compiler, mesh, rules, cache_bytes, make_plan))
        if progress is not None:
            progress(found[-1], len(found), len(allowed))
    return tuple(sorted(found, key=_rank))


def _allowed(
    config: GrokConfig, target: Target, create: Callable[..., StepCompiler]
) -> dict[tuple[tuple[int, int], str], StepCompiler]:
    """(mesh, rules) -> compiler of it, but for those that the sizes do not allow or that differ in nothing."""
    allowed = {}
    problem = ValueError(f"{target} allows no mesh.")
    for mesh, rules in itertools.product(_meshes(target), RULES):
        if _is_alike(config, mesh, rules):
            continue
        try:
            allowed[mesh, rules] = create(mesh=mesh, rules=RULES[rules])
        except ValueError as error:
            problem = error  # of sizes that this mesh does not divide, or of all of them
    if not allowed:
        raise problem
    return allowed


def _meshes(target: Target) -> list[tuple[int, int]]:
    count = target.num_devices
    return [(count // model, model) for model in range(1, count + 1) if count % model == 0]


def _is_alike(config: GrokConfig, mesh: tuple[int, int], rules: str) -> bool:
    """Whether the rules make no difference on the mesh to the tensor parallel ones."""
    return (rules == "fsdp" and mesh[0] == 1) or (rules == "expert" and (mesh[1] == 1 or config.num_experts == 1))


def _suggestion(
    compiler: StepCompiler, mesh: tuple[int, int], rules: str, cache_bytes: int, make_plan: Callable[..., Plan]
) -> Suggestion:
    weights_bytes, usable = compiler.weights_bytes, compiler.target.accelerator.usable_bytes or 0
    least = weights_bytes + cache_bytes
    if least > usable:
        reason = f"weights and cache take {describe_size(least)} of {describe_size(usable)} a device."
        return Suggestion(mesh, rules, weights_bytes, cache_bytes, None, reason)
    made = make_plan(mesh=mesh, rules=RULES[rules])
    return Suggestion(mesh, rules, weights_bytes, cache_bytes, made, _reason(made))


def _reason(made: Plan) -> str:
    if not made.fits:
        return f"needs {describe_size(made.total_bytes)} a device with what the programs allocate: too much."
    step = made.decode
    if step.memory_seconds is None or step.compute_seconds is None or step.transfer_seconds is None:
        return f"takes {describe_size(made.total_bytes)} a device; the accelerator's speed is unknown."
    what = {
        "memory": f"reading {naturalsize(step.cost.num_bytes)} a device takes {step.memory_seconds * 1e3:.2f} ms",
        "compute": f"{step.cost.operations / 1e9:.0f} GFLOP a device take {step.compute_seconds * 1e3:.2f} ms",
        "transfers": f"transfers between devices take {step.transfer_seconds * 1e3:.2f} ms",
    }
    bound = step.bound or "memory"
    rest = ", ".join(text for name, text in what.items() if name != bound)
    return f"{what[bound]}, the most of a step; {rest}."


def _rank(one: Suggestion) -> tuple[bool, float, int]:
    fits = one.plan is not None and bool(one.plan.fits)
    speed = one.plan.decode.tokens_per_second if one.plan is not None else None
    return not fits, -(speed or 0) if fits else math.inf, one.weights_bytes + one.cache_bytes
