"""Which products a CPU's processor makes, where a test must not depend on the processor."""

from collections.abc import Iterator

import jax
import pytest


def _answer(monkeypatch: pytest.MonkeyPatch, answer: bool) -> Iterator[None]:
    for user in ("matmul_cpu", "unembedding"):
        monkeypatch.setattr(f"grokjax.kernels.{user}.takes_planes", lambda num_rows, dtype: answer)
    jax.clear_caches()  # what was traced with another answer
    yield
    jax.clear_caches()


@pytest.fixture
def planes_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that multiplies integers faster, whatever the number of rows and their dtype."""
    yield from _answer(monkeypatch, answer=True)


@pytest.fixture
def planes_nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that multiplies bfloat16 faster than integers."""
    yield from _answer(monkeypatch, answer=False)


@pytest.fixture
def core_for_each_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor with AVX-512 that is a device for each of its cores: four rows are sums, five are cast."""
    for user, names in (
        ("matmul_cpu", ("summed_rows",)),
        ("experts", ("summed_rows",)),
        ("unembedding", ("summed_rows", "integer_rows")),
    ):
        for name in names:
            monkeypatch.setattr(f"grokjax.kernels.{user}.{name}", lambda: 4)
    jax.clear_caches()
    yield
    jax.clear_caches()
