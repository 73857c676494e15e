"""Grok-1 in NumPy and float64, for one row of tokens: the model to read, and what every faster path is compared with.

Written from the description of the model, not from the code that it checks. It has no cache, no batch, no padding and
no rounding: the whole sequence is computed each time. Loops stand where they are plainer than array tricks. Read
`forward` first, then the functions below it, in the order in which it calls them.

Weights are a mapping from a parameter's path to a float64 array, dequantised: those of a model by `unpack_weights`, or
new ones by `random_weights`.

    embedding.table [V, D]; final_norm.scale [D]
    layers.{i}.attention.query [D, N * H], .key and .value [D, K * H], .output [N * H, D]
    layers.{i}.feed_forward.router [D, E], .gate and .up [E, D, F], .down [E, F, D]
        (dense: no router and no leading E)
    layers.{i}.{pre_attention_norm, post_attention_norm, pre_feed_forward_norm, post_feed_forward_norm}.scale [D]
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grokjax.config import GrokConfig
from grokjax.model import Grok, named_parameters
from grokjax.quantization import QuantizedArray, QuantizedTable

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceOutput:
    """What the reference computes for T tokens.

    Attributes:
      logits: [T, V] float64.
      captures: every inner value by its name: `embed` and `final_norm_out` [T, D]; stacked over layers, in the order in
        which they are computed, `norm0_out` (what attention is given) [L, T, D]; `q_rope` [L, T, N, H], `k_rope`
        [L, T, K, H], `value` [L, T, K * H], `attn_heads` [L, T, N * H], `attn_out` and `norm1_out` [L, T, D];
        `norm2_out` (what the experts are given) [L, T, D]; with experts, `router_logits` and `router_probs` [L, T, E],
        `router_index` and `router_gate` (the experts of each token, best first, and their shares) [L, T, X];
        `moe_out`, `norm3_out` and `layer_out` [L, T, D].
    """

    logits: Array
    captures: Mapping[str, Array]


def forward(
    weights: Weights, config: GrokConfig, tokens: Sequence[int], *, embeddings: Array | None = None
) -> ReferenceOutput:
    """Logits after each of T tokens, none of which is padding, and all that was computed on the way.

    Args:
      weights: of the model, see above.
      config: its sizes.
      tokens: T ids of the vocabulary, one row.
      embeddings: [T, D], in place of the tokens' own.

    Raises:
      ValueError: The tokens are not one row of ids of the vocabulary.
    """
    hidden = weights["embedding.table"][_check_tokens(tokens, config)] * config.embedding_multiplier  # [T, D]
    hidden = hidden if embeddings is None else embeddings
    embed, layers = hidden, []
    for index in range(config.num_layers):
        layer = _decoder_layer(_Layer(weights, config, f"layers.{index}"), hidden)
        hidden = layer["layer_out"]
        layers.append(layer)
    final = _rms_norm(hidden, weights["final_norm.scale"], config.norm_eps)
    captures = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    return ReferenceOutput(
        logits=final @ weights["embedding.table"].T * config.output_multiplier,
        captures={"embed": embed, "final_norm_out": final, **captures},
    )


def _check_tokens(tokens: Sequence[int], config: GrokConfig) -> Array:
    ids = np.asarray(tokens)
    is_a_row = ids.ndim == 1 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
    if not is_a_row or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"tokens must be one row of ids from 0 to {config.vocab_size - 1}, such as [5, 6, 7]: encode a text first, "
            "and pass the rows of a batch one by one."
        )
    return ids


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """The weights of one layer, and its config."""

    weights: Weights
    config: GrokConfig
    path: str

    def __getitem__(self, name: str) -> Array:
        return self.weights[f"{self.path}.{name}"]

    def norm(self, place: str, x: Array) -> Array:
        return _rms_norm(x, self[f"{place}_norm.scale"], self.config.norm_eps)


def _decoder_layer(layer: _Layer, hidden: Array) -> dict[str, Array]:
    """[T, D] in; every capture of the layer out, the new [T, D] as `layer_out`."""
    norm0 = layer.norm("pre_attention", hidden)
    attention = _attention(layer, norm0)
    norm1 = layer.norm("post_attention", attention["attn_out"])
    hidden = hidden + norm1
    norm2 = layer.norm("pre_feed_forward", hidden)
    experts = _mixture(layer, norm2) if layer.config.num_experts > 1 else {"moe_out": _dense(layer, norm2)}
    norm3 = layer.norm("post_feed_forward", experts["moe_out"])
    norms = {"norm0_out": norm0, "norm1_out": norm1, "norm2_out": norm2, "norm3_out": norm3}
    return {**attention, **experts, **norms, "layer_out": hidden + norm3}


def _attention(layer: _Layer, x: Array) -> dict[str, Array]:
    config, length = layer.config, len(x)
    flat_value = x @ layer["attention.value"]
    query = _rope((x @ layer["attention.query"]).reshape(length, config.num_heads, -1), config.rope_base)  # [T, N, H]
    key = _rope((x @ layer["attention.key"]).reshape(length, config.num_kv_heads, -1), config.rope_base)  # [T, K, H]
    value = flat_value.reshape(length, config.num_kv_heads, -1)
    future = np.triu(np.ones((length, length), bool), k=1)
    heads = np.empty_like(query)
    for head in range(config.num_heads):
        kv_head = head // (config.num_heads // config.num_kv_heads)
        scores = query[:, head] @ key[:, kv_head].T * config.attention_multiplier  # [T, T]
        scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
        heads[:, head] = _softmax(np.where(future, -1e30, scores)) @ value[:, kv_head]
    flat_heads = heads.reshape(length, -1)
    return {
        "q_rope": query,
        "k_rope": key,
        "value": flat_value,
        "attn_heads": flat_heads,
        "attn_out": flat_heads @ layer["attention.output"],
    }


def _mixture(layer: _Layer, x: Array) -> dict[str, Array]:
    router_logits = x @ layer["feed_forward.router"]  # [T, E]
    probs = _softmax(router_logits)
    index = np.argsort(-probs, axis=-1, kind="stable")[:, : layer.config.experts_per_token]  # [T, X]
    gate = np.take_along_axis(probs, index, axis=-1)  # softmax values as they are: they do not sum to 1
    out = np.zeros_like(x)
    for token in range(len(x)):
        for expert, share in zip(index[token], gate[token], strict=True):
            matrices = (layer[f"feed_forward.{name}"][expert] for name in ("gate", "up", "down"))
            out[token] += share * _gated(x[token], *matrices)
    return {
        "router_logits": router_logits,
        "router_probs": probs,
        "router_index": index,
        "router_gate": gate,
        "moe_out": out,
    }


def _dense(layer: _Layer, x: Array) -> Array:
    return _gated(x, *(layer[f"feed_forward.{name}"] for name in ("gate", "up", "down")))


def _gated(x: Array, gate: Array, up: Array, down: Array) -> Array:
    return (_gelu(x @ gate) * (x @ up)) @ down


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    return scale * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def _rope(x: Array, base: float) -> Array:
    """Rotates [T, heads, H] by position; feature j pairs with feature j + H / 2."""
    half = x.shape[-1] // 2
    frequencies = base ** (-np.arange(half) / half)
    phases = np.arange(len(x))[:, None] * frequencies  # [T, H / 2]
    cos, sin = np.cos(phases)[:, None], np.sin(phases)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def greedy(weights: Weights, config: GrokConfig, tokens: Sequence[int], steps: int) -> list[int]:
    """The most probable tokens that follow some tokens, one after the other.

    Args:
      weights: as for `forward`.
      config: the sizes.
      tokens: ids, at least one.
      steps: how many tokens to find.

    Returns:
      Their ids, as many as `steps`.
    """
    sequence = list(tokens)
    for _ in range(steps):
        sequence.append(int(forward(weights, config, sequence).logits[-1].argmax()))
    return sequence[len(tokens) :]


@jax.transfer_guard("allow")
def unpack_weights(model: Grok) -> dict[str, Array]:
    """The weights of a model as `forward` takes them: dequantised, a matrix for each layer, 8 bytes for each number.

    Those of all devices are gathered in the host's memory: it is for small models.
    """
    weights, shapes = {}, _matrix_shapes(model.config)
    for name, param in named_parameters(model).items():
        values, own = _dequantise(param.get_value()), name.removeprefix("layers.")
        if own == name:
            weights[name] = values
        else:
            for index, layer in enumerate(values):
                weights[f"layers.{index}.{own}"] = layer.reshape(shapes.get(own, layer.shape))
    return weights


def _dequantise(value: Any) -> Array:
    """A parameter in float64, where a product of an int8 number and its scale is exact."""
    if isinstance(value, QuantizedArray):
        blocks = np.repeat(_dequantise(value.scales), value.shape[-2] // value.num_blocks, axis=-2)
        return _dequantise(value.weight) * blocks
    if isinstance(value, QuantizedTable):
        return _dequantise(value.weight) * _dequantise(value.scales)[:, None]
    return np.asarray(value).astype(np.float64)


def random_weights(config: GrokConfig, seed: int) -> dict[str, Array]:
    """Weights at which every part matters: standard deviations near 1 in the layers, near 2 in scores and logits.

    The embedding is small, and the final norm makes up for it: else the tied output would only repeat the last token.
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> Array:
        return random.standard_normal(shape) * std

    embedding_std = 0.3 / config.embedding_multiplier
    final_scale = 2 / (embedding_std * config.model_dim**0.5 * config.output_multiplier)
    weights = {
        "embedding.table": normal(config.vocab_size, config.model_dim, std=embedding_std),
        "final_norm.scale": final_scale * (1 + normal(config.model_dim, std=0.1)),
    }
    for index in range(config.num_layers):
        for name, (*leading, rows, columns) in _matrix_shapes(config).items():
            weights[f"layers.{index}.{name}"] = normal(*leading, rows, columns, std=_GAINS.get(name, 1) / rows**0.5)
        for place in ("pre_attention", "post_attention", "pre_feed_forward", "post_feed_forward"):
            weights[f"layers.{index}.{place}_norm.scale"] = 1 + normal(config.model_dim, std=0.1)
    return weights


# Standard deviation of a matrix's output for inputs of 1. Small outputs, as in trained weights, make the norms' epsilon
# matter; the norms bring them back to 1.
_GAINS = {
    "attention.query": 1.5,
    "attention.key": 1.5,
    "attention.output": 0.05,
    "feed_forward.router": 1.5,
    "feed_forward.down": 0.05,
}


def _matrix_shapes(config: GrokConfig) -> dict[str, tuple[int, ...]]:
    model_dim, ffn_dim = config.model_dim, config.ffn_dim
    query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    experts = (config.num_experts,) if config.num_experts > 1 else ()
    router = {"feed_forward.router": (model_dim, config.num_experts)} if experts else {}
    return {
        "attention.query": (model_dim, query_dim),
        "attention.key": (model_dim, kv_dim),
        "attention.value": (model_dim, kv_dim),
        "attention.output": (query_dim, model_dim),
        **router,
        "feed_forward.gate": (*experts, model_dim, ffn_dim),
        "feed_forward.up": (*experts, model_dim, ffn_dim),
        "feed_forward.down": (*experts, ffn_dim, model_dim),
    }
