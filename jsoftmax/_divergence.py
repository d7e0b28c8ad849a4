"""The divergence of one row of logits from another, without cancellation.

    KL(p ‖ q) = Σ_j (p_j·δ_j − p_j + q_j)        δ_j = log p_j − log q_j

As Σ p = Σ q, the q − p changes nothing, but it makes every term at least 0: p_j·(e^(−δ) − 1 + δ). So nothing cancels
among the terms, and `above_tangent` sees to each of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from jsoftmax._probabilities import RowState, probabilities, row_state
from jsoftmax._rows import Rows
from jsoftmax._shards import UNSPLIT


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


@jax.jit
def divergence(rows: Rows, other: Rows) -> Float[Array, "*batch"]:
    """KL of the distribution of `rows` from that of `other`, in every derivative mode."""
    return _divergence(rows.z(), other.z(), (row_state(rows, None), row_state(other, None)))


@jax.custom_jvp
def _divergence(z: Array, w: Array, states: tuple[RowState, RowState]) -> Array:
    p, q, delta = _compared(z, w, states)
    near = (jnp.abs(delta) < 1) & (p > 0)
    close = p * above_tangent(jnp.where(near, -delta, 0))
    apart = q + jnp.where(p == 0, 0, p * (jnp.where(near, 1, delta) - 1))
    return jnp.sum(jnp.where(near, close, apart), axis=-1)


def _compared(z: Array, w: Array, states: tuple[RowState, RowState]) -> tuple[Array, Array, Array]:
    """p, q and δ, by the differences d of the logits from that at the largest class: δ_j = d_j + δ_top.

    Where all of a row are close, δ_top comes from them too, as log Σ_i p_i e^(−d_i), and keeps their relative accuracy.
    """
    p, q = (probabilities(x, None, state, UNSPLIT)[0] for x, state in zip((z, w), states, strict=True))
    maximum = states[0].maximum
    out, d = jnp.isneginf(z), z - w
    top = _at_top(d, z, maximum)
    d = jnp.where(out, 0, d - jnp.where(jnp.isposinf(top), 0, top))
    close = jnp.all((jnp.abs(d) < 1) & (~out | jnp.isneginf(w)), axis=-1, keepdims=True)
    near_top = jnp.log1p(jnp.sum(p.p * jnp.expm1(jnp.where(close, -d, 0)), axis=-1, keepdims=True))
    return p.p, q.p, d + jnp.where(close, near_top, _at_top(p.log_p - q.log_p, z, maximum))


def _at_top(values: Array, z: Array, maximum: Array) -> Array:
    """The entry of `values` at a largest logit of each row, (*batch, 1)."""
    return jnp.max(jnp.where(z >= maximum[..., None], values, -jnp.inf), axis=-1, keepdims=True)


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(primals, tangents):
    # dKL = Σ p_j (δ_j − KL) dz_j + Σ (q_j − p_j) dw_j
    z_dot, w_dot = (None if isinstance(dot, SymbolicZero) else dot for dot in tangents[:2])
    # Under checkpoint, nothing but the logits and O(rows) numbers waits for a transpose.
    return _divergence(*primals), jax.checkpoint(_push_forward)(*primals, z_dot, w_dot)


def _push_forward(z: Array, w: Array, states: tuple[RowState, RowState], z_dot, w_dot) -> Array:
    p, q, delta = _compared(z, w, states)
    total = jnp.zeros_like(states[0].maximum)
    if z_dot is not None:
        # KL is the mean of δ. Both are taken relative to δ of the largest class, whose own term may be all of the mean.
        delta_there = delta - _at_top(delta, z, states[0].maximum)
        mean = jnp.sum(jnp.where(p == 0, 0, p * delta_there), axis=-1, keepdims=True)
        total += jnp.sum(jnp.where(p == 0, 0, p * (delta_there - mean)) * z_dot, axis=-1)
    if w_dot is not None:
        near = (jnp.abs(delta) < 1) & (p > 0)
        total += jnp.sum(jnp.where(near, p * jnp.expm1(jnp.where(near, -delta, 0)), q - p) * w_dot, axis=-1)
    return total
