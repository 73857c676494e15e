"""What the reader of compiled programs says of transfers between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grokjax.program import _transfers, read_program
from grokjax.sharding import make_mesh


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
def test_groups_of_a_transfer(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    """All forms in which compilers write them."""
    line = f"  %sum = f32[4]{{0}} all-reduce(%x), channel_id=1, {text}, use_global_device_ids=true"
    [transfer] = _transfers(line, 4)
    assert transfer.groups == groups
    assert transfer.num_devices == len(groups[0])
    assert transfer.is_between(2) is (groups != ((0, 1), (2, 3)))


@pytest.mark.parametrize("axes", [("data",), ("model",), ("data", "model")], ids=str)
def test_groups_as_the_installed_compiler_writes_them(axes: tuple[str, ...]) -> None:
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
