"""The model that a command runs: the options that say which and where, what is refused before it loads, its making."""

import argparse
import contextlib
import dataclasses
import functools
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from grokjax import ByteTokenizer, Grok, GrokConfig, Tokenizer, init, load, load_tokenizer, stream
from grokjax.cache import MOST_ROWS
from grokjax.checkpoint import Checkpoint, CheckpointInfo, find_tokenizer, open_checkpoint, tokenizer_places
from grokjax.cli.console import byte_progress, say
from grokjax.cli.cores import use_every_core
from grokjax.cli.machine import say_machine
from grokjax.cli.options import (
    add_budgets,
    add_dtype,
    checkpoint_config,
    choose_mesh,
    named_config,
    read_bytes,
    read_extents,
)
from grokjax.errors import first_line
from grokjax.memory import check_fits
from grokjax.model import SlotState, abstract_model
from grokjax.request import check_integer
from grokjax.sharding import Partitioner, device_bytes

# Prompts of a file that run at once.
SLOTS = 8
# Options that take less memory.
SMALLER_ROW = "a smaller --max-len"
SMALLER_BATCH = f"fewer --slots or {SMALLER_ROW}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is not yet in memory: what is checked before, and how it is made.

    `checkpoint` is what it is loaded from, None for random weights.
    """

    config: GrokConfig
    tokenizer: Tokenizer
    make: Callable[[], Grok]
    checkpoint: Checkpoint | None = None


def add_model(generate: argparse.ArgumentParser) -> None:
    """Adds the options that say which model runs, and where."""
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="DIR", type=Path, help="a checkpoint of any layout")
    source.add_argument(
        "--random", metavar="NAME_OR_FILE", help="random weights: tiny, bench_1b, grok_1 or a configuration file"
    )
    generate.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="our JSON or the release's names (default: config.json beside the files)",
    )
    generate.add_argument(
        "--tokenizer",
        metavar="FILE",
        type=Path,
        help="tokenizer.model (default: the one beside the checkpoint); or bytes, for checkpoints without a tokenizer",
    )
    generate.add_argument("--mesh", metavar="DATA,MODEL", help="devices (default: 1,N with all N devices that divide)")
    generate.add_argument(
        "--cache-dtype",
        choices=("bfloat16", "float32", "int8"),
        help="of keys and values (default: bfloat16, on CPUs and with --dtype float32 float32)",
    )
    generate.add_argument("--plain", action="store_true", help="int8 weights as plain ones: 2 or 4 times the memory")
    generate.add_argument("--quantized-table", action="store_true", help="the embedding table in int8, with an error")
    add_dtype(generate)
    _add_streaming(generate)
    generate.add_argument(
        "--allow-oom", action="store_true", help="try it even where there seems to be too little memory"
    )
    generate.add_argument(
        "--cpu-devices",
        metavar="N",
        type=int,
        help="that a CPU is (default: one a core where that is faster; one with --stream)",
    )
    generate.add_argument(
        "--no-compilation-cache", action="store_true", help="do not keep compiled programs for the next start"
    )


def _add_streaming(generate: argparse.ArgumentParser) -> None:
    streaming = generate.add_argument_group("weights that do not fit into memory")
    streaming.add_argument(
        "--stream",
        action="store_true",
        help="leave the layers in the files of --checkpoint, and read them each time",
    )
    add_budgets(streaming)


def add_slots(command: argparse.ArgumentParser) -> None:
    """Adds the option that says how many prompts of a file run at once."""
    command.add_argument("--slots", type=int, help=f"prompts of a file that run at once (default: {SLOTS})")


def open_source(arguments: argparse.Namespace) -> Source:
    """The model that the options of a command ask for, which is not loaded yet.

    Raises:
      ValueError: There is none, or another option does not fit it.
    """
    if arguments.slots is not None:
        check_integer("--slots", arguments.slots, 1, MOST_ROWS)
    _check_streaming(arguments)
    _choose_devices(arguments)
    source = _random_source(arguments) if arguments.random else _checkpoint_source(arguments)
    _check_settings(source.config, arguments)
    return source


@contextlib.contextmanager
def model_failures(smaller: str, kept: str = "") -> Iterator[None]:
    """Turns an error of the devices, such as the death of another process, or too little memory into a sentence.

    Args:
      smaller: options that take less memory.
      kept: what is not lost.

    Raises:
      ValueError: There was one.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        others = " Another process may have died: see its messages." if jax.process_count() > 1 else ""
        # What JAX refuses, such as a transfer that the user has forbidden, more memory would not help.
        is_refused = str(error).startswith("INVALID_ARGUMENT")
        memory = "" if is_refused else f" If memory was short, give it {smaller}."
        raise ValueError(f"the model failed: {first_line(error)}.{others}{kept}{memory}") from error


def _check_streaming(arguments: argparse.Namespace) -> None:
    for option, text in (("--device-memory", arguments.device_memory), ("--host-memory", arguments.host_memory)):
        if read_bytes(option, text) is not None and not arguments.stream:
            raise ValueError(f"{option} goes with --stream: without it all weights are loaded.")
    if arguments.stream and arguments.random is not None:
        raise ValueError("--stream goes with --checkpoint: random weights are in no file.")
    if arguments.stream and arguments.plain:
        raise ValueError("--plain goes without --stream: weights that stream stay as they are in the files.")


def _choose_devices(arguments: argparse.Namespace) -> None:
    """Processes that work together have the devices that each is told to have, and weights stream to one device.

    Of several, each would read columns of a matrix, whose bytes do not lie side by side.
    """
    is_alone = not arguments.distributed and arguments.coordinator is None
    if arguments.cpu_devices is not None:
        check_integer("--cpu-devices", arguments.cpu_devices, 1)
    if arguments.cpu_devices is not None or (is_alone and not arguments.stream):
        use_every_core(arguments.cpu_devices)


def _check_settings(config: GrokConfig, arguments: argparse.Namespace) -> None:
    if arguments.max_len is not None and not 2 <= arguments.max_len <= config.max_seq_len:
        shown = reprlib.repr(arguments.max_len)
        raise ValueError(f"--max-len {shown} must be between 2 and max_seq_len={config.max_seq_len}.")
    check_integer("--guesses", arguments.guesses, 0, (arguments.max_len or config.max_seq_len) - 1)
    if arguments.mesh is not None:
        read_extents(arguments.mesh)


def _random_source(arguments: argparse.Namespace) -> Source:
    config = _random_config(arguments)
    return Source(config, _tokenizer(config, arguments.tokenizer), functools.partial(_random_model, config, arguments))


def _checkpoint_source(arguments: argparse.Namespace) -> Source:
    checkpoint = open_checkpoint(arguments.checkpoint, checkpoint_config(arguments.config, arguments.checkpoint))
    tokenizer = _tokenizer(checkpoint.config, arguments.tokenizer or _tokenizer_beside(arguments.checkpoint))
    return Source(checkpoint.config, tokenizer, functools.partial(_load_model, checkpoint, arguments), checkpoint)


def _random_config(arguments: argparse.Namespace) -> GrokConfig:
    if arguments.config is not None:
        raise ValueError("--config goes with --checkpoint: give a configuration file to --random itself.")
    return named_config("--random", arguments.random)


def _random_model(config: GrokConfig, arguments: argparse.Namespace) -> Grok:
    say(f"the weights are random ({arguments.random}): expect noise")
    abstract = _abstract_model(config, arguments, quantized=not arguments.plain)
    _check_machine(abstract, device_bytes(jax.tree.leaves(abstract)), arguments, is_int8=not arguments.plain)
    return init(
        config,
        mesh=abstract.partitioner.mesh,
        dtype=abstract.dtype,
        quantized=not arguments.plain,
        quantized_table=arguments.quantized_table,
        allow_oom=arguments.allow_oom,
    )


def _load_model(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Grok:
    abstract = _abstract_model(checkpoint.config, arguments, quantized=False)
    mesh, info = abstract.partitioner.mesh, CheckpointInfo.of(checkpoint)
    extents = mesh.shape["data"], mesh.shape["model"]
    weights_bytes = info.bytes_per_device(extents, dtype=abstract.dtype, quantized=not arguments.plain)
    is_int8 = not arguments.plain and any(spec.scales is not None for spec in info.specs.values())
    if arguments.stream:
        say_machine(mesh, weights="streamed int8" if is_int8 else "streamed", dtype=arguments.dtype)
        return stream(
            checkpoint,
            mesh=mesh,
            dtype=abstract.dtype,
            quantized_table=arguments.quantized_table,
            device_bytes=read_bytes("--device-memory", arguments.device_memory),
            host_bytes=read_bytes("--host-memory", arguments.host_memory) or 0,
            allow_oom=arguments.allow_oom,
        )
    _check_machine(abstract, weights_bytes, arguments, is_int8=is_int8)
    with byte_progress("loaded") as progress:
        return load(
            checkpoint,
            mesh=mesh,
            dtype=abstract.dtype,
            quantized=not arguments.plain,
            quantized_table=arguments.quantized_table,
            progress=progress,
            allow_oom=arguments.allow_oom,
        )


def _tokenizer_beside(checkpoint: Path) -> Path:
    found = find_tokenizer(checkpoint)
    if found is None:
        places = " and no ".join(map(str, tokenizer_places(checkpoint)))
        raise ValueError(f"there is no {places}: name the release's tokenizer.model with --tokenizer.")
    return found


def _abstract_model(config: GrokConfig, arguments: argparse.Namespace, *, quantized: bool) -> Grok:
    """The model that the options ask for, of shapes alone, on its mesh."""
    partitioner = Partitioner.create(config, choose_mesh(arguments.mesh, config))
    return abstract_model(config, partitioner, dtype=jnp.dtype(arguments.dtype), quantized=quantized)


def _check_machine(abstract: Grok, weights_bytes: int, arguments: argparse.Namespace, *, is_int8: bool) -> None:
    """Says what a model will run on, and refuses what would not fit there, before minutes of loading.

    Args:
      abstract: the model, whose weights may be of another kind than those that it gets.
      weights_bytes: of these on each device.
      arguments: of the command.
      is_int8: whether these are in int8.

    Raises:
      ValueError: The devices have too little memory left for the weights and the rows of an engine.
    """
    mesh = abstract.partitioner.mesh
    say_machine(mesh, weights="int8" if is_int8 else "plain", dtype=arguments.dtype)
    if arguments.allow_oom:
        return
    slots, asked, smaller = 1, "", SMALLER_ROW
    if arguments.prompts is not None:
        slots, smaller = arguments.slots or SLOTS, SMALLER_BATCH
        asked = f"--slots {slots} and "
    cache = abstract.abstract_cache(slots, arguments.max_len, dtype=arguments.cache_dtype)
    state = SlotState.abstract(abstract, cache, guesses=arguments.guesses > 0)
    check_fits(
        f"the model with {asked}--max-len {cache.max_len}",
        weights_bytes + device_bytes(jax.tree.leaves(state)),
        mesh,
        remedy=f"take more devices or larger ones (`grokjax plan` tells which do), {smaller}",
    )


def _tokenizer(config: GrokConfig, path: Path | None) -> Tokenizer:
    return ByteTokenizer(config.vocab_size) if path in (None, Path("bytes")) else load_tokenizer(path)
