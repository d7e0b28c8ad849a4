"""Three distributions to draw negatives from: Zipf's law, uniform, and in proportion to counts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._vocabularies.drawing import Sampler

CELLS = 4096


def log_uniform_sampler(classes: int, *, unique: bool = True) -> Sampler:
    r"""Zipf's law: for classes numbered from the most frequent to the rarest, as most vocabularies are.

    .. math:: p_k = \log\frac{k + 2}{k + 1} \Big/ \log(V + 1), \qquad k = 0, …, V - 1

    Args:
        classes: V, how many classes there are.
        unique: whether a sample holds no class twice.

    Returns:
        A `Sampler` whose memory does not depend on V.

    Raises:
        ValueError: classes below 1 or above 2³¹ − 1.

    Example:
        >>> import jax, jsoftmax
        >>> sampler = jsoftmax.log_uniform_sampler(10_000_000)
        >>> print(sampler.sample(jax.random.key(0), 64).classes.shape)
        (64,)
    """
    _check_classes(classes)
    # With 24 bits, exp(u · log V) would reach only some of the larger classes. So u has two parts: one of these cells,
    # whose lower end is given exactly as an integer and a fraction, and the place in the cell.
    ends = np.exp(np.log(classes + 1.0) * (np.arange(CELLS) / CELLS))
    whole = np.floor(ends)
    number = jnp.result_type(float)
    tables = {
        "classes": jnp.int32(classes),
        "whole": jnp.asarray(whole, jnp.int32),
        "part": jnp.asarray(ends - whole, number),
        "width": jnp.asarray(np.log(classes + 1.0) / CELLS, number),
    }
    return Sampler(classes, _draw_log_uniform, _log_uniform_log_prob, tables, unique)


def _draw_log_uniform(tables: dict, key: Array, shape: tuple[int, ...]) -> Array:
    cell_key, place_key = jax.random.split(key)
    cell = jax.random.randint(cell_key, shape, 0, CELLS)
    whole, part = tables["whole"][cell], tables["part"][cell]
    place = jax.random.uniform(place_key, shape, part.dtype)
    above = part + (whole.astype(part.dtype) + part) * jnp.expm1(place * tables["width"])
    return jnp.minimum(whole + jnp.floor(above).astype(jnp.int32), tables["classes"]) - 1


def _log_uniform_log_prob(tables: dict, classes: Array) -> Array:
    width = tables["width"]
    return jnp.log(jnp.log1p(1 / (classes.astype(width.dtype) + 1))) - jnp.log(width * CELLS)


def uniform_sampler(classes: int, *, unique: bool = True) -> Sampler:
    r"""All classes alike, :math:`p_k = 1 / V`: for classes whose numbers and frequencies say nothing.

    Args:
        classes: V, how many classes there are.
        unique: whether a sample holds no class twice.

    Returns:
        A `Sampler` whose memory does not depend on V.

    Raises:
        ValueError: classes below 1 or above 2³¹ − 1.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> sampler = jsoftmax.uniform_sampler(10)
        >>> print(jnp.sort(sampler.sample(jax.random.key(0), 10).classes))
        [0 1 2 3 4 5 6 7 8 9]
    """
    _check_classes(classes)
    return Sampler(classes, _draw_uniform, _uniform_log_prob, jnp.int32(classes), unique)


def _draw_uniform(classes: Array, key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.randint(key, shape, 0, classes)


def _uniform_log_prob(count: Array, classes: Array) -> Array:
    return jnp.broadcast_to(-jnp.log(count.astype(jnp.result_type(float))), classes.shape)


def unigram_sampler(counts: ArrayLike | Sequence[Any], power: float = 1.0, *, unique: bool = True) -> Sampler:
    r"""Classes in proportion to a power of their counts, by Walker's alias method: one draw costs the same for any V.

    .. math:: p_k = c_k^{\alpha} \Big/ \sum_j c_j^{\alpha}

    Args:
        counts: numbers `(classes,)` above 0, whose values are known (not traced).
        power: α; word2vec has 0.75, and 0 is uniform.
        unique: whether a sample holds no class twice.

    Returns:
        A `Sampler` with three tables of V numbers.

    Raises:
        ValueError: counts of another shape, traced, not finite or not above 0.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> sampler = jsoftmax.unigram_sampler([8, 1, 1], 0.5, unique=False)
        >>> sample = sampler.sample(jax.random.key(0), 4)
        >>> print(jnp.exp(sampler.log_expected_count(jnp.arange(3), sample)))
        [2.3431 0.8284 0.8284]

    References:
        Walker, *An Efficient Method for Generating Discrete Random Variables with General Distributions*, 1977;
        Mikolov et al., *Distributed Representations of Words and Phrases*, 2013 (the power).
    """
    if not checks.known(counts):
        raise ValueError("counts must be known, got a traced array; make the sampler outside of jit and pass it in")
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1:
        raise ValueError(f"counts has shape {counts.shape}, but needs (classes,): one number for each class")
    _check_classes(counts.size)
    if not np.all((counts > 0) & (counts < np.inf)):
        least = counts[np.argmin(np.where(np.isfinite(counts) & (counts > 0), np.inf, counts))]
        raise ValueError(f"counts must be finite and above 0, got {least}; add 1 to classes that were never seen")
    log_p = power * np.log(counts)
    log_p -= np.logaddexp.reduce(log_p)
    keep, alias = _alias_table(np.exp(log_p))
    number = jnp.result_type(float)
    tables = {"keep": jnp.asarray(keep, number), "alias": jnp.asarray(alias), "log_p": jnp.asarray(log_p, number)}
    return Sampler(counts.size, _draw_alias, _table_log_prob, tables, unique)


def _alias_table(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of its own cell of 1/V each class keeps, and which class has the rest, without a loop over classes.

    Classes below 1/V are filled up one after another from those above, each large class until it has no more to give;
    what it then lacks itself comes from the next. Prefix sums say who fills whom.
    """
    weight = p * (p.size / p.sum())
    small, large = np.flatnonzero(weight < 1), np.flatnonzero(weight >= 1)
    lacking, spare = np.cumsum(1 - weight[small]), np.cumsum(weight[large] - 1)
    keep, alias = np.ones(p.size), np.arange(p.size, dtype=np.int32)
    if small.size == 0:
        return keep, alias
    keep[small] = weight[small]
    before = np.concatenate([[0.0], lacking[:-1]])
    alias[small] = large[np.minimum(np.searchsorted(spare, before, side="right"), large.size - 1)]
    last = np.minimum(np.searchsorted(lacking, spare), small.size - 1)
    keep[large] = np.clip(1 + spare - lacking[last], 0, 1)
    alias[large[:-1]] = large[1:]
    keep[large[-1]] = 1.0
    return keep, alias


def _draw_alias(tables: dict, key: Array, shape: tuple[int, ...]) -> Array:
    cell_key, keep_key = jax.random.split(key)
    keep = tables["keep"]
    cell = jax.random.randint(cell_key, shape, 0, keep.shape[0])
    return jnp.where(jax.random.uniform(keep_key, shape, keep.dtype) < keep[cell], cell, tables["alias"][cell])


def _table_log_prob(tables: dict, classes: Array) -> Array:
    return jnp.take(tables["log_p"], classes, mode="clip")


def _check_classes(classes: int) -> None:
    if not 1 <= classes < 2**31:
        raise ValueError(f"classes must be between 1 and 2**31 - 1, got {classes}")
