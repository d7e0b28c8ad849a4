"""From the caller's logits to the ones softmax sees: class mask, soft cap, temperature, adjustment, in this order.

    z = cap · tanh(logits / cap) / temperature + adjustment        −∞ where a class is masked

At the label, a margin comes off first (`margins.py`).
A logit of −∞ is a mask too and stays −∞ under any cap and temperature. Temperature 0 is the limit from above:
0 for a row's largest logits, −∞ for the others, and no gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jsoftmax._rows.dtypes import compute_dtype, rounded
from jsoftmax._rows.margins import with_margins
from jsoftmax._rows.primitives import select
from jsoftmax._rows.shards import UNSPLIT, ClassShards


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["where", "softcap", "temperature", "margin", "angular_margin", "adjustment"],
    meta_fields=["may_freeze"],
)
@dataclasses.dataclass(frozen=True)
class Transform:
    """The options that act on logits. None means unused; `where` apart, each can be differentiated."""

    # Any: JAX puts its own objects in the leaves' places when it handles trees.
    where: Any = None  # (*batch, classes) or (classes,), True for a class that takes part
    softcap: Any = None  # a scalar
    temperature: Any = None  # (*batch, 1) or a scalar
    margin: Any = None  # (*batch, 1) or a scalar, as the next
    angular_margin: Any = None
    adjustment: Any = None  # (*batch, classes) or (classes,)
    may_freeze: bool = False  # whether the temperature may turn out to be 0

    @property
    def is_identity(self) -> bool:
        return not jax.tree.leaves(self)

    @property
    def moves_label(self) -> bool:
        return self.margin is not None or self.angular_margin is not None

    @property
    def unmasked(self) -> "Transform":
        """What can be differentiated."""
        return dataclasses.replace(self, where=None)


def transform_logits(
    logits: Float[Array, "*batch classes"],
    transform: Transform,
    shards: ClassShards = UNSPLIT,
    is_label: Bool[Array, "*batch classes"] | None = None,
) -> Float[Array, "*batch classes"]:
    """The logits that enter softmax, in the dtype in which rows are computed. A margin needs to know the labels."""
    z = logits.astype(compute_dtype(logits.dtype))
    if transform.moves_label:
        z = rounded(z)
        z = select(jnp.asarray(is_label), with_margins(z, transform.margin, transform.angular_margin), z)
    if transform.where is not None:
        z = select(transform.where, z, -jnp.inf)
    if transform.softcap is not None:
        z = _cap(z, transform.softcap)
    if transform.temperature is not None:
        warmest = None
        if transform.may_freeze:
            warmest = shards.max(jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True, initial=-jnp.inf)))
        z = _divide(rounded(z), transform.temperature, warmest)
    if transform.adjustment is not None:
        z = rounded(z) + jnp.broadcast_to(transform.adjustment, z.shape)
    return z


def _cap(z: Array, softcap: Array) -> Array:
    # ±∞ and NaN pass through. The inner select keeps the derivative of the untaken branch finite.
    finite = jnp.isfinite(z)
    return select(finite, softcap * jnp.tanh(select(finite, z, 0) / softcap), z)


@jax.custom_jvp
def _divide(z: Array, temperature: Array, warmest: Array | None) -> Array:
    """z / temperature; with `warmest`, the rows' maxima, also for temperature 0."""
    if warmest is None:
        return z / temperature
    frozen = temperature == 0
    # 0 at the maximum, −∞ below it, and NaN in a row without a distribution. Where the temperature is a constant, XLA
    # would gather two divisions by tiny numbers into one by 0.
    limit = select(z < warmest, -jnp.inf, z - z)
    return select(frozen, limit, z / select(frozen, 1, temperature))


@_divide.defjvp
def _divide_jvp(primals, tangents):
    # d(z/T) = (dz − (z/T)·dT) / T, where a mask stays a mask and temperature 0 stands still.
    z, temperature, warmest = primals
    z_dot, temperature_dot, _ = tangents
    out = _divide(z, temperature, warmest)
    frozen = temperature == 0
    finite = select(jnp.isfinite(out) & ~frozen, out, 0)
    rate = select(frozen, 0, 1 / select(frozen, 1, temperature))
    return out, (z_dot - finite * temperature_dot) * rate
