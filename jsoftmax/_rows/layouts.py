"""Arrays whose types say how they are split, on a mesh with axes of type Explicit.

There, each operation has to know how its result is split, and few in the library could say so better than XLA. So a
public function runs with those axes of type Auto, where XLA decides, and its results are split by one rule. The mesh is
that of the context or, without one, of the arguments.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, reshard, use_abstract_mesh

from jsoftmax._rows.axes import Axis, normalize_axes

Arguments = ParamSpec("Arguments")
Results = TypeVar("Results")


def in_any_layout(rows: str) -> Callable[[Callable[Arguments, Results]], Callable[Arguments, Results]]:
    """For public functions: let XLA decide within, and split the results as the argument called `rows` is.

    A result of its shape is split as it is. Of another, the dimensions that the two have in common, at the front or if
    there are none at the end, are split as they are there, and the rest is not. The argument `axis`, if the function
    has it, names dimensions that do not count; the argument `row_sharding` is told how the rows are split.
    """

    def decorate(function: Callable[Arguments, Results]) -> Callable[Arguments, Results]:
        signature = inspect.signature(function)
        takes_row_sharding = "row_sharding" in signature.parameters

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Results:
            leaves, tree = jax.tree.flatten((args, kwargs))
            mesh = _explicit_mesh(leaves)
            if mesh is None:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            main = jax.tree.leaves(given[rows])[0]
            axis = given.get("axis", -1 if "axis" in signature.parameters else ())
            with use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
                args, kwargs = tree.unflatten(
                    [reshard(leaf, PartitionSpec()) if _is_typed(leaf) else leaf for leaf in leaves]
                )
                if takes_row_sharding and _is_typed(main):
                    kwargs["row_sharding"] = given.get("row_sharding") or jax.typeof(main).sharding.spec
                results = function(*args, **kwargs)
            with use_abstract_mesh(mesh):
                return jax.tree.map(lambda result: reshard(result, _split(result.shape, main, axis)), results)

        return call

    return decorate


def _is_typed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(jax.typeof(leaf).sharding.mesh.explicit_axes)


def _explicit_mesh(leaves: list) -> AbstractMesh | None:
    context = jax.sharding.get_abstract_mesh()
    if context.explicit_axes:
        return context
    return next((jax.typeof(leaf).sharding.mesh for leaf in leaves if _is_typed(leaf)), None)


def _split(shape: tuple[int, ...], main: Any, axis: Axis) -> PartitionSpec:
    if not _is_typed(main):
        return PartitionSpec()
    parts = (*jax.typeof(main).sharding.spec, *[None] * main.ndim)[: main.ndim]
    if shape == main.shape:
        return PartitionSpec(*parts)
    classes = normalize_axes(axis, main.ndim)
    sizes = tuple(size for number, size in enumerate(main.shape) if number not in classes)
    parts = tuple(part for number, part in enumerate(parts) if number not in classes)
    front = _in_common(shape, sizes)
    if front:
        return PartitionSpec(*parts[:front])
    end = _in_common(shape[::-1], sizes[::-1])
    return PartitionSpec(*[None] * (len(shape) - end), *parts[len(parts) - end :])


def _in_common(shape: tuple[int, ...], other: tuple[int, ...]) -> int:
    """With how many equal sizes two shapes begin."""
    pairs = zip(shape, other, strict=False)
    return next((number for number, (one, two) in enumerate(pairs) if one != two), min(len(shape), len(other)))
