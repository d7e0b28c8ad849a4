"""Brier's score: the squared distance of probabilities from what happened."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._calibration.counted_rows import CountedRows, counted_rows
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.layouts import in_any_layout


@in_any_layout("logits")
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
