"""A computation for some rows only: for those that need it, a fixed number at a time.

Which rows need it depends on their values. Shapes cannot, so that the rows are sorted to the front and taken
`capacity` at a time, and rounds without any such row are skipped. Rows that are many take more rounds, and none is
dropped.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jsoftmax._blocks.blockwise import blockwise
from jsoftmax._rows.varying import cond

FEWEST_ROWS = 64


def routed(
    compute: Callable, params: Any, rows: dict[str, Array], within: Array, capacity: int | None, derivative: str
) -> Any:
    """`compute(params, rows)` for the rows that are `within`, `capacity` at a time; zeros for the others."""
    count = within.shape[0]
    if capacity is None:
        capacity = max(FEWEST_ROWS, -(-count // 16))
    elif capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")

    def one_round(params: Any, rows: dict[str, Array]) -> Any:
        shapes = jax.eval_shape(compute, params, rows)
        zeros = functools.partial(jax.tree.map, lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        return cond(jnp.any(rows["within"]), lambda: compute(params, rows), zeros)

    order = jnp.argsort(~within, stable=True)
    rows = jax.tree.map(lambda leaf: leaf[order], {**rows, "within": within})
    results = blockwise(one_round, block_size=capacity, derivative=derivative)(params, rows)
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[order].set(leaf, unique_indices=True), results)
