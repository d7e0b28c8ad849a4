"""For TPUs, and partitioned programs on GPUs: one reduction of pairs, which reads each logit once."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jsoftmax._rows.exponentials import UNIT, exponentials as series
from jsoftmax._rows.forms.series import exponentials as exponentials, shares as shares
from jsoftmax._rows.primitives import select, together
from jsoftmax._rows.rows import Rows


def row_state(rows: Rows, empty: Array | None, exact: bool, capped: bool, alone: bool) -> tuple[Array, Array]:
    """One pass, reading each logit once. (m, s) merges associatively."""
    del empty, exact, capped, alone
    z = rows.z()
    init = (np.array(-np.inf, z.dtype), np.zeros((), z.dtype))
    maximum, others = lax.reduce((z, jnp.zeros_like(z)), init, merge, (z.ndim - 1,))
    return maximum, select(jnp.isposinf(maximum), jnp.nan, others)


def merge(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """The state of two sets of classes taken together, sums in units."""
    maximum = jnp.maximum(left[0], right[0])
    lesser = select(left[0] == right[0], maximum, jnp.minimum(left[0], right[0]))
    above = select(left[0] >= right[0], left[1], right[1])
    below = select(left[0] >= right[0], right[1], left[1])
    # Two classes of −∞ have no difference; relative to 0, each counts for nothing.
    finite = select(jnp.isneginf(maximum), 0, maximum)
    return maximum, above + (1 + below / UNIT) * series(lesser, finite)


def place_label(rows: Array, entries: Array, labels: Array) -> Array:
    classes = lax.broadcasted_iota(np.int32, rows.shape, rows.ndim - 1)
    classes = lax.convert_element_type(classes, labels.dtype)  # LLVM has no vectors of floats that count
    return select(lax.eq(*together(classes, labels)), entries, rows)
