"""`grokjax score`: how probable each token of the texts of a file is, as JSON lines and as a coloured page."""

import argparse
import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grokjax import Tokenizer
from grokjax.cli.batch import run_file
from grokjax.cli.console import say
from grokjax.cli.model import Source, add_model, add_slots, open_source
from grokjax.cli.options import add_processes, join_processes
from grokjax.cli.programs import kept_programs
from grokjax.distributed import is_first, on_first
from grokjax.request import Request
from grokjax.research import HtmlPicture, colour_text
from grokjax.tokenizer import StreamDecoder

_HEAD = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<title>Surprise of each token</title>
<style>
body { background: white; color: black; font-family: sans-serif; line-height: 1.6; margin: 2em; }
</style>
</head>
<body>
<p>The redder a token, the less probable it was after those before it, up to 7 nats, one in a thousand. Pointing at it
tells more. Nothing comes before the first token of a text, which has no colour.</p>
"""


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of `grokjax`."""
    score = commands.add_parser(
        "score",
        help="tell how probable each token of texts is",
        description="Tells how probable each token of the texts of a file is, and appends a JSON object for each text "
        "to --output as it is done. Interrupted, the same command goes on where it stopped.",
    )
    score.add_argument(
        "prompts", metavar="FILE", type=Path, help="a text a line; with a name in .jsonl a JSON object a line"
    )
    score.add_argument("--output", metavar="FILE.jsonl", type=Path, required=True, help="where the scores go")
    score.add_argument("--html", metavar="FILE.html", type=Path, help="a page of the texts, coloured by surprise")
    add_slots(score)
    add_model(score)
    score.add_argument("--max-len", type=int, help="tokens of a text (default: the model's longest sequence)")
    score.add_argument("--add-bos", action="store_true", help="begin with the beginning-of-sequence token")
    score.add_argument(
        "--keep-pass",
        action="store_true",
        help="with --stream, keep in OUTPUT.pass what the last finished layer gave, for a command that goes on there",
    )
    add_processes(score)
    score.set_defaults(run=run, guesses=0)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns 1 if a text ended with an error, else 0."""
    source = join_processes(arguments, lambda: _open_source(arguments))
    on_first("the look for --html", lambda: _check_page(arguments))
    with kept_programs(is_wanted=not arguments.no_compilation_cache):
        status = run_file(source, arguments, Request([], max_new_tokens=0, prompt_logprobs=True))
    if is_first():
        records = [json.loads(line) for line in arguments.output.read_text().splitlines()]
        _say_means(records)
        if arguments.html is not None:
            arguments.html.write_text("".join(_page(records, source.tokenizer)), encoding="utf-8")
            say(f"{arguments.html} shows them")
    return status


def _open_source(arguments: argparse.Namespace) -> Source:
    if arguments.keep_pass and not arguments.stream:
        raise ValueError("--keep-pass goes with --stream: without it there are no passes that take long.")
    if arguments.keep_pass and (arguments.distributed or arguments.coordinator is not None):
        raise ValueError("--keep-pass is for one process: leave it away where several work together.")
    return open_source(arguments)


def _check_page(arguments: argparse.Namespace) -> None:
    if arguments.html is None:
        return
    if arguments.html.resolve() in (arguments.prompts.resolve(), arguments.output.resolve()):
        raise ValueError(f"--html {arguments.html} would take the place of the texts or scores: name another file.")
    if arguments.html.is_dir() or not arguments.html.parent.is_dir():
        raise ValueError(f"--html {arguments.html} cannot be written: name a file in a folder that is there.")


def _say_means(records: Sequence[Mapping[str, Any]]) -> None:
    lacking = sum("prompt_logprobs" not in record and "error" not in record for record in records)
    if lacking:
        say(f"{lacking} results have no scores: they were not asked for, or stem from grokjax generate")
    logprobs = [score["logprob"] for record in records for score in record.get("prompt_logprobs", ())[1:]]
    if logprobs:
        nats = -math.fsum(logprobs) / len(logprobs)
        say(f"{nats:.4f} nats per token over {len(logprobs)} tokens: a perplexity of {math.exp(nats):.4g}")


def _page(records: Iterable[Mapping[str, Any]], tokenizer: Tokenizer) -> Iterator[str]:
    """A page of HTML in parts, all texts in it escaped."""
    yield _HEAD
    for record in records:
        yield f"<h2>{html.escape(str(record['id']))}</h2>\n"
        if "error" in record:
            yield f"<p>{html.escape(record['error'])}</p>\n"
        yield f"{_coloured(record.get('prompt_logprobs', ()), tokenizer).source}\n"
    yield "</body>\n</html>\n"


def _coloured(scores: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> HtmlPicture:
    decoder = StreamDecoder(tokenizer)
    pieces = [
        decoder.push(score["token_id"]) if score["token_id"] < tokenizer.vocab_size else f"[{score['token_id']}]"
        for score in scores
    ]
    if pieces:
        pieces[-1] += decoder.flush()
    logprobs = np.array([math.nan if score["logprob"] is None else score["logprob"] for score in scores])
    return colour_text(pieces, logprobs, [_note(score, tokenizer) for score in scores])


def _note(score: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """What pointing at a token tells."""
    if score["logprob"] is None:
        return f"token {score['token_id']}, the first"
    best = score["top_id"]
    shown = tokenizer.decode([best]) if best < tokenizer.vocab_size else ""
    return (
        f"token {score['token_id']}: {-score['logprob']:.2f} nats, rank {score['rank']}; "
        f"of {score['entropy']:.2f} nats of entropy; most probable: {best} {shown!r}"
    )
