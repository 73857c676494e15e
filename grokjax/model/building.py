"""Models made: with random weights, and of shapes alone, to load into or to compile for."""

import functools
import operator
from collections.abc import Collection, Mapping
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from grokjax.config import GrokConfig
from grokjax.context import own_context
from grokjax.memory import check_fits
from grokjax.model.base import named_parameters, parameter_name
from grokjax.model.grok import Grok, check_dtype
from grokjax.printing import describe
from grokjax.quantization import QuantizedTable, Weight, partition_specs, quantize_table
from grokjax.sampling import seed_key
from grokjax.sharding import Partitioner, ShardingRules, check_has_devices, device_bytes, with_shardings


@own_context()
def init(
    config: GrokConfig,
    *,
    seed: int = 0,
    mesh: Mesh | AbstractMesh | None = None,
    rules: ShardingRules | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    quantized: bool = True,
    quantized_table: bool = False,
    allow_oom: bool = False,
) -> Grok:
    """A model with random weights, each shard made on its own device; the same weights on every mesh.

    Args:
      config: the sizes.
      seed: of the weights; its low 32 bits count. With another dtype it gives another model.
      mesh: from `make_mesh`; by default all devices along the model axis that divide the sizes, see `default_mesh`.
      rules: sharding rules; tensor parallel by default.
      dtype: compute dtype and dtype of plain weights, float32 or bfloat16.
      quantized: int8 weights in attention and experts, else plain ones.
      quantized_table: the embedding table in int8 too, with a scale for each token; see docs/model.md for its error.
      allow_oom: try it even where the devices have too little memory left.

    Raises:
      ValueError: The mesh or the rules do not fit the configuration, the dtype is not a compute dtype, the seed is no
        integer, or the devices have too little memory left.
    """
    partitioner = Partitioner.create(config, mesh, rules)
    abstract = abstract_model(config, partitioner, dtype=dtype, quantized=quantized)
    if not allow_oom:
        check_weights_fit(device_bytes(jax.tree.leaves(abstract)), partitioner)
    values = init_parameters(config, partitioner, seed=seed, dtype=dtype, quantized=quantized)
    model = with_values(abstract, values)
    return with_quantized_table(model) if quantized_table else model


def check_weights_fit(num_bytes: int, partitioner: Partitioner) -> None:
    """Checks that the devices have room for the weights of a model, before any is made.

    Args:
      num_bytes: of the weights on each device.
      partitioner: of the model.

    Raises:
      ValueError: They have too little memory left.
    """
    remedy = "take more devices, or larger ones (`grokjax plan` tells which do), or a model of fewer layers"
    check_fits("a model", num_bytes, partitioner.mesh, remedy=remedy)


@own_context()
def with_quantized_table(model: Grok) -> Grok:
    """The model with its embedding table in int8, on the same devices; the other arrays are shared."""
    param, partitioner = model.embedding.table, model.partitioner
    rounded = functools.partial(quantize_table, with_columns=partitioner.platform == "cpu")
    shapes = jax.eval_shape(rounded, param.get_value())
    shardings: QuantizedTable = partitioner.shardings(partition_specs(shapes, param.logical_axes, partitioner))
    table = jax.jit(rounded, out_shardings=shardings)(param.get_value())
    return with_values(model, {"embedding.table": table})


def with_values(model: Grok, values: Mapping[str, Weight | QuantizedTable]) -> Grok:
    """The model, or an abstract one, with other values of some parameters; of the others the arrays are shared.

    Args:
      model: stays as it is.
      values: path of a parameter (`layers.attention.query`) -> its value, of the shape that it has in the model.
    """
    graphdef, state = nnx.split(model)
    # Without `copy` both models would have the same variables, and who changes one would change the other.
    return nnx.merge(graphdef, state_with_values(state, values), copy=True)


def state_with_values(state: nnx.State, values: Mapping[str, Weight | QuantizedTable]) -> nnx.State:
    """The state of a model, or of a part of it, with other values of some parameters, by path as in `with_values`."""
    params = {parameter_name(path): (path, param) for path, param in nnx.to_flat_state(state)}
    for name, value in values.items():
        path, param = params[name]
        params[name] = path, param.replace(value)
    return nnx.from_flat_state(list(params.values()))


@own_context()
def init_parameters(
    config: GrokConfig,
    partitioner: Partitioner,
    *,
    seed: int,
    dtype: DTypeLike,
    quantized: bool,
    names: Collection[str] | None = None,
) -> dict[str, Weight]:
    """The random values that `init` gives to some parameters, by path (`layers.attention.query`), or to all.

    Large ones are made one after the other, so that the devices hold what one of them takes to make beside the results;
    small ones together, by one program instead of many.
    """
    check_has_devices(partitioner.mesh)
    made: dict[str, Weight] = {}
    key = seed_key(np.uint32(_as_integer(seed) % 2**32))
    abstract = named_parameters(abstract_model(config, partitioner, dtype=dtype, quantized=quantized))
    for group in _groups({name: value for name, value in abstract.items() if names is None or name in names}):
        # Under `jit` it is a part of another program, which is compiled in its own way.
        is_quick = group.is_small and not isinstance(key, jax.core.Tracer) and partitioner.platform == "cpu"
        maker = parameter_maker(
            config, partitioner, group.names, dtype=jnp.dtype(dtype), quantized=quantized, is_quick=is_quick
        )
        made |= jax.block_until_ready(maker(key))
    return made


def _as_integer(seed: SupportsIndex) -> int:
    try:
        return operator.index(seed)
    except TypeError as error:
        raise ValueError(
            f"seed must be an integer, such as 0, and {describe(seed)} is given; the key is made of it by "
            "jax.random.key."
        ) from error


# Bytes that parameters may take and be made by one program.
_TOGETHER = 32 << 20


class _Group(NamedTuple):
    """Parameters that are made together: one large one, or small ones."""

    names: tuple[str, ...]
    is_small: bool


def _groups(abstract: Mapping[str, nnx.Variable]) -> list[_Group]:
    """The groups, the same on every mesh: how one is compiled may change the last bit of a float32 number."""
    sizes = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(param))
        for name, param in abstract.items()
    }
    groups: list[tuple[str, ...]] = []
    left = 0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if sizes[name] > left:
            groups.append(())
            left = _TOGETHER
        groups[-1] += (name,)
        left -= sizes[name]
    return [_Group(names, sum(sizes[name] for name in names) <= _TOGETHER) for names in groups]


@functools.cache
def parameter_maker(
    config: GrokConfig,
    partitioner: Partitioner,
    names: tuple[str, ...],
    *,
    dtype: jnp.dtype,
    quantized: bool,
    is_quick: bool = False,
) -> jax.stages.Wrapped:
    """The compiled function that makes parameters of `init`, by path, from a key, in their shards.

    A second model reuses it. One of small parameters takes longer to compile than to run: on CPUs, outside of `jit`,
    one that `is_quick` is compiled in half the time, with the first of LLVM's levels.
    """
    abstract = named_parameters(abstract_model(config, partitioner, dtype=dtype, quantized=quantized))
    shardings = {name: jax.tree.map(lambda leaf: leaf.sharding, abstract[name].get_value()) for name in names}

    def make(key: jax.Array) -> dict[str, Weight]:
        model = Grok(config, dtype=dtype, quantized=quantized, partitioner=partitioner, rngs=nnx.Rngs(key))
        params = named_parameters(model)
        return {name: params[name].get_value() for name in names}

    options: dict[str, str | bool] | None = {"xla_backend_optimization_level": "1"} if is_quick else None
    return jax.jit(make, out_shardings=shardings, compiler_options=options)


@own_context()
def abstract_model(config: GrokConfig, partitioner: Partitioner, *, dtype: DTypeLike, quantized: bool) -> Grok:
    """A model of `jax.ShapeDtypeStruct`s with shardings: what to load into, or to compile for, without any memory.

    Args:
      config: the sizes.
      partitioner: mesh and rules.
      dtype: compute dtype and dtype of plain weights, float32 or bfloat16.
      quantized: int8 weights in attention and experts, else plain ones.

    Raises:
      ValueError: The dtype is not a compute dtype.
    """
    check_dtype(dtype)
    graphdef, state = _abstract_parts(config, partitioner, jnp.dtype(dtype), quantized)
    return nnx.merge(graphdef, state, copy=True)


@functools.cache
def _abstract_parts(
    config: GrokConfig, partitioner: Partitioner, dtype: jnp.dtype, quantized: bool
) -> tuple[nnx.GraphDef[Grok], nnx.State]:
    """An abstract model, split: what starts a process asks for it several times, and each takes 50 ms to trace."""

    def build() -> Grok:
        return Grok(config, dtype=dtype, quantized=quantized, partitioner=partitioner, rngs=nnx.Rngs(seed_key(0)))

    def place(param: nnx.Variable) -> nnx.Variable:
        value = param.get_value()
        shardings = partitioner.shardings(partition_specs(value, param.logical_axes, partitioner))
        return param.replace(with_shardings(value, shardings))

    graphdef, state = nnx.split(nnx.eval_shape(build))
    return graphdef, jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
