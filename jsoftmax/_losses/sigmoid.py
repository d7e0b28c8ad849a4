"""Losses of independent yes-or-no questions: one logit each, no sum over classes."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    logits, labels = checks.float_array("logits", logits), jnp.asarray(labels)
    dtype = compute_dtype(logits.dtype)
    checks.has_shape("labels", labels, logits.shape, "one answer for each logit")
    return logits.astype(dtype), labels.astype(dtype)


def _softplus(x: Array) -> Array:
    """log(1 + e^x) = −log(1 − sigmoid(x)), right for every x."""
    return jnp.logaddexp(x, 0.0)


@in_any_layout("logits")
def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""Cross-entropy of independent binary predictions, one a logit: binary and multi-label classification.

    .. math:: \mathrm{loss} = -y \log \sigma(x) - (1 - y) \log \sigma(-x), \qquad
        \frac{\partial\,\mathrm{loss}}{\partial x} = \sigma(x) - y

    Softmax over two classes with logits :math:`(x, 0)` is the same loss. A drop-in for
    `optax.sigmoid_binary_cross_entropy`.

    Args:
        logits: float array of any shape; each entry is the log-odds of yes.
        labels: array of the same shape, answers or their probabilities in [0, 1]; booleans and integers are welcome.

    Returns:
        The loss of each logit in nats: float32 for float16 and bfloat16 logits, else in the logits' dtype.

    Raises:
        TypeError: logits are not floating-point.
        ValueError: labels of another shape than logits.

    Derivatives: every mode; saves arrays of the logits' shape.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.sigmoid_binary_cross_entropy(jnp.array([0.0, -100.0]), jnp.array([1, 1])))
        [  0.6931 100.    ]

    References:
        Goodfellow, Bengio and Courville, *Deep Learning*, 2016, section 6.2.2.2.
    """
    x, y = _checked(logits, labels)
    return y * _softplus(-x) + (1 - y) * _softplus(x)


@in_any_layout("logits")
def sigmoid_focal_loss(
    logits: ArrayLike, labels: ArrayLike, *, alpha: ArrayLike | None = None, gamma: ArrayLike = 2.0
) -> Array:
    r"""Focal loss of independent binary predictions: cross-entropy in which well-classified answers count less.

    .. math:: \mathrm{loss} = \alpha_t (1 - p_t)^\gamma \cdot \text{cross-entropy}, \qquad
        1 - p_t = y\,\sigma(-x) + (1 - y)\,\sigma(x)

    A drop-in for `optax.sigmoid_focal_loss`.

    Args:
        logits: float array of any shape; each entry is the log-odds of yes.
        labels: array of the same shape, answers or their probabilities in [0, 1].
        alpha: weight of yes, 1 − alpha that of no; None for no weighting.
        gamma: the exponent, ≥ 0; 0 gives cross-entropy.

    Returns:
        The loss of each logit in nats: float32 for float16 and bfloat16 logits, else in the logits' dtype.

    Raises:
        TypeError: logits are not floating-point.
        ValueError: labels of another shape than logits, or a known alpha outside [0, 1] or gamma below 0.

    Derivatives: every mode; saves arrays of the logits' shape.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.sigmoid_focal_loss(jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0])))
        [0.1733 0.0227]

    References:
        Lin et al., *Focal Loss for Dense Object Detection*, 2017.
    """
    checks.within("gamma", gamma, 0.0, float("inf"))
    x, y = _checked(logits, labels)
    loss = _missing_power(x, y, jnp.asarray(gamma, x.dtype)) * (y * _softplus(-x) + (1 - y) * _softplus(x))
    if alpha is None:
        return loss
    checks.within("alpha", alpha, 0.0, 1.0)
    weight = jnp.asarray(alpha, x.dtype)
    return (weight * y + (1 - weight) * (1 - y)) * loss


def _log(x: Array) -> Array:
    """log x with a far but finite log 0."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), float(jnp.finfo(x.dtype).min) / 4)


def _log_missing(x: Array, y: Array) -> Array:
    """log((1 − y) σ(x) + y σ(−x)), from terms that neither underflow nor cancel."""
    return jnp.logaddexp(_log(1 - y) - _softplus(-x), _log(y) - _softplus(x))


@jax.custom_jvp
def _missing_power(x: Array, y: Array, power: Array) -> Array:
    """((1 − y) σ(x) + y σ(−x))^power, finite for any power."""
    return jnp.exp(jnp.minimum(power * _log_missing(x, y), math.log(float(jnp.finfo(x.dtype).max)) - 1))


@_missing_power.defjvp
def _missing_power_jvp(primals, tangents):
    # The base has slope (1 − 2y) σ(x) σ(−x) by x and σ(−x) − σ(x) = −tanh(x/2) by y, where y is 0 or 1 too, and the
    # logarithm of a label has none.
    (x, y, power), (x_dot, y_dot, power_dot) = primals, tangents
    out = _missing_power(x, y, power)
    base_dot = (1 - 2 * y) * jnp.exp(-_softplus(x) - _softplus(-x)) * x_dot - jnp.tanh(x / 2) * y_dot
    return out, power * _missing_power(x, y, power - 1) * base_dot + out * _log_missing(x, y) * power_dot
