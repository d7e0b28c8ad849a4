"""Exponentials and probabilities for other machines than GPUs, by the library's own series."""

from jax import Array, lax

from jsoftmax._rows.exponentials import UNIT, exponentials as exponentials
from jsoftmax._rows.primitives import together


def shares(z: Array, maximum: Array, others: Array, exact: bool, rounded: bool) -> tuple[Array, Array]:
    """UNIT · p and p."""
    del exact, rounded  # the rounding error costs nothing here
    return shares_of(exponentials(z, maximum), others)


def shares_of(powers: Array, others: Array) -> tuple[Array, Array]:
    powers, factor = together(powers, 1 / (1 + others))  # one division a row
    scaled = lax.mul(powers, factor)
    return scaled, lax.mul(scaled, scaled.dtype.type(1 / UNIT))
