"""Loads checkpoints of any layout straight into a model's shards: all of one, some layers, or single parameters."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grokjax.checkpoint.assembly import Builder
from grokjax.checkpoint.layouts import open_checkpoint
from grokjax.checkpoint.likeness import check_same_weights
from grokjax.checkpoint.mapping import map_sources, match_parameters
from grokjax.checkpoint.progress import Report
from grokjax.checkpoint.stacks import bytes_of_stacks, stacks_of
from grokjax.checkpoint.stored import Checkpoint
from grokjax.config import GrokConfig
from grokjax.context import own_context
from grokjax.model import Grok, abstract_model, check_dtype, check_weights_fit, with_quantized_table
from grokjax.quantization import Weight
from grokjax.sharding import Partitioner, ShardingRules

HOST_BYTES = 1 << 30


@own_context()
def load(
    path: str | Path | Checkpoint,
    config: GrokConfig | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    quantized: bool | Sequence[str] = True,
    quantized_table: bool = False,
    rules: ShardingRules | None = None,
    layers: Sequence[int] | None = None,
    rename: Sequence[tuple[str, str]] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    max_host_bytes: int = HOST_BYTES,
    progress: Report | None = None,
    allow_oom: bool = False,
) -> Grok:
    """Reads a checkpoint of any layout into a sharded model, whatever mesh it was written from.

    Every device is given its own slice of one matrix at a time: the host needs no more memory than that, and no device
    ever holds another's. CPUs use the memory that a slice was read into, without a copy; those that hold the same
    slice share it. Files of the release are never unpickled. Where the mesh spans processes, all of them first
    compare samples of every array of theirs.

    Args:
      path: the folder of the release's files or its parent, of safetensors files, or of `grokjax.json`; or a checkpoint
        that `open_checkpoint` of `grokjax.checkpoint` has opened.
      config: the sizes; without it they are the checkpoint's, which the files of the release only tell for Grok-1.
      mesh: from `make_mesh`; by default all devices along the model axis that divide the sizes, see `default_mesh`.
      dtype: compute dtype and dtype of the plain weights, float32 or bfloat16; norms and router are float32.
      quantized: which weights that are int8 in the checkpoint stay so, with their scales: all, none, or those in whose
        path, such as `layers.attention.query`, one of some regular expressions is found. The others become plain: 2 or
        4 bytes a weight in place of 1. Weights that are plain in the checkpoint stay plain.
      quantized_table: makes the embedding table int8, with a scale for each token, once it is on the devices; see
        docs/model.md for its error. `save` does not take such a model.
      rules: sharding rules; tensor parallel by default.
      layers: numbers of the checkpoint's layers to use, in this order; all by default. The model has as many layers.
      rename: pairs of a regular expression and its replacement. The first that is found in a parameter's path (as in
        docs/model.md, with the layer's number: `layers.3.attention.query`) turns it into the checkpoint's path. With
        rules, or with `layers`, parameters of the checkpoint may be left unused; otherwise that is an error.
      exclude: regular expressions; a parameter in whose path one is found keeps its fresh random value.
      seed: of the fresh values.
      max_host_bytes: what reading may hold on the host at once, beside the weights of CPU devices; one matrix is always
        allowed.
      progress: called after each part, and first for each parameter that keeps its fresh value; without it the logger
        is told now and then.
      allow_oom: try it even where the devices have too little memory left.

    Raises:
      CheckpointError: There is no checkpoint, it is damaged, or it does not fit the model: every mismatch is listed.
        Or another process has other weights.
      ValueError: The mesh, the rules, the layers or the dtype do not fit the configuration, an expression is none, or
        the devices have too little memory left.

    Source: `layers`, `rename` and `exclude` do what the release's `runners.py` and `checkpoint.py` call rename and
    exclude rules.
    """
    check_dtype(dtype)
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, config)
    config, sources = map_sources(checkpoint, config, layers, rename, exclude)
    partitioner = Partitioner.create(config, mesh, rules)
    check_same_weights(checkpoint, together=partitioner.mesh.is_multi_process)
    abstract = abstract_model(config, partitioner, dtype=dtype, quantized=False)
    stacks = stacks_of(abstract, sources, quantized)
    if not allow_oom:
        check_weights_fit(bytes_of_stacks(stacks, checkpoint.tensors, partitioner), partitioner)
    builder = Builder(checkpoint, partitioner, max_host_bytes)
    model = builder.build_model(abstract, sources, stacks, seed=seed, progress=progress)
    return with_quantized_table(model) if quantized_table else model


@own_context()
def load_parameters(
    path: str | Path,
    patterns: Sequence[str],
    config: GrokConfig | None = None,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    rules: ShardingRules | None = None,
    max_host_bytes: int = HOST_BYTES,
) -> dict[str, Weight]:
    r"""Reads some parameters of a checkpoint and nothing else.

    Args:
      path: a checkpoint of any layout.
      patterns: regular expressions; a parameter is read if one matches its whole path, as in `layers\.3\..*`.
      config: as for `load`.
      mesh: as for `load`.
      dtype: of plain weights; norms and router are float32.
      rules: as for `load`.
      max_host_bytes: as for `load`.

    Returns:
      The checkpoint's path -> the parameter in its shards, without a layer axis; experts are [E, C, O].

    Raises:
      CheckpointError: As for `load`.
      ValueError: A pattern matches no parameter.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(path, config)
    partitioner = Partitioner.create(checkpoint.config, mesh, rules)
    wanted = match_parameters(checkpoint, patterns)
    check_same_weights(checkpoint, together=partitioner.mesh.is_multi_process)
    one_layer = abstract_model(checkpoint.config.replace(num_layers=1), partitioner, dtype=dtype, quantized=False)
    return Builder(checkpoint, partitioner, max_host_bytes).build_parameters(one_layer, wanted)
