"""Cross-entropy on logits, and its relatives that reshape −log p_y."""

import dataclasses
from typing import Any, Unpack

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._losses.row_losses import CrossEntropy, LossOptions, row_losses, with_parameters
from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout


@in_any_layout("logits")
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[LossOptions],
) -> Array:
    r"""Cross-entropy between softmax of the logits and dense labels, such as one-hot rows or a teacher's probabilities.

    .. math:: \mathrm{loss} = -\sum_j y_j \log p_j, \qquad p = \mathrm{softmax}(z), \qquad
        \frac{\partial\,\mathrm{loss}}{\partial z_j} = p_j \sum_i y_i - y_j

    Right to a few units in the last place however confident the row: no sum holds the largest class, so that
    nothing cancels. A drop-in for `optax.softmax_cross_entropy`.

    Args:
        logits: float array; the axis (or axes) `axis` holds the classes.
        labels: float array of the same shape, non-negative; need not sum to one. Differentiable.
        axis: the class axis, or a tuple of axes that together number the classes.
        where: boolean, of the shape of `logits` or broadcasting to it, or of the batch's shape: the classes that take
            part. What it masks is never read; a row without any class gives 0.
        **options: see `LossOptions`: `temperature`, `softcap`, `label_smoothing`, `smoothing`, `z_loss`,
            `class_weights`, `logit_adjustment`, `derivative`, `implementation`.

    Returns:
        The loss of each row in nats, of the batch's shape: float32 for float16 and bfloat16 logits, else in the logits'
        dtype. A logit of −∞ counts as masked; a NaN or +∞ makes its own row NaN.

    Raises:
        TypeError: logits or labels are not floating-point.
        ValueError: labels of another shape than logits, no class, or an option out of range.

    Derivatives: reverse mode and forward over reverse, any order with `derivative="jvp"`. Saves the logits, the labels
    and O(rows) numbers; no array of probabilities.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> logits = jnp.array([[1.2, -0.8, -0.5], [20.0, 0.0, 0.0]])
        >>> labels = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
        >>> print(jsoftmax.softmax_cross_entropy(logits, labels))
        [2.7613e-01 4.1223e-09]

    References:
        Goodfellow, Bengio and Courville, *Deep Learning*, 2016, sections 4.1 and 6.2.2.
    """
    return row_losses(CrossEntropy(), logits, checks.float_array("labels", labels), axis, where, **options)


@in_any_layout("logits")
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[LossOptions],
) -> Array:
    r"""Cross-entropy between softmax of the logits and the class that each label names.

    .. math:: \mathrm{loss} = -\log p_y = \log \sum_j e^{z_j} - z_y, \qquad
        \frac{\partial\,\mathrm{loss}}{\partial z_j} = p_j - [j = y]

    Computed as :math:`(m - z_y) + \log(1 + \sum_{j \ne k} e^{z_j - m})` with :math:`z_k = m` the largest logit. The
    usual form returns 0 for a confident row; this one returns :math:`e^{-80}` when that is the answer. A drop-in for
    `optax.softmax_cross_entropy_with_integer_labels`.

    Args:
        logits: float array; the axis (or axes) `axis` holds the classes.
        labels: integers of the batch's shape. One that is no class, a negative one included, makes its row NaN.
        axis: the class axis, or a tuple of axes whose flat index the labels are.
        where: boolean, of the shape of `logits` or broadcasting to it, or of the batch's shape: the classes that take
            part. What it masks is never read; a label that it masks gives +∞, a row without any class 0.
        **options: see `LossOptions`: `temperature`, `softcap`, `label_smoothing`, `smoothing`, `z_loss`,
            `class_weights`, `ignore_index`, `margin`, `angular_margin`, `logit_adjustment`, `derivative`,
            `implementation`.

    Returns:
        The loss of each row in nats, of the batch's shape: float32 for float16 and bfloat16 logits, else in the logits'
        dtype. Never negative without `z_loss` and class weights below 0. A logit of −∞ counts as masked; a NaN or +∞
        makes its own row NaN.

    Raises:
        TypeError: logits that are not floating-point, labels that are not integers.
        ValueError: labels that would have to broadcast, no class, or an option out of range.

    Derivatives: reverse mode and forward over reverse, any order with `derivative="jvp"`. Saves the logits and O(rows)
    numbers; no array of probabilities.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> logits, labels = jnp.array([[1.2, -0.8, -0.5], [20.0, 0.0, 0.0]]), jnp.array([0, 0])
        >>> print(jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels))
        [2.7613e-01 4.1223e-09]
        >>> loss = lambda z: jsoftmax.softmax_cross_entropy_with_integer_labels(z, labels, label_smoothing=0.1).mean()
        >>> print(jax.grad(loss)(logits).shape)
        (2, 3)

    References:
        Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, 2016 (label smoothing);
        Chowdhery et al., *PaLM*, 2022 (z-loss).
    """
    return row_losses(CrossEntropy(), logits, checks.integer_array("labels", labels), axis, where, **options)


@with_parameters
@dataclasses.dataclass(frozen=True)
class Focal:
    """(1 − p_y)^γ · −log p_y."""

    gamma: Any

    def __call__(self, log_prob: Array) -> Array:
        missing = -jnp.expm1(log_prob)
        # Where nothing is missing the loss is 0, and the power's derivative must not be infinity times 0.
        some = missing > 0
        power = jnp.where(some, jnp.where(some, missing, 1) ** self.gamma, 0)
        return power * (0.0 - log_prob)


@in_any_layout("logits")
def softmax_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    gamma: ArrayLike = 2.0,
    **options: Unpack[LossOptions],
) -> Array:
    r"""Focal loss over classes that exclude each other: cross-entropy in which well-classified rows count less.

    .. math:: \mathrm{loss} = (1 - p_y)^\gamma\,(-\log p_y)

    :math:`1 - p_y` keeps its relative accuracy as :math:`p_y \to 1`. Dense labels give
    :math:`\sum_j y_j (1 - p_j)^\gamma (-\log p_j)`. `gamma=0` is cross-entropy. Label smoothing adds its share of plain
    cross-entropy to the uniform target.

    Args:
        logits: float array; `axis` holds the classes.
        labels: integers of the batch's shape, or floats of the shape of `logits`.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax_cross_entropy`.
        gamma: the exponent, ≥ 0; may be traced.
        **options: see `LossOptions`. Per-class α of the paper is `class_weights`.

    Returns:
        The loss of each row in nats, of the batch's shape, float32 for narrower logits.

    Raises:
        TypeError: logits that are not floating-point.
        ValueError: a shape that does not fit, no class, or an option out of range.

    Derivatives: as `softmax_cross_entropy`; dense labels save one array of log-probabilities.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.softmax_focal_loss(jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0])))
        [0.0018 0.1733]

    References:
        Lin et al., *Focal Loss for Dense Object Detection*, 2017.
    """
    checks.within("gamma", gamma, 0.0, float("inf"))
    return row_losses(Focal(_number(gamma, logits)), logits, labels, axis, where, **options)


@with_parameters
@dataclasses.dataclass(frozen=True)
class Poly:
    """−log p_y + ε (1 − p_y)."""

    epsilon: Any

    def __call__(self, log_prob: Array) -> Array:
        return 0.0 - log_prob - self.epsilon * jnp.expm1(log_prob)


@in_any_layout("logits")
def poly_loss_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: ArrayLike = 2.0,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[LossOptions],
) -> Array:
    r"""PolyLoss: cross-entropy with the first coefficient of its expansion in :math:`1 - p_y` changed.

    .. math:: \mathrm{loss} = -\log p_y + \epsilon\,(1 - p_y)

    Dense labels give :math:`\sum_j y_j (-\log p_j + \epsilon (1 - p_j))`. A drop-in for
    `optax.poly_loss_cross_entropy`, which takes dense labels only.

    Args:
        logits: float array; `axis` holds the classes.
        labels: integers of the batch's shape, or floats of the shape of `logits`.
        epsilon: the coefficient; the paper has 2 for ImageNet, −1 for detection. May be traced.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax_cross_entropy`.
        **options: see `LossOptions`.

    Returns:
        The loss of each row in nats, of the batch's shape, float32 for narrower logits.

    Raises:
        TypeError: logits that are not floating-point.
        ValueError: a shape that does not fit, no class, or an option out of range.

    Derivatives: as `softmax_cross_entropy`; dense labels save one array of log-probabilities.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.poly_loss_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]), epsilon=1.0))
        [1.1931]

    References:
        Leng et al., *PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions*, 2022.
    """
    return row_losses(Poly(_number(epsilon, logits)), logits, labels, axis, where, **options)


def _number(value: ArrayLike, logits: ArrayLike) -> Array:
    return jnp.asarray(value, compute_dtype(checks.float_array("logits", logits).dtype))
