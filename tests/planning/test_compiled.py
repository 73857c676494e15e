"""What the reader of compiled programs says of transfers between devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import FULLY
from jax.sharding import PartitionSpec as P

from grokjax.cache import KVCache
from grokjax.config import GrokConfig
from grokjax.model import abstract_model, decode
from grokjax.planning import Program, read_program
from grokjax.planning.compiled import read_transfers
from grokjax.sharding import Partitioner, make_mesh


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['data'=2,'model'=2] {'model'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['data'=2,'model'=2] {'data'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['data'=2,'model'=2] {'data','model'}", ((0, 1, 2, 3),)),
        ("replica_groups={}", ((0, 1, 2, 3),)),
    ],
)
def test_groups_are_read_in_every_form(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    """All forms in which compilers write them."""
    line = f"  %sum = f32[4]{{0}} all-reduce(%x), channel_id=1, {text}, use_global_device_ids=true"
    [transfer] = read_transfers(line, 4)
    assert transfer.groups == groups
    assert transfer.num_devices == len(groups[0])
    assert transfer.is_between(2) is (groups != ((0, 1), (2, 3)))


@pytest.mark.parametrize("axes", [("data",), ("model",), ("data", "model")], ids=str)
def test_groups_are_read_as_the_installed_compiler_writes_them(axes: tuple[str, ...]) -> None:
    def exchange(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.psum(x, axes), jax.lax.ppermute(x, axes[0], [(0, 1), (1, 0)])

    run = jax.shard_map(exchange, mesh=make_mesh((2, 4)), in_specs=P(), out_specs=P(), check_vma=False)
    program = read_program(jax.jit(run).lower(jnp.zeros(4)).compile())
    transfers = {transfer.kind: transfer for transfer in program.transfers}
    devices = np.arange(8).reshape(2, 4)
    expected = {("data",): devices.T, ("model",): devices, ("data", "model"): devices.reshape(1, 8)}[axes]
    assert transfers["all-reduce"].groups == tuple(map(tuple, expected.tolist()))
    step = 1 if axes == ("model",) else 4
    assert set(transfers["collective-permute"].groups) >= {(0, step), (step, 0)}


def test_a_program_from_the_cache_on_disk_says_what_it_said_when_it_was_compiled() -> None:
    """So that plans, and tests of them, may take from the cache of a whole run what they read."""
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    config = GrokConfig.tiny().replace(num_layers=1, vocab_size=520)  # sizes that no other test has compiled
    partitioner = Partitioner.create(config, make_mesh((2, 4)), FULLY)
    model = abstract_model(config, partitioner, dtype=jnp.float32, quantized=True)
    cache = KVCache.abstract(config, 2, 24, mesh=partitioner.mesh)

    def compile_step() -> Program:
        jax.clear_caches()
        return read_program(jax.jit(decode, donate_argnums=2).lower(model, np.ones(2, np.int32), cache).compile())

    first, second = compile_step(), compile_step()
    assert "/jax/compilation_cache/cache_hits" in events
    assert dataclasses.replace(second, values=()) == dataclasses.replace(first, values=())
    assert sorted(map(str, second.values)) == sorted(map(str, first.values))
    assert first.collectives["all-gather"] > 0
