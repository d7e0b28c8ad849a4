"""The precision in which a row is computed, whatever precision it came in."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float64 for float64; float32 for everything narrower, float16 and bfloat16 included."""
    return jnp.dtype(jnp.float64) if jnp.dtype(dtype) == jnp.float64 else jnp.dtype(jnp.float32)
