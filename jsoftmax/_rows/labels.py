"""Integer labels: which are classes, and what a row holds there."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Integer, Shaped

from jsoftmax._rows.primitives import select


def is_class(labels: Integer[Array, "*batch"], classes: int) -> Bool[Array, "*batch"]:
    """Whether each label is one of the classes. Negative labels are not."""
    number = labels.dtype.type  # in primitives, as `exponentials` is
    return lax.bitwise_and(lax.ge(labels, number(0)), lax.lt(labels, number(classes)))


def label_index(labels: Integer[Array, "*batch"], classes: int) -> Integer[Array, "*batch 1"]:
    """The labels as indices of a class axis, (*batch, 1); 0 where a label is no class."""
    index = select(is_class(labels, classes), labels, 0)
    return lax.expand_dims(index, (labels.ndim,))


def take_label(rows: Shaped[Array, "*batch classes"], labels: Integer[Array, "*batch"]) -> Shaped[Array, "*batch 1"]:
    """The labels' entries of `rows` (*batch, classes), as (*batch, 1); those of class 0 where a label is no class."""
    return take(rows, label_index(labels, rows.shape[-1]))


def take(rows: Shaped[Array, "*batch classes"], index: Integer[Array, "*batch some"]) -> Shaped[Array, "*batch some"]:
    """The entries of each row at indices that are known to be some of its classes."""
    batch = tuple(range(rows.ndim - 1))  # in primitives, as `select` is
    numbers = lax.GatherDimensionNumbers((), (rows.ndim - 1,), (rows.ndim - 1,), batch, batch)
    places = lax.expand_dims(index, (index.ndim,))
    sizes = [min(size, 1) for size in rows.shape]  # there may be no rows
    return lax.gather(rows, places, numbers, sizes, mode="promise_in_bounds")


@jax.custom_jvp
def take_class(numbers: Float[Array, " classes"], labels: Integer[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The labels' entries of `numbers`; those of the nearest class where a label is no class."""
    return jnp.take(numbers, labels, mode="clip")


@take_class.defjvp
def _take_class_jvp(primals, tangents):
    # By comparison, and so its transpose: of a scatter of rows that XLA splits unevenly, it counts the padding as well.
    numbers, labels = primals
    at = jnp.clip(labels, 0, numbers.shape[0] - 1)[..., None]
    here = lax.broadcasted_iota(at.dtype, (*labels.shape, *numbers.shape), labels.ndim) == at
    numbers_dot = jnp.broadcast_to(tangents[0], here.shape)
    return take_class(numbers, labels), jnp.sum(select(here, numbers_dot, 0), axis=-1)
