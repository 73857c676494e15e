"""`grokjax generate`: continues a prompt, text to standard output as it is made, or a file of prompts."""

import argparse
import contextlib
import dataclasses
import functools
import operator
import reprlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grokjax import ByteTokenizer, Grok, GrokConfig, TextGenerator, Tokenizer, init, load, load_tokenizer, stream
from grokjax.cache import MOST_ROWS
from grokjax.checkpoint import Checkpoint, CheckpointInfo, find_tokenizer, open_checkpoint, tokenizer_places
from grokjax.cli.batch import Prompt, Results, interrupted_by_sigterm, open_results, read_prompts, run_batch
from grokjax.cli.console import BatchProgress, byte_progress, say
from grokjax.cli.cores import use_every_core
from grokjax.cli.machine import say_machine
from grokjax.cli.options import (
    add_dtype,
    add_processes,
    checkpoint_config,
    choose_mesh,
    join_processes,
    named_config,
    read_bytes,
    read_extents,
)
from grokjax.cli.programs import kept_programs
from grokjax.cli.score_batches import score_batches
from grokjax.cli.streams import write
from grokjax.distributed import is_first, on_first
from grokjax.engine import Engine, Intake, follow
from grokjax.errors import first_line
from grokjax.memory import check_fits
from grokjax.model import SlotState, abstract_model
from grokjax.request import Request, check_integer
from grokjax.sharding import Partitioner, device_bytes

# Prompts of a file that run at once, and those that are prefilled together.
_SLOTS = 8
_PREFILL_ROWS = 4
# Options that take less memory.
_SMALLER_ROW = "a smaller --max-len"
_SMALLER_BATCH = f"fewer --slots or {_SMALLER_ROW}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is not yet in memory: what is checked before, and how it is made."""

    config: GrokConfig
    tokenizer: Tokenizer
    make: Callable[[], Grok]


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of `grokjax`."""
    generate = commands.add_parser(
        "generate",
        help="continue a prompt, or a file of prompts",
        description="Continues a prompt. The text goes to standard output, everything else to standard error. "
        "With --prompts, continues many at once and appends a JSON object for each to --output as it ends. "
        "Interrupted, the same command goes on where it stopped.",
    )
    _add_prompts(generate)
    add_model(generate)
    _add_settings(generate)
    add_processes(generate)
    generate.set_defaults(run=run)


def _add_prompts(generate: argparse.ArgumentParser) -> None:
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", help="the text to continue")
    what.add_argument(
        "--prompts", metavar="FILE", type=Path, help="a prompt a line; with a name in .jsonl a JSON object a line"
    )
    generate.add_argument("--output", metavar="FILE.jsonl", type=Path, help="where the results of --prompts go")
    add_slots(generate)


def add_slots(command: argparse.ArgumentParser) -> None:
    """Adds the option that says how many prompts of a file run at once."""
    command.add_argument("--slots", type=int, help=f"prompts of a file that run at once (default: {_SLOTS})")


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
    streaming.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="for weights on each device, such as 20GiB (default: the least)",
    )
    streaming.add_argument("--host-memory", metavar="SIZE", help="for further layers on the host (default: none)")


def _add_settings(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="probability mass kept (default: %(default)s, all)")
    generate.add_argument("--top-k", type=int, default=0, help="tokens kept (default: %(default)s, all)")
    generate.add_argument("--min-p", type=float, default=0.0, help="least probability, of the largest (default: 0)")
    generate.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    generate.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    generate.add_argument(
        "--max-len", type=int, help="tokens of prompt and text together (default: the model's longest sequence)"
    )
    generate.add_argument(
        "--guesses",
        type=int,
        default=0,
        help="tokens that a step may guess, for text that repeats itself or the prompt, such as 7 (default: 0)",
    )
    generate.add_argument("--add-bos", action="store_true", help="begin with the beginning-of-sequence token")
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token")
    generate.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given several times"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns 1 if a prompt of a file ended with an error, else 0."""
    source = join_processes(arguments, lambda: _check(arguments))
    with kept_programs(is_wanted=not arguments.no_compilation_cache):
        if arguments.prompts is not None:
            return run_file(source, arguments, _request(arguments))
        with _model_failures(_SMALLER_ROW):
            return _run_prompt(source, arguments)


def _check(arguments: argparse.Namespace) -> Source:
    """Refuses now what would be refused after the processes are joined and the model has loaded, which take minutes."""
    _check_batch(arguments)
    check_integer("max_new_tokens", arguments.max_new_tokens, 1)
    _request(arguments)
    return open_source(arguments)


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
def _model_failures(smaller: str, kept: str = "") -> Iterator[None]:
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


def _check_batch(arguments: argparse.Namespace) -> None:
    if arguments.prompts is not None and arguments.output is None:
        raise ValueError("--prompts needs --output: name the file that the results are appended to.")
    if arguments.prompts is None and arguments.output is not None:
        raise ValueError("--output goes with --prompts: the text of one prompt goes to standard output.")
    if arguments.prompts is None and arguments.slots is not None:
        raise ValueError("--slots goes with --prompts: one prompt runs alone.")


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


def _request(arguments: argparse.Namespace) -> Request:
    """How to continue a prompt, which is not in it yet."""
    return Request(
        [],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
        stop=arguments.stop,
    )


def run_file(source: Source, arguments: argparse.Namespace, request: Request) -> int:
    """Runs a file of prompts; of several processes, the first has prompts and results, and the others step with it.

    Args:
      source: the model.
      arguments: of the command.
      request: what is asked for of each prompt whose line does not say otherwise.

    Returns:
      1 if a prompt ended with an error, else 0.

    Raises:
      ValueError: The file cannot be read or the results written, or the model failed.
    """
    kept = " The results so far are kept, and the same command goes on after them."
    with (
        _model_failures(_SMALLER_BATCH, kept),
        interrupted_by_sigterm() as came,
        contextlib.ExitStack() as until_done,
    ):
        batch = on_first("the reading of the prompts", lambda: _open_batch(arguments, request, until_done))
        if batch is None:
            follow(source.make())
            return 0
        return _run_prompts(*batch, source, arguments, came.is_set, is_scored=not request.max_new_tokens)


def _open_batch(
    arguments: argparse.Namespace, request: Request, until_done: contextlib.ExitStack
) -> tuple[tuple[Prompt, ...], Results]:
    prompts = read_prompts(arguments.prompts, request)
    return prompts, until_done.enter_context(open_results(arguments.output, prompts))


def _run_prompts(
    prompts: tuple[Prompt, ...],
    results: Results,
    source: Source,
    arguments: argparse.Namespace,
    is_interrupted: Callable[[], bool],
    *,
    is_scored: bool,
) -> int:
    """Runs the prompts that have no result; where they are scored and not continued, their own tokens count."""
    doing, counted = ("scoring", "prompt_tokens") if is_scored else ("generating", "new_tokens")
    earlier = len(results.failed)
    if earlier:
        say(f"{earlier} of {len(prompts)} results are in {arguments.output}")
    # Other processes wait for an engine, be there anything to do or not.
    if earlier < len(prompts) or jax.process_count() > 1:
        model, slots = source.make(), arguments.slots or _SLOTS
        if arguments.stream and is_scored:
            max_len, add_bos = arguments.max_len or source.config.max_seq_len, arguments.add_bos
            intake = Intake(source.tokenizer, config=source.config, max_len=max_len, max_logprobs=0, add_bos=add_bos)
            with BatchProgress(len(prompts), doing) as progress:
                score_batches(model, intake, prompts, results, progress, is_interrupted, rows=slots)
            return _say_complete(prompts, results, arguments)
        engine = Engine(
            model,
            source.tokenizer,
            slots=slots,
            max_len=arguments.max_len,
            prefill_rows=slots if arguments.stream else _PREFILL_ROWS,
            max_guesses=arguments.guesses,
            cache_dtype=arguments.cache_dtype,
            allow_oom=arguments.allow_oom,
            add_bos=arguments.add_bos,
        )
        with engine, BatchProgress(len(prompts), doing) as progress:
            num_tokens = operator.attrgetter(counted)
            run_batch(engine, prompts, results, progress, is_interrupted, num_tokens=num_tokens)
    return _say_complete(prompts, results, arguments)


def _say_complete(prompts: tuple[Prompt, ...], results: Results, arguments: argparse.Namespace) -> int:
    num_errors = sum(results.failed.values())
    errors = f", {num_errors} of them errors" if num_errors else ""
    say(f"{arguments.output} is complete: {len(prompts)} results{errors}")
    return 1 if num_errors else 0


def _run_prompt(source: Source, arguments: argparse.Namespace) -> int:
    """Of several processes, the first has the text, and the others step the model with it."""
    max_len, add_bos = arguments.max_len or source.config.max_seq_len, arguments.add_bos
    intake = Intake(source.tokenizer, config=source.config, max_len=max_len, max_logprobs=0, add_bos=add_bos)
    # What is wrong with the prompt is refused now, not after the model has loaded.
    request = dataclasses.replace(_request(arguments), prompt=intake.encode(arguments.prompt).tolist())
    model = source.make()
    if not is_first():
        follow(model)
        return 0
    generator = TextGenerator(
        model,
        source.tokenizer,
        max_len=max_len,
        max_guesses=arguments.guesses,
        add_bos=add_bos,
        cache_dtype=arguments.cache_dtype,
        allow_oom=arguments.allow_oom,
    )
    with generator.engine() as engine:
        _stream(engine, request, guesses=arguments.guesses > 0)
    return 0


def _stream(engine: Engine, request: Request, *, guesses: bool) -> None:
    start = time.perf_counter()
    say("compiling the first steps")
    if guesses:  # whose steps would compile one after the other, between the tokens
        engine.warm_up(prompt_len=len(request.prompt))
    handle = engine.submit(request)
    times = []
    for piece in engine.stream(handle):
        write(piece.text)
        times.append(time.perf_counter())
    if handle.completion.error is not None:
        raise handle.completion.error
    write("\n")
    num_tokens = len(times) - 1  # the last piece is what the decoder held back
    # The rate is that of the tokens after the last one whose step may have compiled.
    last = 0 if guesses else 1
    rate = f", then {(num_tokens - 1 - last) / (times[-2] - times[last]):.1f} tokens/s" if num_tokens > 8 else ""
    say(f"{num_tokens} tokens; the first after {times[0] - start:.1f} s with compilation{rate}{_hits(engine)}")


def _hits(engine: Engine) -> str:
    """How many guesses were right, to end a sentence; nothing where none was tried."""
    measured = engine.metrics()
    if not measured.guessed_tokens:
        return ""
    return f"; {measured.accepted_tokens} of {measured.guessed_tokens} guesses were right"


def _random_source(arguments: argparse.Namespace) -> Source:
    config = _random_config(arguments)
    return Source(config, _tokenizer(config, arguments.tokenizer), functools.partial(_random_model, config, arguments))


def _checkpoint_source(arguments: argparse.Namespace) -> Source:
    checkpoint = open_checkpoint(arguments.checkpoint, checkpoint_config(arguments.config, arguments.checkpoint))
    tokenizer = _tokenizer(checkpoint.config, arguments.tokenizer or _tokenizer_beside(arguments.checkpoint))
    return Source(checkpoint.config, tokenizer, functools.partial(_load_model, checkpoint, arguments))


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
    slots, asked, smaller = 1, "", _SMALLER_ROW
    if arguments.prompts is not None:
        slots, smaller = arguments.slots or _SLOTS, _SMALLER_BATCH
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
