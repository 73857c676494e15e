"""Machines that are not there: their names, and what is said where a compiler for one refuses it."""

import sys
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from grokjax.planning import ACCELERATORS, Target

REFUSAL = jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no.\nat frame 1")


@pytest.mark.parametrize(
    ("compiler", "target", "refusal", "message"),
    [
        (
            "libtpu",
            "v5p:1x1x7",
            REFUSAL,
            r"the TPU compiler knows no slice v5p:1x1x7 \(INVALID_ARGUMENT: no\): choose another shape\.",
        ),
        (
            "libtpu",
            "v5p:2x2x2",
            jax.errors.JaxRuntimeError("ABORTED: error when accessing libtpu multi-process lockfile."),
            r"the TPU compiler serves one process at a time \(ABORTED: .*lockfile\): try again when the other one",
        ),
        (
            "jax_plugins.xla_cuda13",
            "h200:8",
            REFUSAL,
            r"the GPU compiler does not take h200:8 \(INVALID_ARGUMENT: no\): install jax-cuda13-plugin and jax-cuda",
        ),
        (
            "jax_plugins.xla_cuda13",
            "a100:4",
            NotImplementedError("topology not implemented for cuda"),
            r"does not take a100-80g:4 \(topology not implemented for cuda\): .* or uninstall them",
        ),
    ],
)
def test_refusals_of_a_compiler_are_sentences(
    compiler: str, target: str, refusal: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise refusal

    monkeypatch.setitem(sys.modules, compiler, jax)  # as if it were installed
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    machine = Target.parse(target)
    with pytest.raises(ValueError, match=message):
        machine.mesh((1, machine.num_devices))


class TestNames:
    @pytest.mark.parametrize(
        ("text", "count", "name"),
        [
            ("cpu", 1, "cpu:1"),
            ("H100:16", 16, "h100-80g:16"),
            ("v5e:4x8", 32, "v5e:4x8"),
            ("tpu7x:2x2x1", 8, "tpu7x:2x2x1"),
        ],
    )
    def test_names_come_back_whole(self, text: str, count: int, name: str) -> None:
        target = Target.parse(text)
        assert (target.num_devices, str(target)) == (count, name)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("abacus:8", "'abacus' is no accelerator of the table; these are: cpu, a100-40g"),
            ("h100:2x4", "'h100:2x4' is not of the form cpu:8 or h200:8"),
            ("v5p:8", "'v5p:8' is not of the form .* v5p:2x2x2"),
            ("h100:0", "'h100:0' must have 1 to 32768 devices"),
            ("h100:1000000000000", "'h100:1000000000000' must have 1 to 32768 devices"),
            ("h100:x", "'h100:x' is not of the form"),
        ],
    )
    def test_bad_names_are_refused(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Target.parse(text)

    def test_every_accelerator_names_its_source(self) -> None:
        for accelerator in ACCELERATORS.values():
            assert accelerator.source
            assert accelerator.kind == "cpu" or accelerator.usable_bytes < accelerator.memory_bytes
