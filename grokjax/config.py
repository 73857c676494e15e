"""The sizes and constants of a Grok model: one frozen dataclass of numbers, checked when it is made."""

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np


def ffn_size(model_dim: int, widening_factor: float) -> int:
    """Hidden size of the gated feed-forward block: two thirds of the widened size, raised to a multiple of 8.

    Source: the release's `model.py`, `ffn_size`; 32768 for `ffn_size(6144, 8)`.
    """
    hidden = int(widening_factor * model_dim) * 2 // 3
    return hidden + (8 - hidden) % 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrokConfig:
    """Sizes and constants of one model; hashable, so it may be a static argument of `jax.jit`.

    Meshes, sharding rules and dtypes are separate arguments wherever they matter.

    Attributes:
      vocab_size: V, rows of the embedding table.
      model_dim: D, width of the residual stream.
      num_layers: L, decoder layers.
      num_heads: N, query heads; a multiple of `num_kv_heads`.
      num_kv_heads: K, key and value heads.
      head_dim: H, size of one head; even, because RoPE pairs its halves.
      ffn_dim: F, hidden size of one expert (or of the dense block).
      num_experts: E; 1 means a dense gated block without a router.
      experts_per_token: X, experts evaluated for each token; at most `num_experts`.
      max_seq_len: longest sequence in tokens, prompt and continuation together.
      embedding_multiplier: factor on the embedded tokens.
      output_multiplier: factor on the logits.
      attention_multiplier: factor on the attention scores.
      attention_softcap: c in `c * tanh(score / c)`.
      rope_base: base of the rotary frequencies.
      norm_eps: epsilon of every RMSNorm.
      pad_id: token id that fills unused positions; never decides what is masked.
      bos_id: token id of the beginning of a sequence.
      eos_id: token id that ends a continuation.

    Raises:
      ValueError: A field is not a number of its kind, or the sizes contradict each other.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    num_experts: int
    experts_per_token: int
    max_seq_len: int
    embedding_multiplier: float
    output_multiplier: float
    attention_multiplier: float
    attention_softcap: float = 30.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_number(field.name, getattr(self, field.name), field.type)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every kv head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: RoPE pairs its halves, so it must be even.")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} exceeds num_experts={self.num_experts}: "
                "choose at most as many experts as there are."
            )
        for name in ("pad_id", "bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size} tokens.")

    @classmethod
    def grok_1(cls) -> Self:
        """The released model: 314B parameters, 64 layers, 8 experts of which each token uses 2."""
        return cls(
            vocab_size=131072,
            model_dim=6144,
            num_layers=64,
            num_heads=48,
            num_kv_heads=8,
            head_dim=128,
            ffn_dim=32768,
            num_experts=8,
            experts_per_token=2,
            max_seq_len=8192,
            embedding_multiplier=78.38367176906169,
            output_multiplier=0.5773502691896257,
            attention_multiplier=0.08838834764831845,
        )

    @classmethod
    def tiny(cls) -> Self:
        """A model for tests and first steps: 0.5M parameters, all parts of the real one, 8 devices divide it."""
        return cls(
            vocab_size=512,
            model_dim=64,
            num_layers=2,
            num_heads=8,
            num_kv_heads=4,
            head_dim=16,
            ffn_dim=128,
            num_experts=8,
            experts_per_token=2,
            max_seq_len=256,
            embedding_multiplier=8.0,
            output_multiplier=0.5773502691896257,
            attention_multiplier=0.25,
        )

    @classmethod
    def bench_1b(cls) -> Self:
        """The benchmark model: 1.23B parameters, the largest that 16 GiB of memory run in any dtype."""
        return cls(
            vocab_size=131072,
            model_dim=1024,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            head_dim=128,
            ffn_dim=ffn_size(1024, 8),
            num_experts=8,
            experts_per_token=2,
            max_seq_len=1024,
            embedding_multiplier=32.0,
            output_multiplier=0.5773502691896257,
            attention_multiplier=0.08838834764831845,
        )

    @classmethod
    def from_release(cls, mapping: Mapping[str, Any]) -> Self:
        """Translates the release's nested field names: a mapping with the keys `lm` and `model`, others ignored.

        Raises:
          ValueError: `lm` or `model`, or one of their fields, is missing.
        """
        for key in ("lm", "model"):
            if not isinstance(mapping.get(key), Mapping):
                raise ValueError(
                    f"a release configuration needs the keys 'lm' and 'model', each a mapping of fields; {key!r} is "
                    f"{'missing' if key not in mapping else 'no mapping'} here (found {sorted(mapping)})."
                )
        lm, model = mapping["lm"], mapping["model"]
        missing = [f"lm.{name}" for name in _LM_FIELDS if name not in lm]
        missing += [f"model.{name}" for name in _MODEL_FIELDS if name not in model]
        if missing:
            raise ValueError(
                f"the release configuration lacks {', '.join(missing)}: add what the checkpoint was made with."
            )
        widening_factor = model.get("widening_factor", 4.0)
        values = {
            **{f"lm.{name}": lm[name] for name in _LM_FIELDS},
            **{f"model.{name}": model[name] for name in _MODEL_FIELDS},
        }
        for name, value in {**values, "model.widening_factor": widening_factor}.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} of the release configuration must be a number.")
        _check_number("model.emb_size", model["emb_size"], int)
        _check_number("model.emb_size * widening_factor", model["emb_size"] * widening_factor, float)
        fields = {ours: lm[theirs] for theirs, ours in _LM_FIELDS.items()}
        fields |= {ours: model[theirs] for theirs, ours in _MODEL_FIELDS.items()}
        if fields["num_experts"] <= 1:
            fields["num_experts"] = fields["experts_per_token"] = 1
        return cls(ffn_dim=ffn_size(model["emb_size"], widening_factor), **fields)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote, or the release's nested names (see `from_release`); a byte-order mark is ignored.

        Raises:
          ValueError: The text is not JSON, or holds unknown, missing or impossible fields.
        """
        try:
            mapping = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the configuration is not JSON: {error}.") from error
        if not isinstance(mapping, dict):
            raise ValueError(f"the configuration must be a JSON object of field names, not a {type(mapping).__name__}.")
        if "lm" in mapping and "model" in mapping:
            return cls.from_release(mapping)
        fields = dataclasses.fields(cls)
        unknown = sorted(set(mapping) - {field.name for field in fields})
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        missing = sorted(required - set(mapping))
        faults = [f"has unknown fields {unknown}"] * bool(unknown) + [f"lacks {missing}"] * bool(missing)
        if faults:
            raise ValueError(
                f"the configuration {' and '.join(faults)}: the fields are {[field.name for field in fields]}."
            )
        return cls(**mapping)

    def to_json(self) -> str:
        """The fields as an indented JSON object; `from_json` reads it back equal."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


# Sizes and ids are int32 on the devices.
_LARGEST = 2**31 - 1
# The constants are float32 there, smaller ones 0.
_SMALLEST_FLOAT, _LARGEST_FLOAT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# The release's field -> ours. Source: the release's `LanguageModelConfig` and `TransformerConfig`.
_LM_FIELDS = {
    "vocab_size": "vocab_size",
    "pad_token": "pad_id",
    "eos_token": "eos_id",
    "sequence_len": "max_seq_len",
    "embedding_multiplier_scale": "embedding_multiplier",
    "output_multiplier_scale": "output_multiplier",
}
_MODEL_FIELDS = {
    "emb_size": "model_dim",
    "key_size": "head_dim",
    "num_q_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "num_layers": "num_layers",
    "num_experts": "num_experts",
    "num_selected_experts": "experts_per_token",
    "attn_output_multiplier": "attention_multiplier",
}


def check_config(config: object) -> None:
    """Refuses what is no configuration, such as the name of one.

    Raises:
      ValueError: It is something else.
    """
    if not isinstance(config, GrokConfig):
        raise ValueError(
            f"the configuration must be a GrokConfig, such as GrokConfig.grok_1() or GrokConfig.from_json(text) makes, "
            f"not {reprlib.repr(config)}."
        )


def _check_number(name: str, value: Any, kind: Any) -> None:
    shown = f"{name}={reprlib.repr(value)}"
    if kind is int:
        is_id = name.endswith("_id")
        if not isinstance(value, int) or isinstance(value, bool) or not (0 if is_id else 1) <= value <= _LARGEST:
            least = "a token id, 0 or more" if is_id else "an integer, 1 or more"
            raise ValueError(f"{shown} must be {least}, and at most {_LARGEST}.")
    # Compared as it is: an integer of 400 digits is no float.
    elif (
        not isinstance(value, int | float) or isinstance(value, bool) or not _SMALLEST_FLOAT <= value <= _LARGEST_FLOAT
    ):
        raise ValueError(
            f"{shown} must be a finite number above 0 that float32 holds, from {_SMALLEST_FLOAT:.2g} to "
            f"{_LARGEST_FLOAT:.2g}."
        )
