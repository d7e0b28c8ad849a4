"""Distances between whole distributions over classes, and the smoothing of labels."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis, class_count, normalize_axes
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.shards import AxisName, class_shards


@in_any_layout("log_predictions")
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
    log_p = checks.float_array("log_predictions", log_predictions)
    t = checks.float_array("targets", targets)
    checks.has_shape("targets", t, log_p.shape, "one probability for each prediction")
    dtype = compute_dtype(log_p.dtype)
    log_p, t = log_p.astype(dtype), t.astype(dtype)
    counts = t != 0
    if where is not None:
        counts &= jnp.broadcast_to(checks.bool_array("where", where), t.shape)
    t = jnp.where(counts, t, 1)
    each = jnp.where(counts, t * (jnp.log(t) - jnp.where(counts, log_p, 0)), 0)
    return class_shards(axis_name).sum(jnp.sum(each, axis=normalize_axes(axis, t.ndim)))


@in_any_layout("labels")
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
    labels = checks.float_array("labels", labels)
    checks.within("alpha", alpha, 0.0, 1.0)
    alpha = jnp.asarray(alpha, labels.dtype)
    axes, shards = normalize_axes(axis, labels.ndim), class_shards(axis_name)
    if where is None:
        return (1 - alpha) * labels + alpha / shards.count(class_count(labels.shape, axes))
    allowed = jnp.broadcast_to(checks.bool_array("where", where), labels.shape)
    count = jnp.maximum(shards.sum(jnp.sum(allowed, axis=axes, keepdims=True, dtype=labels.dtype)), 1)
    return jnp.where(allowed, (1 - alpha) * labels + alpha / count, 0)
