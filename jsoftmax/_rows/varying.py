"""Loops, branches, searches and reverse rules for arrays of which JAX knows that they vary over a mesh.

Inside `shard_map(check_vma=True)`, JAX types every array by the mesh axes over which it varies, and asks more of types
than ordinary programs say: a loop has to carry what it is given, both branches have to give the same, a reverse rule
has to return a cotangent of its argument's type. A zero made on the spot varies over nothing, what is added to it does.
What is here differs from what JAX has under the same names in that alone; the library uses it throughout.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

Axes = frozenset[str]


def varying(array: Any) -> Axes:
    """The mesh axes over which an array is known to vary."""
    kind = jax.typeof(array)
    # The attribute has had two names.
    return kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", frozenset())


def axes_of(*trees: Any) -> Axes:
    """Those over which anything in the trees does."""
    return frozenset().union(*(varying(leaf) for leaf in jax.tree.leaves(trees)))


def vary(array: Array, axes: Axes) -> Array:
    """`array`, typed to vary over `axes` as well. Its cotangents are then summed over them once, here."""
    missing = tuple(sorted(axes - varying(array)))
    if not missing:
        return array
    if hasattr(lax, "pcast"):
        return lax.pcast(array, missing, to="varying")
    return lax.pvary(array, missing)  # pyright: ignore[reportAttributeAccessIssue]  # its name before JAX 0.9


def vary_floats(tree: Any, axes: Axes) -> Any:
    """`tree`, its floating-point leaves typed to vary over `axes` as well."""

    def floats(leaf: Array) -> Array:
        return vary(leaf, axes) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(floats, tree) if axes else tree


def scan(step: Callable, carry: Any, xs: Any, length: int | None = None) -> tuple[Any, Any]:
    if not _may_vary():
        return lax.scan(step, carry, xs, length)

    def once(carry: Any) -> Any:
        return step(carry, jax.tree.map(lambda leaf: leaf[0], xs))[0]

    carry = _as_it_comes_back(once, carry)
    types = jax.tree.map(varying, carry)

    def typed_step(carry: Any, x: Any) -> tuple[Any, Any]:
        carry, y = step(carry, x)
        return jax.tree.map(vary, carry, types), y

    return lax.scan(typed_step, carry, xs, length)


def while_loop(goes_on: Callable, step: Callable, carry: Any) -> Any:
    if not _may_vary():
        return lax.while_loop(goes_on, step, carry)

    def typed_step(carry: Any) -> Any:
        # What ends at different times on different devices varies over them.
        axes = varying(goes_on(carry))
        return jax.tree.map(lambda leaf, before: vary(leaf, axes | varying(before)), step(carry), carry)

    return lax.while_loop(goes_on, typed_step, _as_it_comes_back(typed_step, carry))


def fori_loop(start: Any, stop: Any, step: Callable, carry: Any) -> Any:
    if not _may_vary():
        return lax.fori_loop(start, stop, step, carry)
    ends = axes_of(*(end for end in (start, stop) if isinstance(end, Array)))

    def typed_step(i: Any, carry: Any) -> Any:
        return jax.tree.map(lambda leaf, before: vary(leaf, ends | varying(before)), step(i, carry), carry)

    carry = _as_it_comes_back(functools.partial(typed_step, start), carry)
    return lax.fori_loop(start, stop, typed_step, carry)


def cond(predicate: ArrayLike, if_true: Callable, if_false: Callable, *operands: Any) -> Any:
    if not _may_vary():
        return lax.cond(predicate, if_true, if_false, *operands)
    return lax.cond(predicate, *_of_one_type((if_true, if_false), predicate, operands), *operands)


def switch(index: Array, branches: Sequence[Callable], *operands: Any) -> Any:
    if not _may_vary():
        return lax.switch(index, branches, *operands)
    return lax.switch(index, _of_one_type(branches, index, operands), *operands)


def searchsorted(ordered: Array, values: Array, **options: Any) -> Array:
    """Before JAX 0.8, the two have to vary over the same axes."""
    axes = axes_of(ordered, values)
    return jnp.searchsorted(vary(ordered, axes), vary(values, axes), **options)


def defvjp(rule: Any, forward: Callable, backward: Callable) -> None:
    """`rule.defvjp(forward, backward)` for a rule whose first argument is static.

    The cotangent of what is the same on devices is the sum of theirs, as where JAX differentiates by itself.
    """

    def typed_forward(static: Any, *operands: Any) -> tuple[Any, tuple[Any, _Types]]:
        results, residuals = forward(static, *operands)
        leaves, tree = jax.tree.flatten(operands)
        return results, (residuals, _Types(tuple(map(varying, leaves)), tree))

    def typed_backward(static: Any, kept: tuple[Any, _Types], bar: Any) -> Any:
        residuals, types = kept
        bars = backward(static, residuals, bar)
        # None stands for no cotangent of all that is in its place.
        return jax.tree.map(_summed, bars, types.tree.unflatten(types.axes), is_leaf=lambda leaf: leaf is None)

    rule.defvjp(typed_forward, typed_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Types:
    """The axes over which each leaf of a tree varies."""

    axes: tuple[Axes, ...]
    tree: Any


def _summed(bar: Array | None, axes: Any) -> Array | None:
    """A cotangent of what varies over `axes`."""
    if bar is None:
        return None
    extra = tuple(sorted(varying(bar) - axes))
    return vary(lax.psum(bar, extra) if extra else bar, axes)


def _may_vary() -> bool:
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _of_one_type(branches: Sequence[Callable], chosen_by: Any, operands: tuple) -> list[Callable]:
    """Branches of which each gives what varies as that of any does, and the choice between them."""
    types = (_types_of(branch, *operands) for branch in branches)
    types = jax.tree.map(lambda *each: varying(chosen_by).union(*each), *types)

    def typed(branch: Callable) -> Callable:
        return lambda *operands: jax.tree.map(vary, branch(*operands), types)

    return [typed(branch) for branch in branches]


def _types_of(function: Callable, *operands: Any) -> Any:
    """The axes over which each result of a function varies, in a tree like the results."""
    found = []

    def record(*operands: Any) -> None:
        found.append(jax.tree.map(varying, function(*operands)))

    jax.eval_shape(record, *operands)
    return found[-1]


def _as_it_comes_back(step: Callable, carry: Any) -> Any:
    """`carry`, typed to vary as `step(carry)` does."""
    while True:
        before = jax.tree.map(varying, carry)
        carry = jax.tree.map(vary, carry, _types_of(step, carry))
        if jax.tree.map(varying, carry) == before:
            return carry
