"""Exponentials and probabilities for other machines than GPUs, by the library's own series."""

from jax import Array, lax

from jsoftmax._rows.exponentials import UNIT, exponentials as exponentials
from jsoftmax._rows.primitives import hidden, together


def shares(z: Array, maximum: Array, others: Array, exact: bool, rounded: bool) -> tuple[Array, Array]:
    """UNIT · p and p."""
    del exact, rounded  # the rounding error costs nothing here
    return shares_of(exponentials(z, maximum), others)


def shares_of(powers: Array, others: Array) -> tuple[Array, Array]:
    # XLA would multiply a constant with what multiplies p, which may then be no normal number.
    powers, factor, unit = together(powers, 1 / (1 + others), hidden(1 / UNIT, others))  # one division a row
    scaled = lax.mul(powers, factor)
    return scaled, lax.mul(scaled, unit)
