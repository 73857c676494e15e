"""What the steps take and exchange, compiled from shapes: against programs and arrays that are really there."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from builders import TINY_DENSE, random_model
from flax import nnx
from jax.stages import Compiled, Lowered
from planned import MIB, REAL, TINY, made_up_step, real_plan

from grokjax.config import GrokConfig
from grokjax.model import (
    ModelSteps,
    SlotOptions,
    abstract_model,
    forward,
    init,
    lower_decode,
    lower_prefill,
)
from grokjax.planning import StepCompiler, compiler, plan, read_program
from grokjax.planning.compiler import compile_step
from grokjax.sharding import RULES, Partitioner, make_mesh


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


class TestMemory:
    def test_bytes_are_those_of_real_arrays_and_their_programs(self) -> None:
        """What lies on a device, and what the programs that take it say of their memory."""
        mesh, config = (2, 4), TINY.replace(max_seq_len=64)
        made = plan(config, target="cpu:8", mesh=mesh, batch_size=8, prompt_len=16)
        devices = make_mesh(mesh)
        before = {id(array) for array in jax.live_arrays()}
        model = random_model(config, mesh=devices)
        steps = ModelSteps(model, SlotOptions(slots=8, max_len=64, num_top=8))
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
            for step in (lower_decode(model, steps.state, 8), lower_prefill(model, steps.state, (4, 16)))
        ]
        for planned, program in zip((made.decode, made.prefill), programs, strict=True):
            assert planned.temporary_bytes == pytest.approx(program.temporary_bytes, rel=0.02)
        assert made.total_bytes == pytest.approx(max(program.peak_bytes for program in programs), rel=0.02)
        assert made.total_bytes == made.weights_bytes + made.cache_bytes + made.temporary_bytes + made.other_bytes

    @pytest.mark.thorough
    @pytest.mark.parametrize("quantized", [True, False], ids=["int8", "plain"])
    def test_a_gradient_takes_what_a_real_one_does(self, quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compiler, "compile_step", made_up_step)
        config = TINY.replace(num_layers=1)
        made = plan(config, target="cpu:2", dtype=jnp.float32, quantized=quantized)
        model = init(config, mesh=make_mesh((1, 2)), dtype=jnp.float32, quantized=quantized)
        tokens = jnp.zeros((1, 16), jnp.int32)
        plain = nnx.All(nnx.Param, lambda _, param: isinstance(param.get_value(), jax.Array))
        graph, floats, rest = nnx.split(model, plain, ...)

        def loss(floats: nnx.State, rest: nnx.State, tokens: jax.Array) -> jax.Array:
            logits = forward(nnx.merge(graph, floats, rest), tokens)[:, :-1]
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

        real = read_program(jax.jit(jax.grad(loss)).lower(floats, rest, tokens).compile())
        gradient = made.plan_gradient(16)
        assert gradient.num_tokens == 16
        assert gradient.gradient_bytes == pytest.approx(real.output_bytes, rel=0.02)
        assert (gradient.gradient_bytes == made.weights_bytes) is not quantized
        assert gradient.temporary_bytes == pytest.approx(real.temporary_bytes, rel=0.05)
        beside = gradient.total_bytes - made.weights_bytes - gradient.gradient_bytes - gradient.temporary_bytes
        assert 0 <= beside < 4096  # the texts
        assert gradient.fits is None  # the memory of a CPU is unknown

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
        steps = compiler_of(TINY_DENSE.replace(num_layers=7))
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
