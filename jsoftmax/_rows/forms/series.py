"""Exponentials and probabilities for other machines than GPUs, by the library's own series."""

from jax import Array

from jsoftmax._rows.exponentials import UNIT, exponentials as series


def exponentials(z: Array, maximum: Array, exact: bool) -> Array:
    """UNIT · e^(z − maximum)."""
    del exact  # the rounding error costs nothing here
    return series(z, maximum)


def shares(z: Array, maximum: Array, others: Array, exact: bool) -> tuple[Array, Array]:
    """UNIT · p and p."""
    scaled = exponentials(z, maximum, exact) * (1 / (1 + others))  # one division a row
    return scaled, scaled / UNIT
