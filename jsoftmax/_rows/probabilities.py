"""Probabilities of a row's classes, from its state, and their derivative: nothing cancels in either."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._rows import forms
from jsoftmax._rows.exponentials import UNIT, gap
from jsoftmax._rows.primitives import select
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.shards import ClassShards
from jsoftmax._rows.state import RowState, row_state


class How(NamedTuple):
    """What is known of a computation when the program is traced."""

    shards: ClassShards
    implementation: str | None
    exact: bool  # as `Rows.has_exact_differences`
    only_p: bool = False  # of the rows: 1 − p and log p are not asked for, and None
    rounded: bool = False  # to 16 bits, after one product with the rows' p; and exact


class Shares(NamedTuple):
    """Probabilities p, 1 − p and log p, each right to rounding; and p in units, normal even where p is not."""

    scaled: Any
    p: Any
    not_p: Any = None
    log_p: Any = None


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def probabilities(z: Array, label_z: Array | None, state: RowState, how: How) -> tuple[Shares, Shares | None]:
    """softmax of the rows `z` (*batch, classes) and at their labels' `label_z` (*batch,), given the rows' state.

    `state` is a function of `z` and is not differentiated again.
    """
    rows = _shares(how, z, *(number[..., None] for number in state))
    return rows, None if label_z is None else _shares(how, label_z, *state, at_label=True)


def row_shares(rows: Rows, implementation: str | None = None) -> Shares:
    """softmax of every row."""
    how = How(rows.shards, implementation, rows.has_exact_differences)
    return probabilities(rows.z(), None, row_state(rows, implementation), how)[0]


def _shares(how: How, z: Array, maximum: Array, others: Array, logsumexp: Array, *, at_label: bool = False) -> Shares:
    del logsumexp
    scaled, p = forms.shares(z, maximum, others, how.exact, how.rounded and not at_label, how.implementation)
    if how.only_p and not at_label:
        return Shares(scaled, p)
    below = gap(z, maximum)
    log_p = below - lax.log1p(others)
    # A largest class is the only one for which 1 − p would cancel.
    if at_label:  # without p, which may not be asked for, and with one division, where one step of the program ends
        not_p = select(z >= maximum, others, 1 + others - lax.exp(below)) / (1 + others)
    else:
        not_p = select(z >= maximum, others / (1 + others), 1 - p)
    return Shares(scaled, p, not_p, log_p)


@probabilities.defjvp
def _probabilities_jvp(how, primals, tangents):
    # dlog p_j = dz_j − Σ p_i dz_i and dp_j = p_j · dlog p_j. Both are taken relative to dz at the class that holds
    # more than half of the row, if there is one, so that its own term vanishes instead of cancelling.
    z, label_z, state = primals
    z_dot, label_z_dot, _ = tangents
    shards = how.shards
    rows, label = probabilities(z, label_z, state, how)
    at_peak = shards.sum(jnp.sum(select(z >= state.maximum[..., None], z_dot, 0), axis=-1))
    reference = select(state.others < 1, at_peak, 0)
    relative = z_dot - reference[..., None]
    # In units, because the mean may be a normal number where every p but one is not.
    mean = shards.sum(jnp.sum(rows.scaled * relative, axis=-1)) / UNIT
    rows_dot = _shares_dot(rows, relative - mean[..., None])
    label_dot = None if label is None else _shares_dot(label, label_z_dot - reference - mean)
    return (rows, label), (rows_dot, label_dot)


def _shares_dot(shares: Shares, log_p_dot: Array) -> Shares:
    scaled_dot = shares.scaled * log_p_dot
    p_dot = scaled_dot / UNIT
    return Shares(scaled_dot, p_dot) if shares.log_p is None else Shares(scaled_dot, p_dot, -p_dot, log_p_dot)
