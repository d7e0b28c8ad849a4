"""How far confidence and frequency lie apart."""

import functools
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._calibration.bins import binned_norm
from jsoftmax._calibration.counted_rows import CountedRows, counted_rows
from jsoftmax._calibration.reliability import Binning, binning_of, in_bins, reliability_bins
from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.layouts import in_any_layout


class CalibrationOptions(TypedDict, total=False):
    """Options of all calibration errors.

    bins: their number B, 15 if left out.
    order: q, at least 1, which is the default; 2 weighs large differences more, and infinity gives the largest
        difference of any bin that holds a row, the maximum calibration error.
    weights: float array of the batch's shape, a factor ≥ 0 for each row. A row of weight 0 is never looked at.
    ignore_index: rows with this label are never looked at.
    """

    bins: int
    order: float
    weights: ArrayLike | None
    ignore_index: int | None


@in_any_layout("logits")
def expected_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[CalibrationOptions],
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
        **options: see `CalibrationOptions`: `bins`, `order`, `weights`, `ignore_index`.

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
    return _confidence_error(logits, labels, axis, where, False, options)


@in_any_layout("logits")
def adaptive_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[CalibrationOptions],
) -> Array:
    r"""`expected_calibration_error` over bins that hold equal numbers of rows instead of being equally wide.

    Most rows of a trained classifier have a confidence near 1, where bins of equal width are coarse.

    Args:
        logits: float array; `axis` holds the classes. Of probabilities, take the logarithm.
        labels: integers of the batch's shape.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax`.
        **options: see `CalibrationOptions`. Bins hold equal sums of the `weights`.

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
    return _confidence_error(logits, labels, axis, where, True, options)


@in_any_layout("logits")
def classwise_calibration_error(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    equal_mass: bool = False,
    **options: Unpack[CalibrationOptions],
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
        equal_mass: whether bins hold equal numbers of rows, as in `adaptive_calibration_error`, instead of being
            equally wide.
        **options: see `CalibrationOptions`; the bins are those of each class.

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
    bins, order, counting = _checked(options)
    return _classwise_error(binning_of(bins, equal_mass), order, counted_rows(logits, labels, axis, where, **counting))


def _confidence_error(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    equal_mass: bool,
    options: CalibrationOptions,
) -> Array:
    bins, order, counting = _checked(options)
    found = reliability_bins(logits, labels, axis, where, bins=bins, equal_mass=equal_mass, **counting)
    return binned_norm(found.share, found.difference, order)


def _checked(options: CalibrationOptions) -> tuple[int, float, dict[str, Any]]:
    """bins and order, and the options that say which rows count."""
    checks.only_options(options, CalibrationOptions)
    order = options.get("order", 1.0)
    checks.within("order", order, 1.0, float("inf"))
    return options.get("bins", 15), float(order), {name: options.get(name) for name in ("weights", "ignore_index")}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _classwise_error(binning: Binning, order: float, counted: CountedRows) -> Array:
    def of_class(numbers: tuple[Array, Array, Array]) -> Array:
        found = in_bins(binning, counted, *numbers)
        return binned_norm(found.share, found.difference, order)

    rows_of_classes = tuple(number.reshape(-1, number.shape[-1]).T for number in counted.differences())
    return jnp.mean(jax.lax.map(of_class, rows_of_classes))
