"""Exponentials and probabilities for other machines than GPUs, by the library's own series."""

from jax import Array

from jsoftmax._rows.exponentials import UNIT, exponentials as exponentials


def shares(z: Array, maximum: Array, others: Array, exact: bool) -> tuple[Array, Array]:
    """UNIT · p and p."""
    del exact  # the rounding error costs nothing here
    scaled = exponentials(z, maximum) * (1 / (1 + others))  # one division a row
    return scaled, scaled / UNIT
