"""What is said where a compiler for a machine that is not there refuses it."""

from typing import Any

import jax
import pytest
from jax.experimental import topologies

from grokjax.targets import Target, _describe_gpus, _describe_tpus

REFUSAL = jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no.\nat frame 1")


@pytest.mark.parametrize(
    ("describe", "target", "refusal", "message"),
    [
        (
            _describe_tpus,
            "v5p:1x1x7",
            REFUSAL,
            r"the TPU compiler knows no slice v5p:1x1x7 \(INVALID_ARGUMENT: no\): choose another shape\.",
        ),
        (
            _describe_tpus,
            "v5p:2x2x2",
            jax.errors.JaxRuntimeError("ABORTED: error when accessing libtpu multi-process lockfile."),
            r"the TPU compiler serves one process at a time \(ABORTED: .*lockfile\): try again when the other one",
        ),
        (
            _describe_gpus,
            "h200:8",
            REFUSAL,
            r"the GPU compiler does not take h200:8 \(INVALID_ARGUMENT: no\): install jax-cuda13-plugin and jax-cuda",
        ),
        (
            _describe_gpus,
            "a100:4",
            NotImplementedError("topology not implemented for cuda"),
            r"does not take a100-80g:4 \(topology not implemented for cuda\): .* or uninstall them",
        ),
    ],
)
def test_refusals(
    describe: Any, target: str, refusal: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise refusal

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=message):
        describe(Target.parse(target))
