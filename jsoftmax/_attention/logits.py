"""The logits of attention for any block of queries and keys, and which pairs of them take part.

    z = (cap · tanh(scale · query·key / cap) + bias) / temperature        −∞ where a pair is masked

Inside, heads are two axes: (batch, groups, heads, length, width) with as many groups as key has heads. Bias and mask
have these five axes too, each of its own size or of size 1.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.logits import Transform, transform_logits

LENGTHS = (3, 4)  # the axes of queries and keys, where bias and mask are cut into blocks


class Span(NamedTuple):
    """Some positions in a row. Those before `fresh` belong to the span before; None means that there are none."""

    start: Any
    size: int
    fresh: Any = None

    def positions(self, axis: int) -> Array:
        shape = [1] * 5
        shape[axis] = self.size
        return (self.start + jnp.arange(self.size)).reshape(shape)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "query_lengths", "key_lengths"],
    meta_fields=["left", "right"],
)
@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which query sees which key. None means that nothing is masked in this way."""

    # Any: JAX puts its own objects in the leaves' places when it handles trees.
    mask: Any = None  # five axes
    query_lengths: Any = None  # (batch,)
    key_lengths: Any = None  # (batch,)
    left: int | None = None  # a query at t sees keys from t − left
    right: int | None = None  # to t + right

    def seen(self, queries: Span, keys: Span) -> Array | None:
        """True for the pairs that take part, broadcasting to a block of logits; None if all do."""
        t, s = queries.positions(LENGTHS[0]), keys.positions(LENGTHS[1])
        tests = [] if self.mask is None else [block_of(self.mask, queries, keys)]
        tests += [] if self.left is None else [s >= t - self.left]
        tests += [] if self.right is None else [s <= t + self.right]
        tests += [] if self.query_lengths is None else [t < self.query_lengths.reshape(-1, 1, 1, 1, 1)]
        tests += [] if self.key_lengths is None else [s < self.key_lengths.reshape(-1, 1, 1, 1, 1)]
        tests += [] if queries.fresh is None else [t >= queries.fresh]
        tests += [] if keys.fresh is None else [s >= keys.fresh]
        return functools.reduce(jnp.logical_and, tests) if tests else None

    def reaches(self, queries: Span, keys: Span) -> Array | bool:
        """Whether any query of a block may see any of its keys, as far as left and right tell."""
        reached = True
        if self.left is not None:
            reached &= keys.start + keys.size - 1 >= queries.start - self.left
        if self.right is not None:
            reached &= keys.start <= queries.start + queries.size - 1 + self.right
        return reached


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
    """What acts on every logit alike: scalars, None if unused."""

    scale: Any
    softcap: Any
    temperature: Any


def block_of(array: Array, queries: Span, keys: Span) -> Array:
    """The part of a bias or mask that belongs to a block of logits."""
    for axis, span in zip(LENGTHS, (queries, keys), strict=True):
        if array.shape[axis] != 1:
            array = lax.dynamic_slice_in_dim(array, span.start, span.size, axis)
    return array


def logits_of(products: Array, bias: Array | None, numbers: Numbers, seen: Array | None) -> Array:
    """The logits that enter softmax, from the products of queries and keys."""
    z = transform_logits(products * numbers.scale, Transform(softcap=numbers.softcap))
    if bias is not None:
        z = z + bias
    return transform_logits(z, Transform(where=seen, temperature=numbers.temperature))


def seen_with(bias: Array | None, seen: Array | None) -> Array | None:
    """A bias of −∞ is a mask as well."""
    if bias is None:
        return seen
    unmasked = ~jnp.isneginf(bias)
    return unmasked if seen is None else seen & unmasked


def unread(query: Array, key: Array, value: Array, seen: Array | None) -> tuple[Array, Array, Array]:
    """0 in place of every query that sees no key, and of every key and value that no query sees.

    What they hold, NaN perhaps, must not reach a product as 0 · NaN.
    """
    if seen is None:
        return query, key, value
    sees = jnp.any(seen, axis=4)[..., None]
    is_seen = jnp.any(seen, axis=(2, 3))[..., None]
    return jnp.where(sees, query, 0), jnp.where(is_seen, key, 0), jnp.where(is_seen, value, 0)


# Before, XLA for CPUs compiles `compare` of bfloat16 with two axes of batches, and refuses to run it.
HAS_BATCHES_OF_BFLOAT16 = jax.__version_info__ >= (0, 8, 3)

# The three kinds of products. Operands share a dtype; results are float32 at least.


def compare(query: Array, key: Array) -> Array:
    """Every query with every key: (b, k, g, t, h) and (b, k, s, h) to (b, k, g, t, s)."""
    if not HAS_BATCHES_OF_BFLOAT16:
        b, k, g, t, h = query.shape
        return _product("bkuh,bksh->bkus", query.reshape(b, k, g * t, h), key).reshape(b, k, g, t, key.shape[2])
    return _product("bkgth,bksh->bkgts", query, key)


def combine(weights: Array, value: Array) -> Array:
    """Values weighted for every query: (b, k, g, t, s) and (b, k, s, h) to (b, k, g, t, h)."""
    return _product("bkgts,bksh->bkgth", weights.astype(value.dtype), value)


def distribute(weights: Array, query: Array) -> Array:
    """What every key gets from the queries: (b, k, g, t, s) and (b, k, g, t, h) to (b, k, s, h)."""
    return _product("bkgts,bkgth->bksh", weights.astype(query.dtype), query)


def _product(axes: str, left: Array, right: Array) -> Array:
    return jnp.einsum(axes, left, right, preferred_element_type=compute_dtype(right.dtype))
