"""Names of the public safetensors conversions: of their tensors, and of the fields of their `config.json`.

Two sets of tensor names are in use, those of `keyfan/grok-1-hf` and those of `hpcai-tech/grok-1` (see `parameters`).
Norms may end in `.weight` or `.scale`. Matrices are stored [O, C], the other way round than ours; the table is [V, D].
`lm_head.weight` may stand beside the table and must be the same: Grok ties them.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Literal

from grokjax.checkpoint.disk import read_json
from grokjax.checkpoint.parameters import PARAMETERS, Part, find_parameter, stack_name
from grokjax.checkpoint.stored import CheckpointError
from grokjax.config import GrokConfig

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
TIED = "lm_head.weight"
INSTALL = "the package safetensors is not installed: run pip install '.[safetensors]' in the checkout"


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Names in one family of public checkpoints.

    Attributes:
      prefix: what the names of tensors begin with.
      names: the model's path -> the name, with `{layer}` and `{expert}` in it.
      has_head: whether the table stands there a second time, as `lm_head.weight`.
      num_experts: the field of `config.json` with the number of experts.
      classes: the fields of `config.json` that say which classes of other programs read the checkpoint.
    """

    prefix: str
    names: Mapping[str, str]
    has_head: bool
    num_experts: str
    classes: Mapping[str, Any]

    @property
    def layer_prefix(self) -> str:
        """What the names of a layer begin with, up to its number."""
        return self.names["layers.attention.query"].partition("{layer}")[0]

    def name(self, part: Part) -> str:
        """The stored name of a part; a dense block is expert 0."""
        return part.fill(self.names[stack_name(part.parameter)])

    def find(self, part: Part, names: Container[str]) -> str:
        """As `name`, but a norm's name ends as it does among `names`."""
        name = self.name(part)
        if name not in names and find_parameter(part.parameter).kind == "norm":
            stem, _, ending = name.rpartition(".")
            other = f"{stem}.{'weight' if ending == 'scale' else 'scale'}"
            return other if other in names else name
        return name


# Source: `config.json` and the modules of the two repositories.
KEYFAN = Scheme(
    "transformer.",
    {path: row.keyfan for path, row in PARAMETERS.items()},
    has_head=False,
    num_experts="num_local_experts",
    classes={
        "architectures": ["GrokForCausalLM"],
        "model_type": "grok",
        "auto_map": {
            "AutoConfig": "configuration_grok.GrokConfig",
            "AutoModelForCausalLM": "modeling_grok.GrokForCausalLM",
        },
    },
)
HPCAI = Scheme(
    "model.",
    {path: row.hpcai for path, row in PARAMETERS.items()},
    has_head=True,
    num_experts="num_experts",
    classes={
        "architectures": ["Grok1ModelForCausalLM"],
        "model_type": "grok-1",
        "auto_map": {
            "AutoConfig": "configuration_grok1.Grok1Config",
            "AutoModel": "modeling_grok1.Grok1Model",
            "AutoModelForCausalLM": "modeling_grok1.Grok1ModelForCausalLM",
        },
    },
)
SchemeName = Literal["keyfan", "hpcai"]
SCHEMES: Mapping[SchemeName, Scheme] = {"keyfan": KEYFAN, "hpcai": HPCAI}

# Field of `config.json` -> ours. Source: `Grok1Config` of hpcai-tech/grok-1. `rope_base` is our own addition: the
# public files hold no base, and some carry an unused `rope_theta` of another value, which must not be believed.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "intermediate_size": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "max_position_embeddings": "max_seq_len",
    "embedding_multiplier_scale": "embedding_multiplier",
    "output_multiplier_scale": "output_multiplier",
    "attn_output_multiplier": "attention_multiplier",
    "max_attn_value": "attention_softcap",
    "rope_base": "rope_base",
    "rms_norm_eps": "norm_eps",
    "pad_token_id": "pad_id",
    "bos_token_id": "bos_id",
    "eos_token_id": "eos_id",
}


def is_transposed(parameter: str) -> bool:
    """Whether a parameter's matrices are stored the other way round: all but the embedding table."""
    return find_parameter(parameter).kind not in ("table", "norm")


def config_fields(config: GrokConfig, scheme: Scheme) -> dict[str, Any]:
    """What `config.json` says of a checkpoint with the scheme's names; `read_config` reads the configuration back."""
    sizes = {name: getattr(config, ours) for name, ours in _FIELDS.items()}
    sizes[scheme.num_experts] = sizes.pop("num_experts")
    return {**scheme.classes, **sizes, "tie_word_embeddings": True}


def read_config(path: Path, advice: str = "download it again") -> GrokConfig:
    """Reads a `config.json`: the published fields, or what `GrokConfig.from_json` reads.

    Of the published fields, those that say nothing about our configuration are ignored. Without `head_dim` it is D / N;
    other fields that `GrokConfig` has a default for may be absent or null too.

    Args:
      path: of the file.
      advice: what to do where it holds no JSON object, for the error.

    Raises:
      CheckpointError: It cannot be read, lacks a field, or holds an impossible one.
    """
    document = read_object(path, advice)
    if "model_dim" in document or {"lm", "model"} <= document.keys():
        return _parsed(path, lambda: GrokConfig.from_json(json.dumps(document)))
    document.setdefault("num_experts", document.get(KEYFAN.num_experts))
    fields: dict[str, Any] = {ours: document[name] for name, ours in _FIELDS.items() if document.get(name) is not None}
    required = {field.name for field in dataclasses.fields(GrokConfig) if field.default is dataclasses.MISSING}
    missing = [name for name, ours in _FIELDS.items() if ours in required - {*fields, "head_dim"}]
    if missing:
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing)}: add what the model was made with, or pass the whole configuration, "
            "config=GrokConfig(...) or --config FILE."
        )
    dim, heads = fields["model_dim"], fields["num_heads"]
    whole = isinstance(dim, int) and isinstance(heads, int) and heads > 0
    # Where D or N is impossible, GrokConfig names it before it comes to this 0.
    fields.setdefault("head_dim", dim // heads if whole else 0)
    return _parsed(path, lambda: GrokConfig(**fields))


def _parsed(path: Path, parse: Callable[[], GrokConfig]) -> GrokConfig:
    try:
        return parse()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_object(path: Path, advice: str = "download it again") -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      CheckpointError: It cannot be read or holds anything else.
    """
    # The hub's client keeps links in its cache: a file is what they lead to.
    document = read_json(Path(os.path.realpath(path)), advice)
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds no JSON object but a {type(document).__name__}: {advice}.")
    return document
