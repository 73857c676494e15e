"""What a conversion does with the weights of one matrix: keeps, quantises or dequantises them, in little memory."""

import dataclasses
import functools
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import jax
import ml_dtypes
import numpy as np

from grokjax.checkpoint.parameters import Part, find_parameter
from grokjax.checkpoint.stored import Array, ArraySpec, Checkpoint, TensorSpec
from grokjax.quantization import QuantizedArray, dequantize, quantize
from grokjax.request import check_integer

WeightFormat = Literal["keep", "int8", "bfloat16", "float32"]
Leaves = dict[str, Array]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Columns are converted so many bytes of float32 at a time: quantising takes a few times that.
SLICE_BYTES = 32 << 20
# What is only cast is read so many bytes at a time.
CAST_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a conversion does with the weights.

    Attributes:
      weights: `keep` leaves every array as it is; `int8` quantises float weights of attention and experts;
        `bfloat16` and `float32` make everything plain in that dtype, norms and router excepted.
      scale_blocks: Q of the weights that are quantised here, along the contracting axis; must divide it.

    Raises:
      ValueError: `weights` is none of these, or `scale_blocks` is no number.
    """

    weights: WeightFormat = "keep"
    scale_blocks: int = 1

    def __post_init__(self) -> None:
        if self.weights not in get_args(WeightFormat):
            raise ValueError(f"weights={self.weights!r}: choose one of {', '.join(get_args(WeightFormat))}.")
        check_integer("scale_blocks", self.scale_blocks, 1)

    @classmethod
    def of_origin(cls, origin: Mapping[str, Any]) -> Self:
        """The recipe that a checkpoint's manifest tells of; one that was saved and not converted was kept as it is."""
        return cls(origin.get("weights", "keep"), origin.get("scale_blocks", 1))

    def result(self, parameter: str, spec: TensorSpec) -> TensorSpec:
        """What becomes of a parameter.

        Raises:
          ValueError: The scale blocks do not divide its rows.
        """
        shape, row = spec.weight.shape, find_parameter(parameter)
        if self.weights == "int8" and row.is_quantizable and spec.scales is None:
            if shape[-2] % self.scale_blocks:
                blocks = reprlib.repr(self.scale_blocks)
                raise ValueError(
                    f"scale_blocks={blocks} does not divide the {shape[-2]} rows of {parameter}: choose a divisor."
                )
            scales = ArraySpec((*shape[:-2], self.scale_blocks, shape[-1]), np.dtype(np.float32))
            return TensorSpec(ArraySpec(shape, np.dtype(np.int8)), scales)
        if self.weights in ("bfloat16", "float32") and (row.is_quantizable or row.kind == "table"):
            return TensorSpec(ArraySpec(shape, _BFLOAT16 if self.weights == "bfloat16" else np.dtype(np.float32)), None)
        return spec

    def check_processor(self) -> None:
        """Looks for the processor, on which weights are rounded.

        Raises:
          ValueError: JAX may not use it, and they are to be rounded.
        """
        if self.weights != "keep":
            _processor()

    def apply(self, leaves: Leaves, spec: TensorSpec) -> Leaves:
        """Turns the arrays of a part into those of `spec`."""
        if spec.scales is not None and "scales" not in leaves:
            return _by_columns(leaves, spec, functools.partial(_quantize, num_blocks=self.scale_blocks))
        if spec.scales is None and ("scales" in leaves or leaves["weight"].dtype != spec.weight.dtype):
            return _by_columns(leaves, spec, functools.partial(_dequantize, dtype=spec.weight.dtype.name))
        return leaves

    def convert(self, checkpoint: Checkpoint, part: Part, spec: TensorSpec) -> Leaves:
        """Reads a part of a checkpoint as what it becomes.

        Args:
          checkpoint: of any layout.
          part: of it.
          spec: of the result for this part, of those that `result` gives.
        """
        tensor = checkpoint.tensors[part.parameter]
        if tensor.scales is not None or spec.scales is not None or tensor.weight.dtype == spec.weight.dtype:
            return self.apply(read_part(checkpoint, part), spec)
        # A cast takes some rows at a time, so that the table is not there twice.
        result = np.empty(spec.weight.shape, spec.weight.dtype)
        step = max(1, CAST_BYTES * len(result) // result.nbytes)
        for start in range(0, len(result), step):
            result[start : start + step] = tensor.weight.read((*part.index, slice(start, start + step)))
        return {"weight": result}


def read_part(checkpoint: Checkpoint, part: Part) -> Leaves:
    """The arrays of one part of a checkpoint, as they are stored."""
    tensor = checkpoint.tensors[part.parameter]
    leaves = {"weight": tensor.weight.read(part.index)}
    return leaves if tensor.scales is None else leaves | {"scales": tensor.scales.read(part.index)}


def _by_columns(leaves: Leaves, spec: TensorSpec, change: Any) -> Leaves:
    """Applies `change` to slices of columns, which are independent of each other, on the CPU."""
    results = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in spec.leaves().items()}
    rows, columns = spec.weight.shape
    step = max(1, SLICE_BYTES // (4 * rows))
    with jax.default_device(_processor()), jax.transfer_guard("allow"):
        for start in range(0, columns, step):
            block = {name: np.ascontiguousarray(leaf[:, start : start + step]) for name, leaf in leaves.items()}
            for name, result in change(block).items():
                results[name][:, start : start + step] = result
    return results


def _processor() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        named = jax.config.values["jax_platforms"] or ""
        if "cpu" in named.split(","):
            raise  # JAX says which of the others it cannot find
        raise ValueError(
            f"weights are rounded on the processor, which JAX_PLATFORMS={named} leaves out: add it, as in {named},cpu."
        ) from error


@functools.partial(jax.jit, static_argnames="num_blocks")
def _quantize(leaves: Mapping[str, jax.Array], *, num_blocks: int) -> dict[str, jax.Array]:
    result = quantize(leaves["weight"], num_blocks=num_blocks)
    return {"weight": result.weight, "scales": result.scales}


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(leaves: Mapping[str, jax.Array], *, dtype: str) -> dict[str, jax.Array]:
    weight = leaves["weight"]
    return {"weight": dequantize(QuantizedArray(weight, leaves["scales"]) if "scales" in leaves else weight, dtype)}
