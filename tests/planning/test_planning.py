"""What a machine needs, planned from shapes: against programs and arrays that are really there."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import or_thorough
from jax.stages import Compiled, Lowered

from grokjax.checkpoint import parameter_shapes
from grokjax.config import GrokConfig
from grokjax.model import ModelSteps, SlotSettings, abstract_model, init, lower_decode, lower_prefill
from grokjax.planning import (
    ACCELERATORS,
    GIB,
    Plan,
    StepCompiler,
    Target,
    compiler,
    plan,
    read_program,
    step_cost,
    suggest,
    suggestions,
)
from grokjax.planning.accelerators import find_accelerator
from grokjax.planning.compiler import Measured, compile_step
from grokjax.planning.plans import find_largest
from grokjax.sharding import RULES, Partitioner, make_mesh

TINY = GrokConfig.tiny()
REAL = GrokConfig.grok_1()
MIB = 1 << 20


@functools.cache
def real_plan(target: str) -> Plan:
    return plan(target=target)


def compiler_of(config: GrokConfig, mesh: tuple[int, int] = (1, 8), rules: str = "tensor") -> StepCompiler:
    return StepCompiler.create(
        config, "cpu:8", mesh=mesh, rules=RULES[rules], dtype=jnp.bfloat16, cache_dtype=None, quantized=True
    )


def refusing(message: str, num_layers: int) -> Callable[..., Compiled]:
    """`Lowered.compile`, but for programs of so many layers, which it refuses."""
    compile_lowered = Lowered.compile

    def refuse(step: Lowered, *options: Any) -> Compiled:
        if any(array.shape[:1] == (num_layers,) for array in jax.tree.leaves(step.in_avals)):
            raise jax.errors.JaxRuntimeError(message)
        return compile_lowered(step, *options)

    return refuse


def made_up_step(steps: StepCompiler, batch_size: int, max_len: int, prompts: tuple[int, int] | None) -> Measured:
    """A compiler whose temporaries grow with the rows of a decode step, and little with the prompts of a prefill."""
    data = steps.partitioner.mesh.devices.shape[0]
    if prompts is None:
        return Measured(4096 + 512 * batch_size // data, 64 * batch_size // data, {})
    return Measured(20_000 + 100 * prompts[0], 0, {})


class TestMemory:
    @pytest.mark.parametrize(
        ("mesh", "rules"), or_thorough([((2, 4), "tensor"), ((4, 2), "fsdp")], [((2, 4), "tensor")])
    )
    def test_bytes_are_those_of_a_real_run(self, mesh: tuple[int, int], rules: str) -> None:
        """What lies on a device, and what the program that ran said of its memory."""
        config = TINY.replace(max_seq_len=64)
        made = plan(config, target="cpu:8", mesh=mesh, rules=RULES[rules], batch_size=8, prompt_len=16)
        devices = make_mesh(mesh)
        before = {id(array) for array in jax.live_arrays()}
        model = init(config, mesh=devices, rules=RULES[rules])
        steps = ModelSteps(model, slots=8, max_len=64, num_top=8)
        tokens, numbers = np.zeros((4, 16), np.int32), np.arange(4, dtype=np.int32)
        steps.prefill(tokens, numbers + 1, 0 * numbers, numbers)
        steps.decode(SlotSettings.of({}, 8)).read()
        first = devices.devices.flat[0]
        held = sum(
            shard.data.nbytes
            for array in jax.live_arrays()
            if id(array) not in before and len(array.sharding.device_set) == 8
            for shard in array.addressable_shards
            if shard.device == first
        )
        logits_and_bias = 2 * 8 // mesh[0] * config.vocab_size // mesh[1] * 4
        assert held - logits_and_bias == pytest.approx(made.weights_bytes + made.cache_bytes, rel=0.02)
        programs = [
            read_program(step.compile())
            for step in (lower_decode(model, steps.state, 8), lower_prefill(model, steps.state, tokens.shape))
        ]
        for planned, program in zip((made.decode, made.prefill), programs, strict=True):
            assert planned.temporary_bytes == pytest.approx(program.temporary_bytes, rel=0.02)
        assert made.total_bytes == pytest.approx(max(program.peak_bytes for program in programs), rel=0.02)
        assert made.total_bytes == made.weights_bytes + made.cache_bytes + made.temporary_bytes + made.other_bytes

    def test_the_real_weights_are_spread_over_eight_devices(self) -> None:
        """In int8, with a scale for each output channel; only norms and routers are whole on every device."""
        partitioner = Partitioner.create(REAL, make_mesh((1, 8)))
        model = abstract_model(REAL, partitioner, dtype=jnp.bfloat16, quantized=True)
        sizes = {
            jax.tree_util.keystr(path): math.prod(leaf.shape) * leaf.dtype.itemsize
            for path, leaf in jax.tree.leaves_with_path(model)
        }
        whole = {
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree.leaves_with_path(model)
            if leaf.sharding.is_fully_replicated
        }
        replicated = sum(sizes[name] for name in whole)
        expected = (sum(sizes.values()) - replicated) / 8 + replicated
        assert real_plan("cpu:8").weights_bytes == pytest.approx(expected, rel=0.01)
        norms = ("pre_attention_norm", "post_attention_norm", "pre_feed_forward_norm", "post_feed_forward_norm")
        assert {name for name in whole if sizes[name] > MIB} == {
            *(f".layers.{norm}.scale.value" for norm in norms),
            ".layers.feed_forward.router.value",
            ".layers.feed_forward.down.value.scales",
        }

    def test_more_rows_and_longer_rows_take_more(self) -> None:
        steps = compiler_of(TINY)
        one, two, longer = steps.cache_bytes(1, 64), steps.cache_bytes(2, 64), steps.cache_bytes(1, 128)
        assert one < two == pytest.approx(longer, abs=8)


class TestTraffic:
    def test_three_sums_but_two_of_them_in_every_layer(self) -> None:
        made = real_plan("cpu:8")
        [sums] = made.prefill.traffic
        assert (sums.kind, sums.count, sums.num_devices, sums.is_between_hosts) == ("all-reduce", 1 + 2 * 64, 8, False)
        assert sums.num_bytes == sums.count * 1024 * 6144 * 4  # tokens' hidden states, in float32 on a CPU
        of_kind = {one.kind: one for one in made.decode.traffic}
        drawing = sum(one.num_bytes for one in made.decode.traffic) - sums.num_bytes // 1024
        assert sums.count < of_kind["all-reduce"].count < sums.count + 16
        assert 0 < drawing < 4 * 131072 * 4  # some rows of logits

    @pytest.mark.parametrize("prompts", [None, pytest.param((4, 16), marks=pytest.mark.thorough)])
    def test_a_program_too_large_to_compile_is_extrapolated(
        self, prompts: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From 2 and 4 layers to 7: what the compiler says of 7."""
        steps = compiler_of(TINY.replace(num_layers=7))
        measured = compile_step(steps, 8, 64, prompts)
        compile_step.cache_clear()  # so that the compiler is asked again
        monkeypatch.setattr(Lowered, "compile", refusing("RESOURCE_EXHAUSTED: 1G", num_layers=7))
        guessed = compile_step(steps, 8, 64, prompts)
        assert guessed.traffic == measured.traffic
        assert guessed.temporary_bytes == pytest.approx(measured.temporary_bytes, rel=0.02)
        assert guessed.other_bytes == pytest.approx(measured.other_bytes, abs=1024)

    def test_only_want_of_memory_is_extrapolated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Any other error of the compiler is the user's to know."""
        monkeypatch.setattr(Lowered, "compile", refusing("INTERNAL: broken", num_layers=7))
        with pytest.raises(ValueError, match="the compiler failed: INTERNAL: broken"):
            plan(TINY.replace(num_layers=7), target="cpu:8", max_len=33, prompt_len=8)

    @pytest.mark.parametrize("options", [{}, {"xla_option_of_another_version": "1"}])
    def test_quick_machine_code_changes_nothing(self, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor do options that the compiler does not know."""
        compile_lowered, given = Lowered.compile, []

        def replace_options(step: Lowered, *quick: dict[str, str]) -> Compiled:
            given.extend(quick)
            return compile_lowered(step, *[options for _ in quick])

        steps, sizes = compiler_of(TINY), (2, 64, (2, 16))
        quick = compile_step(steps, *sizes)
        compile_step.cache_clear()  # so that the compiler is asked again
        monkeypatch.setattr(Lowered, "compile", replace_options)
        assert compile_step(steps, *sizes) == quick
        assert any(given), "no options ask for quick machine code"


class TestRoofline:
    def test_reads_and_operations_of_one_token_are_counted_by_hand(self) -> None:
        """Written out for int8, bfloat16 scales and table, from the shapes of the parameters."""
        config = TINY
        model = abstract_model(config, Partitioner.create(config, make_mesh()), dtype=jnp.bfloat16, quantized=True)
        cost = step_cost(model, batch_size=1, filled=10, cache_dtype=jnp.float32)
        shapes = parameter_shapes(config)
        per_layer = [name for name in shapes if name.startswith("layers.0.")]
        attention = sum(math.prod(shapes[name]) for name in per_layer if ".attention." in name)
        experts = sum(math.prod(shapes[name]) for name in per_layer if name.split(".")[-1] in ("gate", "up", "down"))
        layers = config.num_layers
        heads = config.num_heads + 2 * config.num_kv_heads
        scales = 2 * (heads * config.head_dim + config.model_dim)
        assert cost.attention == layers * (attention + scales)
        scales = 2 * config.num_experts * (2 * config.ffn_dim + config.model_dim)
        assert cost.experts == layers * (experts + scales) * 2 / 8
        assert cost.unembedding == 2 * config.vocab_size * config.model_dim
        assert cost.cache == 2 * layers * config.num_kv_heads * 10 * config.head_dim * 4
        products = layers * (attention + experts * 2 / 8) + config.vocab_size * config.model_dim
        scores = layers * 2 * config.num_heads * config.head_dim * 10
        assert cost.operations == 2 * (products + scores)

    def test_devices_share_the_work(self) -> None:
        one, eight, rows = (
            step_cost(
                abstract_model(TINY, Partitioner.create(TINY, make_mesh(mesh)), dtype=jnp.bfloat16, quantized=True),
                batch_size=8,
                filled=16,
                cache_dtype=jnp.bfloat16,
            )
            for mesh in ((1, 1), (1, 8), (8, 1))
        )
        assert eight.operations == one.operations / 8
        assert rows.operations == one.operations / 8
        assert eight.unembedding == one.unembedding / 8
        assert rows.unembedding == one.unembedding
        assert rows.cache == one.cache / 8
        assert eight.cache == one.cache / 4  # of 4 kv heads, each is on two devices

    @pytest.mark.parametrize(("tokens", "experts"), [(1, 2.0), (4, 5.46875), (1000, 8.0)])
    def test_experts_are_read_as_often_as_tokens_choose_them(self, tokens: int, experts: float) -> None:
        """8 experts, of which each token draws 2: the mean of many draws, and exact for one token."""
        model = abstract_model(TINY, Partitioner.create(TINY, make_mesh()), dtype=jnp.bfloat16, quantized=True)
        cost = functools.partial(step_cost, model, filled=1, cache_dtype=jnp.bfloat16)
        all_experts = cost(batch_size=1 << 20).experts
        assert cost(batch_size=tokens).experts / all_experts * 8 == pytest.approx(experts)
        draws = np.random.default_rng(0).permuted(np.tile(np.arange(8), (2000 * min(tokens, 50), 1)), axis=1)[:, :2]
        chosen = [len(np.unique(part)) for part in np.split(draws, 2000)]
        assert np.mean(chosen) == pytest.approx(experts, rel=0.02)

    def test_the_busiest_device_of_expert_parallelism_reads_a_whole_expert(self) -> None:
        partitioner = Partitioner.create(TINY, make_mesh((1, 8)), RULES["expert"])
        model = abstract_model(TINY, partitioner, dtype=jnp.bfloat16, quantized=True)
        cost = [step_cost(model, batch_size=rows, filled=1, cache_dtype=jnp.bfloat16).experts for rows in (1, 64)]
        assert cost[0] == cost[1]

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
        made = plan(TINY, target="h100:1", max_len=32, prompt_len=8, collective_latency=1.0)
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
        or_thorough([("h100:8", 151), ("h200:4", 117), ("v5p:2x2x2", 211)], [("h100:8", 151)]),
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


class TestSuggestions:
    def test_what_fits_comes_first_and_the_fastest_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiler, "compile_step", made_up_step)
        accelerator = dataclasses.replace(find_accelerator("h100"), memory_bytes=280 << 10)
        config = TINY.replace(num_layers=1)
        found = suggest(config, target=Target(accelerator, 2), max_len=32, prompt_len=8)
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


class TestTargets:
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
            ("h100:0", "'h100:0' has no devices: give at least one"),
            ("h100:x", "'h100:x' is not of the form"),
        ],
    )
    def test_bad_names_are_refused(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Target.parse(text)

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

    def test_every_accelerator_names_its_source(self) -> None:
        for accelerator in ACCELERATORS.values():
            assert accelerator.source
            assert accelerator.kind == "cpu" or accelerator.usable_bytes < accelerator.memory_bytes
