"""The table of parameters: what kind each is, and its names in every layout; its shape; parts and units.

A parameter of the layers stands in the table once, by the path that the model has for all layers. Checkpoints have one
for each layer: `layers.3.attention.query`. The shapes are the model's own.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from grokjax.config import GrokConfig
from grokjax.model import abstract_model, named_parameters
from grokjax.sharding import MESH_AXES, Partitioner


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A row of the table; the names have `{layer}` for the layer's number and `{expert}` for the expert's.

    Attributes:
      kind: what it is.
      release: the release's module and parameter; those of a dense model lack `moe/`.
      keyfan: the tensor of `keyfan/grok-1-hf`; a dense model has one expert, 0.
      hpcai: the tensor of `hpcai-tech/grok-1`, likewise.
    """

    kind: Literal["table", "norm", "router", "attention", "expert"]
    release: str
    keyfan: str
    hpcai: str

    @property
    def is_quantizable(self) -> bool:
        """Whether it may be int8: matrices of attention and experts may; norms, router and embedding may not."""
        return self.kind in ("attention", "expert")


# The model's path -> its row. Source: the release's `checkpoint.py` and the module names of its `model.py`, and the
# indices of the two public conversions.
PARAMETERS: Mapping[str, Parameter] = {
    "embedding.table": Parameter(
        "table",
        release="language_model/in_out_embed embeddings",
        keyfan="transformer.in_out_embed.weight",
        hpcai="model.embed_tokens.weight",
    ),
    "final_norm.scale": Parameter(
        "norm",
        release="language_model/rms_norm scale",
        keyfan="transformer.rms_norm.weight",
        hpcai="model.norm.weight",
    ),
    "layers.attention.query": Parameter(
        "attention",
        release="transformer/decoder_layer_{layer}/multi_head_attention/query w",
        keyfan="transformer.decoder_layer.{layer}.multi_head_attention.query.weight",
        hpcai="model.layers.{layer}.attn.q_proj.weight",
    ),
    "layers.attention.key": Parameter(
        "attention",
        release="transformer/decoder_layer_{layer}/multi_head_attention/key w",
        keyfan="transformer.decoder_layer.{layer}.multi_head_attention.key.weight",
        hpcai="model.layers.{layer}.attn.k_proj.weight",
    ),
    "layers.attention.value": Parameter(
        "attention",
        release="transformer/decoder_layer_{layer}/multi_head_attention/value w",
        keyfan="transformer.decoder_layer.{layer}.multi_head_attention.value.weight",
        hpcai="model.layers.{layer}.attn.v_proj.weight",
    ),
    "layers.attention.output": Parameter(
        "attention",
        release="transformer/decoder_layer_{layer}/multi_head_attention/linear w",
        keyfan="transformer.decoder_layer.{layer}.multi_head_attention.linear.weight",
        hpcai="model.layers.{layer}.attn.o_proj.weight",
    ),
    "layers.feed_forward.router": Parameter(
        "router",
        release="transformer/decoder_layer_{layer}/router w",
        keyfan="transformer.decoder_layer.{layer}.router.weight",
        hpcai="model.layers.{layer}.moe_block.gate.weight",
    ),
    "layers.feed_forward.gate": Parameter(
        "expert",
        release="transformer/decoder_layer_{layer}/moe/linear w",
        keyfan="transformer.decoder_layer.{layer}.moe.{expert}.linear.weight",
        hpcai="model.layers.{layer}.moe_block.experts.{expert}.linear.weight",
    ),
    "layers.feed_forward.up": Parameter(
        "expert",
        release="transformer/decoder_layer_{layer}/moe/linear_v w",
        keyfan="transformer.decoder_layer.{layer}.moe.{expert}.linear_v.weight",
        hpcai="model.layers.{layer}.moe_block.experts.{expert}.linear_v.weight",
    ),
    "layers.feed_forward.down": Parameter(
        "expert",
        release="transformer/decoder_layer_{layer}/moe/linear_1 w",
        keyfan="transformer.decoder_layer.{layer}.moe.{expert}.linear_1.weight",
        hpcai="model.layers.{layer}.moe_block.experts.{expert}.linear_1.weight",
    ),
    "layers.pre_attention_norm.scale": Parameter(
        "norm",
        release="transformer/decoder_layer_{layer}/rms_norm scale",
        keyfan="transformer.decoder_layer.{layer}.rms_norm.weight",
        hpcai="model.layers.{layer}.pre_attn_norm.scale",
    ),
    "layers.post_attention_norm.scale": Parameter(
        "norm",
        release="transformer/decoder_layer_{layer}/rms_norm_1 scale",
        keyfan="transformer.decoder_layer.{layer}.rms_norm_1.weight",
        hpcai="model.layers.{layer}.post_attn_norm.scale",
    ),
    "layers.pre_feed_forward_norm.scale": Parameter(
        "norm",
        release="transformer/decoder_layer_{layer}/rms_norm_2 scale",
        keyfan="transformer.decoder_layer.{layer}.rms_norm_2.weight",
        hpcai="model.layers.{layer}.pre_moe_norm.scale",
    ),
    "layers.post_feed_forward_norm.scale": Parameter(
        "norm",
        release="transformer/decoder_layer_{layer}/rms_norm_3 scale",
        keyfan="transformer.decoder_layer.{layer}.rms_norm_3.weight",
        hpcai="model.layers.{layer}.post_moe_norm.scale",
    ),
}

_LAYER = re.compile(r"^layers\.(\d+)\.")


def stack_name(path: str) -> str:
    """The path without the layer's number, as the model has it: `layers.attention.query`."""
    return _LAYER.sub("layers.", path)


def find_parameter(path: str) -> Parameter:
    """The row of a parameter.

    Args:
      path: a checkpoint's, such as `layers.3.attention.query`.

    Raises:
      KeyError: There is no such parameter.
    """
    return PARAMETERS[stack_name(path)]


def parameter_shapes(config: GrokConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter as checkpoints store it, in the table's order, layers in numeric order.

    A parameter of a layer has no axis of layers, and an expert's matrix of a dense model no axis of experts.
    """
    shapes = _shapes_of_one_layer(config.replace(num_layers=1))
    outside = {path: shape for path, shape in shapes.items() if not path.startswith("layers.")}
    inside = {path.removeprefix("layers."): shape for path, shape in shapes.items() if path not in outside}
    return outside | {f"layers.{i}.{path}": shape for i in range(config.num_layers) for path, shape in inside.items()}


@functools.cache
def _shapes_of_one_layer(config: GrokConfig) -> dict[str, tuple[int, ...]]:
    """The model's path -> the shape of a checkpoint's parameter, from a model of one layer that is never allocated."""
    partitioner = Partitioner.create(config, AbstractMesh((1, 1), MESH_AXES))
    model = abstract_model(config, partitioner, dtype=jnp.float32, quantized=False)
    found = {path: param.get_value().shape for path, param in named_parameters(model).items()}
    # A model has an axis of layers, and also a dense one has an axis of experts.
    num_skipped = {
        path: path.startswith("layers.") + (config.num_experts == 1 and row.kind == "expert")
        for path, row in PARAMETERS.items()
    }
    return {path: found[path][skipped:] for path, skipped in num_skipped.items() if path in found}


@dataclasses.dataclass(frozen=True)
class Part:
    """What is read, converted or written at once, so that memory is needed for one matrix and not for one layer.

    Attributes:
      parameter: our path, such as `layers.3.feed_forward.gate`.
      expert: which of its experts; None for a parameter without an expert axis.
    """

    parameter: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """The path, with the expert's number behind it."""
        return self.parameter if self.expert is None else f"{self.parameter}.{self.expert}"

    @property
    def index(self) -> tuple[int, ...]:
        """Where the part lies in the parameter's stored array."""
        return () if self.expert is None else (self.expert,)

    @property
    def layer(self) -> int | None:
        """The layer's number; None for a parameter outside the layers."""
        found = _LAYER.match(self.parameter)
        return int(found[1]) if found else None

    @property
    def unit(self) -> str:
        """The name of the unit that holds it."""
        is_alone = self.layer is None or find_parameter(self.parameter).kind == "expert"
        return self.name if is_alone else f"layers.{self.layer}"

    def fill(self, name: str) -> str:
        """A name of the table for this part; without an expert axis it is that of expert 0."""
        return name.format(layer=self.layer, expert=self.expert or 0)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Parts that our own checkpoints keep together: an expert's matrix, the rest of a layer, or another parameter.

    Attributes:
      name: `layers.3`, `layers.3.feed_forward.gate.5`, `embedding.table` or `final_norm.scale`.
      parts: its contents.
    """

    name: str
    parts: tuple[Part, ...]


def parts_of(parameter: str, config: GrokConfig) -> tuple[Part, ...]:
    """The parts of a parameter: one for each expert where it has an expert axis."""
    if config.num_experts > 1 and find_parameter(parameter).kind == "expert":
        return tuple(Part(parameter, expert) for expert in range(config.num_experts))
    return (Part(parameter),)


def units_of(config: GrokConfig) -> tuple[Unit, ...]:
    """All parts of a model as the units of our own checkpoints, in numeric order of the layers."""
    units: dict[str, list[Part]] = {}
    for parameter in parameter_shapes(config):
        for part in parts_of(parameter, config):
            units.setdefault(part.unit, []).append(part)
    return tuple(Unit(name, tuple(parts)) for name, parts in units.items())
