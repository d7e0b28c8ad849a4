"""softmax, log_softmax and logsumexp."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._axes import Axis, classes_back, normalize_axes
from jsoftmax._options import checked_rows
from jsoftmax._probabilities import probabilities, row_state
from jsoftmax._rows import Rows
from jsoftmax._statistics import Config, row_statistics


@jax.jit
def _shares(rows: Rows):
    z = rows.z()
    return probabilities(z, None, row_state(z, rows.empty(), None))[0]


def _activation(field: str, logits, axis: Axis, where, temperature) -> Array:
    rows = checked_rows(logits, None, axis, where, {"temperature": temperature})
    logits = jnp.asarray(logits)
    if rows.logits.size == 0:
        return logits
    out = getattr(_shares(rows), field).astype(logits.dtype)
    return classes_back(out, normalize_axes(axis, logits.ndim), logits.shape)


def softmax(
    logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0
) -> Array:
    return _activation("p", logits, axis, where, temperature)


def log_softmax(
    logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0
) -> Array:
    return _activation("log_p", logits, axis, where, temperature)


def logsumexp(
    logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, *, temperature: ArrayLike = 1.0
) -> Array:
    rows = checked_rows(logits, None, axis, where, {"temperature": temperature})
    if rows.logits.shape[-1] == 0:
        return jnp.full(rows.logits.shape[:-1], -jnp.inf, rows.logits.dtype)
    return _logsumexp(rows).astype(rows.logits.dtype)


@jax.jit
def _logsumexp(rows: Rows) -> Array:
    return row_statistics(rows, Config(want=("logsumexp",), derivative="jvp")).logsumexp
