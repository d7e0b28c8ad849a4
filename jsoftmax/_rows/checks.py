"""What callers may pass. Each message names the argument, what it got and what it needs.

Shapes, dtypes and options are known when a program is traced and raise; the values of traced arrays cannot, and give
what the numerical contract says.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def float_array(name: str, value: ArrayLike) -> Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must hold floating-point numbers, got dtype {array.dtype}; convert them first")
    if array.dtype.name == "float8_e8m0fnu":
        raise TypeError(f"{name} has dtype float8_e8m0fnu, a format of scales without 0 and signs; convert it first")
    return array


def integer_array(name: str, value: ArrayLike) -> Array:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integer class numbers, got dtype {array.dtype}")
    # In 8 or 16 bits, the number of classes, or a number to ignore, might be another one.
    return array.astype(jnp.int32) if array.dtype.itemsize < 4 else array


def bool_array(name: str, value: ArrayLike) -> Array:
    array = jnp.asarray(value)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name} must be boolean (True for what takes part), got dtype {array.dtype}")
    return array


def has_shape(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, but needs {shape}: {meaning}")


def has_kernel_shape(kernel: Array, width: int, classes: int, transposed: bool, name: str = "kernel") -> None:
    needs = (classes, width) if transposed else (width, classes)
    meaning = (
        "(classes, features)"
        if transposed
        else f"(features, classes); {name}_transposed=True if it is the other way round"
    )
    has_shape(name, kernel, needs, meaning)


def scalar_or_rows(name: str, value: ArrayLike, batch: tuple[int, ...]) -> Array:
    """A number, or one number a row."""
    array = jnp.asarray(value)
    if array.shape not in ((), batch):
        raise ValueError(f"{name} has shape {array.shape}, but needs () or {batch}: one number, or one a row")
    return array


def known(value: Any) -> bool:
    """Whether the values of `value` can be looked at: not while JAX traces them."""
    return not isinstance(value, jax.core.Tracer)


def only_options(options: Mapping[str, Any], known: type) -> None:
    """Raises for a name that is no key of the TypedDict `known`, as a function would for an unknown keyword."""
    for name in options:
        if name not in known.__annotations__:
            raise TypeError(f"got an unknown option {name!r}; the options are {', '.join(known.__annotations__)}")


def is_known(value: Any, number: float) -> bool:
    """Whether `value` is a single number whose value is known, and is `number`."""
    return known(value) and np.ndim(value) == 0 and bool(np.asarray(value) == number)


def within(name: str, value: ArrayLike, low: float, high: float) -> None:
    """Raises for a known number outside [low, high]."""
    if known(value) and not np.all((low <= np.asarray(value)) & (np.asarray(value) <= high)):
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {bounds}, got {value}")


def one_of(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
