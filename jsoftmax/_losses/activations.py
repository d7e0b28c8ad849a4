"""softmax, log_softmax and logsumexp."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows.axes import Axis, classes_back, normalize_axes
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import LogitOptions, checked_rows
from jsoftmax._rows.probabilities import Shares, row_shares
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.shards import AxisName
from jsoftmax._rows.statistics import Config, row_statistics


@in_any_layout("logits")
def softmax(
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    r"""Probabilities in proportion to the exponentials of the logits.

    .. math:: p_j = \frac{e^{z_j / T}}{\sum_k e^{z_k / T}}, \qquad
        \frac{\partial p_i}{\partial z_j} = \frac{p_i\,(\delta_{ij} - p_j)}{T}

    Adding a constant to a row changes nothing, and equal logits get equal probabilities to the last bit. For two
    classes with logits :math:`(x, 0)` this is the sigmoid of x.

    Args:
        logits: float array; `axis` holds the classes.
        axis: the class axis, or a tuple of axes that together hold the classes.
        where: boolean, of the shape of `logits` or broadcasting to it, or of the batch's shape: the classes that take
            part. What it masks is never read and gets probability 0; so does a row without any class.
        temperature: T, a number, traced if need be, or one a row; differentiable. At 0, the largest logits share all
            probability evenly.
        axis_name: inside `shard_map`, the mesh axis (or axes) over which the classes are split; see `LogitOptions`.

    Returns:
        An array of the shape and dtype of `logits`, computed in float32 at least and rounded once. A logit of −∞ counts
        as masked; a row with a NaN or +∞, or of nothing but −∞, is NaN.

    Raises:
        TypeError: logits are not floating-point, or `where` is not boolean.
        ValueError: an axis out of range, or a known temperature below 0.

    Derivatives: every mode and order. Saves the logits and the result.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.softmax(jnp.array([2.0, 1.0, 0.1])))
        [0.659  0.2424 0.0986]
        >>> print(jsoftmax.softmax(jnp.array([1e9, 1e9, -jnp.inf])))
        [0.5 0.5 0. ]

    References:
        Bridle, *Probabilistic Interpretation of Feedforward Classification Network Outputs*, 1990;
        Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015 (temperature).
    """
    return _activation("p", logits, axis, where, {"temperature": temperature, "axis_name": axis_name})


@in_any_layout("logits")
def log_softmax(
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    r"""Logarithms of softmax, right at the largest logit too.

    .. math:: \log p_j = (z_j - m) - \log\Bigl(1 + \sum_{k \ne \arg\max} e^{z_k - m}\Bigr), \qquad m = \max_k z_k

    The usual form :math:`z_j - \log \sum_k e^{z_k}` returns 0 for a confident row's largest entry; this one returns
    :math:`-e^{-80}` when that is the answer.

    Args:
        logits: float array; `axis` holds the classes.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`; the others get −∞.
        temperature: divides the logits, as in `softmax`.
        axis_name: the mesh axes over which the classes are split, as in `softmax`.

    Returns:
        An array of the shape and dtype of `logits`, in nats, computed in float32 at least and rounded once.

    Raises:
        TypeError: logits are not floating-point, or `where` is not boolean.
        ValueError: an axis out of range, or a known temperature below 0.

    Derivatives: every mode and order. Saves the logits.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.log_softmax(jnp.array([20.0, 0.0, 0.0])))
        [-4.1223e-09 -2.0000e+01 -2.0000e+01]
    """
    return _activation("log_p", logits, axis, where, {"temperature": temperature, "axis_name": axis_name})


@in_any_layout("logits")
def logsumexp(
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName = None,
) -> Array:
    r"""The logarithm of the sum of the exponentials of the logits: a smooth maximum.

    .. math:: \mathrm{logsumexp}(z) = m + \log\Bigl(1 + \sum_{k \ne \arg\max} e^{z_k - m}\Bigr), \qquad
        \frac{\partial\,\mathrm{logsumexp}}{\partial z_j} = p_j

    Args:
        logits: float array; `axis` holds the classes.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`.
        temperature: divides the logits, as in `softmax`.
        axis_name: the mesh axes over which the classes are split, as in `softmax`.

    Returns:
        An array of the batch's shape and the dtype of `logits`, in nats. A row without any class, or of nothing but −∞,
        gives −∞; one with +∞ gives +∞.

    Raises:
        TypeError: logits are not floating-point, or `where` is not boolean.
        ValueError: an axis out of range, or a known temperature below 0.

    Derivatives: every mode and order. Saves the logits and O(rows) numbers.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(f"{jsoftmax.logsumexp(jnp.array([1000.0, 1000.0])):.3f}")
        1000.693

    References:
        Blanchard, Higham and Higham, *Accurately Computing the Log-Sum-Exp and Softmax Functions*, 2021.
    """
    rows = checked_rows(logits, None, axis, where, {"temperature": temperature, "axis_name": axis_name})
    if rows.logits.shape[-1] == 0:
        return jnp.full(rows.logits.shape[:-1], -jnp.inf, rows.logits.dtype)
    return _logsumexp(rows).astype(rows.logits.dtype)


def _activation(field: str, logits: ArrayLike, axis: Axis, where: ArrayLike | None, options: LogitOptions) -> Array:
    rows = checked_rows(logits, None, axis, where, options)
    logits = jnp.asarray(logits)
    if logits.size == 0:
        return logits
    out = getattr(_shares(rows), field).astype(logits.dtype)
    return classes_back(out, normalize_axes(axis, logits.ndim), logits.shape)


@jax.jit
def _shares(rows: Rows) -> Shares:
    return row_shares(rows)


@jax.jit
def _logsumexp(rows: Rows) -> Array:
    return row_statistics(rows, Config(want=("logsumexp",), derivative="jvp")).logsumexp
