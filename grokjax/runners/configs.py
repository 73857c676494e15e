"""What a caller of the release writes down, by its names: the configuration of a model, and a request."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from grokjax import request as engine_request
from grokjax.config import GrokConfig


@dataclasses.dataclass
class TransformerConfig:
    """The release's field names and defaults; those without a meaning here are accepted and change nothing.

    `ModelRunner` decides about meshes and sharding, so `data_axis`, `model_axis` and `shard_activations` do not.
    """

    emb_size: int
    key_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    vocab_size: int = 128 * 1024
    widening_factor: float = 4.0
    attn_output_multiplier: float = 1.0
    name: str | None = None
    num_experts: int = -1
    capacity_factor: float = 1.0
    num_selected_experts: int = 1
    init_scale: float = 1.0
    shard_activations: bool = False
    data_axis: str | tuple[str, ...] = "data"
    model_axis: str | tuple[str, ...] = "model"


@dataclasses.dataclass
class LanguageModelConfig:
    """The release's field names and defaults; `fprop_dtype` is the compute dtype, float32 or bfloat16."""

    model: TransformerConfig
    vocab_size: int
    pad_token: int
    eos_token: int
    sequence_len: int
    model_size: int = 0
    embedding_init_scale: float = 1.0
    embedding_multiplier_scale: float = 1.0
    output_multiplier_scale: float = 1.0
    name: str | None = None
    fprop_dtype: DTypeLike = jnp.bfloat16
    model_type: str | None = None
    init_scale_override: float | None = None
    shard_embeddings: bool = True

    def to_config(self) -> GrokConfig:
        """The sizes and constants as a `GrokConfig`.

        Raises:
          ValueError: They contradict each other.
        """
        lm = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return GrokConfig.from_release({"lm": lm, "model": dataclasses.asdict(self.model)})


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
        """The request as an `Engine` takes it."""
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
