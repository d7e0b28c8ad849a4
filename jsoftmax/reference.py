"""Textbook formulas, one line each, for tests, benchmarks and the verifier.

They are what papers print, differentiated by JAX itself: clear, and right in float64 as long as no probability is
nearly 1. Nothing here is used by the library, and nothing of the library is used here.
"""

import jax
import jax.numpy as jnp
from jax import Array


def logsumexp(logits: Array) -> Array:
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1)) + largest[..., 0]


def log_softmax(logits: Array) -> Array:
    return logits - logsumexp(logits)[..., None]


def softmax(logits: Array) -> Array:
    return jnp.exp(log_softmax(logits))


def one_hot(labels: Array, logits: Array) -> Array:
    """Labels as distributions over classes: integers one-hot, floats as they are."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return labels.astype(logits.dtype)


def cross_entropy(logits: Array, labels: Array) -> Array:
    return -jnp.sum(one_hot(labels, logits) * log_softmax(logits), axis=-1)


def cross_entropy_gradient(logits: Array, labels: Array) -> Array:
    """ŷ − y."""
    return softmax(logits) - one_hot(labels, logits)


def smoothed_cross_entropy(logits: Array, labels: Array, label_smoothing: float) -> Array:
    target = (1 - label_smoothing) * one_hot(labels, logits) + label_smoothing / logits.shape[-1]
    return cross_entropy(logits, target)


def focal_loss(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    log_p = log_softmax(logits)
    return -jnp.sum(one_hot(labels, logits) * (1 - jnp.exp(log_p)) ** gamma * log_p, axis=-1)


def poly_loss(logits: Array, labels: Array, epsilon: float = 2.0) -> Array:
    missing = jnp.sum(one_hot(labels, logits) * (1 - softmax(logits)), axis=-1)
    return cross_entropy(logits, labels) + epsilon * missing


def entropy(logits: Array) -> Array:
    return -jnp.sum(softmax(logits) * log_softmax(logits), axis=-1)


def kl_divergence(log_predictions: Array, targets: Array) -> Array:
    return jnp.sum(targets * (jnp.log(targets) - log_predictions), axis=-1)


def sigmoid_cross_entropy(logits: Array, labels: Array) -> Array:
    return labels * jnp.log1p(jnp.exp(-logits)) + (1 - labels) * jnp.log1p(jnp.exp(logits))


def sigmoid_focal_loss(logits: Array, labels: Array, gamma: float = 2.0) -> Array:
    missing = labels / (1 + jnp.exp(logits)) + (1 - labels) / (1 + jnp.exp(-logits))
    return missing**gamma * sigmoid_cross_entropy(logits, labels)
