"""Tasks of EleutherAI's evaluation harness, on any model; it is the extra `eval`, imported where it is used."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.typing import DTypeLike

from grokjax.model import Grok
from grokjax.request import check_integer
from grokjax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from grokjax.research.harness_model import LoadedTasks


def load_tasks(
    names: Sequence[str], *, include_path: str | os.PathLike[str] | None = None, num_fewshot: int | None = None
) -> "LoadedTasks":
    """Loads tasks and their data, so that what is wrong with them is known before a model is there.

    Args:
      names: of tasks, such as `hellaswag`, or of groups of them, such as `mmlu`; patterns; or paths of YAML files.
      include_path: a folder in whose YAML files, too, tasks are looked for.
      num_fewshot: examples before each question, 0 or more; by default, and where a task wants none, as the task says.

    Raises:
      ValueError: There is no such task, its data cannot be loaded, num_fewshot is out of its range, or the harness is
        not installed.
    """
    _check_harness()
    from grokjax.research.harness_model import LoadedTasks

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={os.fspath(include_path)} is no folder: name one with YAML files of tasks.")
    num_fewshot = None if num_fewshot is None else check_integer("num_fewshot", num_fewshot, 0)
    return LoadedTasks(names, None if include_path is None else Path(include_path), num_fewshot)


def evaluate_tasks(
    model: Grok,
    tokenizer: Tokenizer,
    tasks: "LoadedTasks",
    *,
    limit: int | None = None,
    slots: int = 8,
    max_len: int | None = None,
    add_bos: bool = False,
    cache_dtype: DTypeLike | None = None,
    allow_oom: bool = False,
) -> dict[str, Any]:
    """How well a model does tasks, as the harness measures it; in one process.

    Args:
      model: the model, edited or not.
      tokenizer: its tokenizer.
      tasks: what `load_tasks` gives; they serve for any number of models.
      limit: questions of each task, the first ones; by default all.
      slots: texts that are scored or continued at once.
      max_len: tokens of a text with its continuation; by default the model's longest sequence. Of a longer one the
        beginning is left out.
      add_bos: put the beginning-of-sequence token before each text.
      cache_dtype: of the cache of an engine, which is made if a task has texts continued; as in `Grok.new_cache`.
      allow_oom: make this engine even where the devices have too little memory left.

    Returns:
      The results of the harness, whose `results` has the figures of each task.

    Raises:
      ValueError: A number is out of its range, a text does not fit, or the harness is not installed.
    """
    _check_harness()
    from lm_eval.evaluator import simple_evaluate

    from grokjax.research.harness_model import HarnessModel

    found: dict[str, Any] = simple_evaluate(
        model=HarnessModel(
            model,
            tokenizer,
            slots=slots,
            max_len=max_len,
            add_bos=add_bos,
            cache_dtype=cache_dtype,
            allow_oom=allow_oom,
        ),
        tasks=tasks.names,
        task_manager=tasks,
        num_fewshot=tasks.num_fewshot,
        limit=None if limit is None else check_integer("limit", limit, 1),
        log_samples=False,
    )
    return found


def _check_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError(
            "tasks are evaluated by the package lm_eval, the extra `eval`: run pip install '.[eval]' in the checkout."
        ) from None
