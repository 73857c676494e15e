"""How sampling settings are made, and what is said when they cannot be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokjax.sampling import SampleSettings, sample_token, seed_key


def test_settings_broadcast_scalars_and_a_mask_for_all_rows() -> None:
    created = SampleSettings.create(3, temperature=0.5, mask=[1, 0, 1])
    np.testing.assert_array_equal(created.temperature, np.full(3, 0.5, np.float32))
    np.testing.assert_array_equal(created.mask, [[True, False, True]] * 3)
    assert created.top_k.dtype == jnp.int32
    assert created.active.dtype == jnp.bool_


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 in row 0 must be a finite number, 0 \(greedy\) or more"),
        ({"temperature": [1.0, np.inf]}, r"temperature=inf in row 1 must be a finite number"),
        ({"temperature": 1e39}, r"temperature=1e\+39 in row 0 must be a finite number"),
        ({"temperature": np.nan}, r"temperature=nan in row 0 must be a finite number"),
        ({"top_p": 1.5}, r"top_p=1\.5 in row 0 must be a number from 0 to 1"),
        ({"top_p": [0.5, -0.5]}, r"top_p=-0\.5 in row 1 must be a number from 0 to 1"),
        ({"min_p": 2}, r"min_p=2 in row 0 must be a number from 0 to 1"),
        ({"temperature": "hot"}, r"temperature='hot' must be a number, or one for each row"),
        ({"active": [None, True]}, r"active=\[None, True\] must be a number, or one for each row"),
        ({"top_k": [3, -1]}, r"top_k=-1 in row 1 must be 0 \(no limit\) or more"),
        ({"top_k": 2.5}, r"top_k has dtype float64: give integers"),
        ({"temperature": [1.0, 1.0, 1.0]}, r"temperature has shape \(3,\): give one value, or one for each of the 2"),
        ({"active": [True]}, r"active has shape \(1,\): give one value"),
        ({"mask": np.ones((3, 4))}, r"mask has shape \(3, 4\): give \[V\], or \[B, V\] for 2 rows"),
        ({"mask": True}, r"mask has shape \(\): give \[V\]"),
        ({"mask": [[0, 1], [0, 0]]}, r"mask allows no token in row 1: at least one must remain"),
    ],
)
def test_impossible_settings_are_refused_in_words(controls: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleSettings.create(2, **controls)


@pytest.mark.parametrize("batch_size", [0, 2.0, "two"])
def test_what_is_no_number_of_rows_is_refused(batch_size: Any) -> None:
    with pytest.raises(ValueError, match=rf"batch_size={batch_size!r} must be an integer, 1 or more"):
        SampleSettings.create(batch_size)


@pytest.mark.parametrize("seed", ["a", 1.5, 2**70, None])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed=.* must be an integer of at most 64 bits"):
        seed_key(seed)


def test_shapes_that_disagree_are_refused_in_words() -> None:
    keys, logits, two = jax.random.split(jax.random.key(0), 2), np.zeros((2, 8), np.float32), SampleSettings.create(2)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 1, 8\): give \[B, V\]"):
        sample_token(keys, logits[:, None], two)
    with pytest.raises(ValueError, match=r"logits have 2 rows, but there are 2 keys and settings of shape \(3,\)"):
        sample_token(keys, logits, SampleSettings.create(3))
    with pytest.raises(ValueError, match=r"logits have 2 rows, but there are 1 keys"):
        sample_token(keys[:1], logits, two)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\), logits have \(2, 8\)"):
        sample_token(keys, logits, SampleSettings.create(2, mask=np.ones(3)))
    with pytest.raises(ValueError, match=r"num_top=9 must be from 0 to the 8 tokens"):
        sample_token(keys, logits, two, num_top=9)
