"""Rows that count, and how much: the input of everything that scores a whole set of rows."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.options import checked_rows
from jsoftmax._rows.probabilities import row_shares
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.weights import shares


class CountedRows(NamedTuple):
    """Rows with integer labels. Those of weight 0 hold zeros and the label 0, so that nothing of them is left."""

    rows: Rows
    weights: Float[Array, "*batch"]

    def mean(self, values: Float[Array, "*batch"]) -> Array:
        """The weighted mean over all rows; 0 if none counts."""
        return jnp.sum(shares(self.weights) * values)

    def differences(self) -> tuple[Array, Array, Array]:
        """p, log p and p − y of every class, (*batch, classes); at the label −(1 − p), which doesn't cancel."""
        z, labels = self.rows.z(), self.rows.labels[..., None]
        p = row_shares(self.rows)
        at_label = lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1) == labels
        known = self.rows.is_class(self.rows.labels)[..., None]
        return p.p, p.log_p, jnp.where(known, jnp.where(at_label, -p.not_p, p.p), jnp.nan)


def counted_rows(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    weights: ArrayLike | None,
    ignore_index: int | None,
) -> CountedRows:
    """Check everything, then leave out what doesn't count: weight 0, an ignored label, a row without any class."""
    rows = checked_rows(logits, checks.integer_array("labels", labels), axis, where, {})
    batch, classes = rows.logits.shape[:-1], rows.logits.shape[-1]
    if classes == 0:
        raise ValueError(f"logits has shape {jnp.shape(logits)} and so no class along axis {axis}; this needs one")
    if weights is None:
        weights = jnp.ones(batch, rows.dtype)
    else:
        checks.within("weights", weights, 0.0, float("inf"))
        weights = checks.float_array("weights", weights).astype(rows.dtype)
        checks.has_shape("weights", weights, batch, "one factor for each row of logits")
    idle, empty = weights == 0, rows.empty()
    if ignore_index is not None:
        idle |= rows.labels == ignore_index
    if empty is not None:
        idle |= empty
    clean = jnp.where(idle[..., None], 0, rows.logits)
    labels = jnp.where(idle, 0, rows.labels)
    return CountedRows(dataclasses.replace(rows, logits=clean, labels=labels), jnp.where(idle, 0, weights))
