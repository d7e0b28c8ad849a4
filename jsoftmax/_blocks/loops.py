"""Loops over blocks of rows: over all of them, or over those alone that hold rows that count.

`step(total, block)` takes what was added up so far, None at the start, and gives it back with the block's own share in
it, beside the results of the block: per row, which are joined, or scalars, which are summed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._blocks.split import Tree, joined, split
from jsoftmax._rows.varying import fori_loop, scan, switch

Step = Callable[[Any, Tree], tuple[Any, Tree]]
PARTS = 4  # of a block: how fine rows that count are told from rows that don't


def over_blocks(step: Step, rows: Tree, size: int, active: Array | None = None) -> tuple[Any, Tree]:
    """The total, and the results of all rows. Rows that are not `active` give 0, most of them uncomputed."""
    if active is not None:
        return _over_active(step, rows, size, active)
    count = _row_count(rows)
    whole, rest = split(rows, count, size)
    total, first, last = None, None, None
    if not count or count % size:
        total, last = step(None, rest)
        if count < size:
            return total, last
    else:
        total = _zeros(_shapes(step, rows)[0])
        if jax.tree.leaves(total) and jax.default_backend() != "cpu":
            # Zeros as large as the parameters cost more there than compiling a block twice.
            total, first = step(None, jax.tree.map(lambda leaf: leaf[0], whole))
            whole = jax.tree.map(lambda leaf: leaf[1:], whole)
    total, results = scan(step, total, whole)
    if first is not None:
        results = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, results)
    return total, joined(results, last)


def _over_active(step: Step, rows: Tree, size: int, active: Array) -> tuple[Any, Tree]:
    """Active rows first: those that fill no block, then blocks. What fills none goes as one piece of few sizes."""
    count, shapes = _row_count(rows), _shapes(step, rows)
    if not count:
        return _zeros(shapes)
    size = min(size, count)
    order, busy = jnp.argsort(~active, stable=True), jnp.sum(active)
    # Rounded up, but never beyond the last row.
    pieces = sorted({count % size, *(size * part // PARTS for part in range(PARTS))})
    lengths = jnp.array(pieces)
    which = jnp.sum(busy % size > lengths)
    blocks, which = busy // size + which // len(pieces), which % len(pieces)

    def run(total: Any, results: Tree, at: Array) -> tuple[Any, Tree]:
        total, found = step(total, jax.tree.map(lambda leaf: leaf[at] if leaf.ndim else leaf, rows))
        return total, jax.tree.map(functools.partial(_put, at), results, found)

    def piece(length: int) -> tuple[Any, Tree]:
        # Made here, since zeros as large as the parameters are no use beside a piece.
        return run(None, _zeros(shapes[1]), order[:length]) if length else _zeros(shapes)

    def block(i: Any, carry: tuple[Any, Tree]) -> tuple[Any, Tree]:
        return run(*carry, lax.dynamic_slice_in_dim(order, lengths[which] + i * size, size))

    first = switch(which, [functools.partial(piece, length) for length in pieces])
    return fori_loop(0, blocks, block, first)


def _row_count(rows: Tree) -> int:
    """Beside the rows there may be scalars, which go to each block."""
    return next(leaf.shape[0] for leaf in jax.tree.leaves(rows) if leaf.ndim)


def _put(at: Array, results: Array, found: Array) -> Array:
    return results.at[at].set(found, unique_indices=True) if results.ndim else results + found


def _shapes(step: Step, rows: Tree) -> tuple[Any, Tree]:
    """Of a total and of the results."""
    return jax.eval_shape(functools.partial(step, None), rows)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
