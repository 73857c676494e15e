"""A small model for the tests of this folder, and what the float64 reference has at every site of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from builders import DENSE, TENSOR, TWO_LAYERS, random_model

from grokjax import Grok, ShardingRules, make_mesh, reference
from grokjax.model import named_parameters, with_values

CONFIG = TWO_LAYERS.replace(vocab_size=264)  # as many as a tokenizer of bytes needs, in eight parts
LENGTHS = np.array([9, 5])
TOKENS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (2, 9))
IS_REAL = np.arange(9)[None] < LENGTHS[:, None]
COMPILED: list[str] = []


def note_compilation(name: str, _: float, **__: object) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(name)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


@functools.cache
def make(mesh: tuple[int, int] = (1, 1), rules: ShardingRules = TENSOR, *, quantized: bool = False) -> Grok:
    """A float32 model in which every norm has factors of its own, and layers matter more than the embedding."""
    model = random_model(CONFIG, mesh=make_mesh(mesh), rules=rules, dtype=jnp.float32, quantized=quantized)
    random = np.random.default_rng(1)
    scales = {
        name: jax.device_put(random.uniform(1, 3, param.shape).astype(np.float32), param.get_value().sharding)
        for name, param in named_parameters(model).items()
        if name.endswith("norm.scale")
    }
    return with_values(model, scales)


@functools.cache
def dense() -> Grok:
    """A model of one layer without a router."""
    return random_model(DENSE.replace(vocab_size=CONFIG.vocab_size), dtype=jnp.float32, quantized=False)


@functools.cache
def expected(*, quantized: bool = False) -> dict[str, np.ndarray]:
    """Site -> what the reference has there of both texts, [L, 2, 9, ...] or [2, 9, ...]; zeros for padding."""
    weights = reference.unpack_weights(make(quantized=quantized))
    rows = [_sites_of(weights, TOKENS[i, :length]) for i, length in enumerate(LENGTHS)]
    return {site: np.stack([_padded(row[site], site) for row in rows], axis=_row_axis(site)) for site in rows[0]}


def real(site: str, values: jax.Array) -> np.ndarray:
    """The values with zeros for padding, as `expected` has them."""
    array = np.asarray(values)
    lead = (None,) * _row_axis(site)
    return np.where(IS_REAL[(*lead, ..., *(None,) * (array.ndim - len(lead) - 2))], array, 0)


def _sites_of(weights: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    seen = reference.forward(weights, CONFIG, tokens).captures
    length, before = len(tokens), np.concatenate([seen["embed"][None], seen["layer_out"][:-1]])
    return {
        "embedding": seen["embed"],
        "stream.in": before,
        "attention.query": seen["q_rope"],
        "attention.key": seen["k_rope"],
        "attention.value": seen["value"].reshape(2, length, CONFIG.num_kv_heads, -1),
        "attention.heads": seen["attn_heads"].reshape(2, length, CONFIG.num_heads, -1),
        "attention.out": seen["norm1_out"],
        "stream.mid": before + seen["norm1_out"],
        "router.logits": seen["router_logits"],
        "router.experts": seen["router_index"],
        "router.probabilities": seen["router_gate"],
        "feed_forward.out": seen["norm3_out"],
        "stream.out": seen["layer_out"],
        "final": seen["final_norm_out"],
    }


def _row_axis(site: str) -> int:
    return 0 if site in ("embedding", "final") else 1


def _padded(values: np.ndarray, site: str) -> np.ndarray:
    widths = [(0, 0)] * values.ndim
    widths[_row_axis(site)] = (0, TOKENS.shape[1] - values.shape[_row_axis(site)])
    return np.pad(values, widths)
