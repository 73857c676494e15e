"""`grokjax convert`, `verify`, `export`, `info` and `make-release-fixture`: what is done to checkpoints."""

import argparse
import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
from humanize import naturalsize
from rich.table import Column, Table

from grokjax.checkpoint import (
    CheckpointInfo,
    ConversionPlan,
    SchemeName,
    WeightFormat,
    convert,
    describe,
    export,
    find_tokenizer,
    keep_checksums,
    plan_conversion,
    verify,
    verify_finite,
)
from grokjax.cli.console import byte_progress, say, table_text
from grokjax.cli.options import add_dtype, checkpoint_config, read_config, read_extents
from grokjax.cli.streams import write
from grokjax.config import GrokConfig
from grokjax.request import check_integer
from grokjax.sharding import RULES
from grokjax.testing import write_release_checkpoint


def add_commands(commands: Any) -> None:
    """Adds the commands to the subparsers of `grokjax`."""
    _add_convert(commands)
    _add_verify(commands)
    _add_export(commands)
    _add_info(commands)
    _add_fixture(commands)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="write a checkpoint of any layout as one of ours",
        description="Writes a checkpoint of any layout (the release's, safetensors, ours) as one of ours. "
        "Interrupted, the same command goes on where it stopped.",
    )
    _add_source(command)
    command.add_argument("target", metavar="DST", type=Path, help="the new folder")
    command.add_argument(
        "--weights",
        choices=get_args(WeightFormat),
        default="keep",
        help="keep every array as it is (default), quantise float weights, or make all plain",
    )
    command.add_argument("--scale-blocks", type=int, default=1, help="of weights that are quantised (default: 1)")
    command.add_argument("--dry-run", action="store_true", help="say what would be done and what it takes")
    command.add_argument("--verify", action="store_true", help="then read both back and compare checksums")
    command.set_defaults(run=_run_convert)


def _run_convert(arguments: argparse.Namespace) -> None:
    source, target, config = arguments.source, arguments.target, checkpoint_config(arguments.config, arguments.source)
    weights, scale_blocks = arguments.weights, arguments.scale_blocks
    plan = plan_conversion(source, target, config, weights=weights, scale_blocks=scale_blocks)
    _say_plan(plan)
    if arguments.dry_run:
        return
    with byte_progress("converted") as progress:
        convert(source, target, config, weights=weights, scale_blocks=scale_blocks, progress=progress)
    if arguments.verify:
        with byte_progress("verified") as progress:
            checksums = verify(target, source, config, progress=progress)
        keep_checksums(target, checksums)
        say("every array is what it was made from; the checksums are kept in grokjax.json")
    say(f"{target} is complete")


def _say_plan(plan: ConversionPlan) -> None:
    say(f"{plan.source.layout} checkpoint {plan.source.path} -> {plan.target}, weights: {plan.recipe.weights}")
    say(
        f"{plan.num_done} of {plan.num_units} units are there; {naturalsize(plan.write_bytes)} to write, "
        f"{naturalsize(plan.free_bytes)} free; at most {naturalsize(plan.peak_host_bytes, binary=True)} of memory"
    )


def _add_verify(commands: Any) -> None:
    command = commands.add_parser("verify", help="compare the arrays of a checkpoint of ours with their checksums")
    command.add_argument("target", metavar="PATH", type=Path, help="a checkpoint of ours; with --finite, of any layout")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--source", metavar="SRC", type=Path, help="what it was converted from; compare with that")
    what.add_argument("--finite", action="store_true", help="look for values that are NaN or infinite instead")
    command.add_argument(
        "--config", metavar="FILE", type=Path, help="what the source was made with (default: as PATH says)"
    )
    command.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> None:
    if arguments.finite:
        config = checkpoint_config(arguments.config, arguments.target)
        with byte_progress("looked at") as progress:
            verify_finite(arguments.target, config, progress=progress)
        say(f"{arguments.target}: every value is finite")
        return
    config = None if arguments.config is None else read_config("--config", arguments.config)
    with byte_progress("verified") as progress:
        checksums = verify(arguments.target, arguments.source, config, progress=progress)
    if arguments.source is not None:
        keep_checksums(arguments.target, checksums)
    say(f"{arguments.target}: every array is as it should be")


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a checkpoint as safetensors for other programs",
        description="Writes a checkpoint of any layout as safetensors files with the names of a public one.",
    )
    _add_source(command)
    command.add_argument("target", metavar="DST", type=Path, help="the new folder")
    command.add_argument(
        "--names",
        choices=get_args(SchemeName),
        default="keyfan",
        help="those of keyfan/grok-1-hf, as llama.cpp reads, or of hpcai-tech/grok-1, as vLLM does (default: keyfan)",
    )
    command.add_argument(
        "--tokenizer", metavar="FILE", type=Path, help="copied to DST (default: tokenizer.model beside SRC, if any)"
    )
    add_dtype(command)
    command.set_defaults(run=_run_export)


def _run_export(arguments: argparse.Namespace) -> None:
    source, target, config = arguments.source, arguments.target, checkpoint_config(arguments.config, arguments.source)
    tokenizer = arguments.tokenizer or find_tokenizer(source)
    with byte_progress("exported") as progress:
        export(
            source,
            target,
            config,
            names=arguments.names,
            dtype=arguments.dtype,
            tokenizer=tokenizer,
            progress=progress,
        )
    say(f"{target} is complete" + (f", with {tokenizer}" if tokenizer else ", without a tokenizer: none is beside SRC"))


def _add_info(commands: Any) -> None:
    command = commands.add_parser("info", help="say what a checkpoint holds, and what it needs on each device")
    _add_source(command)
    command.add_argument("--mesh", metavar="DATA,MODEL", default="1,8", help="devices (default: %(default)s)")
    command.add_argument("--rules", choices=tuple(RULES), default="tensor", help="parallelism (default: %(default)s)")
    add_dtype(command)
    command.add_argument(
        "--plain", action="store_true", help="what the devices need if int8 weights are made plain, and how much more"
    )
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    command.set_defaults(run=_run_info)


def _run_info(arguments: argparse.Namespace) -> None:
    info = describe(arguments.source, checkpoint_config(arguments.config, arguments.source))
    mesh, dtype = read_extents(arguments.mesh), jnp.dtype(arguments.dtype)
    count = functools.partial(info.bytes_per_device, mesh, rules=RULES[arguments.rules], dtype=dtype)
    per_device = count(quantized=not arguments.plain)
    if arguments.json:
        write(f"{json.dumps(_info_record(info) | {'mesh': list(mesh), 'bytes_per_device': per_device})}\n")
        return
    lines = [
        f"{info.path}: {info.layout} checkpoint, {info.num_parameters} parameters, {info.num_bytes} bytes",
        f"on a mesh of {mesh[0]} x {mesh[1]} devices: {per_device} bytes on each ({naturalsize(per_device)})"
        + (_compare(per_device, count(quantized=True), arguments.dtype) if arguments.plain else ""),
        *(f"  {name} = {value}" for name, value in dataclasses.asdict(info.config).items()),
        table_text(_parameters_table(info)),
    ]
    write("\n".join(lines) + "\n")


def _compare(plain: int, as_stored: int, dtype: str) -> str:
    """What plain weights take against those of the checkpoint, in bytes on each device."""
    if plain == as_stored:
        return ", plain or not: no weight is int8"
    stored = f"{as_stored} bytes ({naturalsize(as_stored)})"
    return f" with every weight in {dtype}, {plain / as_stored:.2f} times the {stored} of int8 weights"


def _parameters_table(info: CheckpointInfo) -> Table:
    table = Table("parameter", "arrays", Column("bytes", justify="right"), box=None, pad_edge=False)
    for name, spec in info.specs.items():
        kinds = [f"{leaf.dtype.name} {list(leaf.shape)}" for leaf in spec.leaves().values()]
        table.add_row(name, " + ".join(kinds), str(spec.num_bytes))
    return table


def _info_record(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "path": str(info.path),
        "layout": info.layout,
        "num_parameters": info.num_parameters,
        "num_bytes": info.num_bytes,
        "config": dataclasses.asdict(info.config),
        "parameters": {name: spec.document() for name, spec in info.specs.items()},
    }


def _add_fixture(commands: Any) -> None:
    command = commands.add_parser(
        "make-release-fixture",
        help="write a small random checkpoint in the release's format",
        description="Writes a random checkpoint in the release's exact format, for trying the other commands.",
    )
    command.add_argument("target", metavar="DST", type=Path, help="the folder that will hold ckpt-0 and config.json")
    command.add_argument("--layers", type=int, default=12, help="(default: %(default)s)")
    command.add_argument("--scale-blocks", type=int, default=8, help="of output and down (default: %(default)s)")
    command.add_argument("--plain", action="store_true", help="float32 weights instead of int8")
    command.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    command.set_defaults(run=_run_fixture)


def _run_fixture(arguments: argparse.Namespace) -> None:
    target: Path = arguments.target
    if os.path.lexists(target):  # be it a link to nothing
        raise ValueError(f"{target} exists already: choose another path, or remove it first.")
    config = GrokConfig.tiny().replace(num_layers=arguments.layers)
    check_integer("--seed", arguments.seed, 0)
    try:
        write_release_checkpoint(
            target / "ckpt-0",
            config,
            seed=arguments.seed,
            scale_blocks=arguments.scale_blocks,
            quantized=not arguments.plain,
        )
        (target / "config.json").write_text(config.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise ValueError(
            f"{target} cannot be written ({error.strerror}): choose a path that you may write, on a disk with room."
        ) from error
    say(f"{target}: {arguments.layers} layers, and the configuration in {target / 'config.json'}")


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", type=Path, help="a checkpoint of any layout")
    command.add_argument(
        "--config", metavar="FILE", type=Path, help="JSON configuration (default: config.json beside the files)"
    )
