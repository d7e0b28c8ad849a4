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
from jsoftmax._rows.varying import cond, fori_loop, scan

Step = Callable[[Any, Tree], tuple[Any, Tree]]
PARTS = 8  # of a block: how fine rows that count are told from rows that don't


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
        total = _zeros(step, rows)[0]
        if jax.tree.leaves(total) and jax.default_backend() != "cpu":
            # Zeros as large as the parameters cost more there than compiling a block twice.
            total, first = step(None, jax.tree.map(lambda leaf: leaf[0], whole))
            whole = jax.tree.map(lambda leaf: leaf[1:], whole)
    total, results = scan(step, total, whole)
    if first is not None:
        results = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, results)
    return total, joined(results, last)


def _over_active(step: Step, rows: Tree, size: int, active: Array) -> tuple[Any, Tree]:
    """Active rows first, in whole blocks while there are enough of them, then in eighths of a block."""
    count, part = _row_count(rows), -(-size // PARTS)
    order, busy = jnp.argsort(~active, stable=True), jnp.sum(active)

    def run(start: Any, carry: tuple[Any, Tree], size: int) -> tuple[Any, Tree]:
        at = lax.dynamic_slice_in_dim(order, start, size)
        total, found = step(carry[0], jax.tree.map(lambda leaf: leaf[at] if leaf.ndim else leaf, rows))
        put = functools.partial(_put, at)
        return total, jax.tree.map(put, carry[1], found)

    carry, blocks, parts = _zeros(step, rows), 0, count // part
    if count >= PARTS * part:
        blocks = busy // (PARTS * part)
        carry = fori_loop(0, blocks, lambda i, carry: run(i * (PARTS * part), carry, PARTS * part), carry)
    end = jnp.minimum(-(-busy // part), parts)
    if parts:
        carry = fori_loop(blocks * PARTS, end, lambda i, carry: run(i * part, carry, part), carry)
    if count % part:
        last = functools.partial(run, parts * part, size=count % part)
        carry = cond(busy > parts * part, last, lambda carry: carry, carry)
    return carry


def _row_count(rows: Tree) -> int:
    """Beside the rows there may be scalars, which go to each block."""
    return next(leaf.shape[0] for leaf in jax.tree.leaves(rows) if leaf.ndim)


def _put(at: Array, results: Array, found: Array) -> Array:
    return results.at[at].set(found, unique_indices=True) if results.ndim else results + found


def _zeros(step: Step, rows: Tree) -> tuple[Any, Tree]:
    """A total and results of nothing."""
    shapes = jax.eval_shape(functools.partial(step, None), rows)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
