"""Integer labels: which are classes, and what a row holds there."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Integer, Shaped


def is_class(labels: Integer[Array, "*batch"], classes: int) -> Bool[Array, "*batch"]:
    """Whether each label is one of the classes. Negative labels are not."""
    return (labels >= 0) & (labels < classes)


def label_index(labels: Integer[Array, "*batch"], classes: int) -> Integer[Array, "*batch 1"]:
    """The labels as indices of a class axis, (*batch, 1); 0 where a label is no class."""
    return jnp.where(is_class(labels, classes), labels, 0)[..., None]


def take_label(rows: Shaped[Array, "*batch classes"], labels: Integer[Array, "*batch"]) -> Shaped[Array, "*batch 1"]:
    """The labels' entries of `rows` (*batch, classes), as (*batch, 1); those of class 0 where a label is no class."""
    return jnp.take_along_axis(rows, label_index(labels, rows.shape[-1]), axis=-1)
