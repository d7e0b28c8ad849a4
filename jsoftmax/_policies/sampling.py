"""Draws from softmax of logits."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._rows.axes import Axis, classes_back, normalize_axes
from jsoftmax._rows.exponentials import gap
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import SupportOptions, checked_rows
from jsoftmax._rows.reports import report_rows, report_values
from jsoftmax._rows.rows import Rows, largest


@in_any_layout("logits")
def sample(
    key: ArrayLike,
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    sample_shape: tuple[int, ...] = (),
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
) -> Array:
    r"""Draws from softmax of the logits, by the largest logit after Gumbel noise.

    .. math:: \arg\max_j\,(z_j / T + g_j) \sim \mathrm{softmax}(z / T), \qquad g_j = -\log(-\log u_j)

    The noise has 46 random bits in its upper tail. With the usual 23, a class of probability below 1e-7 is never drawn,
    and of a large vocabulary such classes are a noticeable part.

    Args:
        key: a key of `jax.random`; for one a row, use `jax.vmap`.
        logits: float array; `axis` holds the classes.
        axis: the class axis, or a tuple of axes whose flat index is drawn.
        where: boolean, of the shape of `logits` or broadcasting to it, or of the batch's shape: the classes that take
            part. What it masks is never read and never drawn.
        sample_shape: shape of independent draws for each row.
        temperature: T, a number, traced if need be, or one a row. At 0, the largest logits share all draws evenly.
        top_k, top_p, min_p: draw from the classes that `filter_classes` keeps.

    Returns:
        int32 `(*sample_shape, *batch)`. −1 for a row that has no distribution: with a NaN or +∞, or without any class.
        `checkify` reports such a row by its index. The same for the same key and logits on any device and in any
        layout, rounding apart; but float64 logits get other noise than float32, and so other draws.

    Raises:
        TypeError: logits are not floating-point, `where` is not boolean, or top_k is not an integer.
        ValueError: no class, a shape that does not fit, or a known number out of range.

    Derivatives: none; see `log_prob` for the score function. Memory: the noise, `(*sample_shape, *batch, classes)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jsoftmax import categorical
        >>> logits = jnp.array([[0.0, 1.0, 2.0], [5.0, 5.0, -jnp.inf]])
        >>> print(categorical.sample(jax.random.key(0), logits, temperature=jnp.array([0.0, 1.0]))[0])
        2
        >>> print(categorical.sample(jax.random.key(0), logits, sample_shape=(4,)).shape)
        (4, 2)

    References:
        Gumbel, *Statistical Theory of Extreme Values*, 1954; Maddison, Tarlow and Minka, *A\* Sampling*, 2014.
    """
    rows = _checked(logits, axis, where, temperature, top_k, top_p, min_p)
    return _draws(key, rows, tuple(sample_shape), None)


@in_any_layout("logits")
def sample_without_replacement(
    key: ArrayLike,
    logits: ArrayLike,
    count: int,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    sample_shape: tuple[int, ...] = (),
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
) -> Array:
    r"""Draws of several different classes a row, in their order: the largest logits after Gumbel noise.

    .. math:: P(j_1, \dots, j_n) = \prod_i \frac{p_{j_i}}{1 - p_{j_1} - \dots - p_{j_{i-1}}}

    This is the Plackett–Luce distribution: each draw is one of softmax over the classes that are left.

    Args:
        key: a key of `jax.random`.
        logits: float array; `axis` holds the classes.
        count: how many classes to draw, at most as many as there are.
        axis: the class axis, or a tuple of axes whose flat index is drawn.
        where: the classes that take part, as in `sample`.
        sample_shape: shape of independent draws for each row.
        temperature: divides the logits, as in `sample`. At 0 only the largest logits can be drawn.
        top_k, top_p, min_p: draw from the classes that `filter_classes` keeps.

    Returns:
        int32 `(*sample_shape, *batch, count)`. Once a row has no class left to draw, −1; all −1 for a row that has no
        distribution, as in `sample`.

    Raises:
        TypeError: logits are not floating-point, `where` is not boolean, or top_k is not an integer.
        ValueError: count below 1 or above the number of classes, or as `sample`.

    Derivatives: none. Memory: as `sample`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jsoftmax import categorical
        >>> drawn = categorical.sample_without_replacement(jax.random.key(0), jnp.zeros(5), 5)
        >>> print(jnp.sort(drawn))
        [0 1 2 3 4]

    References:
        Plackett, *The Analysis of Permutations*, 1975; Kool, van Hoof and Welling, *Stochastic Beams and Where to Find
        Them*, 2019 (Gumbel top-k).
    """
    rows = _checked(logits, axis, where, temperature, top_k, top_p, min_p)
    if not 1 <= count <= rows.logits.shape[-1]:
        raise ValueError(f"count must be between 1 and the {rows.logits.shape[-1]} classes, got {count}")
    return _draws(key, rows, tuple(sample_shape), count)


@in_any_layout("logits")
def filter_classes(
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
) -> Array:
    r"""The classes that top-k, top-p and min-p keep, as a mask for `where` of any function.

    .. math:: \#\{i: z_i > z_j\} < k, \qquad \sum_{i: p_i > p_j} p_i < P, \qquad p_j \ge P_{\min} \max_i p_i

    One after the other: top-p (the nucleus) counts the probabilities of what top-k has kept, after temperature. Classes
    with equal logits are kept or dropped together. The largest is always kept.

    Args:
        logits: float array; `axis` holds the classes.
        axis: the class axis or axes.
        where: the classes that take part, as in `sample`; the others are never kept.
        temperature: divides the logits beforehand, as in `sample`.
        top_k: k ≥ 1, an integer or one a row, traced if need be. With k classes or fewer, all are kept.
        top_p: P in [0, 1], a number or one a row, traced if need be. 1 keeps everything.
        min_p: the least probability that is kept, as a share of the largest, in [0, 1]; a number or one a row.

    Returns:
        A boolean array of the shape of `logits`. Of a row that has no distribution nothing is dropped, so that what
        makes it so is still found.

    Raises:
        TypeError: logits are not floating-point, `where` is not boolean, or top_k is not an integer.
        ValueError: no class, a shape that does not fit, or a known number out of range.

    Derivatives: none; a mask. Nothing is sorted: top-k and top-p take 32 passes over a row each.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import categorical
        >>> logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
        >>> print(categorical.filter_classes(logits, top_p=0.7))
        [ True  True False False]
        >>> print(categorical.filter_classes(logits, min_p=0.2))
        [ True  True  True False]

    References:
        Fan, Lewis and Dauphin, *Hierarchical Neural Story Generation*, 2018 (top-k); Holtzman et al., *The Curious Case
        of Neural Text Degeneration*, 2020 (top-p); Nguyen et al., *Turning Up the Heat*, 2025 (min-p).
    """
    rows = _checked(logits, axis, where, temperature, top_k, top_p, min_p)
    shape = jnp.shape(logits)
    return classes_back(_kept(rows), normalize_axes(axis, len(shape)), shape)


def _checked(logits, axis, where, temperature, top_k, top_p, min_p) -> Rows:
    options: SupportOptions = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rows = checked_rows(logits, None, axis, where, options)
    if rows.logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {jnp.shape(logits)} and so no class along axis {axis}")
    return rows


@jax.jit
def _kept(rows: Rows) -> Array:
    return rows.z() != -jnp.inf


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draws(key: Array, rows: Rows, sample_shape: tuple[int, ...], count: int | None) -> Array:
    """One class a row, or the first `count` different ones."""
    z = rows.z()
    maximum = largest(z)
    bad = ~jnp.isfinite(maximum)
    idle = report_values(rows, jnp.zeros_like(bad), None)
    idle = report_rows("row {row} of logits has no class to draw, or holds infinity", bad, idle)
    noise = jax.random.gumbel(key, (*sample_shape, *z.shape), z.dtype, mode="high")
    # Relative to the maximum, noise keeps its digits however large the logits are.
    scores = jnp.broadcast_to(gap(z, maximum[..., None]), noise.shape) + noise
    bad |= idle
    if count is None:
        drawn = jnp.argmax(scores, axis=-1)
        return jnp.where(jnp.broadcast_to(bad, drawn.shape), -1, drawn).astype(jnp.int32)
    best, drawn = lax.top_k(scores, count)
    none = jnp.broadcast_to(bad[..., None], drawn.shape) | jnp.isneginf(best)
    return jnp.where(none, -1, drawn).astype(jnp.int32)
