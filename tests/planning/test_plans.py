"""What a machine needs and how fast it could be: the roofline, what fits, and what is refused."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import textwrap

import pytest
from builders import TINY_DENSE, or_thorough
from planned import MIB, TINY, made_up_step, real_plan

from grokjax.planning import GIB, Target, compiler, plan
from grokjax.planning.accelerators import find_accelerator
from grokjax.planning.plans import find_largest
from grokjax.sharding import RULES


def test_a_plan_prints_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compile_step", made_up_step)
    lines = repr(plan(TINY, target="h100:8", batch_size=4)).splitlines()
    assert re.fullmatch(r"Plan\( # h100-80g:8: [\d.]+ KiB of 75\.1 GiB usable on each device", lines[0])
    assert "  mesh=(1, 8)," in lines
    assert "  batch_size=4," in lines
    assert "  fits=True," in lines
    assert any(re.fullmatch(r"  weights_bytes=[\d.]+ KiB,", line) for line in lines)
    assert any(re.fullmatch(r"  decode=StepPlan\(.* ms at best, .* tokens/s, bound by \w+\),", line) for line in lines)
    assert len([line for line in lines if "GrokConfig(" in line]) == 1
    assert "decode=StepPlan(reads " in repr(plan(TINY, target="cpu:8"))  # of which no speed is known


class TestRoofline:
    def test_the_slowest_term_binds(self) -> None:
        made = real_plan("h100:8")
        step = made.decode
        assert (step.bound, made.prefill.bound) == ("memory", "compute")
        assert step.seconds == max(step.memory_seconds, step.compute_seconds) + step.transfer_seconds
        assert step.tokens_per_second == 1 / step.seconds
        assert made.prefill.tokens_per_second == 1024 / made.prefill.seconds
        assert step.memory_seconds == step.cost.num_bytes / 3.35e12

    def test_a_sum_goes_round_the_ring_twice(self) -> None:
        step = real_plan("h100:8").prefill
        assert step.transfer_seconds == pytest.approx(2 * step.traffic[0].num_bytes * 7 / 8 / 450e9)
        slow = plan(target="h100:8", collective_latency=1e-5).prefill
        assert slow.transfer_seconds == pytest.approx(step.transfer_seconds + 129e-5)

    def test_what_crosses_hosts_takes_the_network(self) -> None:
        """Parameters are gathered between two hosts of two devices; the sums stay inside a host."""
        accelerator = dataclasses.replace(find_accelerator("h100"), group_size=2)
        config = TINY.replace(num_layers=1)
        made = plan(
            config,
            target=Target(accelerator, 4),
            mesh=(2, 2),
            rules=RULES["fsdp"],
            max_len=32,
            batch_size=2,
            prompt_len=8,
        )
        crossing = {one.kind: one for one in made.prefill.traffic if one.is_between_hosts}
        inside = {one.kind: one for one in made.prefill.traffic if not one.is_between_hosts}
        assert crossing["all-gather"].num_bytes > made.weights_bytes / 2
        assert inside["all-reduce"].num_devices == crossing["all-gather"].num_devices == 2
        assert accelerator.host_bandwidth < accelerator.link_bandwidth
        halves = {"all-gather": 1 / 2}  # of two parts each device has one; a sum sends a half twice
        seconds = sum(
            one.num_bytes
            * halves.get(one.kind, 1)
            / (accelerator.host_bandwidth if one.is_between_hosts else accelerator.link_bandwidth)
            for one in made.prefill.traffic
        )
        assert made.prefill.transfer_seconds == pytest.approx(seconds)

    def test_an_axis_of_one_device_moves_nothing(self) -> None:
        made = plan(TINY_DENSE, target="h100:1", max_len=32, prompt_len=8, collective_latency=1.0)
        assert made.decode.transfer_seconds == made.prefill.transfer_seconds == 0
        assert made.decode.traffic == ()

    def test_unknown_figures_say_nothing(self) -> None:
        made = real_plan("cpu:8")
        assert made.fits is made.find_largest_batch_size() is made.find_largest_max_len() is None
        assert made.decode.seconds is made.decode.tokens_per_second is made.decode.bound is None


class TestFits:
    """The question of the release's users; without the compilers for these machines, as here, CPUs stand in.

    The numbers of rows are those of docs/hardware.md, by the machines' own compilers.
    """

    @pytest.mark.parametrize(
        ("target", "rows"),
        or_thorough([("h100:8", 151), ("v5p:2x2x2", 211)], [("h100:8", 151)]),
    )
    def test_grok_1_in_int8_fits(self, target: str, rows: int) -> None:
        made = real_plan(target)
        assert made.fits
        assert made.find_largest_batch_size() == pytest.approx(rows, rel=0.03)
        assert made.find_largest_max_len() == 8192

    def test_grok_1_fits_on_32_chips_of_v5e(self) -> None:
        """If fully sharded. In a process of as many devices: what is exact whoever compiles, weights and cache.

        At 44 rows they leave the 0.4 GiB that the compiler for TPUs takes besides; from 48 on they are too much alone.
        """
        code = """
            import jax, json
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", 32)
            from grokjax.sharding import RULES
            from grokjax.planning import StepCompiler
            sizes = {}
            for rules in ("tensor", "fsdp"):
                steps = StepCompiler.create(
                    None, "v5e:4x8", mesh=None, rules=RULES[rules], dtype="bfloat16", cache_dtype=None, quantized=True
                )
                sizes[rules] = [steps.weights_bytes + steps.cache_bytes(rows, 8192) for rows in (2, 44, 48)]
            print(json.dumps(sizes))
        """
        command = [sys.executable, "-c", textwrap.dedent(code)]
        sizes = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        usable = find_accelerator("v5e").usable_bytes
        assert sizes["tensor"][0] > usable
        assert sizes["fsdp"][1] + 0.4 * GIB < usable < sizes["fsdp"][2]

    @pytest.mark.thorough
    def test_grok_1_does_not_fit_on_two_gpus(self) -> None:
        made = real_plan("h100:2")
        assert made.fits is False
        assert made.find_largest_batch_size() == 0

    def test_the_largest_batch_and_context_are_the_largest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiler, "compile_step", made_up_step)
        accelerator = dataclasses.replace(find_accelerator("h100"), memory_bytes=2 * MIB)
        sizes = functools.partial(plan, TINY, target=Target(accelerator, 8), mesh=(2, 4), prompt_len=8)
        best = sizes(batch_size=4, max_len=128).find_largest_batch_size()
        assert best > 4
        assert best % 2 == 0  # the data axis divides no odd number
        assert sizes(batch_size=best, max_len=128).fits
        assert not sizes(batch_size=best + 2, max_len=128).fits
        longer = sizes(batch_size=2 * round(best * 0.55), max_len=128)
        assert not longer.fits
        assert 100 < longer.find_largest_max_len() < 128
        assert sizes(batch_size=longer.batch_size, max_len=longer.find_largest_max_len()).fits
        assert not sizes(batch_size=longer.batch_size, max_len=longer.find_largest_max_len() + 1).fits

    @pytest.mark.parametrize(
        ("start", "guess", "usable", "best", "most_asked"),
        [
            (4, 90, 1000, 90, 2),
            (4, 70, 1000, 90, 3),
            (4, 4, 1000, 90, 3),
            (1, -80, 1000, 90, 3),
            (1, -80, 1 << 40, 4096, 3),
            (90, 90, 1000, 90, 2),
            (91, 0, 1000, 90, 3),
            (91, 0, 109, 0, 2),
        ],
    )
    def test_the_search_finds_the_largest_with_few_programs(
        self, start: int, guess: int, usable: int, best: int, most_asked: int
    ) -> None:
        """Among numbers up to 4096 whose total is 100 and 10 for each, however wrong the first guess is."""
        asked: list[int] = []

        def total(n: int) -> int:
            asked.append(n)
            return 100 + 10 * n

        assert find_largest(total, usable, start, 4096, guess) == best
        assert len(asked) <= most_asked

    def test_more_rows_fit_than_are_asked_about(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where a prefill of 16 prompts takes far less than 16 of one prompt, and the first guess is below 0."""
        monkeypatch.setattr(compiler, "compile_step", made_up_step)
        accelerator = find_accelerator("h100")
        sizes = functools.partial(plan, TINY, mesh=(1, 1), max_len=64, prompt_len=32, prefill_rows=16)
        needed = sizes(target=Target(accelerator, 1)).total_bytes
        roomy = Target(dataclasses.replace(accelerator, memory_bytes=3 * needed), 1)
        best = sizes(target=roomy).find_largest_batch_size()
        assert best >= 4
        assert sizes(target=roomy, batch_size=best).fits
        assert not sizes(target=roomy, batch_size=best + 1).fits


class TestRefusals:
    def test_a_mesh_of_another_number_of_devices_is_refused(self) -> None:
        with pytest.raises(ValueError, match="a mesh of 2 x 2 devices is not the 8 of h100-80g:8"):
            plan(TINY, target="h100:8", mesh=(2, 2))

    def test_more_devices_than_are_simulated_are_refused(self) -> None:
        with pytest.raises(ValueError, match="needs 64 devices and there are 8"):
            plan(TINY, target="cpu:64", mesh=(8, 8))

    def test_sizes_out_of_range_are_refused(self) -> None:
        for sizes, message in (({"batch_size": 0}, "batch_size=0"), ({"max_len": 0}, "max_len=0")):
            with pytest.raises(ValueError, match=message):
                plan(TINY, target="cpu:8", **sizes)
