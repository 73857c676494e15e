"""What a step reads and computes: against counts by hand."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from planned import TINY

from grokjax.checkpoint import parameter_shapes
from grokjax.model import abstract_model
from grokjax.planning import step_cost
from grokjax.sharding import RULES, Partitioner, make_mesh


class TestCosts:
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
