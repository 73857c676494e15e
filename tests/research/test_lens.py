"""What the lens says of a stream is what the reference's norm and table make of it."""

import numpy as np
import pytest
from looked_into import CONFIG, LENGTHS, TOKENS, expected, make

from grokjax import reference
from grokjax.research import Tap, observe, top_tokens


def test_the_lens_gives_the_most_probable_tokens_of_each_layer() -> None:
    model = make()
    logits, seen = observe(model, TOKENS, LENGTHS, {"x": Tap("stream.out", at="last", via=top_tokens(model, 3))})
    weights = reference.unpack_weights(model)
    x = expected()["stream.out"][:, [0, 1], LENGTHS - 1]  # [L, B, D]
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + CONFIG.norm_eps) * weights["final_norm.scale"]
    wanted = normed @ weights["embedding.table"].T * CONFIG.output_multiplier
    ids = np.argsort(-wanted, axis=-1)[..., :3]
    np.testing.assert_array_equal(seen["x"].ids, ids)
    logprobs = np.take_along_axis(wanted - np.log(np.exp(wanted).sum(axis=-1, keepdims=True)), ids, axis=-1)
    np.testing.assert_allclose(seen["x"].logprobs, logprobs, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(seen["x"].ids[-1, :, 0], logits.argmax(axis=-1))  # the last layer says what is said


def test_a_lens_of_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="count=0 tokens were asked for: ask for 1 to 264"):
        top_tokens(make(), 0)
