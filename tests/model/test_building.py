"""Random weights: their distribution, and that the mesh does not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import FULLY, SMALL

from grokjax.model import Grok, abstract_model, init, named_parameters
from grokjax.model.weights import random_normal
from grokjax.sharding import Partitioner, make_mesh

# The rows of its gate are cut into parts, and the columns of its down, of whose 40 rows no part has some for 8 devices.
CONFIG = SMALL.replace(vocab_size=512, ffn_dim=40)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of more than 256 numbers are drawn in parts, each with an even share for 8 devices."""
    monkeypatch.setattr("grokjax.model.weights._PART", 1 << 8)
    monkeypatch.setattr("grokjax.model.weights._DEVICES", 8)


def arrays_of(model: Grok) -> dict[str, np.ndarray]:
    """Every array of a model, by the path of its parameter."""
    leaves = jax.tree_util.tree_leaves_with_path({k: v.get_value() for k, v in named_parameters(model).items()})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(64, 96), (2, 256, 512), (2, 40, 4096)], ids=["few", "in rows", "in columns"])
@pytest.mark.usefixtures("in_parts")
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


@pytest.mark.usefixtures("in_parts")
def test_weights_in_parts_are_the_same_on_every_mesh() -> None:
    alone = arrays_of(init(CONFIG, seed=5, mesh=make_mesh((1, 1))))
    split = arrays_of(init(CONFIG, seed=5, mesh=make_mesh((2, 4)), rules=FULLY))
    assert alone.keys() == split.keys()
    for name, array in alone.items():
        np.testing.assert_array_equal(array, split[name], err_msg=name)


def test_abstract_models_share_nothing() -> None:
    make = functools.partial(abstract_model, SMALL, Partitioner.create(SMALL), dtype=jnp.float32, quantized=False)
    changed, other = make(), make()
    named_parameters(changed)["final_norm.scale"].set_value(jnp.full(SMALL.model_dim, 3.0))
    assert isinstance(named_parameters(changed)["final_norm.scale"].get_value(), jax.Array)
    for model in (other, make()):
        assert isinstance(named_parameters(model)["final_norm.scale"].get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize(("seed", "shown"), [(jax.random.key(0), r"key<.*>\[\]"), (1.5, "1.5"), (None, "None")])
def test_a_seed_that_is_no_integer_is_refused(seed: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"seed must be an integer, such as 0, and {shown} is given"):
        init(CONFIG, seed=seed)
