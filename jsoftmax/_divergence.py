"""The divergence of one row of logits from another, without cancellation.

    KL(p ‖ q) = Σ_j (p_j·δ_j − p_j + q_j)        δ_j = log p_j − log q_j

As Σ p = Σ q the added q − p changes nothing, but it makes every term at least 0: p_j·(e^(−δ) − 1 + δ). Nothing cancels
among the terms, and `above_tangent` sees to each of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float

from jsoftmax._probabilities import RowState, Shares, probabilities, row_state
from jsoftmax._rows import Rows


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
    p, q, delta = _shares(z, w, states)
    near = jnp.abs(delta) < 1
    close = p.p * above_tangent(jnp.where(near, -delta, 0))
    apart = q.p + p.p * (jnp.where(near, 1, delta) - 1)
    return jnp.sum(jnp.where(near & (p.p > 0), close, apart), axis=-1)


def _shares(z: Array, w: Array, states: tuple[RowState, RowState]) -> tuple[Shares, Shares, Array]:
    """p, q and δ; 0 for a class that p leaves out."""
    p, q = probabilities(z, None, states[0])[0], probabilities(w, None, states[1])[0]
    out = p.p == 0
    return p, q, jnp.where(out, 0, p.log_p) - jnp.where(out, 0, q.log_p)


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(primals, tangents):
    # dKL = Σ p_j (δ_j − KL) dz_j + Σ (q_j − p_j) dw_j
    z, w, states = primals
    out = _divergence(*primals)
    z_dot, w_dot = (None if isinstance(dot, SymbolicZero) else dot for dot in tangents[:2])
    # Under checkpoint, nothing but the logits and O(rows) numbers waits for a transpose.
    return out, jax.checkpoint(_push_forward)(z, w, states, out, z_dot, w_dot)


def _push_forward(z, w, states, out, z_dot, w_dot) -> Array:
    p, q, delta = _shares(z, w, states)
    total = jnp.zeros_like(out)
    if z_dot is not None:
        total += jnp.sum(jnp.where(p.p == 0, 0, p.p * (delta - out[..., None])) * z_dot, axis=-1)
    if w_dot is not None:
        # Two probabilities near 1 differ by what is missing to it.
        sure = (p.p > 0.5) & (q.p > 0.5)
        total += jnp.sum(jnp.where(sure, p.not_p - q.not_p, q.p - p.p) * w_dot, axis=-1)
    return total
