"""Confidence and accuracy of rows in bins: what a reliability diagram draws.

Every number here sums differences p − y of a probability and what happened, 1 or 0. Where it happened, p − 1 is
−(1 − p), and 1 − p comes from the rows without cancellation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._calibration.bins import bin_sums, equal_mass_bins, equal_width_bins
from jsoftmax._calibration.counted_rows import CountedRows, counted_rows
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.weights import shares


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


@in_any_layout("logits")
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
    return _reliability(binning_of(bins, equal_mass), counted_rows(logits, labels, axis, where, weights, ignore_index))


def binning_of(bins: int, equal_mass: bool) -> Binning:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return Binning(bins, bool(equal_mass))


@functools.partial(jax.jit, static_argnums=0)
def _reliability(binning: Binning, counted: CountedRows) -> ReliabilityBins:
    top = jnp.argmax(counted.rows.z(), axis=-1)[..., None]
    at_top = (jnp.take_along_axis(number, top, axis=-1).reshape(-1) for number in counted.differences())
    return in_bins(binning, counted, *at_top)


def in_bins(binning: Binning, counted: CountedRows, p: Array, log_p: Array, difference: Array) -> ReliabilityBins:
    if binning.equal_mass:
        # By logarithms, which tell apart what is 1 after rounding.
        places = equal_mass_bins(log_p, counted.weights.reshape(-1), binning.bins)
    else:
        places = equal_width_bins(p, binning.bins)
    weight_shares = shares(counted.weights).reshape(-1)
    share, confidence, happened, gap = (
        bin_sums(weight_shares * numbers, places, binning.bins)
        for numbers in (jnp.ones_like(p), p, jnp.round(p - difference), difference)
    )
    filled = jnp.where(share == 0, 1, share)
    return ReliabilityBins(share, confidence / filled, happened / filled, gap / filled)
