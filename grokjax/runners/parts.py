"""The release's configuration and pure functions, by its names: what `runners` is made of besides the engine."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from grokjax import sampling
from grokjax.cache import KVCache
from grokjax.config import GrokConfig

TOP_K = 8


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


class SampleSettings(NamedTuple):
    """How each of B rows is sampled: temperature [B], 0 for greedy; nucleus_p [B]; mask [B, V]; active [B]."""

    temperature: ArrayLike
    nucleus_p: ArrayLike
    mask: ArrayLike
    active: ArrayLike


class SampleOutput(NamedTuple):
    """token_id [B, 1] int32, prob [B, 1], top_k_token_ids [B, K] int32 and top_k_probs [B, K], of what was drawn."""

    token_id: jax.Array
    prob: jax.Array
    top_k_token_ids: jax.Array
    top_k_probs: jax.Array


def sample_token(rngs: jax.Array, outputs: Any, settings: SampleSettings, *, num_top: int = TOP_K) -> SampleOutput:
    """Draws one token a row with that row's key: temperature, mask, top-p.

    Args:
      rngs: keys, typed [B] or raw uint32 [B, 2].
      outputs: logits [B, 1, V], or an object that has them as `logits`.
      settings: for the B rows.
      num_top: K, most probable tokens to report.
    """
    logits = getattr(outputs, "logits", outputs)[:, -1]
    batch = logits.shape[0]
    ours = sampling.SampleSettings(
        temperature=jnp.asarray(settings.temperature, jnp.float32),
        top_p=jnp.asarray(settings.nucleus_p, jnp.float32),
        top_k=jnp.zeros(batch, jnp.int32),
        min_p=jnp.zeros(batch, jnp.float32),
        mask=jnp.asarray(settings.mask) != 0,
        active=jnp.ones(batch, bool),  # the release draws for every row
    )
    drawn = sampling.sample_token(rngs, logits, ours, num_top=num_top)
    assert drawn.top_k_token_ids is not None
    assert drawn.top_k_probs is not None
    return SampleOutput(drawn.token_id[:, None], drawn.prob[:, None], drawn.top_k_token_ids, drawn.top_k_probs)


def top_p_filter(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """`sampling.top_p_filter` for logits [..., V] and top_p [..., 1], as the release passes them."""
    return sampling.top_p_filter(logits, top_p[..., 0])


class Padded(NamedTuple):
    """Tokens [size], and how many of them are real: what a prefill needs to know of a prompt that was cut."""

    tokens: np.ndarray
    length: int


def pad_to_size(x: ArrayLike, size: int) -> Padded:
    """Pads tokens [n] on the right with 0; of a longer input the last `size` tokens stay."""
    x = np.asarray(x)
    kept = x[max(0, len(x) - size) :]
    return Padded(np.pad(kept, (0, size - len(kept))), len(kept))


def get_pad_bucket(size: int, pad_sizes: Sequence[int]) -> int:
    """The smallest pad size that holds `size` tokens, else the largest."""
    return min((pad for pad in pad_sizes if pad >= size), default=max(pad_sizes))


def insert_slice(memory: KVCache, slice: KVCache, length: ArrayLike, i: jax.Array | int) -> KVCache:
    """The batch's cache with row `i` replaced by a one-row cache, which counts `length` entries."""
    lengths = jnp.asarray(length, jnp.int32).reshape(1)
    return memory.insert(dataclasses.replace(slice, lengths=lengths), i)
