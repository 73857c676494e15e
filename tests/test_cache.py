"""The cache: its making, and the rows that come and go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grokjax.cache import KVCache, QuantizedEntries, default_cache_dtype, entry_bytes
from grokjax.config import GrokConfig
from grokjax.sharding import make_mesh

TINY = GrokConfig.tiny()
ROWS, HEADS, NEW, DIM = 3, 2, 4, 2


def test_shape_sharding_and_dtype_are_as_documented() -> None:
    cache = KVCache.create(TINY, 4, 16, mesh=make_mesh((2, 4)))
    assert cache.keys.shape == cache.values.shape == (2, 4, 4, 16, 16)
    assert cache.keys.sharding.spec == P(None, "data", "model", None, None)
    assert (cache.batch_size, cache.max_len) == (4, 16)
    assert cache.keys.dtype == jnp.float32  # the default on CPUs
    assert KVCache.create(TINY, 1, dtype=jnp.bfloat16).keys.dtype == jnp.bfloat16
    assert KVCache.create(TINY, 1).max_len == TINY.max_seq_len
    np.testing.assert_array_equal(cache.lengths, np.zeros(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_int8_entry_of_what_is_no_number_is_not_finite(value: float, dtype: str) -> None:
    """Else an engine would go on drawing tokens from a model that computes NaN."""
    entries = np.random.default_rng(0).standard_normal((2, 64, 128))
    entries[1, 9, 3] = value
    quantized = jax.jit(QuantizedEntries.of)(jnp.asarray(entries, dtype))
    with np.errstate(invalid="ignore"):  # 0 times infinity
        found = np.isfinite(np.asarray(quantized.numbers, np.float32) * np.asarray(quantized.scales)[..., None])
    np.testing.assert_array_equal(found.all(axis=-1), ~np.isin(np.arange(128).reshape(2, 64), [64 + 9]))
    assert not found[1, 9].any()


@pytest.mark.parametrize(
    ("batch_size", "max_len", "message"),
    [
        (0, 8, "batch_size=0 must be an integer between 1 and 4194304"),
        (1, 0, "max_len=0 must be between 1 and max_seq_len=256"),
        ("one", 8, "batch_size='one' must be an integer"),
        (1, 8.5, r"max_len=8\.5 must be between 1 and max_seq_len=256"),
        (1, 257, "max_len=257 must be between 1 and max_seq_len=256"),
    ],
)
def test_impossible_caches_are_refused(batch_size: int, max_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache.create(TINY, batch_size, max_len)


def filled(batch_size: int, max_len: int, mesh: tuple[int, int], value: float) -> KVCache:
    cache = KVCache.create(TINY, batch_size, max_len, mesh=make_mesh(mesh))
    full = jax.tree.map(lambda leaf: leaf + jnp.asarray(value, leaf.dtype), cache)
    assert full.keys.sharding == cache.keys.sharding
    return full


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4), (8, 1)])
@pytest.mark.parametrize("row", [0, 2, 7])
def test_insert_replaces_one_row(mesh: tuple[int, int], row: int) -> None:
    cache, one = filled(8, 12, mesh, 1), filled(1, 5, mesh, 3)
    after = cache.insert(one, row)
    others = [i for i in range(8) if i != row]
    for half in (after.keys, after.values):
        assert half.sharding.is_equivalent_to(cache.keys.sharding, half.ndim)
        half = np.asarray(half)
        assert (half[:, row, :, :5] == 3).all()
        assert (half[:, others] == 1).all()
    np.testing.assert_array_equal(after.lengths, np.where(np.arange(8) == row, 3, 1))


def test_reset_empties_one_row() -> None:
    np.testing.assert_array_equal(filled(3, 4, (1, 1), 2).reset(1).lengths, [2, 0, 2])


def test_rows_come_and_go_under_jit() -> None:
    cache, one = filled(3, 4, (1, 1), 1), filled(1, 4, (1, 1), 2)
    inserted = jax.jit(lambda cache, one, row: cache.insert(one, row).reset(row - 1))(cache, one, jnp.int32(2))
    np.testing.assert_array_equal(inserted.lengths, [1, 0, 2])


def test_rows_that_do_not_fit_are_refused() -> None:
    cache = filled(3, 4, (1, 1), 1)
    with pytest.raises(ValueError, match="row 3 is outside the cache's 3 rows"):
        cache.reset(3)
    with pytest.raises(ValueError, match=r"row 1\.5 is outside the cache's 3 rows"):
        cache.reset(1.5)
    with pytest.raises(ValueError, match="row -1 is outside the cache's 3 rows"):
        cache.insert(filled(1, 4, (1, 1), 1), -1)
    with pytest.raises(ValueError, match="one row and at most 4 entries, not 1 rows of 5"):
        cache.insert(filled(1, 5, (1, 1), 1), 0)
    with pytest.raises(ValueError, match="one row and at most 4 entries, not 2 rows of 4"):
        cache.insert(filled(2, 4, (1, 1), 1), 0)


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (TINY.replace(num_layers=1), r"\(1, 4, 16\)"),
        (TINY.replace(num_kv_heads=2), r"\(2, 2, 16\)"),
        (TINY.replace(num_kv_heads=8), r"\(2, 8, 16\)"),
        (TINY.replace(head_dim=8), r"\(2, 4, 8\)"),
    ],
)
def test_rows_of_another_model_are_refused(config: GrokConfig, theirs: str) -> None:
    """A smaller row would fit into a corner of this one, and leave the rest of it as it was."""
    with pytest.raises(ValueError, match=rf"head size\) {theirs} and this cache \(2, 4, 16\): create both"):
        filled(3, 4, (1, 1), 1).insert(KVCache.create(config, 1, 4), 0)


class TestInt8:
    def test_entries_are_half_a_scale_off_at_most(self) -> None:
        new = np.random.default_rng(0).standard_normal((ROWS, HEADS, NEW, DIM)).astype(np.float32)
        new[0, 0, 0] = 0
        entries = QuantizedEntries.of(jnp.asarray(new))
        np.testing.assert_allclose(entries.scales, np.abs(new).max(-1) / 127, rtol=1e-6)
        restored = np.asarray(entries.numbers, np.float32) * np.asarray(entries.scales)[..., None]
        assert (np.abs(restored - new) <= np.asarray(entries.scales)[..., None] * 0.50001).all()
        assert np.abs(entries.numbers).max() == 127

    def test_shape_sharding_and_bytes_are_as_documented(self) -> None:
        cache = KVCache.create(TINY, 4, 16, dtype="int8", mesh=make_mesh((2, 4)))
        assert (cache.keys.shape, cache.keys.scales.shape) == ((2, 4, 4, 16, 16), (2, 4, 4, 16))
        assert (cache.keys.dtype, cache.keys.scales.dtype) == (jnp.int8, jnp.float32)
        assert cache.values.numbers.sharding.spec == P(None, "data", "model", None, None)
        assert cache.values.scales.sharding.spec == P(None, "data", "model", None)
        one = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.keys)) / (2 * 4 * 4 * 16)
        assert entry_bytes(16, "int8") == one == 20
        assert entry_bytes(16, jnp.bfloat16) == 32

    def test_rows_come_with_their_scales(self) -> None:
        cache, one = (KVCache.create(TINY, rows, 4, dtype="int8") for rows in (3, 1))
        one = jax.tree.map(lambda leaf: leaf + jnp.asarray(2, leaf.dtype), one)
        after = cache.insert(one, 1)
        for stack in (after.keys, after.values):
            for leaf in jax.tree.leaves(stack):
                assert (np.asarray(leaf)[:, 1] == 2).all()
                assert not np.asarray(leaf)[:, [0, 2]].any()
        np.testing.assert_array_equal(after.lengths, [0, 2, 0])

    def test_other_dtypes_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"entries of float32 and this cache those of int8: create both"):
            KVCache.create(TINY, 2, 4, dtype="int8").insert(KVCache.create(TINY, 1, 4), 0)
        with pytest.raises(ValueError, match="the cache's dtype float16 must be float32, bfloat16 or int8"):
            KVCache.create(TINY, 2, 4, dtype=jnp.float16)


@pytest.mark.parametrize("float32", ["float32", jnp.float32, np.dtype(np.float32)], ids=str)
def test_a_cache_that_no_dtype_is_named_for_is_as_exact_as_its_model(float32: object) -> None:
    """On CPUs it is float32 in any case; the dtype of the model may be named in every way."""
    assert default_cache_dtype("gpu", float32) == default_cache_dtype("tpu", float32) == jnp.float32
    assert default_cache_dtype("gpu") == default_cache_dtype("tpu", "bfloat16") == jnp.bfloat16
    assert default_cache_dtype("cpu") == default_cache_dtype("cpu", "bfloat16") == jnp.float32
