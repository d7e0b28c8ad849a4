"""JAX's primitives with the broadcasting of its functions, each of which is a program of its own to trace and to lower.

A loss has about a dozen choices between two arrays: made by `jnp.where`, they were a fifth of its tracing and lowering.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike


def together(*arrays: Array | np.ndarray) -> list[Any]:
    """All of the same shape."""
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    dimensions = [range(len(shape) - x.ndim, len(shape)) for x in arrays]
    return [
        x if x.shape == shape else lax.broadcast_in_dim(x, shape, d) for x, d in zip(arrays, dimensions, strict=True)
    ]


def select(condition: ArrayLike, chosen: ArrayLike, otherwise: ArrayLike) -> Array:
    """`jnp.where`: what is `chosen` where the condition holds, else the other."""
    dtype = jnp.result_type(chosen, otherwise)
    return lax.select(*together(_array(condition, np.dtype(bool)), _array(chosen, dtype), _array(otherwise, dtype)))


def hidden(number: float, like: Array) -> Array:
    """`number` in the shape of `like`, without XLA's knowing; NaN where that is not finite."""
    return lax.add(lax.sub(like, like), like.dtype.type(number))


def _array(number: ArrayLike, dtype: np.dtype) -> Array | np.ndarray:
    return lax.convert_element_type(number, dtype) if isinstance(number, Array) else np.asarray(number, dtype)
