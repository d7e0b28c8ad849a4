"""Class axes: one axis or several, anywhere in an array, brought to the last place and flattened into one."""

import math
import operator

import jax.numpy as jnp
from jax import Array

Axis = int | tuple[int, ...] | None


def normalize_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """`axis` as non-negative axis numbers; None stands for all of them."""
    if axis is None:
        return tuple(range(ndim))
    numbers = axis if isinstance(axis, tuple) else (axis,)
    try:
        numbers = tuple(operator.index(number) for number in numbers)
    except TypeError:
        raise ValueError(f"axis must be an int or a tuple of ints, got {axis!r}") from None
    for number in numbers:
        if not -ndim <= number < ndim:
            raise ValueError(f"axis {number} is out of range for logits with {ndim} dimensions")
    numbers = tuple(number % ndim for number in numbers)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"axis names a dimension twice, got {axis!r}")
    return numbers


def batch_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """What is left of `shape` without the class axes."""
    return tuple(size for number, size in enumerate(shape) if number not in axes)


def classes_last(array: Array, axes: tuple[int, ...]) -> Array:
    """`array` as (*batch, classes), the class axes flattened in the order in which `axes` names them."""
    if axes == (array.ndim - 1,):
        return array
    moved = jnp.moveaxis(array, axes, range(array.ndim - len(axes), array.ndim))
    return moved.reshape(*batch_shape(array.shape, axes), -1) if len(axes) != 1 else moved


def classes_back(rows: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The inverse of `classes_last`: `rows` in the original `shape`."""
    if axes == (len(shape) - 1,):
        return rows
    batch = batch_shape(shape, axes)
    moved = rows.reshape(*batch, *(shape[number] for number in axes))
    return jnp.moveaxis(moved, range(len(batch), len(shape)), axes)


def class_count(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    return math.prod(shape[number] for number in axes)
