"""What one row of logits gives, in arithmetic far wider than that under test.

The formulas stand here once and run in two arithmetics: mpmath with 50 digits, for float64, and numpy's long double,
fast enough for long rows, for everything narrower. Neither shares code with the library.
"""

from typing import NamedTuple

import jax.numpy as jnp
import mpmath
import numpy as np
from scipy import stats

MP = mpmath.MPContext()
MP.dps = 50


class Arithmetic(NamedTuple):
    """How to make numbers and take functions of arrays of them."""

    numbers: np.ufunc
    exp: np.ufunc
    log: np.ufunc
    log1p: np.ufunc


FIFTY_DIGITS = Arithmetic(*(np.frompyfunc(f, 1, 1) for f in (MP.mpf, MP.exp, MP.ln, MP.log1p)))
LONG_DOUBLE = Arithmetic(np.longdouble, np.exp, np.log, np.log1p)


class Exact(NamedTuple):
    """The row statistics and everything about each class, of rows (*batch, classes)."""

    maximum: np.ndarray
    log_total: np.ndarray  # logsumexp − maximum
    logsumexp: np.ndarray
    mean_logit: np.ndarray
    entropy: np.ndarray
    p: np.ndarray
    not_p: np.ndarray  # 1 − p, from the sum of the other classes
    log_p: np.ndarray


def arithmetic_for(dtype) -> Arithmetic:
    return FIFTY_DIGITS if jnp.dtype(dtype) == jnp.float64 else LONG_DOUBLE


def loss_dtype(dtype):
    """The dtype of losses and statistics of logits in `dtype`."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def exact(logits, arithmetic: Arithmetic = FIFTY_DIGITS) -> Exact:
    """Everything about rows (*batch, classes) of finite logits that are taken as they are, without rounding."""
    z = widen(logits, arithmetic)
    top = np.argmax(np.asarray(logits, np.float64), axis=-1)[..., None]
    maximum = np.take_along_axis(z, top, axis=-1)
    e = arithmetic.exp(z - maximum)
    at_top = np.arange(z.shape[-1]) == top
    others = np.sum(np.where(at_top, 0 * e, e), axis=-1, keepdims=True)  # no sum holds the largest term
    total = 1 + others
    log_total = arithmetic.log1p(others)
    p, log_p = e / total, z - maximum - log_total
    return Exact(
        maximum=maximum[..., 0],
        log_total=log_total[..., 0],
        logsumexp=(maximum + log_total)[..., 0],
        mean_logit=np.sum(z, axis=-1) / z.shape[-1],
        entropy=-np.sum(p * log_p, axis=-1),
        p=p,
        not_p=np.where(at_top, others, total - e) / total,
        log_p=log_p,
    )


def at_labels(values, labels):
    """The entries of (*batch, classes) at integer labels (*batch,)."""
    return np.take_along_axis(values, np.asarray(labels)[..., None], axis=-1)[..., 0]


def losses(row: Exact, labels, epsilon=0) -> np.ndarray:
    """Cross-entropy with integer or dense labels; with a poly coefficient if given."""
    if np.issubdtype(np.asarray(labels).dtype, np.integer):
        return at_labels(-row.log_p + epsilon * row.not_p, labels)
    return np.sum(np.asarray(labels, row.p.dtype) * (-row.log_p + epsilon * row.not_p), axis=-1)


def gradients(row: Exact, labels) -> np.ndarray:
    """The derivative of `losses` (without a poly term) with respect to the logits, without cancellation."""
    if np.issubdtype(np.asarray(labels).dtype, np.integer):
        return np.where(np.arange(row.p.shape[-1]) == np.asarray(labels)[..., None], -row.not_p, row.p)
    y = np.asarray(labels, row.p.dtype)
    return row.p * (np.sum(y, axis=-1, keepdims=True) - y) - y * row.not_p


def regularized(row: Exact, labels, share, z_loss) -> list[tuple[np.ndarray, np.ndarray]]:
    """Loss and gradient with label smoothing and z-loss, each with the sum of its terms' sizes, which may cancel."""
    here = np.isfinite(row.log_p)  # the classes that are not masked
    even = here / np.sum(here, axis=-1, keepdims=True)
    mean = np.sum(np.where(here, -row.log_p, 0) * even, axis=-1)
    terms = (1 - share) * losses(row, labels) + share * mean
    size = np.maximum(np.abs(row.maximum), row.log_total)  # that of logsumexp
    slopes = (1 - share) * gradients(row, labels)
    pull = 2 * z_loss * row.p
    return [
        (terms + z_loss * row.logsumexp**2, terms + z_loss * size**2),
        (
            slopes + share * (row.p - even) + pull * row.logsumexp[..., None],
            np.abs(slopes) + share * (row.p + even) + pull * size[..., None],
        ),
    ]


def hessian(row: Exact) -> np.ndarray:
    """The second derivative of cross-entropy, (*batch, classes, classes)."""
    off_diagonal = -row.p[..., :, None] * row.p[..., None, :]
    return np.where(np.eye(row.p.shape[-1], dtype=bool), (row.p * row.not_p)[..., None], off_diagonal)


def gaps(row: Exact) -> np.ndarray:
    """How far each class's logit is above logsumexp of the others, to float64; ∞ for the only class."""
    with np.errstate(divide="ignore"):
        return (row.log_p - np.log(row.not_p.astype(np.float64))).astype(np.float64)


def widen(values, arithmetic: Arithmetic) -> np.ndarray:
    """Floats of any precision, each taken as exactly the number that it is."""
    return arithmetic.numbers(np.asarray(values, np.float64))


def spacing(values, dtype) -> np.ndarray:
    """The distance of neighbours in `dtype` at each value; below the normal numbers, that of the smallest of them."""
    info = jnp.finfo(dtype)
    size = np.maximum(np.abs(np.asarray(values, np.float64)), float(info.smallest_normal))
    return np.ldexp(1.0, np.frexp(size)[1] - 1 - info.nmant)


def ulps(actual, expected, dtype, unit=None) -> np.ndarray:
    """The error of each number in units of `dtype`'s spacing at the true value (or at `unit`); ∞ if it isn't finite.

    True values below the smallest normal number, which XLA flushes to 0 on some platforms, count as right.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    size = np.abs(np.asarray(expected, np.float64))
    one = spacing(size if unit is None else unit, dtype)
    finite = np.isfinite(actual)
    error = np.asarray(abs(np.where(finite, actual, 0) - expected), np.float64) / one
    # Just above the smallest normal number, the rounded result may be below it and be flushed.
    compared = size >= float(jnp.finfo(dtype).smallest_normal) * (1 + 2.0**-8)
    return np.where(finite, np.where(compared | (unit is not None), error, 0), np.inf)


def filtered_probabilities(logits, where=None, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """What sampling is to do with one row, by sorting, in float64."""
    z = np.asarray(logits, np.float64) / temperature
    z = np.where(np.isneginf(z) if where is None else np.isneginf(z) | ~np.asarray(where), -np.inf, z)
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    if top_k is not None:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, p.size) - 1], p, 0)
    if top_p is not None:
        p = p / p.sum()
        above = np.array([p[p > one].sum() for one in p])
        p = np.where((above < top_p) | (p == p.max()) | (top_p >= 1), p, 0)
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


def assert_distribution(drawn, expected):
    """Chi-square, a false alarm in 10,000; classes that are not expected are not drawn at all."""
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=expected.size)
    assert counts.size == expected.size
    assert np.all(counts[expected == 0] == 0)
    some = expected > 0
    if some.sum() > 1:
        assert stats.chisquare(counts[some], counts.sum() * expected[some] / expected.sum()).pvalue > 1e-4
