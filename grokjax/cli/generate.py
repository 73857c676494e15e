"""`grokjax generate`: continues a prompt, text to standard output as it is made, or a file of prompts."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from grokjax import TextGenerator
from grokjax.cli.batch import run_file
from grokjax.cli.console import say
from grokjax.cli.model import SMALLER_ROW, Source, add_model, add_slots, model_failures, open_source
from grokjax.cli.options import add_processes, join_processes
from grokjax.cli.programs import kept_programs
from grokjax.cli.streams import write
from grokjax.distributed import is_first
from grokjax.engine import Engine, Intake, follow
from grokjax.request import Request, check_integer


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
        with model_failures(SMALLER_ROW):
            return _run_prompt(source, arguments)


def _check(arguments: argparse.Namespace) -> Source:
    """Refuses now what would be refused after the processes are joined and the model has loaded, which take minutes."""
    _check_batch(arguments)
    check_integer("max_new_tokens", arguments.max_new_tokens, 1)
    _request(arguments)
    return open_source(arguments)


def _check_batch(arguments: argparse.Namespace) -> None:
    if arguments.prompts is not None and arguments.output is None:
        raise ValueError("--prompts needs --output: name the file that the results are appended to.")
    if arguments.prompts is None and arguments.output is not None:
        raise ValueError("--output goes with --prompts: the text of one prompt goes to standard output.")
    if arguments.prompts is None and arguments.slots is not None:
        raise ValueError("--slots goes with --prompts: one prompt runs alone.")


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
