"""Temperatures fitted to labels, so that confidence is what it says."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._calibration.counted_rows import CountedRows, counted_rows
from jsoftmax._calibration.minimize import minimize
from jsoftmax._losses.row_losses import CrossEntropy, row_losses
from jsoftmax._rows import checks
from jsoftmax._rows.axes import classes_back, classes_last, normalize_axes
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout

SCALINGS = ("temperature", "bias_corrected", "vector")


class Calibration(NamedTuple):
    """What `fit_temperature` returns: calibrated logits are `logits / temperature + bias`.

    Attributes:
        temperature: T, a scalar, or one number a class for vector scaling.
        bias: b, (classes,); zeros for plain temperature scaling.
        loss_before: the mean negative log-likelihood of the logits as they came, in nats.
        loss_after: the same of the calibrated logits.
    """

    temperature: Array
    bias: Array
    loss_before: Array
    loss_after: Array

    @in_any_layout("logits")
    def apply(self, logits: ArrayLike, axis: int = -1) -> Array:
        """Calibrated logits, in the shape of `logits` and in float32 at least. A logit of −∞ stays one."""
        logits = checks.float_array("logits", logits)
        axes = normalize_axes(axis, logits.ndim)
        rows = classes_last(logits, axes).astype(compute_dtype(logits.dtype))
        checks.has_shape("logits", rows, (*rows.shape[:-1], *self.bias.shape), "the classes of the fit in its axis")
        temperature, bias = (jnp.broadcast_to(x, rows.shape).astype(rows.dtype) for x in (self.temperature, self.bias))
        return classes_back(rows / temperature + bias, axes, logits.shape)


@in_any_layout("logits")
def fit_temperature(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    scaling: str = "temperature",
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    bounds: tuple[ArrayLike, ArrayLike] = (0.01, 100.0),
    bias_penalty: ArrayLike = 1e-6,
    most_steps: int = 500,
) -> Calibration:
    r"""The temperature, and if asked for the bias, at which held-out labels are most likely.

    .. math:: \min_{T, b}\; \frac{\sum_i w_i\,\bigl(-\log p_{i, y_i}\bigr)}{\sum_i w_i}
        + \frac{\lambda}{2} \lVert b \rVert^2, \qquad p_i = \mathrm{softmax}(z_i / T + b)

    In :math:`\beta = 1/T` and b this is convex, so that there is one minimum; L-BFGS finds it. Fit on rows that the
    model was not trained on. Temperature scaling changes no prediction, only how sure it is.

    Args:
        logits: float array; `axis` holds the classes, all other axes together the rows.
        labels: integers of the batch's shape.
        axis: the class axis.
        where: boolean, of the shape of `logits` or broadcasting to it, or of the batch's shape: the classes that take
            part. What it masks is never read.
        scaling: "temperature" fits one T and no bias (Guo et al. 2017); "bias_corrected" one T and a bias for each
            class (Alexandari et al. 2020); "vector" a T and a bias for each class (Guo et al. 2017).
        weights: float array of the batch's shape, a factor ≥ 0 for each row. A row of weight 0 is never looked at.
        ignore_index: rows with this label are never looked at.
        bounds: the least and the greatest T, with 1 between them. Where every row is right, no T is best: the loss
            falls all the way to T = 0, and the least T is the answer. Where logits say nothing, it is the greatest.
        bias_penalty: λ > 0. Keeps the bias finite for a class that is the label of no row, or of all, and settles that
            a constant may be added to every bias: they add up to 0.
        most_steps: the most steps of L-BFGS; about ten are usual for one T, some tens for a vector.

    Returns:
        `Calibration`: float32, or float64 for float64 logits. If no row counts, T is 1 and b is 0; if a row that counts
        holds NaN or has a label that is no class or masked, T and b are NaN. `loss_after` is not above `loss_before`.

    Raises:
        TypeError: logits are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, an unknown scaling, bounds not around 1, or a penalty that is not positive.

    Derivatives: of T, b and the losses with respect to logits, weights, bounds and penalty, by the implicit function
    theorem: every mode and order, without the steps of the search. They need the Hessian in T and b, one pass over
    the rows for each number fitted, and save the logits. Where T is at a bound, it does not depend on the rows.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> z = 2 * jax.random.normal(jax.random.key(0), (2000, 5))
        >>> labels = jax.random.categorical(jax.random.key(1), z)
        >>> fit = jsoftmax.fit_temperature(3 * z, labels)  # three times too sure
        >>> print(f"{fit.temperature:.1f}, from {fit.loss_before:.2f} to {fit.loss_after:.2f} nats")
        2.9, from 1.37 to 0.88 nats
        >>> probabilities = jsoftmax.softmax(fit.apply(3 * z))

    References:
        Guo et al., *On Calibration of Modern Neural Networks*, 2017;
        Alexandari, Kundaje and Shrikumar, *Maximum Likelihood with Bias-Corrected Calibration Is Hard-to-Beat at Label
        Shift Adaptation*, 2020.
    """
    checks.one_of("scaling", scaling, SCALINGS)
    counted = counted_rows(logits, labels, axis, where, weights, ignore_index)
    dtype = counted.rows.dtype
    smallest, largest = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
    numbers = {"bounds[0]": bounds[0], "bounds[1]": bounds[1], "bias_penalty": bias_penalty}
    ranges = ((smallest, 1.0), (1.0, largest), (smallest, largest))
    for (name, value), (least, greatest) in zip(numbers.items(), ranges, strict=True):
        checks.within(name, value, least, greatest)
        checks.has_shape(name, jnp.asarray(value), (), "one number")
    if most_steps < 1:
        raise ValueError(f"most_steps must be at least 1, got {most_steps}")
    low, high, penalty = (jnp.asarray(value, dtype) for value in numbers.values())
    return _fit(scaling, most_steps, counted, low, high, penalty)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(scaling: str, most_steps: int, counted: CountedRows, low: Array, high: Array, penalty: Array) -> Calibration:
    rows, classes = counted.rows, counted.rows.logits.shape[-1]
    z = rows.z()
    # A logit of −∞ is a mask too; what multiplies it must meet a number.
    allowed = z > -jnp.inf
    allowed |= jnp.isnan(z)
    z = jnp.where(allowed, z, 0)
    scales = classes if scaling == "vector" else 1
    biases = 0 if scaling == "temperature" else classes

    def split(numbers: Array) -> tuple[Array, Array]:
        """1/T and b. The biases' mean is taken off, which no probability sees."""
        bias = numbers[scales:]
        return numbers[:scales], bias - jnp.mean(bias) if biases else jnp.zeros(classes, z.dtype)

    def loss(numbers: Array) -> Array:
        scale, bias = (jnp.broadcast_to(number, z.shape) for number in split(numbers))
        losses = row_losses(CrossEntropy(), scale * z + bias, rows.labels, where=allowed, derivative="jvp")
        return counted.mean(losses)

    def objective(numbers: Array) -> Array:
        return loss(numbers) + penalty / 2 * jnp.sum(numbers[scales:] ** 2)

    def filled(scale: Array, bias: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(scale, scales), jnp.broadcast_to(bias, biases)])

    one, zero, infinity = (jnp.asarray(number, z.dtype) for number in (1, 0, jnp.inf))
    lower, upper = filled(1 / high, -infinity), filled(1 / low, infinity)
    # A set that no temperature is low enough for has its minimum at the bound, and flat ground before it.
    starts = jnp.stack([filled(scale, zero) for scale in (one, 1 / low, 1 / high)])
    values = jax.lax.map(objective, starts)
    start = jnp.where(jnp.isfinite(values[0]), starts[jnp.argmin(values)], jnp.nan)
    numbers = minimize(objective, jax.lax.stop_gradient(start), lower, upper, most_steps)
    scale, bias = split(numbers)
    temperature = 1 / scale if scaling == "vector" else 1 / scale[0]
    return Calibration(temperature, bias, loss(filled(one, zero)), loss(numbers))
