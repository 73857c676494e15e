"""Scores texts many at a time, for a model whose layers stream: each batch is one pass through them."""

import contextlib
import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax
import numpy as np

from grokjax import Grok, Scores, score
from grokjax.cli.kept_pass import KeptPass
from grokjax.cli.prompts import Prompt
from grokjax.cli.results import Results
from grokjax.distributed import Channel
from grokjax.engine import Intake, check_same_model, token_scores
from grokjax.model import StreamedLayers, pad_texts
from grokjax.request import Completion, FinishReason, Timings, TokenScore
from grokjax.sharding import to_host

_SCORING = "the scoring of texts"


def score_batches(
    model: Grok,
    intake: Intake,
    prompts: Sequence[Prompt],
    results: Results,
    progress: Callable[[int, int], None],
    is_interrupted: Callable[[], bool] = lambda: False,
    *,
    rows: int,
    kept: KeptPass | None = None,
) -> None:
    """Scores the texts that have no result yet, those of like lengths together, and writes each batch as it is done.

    Args:
      model: the model; where it spans processes, the others call `follow_batches`.
      intake: makes tokens of texts.
      prompts: all of them.
      results: of an earlier run, and the place for the others.
      progress: told after each batch the number of results and of tokens.
      is_interrupted: asked before each batch.
      rows: texts of a batch.
      kept: where a pass is kept, and goes on; None for nowhere.

    Raises:
      ValueError: A result cannot be written, or what is kept.
      KeyboardInterrupt: It is interrupted.
    """
    done_tokens = 0
    progress(len(results.failed), done_tokens)
    texts: list[tuple[Prompt, np.ndarray]] = []
    for prompt in [prompt for prompt in prompts if prompt.id not in results.failed]:
        try:
            texts.append((prompt, _encode(prompt, intake)))
        except Exception as error:  # whatever a tokenizer raises is the result of this text, and of no other
            results.write(prompt, [_completion(prompt, (), "error", 0.0, error=error)])
    texts.sort(key=lambda text: len(text[1]))
    with _scoring(model) as score_batch:
        for start in range(0, len(texts), rows):
            if is_interrupted():
                raise KeyboardInterrupt
            batch = texts[start : start + rows]
            began = time.monotonic()
            num_top = max(prompt.request.logprobs or 0 for prompt, _ in batch)
            padded = pad_texts(model.config, [tokens for _, tokens in batch], min(rows, len(texts)))
            layers = cast(StreamedLayers, model.layers)
            with contextlib.nullcontext() if kept is None else layers.kept_by(kept.of(*padded)):
                found = score_batch(*padded, num_top)
            seconds = time.monotonic() - began
            for row, (prompt, tokens) in enumerate(batch):
                results.write(prompt, [_scored(prompt, tokens, found, row, seconds)])
                done_tokens += len(tokens)
            if kept is not None:
                kept.drop()
            progress(len(results.failed), done_tokens)


def follow_batches(model: Grok) -> None:
    """Takes part in what `score_batches` does in process 0, until that is done: what every other process calls.

    Args:
      model: this process's part of the same model.

    Raises:
      DistributedError: Process 0 has gone.
      ValueError: The model is another than that of process 0.
    """
    check_same_model(_SCORING, model)
    channel = Channel.open()
    name, values = channel.receive()
    while name == "score":
        tokens, lengths, num_top = values
        _score(model, tokens, lengths, num_top.item())
        name, values = channel.receive()


@contextlib.contextmanager
def _scoring(model: Grok) -> Iterator[Callable[[np.ndarray, np.ndarray, int], Scores[np.ndarray]]]:
    """Gives `_score` of a model, in which other processes take part where it spans them."""
    if not model.partitioner.mesh.is_multi_process:
        yield functools.partial(_score, model)
        return
    check_same_model(_SCORING, model)
    channel = Channel.open()

    def score_together(tokens: np.ndarray, lengths: np.ndarray, num_top: int) -> Scores[np.ndarray]:
        channel.send("score", tokens, lengths, num_top)
        return _score(model, tokens, lengths, num_top)

    try:
        yield score_together
    finally:
        channel.send("done")


def _score(model: Grok, tokens: np.ndarray, lengths: np.ndarray, num_top: int) -> Scores[np.ndarray]:
    """The scores of texts, here."""
    found: Scores[np.ndarray] = to_host(score(model, tokens, lengths, num_top=num_top))
    return found


def _scored(prompt: Prompt, tokens: np.ndarray, found: Scores[np.ndarray], row: int, seconds: float) -> Completion:
    """The result of a text, whose scores are those of a row."""
    ids, num_top = tuple(tokens.tolist()), prompt.request.logprobs or 0
    own = jax.tree.map(operator.itemgetter((row, slice(1, None))), found)  # nothing is said of the first token
    try:
        return _completion(prompt, ids, "length", seconds, scores=(None, *token_scores(ids[1:], own, num_top)))
    except ValueError as error:
        return _completion(prompt, ids, "error", seconds, error=error)


def _encode(prompt: Prompt, intake: Intake) -> np.ndarray:
    """The tokens of a text, int32 [n].

    Raises:
      ValueError: They are none, too many or no tokens, the text is to be continued, or it asks for too many of the most
        probable tokens.
      Exception: Whatever the tokenizer raises.
    """
    if prompt.request.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={prompt.request.max_new_tokens}: with --stream texts are scored and not continued; leave "
            "it away, or give the file to grokjax generate."
        )
    intake.check_logprobs(prompt.request)
    return intake.encode(prompt.request.prompt, is_continued=False)


def _completion(
    prompt: Prompt,
    ids: tuple[int, ...],
    finish_reason: FinishReason,
    seconds: float,
    *,
    scores: tuple[TokenScore | None, ...] | None = None,
    error: Exception | None = None,
) -> Completion:
    """What an engine would say of a text of which nothing is drawn."""
    return Completion(
        text="",
        token_ids=(),
        prompt_ids=ids,
        finish_reason=finish_reason,
        logprobs=None if prompt.request.logprobs is None else (),
        prompt_logprobs=scores,
        timings=Timings(queue=None, prefill=None, first_token=None, decode=None, total=seconds),
        sample=0,
        error=error,
    )
