"""Models, caches, requests and plans carried elsewhere: pickled, copied, exported. Results stay the same to the bit."""

import copy
import functools
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import TINY_DENSE, random_model
from jax import export

from grokjax import (
    ByteTokenizer,
    Grok,
    GrokConfig,
    KVCache,
    Plan,
    Request,
    SampleSettings,
    ShardingRules,
    decode,
    forward,
    load,
    make_mesh,
    plan,
    prefill,
    save,
)
from grokjax.engine import Engine
from grokjax.quantization import quantize
from grokjax.request import Completion
from grokjax.sharding import Partitioner

CONFIG = TINY_DENSE.replace(max_seq_len=32)
EXPERTS = GrokConfig.tiny().replace(num_layers=1, max_seq_len=32)
TOKENS = jnp.asarray([[5, 6, 7, 8]])
KINDS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8 table": {"quantized_table": True},
    "plain bfloat16": {"quantized": False},
    "plain float32": {"quantized": False, "dtype": jnp.float32},
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": lambda value: pickle.loads(cloudpickle.dumps(value)),
    "deepcopy": copy.deepcopy,
}


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the bit, in the same structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def filled_cache(model: Grok, **options: Any) -> KVCache:
    cache = model.new_cache(1, 16, **options)
    return prefill(model, TOKENS, [TOKENS.shape[1]], cache)[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_the_same_after_it(kind: str, way: str) -> None:
    model = random_model(CONFIG, **KINDS[kind])
    carried = WAYS[way](model)
    assert carried.config == CONFIG
    assert_same(carried, model)
    assert_same(forward(carried, TOKENS), forward(model, TOKENS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_decoding_goes_on_from_a_cache(dtype: str, way: str) -> None:
    model = random_model(CONFIG)
    cache = filled_cache(model, dtype=dtype)
    carried = WAYS[way](cache)
    assert_same(carried, cache)
    assert_same(decode(model, [9], carried), decode(model, [9], cache))


VALUES = {
    "configuration": CONFIG,
    "rules": ShardingRules.expert_parallel(),
    "settings": SampleSettings.create(2, temperature=0.5, top_k=3, mask=np.arange(8) > 2),
    "request": Request("hi", stop=["a"], stop_ids=np.arange(3), logit_bias={3: 1.5}, logprobs=2),
    "weight": quantize(jnp.eye(4)),
    "tokenizer": ByteTokenizer(512),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_the_same_after_it(name: str, way: str) -> None:
    carried = WAYS[way](VALUES[name])
    assert type(carried) is type(VALUES[name])
    jax.tree.map(np.testing.assert_array_equal, vars(carried), vars(VALUES[name]))


@functools.cache
def completed() -> Completion:
    """One with all that it may tell."""
    request = Request("hi", max_new_tokens=2, logprobs=2, prompt_logprobs=True, ignore_eos=True)
    with Engine(random_model(CONFIG), ByteTokenizer(512), slots=1, max_len=16) as engine:
        handle = engine.submit(request)
        engine.run()
    return handle.samples[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_completion_is_the_same_after_it(way: str) -> None:
    assert completed().error is None
    assert repr(WAYS[way](completed())) == repr(completed())  # NaN, of the first token, equals nothing


def test_an_unpickled_model_is_a_model_like_any_other(tmp_path: Path) -> None:
    """It is saved, and runs in an engine."""
    model = random_model(CONFIG)
    carried = pickle.loads(pickle.dumps(model))
    save(carried, tmp_path / "saved")
    assert_same(forward(load(tmp_path / "saved"), TOKENS), forward(model, TOKENS))
    drawn = []
    for one in (model, carried):
        with Engine(one, ByteTokenizer(512), slots=1, max_len=16) as engine:
            [completion] = engine.generate(["hi"], max_new_tokens=3, ignore_eos=True)
            drawn.append(completion.token_ids)
    assert drawn[0] == drawn[1]


def test_a_model_that_is_unpickled_is_on_the_default_device() -> None:
    device = jax.devices()[3]
    data = pickle.dumps(random_model(CONFIG))
    with jax.default_device(device):
        carried = pickle.loads(data)
        logits = forward(carried, TOKENS)
    assert {leaf.device for leaf in jax.tree.leaves(carried)} == {device}
    assert logits.device == device


def test_a_copy_of_a_model_on_several_devices_stays_there() -> None:
    model = random_model(CONFIG, mesh=make_mesh((2, 4)))
    copied = copy.deepcopy(model)
    assert copied.partitioner is model.partitioner
    assert [leaf.sharding for leaf in jax.tree.leaves(copied)] == [leaf.sharding for leaf in jax.tree.leaves(model)]
    assert_same(forward(copied, TOKENS), forward(model, TOKENS))


@pytest.mark.parametrize("dump", [pickle.dumps, cloudpickle.dumps])
def test_a_model_on_several_devices_is_saved_instead(dump: Callable[[Any], bytes]) -> None:
    with pytest.raises(ValueError, match=r"a model on 8 devices is not pickled: write it with grokjax\.save, and load"):
        dump(random_model(CONFIG, mesh=make_mesh((2, 4))))


@functools.cache
def planned() -> Plan:
    return plan(CONFIG, target="a100-40g:8", max_len=32, prompt_len=8)


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_is_the_same_after_it(way: str) -> None:
    carried = WAYS[way](planned())
    assert carried == planned()
    assert carried.find_largest_max_len() == planned().find_largest_max_len()


ELSEWHERE = """
import pickle, sys
from grokjax import decode, forward

model, cache, tokens, plan = pickle.load(sys.stdin.buffer)
try:
    plan.find_largest_batch_size()
except ValueError as error:
    problem = str(error)
figures = (plan.weights_bytes, plan.cache_bytes, plan.total_bytes, plan.fits, plan.mesh)
pickle.dump((forward(model, tokens), decode(model, [9], cache), figures, problem), sys.stdout.buffer)
"""


def test_another_process_gets_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of one device, where a plan for eight still has its figures, and says what it needs to compile more."""
    model, plan = random_model(CONFIG), planned()
    cache = filled_cache(model)
    monkeypatch.setenv("XLA_FLAGS", re.sub(r"(device_count)=8", r"\1=1", os.environ["XLA_FLAGS"]))
    data = pickle.dumps((model, cache, TOKENS, plan))
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=data, capture_output=True, check=True)
    logits, decoded, figures, problem = pickle.loads(done.stdout)
    assert_same(logits, forward(model, TOKENS))
    assert_same(decoded, decode(model, [9], cache))
    assert figures == (plan.weights_bytes, plan.cache_bytes, plan.total_bytes, plan.fits, plan.mesh)
    assert "needs 8 devices and there are 1" in problem


LAYOUT = export.DisabledSafetyCheck.custom_call("LayoutConstraint")
PLATFORMS = ("cpu", "cuda", "tpu")


def exported_step(model: Grok, cache: KVCache, **options: Any) -> export.Exported:
    """A decode step, whose arguments are the leaves of model and cache, and tokens."""
    leaves, tree = jax.tree.flatten((model, cache))

    def step(leaves: list[jax.Array], tokens: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        logits, cache = decode(tree.unflatten(leaves)[0], tokens, tree.unflatten(leaves)[1])
        return logits, jax.tree.leaves(cache)

    return export.export(jax.jit(step), **options)(leaves, jnp.asarray([9]))


@pytest.mark.parametrize("extents", [(1, 1), pytest.param((1, 8), marks=pytest.mark.thorough)])
def test_exported_steps_are_read_back_and_compute_the_same(extents: tuple[int, int]) -> None:
    model = random_model(CONFIG, mesh=make_mesh(extents))
    leaves, tree = jax.tree.flatten(model)
    whole = jax.jit(lambda leaves, tokens: forward(tree.unflatten(leaves), tokens))
    exported = export.export(whole, platforms=PLATFORMS, disabled_checks=[LAYOUT])(leaves, TOKENS)
    again = export.deserialize(exported.serialize())
    assert again.platforms == PLATFORMS
    assert_same(again.call(leaves, TOKENS), forward(model, TOKENS))

    cache = filled_cache(model)
    exported = exported_step(model, cache, platforms=PLATFORMS, disabled_checks=[LAYOUT])
    logits, filled = export.deserialize(exported.serialize()).call(jax.tree.leaves((model, cache)), jnp.asarray([9]))
    expected, expected_cache = decode(model, [9], cache)
    assert_same(logits, expected)
    assert_same(filled, jax.tree.leaves(expected_cache))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_form_of_a_device_is_exported_for_it(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not without the check that is documented: JAX guarantees nothing for a custom call that fixes a layout."""
    model = random_model(EXPERTS)
    cache = filled_cache(model, dtype="bfloat16")
    monkeypatch.setattr(Partitioner, "platform", platform)
    exported = exported_step(model, cache, platforms=[platform], disabled_checks=[LAYOUT])
    assert exported.platforms == (platform,)
    with pytest.raises(ValueError, match="LayoutConstraint"):
        exported_step(model, cache, platforms=[platform])
