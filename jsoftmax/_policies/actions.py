"""Losses of actions or tokens: what all of them do with their arguments, weights and reduction."""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jsoftmax._losses.statistics import SoftmaxStatistics
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.weights import REDUCTIONS, shares

Policy = SoftmaxStatistics | ArrayLike


def log_prob_of(name: str, policy: Policy) -> Array:
    """Log-probabilities of actions, given as such or among the statistics of a policy."""
    log_prob = checks.float_array(name, policy.log_prob if isinstance(policy, SoftmaxStatistics) else policy)
    return log_prob.astype(compute_dtype(log_prob.dtype))


def entropy_of(policy: Policy, log_prob: Array) -> Array:
    """Entropies of a policy's rows, which only its statistics have."""
    if not isinstance(policy, SoftmaxStatistics):
        raise ValueError(
            "entropy_bonus needs the entropy of policy, which log-probabilities alone do not tell; give the result of "
            "softmax_statistics or linear_softmax_statistics"
        )
    return policy.entropy.astype(log_prob.dtype)


def constant_like(name: str, value: ArrayLike, log_prob: Array, meaning: str) -> Array:
    """An argument of the shape of the log-probabilities that is not differentiated."""
    array = checks.float_array(name, value)
    checks.has_shape(name, array, log_prob.shape, meaning)
    return lax.stop_gradient(array.astype(log_prob.dtype))


def checked_weights(weights: ArrayLike | None, log_prob: Array) -> Array:
    """A factor for each action; booleans are 0 and 1."""
    if weights is None:
        return jnp.ones_like(log_prob)
    weights = jnp.asarray(weights)
    weights = checks.float_array("weights", weights.astype(log_prob.dtype) if weights.dtype == bool else weights)
    checks.has_shape("weights", weights, log_prob.shape, "one factor for each log-probability of policy")
    return weights.astype(log_prob.dtype)


def silenced(weights: Array, *arrays: Array) -> tuple[Array, ...]:
    """0 in place of what has no weight: there may be NaN, of which a factor of 0 would not rid a gradient."""
    return tuple(jnp.where(weights == 0, 0, array) for array in arrays)


def reduced(losses: Array, weights: Array, reduction: str, denominator: ArrayLike | None = None) -> Array:
    """The weighted losses: as they are, their sum, or that divided by a number.

    The number is the sum of the weights (the mean is 0 if that is 0), or the denominator if there is one.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    if denominator is not None and reduction != "mean":
        raise ValueError(f'denominator={denominator} is what reduction="mean" divides by, got reduction="{reduction}"')
    if reduction == "none":
        return losses * weights
    if reduction == "sum":
        return jnp.sum(losses * weights)
    if denominator is None:
        return jnp.sum(losses * shares(weights))
    checks.within("denominator", denominator, float(jnp.finfo(jnp.float32).tiny), float("inf"))
    return jnp.sum(losses * weights) / jnp.asarray(denominator, losses.dtype)


def scaled(factor: Array, numbers: Array) -> Array:
    """Their product, where 0 · ∞ is 0: an action of probability 0 that does not count costs nothing."""
    return factor * jnp.where((factor == 0) & jnp.isinf(numbers), 0, numbers)


def log_ratio(above: Array, below: Array) -> Array:
    """log(p / q) from log p and log q; 0 where both are −∞, for an action that neither policy takes."""
    return jnp.where(jnp.isneginf(above) & jnp.isneginf(below), 0, above - below)


def most(dtype: DTypeLike) -> float:
    """The logarithm at which ratios end: of the square root of the largest number."""
    return math.log(float(jnp.finfo(dtype).max)) / 2


def bounded(log_ratio: Array) -> Array:
    """Log-ratios up to where ratios end, without slope beyond, so that no ratio overflows."""
    return jnp.minimum(log_ratio, most(log_ratio.dtype))
