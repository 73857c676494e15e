"""What all modules and parameters of a model share: how they print, and that a view of one layer is only read."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from flax import nnx
from flax.nnx import reprlib

from grokjax.model.probes import Edits
from grokjax.printing import describe, describe_bytes, describe_devices, display


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "this is a view of one layer, model.layers[i], for reading: what is written into it would change a copy. Write "
        "into the stack that the model holds, such as model.layers.feed_forward.router[i] = value; docs/model.md has "
        'more under "Changing weights".'
    )


class Parameter(nnx.Param):
    """A parameter of a model. It prints what it is, and none of its numbers.

    Raises:
      ValueError: It is given a value of another kind, shape or dtype, which the next step of the model would refuse.
    """

    def set_value(self, value: Any, **part: Any) -> None:
        """Takes another value, or a part of it by `index`, as `parameter[index] = value` does."""
        if not part and _form(value) != _form(self.get_value()):
            given = describe(value) if hasattr(value, "dtype") or hasattr(value, "scales") else type(value).__name__
            raise ValueError(
                f"the parameter holds {describe(self.get_value())}, and {given} is given: give the same kind with the "
                'same shape and dtype; docs/model.md has more under "Changing weights".'
            )
        super().set_value(value, **part)

    def __nnx_repr__(self) -> Iterator[Any]:
        value = self.get_value()
        yield reprlib.Object(type(self).__name__, same_line=True)
        yield reprlib.Attr("value", _summary(value), use_raw_value=True)
        for name, metadata in self.get_metadata(exclude_required=True).items():
            yield reprlib.Attr(name, metadata)

    __treescope_repr__ = display


class ParameterView(Parameter):
    """A parameter of one layer, cut out of the stack: it refuses to be written.

    Raises:
      ValueError: It is given another value.
    """

    set_value = copy_from = _refuse

    def update_from_state(self, variable_state: nnx.Variable) -> None:
        """Takes its own value back, which is how the transformations of Flax leave what they were given."""
        own, given = (jax.tree.leaves(variable.get_raw_value()) for variable in (self, variable_state))
        if any(mine is not other for mine, other in zip(own, given, strict=True)):
            _refuse()


def _form(value: Any) -> tuple[Any, ...]:
    """What of a value a model's steps are made for: of int8 the scales, too, but not of how many blocks they are."""
    weight, scales = getattr(value, "weight", value), getattr(value, "scales", None)
    form = (getattr(weight, "shape", None), getattr(weight, "dtype", None))
    return form if scales is None else (type(value), *form, scales.shape[:-2], scales.shape[-1:])


def _summary(value: Any) -> str:
    """An array and its bytes; what is made of several tells them itself."""
    return f"{describe(value)}, {describe_bytes(value)}" if hasattr(value, "dtype") else describe(value)


class Module(nnx.Module):
    """A module of a model. It prints its parameters by path, as they stand in docs/model.md.

    Raises:
      ValueError: An attribute of a view is set.
    """

    is_view = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.is_view:
            _refuse()
        super().__setattr__(name, value)

    def __nnx_repr__(self) -> Iterator[Any]:
        values = {name: param.get_value() for name, param in named_parameters(self).items()}
        count = sum(math.prod(value.shape) for value in values.values() if hasattr(value, "shape"))
        kind = ", a view for reading" if self.is_view else ""
        yield reprlib.Object(type(self), comment=f" # {count:,} parameters, {describe_devices(values)}{kind}")
        for name, value in values.items():
            yield reprlib.Attr(name, _summary(value), use_raw_value=True)

    __treescope_repr__ = display


M = TypeVar("M", bound=Module)


def view(module: M, cut: Callable[[jax.Array], jax.Array], **changes: Any) -> M:
    """A module for reading, with a part of each array.

    Args:
      module: stays as it is.
      cut: takes the part of an array.
      changes: attributes that the view has otherwise.
    """

    def view_of(param: nnx.Variable) -> nnx.Variable:
        return ParameterView.from_metadata(jax.tree.map(cut, param.get_value()), param.get_metadata())

    graphdef, state = nnx.split(module)
    viewed = nnx.merge(graphdef, jax.tree.map(view_of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
    vars(viewed).update(changes)
    for _, inner in nnx.iter_modules(viewed):
        vars(inner)["is_view"] = True
    return viewed


def named_parameters(module: Module) -> dict[str, nnx.Variable]:
    """The parameters of a model, or of a module, by path, such as `layers.attention.query`; it may be abstract."""
    found = nnx.to_flat_state(nnx.split(module)[1])
    return {parameter_name(path): param for path, param in found if not isinstance(param, Edits)}


def parameter_name(path: tuple[Any, ...]) -> str:
    """The name of the parameter at a path of attributes, such as `layers.attention.query`."""
    return ".".join(map(str, path))
