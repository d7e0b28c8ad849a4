"""The row statistics in public."""

import functools
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import SupportOptions, checked_rows
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.statistics import Config, RowStatistics, row_statistics


class SoftmaxStatistics(NamedTuple):
    """What every softmax loss is a function of; each of the batch's shape.

    Attributes:
        logsumexp: log Σ_j e^(z_j), for z-loss, energies and merging.
        log_prob: log p_y, for cross-entropy and policy gradients; Σ_j y_j log p_j for dense labels.
        mean_logit: the mean of z over the classes that take part, for label smoothing.
        entropy: −Σ_j p_j log p_j.
        argmax: the index of the largest logit, int32; not differentiated.
    """

    logsumexp: Array
    log_prob: Array
    mean_logit: Array
    entropy: Array
    argmax: Array


@in_any_layout("logits")
def softmax_statistics(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[SupportOptions],
) -> SoftmaxStatistics:
    r"""The five numbers of each row that every softmax loss is made of, in one pass and under one derivative rule.

    With cotangents a, b, c, d of logsumexp, log_prob, mean_logit and entropy,

    .. math:: dz_j = a\,p_j + b\,(y_j - p_j) + c / K - d\,p_j (\log p_j + \mathrm{entropy})

    Args:
        logits: float array; `axis` holds the classes.
        labels: integers of the batch's shape, or floats of the shape of `logits`.
        axis: the class axis or axes.
        where: the classes that take part, as in `softmax_cross_entropy`.
        **options: see `SupportOptions`, for the distribution of draws that were filtered, and `LogitOptions`.

    Returns:
        `SoftmaxStatistics`, in nats: float32 for float16 and bfloat16 logits, else in the logits' dtype. A row without
        any class has `logsumexp` −∞ and zeros. A label outside its support has `log_prob` −∞, and its gradient is that
        of the others' probabilities.

    Raises:
        TypeError: logits are not floating-point.
        ValueError: a shape that does not fit, no class, or an option out of range.

    Derivatives: each statistic but argmax, with any cotangents; reverse mode and forward over reverse, any order with
    `derivative="jvp"`. Saves the logits and O(rows) numbers.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> s = jsoftmax.softmax_statistics(jnp.array([[0.0, 0.0], [3.0, 0.0]]), jnp.array([0, 1]))
        >>> print(s.log_prob, s.entropy, s.argmax)
        [-0.6931 -3.0486] [0.6931 0.1909] [0 0]
    """
    checks.only_options(options, SupportOptions)
    rows = checked_rows(logits, labels, axis, where, options)
    if rows.logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {jnp.shape(logits)} and so no class along axis {axis}")
    config = Config(RowStatistics._fields, options.get("implementation"), options.get("derivative", "vjp"))
    return _softmax_statistics(rows, config)


@functools.partial(jax.jit, static_argnames="config")
def _softmax_statistics(rows: Rows, config: Config) -> SoftmaxStatistics:
    own = row_statistics(rows, config)
    mean_logit = own.logsumexp + own.mean_log_prob
    empty = rows.empty()
    if empty is not None:
        mean_logit = jnp.where(empty, 0, mean_logit)
    return SoftmaxStatistics(own.logsumexp, own.log_prob, mean_logit, own.entropy, own.argmax)
