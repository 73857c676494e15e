"""The products of stacks for GPUs, run as plain JAX; and that a program for GPUs holds them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import program_for

from grokjax.kernels import matmul, matmul_gpu, matmuls
from grokjax.kernels.products import KERNEL_ROWS, direct_matmul, gpu_matmuls
from grokjax.quantization import QuantizedArray, dequantize


def make_weight(contracted: int, outputs: int, blocks: int, seed: int = 0) -> QuantizedArray:
    random = np.random.default_rng(seed)
    weight = jnp.asarray(random.integers(-127, 128, (3, 2, contracted, outputs)), jnp.int8)
    return QuantizedArray(weight, jnp.asarray(random.random((3, 2, blocks, outputs)), jnp.float32))


def make_rows(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(shape[-2]).standard_normal(shape), jnp.bfloat16)


def expected(x: jax.Array, w: QuantizedArray | jax.Array, at: jax.Array) -> np.ndarray:
    whole = np.asarray(dequantize(w), np.float64)
    return np.stack([np.asarray(x[i if len(x) > 1 else 0], np.float64) @ whole[tuple(at[i])] for i in range(len(at))])


def assert_close(found: jax.Array, exact: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found), exact, atol=2e-6 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize(
    ("num_rows", "contracted", "outputs", "blocks"),
    [(1, 64, 128, 1), (9, 128, 256, 1), (40, 384, 128, 2), (130, 1024, 128, 4), (16, 1024, 256, 1)],
)
def test_product_is_its_definition(num_rows: int, contracted: int, outputs: int, blocks: int) -> None:
    x, w = make_rows(1, num_rows, contracted), make_weight(contracted, outputs, blocks)
    at = jnp.array([[2, 1]], jnp.int32)
    assert matmul_gpu.fits(x[0], [w])
    (found,) = matmul_gpu.stack_matmul(x, [w], at, interpret=True)
    assert_close(found, expected(x, w, at))


@pytest.mark.parametrize("is_shared", [False, True])
def test_groups_are_multiplied_with_weights_of_their_own(is_shared: bool) -> None:
    """Several weights and groups in one kernel, a plain weight beside one in int8, one group not wanted."""
    x, at = make_rows(1 if is_shared else 4, 20, 128), jnp.array([[0, 1], [2, 0], [2, 0], [1, 1]], jnp.int32)
    weights = [make_weight(128, outputs, 1, seed=outputs) for outputs in (256, 128)]
    weights[1] = dequantize(weights[1], jnp.bfloat16)
    wanted = jnp.array([True, False, True, True])
    assert matmul_gpu.fits(x[0], weights)
    found = matmul_gpu.stack_matmul(x, weights, at, is_wanted=wanted, num_wanted=3, interpret=True)
    for out, w in zip(found, weights, strict=True):
        assert out.shape == (4, 20, w.shape[-1])
        assert_close(out[wanted], expected(x, w, at)[wanted])


@pytest.mark.parametrize("num_rows", [1, KERNEL_ROWS + 1])
@pytest.mark.parametrize("blocks", [1, 2])
def test_few_and_many_rows_give_the_same_product(num_rows: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one kernel, and those after a cast, are what a product on the slice is, in the order of the weights."""
    for name in ("stack_matmul", "cast"):
        monkeypatch.setattr(matmul_gpu, name, functools.partial(getattr(matmul_gpu, name), interpret=True))
    x, at = make_rows(num_rows, 128), (jnp.int32(2), jnp.int32(1))
    weights = [make_weight(128, outputs, blocks, seed=outputs) for outputs in (128, 256)]
    weights += [dequantize(weights[0], jnp.bfloat16)] if blocks == 1 else []
    for found, w in zip(gpu_matmuls(x, weights, at), weights, strict=True):
        assert_close(found, np.asarray(direct_matmul(x, w, at), np.float64))


def test_cast_is_exact() -> None:
    w, at = make_weight(128, 384, 1).weight, jnp.array([2, 1], jnp.int32)
    found = matmul_gpu.cast(w, at, interpret=True)
    np.testing.assert_array_equal(found, w[2, 1].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"contracted": 96}, False),  # no whole steps
        ({"contracted": 128, "blocks": 4}, False),  # none in a scale block
        ({"outputs": 64}, False),
    ],
)
def test_fits_says_which_sizes_the_kernel_takes(change: dict[str, int], fits: bool) -> None:
    w = make_weight(**({"contracted": 128, "outputs": 128, "blocks": 2} | change))
    x = make_rows(16, w.shape[-2])
    assert matmul_gpu.fits(x, [w]) == fits
    assert not matmul_gpu.fits(x.astype(jnp.float32), [w])
    assert not matmul_gpu.fits(x, [w, w.refine(w.shape[-2])])


@pytest.mark.parametrize(
    ("layers", "dtype", "is_safe"),
    [(8, jnp.int8, True), (9, jnp.int8, False), (16, jnp.int8, False), (17, jnp.int8, True), (9, jnp.bfloat16, True)],
)
def test_stacks_whose_offsets_are_not_safe_do_not_fit(layers: int, dtype: type, is_safe: bool) -> None:
    """Between 2 and 4 GiB of int8 an offset has the sign of a negative number, and a kernel would read elsewhere."""
    stack = jax.ShapeDtypeStruct((layers, 2**14, 2**14), dtype)
    assert matmul_gpu.has_safe_offsets(stack) == is_safe
    scales = jax.ShapeDtypeStruct((layers, 1, 2**14), jnp.bfloat16)
    w = QuantizedArray(stack, scales) if dtype == jnp.int8 else stack
    assert matmul_gpu.fits(jax.ShapeDtypeStruct((1, 2**14), jnp.bfloat16), [w]) == is_safe


@pytest.mark.parametrize(("contracted", "blocks"), [(6144, 1), (6144, 8), (4096, 1), (768, 1), (64, 1), (448, 7)])
@pytest.mark.parametrize("num_rows", [1, 40, 128])
@pytest.mark.parametrize("programs", [1, 32, 1000])
def test_parts_are_whole_and_few(contracted: int, blocks: int, num_rows: int, programs: int) -> None:
    """Each is whole steps of one scale block, or whole scale blocks, and their sums are not many."""
    tile = matmul_gpu.choose_tile(num_rows, [make_weight(contracted, 128, blocks)])
    number = matmul_gpu.choose_num_parts(contracted, blocks, tile=tile, num_rows=num_rows, programs=programs)
    part, scale_rows = contracted // number, contracted // blocks
    assert number * part == contracted
    assert part % scale_rows == 0 or (scale_rows % part == 0 and part % 64 == 0)
    assert number == 1 or 4 * number * num_rows <= contracted / 3
    if programs >= matmul_gpu.ENOUGH_PROGRAMS:
        assert number == 1


@pytest.mark.parametrize(
    ("num_rows", "names"),
    [(1, ["stack_matmul"]), (KERNEL_ROWS, ["stack_matmul"]), (KERNEL_ROWS + 1, ["cast", "cast"])],
)
def test_programs_for_gpus_hold_the_kernels(num_rows: int, names: list[str]) -> None:
    """One kernel, which is given the whole stacks; for many rows one that casts before each of XLA's products."""
    w = make_weight(128, 128, 1)
    text = program_for(
        "gpu", lambda x, w, i: matmuls(x, (w, w), at=(i, i), platform="gpu"), make_rows(num_rows, 128), w, jnp.int32(0)
    )
    assert text.count("__gpu$xla.gpu.triton") == len(names)
    assert all(f'name = "{name}"' in text for name in names)


def test_a_weight_that_is_no_stack_needs_no_kernel() -> None:
    w, x = jax.tree.map(lambda leaf: leaf[0, 0], make_weight(128, 128, 1)), make_rows(3, 128)
    assert_close(matmul(x, w, platform="gpu"), np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64))
