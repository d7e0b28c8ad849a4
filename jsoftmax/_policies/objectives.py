"""What to make of an action's advantage and of the ratio of new to old probability: one function for each objective.

Each is to be made large, and is a few lines on log-ratios; which options it has, `OBJECTIVES` says.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._policies.actions import bounded, scaled
from jsoftmax._rows import checks


def _clipped(log_ratio: Array, log_prob: Array, advantages: Array, clip: Any = 0.2, dual_clip: Any = None) -> Array:
    """min(r·A, clip(r)·A) by the side on which A clips, so that no gradient passes an unselected, infinite r."""
    below, above = _bounds(clip, log_ratio)
    good = advantages > 0
    fixed = jnp.where(good, log_ratio > jnp.log1p(above), log_ratio < jnp.log1p(-below))
    bound = jnp.where(good, 1 + above, 1 - below)
    if dual_clip is not None:
        checks.within("dual_clip", dual_clip, 1.0, float("inf"))
        most = jnp.asarray(dual_clip, log_ratio.dtype)
        over = ~good & (log_ratio > jnp.log(most))
        fixed, bound = fixed | over, jnp.where(over, most, bound)
    ratio = jnp.exp(bounded(jnp.where(fixed, 0, log_ratio)))
    return jnp.where(fixed, bound, ratio) * advantages


def _cispo(log_ratio: Array, log_prob: Array, advantages: Array, clip: Any = (1.0, 4.0)) -> Array:
    """clip(r)·A·log p, with a constant for clip(r)."""
    below, above = _bounds(clip, log_ratio)
    ratio = jnp.clip(jnp.exp(bounded(log_ratio)), 1 - below, 1 + above)
    return scaled(lax.stop_gradient(ratio) * advantages, log_prob)


def _sapo(log_ratio: Array, log_prob: Array, advantages: Array, gate_temperature: Any = (1.0, 1.05)) -> Array:
    """(4/τ)·σ(τ·(r − 1))·A, of slope A at r = 1, with one τ for A > 0 and another for the rest."""
    good, bad = _pair(gate_temperature, log_ratio)
    for value in _two(gate_temperature):
        checks.within("gate_temperature", value, float(jnp.finfo(jnp.float32).tiny), float("inf"))
    temperature = jnp.where(advantages > 0, good, bad)
    return 4 / temperature * jax.nn.sigmoid(temperature * (jnp.exp(bounded(log_ratio)) - 1)) * advantages


OBJECTIVES: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "clipped": (_clipped, ("clip", "dual_clip")),
    "cispo": (_cispo, ("clip",)),
    "sapo": (_sapo, ("gate_temperature",)),
}


def objective(name: str, log_ratio: Array, log_prob: Array, advantages: Array, options: dict[str, Any]) -> Array:
    """That of a name, with those of the options that are given and not None."""
    checks.one_of("objective", name, tuple(OBJECTIVES))
    function, known = OBJECTIVES[name]
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in known:
            raise ValueError(f'{option}={value} is no option of objective="{name}", which has {", ".join(known)}')
    return function(log_ratio, log_prob, advantages, **given)


def _two(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _pair(value: Any, like: Array) -> tuple[Array, Array]:
    first, second = _two(value)
    return jnp.asarray(first, like.dtype), jnp.asarray(second, like.dtype)


def _bounds(clip: Any, like: Array) -> tuple[Array, Array]:
    below, above = _two(clip)
    checks.within("clip", below, 0.0, 1.0)
    checks.within("clip", above, 0.0, float("inf"))
    return _pair(clip, like)
