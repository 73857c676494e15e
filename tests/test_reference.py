"""The float64 reference against what the release computed: without this, agreement with the reference means little."""

import functools
import pickle
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference_backward
from builders import DENSE as SMALL_DENSE
from builders import SMALL, random_model
from goldens import MODEL_CASES, load_case

import grokjax
from grokjax.config import GrokConfig
from grokjax.reference import ReferenceOutput, forward, greedy, random_weights, unpack_weights

TOLERANCE = 6e-5
PARAMETERS = {
    "multi_head_attention/query": "attention.query",
    "multi_head_attention/key": "attention.key",
    "multi_head_attention/value": "attention.value",
    "multi_head_attention/linear": "attention.output",
    "router": "feed_forward.router",
    "linear": "feed_forward.gate",
    "linear_v": "feed_forward.up",
    "linear_1": "feed_forward.down",
    "rms_norm": "pre_attention_norm.scale",
    "rms_norm_1": "post_attention_norm.scale",
    "rms_norm_2": "pre_feed_forward_norm.scale",
    "rms_norm_3": "post_feed_forward_norm.scale",
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays and quantised weights; any other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        known = {
            "numpy.core.multiarray._reconstruct": np.ndarray(0).__reduce__()[0],
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            "ml_dtypes.bfloat16": ml_dtypes.bfloat16,
            "__main__.QuantizedWeight8bit": SimpleNamespace,
        }
        return known[f"{module}.{name}"]


def our_path(module: str) -> str:
    if module == "language_model/in_out_embed":
        return "embedding.table"
    if module == "language_model/rms_norm":
        return "final_norm.scale"
    layer, name = re.fullmatch(r"transformer/decoder_layer_(\d+)/(?:moe/)?(.+)", module).groups()
    return f"layers.{layer}.{PARAMETERS[name]}"


def dequantised(tensor: Any) -> np.ndarray:
    """float64 of a plain array, or of int8 [..., in, out] with scales [..., Q, out] over Q blocks of `in`."""
    if isinstance(tensor, np.ndarray):
        return tensor.astype(np.float64)
    *leading, rows, columns = tensor.weight.shape
    blocks = tensor.scales.shape[-2]
    # Exact products: the release writes them in the scales' dtype, but compiled it never rounds them to bfloat16.
    blocked = tensor.weight.reshape(*leading, blocks, rows // blocks, columns).astype(np.float64)
    return (blocked * tensor.scales[..., :, None, :].astype(np.float64)).reshape(*leading, rows, columns)


@functools.cache
def golden_weights(name: str) -> dict[str, np.ndarray]:
    case, weights = load_case(name), {}
    for entry in case.manifest:
        with (case.checkpoint / entry["file"]).open("rb") as stream:
            weights[our_path(entry["module"])] = dequantised(_ArraysOnly(stream).load())
    return weights


@functools.cache
def reference_row(name: str, row: int) -> ReferenceOutput:
    case = load_case(name)
    return forward(golden_weights(name), case.config, case.tokens[row, : case.lengths[row]])


def golden_row(name: str, row: int, capture: str) -> np.ndarray:
    """One row's real positions of a recorded float32 array."""
    case = load_case(name)
    golden = case.arrays["float32"][capture]
    if capture in ("full_logits", "embed", "final_norm_out"):
        return golden[row, : case.lengths[row]]
    return golden[:, row, : case.lengths[row]]


EVERY_ROW = [(name, row) for name in MODEL_CASES for row in range(len(load_case(name).lengths))]


@pytest.mark.parametrize(("name", "row"), EVERY_ROW)
def test_logits_are_the_release_s(name: str, row: int) -> None:
    np.testing.assert_allclose(
        reference_row(name, row).logits, golden_row(name, row, "full_logits"), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize(("name", "row"), EVERY_ROW)
def test_inner_values_are_the_release_s(name: str, row: int) -> None:
    captures = dict(reference_row(name, row).captures)
    if load_case(name).config.num_experts > 1:
        np.testing.assert_array_equal(captures.pop("router_index"), golden_row(name, row, "router_index"))
        for capture in (
            "moe_out",
            "norm3_out",
        ):  # recorded after the release rounded the sum of its experts to bfloat16
            np.testing.assert_allclose(captures.pop(capture), golden_row(name, row, capture), rtol=2**-8, atol=1e-5)
    else:
        captures.pop("moe_out")  # not recorded without experts
    for capture, actual in captures.items():
        expected = golden_row(name, row, capture)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * max(1, expected.std()), err_msg=capture)


@pytest.mark.parametrize("name", MODEL_CASES)
def test_decoding_is_the_release_s(name: str) -> None:
    case, golden = load_case(name), load_case(name).arrays["float32"]
    for row, length in enumerate(case.lengths):
        sequence = [*case.tokens[row, :length], *golden["decode_tokens"][row, :-1]]
        logits = forward(golden_weights(name), case.config, sequence).logits[length - 1 :]
        np.testing.assert_array_equal(logits.argmax(axis=-1), golden["decode_tokens"][row])
        np.testing.assert_allclose(logits[1:], golden["decode_logits"][row], rtol=0, atol=TOLERANCE)


def test_greedy_continues_as_the_release_does() -> None:
    case = load_case("tiny-mesh-1x4")
    prompt = case.tokens[1, : case.lengths[1]].tolist()
    expected = case.arrays["float32"]["decode_tokens"][1, :5].tolist()
    assert greedy(golden_weights(case.name), case.config, prompt, 5) == expected
    assert greedy(golden_weights(case.name), case.config, prompt, 0) == []


@pytest.mark.parametrize(
    ("changes", "at_least"),
    [
        ({"attention_softcap": 1e9}, 0.1),
        ({"norm_eps": 1e-6}, 0.05),
        ({"rope_base": 9000.0}, 0.01),
        ({"experts_per_token": 1}, 0.1),
        ({"attention_multiplier": 0.2501}, 1e-3),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_wrong_constant_shows(changes: dict[str, float], at_least: float) -> None:
    case = load_case("tiny-moe")
    wrong = forward(golden_weights("tiny-moe"), case.config.replace(**changes), case.tokens[0])
    difference = np.abs(wrong.logits - golden_row("tiny-moe", 0, "full_logits")).max()
    assert difference > at_least


DENSE = GrokConfig.tiny().replace(num_experts=1, experts_per_token=1)


@pytest.mark.parametrize("config", [GrokConfig.tiny(), DENSE], ids=["experts", "dense"])
def test_random_weights_keep_every_part_in_its_working_range(config: GrokConfig) -> None:
    weights = random_weights(config, seed=0)
    output = forward(weights, config, list(range(5, 37)))
    captures = output.captures
    assert 1 < output.logits.std() < 4
    assert 0.2 < captures["embed"].std() < 0.4
    assert 0.5 < captures["norm1_out"].std() < 2
    assert 0.5 < captures["norm3_out"].std() < 2
    assert 0.01 < captures["attn_out"].std() < 0.2
    groups = config.num_heads // config.num_kv_heads
    keys = captures["k_rope"].repeat(groups, axis=2)
    scores = np.einsum("ltnh,lsnh->lnts", captures["q_rope"], keys) * config.attention_multiplier
    assert 1 < scores.std() < 4
    if config.num_experts > 1:
        assert len(np.unique(captures["router_index"])) == config.num_experts
        ranked = np.sort(captures["router_probs"], axis=-1)[..., ::-1]
        assert (ranked[..., config.experts_per_token - 1] - ranked[..., config.experts_per_token]).min() > 1e-5
    assert len(set(greedy(weights, config, [5, 6, 7], 8))) > 2


def test_random_weights_have_exactly_the_documented_shapes_and_follow_their_seed() -> None:
    config = GrokConfig.tiny()
    first, again, other = (random_weights(config, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not np.array_equal(first["embedding.table"], other["embedding.table"])
    assert len(first) == 2 + config.num_layers * 12
    assert first["layers.1.feed_forward.down"].shape == (8, 128, 64)
    assert first["layers.1.attention.key"].shape == (64, 64)
    dense = random_weights(DENSE, 1)
    assert len(dense) == 2 + config.num_layers * 11
    assert dense["layers.0.feed_forward.gate"].shape == (64, 128)


@pytest.mark.parametrize("config", [GrokConfig.tiny(), DENSE], ids=["experts", "dense"])
def test_the_backward_pass_is_the_slope_of_the_forward_pass(config: GrokConfig) -> None:
    random, weights = np.random.default_rng(0), random_weights(config, 0)
    tokens = random.integers(3, config.vocab_size, 7)
    cotangents = random.standard_normal((len(tokens), config.vocab_size))
    found, _ = reference_backward.backward(weights, config, tokens, cotangents)
    for name, weight in weights.items():
        step = 1e-5 * random.standard_normal(weight.shape) * np.abs(weight).mean()
        sums = [
            np.sum(forward({**weights, name: weight + sign * step}, config, tokens).logits * cotangents)
            for sign in (1, -1)
        ]
        np.testing.assert_allclose((sums[0] - sums[1]) / 2, np.sum(found[name] * step), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        pytest.param(SMALL, {"quantized_table": True}, id="int8, its table too"),
        pytest.param(SMALL_DENSE, {"quantized": False, "mesh": (2, 4)}, id="dense, plain, on a mesh"),
    ],
)
def test_a_model_s_weights_unpacked_give_its_logits(config: GrokConfig, options: dict[str, Any]) -> None:
    if "mesh" in options:
        options = {**options, "mesh": grokjax.make_mesh(options["mesh"])}
    model = random_model(config, dtype=np.float32, **options)
    tokens = np.arange(3, 9)
    weights = unpack_weights(model)
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in random_weights(config, 0).items()
    }
    expected = forward(weights, config, tokens).logits
    np.testing.assert_allclose(grokjax.forward(model, tokens[None])[0], expected, atol=5e-5 * expected.std(), rtol=0)


def test_scale_blocks_are_unpacked_each_to_its_rows() -> None:
    model = random_model(SMALL, dtype=np.float32)
    output = model.layers.attention.output
    plain = np.random.default_rng(0).standard_normal(output.get_value().shape).astype(np.float32)
    output.set_value(grokjax.quantize(plain, num_blocks=4))
    found = unpack_weights(model)["layers.0.attention.output"]
    np.testing.assert_allclose(found, grokjax.dequantize(output.get_value())[0], rtol=1e-6)
    assert np.abs(found - plain[0]).max() < 0.05


@pytest.mark.parametrize("tokens", ["hello", [[5, 6]], [], [5.0], [-1], [512]])
def test_what_is_no_row_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(ValueError, match="tokens must be one row of ids from 0 to 511, such as"):
        forward(random_weights(GrokConfig.tiny(), 0), GrokConfig.tiny(), tokens)
