"""A class axis that is split over axes of a mesh, inside `shard_map`.

Each device holds the same rows and its own stretch of their classes. What is summed over classes is then summed over
devices too, a few numbers a row, and is the same on all of them.

Under `check_vma=True`, JAX types every array by the mesh axes over which it varies, and sums the cotangents of what is
the same everywhere by itself. Under `check_vma=False` it does neither: the cotangent of a replicated result comes in
parts, one on each device, whose sum is meant. The library's rules ask for that sum (`total`), and give their own
cotangents in parts.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._rows.varying import varying

AxisName = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ClassShards:
    """The mesh axes over which classes are split; without any, every method is the identity."""

    names: tuple[str, ...] = ()

    def sum(self, numbers: Any) -> Any:
        return lax.psum(numbers, self.names) if self.names else numbers

    def max(self, numbers: Array) -> Array:
        return lax.pmax(numbers, self.names) if self.names else numbers

    def min(self, numbers: Array) -> Array:
        return lax.pmin(numbers, self.names) if self.names else numbers

    def any(self, flags: Array) -> Array:
        return self.max(flags.astype(jnp.int32)) > 0 if self.names else flags

    def count(self, here: int) -> int:
        """The number of classes, of which each shard holds `here`."""
        return here * lax.axis_size(self.names) if self.names else here

    def first(self, here: int) -> Array | int:
        """The number of this shard's first class."""
        return lax.axis_index(self.names) * here if self.names else 0

    def total(self, cotangents: Any) -> Any:
        """The cotangents of what is the same on all shards, whole on each."""
        return cotangents if not self.names or self.are_typed else self.sum(cotangents)

    def mean(self, cotangent: Array) -> Array:
        """The mean over shards of the cotangent of what is the same on all of them."""
        return cotangent if not self.names or self.are_typed else lax.pmean(cotangent, self.names)

    @property
    def are_typed(self) -> bool:
        """Whether JAX knows what varies over the shards: not under `check_vma=False`."""
        return bool(varying(lax.axis_index(self.names)))


UNSPLIT = ClassShards()


def class_shards(axis_name: AxisName) -> ClassShards:
    if axis_name is None:
        return UNSPLIT
    return ClassShards((axis_name,) if isinstance(axis_name, str) else tuple(axis_name))


def devices_of_mesh() -> int:
    """Among how many devices XLA splits arrays, as far as `jax.set_mesh` tells; 1 inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    return math.prod(size for name, size in mesh.shape.items() if name not in manual)
