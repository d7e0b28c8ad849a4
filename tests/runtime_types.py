"""The check of types and shapes at run time that jaxtyping puts around every function of the package."""

from collections.abc import Callable

from beartype import beartype


def checked(function: Callable) -> Callable:
    """A function within another is left as it is: each call of that one would make another check, for much time."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
