"""Which classes of a row may be drawn: those of a stored set, then top-k, top-p and min-p, one after the other.

The result is a mask, and the rest of the library sees nothing but that. A class is kept or dropped by what lies
strictly above it, so that classes with equal logits share their fate. No row is sorted: the lowest logit that is kept
is found bit by bit, in as many passes over the row as its dtype has bits.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Integer

from jsoftmax._rows import checks
from jsoftmax._rows.exponentials import UNIT, exponentials
from jsoftmax._rows.labels import is_class
from jsoftmax._rows.primitives import select
from jsoftmax._rows.rows import Rows, largest
from jsoftmax._rows.shards import ClassShards
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


def in_support(rows: Rows, options: Mapping[str, Any]) -> Rows:
    """The rows without the classes that `SupportOptions` rule out; which those are is a constant to derivatives."""
    filters, support = _checked_filters(rows, options), options.get("support")
    if support is not None:
        support = checked_support(support, rows.logits.shape[:-1])
    elif filters.is_identity:
        return rows
    where = _support(jax.lax.stop_gradient(rows), filters, support)
    return dataclasses.replace(rows, transform=dataclasses.replace(rows.transform, where=where))


def checked_support(support: Any, batch: tuple[int, ...]) -> Integer[Array, "*batch places"]:
    support = checks.integer_array("support", support)
    if support.ndim == 0 or support.shape[:-1] != batch:
        places = ", ".join(map(str, (*batch, "k")))
        raise ValueError(f"support has shape {support.shape}, but needs ({places}): the classes of each row, or -1")
    return support


def _checked_filters(rows: Rows, options: Mapping[str, Any]) -> Filters:
    batch, numbers = rows.logits.shape[:-1], {}
    top_k = options.get("top_k")
    if top_k is not None:
        if not jnp.issubdtype(jnp.asarray(top_k).dtype, jnp.integer):
            raise TypeError(f"top_k must be an integer, a number of classes, got {top_k!r}")
        checks.within("top_k", top_k, 1.0, float("inf"))
        numbers["top_k"] = checks.scalar_or_rows("top_k", top_k, batch)
    for name in ("top_p", "min_p"):
        value = options.get(name)
        if value is not None:
            checks.within(name, value, 0.0, 1.0)
            numbers[name] = checks.scalar_or_rows(name, jnp.asarray(value, rows.dtype), batch)
    return Filters(**{name: jnp.broadcast_to(number, batch)[..., None] for name, number in numbers.items()})


@jax.jit
def _support(rows: Rows, filters: Filters, support: Array | None) -> Bool[Array, "*batch classes"]:
    """`where` of the rows, and of that what the set and the filters keep."""
    where = rows.transform.where
    if support is not None:
        members = _members(rows, support)
        where = members if where is None else where & members
        rows = dataclasses.replace(rows, transform=dataclasses.replace(rows.transform, where=where))
    if filters.is_identity or rows.logits.size == 0:
        return jnp.ones(rows.logits.shape, bool) if where is None else where
    keep = _kept(rows.z(), filters, rows.shards)
    return keep if where is None else where & keep


def _members(rows: Rows, support: Array) -> Array:
    classes = rows.logits.shape[-1]
    known = select(rows.is_class(support), support, -1).astype(jnp.int32)
    here = known - rows.shards.first(classes)
    index = select(is_class(here, classes), here, classes)  # those of other shards are dropped, as unused places are
    none = jnp.zeros(rows.logits.shape, bool)
    return jnp.put_along_axis(none, index, True, axis=-1, inplace=False, mode="drop")


def _kept(z: Float[Array, "*batch classes"], filters: Filters, shards: ClassShards) -> Bool[Array, "*batch classes"]:
    """The classes that pass the filters; all of a row without a distribution, so that it is still found to be one."""
    top = largest(z)[..., None]
    maximum = shards.max(select(jnp.isnan(top), jnp.inf, top))
    defined, keep = jnp.isfinite(maximum), z > -jnp.inf

    def total(numbers: Array) -> Array:
        return shards.sum(jnp.sum(numbers, axis=-1, keepdims=True))

    if filters.top_k is not None:
        keep &= z >= _lowest(maximum, lambda t: total(z > t) < filters.top_k)
    if filters.top_p is not None:
        scaled = select(keep, exponentials(z, maximum), 0)
        # What may be left out, rather than what must be kept: small probabilities have their digits in such a sum.
        spare = (1 - filters.top_p) * total(scaled)

        def holds_enough(t: Array) -> Array:
            return (total(select(z <= t, scaled, 0)) > spare) | (filters.top_p >= 1)

        keep &= z >= _lowest(maximum, holds_enough)
    if filters.min_p is not None:
        keep &= exponentials(z, maximum) >= filters.min_p * UNIT
    return keep | ~defined


def _lowest(maximum: Array, holds: Callable[[Array], Array]) -> Array:
    """The lowest number t of each row with `holds(t)`, which is taken to be true from some t up to the maximum on."""
    dtype = maximum.dtype
    integer = jnp.int64 if dtype == jnp.float64 else jnp.int32

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        enough = holds(_in_order(middle, dtype))
        return select(enough, low, middle + 1), select(enough, middle, high)

    high = _in_order(maximum, integer)
    low = jnp.broadcast_to(_in_order(jnp.array(-jnp.inf, dtype), integer), high.shape)
    return _in_order(fori_loop(0, jnp.iinfo(integer).bits, halve, (low, high))[1], dtype)


def _in_order(numbers: Array, dtype) -> Array:
    """Floats as integers of the same order, or those as floats: two's complement for sign and magnitude."""
    limits = jnp.iinfo(jnp.int64 if numbers.dtype.itemsize == 8 else jnp.int32)
    bits = lax.bitcast_convert_type(numbers, limits.dtype)
    return lax.bitcast_convert_type(select(bits < 0, bits ^ limits.max, bits), dtype)
