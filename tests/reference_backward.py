"""The backward pass of `grokjax.reference`, also in NumPy and float64: what derivatives are compared with.

Written from the description of the model, for one row of tokens, step by step in the order in which the reference goes
forward, reversed. Each function is given the cotangents of what its counterpart returns, and adds those of the weights
to `found`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from grokjax.config import GrokConfig
from grokjax.reference import Weights, forward


def backward(
    weights: Weights,
    config: GrokConfig,
    tokens: Sequence[int],
    of_logits: np.ndarray,
    *,
    embeddings: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The cotangents of all weights, and of the embeddings [T, D], from that of the logits [T, V].

    Embeddings that are given stand in place of those of the tokens.
    """
    captures = forward(weights, config, tokens, embeddings=embeddings).captures
    found = {name: np.zeros_like(weight) for name, weight in weights.items()}
    table, scaled = weights["embedding.table"], of_logits * config.output_multiplier
    found["embedding.table"] += scaled.T @ captures["final_norm_out"]
    last = captures["layer_out"][-1]
    of_hidden = _norm(found, "final_norm.scale", weights, config, last, scaled @ table)
    for index in reversed(range(config.num_layers)):
        before = captures["embed"] if index == 0 else captures["layer_out"][index - 1]
        own = {name: values[index] for name, values in captures.items() if name not in ("embed", "final_norm_out")}
        of_hidden = _Layer(weights, config, f"layers.{index}", found, own).backward(before, of_hidden)
    np.add.at(found["embedding.table"], np.asarray(tokens), of_hidden * config.embedding_multiplier)
    return found, of_hidden


def _norm(
    found: dict[str, np.ndarray], name: str, weights: Weights, config: GrokConfig, x: np.ndarray, of_out: np.ndarray
) -> np.ndarray:
    """The cotangent of x [T, D], which RMSNorm made `of_out`'s primal of."""
    factor = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    found[name] += (of_out * x * factor).sum(axis=0)
    scaled = of_out * weights[name]
    return factor * scaled - x * factor**3 * np.mean(scaled * x, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """One layer: its weights, what they were found to have as cotangents, and what the forward pass saw in it."""

    weights: Weights
    config: GrokConfig
    path: str
    found: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.weights[f"{self.path}.{name}"]

    def backward(self, before: np.ndarray, of_out: np.ndarray) -> np.ndarray:
        middle = before + self.seen["norm1_out"]
        of_mixed = self._norm("post_feed_forward", self.seen["moe_out"], of_out)
        of_middle = of_out + self._norm("pre_feed_forward", middle, self._mixture(of_mixed))
        of_attention = self._norm("post_attention", self.seen["attn_out"], of_middle)
        return of_middle + self._norm("pre_attention", before, self._attention(of_attention))

    def _norm(self, place: str, x: np.ndarray, of_out: np.ndarray) -> np.ndarray:
        return _norm(self.found, f"{self.path}.{place}_norm.scale", self.weights, self.config, x, of_out)

    def _product(self, name: str, x: np.ndarray, of_out: np.ndarray, expert: int | None = None) -> np.ndarray:
        """The cotangent of x in `x @ weight`, or in that of one expert."""
        weight, total = self[name], self.found[f"{self.path}.{name}"]
        if expert is not None:
            weight, total = weight[expert], total[expert]
        total += x.T @ of_out
        return of_out @ weight.T

    def _attention(self, of_out: np.ndarray) -> np.ndarray:
        config, x, length = self.config, self.seen["norm0_out"], len(of_out)
        query, key = self.seen["q_rope"], self.seen["k_rope"]
        value = self.seen["value"].reshape(key.shape)
        of_heads = self._product("attention.output", self.seen["attn_heads"], of_out).reshape(query.shape)
        of_query, of_key, of_value = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
        future = np.triu(np.ones((length, length), bool), k=1)
        for head in range(config.num_heads):
            kv_head = head // (config.num_heads // config.num_kv_heads)
            tanh = np.tanh(query[:, head] @ key[:, kv_head].T * config.attention_multiplier / config.attention_softcap)
            weights = np.where(future, 0, np.exp(config.attention_softcap * tanh))
            weights /= weights.sum(axis=-1, keepdims=True)
            of_weights = of_heads[:, head] @ value[:, kv_head].T
            of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True))
            of_scores *= (1 - tanh**2) * config.attention_multiplier
            of_value[:, kv_head] += weights.T @ of_heads[:, head]
            of_query[:, head] += of_scores @ key[:, kv_head]
            of_key[:, kv_head] += of_scores.T @ query[:, head]
        parts = {"query": _turn_back(of_query, config), "key": _turn_back(of_key, config), "value": of_value}
        return sum(self._product(f"attention.{name}", x, part.reshape(length, -1)) for name, part in parts.items())

    def _mixture(self, of_out: np.ndarray) -> np.ndarray:
        x = self.seen["norm2_out"]
        if self.config.num_experts == 1:
            return self._gated(x, of_out, np.ones(len(x)), None)[0]
        of_x, of_probs = np.zeros_like(x), np.zeros_like(self.seen["router_probs"])
        for token in range(len(x)):
            for expert, share in zip(self.seen["router_index"][token], self.seen["router_gate"][token], strict=True):
                row = slice(token, token + 1)
                part, of_share = self._gated(x[row], of_out[row], np.array([share]), int(expert))
                of_x[row] += part
                of_probs[token, expert] += of_share[0]
        probs = self.seen["router_probs"]
        of_scores = probs * (of_probs - (probs * of_probs).sum(axis=-1, keepdims=True))
        return of_x + self._product("feed_forward.router", x, of_scores)

    def _gated(
        self, x: np.ndarray, of_out: np.ndarray, share: np.ndarray, expert: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The cotangents of rows x, which an expert is given, and of the shares that its results have."""
        gate, up = (self[f"feed_forward.{name}"] for name in ("gate", "up"))
        inputs, factors = (x @ (weight if expert is None else weight[expert]) for weight in (gate, up))
        inner = np.sqrt(2 / np.pi) * (inputs + 0.044715 * inputs**3)
        activated = 0.5 * inputs * (1 + np.tanh(inner))
        slope = 0.5 * (1 + np.tanh(inner))
        slope += 0.5 * inputs / np.cosh(inner) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * inputs**2)
        of_hidden = self._product("feed_forward.down", activated * factors, of_out * share[:, None], expert)
        down = self["feed_forward.down"] if expert is None else self["feed_forward.down"][expert]
        of_share = (activated * factors @ down * of_out).sum(axis=-1)
        of_x = self._product("feed_forward.gate", x, of_hidden * factors * slope, expert)
        return of_x + self._product("feed_forward.up", x, of_hidden * activated, expert), of_share


def _turn_back(of_out: np.ndarray, config: GrokConfig) -> np.ndarray:
    """The cotangent of what RoPE turned, [T, heads, H]: turned back."""
    half = of_out.shape[-1] // 2
    phases = np.arange(len(of_out))[:, None] * config.rope_base ** (-np.arange(half) / half)
    cos, sin = np.cos(phases)[:, None], np.sin(phases)[:, None]
    first, second = of_out[..., :half], of_out[..., half:]
    return np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
