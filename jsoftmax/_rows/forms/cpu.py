"""For CPUs: exponentials are written out, and summed by the library to which XLA hands sums over the last axis.

Where a gradient will take their place, they are all there at once, and computed once; else a few rows' at a time.
Nothing is fused into such a sum, so a second one, with a mask, would write as much again: only a block of each row is
added twice.
"""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jsoftmax._rows.exponentials import UNIT, add_in_pairs, exact_difference, exponentials as series, for_rounding
from jsoftmax._rows.forms import tpu
from jsoftmax._rows.forms.series import exponentials as exponentials, shares_of
from jsoftmax._rows.primitives import hidden, select, together
from jsoftmax._rows.rows import Rows, defined
from jsoftmax._rows.varying import fori_loop

# A largest class counts as one unit even if compilers rounded its logit in two ways, where it was computed twice.
ONE = UNIT * (1 - 2.0**-10)
FEW = 64  # classes, which are added to each other in pairs
ONE_BLOCK = 256  # classes at most, where the caches hold their exponentials
MANY = 1000  # classes, of which even a prime number has blocks
LANES = 128  # a divisor of how many are in them
SHORTEST = 120  # classes in a block: the library takes longer over each of fewer
HAS_LIBRARY = jax.__version_info__ >= (0, 10)
LIBRARY_SIZE = 2**14  # numbers in an array, from which its sums are the library's
BLOCK = lax.GatherDimensionNumbers((1,), (), (1,), (0,), (0,))  # of each row, by its first class
MOST_FLOATS = 2**24  # integers that float32 has one after another
CACHED = 2**22  # bytes of exponentials that are summed before they leave the caches


def row_state(rows: Rows, empty: Array | None, exact: bool, capped: bool, alone: bool) -> tuple[Array, Array]:
    """All rows at once if a gradient needs the exponentials, too: XLA finds that they are the same, and keeps them.

    Else, or where a sum would write them a second time, as many rows at a time as the caches hold.
    """
    del capped
    *batch, classes = rows.logits.shape
    maximum = rows.maximum()
    count, at_once = math.prod(batch), _rows_at_once(classes, rows.dtype)
    fits = count <= at_once
    if fits or not (alone or (_block_count(classes) == 1 and classes > FEW)):
        return maximum, _others(rows, defined(maximum, empty), exact, cached=fits, alone=alone)
    logits, top = rows.logits.reshape(count, classes), defined(maximum, empty).reshape(count)

    def step(turn: Any, found: Array) -> Array:
        first = lax.convert_element_type(turn * at_once, jnp.uint32)  # of the last turn less: slices see to that
        part, tops = Rows(_some_rows(logits, first, at_once)), lax.dynamic_slice_in_dim(top, first, at_once)
        others = _others(part, tops, exact, cached=True, alone=True)
        return lax.dynamic_update_slice_in_dim(found, others, first, 0)

    return maximum, fori_loop(0, -(-count // at_once), step, lax.full_like(top, 0)).reshape(batch)


def _rows_at_once(classes: int, dtype: np.dtype) -> int:
    return max(CACHED // (classes * dtype.itemsize), os.cpu_count() or 1)


def _some_rows(logits: Array, first: Array, count: int) -> Array:
    if logits.dtype.itemsize > 2:
        return lax.dynamic_slice_in_dim(logits, first, count)
    # XLA cuts such floats out of a float32 copy of the whole array, but not their bits. Without the barrier it would
    # copy those of all rows before the loop.
    logits, first = lax.optimization_barrier((logits, first))
    bits = lax.bitcast_convert_type(logits, f"uint{8 * logits.dtype.itemsize}")
    return lax.bitcast_convert_type(lax.dynamic_slice_in_dim(bits, first, count), logits.dtype)


def _others(rows: Rows, maximum: Array, exact: bool, cached: bool, alone: bool) -> Array:
    """The exponentials' sum without the largest: their total less 1 unit, unless that cancels.

    It does not if the total is 2 units or more. Else there is one class of 1 unit: what is as large is left out.
    """
    z, top, classes = rows.z(), maximum[..., None], rows.logits.shape[-1]
    count = _classes_apart(classes) if alone else 0
    parts = lax.split(z, (classes - count, count), axis=-1) if count else (z,)
    terms, *apart = (series(part, top, exact) for part in parts)
    total, smaller = _sums(terms, apart, cached)
    number = total.dtype.type
    others = lax.select(lax.lt(total, number(2 * ONE)), smaller, lax.sub(total, number(UNIT)))
    if classes > FEW:
        return others
    # XLA would compute sums of so few classes anew in each step that needs them, but no division.
    return lax.div(others, hidden(1.0, maximum))


def _block_count(classes: int) -> int:
    """A divisor of `classes`: as many blocks as there are classes in each, or few enough that these are not too short.

    If there is none, the next above it; a prime number of classes is one block.
    """
    root = math.isqrt(classes)
    most = min(root, max(classes // SHORTEST, 2))
    counts = (*range(most, 1, -1), *range(most + 1, root + 1))
    return next((count for count in counts if classes % count == 0), 1)


def _classes_apart(classes: int) -> int:
    """How many of a prime number of classes stand apart, so that the others have blocks."""
    return classes % LANES if classes >= MANY and _block_count(classes) == 1 else 0


def _sums(terms: Array, apart: list[Array], cached: bool) -> tuple[Array, Array]:
    """The sum of each row, and that of those less than a unit if only one is not; `cached` if the caches hold them."""
    *batch, classes = terms.shape
    if classes <= FEW:  # of arrays of one class each, which XLA fuses with what makes them
        each = [lax.index_in_dim(terms, k, -1, keepdims=False) for k in range(classes)]
        return add_in_pairs(each), add_in_pairs([_below_one(term) for term in each])
    blocks = 1 if cached and classes <= ONE_BLOCK else _block_count(classes)
    if blocks == 1:
        total, smaller = _sums_of(terms, _below_one(terms))
        return total, smaller
    flat, length = lax.reshape(terms, (math.prod(batch), classes)), classes // blocks
    # Without the barrier, XLA would make one sum of all terms of the two, and read them all once more.
    (sums,) = _sums_of(lax.reshape(flat, (flat.shape[0], blocks, length)))
    sums = lax.optimization_barrier(sums)
    if apart:  # each of them is a block, without more within
        sums = lax.concatenate([sums, lax.reshape(apart[0], (flat.shape[0], apart[0].shape[-1]))], 1)
    # If one block holds a largest class; if several do, `smaller` is not asked for.
    order = select(_is_one(sums), lax.broadcasted_iota(terms.dtype, sums.shape, 1), 0)
    total, smaller, which = _sums_of(sums, _below_one(sums), order)
    which = lax.convert_element_type(which, jnp.int32)
    block = lax.gather(flat, lax.expand_dims(which * length, (1,)), BLOCK, (1, length), mode="clip")
    (within,) = _sums_of(_below_one(block))
    if apart:
        within = select(which < blocks, within, 0)
    smaller = lax.add(smaller, within)
    return lax.reshape(total, batch), lax.reshape(smaller, batch)


def _is_one(terms: Array) -> Array:
    return lax.gt(terms, terms.dtype.type(ONE))


def _below_one(terms: Array) -> Array:
    return select(_is_one(terms), 0, terms)


def _sums_of(*arrays: Array) -> list[Array]:
    """The sums over the last axis of arrays of one shape, right to about two ulps even for many equal terms.

    The library adds along a tree, but is not asked for small arrays, nor before JAX 0.10. XLA itself adds up to 32
    terms one after another, with a bias if they are equal: there, what each addition rounds off is carried along.
    """
    like, zero = arrays[0], np.zeros((), arrays[0].dtype)
    if like.size >= LIBRARY_SIZE and (HAS_LIBRARY or like.shape[-1] > 32):
        return [lax.reduce(array, zero, lax.add, (like.ndim - 1,)) for array in arrays]
    parts = (*arrays, *[lax.full_like(like, 0)] * len(arrays))
    found = lax.reduce(parts, (zero,) * len(parts), _add, (like.ndim - 1,))
    return list(map(lax.add, found[: len(arrays)], found[len(arrays) :]))


def _add(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
    """The sums of some numbers, then what was rounded off of each."""
    half = len(left) // 2
    totals, rests = zip(*map(exact_difference, left[:half], map(lax.neg, right[:half])), strict=True)
    return *totals, *map(lax.add, map(lax.add, left[half:], right[half:]), rests)


def shares(z: Array, maximum: Array, others: Array, exact: bool, rounded: bool) -> tuple[Array, Array]:
    """UNIT · p and p: of the exponentials that were summed, if they are still there."""
    if not rounded or math.prod(z.shape[:-1]) <= _rows_at_once(z.shape[-1], z.dtype):
        return shares_of(series(z, maximum, exact), others)
    powers, share = together(for_rounding(z, maximum), 1 / (1 + others))
    p = lax.mul(powers, share)
    return lax.mul(p, p.dtype.type(UNIT)), p


def place_label(rows: Array, entries: Array, labels: Array) -> Array:
    # LLVM would compare integers in 64 bits, in as many as it counts the classes.
    if FEW < rows.shape[-1] <= MOST_FLOATS:
        labels = lax.convert_element_type(labels, np.float32)
    if rows.dtype.itemsize > 2:
        return tpu.place_label(rows, entries, labels)
    # XLA would select in float32, and round once more.
    bits = f"uint{8 * rows.dtype.itemsize}"
    rows_bits, entries_bits = (lax.bitcast_convert_type(x, bits) for x in (rows, entries))
    return lax.bitcast_convert_type(tpu.place_label(rows_bits, entries_bits, labels), rows.dtype)
