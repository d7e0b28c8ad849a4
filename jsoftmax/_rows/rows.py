"""A batch of rows as the engines take it: logits, labels and everything that acts on them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Integer

from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.labels import is_class, label_index, take, take_class
from jsoftmax._rows.logits import Transform, transform_logits
from jsoftmax._rows.primitives import select
from jsoftmax._rows.shards import UNSPLIT, ClassShards


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["logits", "labels", "transform", "class_weights", "active"],
    meta_fields=["shards"],
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of logits (*batch, classes) and their labels: (*batch,) integers, or (*batch, classes) floats.

    With the classes split over a mesh, all but integer labels and `active` is what this shard has of it.
    """

    # Any: JAX puts its own objects in the leaves' places when it handles trees.
    logits: Any
    labels: Any = None
    transform: Any = dataclasses.field(default_factory=Transform)
    class_weights: Any = None  # (classes,); they enter mean_log_prob
    active: Any = None  # (*batch,): rows that take part; the others' gradients are exactly 0
    shards: ClassShards = UNSPLIT

    @property
    def integer_labels(self) -> Any:
        return self.labels if self.labels is not None and jnp.issubdtype(self.labels.dtype, jnp.integer) else None

    @property
    def dense_labels(self) -> Any:
        return None if self.integer_labels is not None else self.labels

    @property
    def classes(self) -> int:
        """How many there are, on all shards together."""
        return self.shards.count(self.logits.shape[-1])

    @property
    def local_labels(self) -> Any:
        """Integer labels as classes of this shard; those of other shards are none of its classes."""
        if self.integer_labels is None or not self.shards.names:
            return self.integer_labels
        known = select(self.is_class(self.labels), self.labels, -1).astype(jnp.int32)
        return select(known < 0, -1, known - self.shards.first(self.logits.shape[-1]))

    @property
    def dtype(self) -> jnp.dtype:
        """In which the rows are computed."""
        return compute_dtype(self.logits.dtype)

    @property
    def has_exact_differences(self) -> bool:
        """Whether z has 16 bits: differences are exact, unless one z is 2^13 times the other, and gradients rounded."""
        return self.logits.dtype.itemsize == 2 and self.transform.unmasked.is_identity

    def z(self) -> Float[Array, "*batch classes"]:
        """The logits that enter softmax."""
        if not self.transform.moves_label:
            return transform_logits(self.logits, self.transform, self.shards)
        classes = lax.broadcasted_iota(jnp.int32, self.logits.shape, self.logits.ndim - 1)
        return transform_logits(self.logits, self.transform, self.shards, self._is_label(classes))

    def empty(self) -> Array | None:
        """Rows whose classes are all masked by `where`; None without a mask."""
        where = self._where()
        return None if where is None else ~self.shards.any(jnp.any(where, axis=-1))

    def at(self, classes: Integer[Array, "*batch some"]) -> Float[Array, "*batch some"]:
        """z of some classes of each row, (*batch, any number), without computing the others."""
        if self.transform.may_freeze:
            return take(self.z(), classes)

        def there(array: Array | None) -> Array | None:
            return None if array is None else take(jnp.broadcast_to(array, self.logits.shape), classes)

        where, adjustment = there(self.transform.where), there(self.transform.adjustment)
        transform = dataclasses.replace(self.transform, where=where, adjustment=adjustment)
        return transform_logits(take(self.logits, classes), transform, self.shards, self._is_label(classes))

    def maximum(self) -> Float[Array, "*batch"]:
        """The largest z of each row, of this shard's."""
        # In their own dtype, logits are read at half the cost.
        return jnp.max(self.logits if self.transform.is_identity else self.z(), axis=-1).astype(self.dtype)

    def label_z(self) -> Float[Array, "*batch"]:
        """z at the integer labels, (*batch,); NaN where the label is no class."""
        here, z = self.local_labels, self.at(label_index(self.local_labels, self.logits.shape[-1]))[..., 0]
        if self.shards.names:
            z = self.shards.sum(select(is_class(here, self.logits.shape[-1]), z, 0))
        return select(self.is_class(self.labels), z, jnp.nan)

    def label_weight(self) -> Float[Array, "*batch"]:
        """The class weights of the integer labels."""
        here = self.local_labels
        weight = take_class(self.class_weights, here)
        if self.shards.names:
            weight = self.shards.sum(select(is_class(here, self.logits.shape[-1]), weight, 0))
        return weight

    def is_class(self, labels: Integer[Array, "*batch"]) -> Bool[Array, "*batch"]:
        return is_class(labels, self.classes)

    def class_count(self, z: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
        """The number of classes that take part, at least 1. A logit of −∞ is a mask as `where` is."""
        return jnp.maximum(self.shards.sum(jnp.sum(z > -jnp.inf, axis=-1, dtype=z.dtype)), 1)

    def mean_weights(
        self, z: Float[Array, "*batch classes"]
    ) -> tuple[Float[Array, "*batch classes"], Float[Array, "*batch"]]:
        """w_j / K with K the number of classes that take part, 0 for a masked class; and the sum of that."""
        allowed = z > -jnp.inf
        count = self.class_count(z)
        if self.class_weights is None:
            return select(allowed, 1 / count[..., None], 0), jnp.ones_like(count)
        share = select(allowed, jnp.broadcast_to(self.class_weights, z.shape), 0) / count[..., None]
        return share, self.shards.sum(jnp.sum(share, axis=-1))

    def _is_label(self, classes: Integer[Array, "*batch some"]) -> Bool[Array, "*batch some"] | None:
        """Where the labels are among this shard's `classes`, if it matters."""
        if not self.transform.moves_label:
            return None
        labels = self.local_labels
        return classes.astype(jnp.int32) == select(self.is_class(labels), labels, -1).astype(jnp.int32)[..., None]

    def _where(self) -> Array | None:
        where = self.transform.where
        return None if where is None else jnp.broadcast_to(where, self.logits.shape)


def largest(z: Float[Array, "*batch classes"]) -> Float[Array, "*batch"]:
    """The maximum of each row, NaN if it holds one: XLA's library for CPUs gives that of what stands behind it."""
    return select(jnp.any(jnp.isnan(z), axis=-1), jnp.nan, jnp.max(z, axis=-1))


def is_infinite(numbers: Array) -> Array:
    """In primitives, as `exponentials` is."""
    return lax.eq(lax.abs(numbers), numbers.dtype.type(jnp.inf))


def defined(maximum: Array, empty: Array | None) -> Array:
    """A row that holds +∞, or nothing but −∞, has no distribution; a row of masked classes has an empty one."""
    defined = select(is_infinite(maximum), jnp.nan, maximum)
    return defined if empty is None else select(empty, 0, defined)
