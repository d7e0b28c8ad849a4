"""For CPUs among which XLA splits the class axis: sums over all classes, which it can split, and no slices of them."""

import jax.numpy as jnp
from jax import Array

from jsoftmax._rows.exponentials import UNIT, exponentials as series
from jsoftmax._rows.forms.series import exponentials as exponentials, shares as shares
from jsoftmax._rows.forms.tpu import place_label as place_label
from jsoftmax._rows.primitives import select
from jsoftmax._rows.rows import Rows, defined, largest


def row_state(rows: Rows, empty: Array | None, exact: bool, capped: bool, alone: bool) -> tuple[Array, Array]:
    """Leave every largest class out, and put all but one back."""
    del exact, capped, alone
    z = rows.z()
    maximum = largest(z)
    top = defined(maximum, empty)[..., None]
    at_top = z == top
    smaller = jnp.sum(select(at_top, 0, series(z, top)), axis=-1)
    tops = jnp.maximum(jnp.sum(at_top, axis=-1, dtype=z.dtype), 1)
    return maximum, smaller + (tops - 1) * UNIT
