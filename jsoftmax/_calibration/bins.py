"""Bins of numbers, sums over them, and the norm of what is in them."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer

from jsoftmax._rows.varying import searchsorted

Numbers = Float[Array, " rows"]
Places = Integer[Array, " rows"]


def equal_width_bins(values: Numbers, bins: int) -> Places:
    """The bin of each number from 0 to 1: b for those above b/bins, up to (b + 1)/bins; 0 goes to the first."""
    edges = jnp.asarray(np.arange(1, bins) / bins, values.dtype)
    return searchsorted(edges, values, side="left")


def equal_mass_bins(values: Numbers, shares: Numbers, bins: int) -> Places:
    """The bin of each number if bins in order hold equal sums of `shares`.

    Equal numbers go together to the bin of their middle, so that the order of the rows is of no consequence.
    """
    order = jnp.argsort(values)
    ranked = values[order]
    below = jnp.concatenate([jnp.zeros(1, shares.dtype), jnp.cumsum(shares[order])])
    first, last = (searchsorted(ranked, values, side=side) for side in ("left", "right"))
    middle = (below[first] + below[last]) / 2
    total = jnp.where(below[-1] == 0, 1, below[-1])
    return jnp.clip(jnp.floor(middle / total * bins), 0, bins - 1).astype(first.dtype)


def bin_sums(values: Numbers, places: Places, bins: int) -> Float[Array, " bins"]:
    """The sum of the numbers in each bin."""
    # Not a scatter, which would add one after another; this fuses and adds in a tree.
    chosen = places[None] == jnp.arange(bins, dtype=places.dtype)[:, None]
    return jnp.sum(jnp.where(chosen, values[None], 0), axis=-1)


def binned_norm(shares: Float[Array, " bins"], values: Float[Array, " bins"], order: float) -> Array:
    """(Σ share · |value|^order)^(1/order); for order ∞ the largest size, empty bins being 0."""
    size = jnp.abs(values)
    if order == 1:
        return jnp.sum(shares * size)
    if order == float("inf"):
        return jnp.max(size)
    mean = jnp.sum(shares * size**order)
    # The inner select keeps the derivative at 0, where a root is vertical, finite.
    return jnp.where(mean == 0, 0, jnp.where(mean == 0, 1, mean) ** (1 / order))
