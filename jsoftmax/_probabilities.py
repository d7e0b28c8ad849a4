"""One row of logits at a time: its maximum, the sum of the other exponentials, its probabilities.

Everything is exact in the sense of floating point because the largest logit is kept out of every sum. With m the
maximum and s = Σ e^(z_j − m) over all *other* classes,

    logsumexp = m + log1p(s)     −log p_j = (m − z_j) + log1p(s)     1 − p_max = s / (1 + s)

have only non-negative terms: nothing cancels, however confident the row.

The state (m, s) is computed in two ways, one for CPUs and one for accelerators; each is the worst choice on the other
(docs/architecture.md).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from jsoftmax._exponentials import UNIT, exponentials, gap
from jsoftmax._platforms import choose
from jsoftmax._rows import Rows
from jsoftmax._shards import ClassShards

FEW = 32  # classes, or lanes, that are taken one by one


class RowState(NamedTuple):
    """The two numbers from which everything about a row follows, and logsumexp, each of shape (*batch,)."""

    maximum: Array  # NaN where the row has no distribution, 0 where every class is masked
    others: Array  # Σ e^(z_j − maximum) over all classes but one of the largest
    logsumexp: Array  # maximum + log_total; ±∞ where the row has no distribution for that reason

    @property
    def log_total(self) -> Array:
        """logsumexp − maximum, ≥ 0."""
        return jnp.log1p(self.others)


class Shares(NamedTuple):
    """Probabilities p, 1 − p and log p, each right to rounding; and p in units, normal even where p is not."""

    scaled: Array
    p: Array
    not_p: Array
    log_p: Array


def row_state(rows: Rows, implementation: str | None) -> RowState:
    """The state of every row.

    A constant to derivatives: those of `probabilities` account for it.
    """
    rows, empty = lax.stop_gradient(rows), rows.empty()
    maximum, others = choose(
        implementation, rows, empty, cpu=_folded_state, accelerator=_reduced_state, partitioned=_counted_state
    )
    if rows.shards.names:
        maximum, others = _merged_state(rows.shards, maximum, others)
    defined = _defined(maximum, empty)
    logsumexp = jnp.where(jnp.isinf(maximum), maximum, defined + jnp.log1p(others))
    return RowState(defined, others, logsumexp)


def _defined(maximum: Array, empty: Array | None) -> Array:
    """A row that holds +∞, or nothing but −∞, has no distribution; a row of masked classes has an empty one."""
    defined = jnp.where(jnp.isinf(maximum), jnp.nan, maximum)
    return defined if empty is None else jnp.where(empty, 0, defined)


def _folded_state(rows: Rows, empty: Array | None) -> tuple[Array, Array]:
    """For CPUs: fold a row onto a part of itself, sum that, and do the lane of the maximum again without it.

    A mask inside the long sum would cost twice as much. The lane is found from the sums themselves: if the total is
    below 2 units, only one lane can reach 1; else nothing cancels in total − 1. Sums go in pairs, so that even the many
    equal terms of an undecided row leave no bias.
    """
    maximum = rows.maximum()
    top = _defined(maximum, empty)
    classes = rows.logits.shape[-1]
    if classes <= FEW:  # faster class by class, over all rows
        alone = [exponentials(rows.part(k, k + 1)[..., 0], top) for k in range(classes)]
        return maximum, _without_one(_add_in_pairs, alone) / UNIT
    top = top[..., None]
    length = _lane_count(classes)
    folds = classes // length
    lanes = _add_in_pairs([exponentials(rows.part(k * length, (k + 1) * length), top) for k in range(folds)])
    rest = exponentials(rows.part(folds * length, classes), top)
    sums = jnp.concatenate([lanes, rest], axis=-1)
    total = _sum_in_pairs(sums)
    # In place of argmax, which XLA for CPUs takes number by number.
    places = _positions(sums, sums.shape[-1])
    lane = jnp.max(jnp.where(sums == jnp.max(sums, axis=-1, keepdims=True), places, 0), axis=-1, keepdims=True)
    fold = _positions(sums, folds)
    in_lane = (lane < length) | (fold == 0)  # what did not fold stands alone
    lane_class = jnp.where(lane < length, lane + fold * length, folds * length + lane - length)
    part = exponentials(jnp.where(in_lane, rows.at(lane_class), -jnp.inf), top)
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


def _add_in_pairs(parts: list[Array]) -> Array:
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _sum_in_pairs(rows: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """The sum over the last axis, along a tree."""
    while rows.shape[-1] > FEW:
        length = _lane_count(rows.shape[-1])
        folds = rows.shape[-1] // length
        lanes = _add_in_pairs([rows[..., k * length : (k + 1) * length] for k in range(folds)])
        rows = jnp.concatenate([lanes, rows[..., folds * length :]], axis=-1)
    return _add_in_pairs([rows[..., k] for k in range(rows.shape[-1])])


def _positions(z: Array, size: int) -> Array:
    """0, 1, … in the last of `size` places, for every row of z."""
    return lax.broadcasted_iota(jnp.int32, (*z.shape[:-1], size), z.ndim - 1)


def _counted_state(rows: Rows, empty: Array | None) -> tuple[Array, Array]:
    """For CPUs among which XLA splits the class axis: leave every largest class out, and put all but one back."""
    z = rows.z()
    # The largest of several devices' numbers may overlook a NaN.
    maximum = jnp.where(jnp.any(jnp.isnan(z), axis=-1), jnp.nan, jnp.max(z, axis=-1))
    top = _defined(maximum, empty)[..., None]
    largest = z == top
    smaller = jnp.sum(jnp.where(largest, 0, exponentials(z, top)), axis=-1) / UNIT
    tops = jnp.maximum(jnp.sum(largest, axis=-1, dtype=z.dtype), 1)
    return maximum, smaller + (tops - 1)


def _reduced_state(rows: Rows, empty: Array | None) -> tuple[Array, Array]:
    """For accelerators: one pass, reading each logit once. (m, s) merges associatively."""
    del empty
    z = rows.z()
    init = (np.array(-np.inf, z.dtype), np.zeros((), z.dtype))
    maximum, others = lax.reduce((z, jnp.zeros_like(z)), init, _merge, (z.ndim - 1,))
    return maximum, jnp.where(jnp.isposinf(maximum), jnp.nan, others / UNIT)


def _merge(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """The state of two sets of classes taken together, sums in units."""
    maximum = jnp.maximum(left[0], right[0])
    lesser = jnp.where(left[0] == right[0], maximum, jnp.minimum(left[0], right[0]))
    above = jnp.where(left[0] >= right[0], left[1], right[1])
    below = jnp.where(left[0] >= right[0], right[1], left[1])
    # Two classes of −∞ have no difference; relative to 0, each counts for nothing.
    finite = jnp.where(jnp.isneginf(maximum), 0, maximum)
    return maximum, above + (1 + below / UNIT) * exponentials(lesser, finite)


def _merged_state(shards: ClassShards, maximum: Array, others: Array) -> tuple[Array, Array]:
    """The state of all shards' classes together.

    As many largest classes as there are shards that hold one have been left out. All but one are put back by counting.
    """
    is_nan, none_here = jnp.isnan(maximum), jnp.isneginf(maximum)
    top = shards.max(jnp.where(is_nan, -jnp.inf, maximum))
    at_top = maximum == top
    finite = jnp.where(jnp.isinf(top), 0, top)
    below = (1 + others) * (exponentials(maximum, finite) / UNIT)
    share = jnp.where(none_here, 0, jnp.where(at_top, others, below))
    # The largest of several numbers may overlook a NaN; a sum does not.
    some_nan, tops, others = shards.sum((is_nan.astype(top.dtype), at_top.astype(top.dtype), share))
    others = jnp.where(jnp.isneginf(top), 0, others + (tops - 1))
    return jnp.where(some_nan > 0, jnp.nan, top), others


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def probabilities(
    z: Array, label_z: Array | None, state: RowState, shards: ClassShards
) -> tuple[Shares, Shares | None]:
    """softmax of the rows `z` (*batch, classes) and at their labels' `label_z` (*batch,), given the rows' state.

    `state` is a function of `z` and is not differentiated again.
    """
    del shards  # its derivative sums over classes
    rows = _shares(z, *(number[..., None] for number in state))
    return rows, None if label_z is None else _shares(label_z, *state)


def row_shares(rows: Rows, implementation: str | None = None) -> Shares:
    """softmax of every row."""
    return probabilities(rows.z(), None, row_state(rows, implementation), rows.shards)[0]


def _shares(z: Array, maximum: Array, others: Array, logsumexp: Array) -> Shares:
    del logsumexp
    scaled = exponentials(z, maximum) / (1 + others)
    p = scaled / UNIT
    # A largest class is the only one for which 1 − p would cancel.
    not_p = jnp.where(z >= maximum, others / (1 + others), 1 - p)
    return Shares(scaled, p, not_p, gap(z, maximum) - jnp.log1p(others))


@probabilities.defjvp
def _probabilities_jvp(shards, primals, tangents):
    # dlog p_j = dz_j − Σ p_i dz_i and dp_j = p_j · dlog p_j. Both are taken relative to dz at the class that holds
    # more than half of the row, if there is one, so that its own term vanishes instead of cancelling.
    z, label_z, state = primals
    z_dot, label_z_dot, _ = tangents
    rows, label = probabilities(z, label_z, state, shards)
    at_peak = shards.sum(jnp.sum(jnp.where(z >= state.maximum[..., None], z_dot, 0), axis=-1))
    reference = jnp.where(state.others < 1, at_peak, 0)
    relative = z_dot - reference[..., None]
    # In units, because the mean may be a normal number where every p but one is not.
    mean = shards.sum(jnp.sum(rows.scaled * relative, axis=-1)) / UNIT
    rows_dot = _shares_dot(rows, relative - mean[..., None])
    label_dot = None if label is None else _shares_dot(label, label_z_dot - reference - mean)
    return (rows, label), (rows_dot, label_dot)


def _shares_dot(shares: Shares, log_p_dot: Array) -> Shares:
    scaled_dot = shares.scaled * log_p_dot
    p_dot = scaled_dot / UNIT
    return Shares(scaled_dot, p_dot, -p_dot, log_p_dot)
