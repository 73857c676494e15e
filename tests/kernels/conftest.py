"""Which products a CPU's processor makes, where a test must not depend on the processor."""

from collections.abc import Callable, Iterator

import jax
import pytest

_USERS_OF_PLANES = ("matmul_cpu.takes_planes", "unembedding.takes_planes")
_USERS_OF_ROWS = (
    "matmul_cpu.summed_rows",
    "experts.summed_rows",
    "unembedding.summed_rows",
    "unembedding.integer_rows",
)


def _answer(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], answer: Callable[..., bool | int]
) -> Iterator[None]:
    """Has some functions answer otherwise, where the kernels ask them."""
    for name in names:
        monkeypatch.setattr(f"grokjax.kernels.{name}", answer)
    jax.clear_caches()  # what was traced with another answer
    yield
    jax.clear_caches()


@pytest.fixture
def planes_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that multiplies integers faster, whatever the number of rows and their dtype."""
    yield from _answer(monkeypatch, _USERS_OF_PLANES, lambda num_rows, dtype: True)


@pytest.fixture
def planes_nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that multiplies bfloat16 faster than integers."""
    yield from _answer(monkeypatch, _USERS_OF_PLANES, lambda num_rows, dtype: False)


@pytest.fixture
def core_for_each_device(monkeypatch: pytest.MonkeyPatch, planes_nowhere: None) -> Iterator[None]:
    """As on one with AVX-512, and no AMX, that is a device for each of its cores: four rows are sums, five are cast."""
    yield from _answer(monkeypatch, _USERS_OF_ROWS, lambda: 4)
