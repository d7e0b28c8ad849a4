"""Weights of rows: how much each counts, in a mean or a sum."""

import jax.numpy as jnp
from jax import Array

REDUCTIONS = ("mean", "sum", "none")


def shares(weights: Array, axis: int | None = None) -> Array:
    """The weights, divided by their sum along an axis (all of them for None); 0 where there is none."""
    return parts(weights, jnp.sum(weights, axis=axis, keepdims=axis is not None))


def parts(weights: Array, total: Array) -> Array:
    """The weights, divided by a sum that is known; 0 where that is 0."""
    return weights / jnp.where(total == 0, 1, total)
