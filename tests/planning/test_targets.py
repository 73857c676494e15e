"""What is said where a compiler for a machine that is not there refuses it."""

import sys
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from grokjax.planning import Target

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
