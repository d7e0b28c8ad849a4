"""The state of a row of logits: its maximum m and the sum s of the other exponentials.

Everything is exact in the sense of floating point because the largest logit is kept out of every sum. With
s = Σ e^(z_j − m) over all *other* classes,

    logsumexp = m + log1p(s)     −log p_j = (m − z_j) + log1p(s)     1 − p_max = s / (1 + s)

have only non-negative terms: nothing cancels, however confident the row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._rows import forms
from jsoftmax._rows.exponentials import UNIT, exponentials
from jsoftmax._rows.primitives import select
from jsoftmax._rows.rows import Rows, defined, is_infinite
from jsoftmax._rows.shards import ClassShards
from jsoftmax._rows.varying import cond


class RowState(NamedTuple):
    """The two numbers from which everything about a row follows, and logsumexp, each of shape (*batch,)."""

    maximum: Array  # NaN where the row has no distribution, 0 where every class is masked
    others: Array  # Σ e^(z_j − maximum) over all classes but one of the largest
    logsumexp: Array  # maximum + log_total; ±∞ where the row has no distribution for that reason

    @property
    def log_total(self) -> Array:
        """logsumexp − maximum, ≥ 0."""
        return jnp.log1p(self.others)


def row_state(rows: Rows, implementation: str | None, alone: bool = False) -> RowState:
    """The state of every row; `alone` if nothing else is computed of its exponentials.

    A constant to derivatives: those of `probabilities` account for it.
    """
    rows, empty = lax.stop_gradient(rows), rows.empty()
    maximum, others = forms.row_state(rows, empty, implementation, alone)
    if rows.shards.names:
        maximum = _nan_behind_nothing(rows, maximum)
        maximum, others = _merged_state(rows.shards, maximum, others)
    return _completed(maximum, others, empty)


@functools.partial(jax.jit, inline=True)  # traced once for a loss and for its derivative
def _completed(maximum: Array, others: Array, empty: Array | None) -> RowState:
    others = others / UNIT
    top = defined(maximum, empty)
    return RowState(top, others, select(is_infinite(maximum), maximum, top + lax.log1p(others)))


def logsumexp(rows: Rows, state: RowState) -> Array:
    """That of the state; NaN where `largest` would be, of which no sum tells if the state has a maximum of −∞."""
    found = state.logsumexp
    if rows.shards.names:  # which the state has looked at
        return found
    return cond(jnp.any(jnp.isneginf(found)), lambda: _nan_behind_nothing(rows, found), lambda: found)


def _nan_behind_nothing(rows: Rows, numbers: Array) -> Array:
    """−∞ becomes NaN in a row that holds one, which the library's maximum overlooks if nothing stands behind it.

    Of −∞ alone a sum is −∞. To ask each logit whether it is NaN would take an array of the answers.
    """
    return select(jnp.isneginf(numbers), jnp.sum(rows.z(), axis=-1) - jnp.inf, numbers)


def _merged_state(shards: ClassShards, maximum: Array, others: Array) -> tuple[Array, Array]:
    """The state of all shards' classes together.

    As many largest classes as there are shards that hold one have been left out. All but one are put back by counting.
    """
    is_nan, none_here = jnp.isnan(maximum), jnp.isneginf(maximum)
    top = shards.max(select(is_nan, -jnp.inf, maximum))
    at_top = maximum == top
    finite = select(jnp.isinf(top), 0, top)
    # In units throughout: what is a normal number on all shards together may be none on each.
    below = (1 + others / UNIT) * exponentials(maximum, finite)
    share = select(none_here, 0, select(at_top, others, below))
    # The largest of several numbers may overlook a NaN; a sum does not.
    some_nan, tops, others = shards.sum((is_nan.astype(top.dtype), at_top.astype(top.dtype), share))
    others = select(jnp.isneginf(top), 0, others + (tops - 1) * UNIT)
    return select(some_nan > 0, jnp.nan, top), others
