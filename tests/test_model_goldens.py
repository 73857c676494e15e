"""The model, read from the release's own files, gives the release's numbers: on every mesh, batched and row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import MODEL_CASES, GoldenCase, load_case

from grokjax.cache import KVCache
from grokjax.checkpoint import load
from grokjax.model import Grok
from grokjax.sharding import ShardingRules, make_mesh
from grokjax.steps import decode, forward, prefill

TENSOR = ShardingRules.tensor_parallel()
EXPERT = ShardingRules.expert_parallel()
FULLY = TENSOR.replace(embed="data")
# tiny-moe has 4 query heads, which 8 devices cannot split.
WHOLE_HEADS = EXPERT.replace(heads=None, kv_heads=None)

# Every case on every mesh; the rules vary so that each is met with plain, quantised and blocked weights.
PLACES = [
    *((case, (1, 1), TENSOR) for case in MODEL_CASES),
    *((case, (8, 1), TENSOR) for case in MODEL_CASES),
    *((case, (2, 4), TENSOR) for case in MODEL_CASES),
    *((case, (1, 8), TENSOR) for case in MODEL_CASES if case != "tiny-moe"),
    ("tiny-moe", (1, 8), WHOLE_HEADS),
    ("tiny-moe-s8", (1, 8), EXPERT),
    ("tiny-mesh-1x4", (2, 4), EXPERT),
    ("tiny-moe-s8", (2, 4), FULLY),
    ("tiny-dense-2x4", (2, 4), FULLY),
]
ATOL_LOGITS = 5e-5  # of a deviation of 2; a float64 model differs by up to 6e-5, ours from the release by less
ATOL_CACHE = 1e-4


@functools.cache
def load_model(case: str, mesh: tuple[int, int], rules: ShardingRules, dtype: str = "float32") -> Grok:
    golden = load_case(case)
    return load(golden.checkpoint, golden.config, make_mesh(mesh), jnp.dtype(dtype), rules=rules)


def real_logits(case: GoldenCase, logits: np.ndarray) -> np.ndarray:
    """The logits [sum of lengths, V] at real positions of [B, T, V]."""
    return np.concatenate([row[:length] for row, length in zip(logits, case.lengths, strict=True)])


@pytest.mark.parametrize(("case", "mesh", "rules"), PLACES, ids=str)
class TestFloat32:
    def test_forward(self, case: str, mesh: tuple[int, int], rules: ShardingRules) -> None:
        golden = load_case(case)
        logits = np.asarray(forward(load_model(case, mesh, rules), golden.tokens))
        expected = golden.arrays["float32"]["full_logits"]
        np.testing.assert_allclose(real_logits(golden, logits), real_logits(golden, expected), atol=ATOL_LOGITS, rtol=0)

    def test_prefill_and_greedy_decode_in_a_batch(self, case: str, mesh: tuple[int, int], rules: ShardingRules) -> None:
        golden = load_case(case)
        check_generation(golden, load_model(case, mesh, rules), rows=range(len(golden.lengths)))


@pytest.mark.parametrize(
    ("case", "mesh", "rules"),
    [
        *(("tiny-moe-s8", mesh, TENSOR) for mesh in ((1, 1), (1, 8), (2, 4), (8, 1))),
        *(("tiny-dense-2x4", mesh, TENSOR) for mesh in ((1, 1), (2, 4))),
    ],
    ids=str,
)
def test_row_by_row(case: str, mesh: tuple[int, int], rules: ShardingRules) -> None:
    golden = load_case(case)
    for row in range(len(golden.lengths)):
        check_generation(golden, load_model(case, mesh, rules), rows=[row])


def check_generation(golden: GoldenCase, model: Grok, rows) -> None:
    """Prefill and greedy decoding of some rows together: logits, tokens, lengths and the whole cache."""
    arrays, rows = golden.arrays["float32"], list(rows)
    expected_tokens = arrays["decode_tokens"][rows]  # [B, n + 1], the first from the prefill
    logits, cache = prefill(model, golden.tokens[rows], golden.lengths[rows], model.new_cache(len(rows), 64))
    np.testing.assert_allclose(logits, arrays["prefill_logits"][rows, 0], atol=ATOL_LOGITS, rtol=0)
    for step in range(expected_tokens.shape[1] - 1):
        tokens = np.asarray(logits).argmax(-1)
        np.testing.assert_array_equal(tokens, expected_tokens[:, step])
        logits, cache = decode(model, tokens, cache)
        np.testing.assert_allclose(logits, arrays["decode_logits"][rows, step], atol=ATOL_LOGITS, rtol=0)
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1), expected_tokens[:, -1])
    check_cache(cache, arrays["final_k"][:, rows], arrays["final_v"][:, rows], golden.lengths[rows] + step + 1)


def check_cache(cache: KVCache, keys: np.ndarray, values: np.ndarray, lengths: np.ndarray) -> None:
    """Compares with the release's [L, B, S, K, H]; ours is head-major and may hold a head once for each device."""
    np.testing.assert_array_equal(cache.lengths, lengths)
    copies = cache.keys.shape[2] // keys.shape[3]
    for ours, theirs in ((cache.keys, keys), (cache.values, values)):
        theirs = theirs.swapaxes(2, 3).repeat(copies, axis=2)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                np.asarray(ours)[:, row, :, :length], theirs[:, row, :, :length], atol=ATOL_CACHE, rtol=0
            )


@pytest.mark.parametrize("case", MODEL_CASES)
def test_inner_values(case: str) -> None:
    """Layer by layer through the modules themselves: norms, attention, router, experts."""
    golden, model = load_case(case), load_model(case, (1, 1), TENSOR)
    arrays, layers = golden.arrays["float32"], model.layers
    batch, length = golden.tokens.shape
    real = np.arange(length)[None] < golden.lengths[:, None]
    start, count = jnp.zeros(batch, jnp.int32), jnp.asarray(golden.lengths)

    def check(ours: jax.Array, theirs: np.ndarray, tolerance: float = 2e-5) -> None:
        theirs = theirs[real]
        scale = max(1.0, float(np.abs(theirs).max()))
        np.testing.assert_allclose(np.asarray(ours)[real], theirs, atol=tolerance * scale, rtol=0)

    x = model.embedding.encode(jnp.asarray(golden.tokens))
    check(x, arrays["embed"])
    for i in range(golden.config.num_layers):
        layer = jnp.asarray(i, jnp.int32)
        scratch = model.new_cache(batch, length)
        normed = layers.pre_attention_norm(x, layer)
        check(normed, arrays["norm0_out"][i])
        mixed, _, _ = layers.attention(
            normed, scratch.keys, scratch.values, layer=layer, slot=layer, start=start, count=count
        )
        check(mixed, arrays["attn_out"][i])
        normed = layers.post_attention_norm(mixed, layer)
        check(normed, arrays["norm1_out"][i])
        x = x + normed
        normed = layers.pre_feed_forward_norm(x, layer)
        check(normed, arrays["norm2_out"][i])
        if golden.config.num_experts > 1:
            gates, experts = layers.feed_forward.route(normed, layer=layer)
            check(layers.feed_forward.router_logits(normed, layer=layer), arrays["router_logits"][i])
            np.testing.assert_array_equal(np.asarray(experts)[real], arrays["router_index"][i][real])
            check(gates, arrays["router_gate"][i])
        mixed = layers.feed_forward(normed, jnp.asarray(real), layer=layer)
        if "moe_out" in arrays:
            check(mixed, arrays["moe_out"][i], tolerance=2**-7)  # the release rounds it to bfloat16
        x = x + layers.post_feed_forward_norm(mixed, layer)
        check(x, arrays["layer_out"][i], tolerance=5e-5 if golden.config.num_experts == 1 else 2**-8)
    check(model.final_norm(x), arrays["final_norm_out"])


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("case", ["tiny-moe", "tiny-moe-s8"])
def test_bfloat16(case: str, mesh: tuple[int, int]) -> None:
    """Near the release in bfloat16, which disagrees with itself by more; nearer still to its float32."""
    golden, model = load_case(case), load_model(case, mesh, TENSOR, "bfloat16")
    logits = real_logits(golden, np.asarray(forward(model, golden.tokens)))
    to_bfloat16 = logits - real_logits(golden, golden.arrays["bfloat16"]["full_logits"])
    to_float32 = logits - real_logits(golden, golden.arrays["float32"]["full_logits"])
    assert rms(to_bfloat16) < 0.15
    assert np.abs(to_bfloat16).max() < 1.2
    assert rms(to_float32) < 0.05


@pytest.mark.parametrize("case", ["tiny-moe", "tiny-moe-s8"])
def test_bfloat16_decoding_along_forced_tokens(case: str) -> None:
    golden, model = load_case(case), load_model(case, (1, 1), TENSOR, "bfloat16")
    arrays = golden.arrays["bfloat16"]
    forced, expected = arrays["forced_tokens"].astype(np.int32), arrays["forced_logits"]
    _, cache = prefill(
        model, golden.tokens, golden.lengths, model.new_cache(len(golden.lengths), 64, dtype=model.dtype)
    )
    for step in range(expected.shape[1]):
        logits, cache = decode(model, forced[:, step], cache)
        difference = np.asarray(logits) - expected[:, step]
        assert rms(difference) < 0.15
        assert np.abs(difference).max() < 1.2
        top = np.sort(expected[:, step], axis=-1)
        sure = top[:, -1] - top[:, -2] > 0.5
        np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[sure], expected[:, step].argmax(-1)[sure])


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("case", MODEL_CASES)
def test_int8_cache(case: str, mesh: tuple[int, int]) -> None:
    """Rounding keys and values costs about as much as computing in bfloat16 does."""
    golden, model = load_case(case), load_model(case, mesh, TENSOR)
    arrays = golden.arrays["float32"]
    logits, cache = prefill(
        model, golden.tokens, golden.lengths, model.new_cache(len(golden.lengths), 64, dtype="int8")
    )
    differences = [np.asarray(logits) - arrays["prefill_logits"][:, 0]]
    for step in range(arrays["decode_logits"].shape[1]):
        logits, cache = decode(model, arrays["decode_tokens"][:, step].astype(np.int32), cache)
        differences.append(np.asarray(logits) - arrays["decode_logits"][:, step])
    assert rms(np.stack(differences)) < 0.04
    assert np.abs(differences).max() < 0.25


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
