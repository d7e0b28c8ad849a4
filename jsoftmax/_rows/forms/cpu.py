"""For CPUs: rows are folded onto a part of themselves; a label's entry is set in place."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jsoftmax._rows.exponentials import UNIT, add_in_pairs, exponentials as series
from jsoftmax._rows.forms.series import exponentials as exponentials, shares as shares
from jsoftmax._rows.rows import Rows, defined

FEW = 32  # classes, or lanes, that are taken one by one


def row_state(rows: Rows, empty: Array | None) -> tuple[Array, Array]:
    """For CPUs: fold a row onto a part of itself, sum that, and do the lane of the maximum again without it.

    A mask inside the long sum would cost twice as much. The lane is found from the sums themselves: if the total is
    below 2 units, only one lane can reach 1; else nothing cancels in total − 1. Sums go in pairs, so that even the many
    equal terms of an undecided row leave no bias.
    """
    maximum = rows.maximum()
    top = defined(maximum, empty)
    classes = rows.logits.shape[-1]
    if classes <= FEW:  # faster class by class, over all rows
        alone = [series(rows.part(k, k + 1)[..., 0], top) for k in range(classes)]
        return maximum, _without_one(add_in_pairs, alone) / UNIT
    top = top[..., None]
    length = _lane_count(classes)
    folds = classes // length
    lanes = add_in_pairs([series(rows.part(k * length, (k + 1) * length), top) for k in range(folds)])
    rest = series(rows.part(folds * length, classes), top)
    sums = jnp.concatenate([lanes, rest], axis=-1)
    total = _sum_in_pairs(sums)
    # In place of argmax, which XLA for CPUs takes number by number.
    places = _positions(sums, sums.shape[-1])
    lane = jnp.max(jnp.where(sums == jnp.max(sums, axis=-1, keepdims=True), places, 0), axis=-1, keepdims=True)
    fold = _positions(sums, folds)
    in_lane = (lane < length) | (fold == 0)  # what did not fold stands alone
    lane_class = jnp.where(lane < length, lane + fold * length, folds * length + lane - length)
    part = series(jnp.where(in_lane, rows.at(lane_class), -jnp.inf), top)
    redone = _without_one(_sum_in_pairs, part)[..., None]
    others = _sum_in_pairs(jnp.where(places == lane, redone, sums))
    return maximum, jnp.where(total < 2 * UNIT, others, total - UNIT) / UNIT


def _lane_count(classes: int) -> int:
    """Whole vector registers of lanes, for at most 64 folds; about as many lanes as folds if there are few classes."""
    return 16 * max(1, math.isqrt(classes) // 8, -(-classes // 1024))


def _without_one(add: Callable[[Any], Array], terms: Any) -> Array:
    """The sum, by `add`, of an array or a list of exponentials without the largest, which is 1 unit.

    Those above a half are counted, less what they lack of a unit: that is exact, and takes nothing from the small ones.
    """

    def total(function: Callable[[Array], Array]) -> Array:
        return add(jax.tree.map(function, terms))

    small = total(lambda term: jnp.where(term > UNIT / 2, 0, term))
    count = total(lambda term: jnp.where(term > UNIT / 2, UNIT, jnp.zeros_like(term)))
    lacking = total(lambda term: jnp.where(term > UNIT / 2, UNIT - term, 0))
    # The largest need not be exactly 1, since compilers may round a logit that is computed twice in two ways; and a
    # row of masked classes has none.
    return small + jnp.where(count <= UNIT, 0, (count - UNIT) - lacking)


def _sum_in_pairs(rows: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """The sum over the last axis, along a tree."""
    while rows.shape[-1] > FEW:
        length = _lane_count(rows.shape[-1])
        folds = rows.shape[-1] // length
        lanes = add_in_pairs([rows[..., k * length : (k + 1) * length] for k in range(folds)])
        rows = jnp.concatenate([lanes, rows[..., folds * length :]], axis=-1)
    return add_in_pairs([rows[..., k] for k in range(rows.shape[-1])])


def _positions(z: Array, size: int) -> Array:
    """0, 1, … in the last of `size` places, for every row of z."""
    return lax.broadcasted_iota(jnp.int32, (*z.shape[:-1], size), z.ndim - 1)


@jax.custom_jvp
def place_label(rows: Array, entries: Array, index: Array) -> Array:
    if rows.dtype.itemsize != 2:
        return _put(rows, entries, index)
    # XLA scatters 16-bit floats on CPUs through a float32 copy of the whole array; integers it leaves alone.
    bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return lax.bitcast_convert_type(_put(bits(rows), bits(entries), index), rows.dtype)


@place_label.defjvp
def _place_label_jvp(primals, tangents):
    rows_dot, entries_dot, _ = tangents
    return place_label(*primals), _put(rows_dot, entries_dot, primals[2])


def _put(rows: Array, entries: Array, index: Array) -> Array:
    # Flat, because only so can a scatter be told that no entry is set twice, which its transpose needs.
    flat = rows.reshape(-1, rows.shape[-1])
    at = flat.at[jnp.arange(flat.shape[0]), index.reshape(-1)]
    return at.set(entries.reshape(-1), unique_indices=True, mode="promise_in_bounds").reshape(rows.shape)
