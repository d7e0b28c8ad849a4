"""Integer labels: which are classes, what a row holds there, and how to set it."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Integer, Shaped

from jsoftmax._platforms import choose


def is_class(labels: Integer[Array, "*batch"], classes: int) -> Bool[Array, "*batch"]:
    """Whether each label is one of the classes. Negative labels are not."""
    return (labels >= 0) & (labels < classes)


def label_index(labels: Integer[Array, "*batch"], classes: int) -> Integer[Array, "*batch 1"]:
    """The labels as indices of a class axis, (*batch, 1); 0 where a label is no class."""
    return jnp.where(is_class(labels, classes), labels, 0)[..., None]


def take_label(rows: Shaped[Array, "*batch classes"], labels: Integer[Array, "*batch"]) -> Shaped[Array, "*batch 1"]:
    """The labels' entries of `rows` (*batch, classes), as (*batch, 1); those of class 0 where a label is no class."""
    return jnp.take_along_axis(rows, label_index(labels, rows.shape[-1]), axis=-1)


def place_label(
    rows: Float[Array, "*batch classes"],
    entries: Float[Array, "*batch 1"],
    labels: Integer[Array, "*batch"],
    implementation: str | None,
) -> Float[Array, "*batch classes"]:
    """`rows` (*batch, classes) with the labels' entries replaced by `entries` (*batch, 1).

    On a CPU a scatter in place is free and a comparison per element is not; on an accelerator the reverse.
    """
    index = label_index(labels, rows.shape[-1])
    return choose(implementation, rows, entries, index, cpu=_scatter, accelerator=_select, partitioned=_select)


def _select(rows: Array, entries: Array, index: Array) -> Array:
    return jnp.where(lax.broadcasted_iota(index.dtype, rows.shape, rows.ndim - 1) == index, entries, rows)


@jax.custom_jvp
def _scatter(rows: Array, entries: Array, index: Array) -> Array:
    if rows.dtype.itemsize != 2:
        return _put(rows, entries, index)
    # XLA scatters 16-bit floats on CPUs through a float32 copy of the whole array; integers it leaves alone.
    bits = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.uint16)
    return lax.bitcast_convert_type(_put(bits(rows), bits(entries), index), rows.dtype)


@_scatter.defjvp
def _scatter_jvp(primals, tangents):
    rows_dot, entries_dot, _ = tangents
    return _scatter(*primals), _put(rows_dot, entries_dot, primals[2])


def _put(rows: Array, entries: Array, index: Array) -> Array:
    # Flat, because only so can a scatter be told that no entry is set twice, which its transpose needs.
    flat = rows.reshape(-1, rows.shape[-1])
    at = flat.at[jnp.arange(flat.shape[0]), index.reshape(-1)]
    return at.set(entries.reshape(-1), unique_indices=True, mode="promise_in_bounds").reshape(rows.shape)
