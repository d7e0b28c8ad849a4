"""Divergences between the softmax of two rows of logits, right to rounding however close the two are.

With p the first row's probabilities, q the second's and r = log p − log q, the textbook's Σ p·r is a small difference
of large terms when p and q are close: r is of first order, the divergence of second. Since Σ (q − p) = 0,

    KL(p‖q) = Σ (p·r + q − p) = Σ p·(r + e^(−r) − 1)

whose terms are all ≥ 0, and the bracket has a series in r without a first-order term. r itself comes from differences
of the logits, taken before anything is rounded: not from two logarithms.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jsoftmax._rows.dtypes import rounded
from jsoftmax._rows.exponentials import exact_difference
from jsoftmax._rows.probabilities import Shares, row_shares
from jsoftmax._rows.rows import Rows


class Pair(NamedTuple):
    """Two distributions, each (*batch, classes), and the logarithm of their ratio."""

    p: Array
    q: Array
    r: Array  # log p − log q; +∞ where only q has no such class, −∞ where only p has none


class Divergence(NamedTuple):
    """KL(p‖q) of each row, and its derivative by the logits of p and of q."""

    value: Array
    d_first: Array
    d_second: Array


def pair_of(first: Rows, second: Rows) -> Pair:
    """p, q and r of two batches of rows under the same mask and temperature."""
    of_p, of_q = row_shares(first), row_shares(second)
    where, temperature = first.transform.where, first.transform.temperature
    a, b = (_masked(rows.logits.astype(rows.dtype), where) for rows in (first, second))
    both = jnp.isfinite(a) & jnp.isfinite(b)
    difference, error = _exact_difference(jnp.where(both, a, 0), jnp.where(both, b, 0))
    # Relative to the likeliest class k of p that q has too, so that a constant on a row changes nothing.
    at_k = functools.partial(_take, jnp.argmax(jnp.where(both, a, -jnp.inf), axis=-1)[..., None])
    relative = (difference - at_k(difference)) + (error - at_k(error))
    if temperature is not None:
        relative = relative / temperature
    r = relative + _log_ratio_at(at_k, relative, of_p, of_q, both)
    return Pair(of_p.p, of_q.p, jnp.where(both, r, jnp.where(a > b, jnp.inf, -jnp.inf)))


def _masked(logits: Array, where: Array | None) -> Array:
    return logits if where is None else jnp.where(where, logits, -jnp.inf)


def _take(index: Array, rows: Array) -> Array:
    return jnp.take_along_axis(rows, index, axis=-1)


# To derivatives, what the rounding took away is a constant.
_exact_difference = jax.custom_jvp(exact_difference)


@_exact_difference.defjvp
def _exact_difference_jvp(primals, tangents):
    out = _exact_difference(*primals)
    return out, (tangents[0] - tangents[1], jnp.zeros_like(out[1]))


def _log_ratio_at(at_k, relative: Array, first: Shares, second: Shares, both: Array) -> Array:
    """log p_k − log q_k = −log Σ q_j e^(r_j − r_k), by log1p: (*batch, 1)."""
    near = both & (relative < 1)
    p_k = at_k(first.p)
    far = first.p * (at_k(second.p) / jnp.where(p_k == 0, 1, p_k))  # = q_j e^(r_j − r_k), without a large exponential
    far = jnp.where(both, far, 0) - second.p
    change = jnp.where(near, second.p * jnp.expm1(jnp.where(near, relative, 0)), far)
    change = jnp.sum(change, axis=-1, keepdims=True)
    # Where most of q is elsewhere, the logarithms are far apart and cancel nothing.
    usable = (change > -0.5) & jnp.all(both | (first.p == 0), axis=-1, keepdims=True)
    k_in_both = at_k(both)
    apart = jnp.where(k_in_both, at_k(first.log_p), 0) - jnp.where(k_in_both, at_k(second.log_p), 0)
    return jnp.where(usable, -jnp.log1p(jnp.where(usable, change, 0)), apart)


@jax.custom_jvp
def above_tangent(x: Array) -> Array:
    """e^x − 1 − x ≥ 0, by its series where the two would cancel."""
    near = jnp.abs(x) < 1
    y = jnp.where(near, x, 0)
    series = jnp.ones_like(y)
    for n in range(20 if x.dtype == jnp.float64 else 12, 2, -1):
        series = 1 + y / n * series
    return jnp.where(near, y * y / 2 * series, jnp.expm1(x) - x)


above_tangent.defjvps(lambda x_dot, out, x: jnp.expm1(x) * x_dot)


def divergence(p: Array, q: Array, r: Array) -> Divergence:
    """KL(p‖q) with r = log p − log q."""
    small = jnp.abs(r) < 1
    near = jnp.where(small, r, 0)
    some = p > 0
    large = jnp.where(some, p * jnp.where(some & ~small, r, 0), p)  # 0 · ∞ is 0 here; a NaN stays
    value = jnp.sum(jnp.where(small, p * above_tangent(-near), large + (q - p)), axis=-1)
    d_second = jnp.where(small, p * jnp.expm1(-near), q - p)
    # p_j (r_j − Σ p_i r_i), relative to the likeliest class, whose own term then vanishes instead of cancelling.
    ratio = jnp.where(jnp.isfinite(r) & some, r, 0)
    ratio = ratio - _take(jnp.argmax(p, axis=-1)[..., None], ratio)
    d_first = p * (ratio - jnp.sum(p * ratio, axis=-1, keepdims=True))
    return Divergence(value, d_first, d_second)


@jax.custom_jvp
def _kl(first: Rows, second: Rows) -> Array:
    """KL of the softmax of `second` from that of `first`, (*batch,)."""
    return divergence(*pair_of(first, second)).value


@_kl.defjvp
def _kl_jvp(primals, tangents):
    # dKL = Σ p_j (r_j − KL) da_j + Σ (q_j − p_j) db_j, with a and b the logits over the temperature.
    def push(rows, rows_dot):
        found = divergence(*pair_of(*rows))
        return _along(found.d_first, rows[0], rows_dot[0]) + _along(found.d_second, rows[1], rows_dot[1])

    # Under checkpoint, only the logits wait for a transpose.
    return _kl(*primals), jax.checkpoint(push)(primals, tangents)


@jax.custom_jvp
def _js(first: Rows, second: Rows, weight: Array) -> Array:
    """(1 − w)·KL(p‖m) + w·KL(q‖m) with m = (1 − w)·p + w·q, (*batch,)."""
    from_first, from_second = _to_mixture(pair_of(first, second), weight)
    total = _share(1 - weight, from_first.value) + _share(weight, from_second.value)
    # The entropy of the weights bounds it; rounding may not.
    bound = 0 - (_x_log_x(weight, 1 - weight) + _x_log_x(1 - weight, weight))
    return jnp.minimum(total, bound)


def _share(weight: Array, values: Array) -> Array:
    """weight · values, where a weight of 0 wins over ∞."""
    return weight * jnp.where(weight == 0, 0, values)


def _x_log_x(x: Array, rest: Array) -> Array:
    """x log x, of which the rest to 1 is known where x is next to 1."""
    return jnp.where(x > 0.5, x * jnp.log1p(-jnp.where(x > 0.5, rest, 0)), x * jnp.log(jnp.where(x > 0, x, 1)))


def _to_mixture(pair: Pair, weight: Array) -> tuple[Divergence, Divergence]:
    """KL(p‖m) and KL(q‖m). log p − log m = −log1p(w·expm1(−r)), and from the other side the same with 1 − w and −r."""
    p, q, r = pair
    # XLA would merge a tiny weight with a constant factor of p or q, and get 0.
    mixture = (1 - weight) * rounded(p) + weight * rounded(q)

    def to_mixture(share, own, ratio):
        # Far below 0, where e^(−ratio) overflows, nothing else is left beside it.
        lowest = -0.9 * math.log(float(jnp.finfo(ratio.dtype).max))
        bounded = jnp.maximum(ratio, lowest)
        change = share * jnp.expm1(-bounded)
        # Where most is taken off, what is left is added up: 1 less a share next to 1 would cancel.
        near = change > -0.5
        left = jnp.where(near, 1, share * jnp.exp(-bounded) + own)
        usual = -jnp.where(near, jnp.log1p(jnp.where(near, change, 0)), jnp.log(left))
        return jnp.where(ratio >= lowest, usual, jnp.where(share > 0, ratio - jnp.log(share), 0))

    ours, theirs = to_mixture(weight, 1 - weight, r), to_mixture(1 - weight, weight, -r)
    return divergence(p, mixture, ours), divergence(q, mixture, theirs)


@_js.defjvp
def _js_jvp(primals, tangents):
    # The mixture is the best common approximation, so that its own change counts nothing:
    # dJS = (1 − w) Σ p_j (log(p_j/m_j) − KL(p‖m)) da_j + w Σ q_j (…) db_j + (KL(q‖m) − KL(p‖m)) dw.
    def push(primals, tangents):
        (first, second, weight), (first_dot, second_dot, weight_dot) = primals, tangents
        from_first, from_second = _to_mixture(pair_of(first, second), weight)
        along = _share(1 - weight, _along(from_first.d_first, first, first_dot))
        along += _share(weight, _along(from_second.d_first, second, second_dot))
        return along + (from_second.value - from_first.value) * weight_dot

    return _js(*primals), jax.checkpoint(push)(primals, tangents)


def _along(slope: Array, rows: Rows, rows_dot: Rows) -> Array:
    """Σ_j slope_j · d(logits_j / T), where a mask stands still."""
    where, temperature = rows.transform.where, rows.transform.temperature
    logits, logits_dot = (array.astype(rows.dtype) for array in (rows.logits, rows_dot.logits))
    if temperature is not None:
        finite = jnp.where(jnp.isfinite(logits), logits, 0)
        logits_dot = (logits_dot - finite / temperature * rows_dot.transform.temperature) / temperature
    return jnp.sum(slope * (logits_dot if where is None else jnp.where(where, logits_dot, 0)), axis=-1)


kl_of_rows, js_of_rows = jax.jit(_kl), jax.jit(_js)
