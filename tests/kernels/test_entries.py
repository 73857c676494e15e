"""Entries of the cache: what is written where, and how a row is copied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokjax.cache import KVCache, QuantizedEntries
from grokjax.config import GrokConfig
from grokjax.kernels import CachePlace, copy_row, scatter_entries, write
from grokjax.sharding import Partitioner, make_mesh

TINY = GrokConfig.tiny()
LAYERS, ROWS, HEADS, LENGTH, NEW, DIM = 2, 3, 2, 10, 4, 2


def place_at(layer: int, start: list[int], count: list[int]) -> CachePlace:
    """All rows in order."""
    return CachePlace(layer=jnp.int32(layer), start=jnp.array(start, jnp.int32), count=jnp.array(count, jnp.int32))


@functools.cache
def compiled_write():
    return jax.jit(functools.partial(write, platform="cpu"))


@functools.cache
def compiled_scatter():
    return jax.jit(scatter_entries)


@pytest.mark.parametrize("num_new", [NEW, LENGTH])
@given(
    layer=st.integers(0, LAYERS - 1),
    start=st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS),
    count=st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 100),
)
def test_write_does_what_a_loop_would(num_new: int, layer: int, start: list[int], count: list[int], seed: int) -> None:
    """Every entry lands where it belongs, what lies beyond the end is dropped, all else stays as it was."""
    rng, count = np.random.default_rng(seed), [min(n, num_new) for n in count]
    stack = rng.standard_normal((LAYERS, ROWS, HEADS, LENGTH, DIM)).astype(np.float32)
    new = rng.standard_normal((ROWS, HEADS, num_new, DIM)).astype(np.float32)
    expected = stack.copy()
    for row in range(ROWS):
        for i in range(count[row]):
            if start[row] + i < LENGTH:
                expected[layer, row, :, start[row] + i] = new[row, :, i]
    place = place_at(layer, start, count)
    np.testing.assert_array_equal(compiled_write()(jnp.asarray(stack), jnp.asarray(new), place), expected)
    order = rng.permutation(ROWS)
    moved = dataclasses.replace(place, rows=jnp.asarray(order), start=place.start[order], count=place.count[order])
    for_gpus = compiled_scatter()(jnp.asarray(stack), jnp.asarray(new[order]), moved)
    np.testing.assert_array_equal(for_gpus, expected)
    scales = compiled_scatter()(jnp.asarray(stack[..., 0]), jnp.asarray(new[order, ..., 0]), moved)
    np.testing.assert_array_equal(scales, expected[..., 0])


def test_rows_held_elsewhere_are_not_written() -> None:
    """For GPUs: of rows that stand twice, those without new entries change nothing."""
    stack, new = np.zeros((1, 2, 1, 3, 1), np.float32), np.ones((3, 1, 1, 1), np.float32)
    place = dataclasses.replace(place_at(0, [0, 1, 0], [0, 1, 0]), rows=jnp.array([0, 0, 1]))
    found = compiled_scatter()(jnp.asarray(stack), jnp.asarray(new), place)
    np.testing.assert_array_equal(found[0, :, 0, :, 0], [[0, 1, 0], [0, 0, 0]])


@given(
    start=st.lists(st.integers(0, LENGTH), min_size=ROWS, max_size=ROWS),
    count=st.lists(st.integers(0, NEW), min_size=ROWS, max_size=ROWS),
)
def test_int8_entries_are_written_as_other_entries_are(start: list[int], count: list[int]) -> None:
    rng = np.random.default_rng(0)
    old = rng.standard_normal((LAYERS, ROWS, HEADS, LENGTH, DIM)).astype(np.float32)
    new = rng.standard_normal((ROWS, HEADS, NEW, DIM)).astype(np.float32)
    place = place_at(1, start, count)
    written = compiled_write()(QuantizedEntries.of(jnp.asarray(old)), jnp.asarray(new), place)
    expected = QuantizedEntries.of(compiled_write()(jnp.asarray(old), jnp.asarray(new), place))
    np.testing.assert_array_equal(written.numbers, expected.numbers)
    np.testing.assert_array_equal(written.scales, expected.scales)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 4), (8, 1)], ids=str)
def test_a_row_is_copied_wherever_it_lies(mesh: tuple[int, int], dtype: str) -> None:
    partitioner = Partitioner.create(TINY, make_mesh(mesh))
    stack = KVCache.create(TINY, 8, 4, dtype=dtype, mesh=partitioner.mesh).keys
    numbers = jnp.arange(8)
    stack = jax.tree.map(lambda leaf: leaf + numbers.astype(leaf.dtype).reshape(1, 8, *[1] * (leaf.ndim - 2)), stack)
    copy = jax.jit(functools.partial(copy_row, partitioner=partitioner))
    for source, target in ((6, 1), (0, 1), (7, 7)):
        rows = np.arange(8)
        rows[target] = source
        copied = copy(stack, source=jnp.int32(source), target=jnp.int32(target))
        for leaf, before in zip(jax.tree.leaves(copied), jax.tree.leaves(stack), strict=True):
            assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
            np.testing.assert_array_equal(leaf, np.asarray(before)[:, rows])
