"""Exponentials and probabilities for other machines than GPUs, by the library's own series."""

from jax import Array

from jsoftmax._rows.exponentials import UNIT, exponentials as exponentials


def shares(z: Array, maximum: Array, others: Array, exact: bool, rounded: bool) -> tuple[Array, Array]:
    """UNIT · p and p."""
    del exact, rounded  # the rounding error costs nothing here
    return shares_of(exponentials(z, maximum), others)


def shares_of(powers: Array, others: Array) -> tuple[Array, Array]:
    scaled = powers * (1 / (1 + others))  # one division a row
    return scaled, scaled / UNIT
