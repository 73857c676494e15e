"""Which parameter of a model comes from where in a checkpoint: chosen layers, rename rules, exclude rules."""

import re
from collections.abc import Sequence

from grokjax.checkpoint.parameters import PARAMETERS, parameter_shapes, stack_name
from grokjax.checkpoint.sizes import check_count
from grokjax.checkpoint.stored import Checkpoint, CheckpointError, list_problems, mismatches
from grokjax.config import GrokConfig


def check_layers(layers: Sequence[int], config: GrokConfig) -> Sequence[int]:
    """The layers if they are some of the checkpoint's.

    Raises:
      ValueError: They are not.
    """
    if not layers or not all(type(layer) is int and 0 <= layer < config.num_layers for layer in layers):
        raise ValueError(f"layers={list(layers)}: name one or more of the checkpoint's 0 to {config.num_layers - 1}.")
    return layers


def map_sources(
    checkpoint: Checkpoint,
    config: GrokConfig | None,
    layers: Sequence[int] | None,
    rename: Sequence[tuple[str, str]],
    exclude: Sequence[str],
) -> tuple[GrokConfig, dict[str, str | None]]:
    """The configuration of the model that `load` makes, and where each of its parameters comes from.

    Args:
      checkpoint: of any layout.
      config: the sizes; None for the checkpoint's.
      layers: as for `load`.
      rename: as for `load`.
      exclude: as for `load`.

    Returns:
      The configuration, with as many layers as are chosen, and what `map_parameters` returns.

    Raises:
      CheckpointError: The checkpoint does not fit; every mismatch is listed.
      ValueError: The layers are not the checkpoint's, or an expression is none.
    """
    config = checkpoint.config if config is None else config
    check_count(checkpoint.path, config, "num_layers", len(checkpoint.tensors), "parameters in it")
    chosen = range(config.num_layers) if layers is None else check_layers(layers, checkpoint.config)
    config = config.replace(num_layers=len(chosen))
    sources = map_parameters(config, chosen, rename, exclude)
    check_sources(checkpoint, sources, parameter_shapes(config), may_leave=[""] if layers or rename else exclude)
    return config, sources


def map_parameters(
    config: GrokConfig, layers: Sequence[int], rename: Sequence[tuple[str, str]], exclude: Sequence[str]
) -> dict[str, str | None]:
    """The model's path, with the layer's number -> the checkpoint's path, None where the value stays fresh."""
    sources: dict[str, str | None] = {}
    for parameter in parameter_shapes(config):
        name = re.sub(r"^layers\.(\d+)\.", lambda found: f"layers.{layers[int(found[1])]}.", parameter)
        sources[parameter] = None if is_found(name, exclude) else _renamed(name, rename)
    return sources


def match_parameters(checkpoint: Checkpoint, patterns: Sequence[str]) -> list[str]:
    """The parameters of a checkpoint whose whole path matches one of some regular expressions.

    Raises:
      ValueError: A pattern is no expression, or matches no parameter.
    """
    for pattern in patterns:
        check_expression(pattern)
        if not any(re.fullmatch(pattern, parameter) for parameter in checkpoint.tensors):
            raise ValueError(
                f"{pattern!r} matches no parameter: docs/model.md lists them; layers.0 is the first layer."
            )
    return [name for name in checkpoint.tensors if any(re.fullmatch(pattern, name) for pattern in patterns)]


def check_expression(pattern: str) -> None:
    """Refuses what is no regular expression.

    Raises:
      ValueError: It is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression ({error}): escape its special characters."
        ) from error


def check_quantized(quantized: bool | Sequence[str]) -> None:
    """Refuses what does not say which weights stay int8.

    Raises:
      ValueError: It is neither true nor false nor a list of expressions of which each finds a matrix of attention or
        experts.
    """
    if isinstance(quantized, bool):
        return
    if isinstance(quantized, str) or not isinstance(quantized, Sequence):
        raise ValueError(f"quantized={quantized!r}: give true, false, or a list of regular expressions.")
    for pattern in quantized:
        if not any(row.is_quantizable and _search(pattern, name) for name, row in PARAMETERS.items()):
            raise ValueError(
                f"quantized={pattern!r} is found in no weight that may be int8: those are "
                f"{', '.join(name for name, row in PARAMETERS.items() if row.is_quantizable)}."
            )


def is_found(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of some regular expressions is found in a parameter's path.

    Raises:
      ValueError: One is no expression.
    """
    return any(_search(pattern, name) for pattern in patterns)


def _renamed(name: str, rename: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rename:
        if _search(pattern, name):
            try:
                return re.sub(pattern, replacement, name)
            except re.error as error:
                raise ValueError(
                    f"{replacement!r} cannot replace {pattern!r} ({error}): name groups that the pattern has."
                ) from error
    return name


def _search(pattern: str, name: str) -> bool:
    check_expression(pattern)
    return re.search(pattern, name) is not None


def check_sources(
    checkpoint: Checkpoint, sources: dict[str, str | None], shapes: dict[str, tuple[int, ...]], may_leave: Sequence[str]
) -> None:
    """Compares each parameter of the model with where it comes from, and all that is in the checkpoint with its uses.

    Args:
      checkpoint: of any layout.
      sources: what `map_parameters` returned.
      shapes: of the model's parameters.
      may_leave: regular expressions; what is found by one in the checkpoint need not be used.

    Raises:
      CheckpointError: Something does not fit; everything that does not is listed.
    """
    problems: list[str] = []
    kinds: dict[str, set[bool]] = {}
    for parameter, source in sources.items():
        if source is None:
            continue
        if source not in checkpoint.tensors:
            problems.append(f"{parameter}: the checkpoint has no {source}")
            continue
        tensor = checkpoint.tensors[source]
        where = parameter if parameter == source else f"{parameter} from {source}"
        problems += [f"{where}: {text}" for text in mismatches(tensor, parameter, shapes[parameter])]
        kinds.setdefault(stack_name(parameter), set()).add(tensor.scales is None)
    problems += [
        f"{name}: some are quantised and some are plain: all layers must be alike, convert the checkpoint first"
        for name, found in kinds.items()
        if len(found) > 1
    ]
    unused = set(checkpoint.tensors) - set(sources.values())
    problems += [
        f"{name}: not used by the model"
        for name in checkpoint.tensors
        if name in unused and not is_found(name, may_leave)
    ]
    if problems:
        advice = (
            "Pass the configuration that the checkpoint was made with, or rename and exclude what is meant to differ."
        )
        raise CheckpointError(list_problems(checkpoint.path, problems, advice))
