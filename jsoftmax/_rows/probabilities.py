"""Probabilities of a row's classes, from its state, and their derivative: nothing cancels in either."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jsoftmax._rows import forms
from jsoftmax._rows.exponentials import UNIT, gap
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.shards import ClassShards
from jsoftmax._rows.state import RowState, row_state


class How(NamedTuple):
    """What is known of a computation when the program is traced."""

    shards: ClassShards
    implementation: str | None
    exact: bool  # as `Rows.has_exact_differences`


class Shares(NamedTuple):
    """Probabilities p, 1 − p and log p, each right to rounding; and p in units, normal even where p is not."""

    scaled: Array
    p: Array
    not_p: Array
    log_p: Array


class Labels(NamedTuple):
    """Integer labels as `probabilities` takes them."""

    z: Array  # (*batch,), theirs
    index: Array  # (*batch, 1), among the classes of this shard


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def probabilities(z: Array, labels: Labels | None, state: RowState, how: How) -> tuple[Shares, Shares | None]:
    """softmax of the rows `z` (*batch, classes) and at their labels, given the rows' state.

    `state` is a function of `z` and is not differentiated again.
    """
    maximum, others, _ = (number[..., None] for number in state)
    rows = _shares(z, maximum, others, forms.shares(z, maximum, others, how.exact, how.implementation))
    if labels is None:
        return rows, None
    maximum, others, _ = state
    if how.shards.names:  # the label may be another shard's
        taken = forms.shares(labels.z, maximum, others, how.exact, how.implementation)
    else:
        taken = forms.label_shares(rows.scaled, labels.index, labels.z, maximum, others, how.exact, how.implementation)
    return rows, _shares(labels.z, maximum, others, taken)


def row_shares(rows: Rows, implementation: str | None = None) -> Shares:
    """softmax of every row."""
    how = How(rows.shards, implementation, rows.has_exact_differences)
    return probabilities(rows.z(), None, row_state(rows, implementation), how)[0]


def _shares(z: Array, maximum: Array, others: Array, shares: tuple[Array, Array]) -> Shares:
    scaled, p = shares
    # A largest class is the only one for which 1 − p would cancel.
    not_p = jnp.where(z >= maximum, others / (1 + others), 1 - p)
    return Shares(scaled, p, not_p, gap(z, maximum) - jnp.log1p(others))


@probabilities.defjvp
def _probabilities_jvp(how, primals, tangents):
    # dlog p_j = dz_j − Σ p_i dz_i and dp_j = p_j · dlog p_j. Both are taken relative to dz at the class that holds
    # more than half of the row, if there is one, so that its own term vanishes instead of cancelling.
    z, labels, state = primals
    z_dot, labels_dot, _ = tangents
    shards = how.shards
    rows, label = probabilities(z, labels, state, how)
    at_peak = shards.sum(jnp.sum(jnp.where(z >= state.maximum[..., None], z_dot, 0), axis=-1))
    reference = jnp.where(state.others < 1, at_peak, 0)
    relative = z_dot - reference[..., None]
    # In units, because the mean may be a normal number where every p but one is not.
    mean = shards.sum(jnp.sum(rows.scaled * relative, axis=-1)) / UNIT
    rows_dot = _shares_dot(rows, relative - mean[..., None])
    label_dot = None if label is None else _shares_dot(label, labels_dot.z - reference - mean)
    return (rows, label), (rows_dot, label_dot)


def _shares_dot(shares: Shares, log_p_dot: Array) -> Shares:
    scaled_dot = shares.scaled * log_p_dot
    p_dot = scaled_dot / UNIT
    return Shares(scaled_dot, p_dot, -p_dot, log_p_dot)
