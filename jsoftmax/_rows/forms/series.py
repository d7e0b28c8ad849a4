"""Exponentials and probabilities for other machines than GPUs, by the library's own series."""

from jax import Array

from jsoftmax._rows.exponentials import UNIT, exponentials as exponentials


def shares(z: Array, maximum: Array, others: Array, exact: bool) -> tuple[Array, Array]:
    """UNIT · p and p."""
    del exact  # the rounding error costs nothing here
    scaled = exponentials(z, maximum) * (1 / (1 + others))  # one division a row
    return scaled, scaled / UNIT


def label_shares(
    scaled: Array, index: Array, label_z: Array, maximum: Array, others: Array, exact: bool
) -> tuple[Array, Array]:
    """Computed anew: accelerators do not keep what they make of all classes, but make it where it is used."""
    del scaled, index
    return shares(label_z, maximum, others, exact)
