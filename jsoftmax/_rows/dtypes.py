"""The precision in which a row is computed, and the ways into it and out of it."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float64 for float64; float32 for everything narrower, float16 and bfloat16 included."""
    return jnp.dtype(jnp.float64) if jnp.dtype(dtype) == jnp.float64 else jnp.dtype(jnp.float32)


def widened_part(rows: Array, start: int, stop: int) -> Array:
    """`rows[..., start:stop]` in the dtype in which rows are computed.

    XLA for CPUs would convert all of a bfloat16 array before it takes a part; of integers it takes the part first.
    """
    if rows.dtype != jnp.bfloat16:
        return lax.slice_in_dim(rows, start, stop, axis=-1).astype(compute_dtype(rows.dtype))
    bits = lax.slice_in_dim(lax.bitcast_convert_type(rows, jnp.uint16), start, stop, axis=-1)
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def narrowed(rows: Array, dtype: DTypeLike) -> Array:
    """`rows` rounded to `dtype`."""
    if rows.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return rows.astype(dtype)
    return lax.platform_dependent(rows, cpu=_bfloat16, default=lambda rows: rows.astype(jnp.bfloat16))


@jax.custom_jvp
def _bfloat16(rows: Array) -> Array:
    """Round to the nearest, ties to even, in integers: four times as fast on a CPU as XLA's conversion."""
    bits = lax.bitcast_convert_type(rows, jnp.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = jnp.where(jnp.isnan(rows), jnp.uint32(0x7FC0), rounded)
    return lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)


@_bfloat16.defjvp
def _bfloat16_jvp(primals, tangents):
    return _bfloat16(*primals), tangents[0].astype(jnp.bfloat16)
