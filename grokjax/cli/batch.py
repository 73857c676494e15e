"""A job of `grokjax generate` or `score`: the prompts of a file, run and written down one by one, and resumed."""

import argparse
import collections
import contextlib
import operator
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from grokjax import Grok, __version__
from grokjax.checkpoint import fingerprint
from grokjax.cli.console import BatchProgress, say
from grokjax.cli.kept_pass import KeptPass
from grokjax.cli.model import SLOTS, SMALLER_BATCH, Source, model_failures
from grokjax.cli.prompts import Prompt, read_prompts
from grokjax.cli.results import Results, open_results
from grokjax.cli.score_batches import follow_batches, score_batches
from grokjax.distributed import on_first
from grokjax.engine import Engine, Handle, Intake, Metrics, follow
from grokjax.request import Request

# Seconds between two calls of a job's `progress`: what it shows takes longer to gather than a step may wait.
_PROGRESS_PERIOD = 0.1

# Prompts that are prefilled together, and most probable tokens that may be asked for.
_PREFILL_ROWS, _MAX_LOGPROBS = 4, 8


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
        model_failures(SMALLER_BATCH, kept),
        interrupted_by_sigterm() as came,
        contextlib.ExitStack() as until_done,
    ):
        batch = on_first("the reading of the prompts", lambda: _open_batch(arguments, request, until_done))
        is_scored = not request.max_new_tokens
        if batch is None:
            take_part = follow_batches if arguments.stream and is_scored else follow
            take_part(source.make())
            return 0
        return _run_prompts(*batch, source, arguments, came.is_set, is_scored=is_scored)


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
        model, slots = source.make(), arguments.slots or SLOTS
        if arguments.stream and is_scored:
            intake = Intake(
                source.tokenizer,
                config=source.config,
                max_len=arguments.max_len or source.config.max_seq_len,
                max_logprobs=_MAX_LOGPROBS,
                add_bos=arguments.add_bos,
            )
            kept = _kept_pass(model, source, arguments) if arguments.keep_pass else None
            with BatchProgress(len(prompts), doing) as progress:
                score_batches(model, intake, prompts, results, progress, is_interrupted, rows=slots, kept=kept)
            return _say_complete(prompts, results, arguments)
        engine = Engine(
            model,
            source.tokenizer,
            slots=slots,
            max_len=arguments.max_len,
            prefill_rows=slots if arguments.stream else _PREFILL_ROWS,
            max_logprobs=_MAX_LOGPROBS,
            max_guesses=arguments.guesses,
            cache_dtype=arguments.cache_dtype,
            allow_oom=arguments.allow_oom,
            add_bos=arguments.add_bos,
        )
        with engine, BatchProgress(len(prompts), doing) as progress:
            num_tokens = operator.attrgetter(counted)
            run_batch(engine, prompts, results, progress, is_interrupted, num_tokens=num_tokens)
    return _say_complete(prompts, results, arguments)


def _kept_pass(model: Grok, source: Source, arguments: argparse.Namespace) -> KeptPass:
    """Where the passes of a job are kept, told from those of other weights and of other ways to compute."""
    assert source.checkpoint is not None
    table = "int8" if arguments.quantized_table else "plain"
    weights = fingerprint(source.checkpoint), source.config.to_json(), table
    return KeptPass.beside(arguments.output, *weights, model.dtype.name, dict(model.mesh.shape), __version__)


def _say_complete(prompts: tuple[Prompt, ...], results: Results, arguments: argparse.Namespace) -> int:
    num_errors = sum(results.failed.values())
    errors = f", {num_errors} of them errors" if num_errors else ""
    say(f"{arguments.output} is complete: {len(prompts)} results{errors}")
    return 1 if num_errors else 0


def run_batch(
    engine: Engine,
    prompts: Sequence[Prompt],
    results: Results,
    progress: Callable[[int, int], None],
    is_interrupted: Callable[[], bool] = lambda: False,
    *,
    num_tokens: Callable[[Metrics], int] = lambda measured: measured.new_tokens,
) -> None:
    """Runs the prompts that have no result yet, and writes each result as soon as it is there.

    Args:
      engine: idle.
      prompts: all of them.
      results: of an earlier run, and the place for the others.
      progress: told now and then the number of results and of the engine's tokens.
      is_interrupted: asked before each step.
      num_tokens: which tokens count; those drawn by default.

    Raises:
      ValueError: A result cannot be written.
      KeyboardInterrupt: It is interrupted.
    """
    progress(len(results.failed), 0)
    waiting = collections.deque(prompt for prompt in prompts if prompt.id not in results.failed)
    running: dict[Handle, Prompt] = {}
    told = time.monotonic()
    while waiting or running:
        if is_interrupted():
            raise KeyboardInterrupt
        while waiting and engine.has_room:
            prompt = waiting.popleft()
            running[engine.submit(prompt.request)] = prompt
        for handle in engine.step():
            results.write(running.pop(handle), handle.samples)
        if time.monotonic() - told >= _PROGRESS_PERIOD or not (waiting or running):
            progress(len(results.failed), num_tokens(engine.metrics()))
            told = time.monotonic()


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[threading.Event]:
    """Within it, SIGTERM interrupts this process as Ctrl-C does.

    Gives an event that is set then, too: what is raised while Python collects garbage, as it does when JAX compiles, is
    lost.
    """
    came = threading.Event()

    def interrupt(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield came
        return
    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, handler)
