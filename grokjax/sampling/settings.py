"""How each row of a batch is sampled."""

import dataclasses
import reprlib
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from grokjax.context import own_context

_LARGEST = float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How each of B rows is sampled; a pytree, so settings may change between steps without a recompilation.

    `create` fills in the defaults and checks the values. `sample_token` only checks shapes.

    Attributes:
      temperature: divisor of the logits [B] float32, finite and 0 or more; 0 is greedy.
      top_p: probability mass kept [B] float32 in [0, 1]; 1 keeps all.
      top_k: number of tokens kept [B] int32, 0 or more; 0 keeps all.
      min_p: least probability kept, as a fraction of the largest [B] float32 in [0, 1]; 0 keeps all.
      mask: allowed tokens [B, V] bool, at least one a row; None allows all (and is a different pytree structure,
        so going from None to an array recompiles).
      active: rows that are sampled at all [B] bool.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    mask: jax.Array | None
    active: jax.Array

    @classmethod
    @own_context()
    def create(
        cls,
        batch_size: int,
        *,
        temperature: ArrayLike = 1.0,
        top_p: ArrayLike = 1.0,
        top_k: ArrayLike = 0,
        min_p: ArrayLike = 0.0,
        mask: ArrayLike | None = None,
        active: ArrayLike = True,
    ) -> Self:
        """Settings for `batch_size` rows from concrete values, each one for all rows or one per row.

        Args:
          batch_size: B, 1 or more.
          temperature: scalar or [B], finite, 0 (greedy) or more.
          top_p: scalar or [B], from 0 to 1.
          top_k: scalar or [B], integers, 0 (off) or more.
          min_p: scalar or [B], from 0 (off) to 1.
          mask: [V] or [B, V], bool or 0 and 1; true where a token is allowed.
          active: scalar or [B] bool.

        Raises:
          ValueError: A value is out of range or of the wrong shape, or a row of the mask allows no token.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(
                f"batch_size={reprlib.repr(batch_size)} must be an integer, 1 or more: settings describe the rows of a "
                "batch."
            )
        return cls(
            temperature=_real_rows("temperature", temperature, batch_size, high=_LARGEST),
            top_p=_real_rows("top_p", top_p, batch_size, high=1.0),
            top_k=_count_rows("top_k", top_k, batch_size),
            min_p=_real_rows("min_p", min_p, batch_size, high=1.0),
            mask=None if mask is None else _mask_rows(mask, batch_size),
            active=jnp.asarray(_rows("active", active, batch_size).astype(np.bool_)),
        )


def _rows(name: str, value: ArrayLike, batch_size: int) -> np.ndarray:
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != np.bool_:
        raise ValueError(f"{name}={reprlib.repr(value)} must be a number, or one for each row.")
    if array.shape not in ((), (batch_size,)):
        raise ValueError(f"{name} has shape {array.shape}: give one value, or one for each of the {batch_size} rows.")
    return np.broadcast_to(array, (batch_size,))


def _real_rows(name: str, value: ArrayLike, batch_size: int, *, high: float) -> jax.Array:
    array = _rows(name, value, batch_size).astype(np.float64)
    wrong = ~((array >= 0) & (array <= high))  # also true for NaN
    if wrong.any():
        limits = "a finite number, 0 (greedy) or more" if high == _LARGEST else f"a number from 0 to {high:g}"
        raise ValueError(f"{name}={array[wrong][0]:g} in row {wrong.argmax()} must be {limits}.")
    return jnp.asarray(array.astype(np.float32))


def _count_rows(name: str, value: ArrayLike, batch_size: int) -> jax.Array:
    array = _rows(name, value, batch_size)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: give integers, 0 for no limit.")
    if (array < 0).any():
        raise ValueError(f"{name}={array[array < 0][0]} in row {(array < 0).argmax()} must be 0 (no limit) or more.")
    return jnp.asarray(np.minimum(array, np.iinfo(np.int32).max).astype(np.int32))


def _mask_rows(mask: ArrayLike, batch_size: int) -> jax.Array:
    allowed = np.asarray(mask) != 0
    if allowed.ndim not in (1, 2) or (allowed.ndim == 2 and len(allowed) != batch_size):
        raise ValueError(f"mask has shape {allowed.shape}: give [V], or [B, V] for {batch_size} rows.")
    allowed = np.broadcast_to(allowed, (batch_size, allowed.shape[-1]))
    empty = ~allowed.any(axis=-1)
    if empty.any():
        raise ValueError(f"mask allows no token in row {empty.argmax()}: at least one must remain to be drawn.")
    return jnp.asarray(allowed)
