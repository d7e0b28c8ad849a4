"""Distances between whole distributions over classes, and the smoothing of labels."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax import _checks
from jsoftmax._axes import Axis, class_count, normalize_axes
from jsoftmax._counted import CountedRows, counted_rows
from jsoftmax._dtypes import compute_dtype
from jsoftmax._shards import AxisName, class_shards


def kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    axis_name: AxisName = None,
) -> Array:
    r"""Kullback–Leibler divergence of predictions, given as logarithms, from target probabilities.

    .. math:: \mathrm{KL}(t \,\|\, p) = \sum_j t_j\,(\log t_j - \log p_j)

    A class with target 0 counts nothing, even where its prediction is −∞. A drop-in for `optax.kl_divergence`.

    Args:
        log_predictions: float array of log-probabilities, from `log_softmax` say.
        targets: float array of probabilities of the same shape. Differentiable.
        axis: the class axis or axes.
        where: boolean, broadcasting to the shape of the predictions: the entries that count.
        axis_name: inside `shard_map`, the mesh axis (or axes) over which the classes are split.

    Returns:
        The divergence of each row in nats, of the batch's shape: float32 for narrower predictions.

    Raises:
        TypeError: predictions or targets are not floating-point, or `where` is not boolean.
        ValueError: targets of another shape than the predictions.

    Derivatives: every mode; saves arrays of the predictions' shape.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.kl_divergence(jnp.log(jnp.array([0.5, 0.5])), jnp.array([1.0, 0.0])))
        0.6931472

    References:
        Kullback and Leibler, *On Information and Sufficiency*, 1951.
    """
    log_p = _checks.float_array("log_predictions", log_predictions)
    t = _checks.float_array("targets", targets)
    _checks.has_shape("targets", t, log_p.shape, "one probability for each prediction")
    dtype = compute_dtype(log_p.dtype)
    log_p, t = log_p.astype(dtype), t.astype(dtype)
    counts = t != 0
    if where is not None:
        counts &= jnp.broadcast_to(_checks.bool_array("where", where), t.shape)
    t = jnp.where(counts, t, 1)
    each = jnp.where(counts, t * (jnp.log(t) - jnp.where(counts, log_p, 0)), 0)
    return class_shards(axis_name).sum(jnp.sum(each, axis=normalize_axes(axis, t.ndim)))


def smooth_labels(
    labels: ArrayLike,
    alpha: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""Dense labels with the share alpha of their mass spread evenly over all K classes.

    .. math:: y'_j = (1 - \alpha)\,y_j + \alpha / K

    The losses do the same without such an array, `label_smoothing=alpha`. A drop-in for `optax.smooth_labels`.

    Args:
        labels: float array of probabilities, one-hot rows say.
        alpha: the share, in [0, 1]; may be traced.
        axis: the class axis or axes.
        where: boolean, broadcasting to the shape of `labels`: the classes that take part and are counted in K.
        axis_name: inside `shard_map`, the mesh axis (or axes) over which the classes are split.

    Returns:
        An array of the shape and dtype of `labels`; 0 in the classes that `where` masks.

    Raises:
        TypeError: labels are not floating-point, or `where` is not boolean.
        ValueError: a known alpha outside [0, 1].

    Derivatives: every mode.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.smooth_labels(jnp.array([0.0, 1.0]), 0.1))
        [0.05 0.95]

    References:
        Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, 2016.
    """
    labels = _checks.float_array("labels", labels)
    _checks.within("alpha", alpha, 0.0, 1.0)
    alpha = jnp.asarray(alpha, labels.dtype)
    axes, shards = normalize_axes(axis, labels.ndim), class_shards(axis_name)
    if where is None:
        return (1 - alpha) * labels + alpha / shards.count(class_count(labels.shape, axes))
    allowed = jnp.broadcast_to(_checks.bool_array("where", where), labels.shape)
    count = jnp.maximum(shards.sum(jnp.sum(allowed, axis=axes, keepdims=True, dtype=labels.dtype)), 1)
    return jnp.where(allowed, (1 - alpha) * labels + alpha / count, 0)


def brier_score(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
) -> Array:
    r"""The squared distance of each row's probabilities from its one-hot label.

    .. math:: \mathrm{score} = \sum_j (p_j - y_j)^2 = (1 - p_y)^2 + \sum_{j \ne y} p_j^2

    From 0 to 2. Its mean over rows is Brier's score; for two classes some halve it, scikit-learn by default. It is
    smallest on average for the true probabilities, as cross-entropy is. :math:`1 - p_y` keeps its digits as
    :math:`p_y \to 1`, so that a confident row has a score of :math:`2 e^{-2g}` and not 0.

    Args:
        logits: float array; `axis` holds the classes. Of probabilities, take the logarithm.
        labels: integers of the batch's shape.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`; a row without any class gives 0.
        ignore_index: rows with this label give score 0 and gradient 0.

    Returns:
        The score of each row, of the batch's shape: float32, or float64 for float64 logits. NaN where a row holds NaN
        or its label is no class.

    Raises:
        TypeError: logits are not floating-point, labels are not integers.
        ValueError: labels that would have to broadcast, or no class.

    Derivatives: every mode and order. Saves the logits and the probabilities.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> logits = jnp.array([[0.0, 0.0], [20.0, 0.0]])
        >>> print(jsoftmax.brier_score(logits, jnp.array([0, 0])))
        [5.0000e-01 8.4967e-18]

    References:
        Brier, *Verification of Forecasts Expressed in Terms of Probability*, 1950.
    """
    return _brier_score(counted_rows(logits, labels, axis, where, None, ignore_index))


@jax.jit
def _brier_score(counted: CountedRows) -> Array:
    _, _, differences = counted.differences()
    return jnp.where(counted.weights == 0, 0, jnp.sum(differences**2, axis=-1))
