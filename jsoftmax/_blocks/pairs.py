"""Queries and the items that belong to them, as a head: items are the kernel, a query's label is its item's number."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool

from jsoftmax._blocks.head import Block, Head, checked_head
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.shards import AxisName, class_shards
from jsoftmax._rows.varying import searchsorted
from jsoftmax._rows.weights import parts


@dataclasses.dataclass(frozen=True)
class Pairs:
    """This device's part of a batch."""

    queries: Array  # (batch, features)
    items: Array  # (items, features), the queries' own first
    ids: Array | None  # (items,)
    weights: Array | None  # (batch,); a pair of weight 0 takes no part
    names: tuple[str, ...]  # the mesh axes over which the batch is split
    to_itself: bool  # whether queries and items are the same vectors, none of which is compared with itself

    def head(
        self,
        options: Mapping[str, Any],
        names: type,
        reduction: str,
        precision: lax.PrecisionLike,
        backwards: bool = False,
    ) -> Head:
        """Of each query and all items, or backwards; their numbers are those of all devices' items together."""
        batch = len(self.queries)
        rows, others = (self.items[:batch], self.queries) if backwards else (self.queries, self.items)
        count, active = len(others), self.weights
        if active is not None:
            active = active != 0
        where = None if active is None else self.gather(jnp.pad(active, (0, count - batch), constant_values=True))
        own = jnp.arange(batch, dtype=jnp.int32)
        if self.names:
            own += lax.axis_index(self.names) * count
        head = checked_head(rows, self.gather(others), own, None, where, True, options, names, precision)
        if self.ids is not None:
            head.rows["ids"], head.params["ids"] = self.ids[:batch], self.gather(self.ids[:count])
            if self.to_itself:
                has_others = _count(head.rows["ids"], head.params["ids"], where) > 1
                active = has_others if active is None else active & has_others
        head.rows.update(active=active, weights=self._factors(active, reduction))
        return head

    def _factors(self, active: Array | None, reduction: str) -> Array | None:
        """Of each row in the result; None for 1."""
        if reduction != "mean":
            return self.weights
        dtype = compute_dtype(self.queries.dtype)
        weights = jnp.ones(len(self.queries), dtype) if self.weights is None else self.weights
        weights = weights if active is None else jnp.where(active, weights, 0)
        return parts(weights, self.sum(jnp.sum(weights)))

    def gather(self, array: Array) -> Array:
        """Of all devices, one after the other. Its transpose sums gradients where their items are."""
        return lax.all_gather(array, self.names, tiled=True) if self.names else array

    def sum(self, number: Array) -> Array:
        return lax.psum(number, self.names) if self.names else number


def checked_pairs(
    queries: ArrayLike,
    items: ArrayLike | None,
    ids_name: str,
    ids: ArrayLike | None,
    weights: ArrayLike | None,
    axis_name: AxisName,
) -> Pairs:
    """Of which callers know the ids by that name."""
    queries, others = checked_vectors(queries, queries if items is None else items)
    if ids is not None:
        ids = checks.integer_array(ids_name, ids)
        checks.has_shape(ids_name, ids, others.shape[:1], "one integer for each item")
    if weights is not None:
        weights = checks.float_array("weights", weights).astype(compute_dtype(queries.dtype))
        checks.has_shape("weights", weights, queries.shape[:1], "one factor for each pair")
    return Pairs(queries, others, ids, weights, class_shards(axis_name).names, items is None)


def checked_vectors(queries: ArrayLike, items: ArrayLike) -> tuple[Array, Array]:
    queries, items = checks.float_array("queries", queries), checks.float_array("items", items)
    if queries.ndim != 2 or items.ndim != 2 or queries.shape[1] != items.shape[1] or len(items) < len(queries):
        raise ValueError(
            f"queries has shape {queries.shape} and items {items.shape}, but need (batch, features) and at least as "
            "many items of as many features"
        )
    return queries, items


def _count(ids: Array, others: Array, where: Array | None) -> Array:
    """How many of the others have each id."""
    order = jnp.argsort(others)
    counted = jnp.ones(others.shape, jnp.int32) if where is None else where[order].astype(jnp.int32)
    totals = jnp.pad(jnp.cumsum(counted), (1, 0))
    first, end = (searchsorted(others[order], ids, side=side) for side in ("left", "right"))
    return totals[end] - totals[first]


@dataclasses.dataclass(frozen=True)
class PairBlock(Block):
    """A block of queries and all items; which of them are compared, and which belong together."""

    alike: bool  # whether every item of a row's id belongs to it, or its own alone
    to_itself: bool

    def targets(self, params: dict, rows: dict, shape: tuple[int, ...]) -> tuple[dict, Array | None]:
        positive, where = compared(params, rows, shape, self.alike, self.to_itself)
        if not self.alike:
            return rows, where
        dtype = compute_dtype(rows["features"].dtype)
        count = jnp.maximum(jnp.sum(positive, axis=1, keepdims=True, dtype=dtype), 1)
        return {**rows, "labels": jnp.where(positive, 1 / count, 0)}, where


def compared(
    params: dict, rows: dict, shape: tuple[int, ...], alike: bool, to_itself: bool
) -> tuple[Bool[Array, "rows items"], Bool[Array, "rows items"] | None]:
    """Which items belong to each row, and which take part in it; None for all of them."""
    own = lax.broadcasted_iota(jnp.int32, shape, 1) == rows["labels"][:, None]
    positive, where = own, None
    if "ids" in params:
        same = rows["ids"][:, None] == params["ids"][None]
        # An equal item is a positive, or no negative.
        positive, where = (same, ~own if to_itself else None) if alike else (own, own | ~same)
    if params["where"] is not None:
        active = jnp.broadcast_to(params["where"], shape)
        where = active if where is None else where & active
    return positive if where is None else positive & where, where
