"""What a command says of the machine, beside the devices themselves, which test_cli.py sees it say."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from grokjax import make_mesh
from grokjax.cli import machine
from grokjax.cli.machine import describe_unseen, say_machine


@pytest.fixture
def _unasked() -> Iterator[None]:
    """Nobody has asked for CPUs; JAX has found no other devices."""
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", asked)


@pytest.mark.usefixtures("_unasked")
@pytest.mark.parametrize(
    ("trace", "remedy"),
    [
        ("proc/driver/nvidia/version", r"pip install '.[cuda]' in the checkout"),
        ("dev/nvidia0", r"pip install '.[cuda]' in the checkout"),
        ("dev/accel3", r"pip install '.[tpu]' in the checkout"),
        ("dev/kfd", "install JAX for it"),
    ],
)
def test_an_accelerator_that_jax_does_not_see_is_told(trace: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / trace).parent.mkdir(parents=True)
    (tmp_path / trace).touch()
    assert describe_unseen(tmp_path) == (
        f"this machine has an accelerator ({tmp_path / trace}) and JAX sees only CPUs: {remedy}, or set "
        "JAX_PLATFORMS=cpu."
    )


@pytest.mark.usefixtures("_unasked")
def test_a_machine_without_accelerators_is_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "dev" / "accel").mkdir(parents=True)  # the folder of other kinds, such as a laptop's
    (tmp_path / "dev" / "nvidiactl").touch()
    assert describe_unseen(tmp_path) is None


def test_who_asks_for_cpus_is_not_warned(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert jax.config.jax_platforms == "cpu"
    assert describe_unseen(tmp_path) is None


def test_a_command_warns_of_what_jax_does_not_see(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "describe_unseen", lambda: "this machine has more.")
    say_machine(make_mesh((1, 1)), weights="int8", dtype="bfloat16")
    assert [record.getMessage() for record in caplog.records] == ["this machine has more."]
