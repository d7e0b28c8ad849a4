"""Margins: what is taken off the label's logit, so that it has to lead by that much.

    z − m                                  margin: CosFace, AM-softmax
    cos(θ + m), with cos θ the logit       angular margin: ArcFace

Where θ + m is beyond π, the cosine would rise again. As in the ArcFace authors' code, cos θ − m sin m takes its place:
it falls on as θ grows, and lies below −1 for every m up to π/2.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jsoftmax._rows.dtypes import rounded
from jsoftmax._rows.primitives import select


def with_margins(z: Array, margin: Array | None, angular_margin: Array | None) -> Array:
    """What the logits `z` would be as labels; margins that fit its rank."""
    if angular_margin is not None:
        z = _turned(z, angular_margin)
    return z if margin is None else z - margin


@jax.custom_jvp
def _turned(cosine: Array, angle: Array) -> Array:
    """cos(θ + angle). A cosine that rounding left above 1 has a sine of 0."""
    sine = jnp.sqrt(jnp.maximum((1 - cosine) * (1 + cosine), 0))
    turned = rounded(cosine * jnp.cos(angle)) - rounded(sine * jnp.sin(angle))
    return select(_is_beyond(cosine, angle), cosine - rounded(angle * jnp.sin(angle)), turned)


@_turned.defjvp
def _turned_jvp(primals, tangents):
    # By the cosine sin(θ + m) / sin θ = cos m + cos θ sin m / sin θ, without bound where θ is 0: there it is that of
    # the largest cosine below 1. Where the cosine is no number it is finite, so that an idle row's 0 stays 0.
    (cosine, angle), (cosine_dot, angle_dot) = primals, tangents
    beyond = _is_beyond(cosine, angle)
    c = select(jnp.isfinite(cosine) & ~beyond, cosine, 0)
    squared = (1 - c) * (1 + c)
    sine = jnp.sqrt(jnp.maximum(squared, float(jnp.finfo(c.dtype).eps)))
    by_cosine = select(beyond, 1, jnp.cos(angle) + c * jnp.sin(angle) / sine)
    by_angle = select(
        beyond,
        -jnp.sin(angle) - angle * jnp.cos(angle),
        -c * jnp.sin(angle) - select(squared > 0, sine, 0) * jnp.cos(angle),
    )
    return _turned(cosine, angle), by_cosine * cosine_dot + by_angle * angle_dot


def _is_beyond(cosine: Array, angle: Array) -> Array:
    """Whether θ + angle is beyond π."""
    return cosine <= -jnp.cos(angle)
