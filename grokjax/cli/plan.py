"""`grokjax plan`: what a machine would need, and how fast it could be, before it is paid for."""

import argparse
import dataclasses
import functools
import json
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from humanize import metric, naturalsize
from rich.table import Column, Table

from grokjax.checkpoint import check_no_link
from grokjax.cli.console import say, table_text
from grokjax.cli.options import add_budgets, add_dtype, named_config, read_bytes, read_extents
from grokjax.cli.streams import write
from grokjax.planning import (
    ACCELERATORS,
    GIB,
    GradientPlan,
    Plan,
    StepPlan,
    StreamPlan,
    Suggestion,
    Target,
    plan,
    plan_stream,
    suggest,
)
from grokjax.request import check_integer
from grokjax.sharding import RULES


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of `grokjax`."""
    command = commands.add_parser(
        "plan",
        help="say what a model needs on a machine, and how fast it could be there",
        description="Compiles prefill and decode for a machine that need not be there and says what each device needs. "
        "No weight is ever allocated.",
    )
    command.add_argument(
        "--config", metavar="NAME_OR_FILE", default="grok_1", help="tiny, bench_1b, grok_1 or JSON (default: grok_1)"
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--target",
        default="cpu:8",
        help=f"such as h200:8 or v5p:2x2x2; known: {', '.join(ACCELERATORS)} (default: cpu:8)",
    )
    what.add_argument("--devices", metavar="NxNAME", help="the same as NAME:N, such as 16xH100-80G")
    command.add_argument("--suggest", action="store_true", help="plan every mesh and rule, the best first")
    command.add_argument(
        "--mesh", metavar="DATA,MODEL", help="devices (default: as many along MODEL as the sizes allow)"
    )
    command.add_argument("--rules", choices=tuple(RULES), help="parallelism (default: tensor)")
    command.add_argument("--batch", type=int, help="rows (default: 1, with --suggest 8)")
    command.add_argument(
        "--max-len", type=int, help="tokens that each row holds (default: the model's longest sequence)"
    )
    command.add_argument("--prompt", type=int, default=1024, help="tokens of a prefill (default: %(default)s)")
    command.add_argument(
        "--prefill-rows", type=int, default=4, help="prompts prefilled together at most (default: %(default)s)"
    )
    command.add_argument(
        "--gradient", metavar="TOKENS", type=int, help="say also what the gradient of a loss over so many tokens needs"
    )
    add_dtype(command)
    command.add_argument(
        "--cache-dtype", choices=("bfloat16", "float32", "int8"), help="(default: bfloat16, on a CPU float32)"
    )
    command.add_argument("--plain", action="store_true", help="plain weights instead of int8")
    _add_figures(command)
    _add_streaming(command)
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    command.add_argument("--plot", metavar="FILE.png", type=Path, help="draw the memory of a device; needs matplotlib")
    command.set_defaults(run=_run)


def _add_figures(command: argparse.ArgumentParser) -> None:
    figures = command.add_argument_group("figures of a device in place of those of the table")
    figures.add_argument("--hbm-gib", type=float, help="memory")
    figures.add_argument("--bandwidth-gbs", type=float, help="GB/s from memory")
    figures.add_argument("--tflops", type=float, help="bfloat16 operations, 10^12 a second")
    figures.add_argument("--link-gbs", type=float, help="GB/s that it sends to its neighbours")
    figures.add_argument("--latency-us", type=float, default=0.0, help="of each transfer, microseconds (default: 0)")


def _add_streaming(command: argparse.ArgumentParser) -> None:
    streaming = command.add_argument_group("weights that stream, as by --stream of grokjax generate and score")
    streaming.add_argument("--stream", action="store_true", help="plan a pass through the layers; compiles nothing")
    streaming.add_argument("--tokens", type=int, default=1, help="of a pass (default: 1, a token of one text)")
    streaming.add_argument("--disk-gbs", type=float, default=1.0, help="GB/s from the disk (default: %(default)s)")
    streaming.add_argument("--host-gbs", type=float, help="GB/s from the host to all devices (default: unknown)")
    add_budgets(streaming)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.stream:
        _run_stream(arguments)
        return
    others = (arguments.mesh, arguments.rules, arguments.plot, arguments.gradient)
    if arguments.suggest and any(other is not None for other in others):
        raise ValueError(
            "--suggest tries every mesh and rule, for decoding, and draws nothing: leave out --mesh, --rules, --plot "
            "and --gradient."
        )
    target, config = _target(arguments), named_config("--config", arguments.config)
    if arguments.gradient is not None:
        check_integer("--gradient", arguments.gradient, 2, config.max_seq_len)
    mesh = None if arguments.mesh is None else read_extents(arguments.mesh)
    figure = None if arguments.plot is None else _new_figure(arguments.plot)
    _simulate_devices(target.num_devices)
    if target.missing:
        say(
            f"the compiler for CPUs stands in for that of {target}, which the extra `{target.missing}` brings: "
            f"run pip install '.[{target.missing}]' in the checkout"
        )
    ask: Callable[..., Any] = functools.partial(
        suggest if arguments.suggest else plan,
        config,
        target=target,
        max_len=arguments.max_len,
        prompt_len=arguments.prompt,
        prefill_rows=arguments.prefill_rows,
        dtype=arguments.dtype,
        cache_dtype=arguments.cache_dtype,
        quantized=not arguments.plain,
        collective_latency=arguments.latency_us / 1e6,
    )
    if arguments.batch is not None:
        ask = functools.partial(ask, batch_size=arguments.batch)
    if arguments.suggest:
        found = ask(progress=_say_suggestion)
        records = [_suggestion_record(one) for one in found]
        write(f"{json.dumps(records) if arguments.json else table_text(_suggestions_table(found))}\n")
        return
    made = ask(mesh=mesh, rules=RULES[arguments.rules or "tensor"])
    if figure is not None:
        _draw(made, figure, arguments.plot)
    gradient = None if arguments.gradient is None else made.plan_gradient(arguments.gradient)
    write(f"{_as_json(made, gradient) if arguments.json else _as_table(made, gradient)}\n")


def _run_stream(arguments: argparse.Namespace) -> None:
    made = plan_stream(
        named_config("--config", arguments.config),
        _target(arguments),
        num_tokens=arguments.tokens,
        disk_bandwidth=arguments.disk_gbs * 1e9,
        host_bandwidth=arguments.host_gbs and arguments.host_gbs * 1e9,
        dtype=arguments.dtype,
        device_bytes=read_bytes("--device-memory", arguments.device_memory),
        host_bytes=read_bytes("--host-memory", arguments.host_memory) or 0,
    )
    write(f"{json.dumps(_stream_record(made)) if arguments.json else table_text(_stream_table(made))}\n")


def _stream_record(made: StreamPlan) -> dict[str, Any]:
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    derived = {name: getattr(made, name) for name in ("fits", "seconds", "tokens_per_second")}
    return fields | derived | {"target": str(made.target)}


def _stream_table(made: StreamPlan) -> Table:
    table = Table.grid("", Column(justify="right"), "", padding=(0, 2))
    verdict = {None: "", True: "fits", False: "does not fit"}[made.fits]
    table.add_row("weights on each device", _memory(made.weights_bytes), verdict)
    table.add_row("layers that stay there", str(made.on_devices))
    table.add_row("layers on the host", str(made.on_host), _memory(made.on_host * made.layer_bytes))
    table.add_row("layers from the disk", str(made.on_disk), _memory(made.on_disk * made.layer_bytes))
    table.add_row("  experts that are read", f"{made.share:.0%}")
    table.add_row("a layer: from the disk", "", _milliseconds(made.disk_seconds))
    table.add_row("  from the host", "", _milliseconds(made.host_seconds) or "unknown: give --host-gbs")
    table.add_row("  computes", "", _milliseconds(made.compute_seconds) or "unknown: give --tflops and --bandwidth-gbs")
    table.add_row(
        f"a pass of {made.num_tokens} tokens", f"{made.seconds:.1f} s", f"{made.tokens_per_second:.3g} tokens/s"
    )
    table.add_row("bound by computing from", "unknown" if made.bound_from is None else f"{made.bound_from} tokens")
    return table


def _as_json(made: Plan, gradient: GradientPlan | None) -> str:
    return json.dumps(plan_record(made) | ({} if gradient is None else {"gradient": _gradient_record(gradient)}))


def _as_table(made: Plan, gradient: GradientPlan | None) -> str:
    table = _plan_table(made)
    if gradient is not None:
        _add_gradient(table, gradient)
    return f"{_title(made)}\n{table_text(table)}"


def _target(arguments: argparse.Namespace) -> Target:
    text = arguments.target
    if arguments.devices is not None:
        found = re.fullmatch(r"(\d+)[xX](.+)", arguments.devices)
        if not found:
            shown = reprlib.repr(arguments.devices)
            raise ValueError(f"--devices {shown}: give a number and a name, such as 16xH100-80G.")
        text = f"{found[2]}:{found[1]}"
    target = Target.parse(text)
    stated = (arguments.hbm_gib, arguments.bandwidth_gbs, arguments.tflops, arguments.link_gbs)
    if not all(math.isfinite(figure) and figure > 0 for figure in stated if figure is not None):
        raise ValueError("the figures of a device must be above 0 and finite: leave out those that are not known.")
    if not 0 <= arguments.latency_us < math.inf:
        raise ValueError(f"--latency-us {arguments.latency_us} must be 0 or more, and finite.")
    figures = {
        "memory_bytes": arguments.hbm_gib and int(arguments.hbm_gib * GIB),
        "bandwidth": arguments.bandwidth_gbs and arguments.bandwidth_gbs * 1e9,
        "flops": arguments.tflops and arguments.tflops * 1e12,
        "link_bandwidth": arguments.link_gbs and arguments.link_gbs * 1e9,
    }
    given = {name: figure for name, figure in figures.items() if figure is not None}
    accelerator: Any = dataclasses.replace(target.accelerator, **given)
    return dataclasses.replace(target, accelerator=accelerator)


def _simulate_devices(count: int) -> None:
    """Simulates as many CPU devices as the machine has; where JAX runs already, those that it has must do."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return


def plan_record(made: Plan) -> dict[str, Any]:
    """A plan as JSON; bytes are integers, of one device."""
    return {
        "target": str(made.target),
        "compiler": made.target.compiler,
        "mesh": list(made.mesh),
        "batch_size": made.batch_size,
        "max_len": made.max_len,
        "prompt_len": made.prompt_len,
        "prefill_rows": made.prefill_rows,
        "weights_bytes_per_device": made.weights_bytes,
        "cache_bytes_per_device": made.cache_bytes,
        "temporary_bytes_per_device": made.temporary_bytes,
        "other_bytes_per_device": made.other_bytes,
        "total_bytes_per_device": made.total_bytes,
        "memory_bytes_per_device": made.target.accelerator.memory_bytes,
        "usable_bytes_per_device": made.target.accelerator.usable_bytes,
        "fits": made.fits,
        "largest_batch_size": made.find_largest_batch_size(),
        "largest_max_len": made.find_largest_max_len(),
        "decode": _step_record(made.decode),
        "prefill": _step_record(made.prefill),
    }


def _step_record(step: StepPlan) -> dict[str, Any]:
    return {
        "read_bytes": int(step.cost.num_bytes),
        "operations": int(step.cost.operations),
        "transfers": [dataclasses.asdict(one) for one in step.traffic],
        "memory_seconds": step.memory_seconds,
        "compute_seconds": step.compute_seconds,
        "transfer_seconds": step.transfer_seconds,
        "seconds": step.seconds,
        "tokens_per_second": step.tokens_per_second,
        "bound": step.bound,
    }


def _gradient_record(gradient: GradientPlan) -> dict[str, Any]:
    return {
        "num_tokens": gradient.num_tokens,
        "gradient_bytes_per_device": gradient.gradient_bytes,
        "temporary_bytes_per_device": gradient.temporary_bytes,
        "total_bytes_per_device": gradient.total_bytes,
        "fits": gradient.fits,
    }


def _say_suggestion(one: Suggestion, done: int, total: int) -> None:
    say(f"{done} of {total} planned: mesh {one.mesh[0]},{one.mesh[1]}, {one.rules}: {one.reason}")


def _suggestion_record(one: Suggestion) -> dict[str, Any]:
    return {
        "mesh": list(one.mesh),
        "rules": one.rules,
        "weights_bytes_per_device": one.weights_bytes,
        "cache_bytes_per_device": one.cache_bytes,
        "fits": one.plan is not None and one.plan.fits,
        "tokens_per_second": one.plan and one.plan.decode.tokens_per_second,
        "reason": one.reason,
    }


def _suggestions_table(found: tuple[Suggestion, ...]) -> Table:
    table = Table("mesh", "rules", "fits", Column("tokens/s", justify="right"), "why", box=None, pad_edge=False)
    for one in found:
        fits = one.plan is not None and one.plan.fits
        speed = one.plan.decode.tokens_per_second if one.plan is not None and fits else None
        shown = "-" if speed is None else f"{speed:.0f}"
        table.add_row(f"{one.mesh[0]},{one.mesh[1]}", one.rules, "yes" if fits else "no", shown, one.reason)
    return table


def _title(made: Plan) -> str:
    return (
        f"{made.target}, mesh {made.mesh[0]},{made.mesh[1]}: batch {made.batch_size}, {made.max_len} tokens a row, "
        f"programs by the compiler for {made.target.compiler}"
    )


def _plan_table(made: Plan) -> Table:
    """What a device holds, and what each step takes: name, amount, and what follows from it."""
    table = Table.grid("", Column(justify="right"), "", padding=(0, 2))
    _add_memory(table, made)
    _add_step(table, "a decode step", made.decode)
    what = f"prefill of {made.prefill.num_tokens // made.prompt_len} x {made.prompt_len} tokens"
    _add_step(table, what, made.prefill)
    return table


def _add_memory(table: Table, made: Plan) -> None:
    table.add_row("on each device")
    for name, num_bytes in (
        ("weights", made.weights_bytes),
        ("cache", made.cache_bytes),
        ("temporaries", made.temporary_bytes),
        ("inputs, results, padding", made.other_bytes),
        ("total", made.total_bytes),
    ):
        table.add_row(f"  {name}", _memory(num_bytes))
    usable = made.target.accelerator.usable_bytes
    if usable is not None:
        table.add_row("  usable", _memory(usable), "fits" if made.fits else "does not fit")
        table.add_row(f"  most rows of {made.max_len}", str(made.find_largest_batch_size()))
        table.add_row("  most tokens a row", str(made.find_largest_max_len()))


def _add_step(table: Table, name: str, step: StepPlan) -> None:
    table.add_row(name)
    table.add_row("  reads", naturalsize(step.cost.num_bytes, format="%.3f"), _milliseconds(step.memory_seconds))
    table.add_row("  computes", metric(step.cost.operations, "FLOP", precision=4), _milliseconds(step.compute_seconds))
    for one in step.traffic:
        table.add_row(f"  {one.count} {one.kind}", naturalsize(one.num_bytes, format="%.2f"))
    if step.seconds is not None and step.tokens_per_second is not None:
        table.add_row("  transfers", "", _milliseconds(step.transfer_seconds))
        table.add_row("  at most", f"{step.tokens_per_second:.1f} tokens/s", f"bound by {step.bound}")


def _add_gradient(table: Table, gradient: GradientPlan) -> None:
    """The memory of a step of training, of which nothing is in the parts above but the weights."""
    table.add_row(f"gradient of {gradient.num_tokens} tokens")
    table.add_row("  gradients", _memory(gradient.gradient_bytes))
    table.add_row("  temporaries", _memory(gradient.temporary_bytes))
    verdict = {None: "", True: "fits", False: "does not fit"}[gradient.fits]
    table.add_row("  total", _memory(gradient.total_bytes), verdict)


def _memory(num_bytes: int) -> str:
    return naturalsize(num_bytes, binary=True, format="%.3f")


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"


def _new_figure(path: Path) -> Any:
    """An empty figure for a file, made before the plan, which takes long and would be lost without either."""
    check_no_link(path)
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path} cannot be written: there is no folder {path.parent}, make it first.")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError(
            "--plot needs matplotlib, the extra `plot`: run pip install '.[plot]' in the checkout."
        ) from None
    return Figure(figsize=(7, 2.4), layout="constrained")


def _draw(made: Plan, figure: Any, path: Path) -> None:
    """Draws the memory of a device into a file."""
    axes = figure.subplots()
    left = 0.0
    for name, num_bytes in (
        ("weights", made.weights_bytes),
        ("cache", made.cache_bytes),
        ("temporaries", made.temporary_bytes),
        ("other", made.other_bytes),
    ):
        axes.barh([0], [num_bytes / GIB], left=[left], label=f"{name} {num_bytes / GIB:.2f}")
        left += num_bytes / GIB
    if made.target.accelerator.memory_bytes is not None:
        axes.axvline(made.target.accelerator.memory_bytes / GIB, color="black", label="memory")
    title = f"{made.target}, batch {made.batch_size}, {made.max_len} tokens a row"
    axes.set(yticks=[], xlabel="GiB on each device", title=title)
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")  # below, where it covers no bar
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--plot {path} cannot be written: {error}.") from error
