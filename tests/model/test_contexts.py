"""Every public function does the same under any mesh that its caller has set, and inside JAX's transformations."""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import or_thorough, random_model
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grokjax import (
    AsyncEngine,
    ByteTokenizer,
    Engine,
    Grok,
    GrokConfig,
    KVCache,
    Request,
    SampleSettings,
    TextGenerator,
    decode,
    decode_and_sample,
    forward,
    generate,
    init,
    load,
    load_parameters,
    make_mesh,
    plan,
    prefill,
    quantize,
    row_keys,
    sample_token,
    save,
)
from grokjax.model import with_values
from grokjax.sampling import log_probs_of, min_p_filter, top_k_filter, top_p_filter

CONFIG = GrokConfig.tiny().replace(num_layers=1, max_seq_len=48)
DENSE = CONFIG.replace(num_experts=1, experts_per_token=1)
TOKENS = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
LENGTHS = np.array([6, 4], np.int32)
AXES = ("data", "model")
# The model lies on (2, 4) of all 8 devices.
MESHES = {
    "its own": lambda: make_mesh((2, 4)),
    "its own, Explicit": lambda: jax.make_mesh((2, 4), AXES),
    "half Explicit": lambda: jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Auto, AxisType.Explicit)),
    "of another shape": lambda: make_mesh((1, 8)),
    "of other axes, Explicit": lambda: jax.make_mesh((8,), ("x",)),
    "of two devices": lambda: jax.make_mesh((2,), ("x",), devices=jax.devices()[6:]),
}


@functools.cache
def model():
    return random_model(CONFIG, dtype=jnp.float32, mesh=make_mesh((2, 4)))


@functools.cache
def dense():
    """A model without experts, for what is made of the steps, which show them."""
    return random_model(DENSE, dtype=jnp.float32, mesh=make_mesh((2, 4)))


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def assert_same(tree: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, on_host(tree), on_host(expected))


def run_steps() -> Any:
    logits, cache = prefill(dense(), TOKENS, jnp.asarray(LENGTHS), dense().new_cache(2, 16))
    row = KVCache.create(DENSE, 1, 8, mesh=make_mesh((2, 4)))
    cache = cache.insert(row, jnp.int32(1)).reset(0)
    after, cache = decode(dense(), np.array([1, 2]), cache, active=np.array([True, True]))
    settings = SampleSettings.create(2, temperature=1.0)
    keys = jax.random.split(jax.random.key(1), 2)
    drawn, cache = decode_and_sample(dense(), jnp.array([1, 2], jnp.int32), cache, settings, keys)
    return logits, after, drawn, cache


def run_parts() -> Any:
    embedded, route = model().embedding.embed(TOKENS), model().layers.feed_forward.route
    return embedded, route(embedded, layer=jnp.int32(0)), model().embedding.unembed(embedded)


def run_experts() -> Any:
    embedded = np.random.default_rng(0).normal(size=(2, 6, 64)).astype(np.float32)
    return model().layers.feed_forward(jnp.asarray(embedded), np.ones((2, 6), bool), layer=jnp.int32(0))


def run_sampling(logits: jax.Array) -> Any:
    settings = SampleSettings.create(2, temperature=1.0)
    keys = jax.random.split(jax.random.key(1), 2)
    drawn = sample_token(row_keys(keys, jnp.array([3, 4], jnp.int32)), logits, settings)
    filtered = [top_k_filter(logits, 3), top_p_filter(logits, 0.5), min_p_filter(logits, 0.1)]
    return drawn, filtered, log_probs_of(logits, jnp.array([1, 2], jnp.int32)), quantize(logits)


def run_engine() -> Any:
    with Engine(dense(), slots=2, max_len=32) as engine:
        return [done.token_ids for done in engine.generate([[1, 2, 3], [4, 5]], max_new_tokens=4, temperature=1.0)]


def run_text_generator() -> Any:
    texts = TextGenerator(dense(), ByteTokenizer(CONFIG.vocab_size), max_len=32)
    return texts.generate("ab", max_new_tokens=4, temperature=1.0).token_ids


def run_async_engine() -> Any:
    async def serve() -> Any:
        async with AsyncEngine(Engine(dense(), slots=2, max_len=32)) as engine:
            return await engine.complete(Request([1, 2, 3], max_new_tokens=4, temperature=1.0))

    return [done.token_ids for done in asyncio.run(serve())]


def save_and_load(folder: Path) -> Any:
    save(dense(), folder)
    norm = load_parameters(folder, [r"final_norm\.scale"], mesh=make_mesh((2, 4)))
    return forward(load(folder, mesh=make_mesh((2, 4)), dtype=jnp.float32), TOKENS), norm


EAGER: dict[str, Callable[[Path], Any]] = {
    "init": lambda _: jax.tree.leaves(init(CONFIG, mesh=make_mesh((2, 4)), quantized_table=True)),
    "init on one device": lambda _: forward(init(CONFIG, dtype=jnp.float32), TOKENS),
    "forward": lambda _: forward(model=model(), tokens=jnp.asarray(TOKENS)),
    "methods": lambda _: model().logits(model().hidden_states(TOKENS)),
    "parts": lambda _: run_parts(),
    "experts": lambda _: run_experts(),
    "a layer": lambda _: model().layers[0].pre_attention_norm.scale.get_value(),
    "generate": lambda _: generate(dense(), TOKENS, LENGTHS, max_new_tokens=3),
    "steps": lambda _: run_steps(),
    "engine": lambda _: run_engine(),
    "text generator": lambda _: run_text_generator(),
    "asynchronous engine": lambda _: run_async_engine(),
    "save and load": save_and_load,
    "sampling": lambda _: run_sampling(jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.float32)),
    "plan": lambda _: plan(DENSE, target="cpu:2", max_len=32, prompt_len=8).temporary_bytes,
}


# One with which each thing differs: the kind of its axes, its shape, its devices.
FEW = ("its own, Explicit", "of another shape", "of two devices")
# Each function under one of these, which take turns; two that show each step under all meshes.
IN_TURN = [(name, (FEW[number % len(FEW)],)) for number, name in enumerate(EAGER)]
ALL = [(name, tuple(MESHES)) for name in ("forward", "steps")]
# Two are made of others' programs, and the experts, which are no step here, of 100 small ones.
EVERYBODY_S = [case for case in IN_TURN if case[0] not in ("methods", "text generator", "experts")]


@pytest.mark.parametrize(
    ("name", "contexts"),
    or_thorough(IN_TURN + ALL, EVERYBODY_S),
    ids=lambda value: value if isinstance(value, str) else value[0] if len(value) == 1 else f"{len(value)} meshes",
)
def test_every_function_does_the_same_under_any_mesh(name: str, contexts: Sequence[str], tmp_path: Path) -> None:
    expected = EAGER[name](tmp_path / "none")
    for context in contexts:
        with jax.set_mesh(MESHES[context]()):
            assert_same(EAGER[name](tmp_path / context), expected)


TRANSFORMED: dict[str, Callable[[Any], Any]] = {
    "jit": lambda tokens: jax.jit(forward)(model(), tokens),
    "vmap": lambda tokens: jax.vmap(lambda row: forward(model(), row[None])[0])(tokens),
    "checkpoint": lambda tokens: jax.checkpoint(lambda one: forward(model(), one))(tokens),
    "linearize": lambda tokens: jax.linearize(lambda scale: forward(model(), tokens) * scale, 2.0)[1](1.0),
    "grad": lambda _: jax.grad(lambda x: forward(model(), embeddings=x).sum())(jnp.full((2, 6, 64), 0.5)),
    "a loop": lambda tokens: _loop(model(), tokens),
}


@jax.jit
def _loop(model: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The last logits [B, V] and the tokens [3, B] of three greedy steps."""
    logits, cache = prefill(model, tokens, jnp.asarray(LENGTHS), model.new_cache(2, 16))

    def advance(carry: Any, _: None) -> tuple[Any, jax.Array]:
        logits, cache = carry
        chosen = jnp.argmax(logits, axis=-1)
        return decode(model, chosen, cache), chosen

    (logits, _), chosen = jax.lax.scan(advance, (logits, cache), None, length=3)
    return logits, chosen


@functools.cache
def transformed(name: str) -> Any:
    """What comes of it where no mesh is set."""
    return TRANSFORMED[name](TOKENS)


OF_THE_DEVICES = ("of other axes, Explicit", "its own, Explicit", "its own")


@pytest.mark.parametrize(
    ("name", "context"),
    or_thorough(list(zip(TRANSFORMED, 2 * OF_THE_DEVICES, strict=True)), [("jit", "of other axes, Explicit")]),
)
def test_transformations_do_the_same_under_any_mesh_of_the_devices(name: str, context: str) -> None:
    expected = transformed(name)
    with jax.set_mesh(MESHES[context]()):
        assert_same(TRANSFORMED[name](jnp.asarray(TOKENS)), expected)


def test_shapes_are_told_in_any_context() -> None:
    for mesh in (None, MESHES["its own, Explicit"]()):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            assert jax.eval_shape(forward, model(), TOKENS).shape == (2, 6, 512)
            assert jax.tree.leaves(jax.eval_shape(lambda: init(CONFIG)))[0].shape == (512, 64)


@pytest.mark.parametrize("context", ["of another shape", "of two devices"])
def test_what_cannot_be_compiled_under_another_mesh_is_said(context: str) -> None:
    with jax.set_mesh(MESHES[context]()), pytest.raises(ValueError, match="or make the model on that mesh"):
        jax.jit(forward)(model(), TOKENS)


@pytest.mark.thorough
def test_tokens_are_drawn_from_logits_that_lie_on_explicit_axes() -> None:
    def run() -> Any:
        return run_sampling(prefill(model(), TOKENS, LENGTHS, model().new_cache(2, 16))[0])

    expected = run()
    with jax.set_mesh(MESHES["its own, Explicit"]()):
        assert_same(run(), expected)


def test_weights_are_changed_under_the_model_s_own_mesh() -> None:
    changed = random_model(CONFIG, dtype=jnp.float32, mesh=make_mesh((2, 4)))
    with jax.set_mesh(MESHES["its own, Explicit"]()):
        with jax.set_mesh(changed.mesh):
            changed.layers.feed_forward.router[0] = 0.0
        assert not np.asarray(changed.layers[0].feed_forward.router.get_value()).any()


@pytest.mark.thorough
def test_an_optimizer_trains_a_model_on_explicit_axes_under_its_own_mesh() -> None:
    trained = random_model(CONFIG, dtype=jnp.float32, quantized=False, mesh=MESHES["its own, Explicit"]())

    @nnx.jit
    def train(model: Grok, optimizer: nnx.Optimizer[Grok]) -> jax.Array:
        def loss(model: Grok) -> jax.Array:
            log_probs = jax.nn.log_softmax(forward(model, TOKENS)[:, :-1])
            return -jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    standard = jax.numpy_dtype_promotion("standard")  # which optax relies on
    with standard, jax.set_mesh(MESHES["its own, Explicit"]()), jax.set_mesh(trained.mesh):
        optimizer = nnx.Optimizer(trained, optax.adamw(1e-2), wrt=nnx.Param)
        before, after = (float(train(trained, optimizer)) for _ in range(2))
    assert after < before
    assert trained.layers.feed_forward.gate.get_value().sharding.spec[-1] == "model"


def test_results_are_arrays_that_jax_takes_under_the_callers_mesh() -> None:
    with jax.set_mesh(MESHES["its own, Explicit"]()):
        assert str(jax.typeof(forward(model(), TOKENS) + 1)) == "float32[2@data,6,512@model]"

    with jax.set_mesh(MESHES["of another shape"]()):
        assert (forward(model(), TOKENS) + 1).sharding.is_fully_replicated


@pytest.mark.parametrize("mesh", ["its own, Explicit", "of another shape", "of two devices"])
@pytest.mark.parametrize("is_split", [True, False])
def test_arrays_that_lie_elsewhere_are_placed(mesh: str, is_split: bool) -> None:
    lies_on = MESHES[mesh]()
    sharding = NamedSharding(lies_on, P(lies_on.axis_names[0]) if is_split else P())
    assert_same(forward(model(), jax.device_put(TOKENS, sharding)), forward(model(), TOKENS))


def test_a_cache_that_lies_elsewhere_is_refused() -> None:
    cache = KVCache.create(CONFIG, 2, 16, mesh=make_mesh((1, 4)))
    with pytest.raises(ValueError, match=r"the cache lies elsewhere than the model.*create it with the model's"):
        decode(model(), np.array([1, 2]), cache)


@functools.cache
def replicated():
    """A model on a mesh with an axis that it does not use."""
    mesh = jax.make_mesh((2, 2, 2), ("replica", *AXES))
    return random_model(CONFIG, dtype=jnp.float32, mesh=mesh), Mesh(mesh.devices, mesh.axis_names)


def test_a_model_runs_inside_a_shard_map_over_an_axis_that_it_does_not_use() -> None:
    four = np.concatenate([TOKENS, TOKENS + 7])
    made, mesh = replicated()

    out_specs = P("replica"), P(None, "replica")
    run = jax.shard_map(_loop, mesh=mesh, in_specs=(P(), P("replica")), out_specs=out_specs, axis_names={"replica"})
    logits, tokens = jax.jit(run)(made, four)
    for half in (slice(0, 2), slice(2, 4)):
        assert_same((logits[half], tokens[:, half]), _loop(made, four[half]))


def test_a_derivative_inside_a_shard_map_is_summed_over_the_axis_that_the_model_does_not_use() -> None:
    """JAX sums it for what is the same on all devices there, if it is told that the logits are not."""
    made, mesh = replicated()

    def gradient(scale: jax.Array, tokens: jax.Array) -> jax.Array:
        def loss(scale: jax.Array) -> jax.Array:
            return (forward(with_values(made, {"final_norm.scale": scale}), tokens) ** 2).sum()

        return jax.grad(loss)(scale)

    run = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("replica")), out_specs=P(), axis_names={"replica"})
    scale, four = made.final_norm.scale.get_value(), np.concatenate([TOKENS, TOKENS + 7])
    np.testing.assert_allclose(jax.jit(run)(scale, four), jax.jit(gradient)(scale, four), rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "axis", "function", "message"),
    [
        (lambda: replicated()[1], "data", forward, r"inside a shard_map over \['data'\].*call it outside"),
        (lambda: jax.make_mesh((8,), ("x",)), "x", forward, r"inside a shard_map over \['x'\].*call it outside"),
        (
            lambda: replicated()[1].update(axis_types=(AxisType.Explicit,) * 3),
            "replica",
            forward,
            "are Explicit, where JAX does not compile it: give shard_map",
        ),
        (
            lambda: replicated()[1],
            "replica",
            lambda made, tokens: generate(made, tokens, LENGTHS, max_new_tokens=2).tokens,
            "generate does not run inside a shard_map: call it outside, or loop over decode",
        ),
    ],
    ids=["an axis of the model's", "another mesh", "explicit axes", "generate"],
)
def test_a_shard_map_where_the_model_cannot_run_is_refused(
    mesh: Callable[[], Mesh], axis: str, function: Callable[..., jax.Array], message: str
) -> None:
    made, _ = replicated()
    run = jax.shard_map(functools.partial(function, made), mesh=mesh(), in_specs=P(), out_specs=P(), axis_names={axis})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, TOKENS)
