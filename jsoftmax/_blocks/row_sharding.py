"""Rows that are split over devices by XLA, in a program where it is known how.

Left to XLA alone, a loop over blocks would sum the gradient of the parameters over devices in each of them. Here each
device has its own loop over its own rows, and what is common to them is gathered before it and summed after it, once.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jsoftmax._blocks.split import Tree


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """How the axes of a batch are split: one entry of `spec` for each of them, on `mesh` or the context's."""

    batch: tuple[int, ...]
    spec: PartitionSpec
    mesh: Any  # None for the context's

    def run(self, on_device: Callable[..., Tree], params: Tree, rows: tuple[Tree, ...], results: Tree) -> Tree:
        """`on_device(params, *rows)` of each device's rows; what has no axis among the `results` is summed."""
        names = self.names

        def local(params: Tree, rows: Tree) -> Tree:
            shape = next(leaf.shape for leaf in jax.tree.leaves(rows) if leaf.ndim)[: len(self.batch)]
            flat = jax.tree.map(lambda leaf: _reshaped(leaf, len(self.batch), (-1,)), rows)
            found = on_device(params, *flat)
            return jax.tree.map(lambda r: _reshaped(r, 1, shape) if r.ndim else lax.psum(r, names), found)

        split = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), self._specs(rows)),
            out_specs=self._specs(results),
            axis_names=set(names),
        )
        found = split(params, jax.tree.map(lambda leaf: _reshaped(leaf, 1, self.batch), rows))
        return jax.tree.map(lambda leaf: _reshaped(leaf, len(self.batch), (-1,)), found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for part in self.spec for name in _names(part))

    def _specs(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: self.spec if leaf.ndim else PartitionSpec(), tree)


def checked_row_sharding(value: Sharding | PartitionSpec | None, batch: tuple[int, ...]) -> RowSharding | None:
    """Entries beyond the axes of the batch do not count, so that the sharding of features will do."""
    if value is None or isinstance(value, SingleDeviceSharding):
        return None
    if not isinstance(value, NamedSharding | PartitionSpec):
        raise TypeError(f"row_sharding needs a NamedSharding or a PartitionSpec, got {type(value).__name__}")
    context = jax.sharding.get_abstract_mesh()
    spec, mesh = (value, None) if isinstance(value, PartitionSpec) else (value.spec, value.mesh)
    mesh = mesh if context.empty else None
    known = (context if mesh is None else mesh).shape
    spec = PartitionSpec(*spec[: len(batch)])
    sharding = RowSharding(batch, spec, mesh)
    for name in sharding.names:
        if name not in known:
            raise ValueError(
                f"row_sharding has the mesh axis {name!r}, but the mesh has {tuple(known)}; "
                "give a NamedSharding, or call within jax.set_mesh"
            )
    for size, part in zip(batch, spec, strict=False):
        devices = math.prod(known[name] for name in _names(part))
        if size % devices:
            raise ValueError(f"row_sharding splits {size} rows over {devices} devices, but needs a multiple of them")
    return sharding if sharding.names else None


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else part


def _reshaped(leaf: Array, axes: int, shape: tuple[int, ...]) -> Array:
    """The first axes of an array in another shape, -1 for one of as many entries."""
    if not leaf.ndim:
        return leaf
    shape = (math.prod(leaf.shape[:axes]),) if shape == (-1,) else shape
    return leaf.reshape(*shape, *leaf.shape[axes:])
