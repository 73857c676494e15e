"""Every mesh and rule of a machine, planned and put in order."""

import dataclasses
from typing import Any

import pytest
from planned import TINY, made_up_step

from grokjax.planning import Plan, Target, compiler, plan, suggest, suggestions
from grokjax.planning.accelerators import find_accelerator


class TestSuggestions:
    def test_what_fits_comes_first_and_the_fastest_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiler, "compile_step", made_up_step)
        accelerator = dataclasses.replace(find_accelerator("h100"), memory_bytes=280 << 10)
        config = TINY.replace(num_layers=1)
        told: list[tuple[Any, ...]] = []
        found = suggest(
            config, target=Target(accelerator, 2), max_len=32, prompt_len=8, progress=lambda *step: told.append(step)
        )
        assert [step[1:] for step in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert {step[0] for step in told} == set(found)
        assert {(one.mesh, one.rules) for one in found} == {
            ((1, 2), "tensor"),
            ((1, 2), "expert"),
            ((2, 1), "tensor"),
            ((2, 1), "fsdp"),
        }
        fits = [one.plan is not None and one.plan.fits for one in found]
        assert fits == sorted(fits, reverse=True)
        assert any(fits)
        assert not all(fits)
        speeds = [one.plan.decode.tokens_per_second for one, good in zip(found, fits, strict=True) if good]
        assert speeds == sorted(speeds, reverse=True)
        assert all(one.reason.endswith(".") for one in found)

    def test_unknown_memory_is_asked_for(self) -> None:
        with pytest.raises(ValueError, match="the memory of cpu:8 is unknown: state it"):
            suggest(TINY, target="cpu:8")

    def test_a_failing_compiler_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only meshes that the sizes do not allow are left out."""

        def fail_once(*arguments: Any, mesh: tuple[int, int], **options: Any) -> Plan:
            if mesh == (4, 1):
                raise ValueError("the compiler failed: no reason")
            return plan(*arguments, mesh=mesh, **options)

        monkeypatch.setattr(suggestions, "plan", fail_once)
        with pytest.raises(ValueError, match="the compiler failed"):
            suggest(TINY.replace(num_layers=1), target="h100:4", max_len=32, prompt_len=8)

    def test_where_nothing_can_be_suggested_the_reason_is_told(self) -> None:
        with pytest.raises(ValueError, match="dtype"):
            suggest(TINY, target="h100:8", dtype="int32")
        with pytest.raises(ValueError, match="devices"):
            suggest(TINY, target="h100:64")
