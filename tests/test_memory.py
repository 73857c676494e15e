"""What devices have left, and who asks before anything is made."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
import pytest
from builders import TINY_DENSE, random_model

from grokjax import Engine, Grok, KVCache, TextGenerator, generate, init, load, make_mesh, save
from grokjax.memory import bytes_left, check_fits, host_bytes_left
from grokjax.tokenizer import ByteTokenizer

CONFIG = TINY_DENSE
MIB = 1 << 20


def device(platform: str, stats: dict[str, int] | None) -> Any:
    return types.SimpleNamespace(platform=platform, device_kind=f"A {platform}", memory_stats=lambda: stats)


def test_accelerators_tell_what_they_have_left() -> None:
    gpus = [device("gpu", {"bytes_limit": 80, "bytes_in_use": used, "num_allocs": 1}) for used in (10, 30, 20)]
    assert bytes_left(gpus) == 50
    assert bytes_left(gpus[:1]) == 70


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}])
def test_what_a_device_does_not_tell_refuses_nothing(stats: dict[str, int] | None) -> None:
    assert bytes_left([device("tpu", stats)]) is None
    mesh: Any = types.SimpleNamespace(local_devices=[device("tpu", stats)])
    check_fits("a model", 1 << 60, mesh, remedy="take less")


def test_devices_of_a_cpu_share_its_host(has_left: Callable[[int], None]) -> None:
    has_left(80 * MIB)
    assert bytes_left(jax.devices()) == 10 * MIB
    assert bytes_left(jax.devices()[:1]) == 80 * MIB


def test_a_process_that_has_none_of_the_devices_is_not_asked() -> None:
    assert bytes_left([]) is None


GROUPS = {
    "2": ("0::/jobs/mine\n", "sys/fs/cgroup", "memory.max", "memory.current", ""),
    "1": (
        "9:pids:/\n4:cpu,memory:/jobs/mine\n",
        "sys/fs/cgroup/memory",
        *("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ),
}


@pytest.mark.parametrize("version", GROUPS)
def test_the_limit_of_a_container_counts(version: str, tmp_path: Path, has_left: Callable[[int], None]) -> None:
    """The smallest of those around a process; pages of files make room."""
    has_left(1000)
    own, folder, limit, usage, prefix = GROUPS[version]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(own)
    assert host_bytes_left(tmp_path) == 1000
    group = tmp_path / folder / "jobs" / "mine"
    group.mkdir(parents=True)
    (group / limit).write_text("max\n")
    assert host_bytes_left(tmp_path) == 1000
    for member, most, used in ((group, 900, 500), (group.parent, 700, 600)):
        (member / limit).write_text(f"{most}\n")
        (member / usage).write_text(f"{used}\n")
    assert host_bytes_left(tmp_path) == 100
    (group.parent / "memory.stat").write_text(f"{prefix}inactive_file 200\n{prefix}active_file 30\nother 5\n")
    assert host_bytes_left(tmp_path) == 330
    (group / usage).write_text("901\n")
    assert host_bytes_left(tmp_path) == 0


@pytest.fixture
def has_left(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the host have so many bytes left."""

    def leave(num_bytes: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=num_bytes))

    return leave


@pytest.fixture(scope="module")
def model() -> Grok:
    return random_model(CONFIG, dtype=jnp.float32)


@pytest.fixture(scope="module")
def saved(model: Grok, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save(model, path)
    return path


ASKED: dict[str, tuple[Callable[..., Any], str]] = {
    "init": (
        lambda model, saved, **o: init(CONFIG, dtype=jnp.float32, **o),
        "a model needs .*: take more devices, or larger ones",
    ),
    "load": (
        lambda model, saved, **o: load(saved, dtype=jnp.float32, **o),
        "a model needs .*: take more devices, or larger ones",
    ),
    "cache": (
        lambda model, saved, **o: KVCache.create(CONFIG, 3, 16, **o),
        r"a cache of batch_size=3, max_len=16 needs 24\.0 KiB on one device \(cpu\), and 2\.0 KiB is left there: take",
    ),
    "engine": (
        lambda model, saved, **o: Engine(model, slots=2, max_len=16, **o),
        "an engine of slots=2, max_len=16 needs .*: take fewer slots, a smaller max_len",
    ),
    "generator": (
        lambda model, saved, **o: TextGenerator(model, ByteTokenizer(512), max_len=16, **o).generate(
            "a", max_new_tokens=1
        ),
        "an engine of slots=1, max_len=16 needs",
    ),
    "generate": (
        lambda model, saved, **o: generate(model, [[5, 6, 7]], [3], max_new_tokens=2, **o),
        "a cache of batch_size=1, max_len=5 needs",
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_does_not_fit_is_refused_and_may_be_tried(
    what: str, model: Grok, saved: Path, has_left: Callable[[int], None]
) -> None:
    make, message = ASKED[what]
    has_left(2048)
    with pytest.raises(
        ValueError, match=rf"^{message}.*, or give allow_oom=True \(--allow-oom\) to try all the same\.$"
    ):
        make(model, saved)
    make(model, saved, allow_oom=True)
    has_left(1 << 40)
    make(model, saved)


def test_devices_of_one_host_are_counted_together(has_left: Callable[[int], None]) -> None:
    """Each holds its shard, and the host all of them."""
    whole = KVCache.abstract(CONFIG, 8, 16, mesh=make_mesh((1, 4)))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((whole.keys, whole.values)))
    has_left(needed - 8)
    with pytest.raises(ValueError, match=r"needs 16\.0 KiB on each of 4 devices \(cpu\), and 16\.0 KiB is left there"):
        whole.allocate()
    has_left(needed + 4 * 8 * 4)
    assert whole.allocate().keys.shape == whole.keys.shape


def test_shapes_alone_need_no_memory(has_left: Callable[[int], None]) -> None:
    has_left(0)
    assert jax.eval_shape(lambda: init(CONFIG)).config == CONFIG
    assert jax.eval_shape(lambda: KVCache.create(CONFIG, 3, 16)).batch_size == 3


def test_an_engine_of_three_million_slots_is_refused_in_a_sentence(
    model: Grok, has_left: Callable[[int], None]
) -> None:
    has_left(24 << 30)
    with pytest.raises(ValueError, match=r"an engine of slots=3000000, max_len=256 needs 377\.7 GiB on one device"):
        Engine(model, slots=3_000_000)
