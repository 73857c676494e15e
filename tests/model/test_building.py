"""Random weights: their distribution, and that the mesh does not change them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import FULLY, SMALL

from grokjax.model import Grok, init, named_parameters
from grokjax.model.weights import random_normal
from grokjax.sharding import make_mesh

# Its table and its experts are large enough to be drawn in parts.
LARGE = SMALL.replace(vocab_size=32768, num_layers=1, ffn_dim=8192)


def arrays_of(model: Grok) -> dict[str, np.ndarray]:
    """Every array of a model, by the path of its parameter."""
    leaves = jax.tree_util.tree_leaves_with_path({k: v.get_value() for k, v in named_parameters(model).items()})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 96), (2, 2048, 512)], ids=["whole", "in parts"])
def test_normal_numbers_are_normal(shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    drawn = jax.jit(lambda key: random_normal(key, shape=shape, dtype=dtype, deviation=0.25))(jax.random.key(3))
    assert (drawn.shape, drawn.dtype) == (shape, dtype)
    numbers = np.sort(np.asarray(drawn, np.float64).ravel()) / 0.25
    within = 4 / numbers.size**0.5
    assert abs(numbers.mean()) < within
    # The middles of 256 parts that are as likely as each other have a deviation of 0.9948.
    assert abs(numbers.std() - (1 if dtype == jnp.float32 else 0.9948)) < within + 1e-3
    for limit, below in ((-1, 0.158655), (0.5, 0.691462), (2, 0.977250)):
        assert abs((numbers < limit).mean() - below) < within + (0 if dtype == jnp.float32 else 1 / 256)
    rows = np.asarray(drawn, np.float32).reshape(-1, shape[-1])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_large_weights_are_the_same_on_every_mesh() -> None:
    alone = arrays_of(init(LARGE, seed=5, mesh=make_mesh((1, 1))))
    split = arrays_of(init(LARGE, seed=5, mesh=make_mesh((2, 4)), rules=FULLY))
    assert alone.keys() == split.keys()
    for name, array in alone.items():
        np.testing.assert_array_equal(array, split[name], err_msg=name)
