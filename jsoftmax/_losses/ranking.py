"""Where a row's label stands among its classes, and the scores of a ranking that follow from that alone.

A rank is 1 + the number of classes whose logit is above the label's, and some share of those that tie with it. It is a
count: nothing is sorted, and what is counted apart (shards, excluded classes) adds up.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer

from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.labels import is_class
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import checked_rows
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.shards import AxisName

TIES = {"optimistic": 0.0, "realistic": 0.5, "pessimistic": 1.0}  # the share of the tied classes that is counted


@in_any_layout("logits")
def ranks(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    exclude: ArrayLike | None = None,
    ties: str = "realistic",
    axis_name: AxisName = None,
) -> Array:
    r"""The rank of each row's label among the classes, 1 for the largest logit.

    .. math:: \mathrm{rank} = 1 + \#\{j : z_j > z_y\} + t \cdot \#\{j \ne y : z_j = z_y\}

    Args:
        logits: float array; `axis` holds the classes.
        labels: integers of the batch's shape.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax_cross_entropy`. Others are not counted; a label that is one of
            them stands where a logit of −∞ does.
        exclude: integers `(*batch, k)`, classes that are not counted in their row, such as other right answers: the
            *filtered* rank. −1 is no class; the label may be among them, and a class several times.
        ties: what classes count whose logit is the label's. "optimistic": nothing (t = 0); "pessimistic": all of them
            (t = 1); "realistic": half (t = 1/2), the mean over all orders of them. Optimistic ranks reward a model that
            gives all classes the same logit.
        axis_name: inside `shard_map`, the mesh axis (or axes) over which the classes are split, as in `LogitOptions`.

    Returns:
        float32 of the batch's shape, exact below 2²³ classes. −∞ is a logit as any other, the least. A row that holds
        NaN, or whose label is no class, has NaN.

    Raises:
        TypeError: logits are not floating-point, labels or exclude not integers.
        ValueError: a shape that does not fit, no class, or another word for `ties`.

    Derivatives: none, a rank is a step function. Memory: O(rows) beside the logits.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import ranking
        >>> logits = jnp.array([[3.0, 2.0, 1.0, 1.0], [3.0, 2.0, 1.0, 1.0]])
        >>> print(ranking.ranks(logits, jnp.array([0, 2])))
        [1.  3.5]
        >>> print(ranking.ranks(logits, jnp.array([0, 2]), exclude=jnp.array([[1, -1], [0, 3]])))
        [1. 2.]

    References:
        Berrendorf et al., *On the Ambiguity of Rank-Based Evaluation of Entity Alignment or Link Prediction Methods*,
        2020 (ties); Bordes et al., *Translating Embeddings for Modeling Multi-relational Data*, 2013 (filtered ranks).
    """
    checks.one_of("ties", ties, tuple(TIES))
    rows = checked_rows(logits, checks.integer_array("labels", labels), axis, where, {"axis_name": axis_name})
    if rows.logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {jnp.shape(logits)} and so no class along axis {axis}; a rank needs one")
    return _ranks(rows, checked_exclude(exclude, rows.labels.shape), ties)


def checked_exclude(exclude: ArrayLike | None, batch: tuple[int, ...]) -> Array | None:
    if exclude is None:
        return None
    exclude = checks.integer_array("exclude", exclude)
    if exclude.ndim != len(batch) + 1 or exclude.shape[:-1] != batch:
        shape = (*batch, "k")
        raise ValueError(f"exclude has shape {exclude.shape}, but needs {shape}: classes not to count in each row")
    return exclude


@functools.partial(jax.jit, static_argnames="ties")
def _ranks(rows: Rows, exclude: Array | None, ties: str) -> Float[Array, "*batch"]:
    return row_ranks(lax.stop_gradient(rows), exclude, ties)


def row_ranks(rows: Rows, exclude: Integer[Array, "*batch k"] | None, ties: str) -> Float[Array, "*batch"]:
    z, own = rows.z(), rows.label_z()[..., None]
    classes = lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    counted = classes != rows.local_labels.astype(jnp.int32)[..., None]
    if rows.transform.where is not None:
        counted &= rows.transform.where
    above, tied, bad = _counts(counted & (z > own), counted & (z == own), jnp.isnan(z))
    if exclude is not None:
        at, found = _excluded(rows, exclude)
        found &= jnp.take_along_axis(counted, at, axis=-1)
        z_there = jnp.take_along_axis(z, at, axis=-1)
        above -= jnp.sum(found & (z_there > own), axis=-1, dtype=jnp.int32)
        tied -= jnp.sum(found & (z_there == own), axis=-1, dtype=jnp.int32)
    above, tied, bad = rows.shards.sum((above, tied, bad))
    undefined = (bad > 0) | jnp.isnan(own[..., 0])
    return jnp.where(undefined, jnp.nan, 1 + above.astype(jnp.float32) + TIES[ties] * tied.astype(jnp.float32))


def _counts(*flags: Bool[Array, "*batch classes"]) -> tuple[Integer[Array, "*batch"], ...]:
    """How many of each are set in a row, in one reduction: several sums would each be written out on CPUs."""
    ones = tuple(flag.astype(jnp.int32) for flag in flags)
    zeros = (jnp.int32(0),) * len(ones)
    return lax.reduce(ones, zeros, lambda one, other: tuple(map(lax.add, one, other)), (ones[0].ndim - 1,))


def _excluded(rows: Rows, exclude: Array) -> tuple[Integer[Array, "*batch k"], Bool[Array, "*batch k"]]:
    """Indices of this shard's classes, and which of them to look at: each class once."""
    classes = jnp.sort(jnp.where(rows.is_class(exclude), exclude, -1).astype(jnp.int32), axis=-1)
    again = jnp.pad(classes[..., 1:] == classes[..., :-1], [(0, 0)] * (classes.ndim - 1) + [(1, 0)])
    at = classes - rows.shards.first(rows.logits.shape[-1])
    found = ~again & (classes >= 0) & is_class(at, rows.logits.shape[-1])
    return jnp.where(found, at, 0), found


@in_any_layout("ranks")
def hits(ranks: ArrayLike, k: int) -> Array:
    r"""1 where the label is among the first k, else 0: hits@k, and recall@k where one class is right.

    .. math:: \mathrm{hit} = [\mathrm{rank} \le k]

    Args:
        ranks: float array, of `ranks` or `linear_ranks`.
        k: how many classes are shown, at least 1.

    Returns:
        float32 of the shape of `ranks`; take the mean over rows. NaN stays NaN.

    Raises:
        TypeError: ranks are not floating-point.
        ValueError: k below 1.

    Derivatives: none. Memory: the result.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import ranking
        >>> print(ranking.hits(jnp.array([1.0, 3.5, 12.0]), 10))
        [1. 1. 0.]
    """
    return _within(_checked_ranks(ranks), k, 1.0)


@in_any_layout("ranks")
def reciprocal_rank(ranks: ArrayLike, k: int | None = None) -> Array:
    r"""1 / rank, whose mean over rows is the MRR.

    .. math:: \mathrm{RR} = 1 / \mathrm{rank} \text{ if } \mathrm{rank} \le k, \text{ else } 0

    Args:
        ranks: float array, of `ranks` or `linear_ranks`.
        k: how many classes are shown, as in MRR@10; None for all.

    Returns:
        float32 of the shape of `ranks`. NaN stays NaN.

    Raises:
        TypeError: ranks are not floating-point.
        ValueError: k below 1.

    Derivatives: none. Memory: the result.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import ranking
        >>> print(ranking.reciprocal_rank(jnp.array([1.0, 4.0, 12.0]), k=10))
        [1.   0.25 0.  ]

    References:
        Voorhees, *The TREC-8 Question Answering Track Report*, 1999.
    """
    ranks = _checked_ranks(ranks)
    return _within(ranks, k, 1 / ranks)


@in_any_layout("ranks")
def ndcg(ranks: ArrayLike, k: int | None = None) -> Array:
    r"""Normalized discounted cumulative gain where one class of each row is right.

    .. math:: \mathrm{NDCG@}k = 1 / \log_2 (1 + \mathrm{rank}) \text{ if } \mathrm{rank} \le k, \text{ else } 0

    The best ranking has a gain of 1, so that nothing is left to normalize.

    Args:
        ranks: float array, of `ranks` or `linear_ranks`.
        k: how many classes are shown; None for all.

    Returns:
        float32 of the shape of `ranks`; take the mean over rows. NaN stays NaN.

    Raises:
        TypeError: ranks are not floating-point.
        ValueError: k below 1.

    Derivatives: none. Memory: the result.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import ranking
        >>> print(ranking.ndcg(jnp.array([1.0, 3.0, 12.0]), k=10))
        [1.  0.5 0. ]

    References:
        Järvelin and Kekäläinen, *Cumulated Gain-Based Evaluation of IR Techniques*, 2002.
    """
    ranks = _checked_ranks(ranks)
    return _within(ranks, k, 1 / jnp.log2(1 + ranks))


def _checked_ranks(ranks: ArrayLike) -> Array:
    return checks.float_array("ranks", ranks).astype(jnp.float32)


def _within(ranks: Array, k: int | None, score: ArrayLike) -> Array:
    if k is None:
        return jnp.asarray(score)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return jnp.where(jnp.isnan(ranks), jnp.nan, jnp.where(ranks <= k, score, 0))
