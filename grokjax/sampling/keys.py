"""Keys: one for each request, and from it one for each position."""

import reprlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from grokjax.context import in_own_context

# The generator of all keys that this package makes, whatever JAX's own default is.
_GENERATOR = "threefry2x32"


def seed_key(seed: ArrayLike) -> jax.Array:
    """The key of a seed, uint32 []: of threefry, so that a seed draws the same whatever `jax_default_prng_impl` is.

    Raises:
      ValueError: The seed is no integer of at most 64 bits.
    """
    dtype = seed.dtype if isinstance(seed, jax.Array) else np.asarray(seed).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"seed={reprlib.repr(seed)} must be an integer of at most 64 bits.")
    return jax.random.key(seed, impl=_GENERATOR)


@in_own_context
def row_keys(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Each row's key for one position: `fold_in(key, position)`, so a request draws the same in any slot and batch.

    Args:
      keys: the requests' keys, typed [B] of any generator, or raw uint32 [B, 2] of threefry.
      positions: of the tokens to draw, each counted from the beginning of its row's prompt [B] int32.

    Returns:
      Keys of the same kind and shape as `keys`.

    Raises:
      ValueError: The keys are raw and of another generator.
    """
    typed = typed_keys(keys)
    folded = each_key(jax.random.fold_in, typed, positions)
    return folded if typed is keys else jax.random.key_data(folded)


def each_key(function: Callable[..., jax.Array], keys: jax.Array, *rows: jax.Array) -> jax.Array:
    """`function(key, *row)` of each row; of typed keys that are not threefry's, `vmap` would use the first for all."""
    if jax.random.key_impl(keys) == _GENERATOR:
        return jax.vmap(function)(keys, *rows)
    return lax.map(lambda row: function(*row), (keys, *rows))


def typed_keys(keys: jax.Array) -> jax.Array:
    """Keys [B] that name their generator: typed ones as they are, raw uint32 [B, 2] as those of threefry.

    Raises:
      ValueError: The keys are raw and of another generator.
    """
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return keys
    if keys.dtype != jnp.uint32 or keys.ndim != 2 or keys.shape[1] != 2:
        raise ValueError(
            f"raw keys of {keys.dtype} {keys.shape} are not those of threefry, uint32 [B, 2]: pass typed keys, which "
            "name their generator, as jax.random.key makes them."
        )
    return jax.random.wrap_key_data(keys, impl=_GENERATOR)
