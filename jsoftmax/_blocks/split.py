"""Rows in blocks: how a tree of arrays is cut into them, and how results of them are joined."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jsoftmax._rows.platforms import is_partitioned
from jsoftmax._rows.varying import cond

Tree = Any


def row_count(rows: Tree) -> int:
    shapes = [leaf.shape for leaf in jax.tree.leaves(rows)]
    if () in shapes or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"rows needs arrays with one leading axis in common, got shapes {shapes}")
    return shapes[0][0]


def even_size(count: int, most: int) -> int:
    """The largest size up to `most`, and not below half of it, that leaves no ragged end; `most` if there is none."""
    sizes = (size for size in range(most, max(most // 2, 1) - 1, -1) if count % size == 0)
    return next(sizes, most) if count > most else most


def split(tree: Tree, count: int, size: int) -> tuple[Tree, Tree]:
    """Whole blocks (blocks, size, …), and the rows that are left. A scalar goes to each.

    Of a program that XLA splits over devices, each block takes every so-manieth row: then every device has a part of
    every block, whatever the mesh, and no row has to move.
    """
    blocks = count // size

    def whole(leaf: Array) -> Array:
        if leaf.ndim == 0:
            return jnp.broadcast_to(leaf, (blocks,))
        rows, shape = leaf[: blocks * size], leaf.shape[1:]
        return cond(
            is_partitioned(),
            lambda rows: rows.reshape(size, blocks, *shape).swapaxes(0, 1),
            lambda rows: rows.reshape(blocks, size, *shape),
            rows,
        )

    return jax.tree.map(whole, tree), jax.tree.map(lambda leaf: leaf[blocks * size :] if leaf.ndim else leaf, tree)


def join(whole: Array, rest: Array | None) -> Array:
    """Results of whole blocks and of the rest: rows side by side, scalars summed."""
    if whole.ndim == 1:
        total = jnp.sum(whole, axis=0)
        return total if rest is None else total + rest
    shape = (-1, *whole.shape[2:])
    rows = cond(
        is_partitioned(),
        lambda whole: whole.swapaxes(0, 1).reshape(shape),
        lambda whole: whole.reshape(shape),
        whole,
    )
    return rows if rest is None else jnp.concatenate([rows, rest])


def joined(whole: Tree, rest: Tree | None) -> Tree:
    return jax.tree.map(lambda leaf: join(leaf, None), whole) if rest is None else jax.tree.map(join, whole, rest)
