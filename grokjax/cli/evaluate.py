"""`grokjax eval`: tasks of EleutherAI's evaluation harness, and a table of how well a model does them."""

import argparse
import json
from pathlib import Path
from typing import Any

from grokjax.cli.console import say
from grokjax.cli.model import SLOTS, SMALLER_BATCH, add_model, model_failures, open_source
from grokjax.cli.programs import kept_programs
from grokjax.cli.streams import write
from grokjax.request import check_integer
from grokjax.research import evaluate_tasks, load_tasks


def add_command(commands: Any) -> None:
    """Adds the command to the subparsers of `grokjax`."""
    evaluate = commands.add_parser(
        "eval",
        help="measure how well a model does tasks",
        description="Measures how well a model does tasks of EleutherAI's evaluation harness, the extra `eval`. A "
        "table goes to standard output, everything else to standard error.",
    )
    evaluate.add_argument(
        "--tasks", metavar="NAME,NAME...", required=True, help="tasks, groups of them, patterns, or YAML files of tasks"
    )
    evaluate.add_argument("--include-path", metavar="DIR", type=Path, help="a folder with more tasks, as YAML files")
    evaluate.add_argument("--output", metavar="FILE.json", type=Path, help="a new file for all that the harness tells")
    evaluate.add_argument("--limit", type=int, help="questions of each task, the first ones (default: all)")
    evaluate.add_argument("--num-fewshot", type=int, help="examples before each question (default: as the task says)")
    evaluate.add_argument("--slots", type=int, help=f"texts that are scored or continued at once (default: {SLOTS})")
    add_model(evaluate)
    evaluate.add_argument(
        "--max-len", type=int, help="tokens of a text with its continuation (default: the model's longest sequence)"
    )
    evaluate.add_argument("--add-bos", action="store_true", help="begin with the beginning-of-sequence token")
    evaluate.set_defaults(run=run, guesses=0, prompts=None, distributed=False, coordinator=None)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; what is wrong with the tasks is known before the model has loaded."""
    _check(arguments)
    source = open_source(arguments)
    names, num_fewshot = arguments.tasks.split(","), arguments.num_fewshot
    tasks = load_tasks(names, include_path=arguments.include_path, num_fewshot=num_fewshot)
    with kept_programs(is_wanted=not arguments.no_compilation_cache), model_failures(SMALLER_BATCH):
        results = evaluate_tasks(
            source.make(),
            source.tokenizer,
            tasks,
            limit=arguments.limit,
            slots=arguments.slots or SLOTS,
            max_len=arguments.max_len,
            add_bos=arguments.add_bos,
            cache_dtype=arguments.cache_dtype,
            allow_oom=arguments.allow_oom,
        )
    _report(results, arguments.output)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.limit is not None:
        check_integer("--limit", arguments.limit, 1)
    if arguments.num_fewshot is not None:
        check_integer("--num-fewshot", arguments.num_fewshot, 0)
    output: Path | None = arguments.output
    if output is not None and (output.exists() or not output.parent.is_dir()):
        raise ValueError(f"--output {output} is there already, or its folder is not: name a new file in a folder.")


def _report(results: dict[str, Any], output: Path | None) -> None:
    """Writes the table first: it is there whatever becomes of the file."""
    from lm_eval.utils import handle_non_serializable, make_table

    write(f"{make_table(results)}\n")
    if results.get("groups"):
        write(f"{make_table(results, 'groups')}\n")
    if output is not None:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        output.write_text(f"{text}\n", encoding="utf-8")
        say(f"{output} has all results")
