"""Derivatives by a rule: for functions whose loops JAX cannot run backwards, or would pay for with too much memory.

A function with a rule has derivatives of both modes, and those of one mode of the other: `jax.grad`, `jax.jvp`,
`jax.linearize`, and the product of a Hessian with a vector as the `jax.jvp` of a `jax.grad`. Only what runs a
derivative backwards needs more than this gives, and is refused.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def with_rule(
    function: Callable[..., Any],
    pull: Callable[..., Any],
    *,
    saving: Callable[..., Any] | None = None,
    smooth: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`function` with a rule for its derivatives; called as it is, it is `function`.

    Args:
      function: of trees of arrays; it gives a tree of floats, where it is differentiated. Integers are constants.
      pull: (operands, what was saved, cotangents of the result) -> for each operand its cotangents, a tree like it in
        the dtypes of its floats, None for integers; None for an operand without floats. It must have derivatives of
        forward mode.
      saving: what gives the result and what `pull` wants to have saved of it; by default nothing is saved.
      smooth: a form of `function` that has derivatives of forward mode, by default itself.
    """
    in_forward_mode = function if smooth is None else smooth

    @jax.custom_jvp
    def call(*operands: Any) -> Any:
        return function(*operands)

    def rule(operands: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        leaves, tree = _flatten(operands)
        changes = tree.flatten_up_to(tangents)
        varied = [i for i, change in enumerate(changes) if not isinstance(change, SymbolicZero)]
        out, saved = (call(*operands), ()) if saving is None else saving(*operands)

        def push(known: Any, changes: list[jax.Array]) -> Any:
            leaves, _ = known

            def of_varied(values: list[jax.Array]) -> Any:
                whole = dict(enumerate(leaves)) | dict(zip(varied, values, strict=True))
                return in_forward_mode(*tree.unflatten(whole.values()))

            return jax.jvp(of_varied, ([leaves[i] for i in varied],), (changes,))[1]

        def pull_varied(known: Any, cotangents: Any) -> list[jax.Array]:
            leaves, saved = known
            operands = tree.unflatten(leaves)
            found: list[Any] = []
            for operand, part in zip(operands, pull(operands, saved, cotangents), strict=True):
                _, structure = _flatten(operand)
                found += [None] * structure.num_leaves if part is None else structure.flatten_up_to(part)
            return [found[i] for i in varied]

        return out, _linear(push, pull_varied, (leaves, saved), [changes[i] for i in varied], out)

    call.defjvp(rule, symbolic_zeros=True)
    return call


def varying_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """x, of which JAX is told that it varies over these axes of a caller's `shard_map`, and over no others.

    Nothing is exchanged, neither for it nor for its derivatives.
    """

    def told(axes: frozenset[str]) -> Any:
        kind = jax.sharding.ManualAxisType(varying=axes)
        return jax.typeof(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding, manual_axis_type=kind)
        )

    def direction(axes: frozenset[str]) -> _Direction:
        return _Direction(lambda _, leaves: list(leaves), (told(axes),))

    pull = direction(jax.typeof(x).manual_axis_type.varying)
    (changed,) = _linear_p.bind(x, num_known=0, push=direction(axes), pull=pull)
    return cast(jax.Array, changed)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a tree and its structure."""
    return jax.tree.flatten(tree)


@dataclasses.dataclass(frozen=True)
class _Direction:
    """A linear function, forwards or backwards.

    Its results' types are told, not found: tracing it for them, once for every use, nested rules in turn, would take
    JAX most of the time of a gradient.

    Attributes:
      run: (leaves of what is known, leaves of what it is linear in) -> leaves of the results.
      types: of the results.
    """

    run: Callable[..., list[jax.Array]]
    types: tuple[Any, ...]


def _linear(push: Callable[..., Any], pull: Callable[..., Any], known: Any, changes: Any, out: Any) -> Any:
    """`push(known, changes)`, linear in the changes, with `pull(known, cotangents)` for its transpose.

    What `push` gives are changes of `out`.
    """
    (known_leaves, known_tree), (change_leaves, change_tree) = _flatten(known), _flatten(changes)
    out_leaves, out_tree = _flatten(out)

    def flat(function: Callable[..., Any], tree: Any, out_tree: Any, like: list[jax.Array]) -> _Direction:
        def run(known_leaves: Sequence[jax.Array], leaves: Sequence[jax.Array]) -> list[jax.Array]:
            found: list[jax.Array] = out_tree.flatten_up_to(
                function(known_tree.unflatten(known_leaves), tree.unflatten(leaves))
            )
            return found

        return _Direction(run, tuple(jax.typeof(leaf).to_tangent_aval() for leaf in like))

    leaves = _linear_p.bind(
        *known_leaves,
        *change_leaves,
        num_known=len(known_leaves),
        push=flat(push, change_tree, out_tree, out_leaves),
        pull=flat(pull, out_tree, change_tree, change_leaves),
    )
    return out_tree.unflatten(leaves)


_linear_p = Primitive("linear_by_rule")
_linear_p.multiple_results = True


def _run(*leaves: jax.Array, num_known: int, push: _Direction, pull: _Direction) -> list[jax.Array]:
    del pull
    return push.run(leaves[:num_known], leaves[num_known:])


def _types(*leaves: Any, push: _Direction, **params: Any) -> list[Any]:
    del leaves, params
    return list(push.types)


def _differentiate(
    leaves: Sequence[Any], tangents: Sequence[Any], *, num_known: int, push: _Direction, pull: _Direction
) -> Any:
    """Forward mode: the changes change, and so may what is known."""
    out = _linear_p.bind(*leaves, num_known=num_known, push=push, pull=pull)
    parts = []
    if any(type(tangent) is not ad.Zero for tangent in tangents[num_known:]):
        moved = [ad.instantiate_zeros(tangent) for tangent in tangents[num_known:]]
        parts.append(_linear_p.bind(*leaves[:num_known], *moved, num_known=num_known, push=push, pull=pull))
    varied = [i for i, tangent in enumerate(tangents[:num_known]) if type(tangent) is not ad.Zero]
    if varied:

        def push_known(leaves: Sequence[jax.Array], moved: Sequence[jax.Array]) -> list[jax.Array]:
            known, changes = leaves[:num_known], leaves[num_known:]

            def of_varied(values: list[jax.Array]) -> list[jax.Array]:
                whole = dict(enumerate(known)) | dict(zip(varied, values, strict=True))
                return push.run(list(whole.values()), changes)

            return jax.jvp(of_varied, ([known[i] for i in varied],), (list(moved),))[1]

        moved = [tangents[i] for i in varied]
        forwards = _Direction(push_known, push.types)
        backwards = _Direction(_refuse, tuple(jax.typeof(tangent) for tangent in moved))
        parts.append(_linear_p.bind(*leaves, *moved, num_known=len(leaves), push=forwards, pull=backwards))
    return out, [sum(terms[1:], terms[0]) for terms in zip(*parts, strict=True)]


def _refuse(known: Any, cotangents: Any) -> list[jax.Array]:
    """What is known of a derivative has no rule backwards."""
    raise ValueError(
        "a derivative of a derivative was asked for backwards, as by jax.grad of jax.grad or of jax.jvp, and a model "
        "has it only forwards: take jax.jvp of jax.grad, which gives the same product of a Hessian with a vector, or "
        "jax.linearize or jax.hessian."
    )


def _transpose(
    cotangents: Sequence[Any], *leaves: Any, num_known: int, push: _Direction, pull: _Direction
) -> list[Any]:
    """Reverse mode: the two functions change places."""
    known = leaves[:num_known]
    given = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    found = _linear_p.bind(*known, *given, num_known=num_known, push=pull, pull=push)
    wanted = (ad.is_undefined_primal(leaf) for leaf in leaves[num_known:])
    return [None] * num_known + [part if is_wanted else None for part, is_wanted in zip(found, wanted, strict=True)]


def _batch(
    leaves: Sequence[Any], axes: Sequence[Any], *, num_known: int, push: _Direction, pull: _Direction
) -> tuple[Sequence[Any], list[int]]:
    """`vmap`: both functions of a batch."""
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
    known_axes = list(axes[:num_known])
    changes = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves[num_known:], axes[num_known:], strict=True)
    ]

    def of_batch(direction: _Direction) -> _Direction:
        run = jax.vmap(direction.run, in_axes=(known_axes, 0))
        types = (jax.typeof(jax.ShapeDtypeStruct((size, *one.shape), one.dtype)) for one in direction.types)
        return _Direction(lambda known, changes: run(list(known), list(changes)), tuple(types))

    out = _linear_p.bind(*leaves[:num_known], *changes, num_known=num_known, push=of_batch(push), pull=of_batch(pull))
    return out, [0] * len(out)


_linear_p.def_impl(_run)
_linear_p.def_abstract_eval(_types)
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[_linear_p] = _differentiate
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
