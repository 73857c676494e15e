"""The release's runners, by its names: `ModelRunner`, and `InferenceRunner` over the engine."""

import collections
import dataclasses
import os
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple, Self

import jax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from grokjax.checkpoint import load
from grokjax.engine import Engine, Handle
from grokjax.model import Grok, ModelSteps, abstract_model, forward, init
from grokjax.quantization import QuantizedArray
from grokjax.request import Completion
from grokjax.runners import functions
from grokjax.runners.configs import LanguageModelConfig, Request
from grokjax.sharding import Partitioner, make_mesh
from grokjax.tokenizer import Tokenizer, load_tokenizer

# A batch, from which the release learns shapes: accepted in its places, and nothing here depends on it.
InitData = Mapping[str, ArrayLike] | None

# The release's name of it, which its `run.py` imports.
QuantizedWeight8bit = QuantizedArray


class OutputText(str):
    """The text of a finished request as the release gives it; its `completion` tells the rest, such as tokens."""

    completion: Completion

    def __new__(cls, text: str, completion: Completion) -> Self:
        """A text with its completion."""
        output = super().__new__(cls, text)
        output.completion = completion
        return output


class ForwardFn(NamedTuple):
    """The forward pass as two pure functions, the pair that the release's `make_forward_fn` gives.

    Attributes:
      init: from a key, typed [] or raw uint32 [2], and tokens, which no weight depends on: a model with fresh weights.
        The key's last word is their seed.
      apply: from a model, a key or None, and tokens, integers [B, T]: logits, float32 [B, T, V]. It draws nothing.
    """

    init: Callable[[jax.Array, ArrayLike | None], Grok]
    apply: Callable[[Grok, jax.Array | None, ArrayLike], jax.Array]


@dataclasses.dataclass
class ModelRunner:
    """A model on a mesh, from a checkpoint or fresh. Its state is the model, whose pytree's leaves are the parameters.

    `initialize` adds `config`, `mesh`, `batch_size`, `local_batch_size` (this process's share of it), `forward` (the
    `make_forward_fn` of the mesh) and `state_sharding`.

    Attributes:
      model: its configuration.
      bs_per_device: batch rows for each device of the mesh; the product is cut to an integer.
      load_rename_rules: (pattern, replacement) for the path of a parameter, such as `layers.3.attention.query`: the
        first pattern found in it decides under which path it is looked up in the checkpoint.
      load_exclude_rules: patterns; a parameter whose path has one of them keeps its fresh value.
      rng_seed: of fresh weights.
      transform_forward: accepted as in the release; the forward pass is pure either way.
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
        self,
        init_data: InitData = None,
        local_mesh_config: tuple[int, int] = (1, 1),
        between_hosts_config: tuple[int, int] = (1, 1),
    ) -> None:
        """Builds the mesh and what follows from it; see the class.

        Raises:
          ValueError: There are not as many devices as the mesh needs, no row is left for the batch, or `init_data` is
            no batch.
        """
        if init_data is not None and not isinstance(init_data, Mapping):
            raise ValueError(
                f"init_data={init_data!r} must be a mapping of arrays or None: name the mesh, as in "
                "local_mesh_config=(1, 8)."
            )
        self.config = self.model.to_config()
        self.mesh: Mesh = make_mesh(local_mesh_config, between_hosts_config)
        self.batch_size = int(self.bs_per_device * self.mesh.size)
        if self.batch_size < 1:
            raise ValueError(
                f"bs_per_device={self.bs_per_device} on {self.mesh.size} devices is a batch of no rows: set it to at "
                f"least {1 / self.mesh.size:g}."
            )
        self.local_batch_size = self.batch_size // jax.process_count()
        self.forward = self.make_forward_fn(self.mesh)
        self.state_sharding = self.get_state_sharding(init_data)

    def make_forward_fn(self, mesh: Mesh) -> ForwardFn:
        """The forward pass of the configuration: `init` makes its models on `mesh`."""
        config, dtype = self.model.to_config(), self.model.fprop_dtype

        @jax.transfer_guard("allow")
        def make(rng: jax.Array, tokens: ArrayLike | None) -> Grok:
            return init(config, seed=int(jax.random.key_data(rng)[-1]), mesh=mesh, dtype=dtype)

        return ForwardFn(init=make, apply=lambda params, rng, tokens: forward(params, tokens))

    def get_state_sharding(self, init_data: InitData = None) -> Grok:
        """Where `init` puts each parameter: a tree like the model, of `NamedSharding`s. Nothing is computed for it.

        The scales of a checkpoint's int8 weights may come in more blocks than fresh ones and be divided otherwise.
        """
        partitioner = Partitioner.create(self.config, self.mesh)
        shapes = abstract_model(self.config, partitioner, dtype=self.model.fprop_dtype, quantized=True)
        return _shardings(shapes)

    @jax.transfer_guard("allow")
    def init(self, rng: jax.Array | None = None, init_data: InitData = None) -> Grok:
        """A model with fresh weights, from a key as in `ForwardFn`; by default from that of `rng_seed`."""
        return self.forward.init(jax.random.key(self.rng_seed) if rng is None else rng, None)

    # The release's name of its compiled `init`; here that is compiled already.
    init_fn = init

    @jax.transfer_guard("allow")
    def load_or_init(
        self,
        init_data: InitData = None,
        from_checkpoint: bool = True,
        init_fn: Callable[[jax.Array, InitData], Grok] | None = None,
    ) -> Grok:
        """The model: from `init_fn` if given, else from the checkpoint, else fresh.

        Args:
          init_data: what `init_fn` is given; nothing else depends on it.
          from_checkpoint: read the checkpoint, if `checkpoint_path` names one.
          init_fn: makes a model from the key of `rng_seed` and `init_data`.

        Raises:
          CheckpointError: The checkpoint does not fit the configuration, or a renamed parameter is not in it.
        """
        if init_fn is not None:
            return init_fn(jax.random.PRNGKey(self.rng_seed), init_data)
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

    `initialize` adds `tokenizer`, `vocab_size`, `params` (the model), `params_sharding` (a tree like it, of
    `NamedSharding`s) and `engine`. For loops of one's own there are the release's pure functions, which take the
    model and the cache and give the cache back: `new_memory`, `prefill_memory`, `sample_step`.

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

    new_memory = staticmethod(functions.new_memory)
    prefill_memory = staticmethod(functions.prefill_memory)
    sample_step = staticmethod(functions.sample_step)

    def get_pad_bucket(self, size: int) -> int:
        """The smallest of `pad_sizes` that holds `size` tokens, else the largest."""
        return functions.get_pad_bucket(size, self.pad_sizes)

    def initialize(self) -> None:
        """Reads the tokenizer, loads the model and makes the `engine`.

        Raises:
          ValueError: The mesh, the batch size, a pad size or the tokenizer does not fit.
        """
        runner = self.runner
        self.tokenizer: Tokenizer = load_tokenizer(self.tokenizer_path)
        runner.initialize(None, self.local_mesh_config, self.between_hosts_config)
        runner.checkpoint_path = runner.checkpoint_path or self.load
        self.vocab_size = runner.config.vocab_size
        self.params: Grok = runner.load_or_init()
        self.params_sharding: Grok = _shardings(self.params)
        self.engine = Engine(
            self.params,
            self.tokenizer,
            slots=runner.batch_size,
            prefill_buckets=self.pad_sizes,
            max_logprobs=functions.TOP_K,
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
                    request = yield self._output(handle.completion)
                    if request is not None:
                        running.add(self.engine.submit(request.to_engine()))
        finally:
            # Of a generator that is left early: the next one begins with an idle engine.
            for handle in running:
                self.engine.cancel(handle)
            while self.engine.has_work:
                self.engine.step()

    def _output(self, completion: Completion) -> OutputText:
        """The text as the release decodes it: alone, so without the space between the prompt and a first word."""
        alone, text = self.tokenizer.decode(completion.token_ids), completion.text
        return OutputText(text if alone.startswith(text) else text.removeprefix(" "), completion)


def _shardings(model: Grok) -> Grok:
    """The model with the sharding of each leaf in its place."""
    return jax.tree.map(lambda leaf: leaf.sharding, model)


def sample_from_model(
    server: Generator[OutputText | None, Request | None, None], prompt: str, max_len: int, temperature: float
) -> str:
    """The text that continues one prompt, drawn with seed 42 and without top-p.

    Args:
      server: what `InferenceRunner.run()` returns, without other requests.
      prompt: the text.
      max_len: tokens of the continuation at most.
      temperature: 0 is greedy.

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
