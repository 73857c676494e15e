"""The kernels for GPUs, run as plain JAX; and that a program for GPUs holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokjax import gpu_kernels
from grokjax.quantization import QuantizedArray, dequantize, matmul


def make(num_rows: int, contracted: int, outputs: int, blocks: int) -> tuple[jax.Array, QuantizedArray]:
    random = np.random.default_rng(num_rows)
    x = jnp.asarray(random.standard_normal((num_rows, contracted)), jnp.bfloat16)
    weight = jnp.asarray(random.integers(-127, 128, (3, 2, contracted, outputs)), jnp.int8)
    return x, QuantizedArray(weight, jnp.asarray(random.random((3, 2, blocks, outputs)), jnp.float32))


@pytest.mark.parametrize(
    ("num_rows", "contracted", "outputs", "blocks"),
    [(1, 64, 128, 1), (9, 128, 256, 1), (40, 384, 128, 2), (130, 1024, 128, 4), (16, 1024, 128, 1)],
)
def test_product(num_rows: int, contracted: int, outputs: int, blocks: int) -> None:
    x, w = make(num_rows, contracted, outputs, blocks)
    at = (jnp.int32(2), jnp.int32(1))
    assert gpu_kernels.fits(x, w.weight, w.scales)
    found = gpu_kernels.int8_matmul(x, w.weight, w.scales, at, interpret=True)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(w)[2, 1], np.float64)
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"contracted": 96}, False),  # no whole steps
        ({"contracted": 128, "blocks": 4}, False),  # none in a scale block
        ({"outputs": 64}, False),
    ],
)
def test_sizes_that_fit(change: dict[str, int], fits: bool) -> None:
    x, w = make(**({"num_rows": 16, "contracted": 128, "outputs": 128, "blocks": 2} | change))
    assert gpu_kernels.fits(x, w.weight, w.scales) == fits
    assert not gpu_kernels.fits(x.astype(jnp.float32), w.weight, w.scales)


@pytest.mark.parametrize(("contracted", "blocks"), [(6144, 1), (6144, 8), (4096, 1), (768, 1), (64, 1), (448, 7)])
@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize("programs", [1, 32, 1000])
def test_parts(contracted: int, blocks: int, tile: int, programs: int) -> None:
    """Each is whole steps of one scale block, or whole scale blocks, and their sums are not many."""
    parts = gpu_kernels._num_parts(contracted, blocks, tile=tile, programs=programs)
    part, scale_rows = contracted // parts, contracted // blocks
    assert parts * part == contracted
    assert part % scale_rows == 0 or (scale_rows % part == 0 and part % 64 == 0)
    assert parts == 1 or 4 * parts * tile <= contracted / 2
    if programs >= 256:
        assert parts == 1


@pytest.mark.parametrize(("num_rows", "kernels"), [(8, 0), (9, 1)])
def test_programs_for_gpus(num_rows: int, kernels: int) -> None:
    """From nine rows on the product is a kernel, which is given the whole stack; up to eight it is plain XLA."""
    x, w = make(num_rows, 128, 128, 1)
    with jax.sharding.use_abstract_mesh(an_h100()):
        traced = jax.jit(lambda x, w, i: matmul(x, w, at=(i, i))).trace(x, w, jnp.int32(0))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == kernels
    assert ("dynamic_slice" in text) == (not kernels)


def an_h100() -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.AbstractMesh((), (), abstract_device=device)
