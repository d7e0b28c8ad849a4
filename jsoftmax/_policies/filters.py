"""Which classes of a row may be drawn: top-k, top-p and min-p, one after the other.

A class is kept or dropped by what lies strictly above it, so that classes with equal logits share their fate. No row
is sorted: the lowest logit that is kept is found bit by bit, in as many passes over the row as its dtype has bits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jsoftmax._rows import checks
from jsoftmax._rows.exponentials import UNIT, exponentials
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.varying import fori_loop


@functools.partial(jax.tree_util.register_dataclass, data_fields=["top_k", "top_p", "min_p"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Filters:
    """What to keep; None means unused, else a number or one a row, (*batch, 1)."""

    top_k: Any = None
    top_p: Any = None
    min_p: Any = None

    @property
    def is_identity(self) -> bool:
        return self.top_k is None and self.top_p is None and self.min_p is None


def checked_filters(rows: Rows, top_k: ArrayLike | None, top_p: ArrayLike | None, min_p: ArrayLike | None) -> Filters:
    batch, numbers = rows.logits.shape[:-1], {}
    if top_k is not None:
        if not jnp.issubdtype(jnp.asarray(top_k).dtype, jnp.integer):
            raise TypeError(f"top_k must be an integer, a number of classes, got {top_k!r}")
        checks.within("top_k", top_k, 1.0, float("inf"))
        numbers["top_k"] = checks.scalar_or_rows("top_k", top_k, batch)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None:
            checks.within(name, value, 0.0, 1.0)
            numbers[name] = checks.scalar_or_rows(name, jnp.asarray(value, rows.dtype), batch)
    return Filters(**{name: jnp.broadcast_to(number, batch)[..., None] for name, number in numbers.items()})


def kept(z: Float[Array, "*batch classes"], filters: Filters) -> Bool[Array, "*batch classes"]:
    """The classes that pass the filters; never one of −∞. A row without a distribution keeps all others."""
    keep = z > -jnp.inf
    if filters.is_identity or z.size == 0:
        return keep
    allowed, maximum = keep, jnp.max(z, axis=-1, keepdims=True)
    defined = jnp.isfinite(maximum)
    if filters.top_k is not None:
        keep &= z >= _lowest(z, lambda t: jnp.sum(z > t, axis=-1, keepdims=True) < filters.top_k)
    if filters.top_p is not None:
        scaled = jnp.where(keep, exponentials(z, maximum), 0)
        # What may be left out, rather than what must be kept: small probabilities have their digits in such a sum.
        spare = (1 - filters.top_p) * jnp.sum(scaled, axis=-1, keepdims=True)

        def holds_enough(t: Array) -> Array:
            up_to = jnp.sum(jnp.where(z <= t, scaled, 0), axis=-1, keepdims=True)
            return (up_to > spare) | (filters.top_p >= 1)

        keep &= z >= _lowest(z, holds_enough)
    if filters.min_p is not None:
        keep &= exponentials(z, maximum) >= filters.min_p * UNIT
    return jnp.where(defined, keep, allowed | jnp.isnan(z))


def _lowest(z: Array, holds: Callable[[Array], Array]) -> Array:
    """The lowest number t of each row with `holds(t)`, which is taken to be true from some t up to the maximum on."""
    integer = jnp.int64 if z.dtype == jnp.float64 else jnp.int32

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        enough = holds(_in_order(middle, z.dtype))
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    high = _in_order(jnp.max(z, axis=-1, keepdims=True), integer)
    low = jnp.broadcast_to(_in_order(jnp.array(-jnp.inf, z.dtype), integer), high.shape)
    return _in_order(fori_loop(0, jnp.iinfo(integer).bits, halve, (low, high))[1], z.dtype)


def _in_order(numbers: Array, dtype) -> Array:
    """Floats as integers of the same order, or those as floats: two's complement for sign and magnitude."""
    limits = jnp.iinfo(jnp.int64 if numbers.dtype.itemsize == 8 else jnp.int32)
    bits = lax.bitcast_convert_type(numbers, limits.dtype)
    return lax.bitcast_convert_type(jnp.where(bits < 0, bits ^ limits.max, bits), dtype)
