"""In which dtype processors are asked to multiply: as their description says, and the same result either way."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokjax.kernels import cpu_features, matmul, product_dtype
from grokjax.kernels.cpu_features import has_bfloat16, has_core_for_each_device, integer_rows, plane_rows, summed_rows
from grokjax.quantization import quantize


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 avx512_vnni", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("flags\t\t: fpu sse4_2 avx2 f16c", False),
        ("Features\t: fp asimd i8mm bf16", True),
        ("Features\t: fp asimd", False),
        ("model name\t: bf16", False),
    ],
)
def test_a_description_says_whether_there_is_bfloat16(tmp_path: Path, line: str, expected: bool) -> None:
    description = tmp_path / "cpuinfo"
    description.write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
    assert has_bfloat16(description) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni amx_tile amx_int8", range(8, 129)),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", range(0)),
        ("flags\t\t: fpu avx2 avx_vnni", range(0)),
        ("flags\t\t: fpu avx2", range(0)),
        ("Features\t: fp asimd i8mm bf16", range(0)),
        ("Features\t: fp asimd", range(0)),
    ],
)
def test_integers_are_multiplied_where_that_was_faster(tmp_path: Path, line: str, expected: range) -> None:
    description = tmp_path / "cpuinfo"
    description.write_text(f"{line}\n")
    assert plane_rows(description) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_int8", (2, 16)),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16", (4, 4)),
        ("flags\t\t: fpu avx2 avx512f", (4, 16)),
        ("flags\t\t: fpu avx2", (2, 16)),
        ("Features\t: fp asimd bf16", (2, 16)),
    ],
)
@pytest.mark.parametrize("has_core", [True, False])
def test_a_few_rows_more_are_sums_and_a_few_less_integers_where_each_device_has_a_core(
    tmp_path: Path, line: str, expected: tuple[int, int], has_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = tmp_path / "cpuinfo"
    description.write_text(f"{line}\n")
    monkeypatch.setattr(cpu_features, "has_core_for_each_device", lambda: has_core)
    assert (summed_rows(description), integer_rows(description)) == (expected if has_core else (2, 16))


@pytest.mark.parametrize(("devices", "cores", "expected"), [(2, 2, True), (8, 2, False), (2, 4, False), (1, 1, False)])
def test_each_device_has_a_core_where_there_are_several_and_as_many(
    devices: int, cores: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "local_device_count", lambda backend: devices)
    monkeypatch.setattr(cpu_features, "count_cores", lambda: cores)
    assert has_core_for_each_device.__wrapped__() is expected


def test_no_device_has_a_core_where_jax_must_not_use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: str) -> int:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_device_count", refuse)
    assert not has_core_for_each_device.__wrapped__()


def test_without_a_description_there_is_none(tmp_path: Path) -> None:
    assert not has_bfloat16(tmp_path / "absent")
    assert not plane_rows(tmp_path / "absent")


@pytest.mark.usefixtures("planes_nowhere")
@pytest.mark.parametrize("num_rows", [1, 8, 64])
@pytest.mark.parametrize("found", [True, False])
def test_bfloat16_is_multiplied_where_processors_can(
    num_rows: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 is multiplied as such only where processors can; float32 always; the sums agree."""
    monkeypatch.setattr(cpu_features, "has_bfloat16", lambda: found)
    jax.clear_caches()  # what was traced under another answer
    assert product_dtype(jnp.bfloat16) == (jnp.bfloat16 if found else jnp.float32)
    assert product_dtype(np.float32) == jnp.float32
    random = np.random.default_rng(num_rows)
    weight = quantize(jnp.asarray(random.standard_normal((64, 160)), jnp.float32))
    x = jnp.asarray(random.standard_normal((num_rows, 64)), jnp.bfloat16)
    product = jax.jit(lambda x, w: matmul(x, w, platform="cpu"))
    lines = product.lower(x, weight).as_text().splitlines()
    of_bfloat16 = [line for line in lines if "dot_general" in line and "xbf16" in line]
    assert bool(of_bfloat16) == (found and num_rows > 2)  # fewer rows are sums, in float32 anyway
    expected = np.asarray(x, np.float64) @ (np.asarray(weight.weight, np.float64) * np.asarray(weight.scales))
    np.testing.assert_allclose(product(x, weight), expected, atol=2e-5)
