"""A model and tasks as EleutherAI's evaluation harness takes them, whose package `lm_eval` they derive from."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from grokjax.engine import Engine
from grokjax.errors import first_line
from grokjax.model import Grok
from grokjax.request import Request
from grokjax.research.continuations import ContinuationScore, score_continuations
from grokjax.tokenizer import Tokenizer

# Settings of a task that draws its answers; `until` and `max_gen_toks` aside, fields of a request of the same name.
_SETTINGS = ("temperature", "top_p", "top_k", "min_p")


class HarnessModel(TemplateLM):
    """A model for the harness; the arguments are those of `evaluate_tasks`."""

    def __init__(
        self,
        model: Grok,
        tokenizer: Tokenizer,
        *,
        slots: int,
        max_len: int | None,
        add_bos: bool,
        cache_dtype: DTypeLike | None,
        allow_oom: bool,
    ):
        super().__init__()
        self._model, self._tokenizer, self._slots, self._add_bos = model, tokenizer, slots, add_bos
        self._max_len = model.config.max_seq_len if max_len is None else max_len
        self._cache_options = {"cache_dtype": cache_dtype, "allow_oom": allow_oom}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text; with the beginning-of-sequence token if `add_bos`, unless the harness wants none."""
        begins = self._add_bos and add_special_tokens is not False
        return [self._tokenizer.bos_id] * begins + self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, read in windows as long as the model reads at once."""
        windows = [(number, *pair) for number, request in enumerate(requests) for pair in self._windows(*request.args)]
        total = [0.0] * len(requests)
        scores = self._scores([pair for _, *pair in windows], disable_tqdm=disable_tqdm)
        for (number, *_), score in zip(windows, scores, strict=True):
            total[number] += score.logprob
        return total

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to where its task ends it."""
        asked = [self._request(number, *request.args) for number, request in enumerate(requests)]
        texts: dict[Request, str] = {}
        options: Any = self._cache_options | {"slots": self._slots, "max_len": self._max_len}
        with (
            Engine(self._model, self._tokenizer, **options) as engine,
            tqdm(total=len(asked), desc="Continuing texts", disable=disable_tqdm) as bar,
        ):
            for handle in engine.as_completed(asked):
                if handle.completion.error is not None:
                    raise handle.completion.error
                texts[handle.request] = handle.completion.text
                bar.update()
        return [texts[request] for request in asked]

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model."""
        config = json.loads(self._model.config.to_json())
        return {"model": "grokjax", "model_config": config, "dtype": jnp.dtype(self._model.dtype).name}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """What the harness asks for once it has tokenized contexts and continuations together."""
        scores = self._scores([pair for _, *pair in requests], disable_tqdm=disable_tqdm)
        return [(score.logprob, score.is_greedy) for score in scores]

    def _scores(self, pairs: Sequence[Sequence[list[int]]], *, disable_tqdm: bool) -> list[ContinuationScore]:
        with tqdm(total=len(pairs), desc="Scoring texts", disable=disable_tqdm) as bar:
            return score_continuations(
                self._model,
                [(context, continuation) for context, continuation in pairs],
                batch_size=self._slots,
                max_len=self._max_len,
                progress=bar.update,
            )

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids = self._tokenizer.encode(text)
        size = self._max_len - 1  # of the tokens that are predicted; one stands before them
        return list(map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, size, 1)))

    def _request(self, number: int, context: str, settings: dict[str, Any]) -> Request:
        """What a context is to be continued by; too long a one loses its beginning."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(settings))
        stop, count = given.pop("until"), given.pop("max_gen_toks")
        is_drawn = given.pop("do_sample", False)
        unknown = sorted(given.keys() - set(_SETTINGS))
        if unknown:
            raise ValueError(
                f"the task asks for generation with {', '.join(unknown)}: grokjax knows until, max_gen_toks, "
                f"do_sample, {', '.join(_SETTINGS)}."
            )
        if count >= self._max_len:
            raise ValueError(
                f"the task asks for {count} new tokens, and max_len={self._max_len} has no room for them behind a "
                "context: take a longer max_len, or give the task a smaller max_gen_toks."
            )
        prompt = self.tok_encode(context or "")[count - self._max_len :] or [self.prefix_token_id]
        drawn = {name: given[name] for name in _SETTINGS if name in given} if is_drawn else {"temperature": 0.0}
        stops = [text for text in stop if text]
        return Request(prompt, max_new_tokens=count, stop=stops, seed=number, **drawn)


class LoadedTasks(TaskManager):
    """Tasks with their data, which are there before a model is.

    Args:
      names: of tasks, groups, tags or patterns of them, or files of tasks.
      include_path: a folder with tasks of one's own.
      num_fewshot: examples before each question; None for as many as a task says. The tasks keep it.

    Attributes:
      names: those of the tasks, groups and tags that are meant, each once.
      num_fewshot: as it was given.

    Raises:
      ValueError: There is no such task, or its data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None, num_fewshot: int | None):
        super().__init__(include_path=include_path)
        self.names = list(dict.fromkeys(match for name in names for match in self._matches(name)))
        self.num_fewshot = num_fewshot
        try:
            self._loaded = super().load(self.names)
        except Exception as error:  # what a task's file or the source of its data may raise
            raise ValueError(
                f"the tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {first_line(error)}. Their "
                "data must be in the cache of `datasets` or in local files, or come over the network."
            ) from error

    def load(self, task_list: object) -> Any:
        """The tasks that are there already; the harness asks for them by their names."""
        del task_list
        return self._loaded

    def _matches(self, name: str) -> list[str]:
        found: list[str] = [name] if Path(name).is_file() else self.match_tasks([name])
        if not found:
            close = difflib.get_close_matches(name, self.all_tasks, n=1)
            meant = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them."
            raise ValueError(
                f"there is no task {name!r}: {meant} Tasks of your own are found in the folder of include_path."
            )
        return found
