"""The module of router and experts: padding evaluates nothing, on any mesh, and one expert is a dense block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import EXPERT, TENSOR
from evaluated_experts import gated, recorded
from flax import nnx

from grokjax.config import GrokConfig
from grokjax.model.feed_forward import FeedForward
from grokjax.sharding import Partitioner, ShardingRules, make_mesh

DIM, HIDDEN = 16, 24
SMALL = GrokConfig.tiny().replace(model_dim=DIM, ffn_dim=HIDDEN, num_layers=2)


def block_on(mesh: tuple[int, int], rules: ShardingRules, config: GrokConfig = SMALL) -> FeedForward:
    partitioner = Partitioner.create(config, make_mesh(mesh), rules)
    return FeedForward(config, dtype=jnp.float32, quantized=False, partitioner=partitioner, rngs=nnx.Rngs(0))


def random_tokens(number: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((number, DIM)).astype(np.float32)


def second_layer(module: FeedForward, x: jax.Array, valid: jax.Array) -> jax.Array:
    return module(x, valid, layer=jnp.int32(1))


@pytest.mark.parametrize(
    ("mesh", "rules", "devices_of_an_expert"),
    [
        pytest.param((1, 1), TENSOR, 1, id="one device"),
        pytest.param((1, 8), TENSOR, 8, id="tensor parallel"),
        pytest.param((1, 8), EXPERT, 1, id="expert parallel"),
    ],
)
def test_invalid_tokens_evaluate_nothing(
    mesh: tuple[int, int], rules: ShardingRules, devices_of_an_expert: int
) -> None:
    module, x = block_on(mesh, rules), jnp.asarray(random_tokens(8).reshape(2, 4, DIM))
    valid = np.array([[True, True, False, False], [True, False, False, False]])
    experts = np.asarray(module.route(x, layer=jnp.int32(1))[1])
    chosen = set(experts[valid].flat)
    assert set(experts[~valid].flat) - chosen, "the padding must have chosen experts of its own"
    out, evaluated = recorded(second_layer, module, x, valid)(module, x, valid)
    assert len(evaluated) == devices_of_an_expert * len(chosen)
    assert (out[~valid] == 0).all()
    assert (out[valid] != 0).any(axis=-1).all()


def test_dense_block_is_one_expert() -> None:
    """One expert, and no router."""
    module = block_on((1, 1), ShardingRules(), SMALL.replace(num_experts=1, experts_per_token=1))
    assert not hasattr(module, "router")
    x = random_tokens(8)
    gate, up, down = (np.asarray(p.get_value(), np.float64)[1, 0] for p in (module.gate, module.up, module.down))
    out = jax.jit(second_layer)(module, jnp.asarray(x.reshape(2, 4, DIM)), np.ones((2, 4), bool))
    np.testing.assert_allclose(out, gated(x, gate, up, down).reshape(2, 4, DIM), atol=2e-5)
