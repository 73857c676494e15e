"""Which form of an operation a program has: that of the platform it is made for, and none of the others."""

import functools

import jax
import jax.numpy as jnp
import pytest
from builders import program_for

from grokjax.kernels import CachePlace, matmul, unembed, write
from grokjax.quantization import QuantizedArray, QuantizedTable

PLATFORMS = ("cpu", "gpu", "tpu")


def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_only_gpus_scatter_into_the_cache(platform: str) -> None:
    place = CachePlace(layer=shape(dtype="int32"), start=shape(3, dtype="int32"), count=shape(3, dtype="int32"))
    arrays = shape(2, 3, 4, 16, 8), shape(3, 4, 2, 8)
    text = program_for(platform, functools.partial(write, platform=platform), *arrays, place)
    assert ("stablehlo.scatter" in text) == (platform == "gpu")
    assert ("stablehlo.dynamic_update_slice" in text) == (platform != "gpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_only_cpus_multiply_in_blocks(platform: str) -> None:
    """Sizes for which there is no kernel: elsewhere it is one product on the slice."""
    w = QuantizedArray(shape(2, 96, 40, dtype="int8"), shape(2, 1, 40))
    layer = shape(dtype="int32")
    product = functools.partial(matmul, platform=platform)
    text = program_for(platform, lambda x, w, layer: product(x, w, at=(layer,)), shape(8, 96), w, layer)
    assert ("stablehlo.while" in text) == (platform == "cpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_only_cpus_multiply_the_table_as_integers(platform: str) -> None:
    table = QuantizedTable(shape(64, 16, dtype="int8"), shape(64))
    text = program_for(platform, functools.partial(unembed, platform=platform), shape(2, 16), table)
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert product.endswith("tensor<6x64xi32>" if platform == "cpu" else "tensor<2x64xf32>")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_only_cpus_pad_a_single_row_for_a_plain_table(platform: str) -> None:
    """For one row of bfloat16, XLA's CPU backend would cast the whole table."""
    arrays = shape(1, 16, dtype="bfloat16"), shape(64, 16, dtype="bfloat16")
    text = program_for(platform, functools.partial(unembed, platform=platform), *arrays)
    (product,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert product.endswith("tensor<2x64xf32>" if platform == "cpu" else "tensor<1x64xf32>")
