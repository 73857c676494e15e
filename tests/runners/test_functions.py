"""The release's functions of arrays, by its names: what the release answered, recorded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import load_pure

from grokjax import KVCache
from grokjax.runners import SampleSettings, get_pad_bucket, insert_slice, pad_to_size, sample_token, top_p_filter


@pytest.mark.parametrize(
    "case", [c for c in load_pure().tables["sample"] if c["dtype"] == "float32"], ids=lambda case: case["i"]
)
def test_sample_token_draws_as_the_release(case: dict) -> None:
    arrays, name = load_pure().arrays, case["i"]
    recorded = {f: arrays[f"{name}_{f}"] for f in ("keys", "logits", "temperature", "nucleus_p", "mask")}
    settings = SampleSettings(
        recorded["temperature"], recorded["nucleus_p"], recorded["mask"], np.ones(case["B"], bool)
    )
    with jax.threefry_partitionable(case["rng"] == "part"):
        drawn = sample_token(jnp.asarray(recorded["keys"]), jnp.asarray(recorded["logits"]), settings)
    np.testing.assert_array_equal(drawn.token_id, arrays[f"{name}_jit_token_id"])
    np.testing.assert_allclose(drawn.prob, arrays[f"{name}_jit_prob"], rtol=1e-5)
    np.testing.assert_allclose(drawn.top_k_probs, arrays[f"{name}_jit_top_k_probs"], rtol=1e-5, atol=1e-12)
    assert drawn.top_k_token_ids.shape == (case["B"], 8)


def test_sample_token_takes_outputs_with_logits() -> None:
    @dataclasses.dataclass
    class Outputs:
        logits: jax.Array

    logits = jnp.array([[[0.0, 3.0, 1.0]]])
    settings = SampleSettings(np.zeros(1), np.ones(1), np.ones((1, 3)), np.ones(1))
    drawn = sample_token(jax.random.split(jax.random.key(0), 1), Outputs(logits), settings, num_top=2)
    assert drawn.token_id.tolist() == [[1]]
    assert drawn.top_k_token_ids.tolist() == [[1, 2]]


def test_top_p_filter_keeps_what_the_release_keeps() -> None:
    arrays = load_pure().arrays
    logits, p, expected = (arrays[f"topp0_{name}"] for name in ("logits", "p", "jit"))
    # At p = 0 and below, the release may keep everything; sampling's own tests hold the definition.
    rows = [row for row in range(len(p)) if p[row].item() > 0]
    np.testing.assert_array_equal(top_p_filter(jnp.asarray(logits), jnp.asarray(p))[rows,], expected[rows,])


def test_pad_to_size_pads_as_the_release() -> None:
    for case in load_pure().tables["pad_to_size"]:
        padded = pad_to_size(np.array(case["x"], case["dtype"]), case["size"])
        assert padded.tokens.tolist() == case["out"]
        assert padded.length == min(len(case["x"]), case["size"])


def test_get_pad_bucket_chooses_as_the_release() -> None:
    for case in load_pure().tables["get_pad_bucket"]:
        assert get_pad_bucket(case["size"], case["pad_sizes"]) == case["out"]


@pytest.mark.parametrize("row", range(3))
def test_insert_slice_inserts_as_the_release(row: int) -> None:
    arrays = load_pure().arrays

    def ours(entries: np.ndarray) -> jax.Array:
        return jnp.asarray(entries.swapaxes(2, 3))  # [L, B, S, K, H] -> [L, B, K, S, H]

    memory = KVCache(
        ours(arrays["insert_mem_k"]), ours(arrays["insert_mem_v"]), jnp.asarray(arrays["insert_mem_step"][0])
    )
    one = KVCache(ours(arrays["insert_slice_k"]), ours(arrays["insert_slice_v"]), jnp.array([99]))
    made = insert_slice(memory, one, 7, row)
    np.testing.assert_array_equal(made.keys, ours(arrays[f"insert_out{row}_k"]))
    np.testing.assert_array_equal(made.values, ours(arrays[f"insert_out{row}_v"]))
    np.testing.assert_array_equal(made.lengths, arrays[f"insert_out{row}_step"][0])
