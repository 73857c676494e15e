"""The release's surface, thin over the engine: its `run.py` needs other imports and nothing else."""

import collections
import dataclasses
import os
from collections.abc import Callable, Generator, Sequence
from typing import Self

from jax.sharding import Mesh
from jax.typing import ArrayLike

from grokjax import request as engine_request
from grokjax.checkpoint import load
from grokjax.engine import Engine, Handle
from grokjax.model import Grok, ModelSteps, init
from grokjax.quantization import QuantizedArray
from grokjax.request import Completion
from grokjax.runners.parts import TOP_K, LanguageModelConfig, get_pad_bucket
from grokjax.sharding import make_mesh
from grokjax.tokenizer import Tokenizer, load_tokenizer

# The release's name of it, which its `run.py` imports.
QuantizedWeight8bit = QuantizedArray


@dataclasses.dataclass
class Request:
    """One job.

    Attributes:
      prompt: text.
      temperature: 0 is greedy.
      nucleus_p: probability mass kept.
      rng_seed: of the draws; its low 32 bits count, as in the release.
      max_len: tokens to generate at most; the prompt does not count.
      mask: bool [V], tokens that may be drawn; all by default.
      stop: strings that end the text.
      ignore_eos: go on past the end-of-sequence token, as the release does.
      logprobs: report log-probabilities in the output's `completion`, with so many most probable tokens.

    Raises:
      ValueError: A number is out of its range.
    """

    prompt: str
    temperature: float
    nucleus_p: float
    rng_seed: int
    max_len: int
    _: dataclasses.KW_ONLY
    mask: ArrayLike | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self.to_engine()

    def to_engine(self) -> engine_request.Request:
        """The same for an `Engine`."""
        return engine_request.Request(
            self.prompt,
            max_new_tokens=self.max_len,
            temperature=self.temperature,
            top_p=self.nucleus_p,
            seed=self.rng_seed % 2**32,
            allowed_tokens=self.mask,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


class OutputText(str):
    """The text of a finished request; its `completion` tells the rest: tokens, finish reason, log-probabilities."""

    completion: Completion

    def __new__(cls, completion: Completion) -> Self:
        """The completion's text, with the completion."""
        text = super().__new__(cls, completion.text)
        text.completion = completion
        return text


@dataclasses.dataclass
class ModelRunner:
    """A model on a mesh, from a checkpoint or fresh.

    Attributes:
      model: its configuration.
      bs_per_device: batch rows for each device of the mesh; the product is cut to an integer.
      load_rename_rules: (pattern, replacement) for the path of a parameter, such as `layers.3.attention.query`: the
        first pattern found in it decides under which path it is looked up in the checkpoint.
      load_exclude_rules: patterns; a parameter whose path has one of them keeps its fresh value.
      rng_seed: of fresh weights.
      checkpoint_path: directory of the checkpoint, or its parent.
    """

    model: LanguageModelConfig
    bs_per_device: float = 2.0
    load_rename_rules: list[tuple[str, str]] | None = None
    load_exclude_rules: list[str] | None = None
    rng_seed: int = 42
    transform_forward: bool = False
    checkpoint_path: str = ""

    def initialize(
        self, local_mesh_config: tuple[int, int] = (1, 1), between_hosts_config: tuple[int, int] = (1, 1)
    ) -> None:
        """Builds `mesh`, `config` and `batch_size`.

        Raises:
          ValueError: There are not as many devices as the mesh needs, or no row is left for the batch.
        """
        self.config = self.model.to_config()
        self.mesh: Mesh = make_mesh(local_mesh_config, between_hosts_config)
        self.batch_size = int(self.bs_per_device * self.mesh.size)
        if self.batch_size < 1:
            raise ValueError(
                f"bs_per_device={self.bs_per_device} on {self.mesh.size} devices is a batch of no rows: set it to at "
                f"least {1 / self.mesh.size:g}."
            )

    def init(self) -> Grok:
        """A model with fresh weights."""
        return init(self.config, seed=self.rng_seed, mesh=self.mesh, dtype=self.model.fprop_dtype)

    def load_or_init(self, *, from_checkpoint: bool = True, init_fn: Callable[[], Grok] | None = None) -> Grok:
        """The model: from `init_fn` if given, else from the checkpoint, else fresh.

        Raises:
          CheckpointError: The checkpoint does not fit the configuration, or a renamed parameter is not in it.
        """
        if init_fn is not None:
            return init_fn()
        if not (from_checkpoint and self.checkpoint_path):
            return self.init()
        return load(
            self.checkpoint_path,
            self.config,
            self.mesh,
            self.model.fprop_dtype,
            rename=self.load_rename_rules or (),
            exclude=self.load_exclude_rules or (),
            seed=self.rng_seed,
        )


@dataclasses.dataclass
class InferenceRunner:
    """Keeps a batch of requests busy: `initialize()`, then the generator `run()`.

    Over several hosts, each runs the same script, with the same requests in the same order.

    Attributes:
      name: of the runner.
      runner: the model's.
      load: the checkpoint, if `runner` names none.
      tokenizer_path: the release's `tokenizer.model`.
      local_mesh_config: (data, model) devices of this host.
      between_hosts_config: (data, model) hosts.
      pad_sizes: padded lengths of prompts; a longer prompt is taken in chunks.
    """

    name: str
    runner: ModelRunner
    load: str
    tokenizer_path: str | os.PathLike[str] = "/tmp/xai_data/tokenizer.model"
    local_mesh_config: tuple[int, int] = (1, 1)
    between_hosts_config: tuple[int, int] = (1, 1)
    pad_sizes: tuple[int, ...] = (1024,)

    def get_pad_bucket(self, size: int) -> int:
        """The smallest of `pad_sizes` that holds `size` tokens, else the largest."""
        return get_pad_bucket(size, self.pad_sizes)

    def initialize(self) -> None:
        """Reads the tokenizer, loads the model and makes the `engine`.

        Raises:
          ValueError: The mesh, the batch size, a pad size or the tokenizer does not fit.
        """
        runner = self.runner
        self.tokenizer: Tokenizer = load_tokenizer(self.tokenizer_path)
        runner.initialize(self.local_mesh_config, self.between_hosts_config)
        runner.checkpoint_path = runner.checkpoint_path or self.load
        model = runner.load_or_init()
        self.engine = Engine(
            model,
            self.tokenizer,
            slots=runner.batch_size,
            prefill_buckets=self.pad_sizes,
            max_logprobs=TOP_K,
            make_steps=ModelSteps,
        )

    def run(self) -> Generator[OutputText | None, Request | None, None]:
        """Takes requests by `send` while rows are free, and gives the texts of those that finish.

        It yields None where it waits for a request. With a batch of one row, `send` returns the request's text. With
        more rows it returns None until all are taken; `next` says that no more requests come for now. A request that
        failed gives what text it had; the error is in the text's `completion`.
        """
        self.engine.warm_up()
        running, finished = set[Handle](), collections.deque[Handle]()
        try:
            while True:
                while len(running) < self.runner.batch_size:
                    request = yield None
                    if request is None:
                        break
                    running.add(self.engine.submit(request.to_engine()))
                while running and not finished:
                    finished.extend(handle for handle in self.engine.step() if handle in running)
                while finished:
                    handle = finished.popleft()
                    running.discard(handle)
                    request = yield OutputText(handle.completion)
                    if request is not None:
                        running.add(self.engine.submit(request.to_engine()))
        finally:
            # Of a generator that is left early: the next one begins with an idle engine.
            for handle in running:
                self.engine.cancel(handle)
            while self.engine.has_work:
                self.engine.step()


def sample_from_model(
    server: Generator[OutputText | None, Request | None, None], prompt: str, max_len: int, temperature: float
) -> str:
    """The text that continues one prompt, from `InferenceRunner.run()` when it has no other requests.

    Raises:
      Exception: What ended the request, if something failed.
    """
    next(server)
    text = server.send(Request(prompt, temperature=temperature, nucleus_p=1.0, rng_seed=42, max_len=max_len))
    while text is None:
        text = next(server)
    if text.completion.error is not None:
        raise text.completion.error
    return text
