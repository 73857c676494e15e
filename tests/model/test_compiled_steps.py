"""The compiled decode step of the real model, read: nothing weight-sized is copied, gathered or converted."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import pytest
from builders import EXPERT, FULLY, TENSOR

from grokjax.cache import KVCache
from grokjax.checkpoint import parameter_shapes
from grokjax.config import GrokConfig
from grokjax.kernels import product_dtype
from grokjax.model import (
    Grok,
    SlotState,
    abstract_model,
    decode,
    forward,
    lower_decode,
    lower_prefill,
    named_parameters,
    prefill,
    with_values,
)
from grokjax.model.building import parameter_maker
from grokjax.model.slot_steps import lower_score, lower_share
from grokjax.planning import Program, Value, read_program
from grokjax.sharding import Partitioner, ShardingRules, make_mesh

pytestmark = pytest.mark.usefixtures("compiled_afresh")
MIB = 1 << 20
REAL = GrokConfig.grok_1()


@functools.cache
def compile_step(
    mesh: tuple[int, int],
    rules: ShardingRules,
    *,
    num_new: int = 1,
    batch_size: int = 1,
    config: GrokConfig = REAL,
    max_len: int = 8192,
    quantized: bool = True,
    dtype: str = "bfloat16",
) -> Program:
    partitioner = Partitioner.create(config, make_mesh(mesh), rules)
    model = abstract_model(config, partitioner, dtype=jnp.dtype(dtype), quantized=quantized)
    cache = KVCache.abstract(config, batch_size, max_len, mesh=partitioner.mesh, rules=rules)
    if num_new == 1:
        arguments = (model, jax.ShapeDtypeStruct((batch_size,), jnp.int32), cache)
        return read_program(jax.jit(decode, donate_argnums=2).lower(*arguments).compile())
    tokens = jax.ShapeDtypeStruct((batch_size, num_new), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return read_program(jax.jit(prefill, donate_argnums=3).lower(model, tokens, lengths, cache).compile())


def large_matrices(program: Program, *, cache: tuple[int, ...]) -> list[Value]:
    """Matrices larger than a cast block of a weight, but for the cache, which is updated where it lies.

    Rows of activations and of scales are no matrices of 64 x 64 and more; a block of a weight has at most 1 MiB, and
    2 MiB when cast to bfloat16, or 4 where processors multiply float32 instead.
    """
    block = product_dtype(jnp.bfloat16).itemsize * MIB
    matrices = (value for value in program.values if len(value.shape) > 1 and min(value.shape[-2:]) >= 64)
    return [value for value in matrices if value.num_bytes > block and value.shape != cache]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("rules", [TENSOR, EXPERT], ids=["tp", "ep"])
def test_decode_step_of_the_real_model_moves_and_copies_nothing_large(batch_size: int, rules: ShardingRules) -> None:
    start = time.perf_counter()
    program = compile_step((1, 8), rules, batch_size=batch_size)
    assert time.perf_counter() - start < 30  # all 64 layers; 2 s on two slow cores
    # One sum for the embedding, one after attention, one after the experts; nothing is gathered.
    assert program.collectives == collectives(all_reduce=3)
    # A device's largest matrices, of one expert, have 24 MiB (tensor parallel) or 192 MiB (expert parallel).
    assert large_matrices(program, cache=(64, batch_size, 1, 8192, 128)) == []
    assert program.temporary_bytes < 48 * MIB
    assert_no_second_cache(program, batch_size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_step_with_plain_weights_copies_nothing_large(dtype: str) -> None:
    config = REAL.replace(num_layers=8)
    program = compile_step((1, 8), ShardingRules(), config=config, quantized=False, dtype=dtype)
    assert program.collectives == collectives(all_reduce=3)
    assert large_matrices(program, cache=(8, 1, 1, 8192, 128)) == []
    assert program.temporary_bytes < 48 * MIB


def compile_gradient(config: GrokConfig, mesh: tuple[int, int], *, num_tokens: int) -> Program:
    """The derivative of a sum of logits with respect to every weight of a plain bfloat16 model."""
    model = abstract_model(config, Partitioner.create(config, make_mesh(mesh)), dtype=jnp.bfloat16, quantized=False)

    def loss(parameters: dict[str, jax.Array], model: Grok, tokens: jax.Array) -> jax.Array:
        return forward(with_values(model, parameters), tokens).sum()

    parameters = {name: param.get_value() for name, param in named_parameters(model).items()}
    lowered = jax.jit(jax.grad(loss)).lower(parameters, model, jax.ShapeDtypeStruct((1, num_tokens), jnp.int32))
    return read_program(lowered.compile())


def test_a_gradient_with_plain_weights_holds_one_layer_beside_them() -> None:
    """Forwards and backwards: jax 0.10 would convert all bfloat16 weights to float32 ahead of the loops."""
    config = GrokConfig.tiny().replace(num_layers=16, num_experts=8, model_dim=256, ffn_dim=512)
    program = compile_gradient(config, (1, 1), num_tokens=32)
    experts_of_a_layer = 4 * 3 * 8 * 256 * 512  # in float32, as their gradients are summed
    assert program.temporary_bytes < 2 * experts_of_a_layer  # 16 layers in bfloat16 are 8
    assert not program.transfers  # one device sums nothing over devices


@pytest.mark.thorough
def test_a_gradient_sums_no_weight_over_one_device_of_a_mesh() -> None:
    """JAX would sum a weight's derivative over every axis that does not split it, which copies all of it."""
    config = GrokConfig.tiny().replace(model_dim=256, ffn_dim=512)
    program = compile_gradient(config, (1, 8), num_tokens=8)
    summed = [one.num_bytes for one in program.transfers if one.kind == "all-reduce"]
    activations = 4 * 8 * config.model_dim
    assert 0 < max(summed) <= 2 * activations  # XLA sums two at once


def test_the_derivative_of_looking_tokens_up_makes_no_table_beside_its_result() -> None:
    config = GrokConfig.tiny().replace(vocab_size=65536)
    model = abstract_model(config, Partitioner.create(config, make_mesh((1, 1))), dtype=jnp.bfloat16, quantized=False)

    def total(table: jax.Array, model: Grok, tokens: jax.Array) -> jax.Array:
        return with_values(model, {"embedding.table": table}).embedding.embed(tokens).astype(jnp.float32).sum()

    given = model.embedding.table.get_value(), model, jax.ShapeDtypeStruct((1, 64), jnp.int32)
    program = read_program(jax.jit(jax.grad(total)).lower(*given).compile())
    assert program.temporary_bytes < 2 * config.vocab_size * config.model_dim / 4


def test_a_backward_pass_costs_at_most_three_forward_passes() -> None:
    """Each product is computed once more, and has two cotangents; the experts do not compute theirs a third time.

    Of loops the compiler counts one turn. So there is one layer, one expert, and one block of everything.
    """
    config = GrokConfig.tiny().replace(
        num_layers=1, num_experts=1, experts_per_token=1, model_dim=128, ffn_dim=1024, max_seq_len=64
    )
    model = abstract_model(config, Partitioner.create(config, make_mesh((1, 1))), dtype=jnp.bfloat16, quantized=False)

    def loss(parameters: dict[str, jax.Array], model: Grok, tokens: jax.Array) -> jax.Array:
        return forward(with_values(model, parameters), tokens).sum()

    given = (
        {name: param.get_value() for name, param in named_parameters(model).items()},
        model,
        jax.ShapeDtypeStruct((1, 64), jnp.int32),
    )
    forwards, both = (jax.jit(f).lower(*given).cost_analysis()["flops"] for f in (loss, jax.value_and_grad(loss)))
    products = 2 * 64 * (3 * 128 * 1024 + 128 * config.vocab_size)
    assert products < forwards < 1.5 * products
    assert 2.5 < both / forwards - 1 <= 3


def test_more_devices_than_kv_heads_gather_only_the_new_keys_and_values() -> None:
    config = REAL.replace(num_layers=4, num_kv_heads=4)
    program = compile_step((1, 8), ShardingRules(), config=config)
    assert program.collectives == collectives(all_reduce=3, all_gather=2)
    gathered = [value for value in program.values if value.operation == "all-gather"]
    assert [value.shape[-1] for value in gathered] == [4 * 128] * 2
    assert large_matrices(program, cache=(4, 1, 1, 8192, 128)) == []


def test_the_cache_costs_no_collective_on_a_data_axis() -> None:
    config = REAL.replace(num_layers=4)
    program = compile_step((2, 4), ShardingRules(), config=config, batch_size=8)
    assert program.collectives == collectives(all_reduce=3)
    assert large_matrices(program, cache=(4, 4, 2, 8192, 128)) == []


def test_replicas_of_one_device_exchange_nothing() -> None:
    """Neither with each other nor along the mesh's axis of one device."""
    program = compile_step((8, 1), ShardingRules(), config=GrokConfig.tiny(), batch_size=8, max_len=32)
    assert program.transfers == ()


def test_fully_sharded_weights_are_gathered_layer_by_layer() -> None:
    """A device holds one gathered layer at a time: no gather makes all of them, before the loop or in it."""
    config = REAL.replace(num_layers=4)
    program = compile_step((2, 4), FULLY, config=config, batch_size=2)
    of_experts = 8 * 6144 * 32768 // 4  # one of three matrices of a layer, in int8, on a device
    in_loop = [transfer.num_bytes for transfer in program.transfers if transfer.is_in_loop]
    assert max(in_loop) == of_experts
    assert sum(in_loop) < 3.2 * of_experts
    table = 4 * REAL.vocab_size // 4 * REAL.model_dim
    assert max(transfer.num_bytes for transfer in program.transfers if not transfer.is_in_loop) <= table


def test_prefill_updates_the_cache_in_place() -> None:
    config = REAL.replace(num_layers=4)
    program = compile_step((1, 8), ShardingRules(), config=config, num_new=256)
    assert program.collectives["all-gather"] == 0
    cache_bytes = 2 * 4 * 4 * 8192 * 128
    assert program.aliased_bytes >= cache_bytes
    assert not any(value.operation == "copy" and value.shape == (4, 1, 1, 8192, 128) for value in program.values)


@pytest.mark.parametrize("step", ["prefill", "decode", "score", "share"])
def test_an_engine_moves_no_rows_between_replicas(step: str) -> None:
    """Rows are read and written where they lie, 128 MiB of keys a device; a shared one crosses layer by layer."""
    config = REAL.replace(num_layers=4)
    partitioner = Partitioner.create(config, make_mesh((2, 4)))
    model = abstract_model(config, partitioner, dtype=jnp.bfloat16, quantized=True)
    cache = KVCache.abstract(config, 8, 8192, dtype="float32", mesh=partitioner.mesh)
    state = SlotState.abstract(model, cache)
    lowered = {
        "prefill": lambda: lower_prefill(model, state, (2, 16)),
        "decode": lambda: lower_decode(model, state, num_top=8),
        "score": lambda: lower_score(model, state, 16),
        "share": lambda: lower_share(model, state),
    }
    compiled = lowered[step]().compile()
    program = read_program(compiled)
    a_row_of_a_layer = 4 * 2 * 8192 * 128
    assert max(transfer.num_bytes for transfer in program.transfers) <= a_row_of_a_layer
    half = 4 * 4 * a_row_of_a_layer
    assert program.aliased_bytes >= 2 * half
    assert program.temporary_bytes < half / 4
    # Each device draws for its part of the vocabulary; what brings all together for ranks stands in a condition.
    always = compiled.as_text().partition("\nENTRY ")[2]
    if step == "decode":
        assert f"[4,{REAL.vocab_size // 4}]" in always
    assert f"[4,{REAL.vocab_size}]" not in always


@pytest.mark.parametrize("name", ["layers.feed_forward.gate", "layers.feed_forward.down", "layers.attention.output"])
def test_random_weights_are_born_in_their_shards(name: str) -> None:
    """A device makes its own part with little beside it: 13 GB of an expert stack leave no room for more."""
    partitioner = Partitioner.create(REAL, make_mesh((1, 8)))
    maker = parameter_maker(REAL, partitioner, (name,), dtype=jnp.dtype(jnp.bfloat16), quantized=True)
    program = read_program(maker.lower(jax.random.key(0)).compile())
    stack = math.prod(parameter_shapes(REAL)[name.replace("layers", "layers.0")]) * REAL.num_layers
    assert program.temporary_bytes < stack / 8 / 8
    assert program.collectives == collectives(all_reduce=0)


def test_a_random_table_is_born_in_its_shards() -> None:
    partitioner = Partitioner.create(REAL, make_mesh((1, 8)))
    maker = parameter_maker(REAL, partitioner, ("embedding.table",), dtype=jnp.dtype(jnp.bfloat16), quantized=True)
    program = read_program(maker.lower(jax.random.key(0)).compile())
    table = 2 * REAL.vocab_size * REAL.model_dim
    assert program.temporary_bytes < 2 * table / 8
    assert program.collectives == collectives(all_reduce=0)


def collectives(*, all_reduce: int, all_gather: int = 0) -> dict[str, int]:
    others = dict.fromkeys(("all-to-all", "collective-permute", "reduce-scatter"), 0)
    return {"all-reduce": all_reduce, "all-gather": all_gather, **others}


def assert_no_second_cache(program: Program, batch_size: int) -> None:
    """Both halves of the float32 cache, of one kv head a device, reuse the donated memory, and none is copied."""
    half = 4 * 64 * batch_size * 8192 * 128
    assert program.aliased_bytes >= 2 * half
    assert program.temporary_bytes < half / 4
    assert not any(value.operation == "copy" and value.num_bytes == half for value in program.values)
