"""What prints of arrays and of what holds them: dtype, shape, mesh axes and bytes; never their numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope

from grokjax import GrokConfig, KVCache, QuantizedArray, make_mesh, quantize
from grokjax.printing import describe, describe_devices
from grokjax.quantization import QuantizedTable
from grokjax.sharding import Partitioner

TINY = GrokConfig.tiny()


@pytest.mark.parametrize(
    ("mesh", "axes", "text"),
    [
        ((2, 4), (None, "heads"), "float32[2,8@model]"),
        ((2, 4), ("batch", None), "float32[2@data,8]"),
        ((1, 8), (None, "heads"), "float32[2,8@model]"),
        ((8, 1), (None, "heads"), "float32[2,8]"),  # no axis of several devices splits it
    ],
)
def test_an_array_prints_its_type_and_the_axes_that_split_it(
    mesh: tuple[int, int], axes: tuple[str | None, ...], text: str
) -> None:
    sharding = Partitioner.create(TINY, make_mesh(mesh)).sharding(axes, (2, 8))
    assert describe(jax.device_put(np.zeros((2, 8), np.float32), sharding)) == text
    assert describe(jax.ShapeDtypeStruct((2, 8), np.float32, sharding=sharding)) == text


def test_arrays_of_any_kind_print() -> None:
    axes = jax.sharding.PartitionSpec(None, ("data", "model"))
    split = jax.device_put(np.zeros((2, 8), np.int8), jax.sharding.NamedSharding(make_mesh((2, 4)), axes))
    assert describe(split) == "int8[2,8@(data,model)]"
    assert describe_devices(split) == "16 Bytes, 2 Bytes on each of 8 devices"
    assert describe(np.zeros((2, 3), bool)) == "bool[2,3]"
    assert describe(jax.random.key(0)) == "key<fry>[]"
    assert describe(None) == "None"
    seen = []
    jax.jit(lambda x: seen.append(describe(x)))(jnp.zeros((4,)))
    assert seen == ["float32[4]"]


def test_quantised_arrays_print_no_numbers() -> None:
    array = quantize(jnp.ones((16, 4)), num_blocks=2)
    assert repr(array) == "QuantizedArray(weight=int8[16,4], scales=float32[2,4], 96 Bytes)"
    assert treescope.render_to_text(array) == repr(array)
    table = QuantizedTable(jnp.ones((3, 2), jnp.int8), jnp.ones(3))
    assert repr(table) == "QuantizedTable(weight=int8[3,2], scales=float32[3], 18 Bytes)"
    assert repr(QuantizedArray("heads", None)) == "QuantizedArray(weight='heads', scales=None, 0 Bytes)"  # as in trees


def test_a_cache_prints_how_much_of_it_is_filled() -> None:
    cache = KVCache.create(TINY, 4, 32, mesh=make_mesh((2, 4)))
    cache = dataclasses.replace(cache, lengths=jnp.array([3, 0, 32, 1]))
    lines = repr(cache).splitlines()
    assert lines == [
        "KVCache( # 128.0 KiB, 16.0 KiB on each of 8 devices",
        "  keys=float32[2,4@data,4@model,32,16],",
        "  values=float32[2,4@data,4@model,32,16],",
        "  lengths=[3, 0, 32, 1] of 32,",
        ")",
    ]
    assert treescope.render_to_text(cache).split() == repr(cache).split()


def test_a_cache_of_many_rows_prints_its_shortest_and_longest() -> None:
    cache = dataclasses.replace(KVCache.create(TINY, 100, 8, dtype="int8"), lengths=jnp.arange(100) % 7 + 1)
    assert "lengths=1 to 7 of 8," in repr(cache)
    assert "keys=QuantizedEntries(numbers=int8[2,100,4,8,16], scales=float32[2,100,4,8], 125.0 KiB)," in repr(cache)


def test_a_cache_prints_where_its_lengths_are_not_known() -> None:
    assert "lengths=int32[4]," in repr(KVCache.abstract(TINY, 4, 32))
    seen = []
    jax.jit(lambda cache: seen.append(repr(cache)))(KVCache.create(TINY, 4, 32))
    assert "lengths=int32[4]," in seen[0]
    with jax.transfer_guard("disallow"):
        assert "lengths=[0] of 8" in repr(KVCache.create(TINY, 1, 8))
