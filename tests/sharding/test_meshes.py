"""How meshes are made, which is taken where none is named, and what of any other kind is one."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.model import forward, init, prefill
from grokjax.sharding import ShardingRules, default_extents, default_mesh, make_mesh, spread_over_hosts

TINY = GrokConfig.tiny()
SMALL = TINY_DENSE


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4), (8, 1), (1, 2)])
def test_mesh_has_the_named_axes(shape: tuple[int, int]) -> None:
    mesh = make_mesh(shape)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("local", "between_hosts", "message"),
    [
        ((3, 4), (1, 1), "needs 12 devices and there are 8"),
        ((1, 4), (1, 4), "needs 16 devices and there are 8"),
        ((1, 2), (1, 2), "needs 4 devices and there are 8"),
        ((0, 8), (1, 1), r"local=\(0, 8\) must be two integers, 1 or more: .* along data and model, such as \(1, 8\)"),
        ((1, 2, 4), (1, 1), r"local=\(1, 2, 4\) must be two integers"),
        ("1,8", (1, 1), "local='1,8' must be two integers"),
        ((1, 8), (1, 2.0), r"between_hosts=\(1, 2\.0\) must be two integers"),
        ((1, 4), (1, 2), r"between_hosts=\(1, 2\) needs 2 hosts and the devices belong to 1"),
    ],
)
def test_impossible_meshes_are_refused(local: tuple[int, int], between_hosts: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(local, between_hosts)


def test_a_mesh_that_leaves_out_a_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the others without end; devices that are named may be those of one process."""
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ValueError, match=r"leaves out all devices of process 1: .* between_hosts=\(2, 1\)"):
        make_mesh((1, 4))
    with pytest.raises(ValueError, match=r"needs 2 devices and there are 8: over several hosts .* all of them"):
        make_mesh((1, 1), (1, 2))
    monkeypatch.undo()
    assert make_mesh((1, 4), devices=jax.devices()[4:]).devices.tolist() == [jax.devices()[4:]]


def test_without_a_mesh_a_model_and_its_cache_lie_on_all_devices() -> None:
    with jax.default_device(None):
        model, cache = init(SMALL, dtype=jnp.float32), KVCache.create(SMALL, 1, 8)
        assert model.partitioner.mesh == default_mesh(SMALL) == cache.keys.sharding.mesh == make_mesh((1, 8))
        logits, _ = prefill(model, [[7, 8, 9]], [3], cache)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("device", [jax.devices()[3], "cpu"], ids=str)
def test_a_default_device_that_the_user_has_set_is_the_whole_mesh(device: jax.Device | str) -> None:
    with jax.default_device(device):
        (found,) = KVCache.create(TINY, 1, 8).keys.devices()
        assert found == (jax.devices()[0] if device == "cpu" else device)
        assert default_mesh(TINY).devices.tolist() == [[found]]


@pytest.mark.parametrize(
    ("changes", "rules", "extents"),
    [
        ({}, {}, (1, 8)),
        ({"num_heads": 12}, {}, (1, 4)),
        ({"num_heads": 12}, {"heads": None, "kv_heads": None}, (1, 8)),
        ({"num_experts": 4}, {"experts": "model", "ffn": None}, (1, 4)),
        ({"vocab_size": 510, "num_heads": 12, "num_kv_heads": 6, "ffn_dim": 96}, {}, (1, 6)),
    ],
    ids=str,
)
def test_the_default_mesh_has_as_many_devices_as_divide_the_sizes(
    changes: dict[str, int], rules: dict[str, str | None], extents: tuple[int, int]
) -> None:
    with jax.default_device(None):
        assert default_mesh(TINY.replace(**changes), ShardingRules().replace(**rules)).devices.shape == extents


def test_over_several_hosts_the_default_mesh_leaves_no_device_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_extents(TINY, None, 16, uses_all=True) == (2, 8)
    assert default_extents(TINY.replace(num_heads=12), None, 6, uses_all=True) == (3, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="3 hosts cannot share a mesh of 2 x 4: make one of the numbers a multiple"):
        spread_over_hosts(2, 4)


@pytest.mark.parametrize(
    "mesh",
    [
        jax.make_mesh((2, 4), ("data", "model")),
        jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Explicit)),
        Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Manual,) * 2),
        Mesh(np.array(jax.devices()).reshape(2, 4).T, ("model", "data")),
        jax.make_mesh((2, 1, 4), ("data", "unused", "model")),
    ],
    ids=["explicit", "mixed", "manual", "transposed", "three axes"],
)
def test_a_mesh_of_any_kind_makes_the_same_model(mesh: Mesh) -> None:
    tokens = np.arange(1, 13).reshape(2, 6)
    expected = forward(init(SMALL, dtype=jnp.float32, mesh=make_mesh((2, 4))), tokens)
    np.testing.assert_array_equal(forward(init(SMALL, dtype=jnp.float32, mesh=mesh), tokens), expected)


def test_shapes_need_no_devices() -> None:
    mesh = AbstractMesh((2, 4), ("data", "model"))
    cpu = AbstractMesh((2, 4), ("data", "model"), abstract_device=AbstractDevice("cpu", num_cores=None, platform="cpu"))
    on_devices = KVCache.abstract(TINY, 2, 8, mesh=make_mesh((2, 4)))
    for cache in (KVCache.abstract(TINY, 2, 8, mesh=mesh, dtype=jnp.float32), KVCache.abstract(TINY, 2, 8, mesh=cpu)):
        assert cache.keys.dtype == on_devices.keys.dtype
        assert cache.keys.sharding.spec == on_devices.keys.sharding.spec
    assert jax.tree.leaves(jax.eval_shape(lambda: init(SMALL, mesh=mesh)))[0].shape == (512, 64)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda mesh: init(SMALL, mesh=mesh),
            "which has no devices: give a Mesh of devices, such as make_mesh makes",
        ),
        (lambda mesh: KVCache.create(TINY, 2, 8, mesh=mesh, dtype=jnp.float32), "which has no devices: give a Mesh"),
        (lambda mesh: KVCache.abstract(TINY, 2, 8, mesh=mesh), "does not say for which devices.*name that dtype"),
        (
            lambda _: init(SMALL, mesh=(2, 4)),
            r"mesh=\(2, 4\) is a tuple and must be a jax.sharding.Mesh: make one",
        ),
        (
            lambda _: init(SMALL, mesh=jax.make_mesh((8,), ("x",))),
            r"has \('x',\): name one of these in the rule, or",
        ),
    ],
)
def test_meshes_that_cannot_be_are_refused(ask: Callable[[AbstractMesh], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(AbstractMesh((2, 4), ("data", "model")))
