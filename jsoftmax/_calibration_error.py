"""How far confidence and frequency lie apart.

Every measure here sums differences p − y of a probability and what happened, 1 or 0. Where it happened, p − 1 is
−(1 − p), and 1 − p comes from the core without cancellation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax import _checks
from jsoftmax._axes import Axis
from jsoftmax._bins import bin_sums, binned_norm, equal_mass_bins, equal_width_bins
from jsoftmax._counted import CountedRows, counted_rows


class ReliabilityBins(NamedTuple):
    """Rows in bins of their confidence; each `(bins,)`, and 0 in a bin without rows.

    Attributes:
        share: of the rows' weight, what is in the bin.
        confidence: the mean of the largest probability.
        accuracy: the share of rows whose label has the largest logit.
        difference: confidence − accuracy, with the digits that the subtraction would lose.
    """

    share: Array
    confidence: Array
    accuracy: Array
    difference: Array


class Binning(NamedTuple):
    """What is known when the program is traced."""

    bins: int
    equal_mass: bool


def reliability_bins(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    bins: int = 15,
    equal_mass: bool = False,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
) -> ReliabilityBins:
    r"""Confidence and accuracy in bins of confidence: what a reliability diagram draws.

    Confidence is a row's largest probability. Bin b goes from :math:`(b - 1)/B` to :math:`b/B`, its upper end included;
    or bins hold equal numbers of rows.

    Args:
        logits: float array; `axis` holds the classes, all other axes together the rows. Of probabilities, take the
            logarithm: softmax of log p is p.
        labels: integers of the batch's shape.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`. Rows without any class are not counted.
        bins: their number, B.
        equal_mass: whether bins hold equal numbers of rows (sums of weights) instead of being equally wide. The row in
            place r of N by confidence is in bin :math:`\lceil B\,(r - 1/2) / N \rceil`; equal confidences share the
            middle of their places, so that the order of the rows is of no consequence.
        weights: float array of the batch's shape, a factor ≥ 0 for each row. A row of weight 0 is never looked at.
        ignore_index: rows with this label are never looked at.

    Returns:
        `ReliabilityBins`, float32, or float64 for float64 logits. A row that counts makes its bin NaN if it holds NaN
        or if its label is no class.

    Raises:
        TypeError: logits are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, no class, or fewer than 1 bin.

    Derivatives: every mode, with the bins held fixed: there are jumps where a row moves to another bin.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> p = jnp.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
        >>> found = jsoftmax.reliability_bins(jnp.log(p), jnp.array([0, 1, 1]), bins=4)
        >>> jnp.set_printoptions(precision=2)
        >>> print(found.share, found.difference)
        [0.   0.   0.33 0.67] [ 0.   0.  -0.4  0.4]

    References:
        DeGroot and Fienberg, *The Comparison and Evaluation of Forecasters*, 1983.
    """
    return _reliability(_binning(bins, equal_mass), counted_rows(logits, labels, axis, where, weights, ignore_index))


def expected_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    bins: int = 15,
    order: float | int = 1,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
) -> Array:
    r"""How far confidence and accuracy lie apart, over bins of confidence of equal width.

    .. math:: \mathrm{ECE} = \Bigl(\sum_b m_b\,\bigl|\mathrm{confidence}_b - \mathrm{accuracy}_b\bigr|^q
        \Bigr)^{1/q}

    Confidence is a row's largest probability, and :math:`m_b` the share of the rows in bin b, as in `reliability_bins`.

    Args:
        logits: float array; `axis` holds the classes, all other axes together the rows. Of probabilities, take the
            logarithm.
        labels: integers of the batch's shape.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`.
        bins: their number.
        order: q, at least 1; 2 weighs large differences more, and infinity gives the largest difference of any bin that
            holds a row, the maximum calibration error.
        weights: float array of the batch's shape, a factor ≥ 0 for each row. A row of weight 0 is never looked at.
        ignore_index: rows with this label are never looked at.

    Returns:
        A scalar from 0 to 1, float32, or float64 for float64 logits; 0 if no row counts. A row that counts makes it NaN
        if it holds NaN or if its label is no class.

    Raises:
        TypeError: logits are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, fewer than 1 bin, or an order below 1.

    Derivatives: every mode, with the bins held fixed; there are jumps where a row moves to another bin.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> p = jnp.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
        >>> print(f"{jsoftmax.expected_calibration_error(jnp.log(p), jnp.array([0, 1, 1, 0])):.3f}")
        0.300

    References:
        Naeini, Cooper and Hauskrecht, *Obtaining Well Calibrated Probabilities Using Bayesian Binning*, 2015;
        Guo et al., *On Calibration of Modern Neural Networks*, 2017.
    """
    options: dict = {"bins": bins, "weights": weights, "ignore_index": ignore_index}
    found = reliability_bins(logits, labels, axis, where, equal_mass=False, **options)
    return binned_norm(found.share, found.difference, _checked_order(order))


def adaptive_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    bins: int = 15,
    order: float | int = 1,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
) -> Array:
    r"""`expected_calibration_error` over bins that hold equal numbers of rows instead of being equally wide.

    Most rows of a trained classifier have a confidence near 1, where bins of equal width are coarse.

    Args:
        logits: float array; `axis` holds the classes. Of probabilities, take the logarithm.
        labels: integers of the batch's shape.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`.
        bins: their number, B.
        order: q, as in `expected_calibration_error`.
        weights: float array of the batch's shape; bins hold equal sums of weights then.
        ignore_index: rows with this label are never looked at.

    Returns:
        A scalar from 0 to 1, as `expected_calibration_error`.

    Raises:
        TypeError: logits are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, fewer than 1 bin, or an order below 1.

    Derivatives: every mode, with the bins held fixed.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> p = jnp.array([[0.99, 0.01], [0.98, 0.02], [0.97, 0.03], [0.96, 0.04]])
        >>> print(f"{jsoftmax.adaptive_calibration_error(jnp.log(p), jnp.array([0, 0, 0, 1]), bins=2):.3f}")
        0.240

    References:
        Nguyen and O'Connor, *Posterior Calibration and Exploratory Analysis for Natural Language Processing Models*,
        2015; Nixon et al., *Measuring Calibration in Deep Learning*, 2019.
    """
    options: dict = {"bins": bins, "weights": weights, "ignore_index": ignore_index}
    found = reliability_bins(logits, labels, axis, where, equal_mass=True, **options)
    return binned_norm(found.share, found.difference, _checked_order(order))


def classwise_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    bins: int = 15,
    order: float | int = 1,
    equal_mass: bool = False,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
) -> Array:
    r"""How far each class's probability and its frequency lie apart, averaged over the classes.

    .. math:: \frac{1}{K} \sum_k \Bigl(\sum_b m_{bk}\,\bigl|\mathrm{mean\ of\ } p_k -
        \mathrm{frequency\ of\ } k\bigr|_{bk}^q\Bigr)^{1/q}

    For each class k all rows are put into bins by :math:`p_k`. The expected calibration error looks at the largest
    probability alone; this one at all of them.

    Args:
        logits: float array; `axis` holds the classes. Of probabilities, take the logarithm.
        labels: integers of the batch's shape.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`. A masked class has probability 0 in its row.
        bins: their number for each class, B.
        order: q, as in `expected_calibration_error`.
        equal_mass: whether bins hold equal numbers of rows, as in `adaptive_calibration_error`, instead of being
            equally wide.
        weights: float array of the batch's shape, a factor ≥ 0 for each row.
        ignore_index: rows with this label are never looked at.

    Returns:
        A scalar from 0 to 1, as `expected_calibration_error`.

    Raises:
        TypeError: logits are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, fewer than 1 bin, or an order below 1.

    Derivatives: every mode, with the bins held fixed.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> p = jnp.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
        >>> print(f"{jsoftmax.classwise_calibration_error(jnp.log(p), jnp.array([0, 1])):.3f}")
        0.133

    References:
        Kull et al., *Beyond Temperature Scaling: Obtaining Well-Calibrated Multi-Class Probabilities with Dirichlet
        Calibration*, 2019; Nixon et al., *Measuring Calibration in Deep Learning*, 2019 (with `equal_mass`).
    """
    counted = counted_rows(logits, labels, axis, where, weights, ignore_index)
    return _classwise_error(_binning(bins, equal_mass), _checked_order(order), counted)


def _binning(bins: int, equal_mass: bool) -> Binning:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return Binning(bins, bool(equal_mass))


def _checked_order(order: float | int) -> float:
    _checks.within("order", order, 1.0, float("inf"))
    return float(order)


@functools.partial(jax.jit, static_argnums=0)
def _reliability(binning: Binning, counted: CountedRows) -> ReliabilityBins:
    top = jnp.argmax(counted.rows.z(), axis=-1)[..., None]
    at_top = (jnp.take_along_axis(number, top, axis=-1).reshape(-1) for number in counted.differences())
    return _in_bins(binning, counted, *at_top)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _classwise_error(binning: Binning, order: float, counted: CountedRows) -> Array:
    def of_class(numbers: tuple[Array, Array, Array]) -> Array:
        found = _in_bins(binning, counted, *numbers)
        return binned_norm(found.share, found.difference, order)

    rows_of_classes = tuple(number.reshape(-1, number.shape[-1]).T for number in counted.differences())
    return jnp.mean(jax.lax.map(of_class, rows_of_classes))


def _in_bins(binning: Binning, counted: CountedRows, p: Array, log_p: Array, difference: Array) -> ReliabilityBins:
    if binning.equal_mass:
        # By logarithms, which tell apart what is 1 after rounding.
        places = equal_mass_bins(log_p, counted.weights.reshape(-1), binning.bins)
    else:
        places = equal_width_bins(p, binning.bins)
    shares = counted.shares().reshape(-1)
    share, confidence, happened, gap = (
        bin_sums(shares * numbers, places, binning.bins)
        for numbers in (jnp.ones_like(p), p, jnp.round(p - difference), difference)
    )
    filled = jnp.where(share == 0, 1, share)
    return ReliabilityBins(share, confidence / filled, happened / filled, gap / filled)
