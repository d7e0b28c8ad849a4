"""What is known of the distribution that a row of logits gives: log-probabilities, entropy, divergence."""

import dataclasses
import functools
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._losses.divergences import kl_of_rows
from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import LogitOptions, SupportOptions, checked_rows
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.statistics import Config, row_statistics


@in_any_layout("logits")
def log_prob(
    logits: ArrayLike,
    actions: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[SupportOptions],
) -> Array:
    r"""Log-probabilities of actions, draws of `sample` for example.

    .. math:: \log p_a = (z_a - m) - \log\Bigl(1 + \sum_{j \ne k} e^{z_j - m}\Bigr), \qquad
        \frac{\partial \log p_a}{\partial z_j} = [j = a] - p_j

    Args:
        logits: float array; `axis` holds the classes.
        actions: integers `(*batch,)`, or `(*sample_shape, *batch)`. One that is no class, such as −1, gives NaN.
        axis: the class axis or axes.
        where: the classes that take part. The others have −∞, and so have those that `top_p` and the like leave out.
        **options: see `SupportOptions`: `support`, `top_k`, `top_p`, `min_p`, and `LogitOptions`, `axis_name` apart.

    Returns:
        An array of the shape of `actions`, in nats: float32 for narrower logits. 0 for a row without any class.

    Raises:
        TypeError: logits are not floating-point, actions are not integers.
        ValueError: actions whose last dimensions are not the batch's, no class, or an option out of range.

    Derivatives: as `softmax_statistics`, whose `log_prob` it is.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import categorical
        >>> print(f"{categorical.log_prob(jnp.array([20.0, 0.0, 0.0]), 0):.4g}")
        -4.122e-09
    """
    rows = _checked(logits, axis, where, options)
    actions, batch = checks.integer_array("actions", actions), rows.logits.shape[:-1]
    extra = actions.ndim - len(batch)
    if extra < 0 or actions.shape[extra:] != batch:
        raise ValueError(f"actions has shape {actions.shape}, but needs {batch}, after any dimensions of samples")
    return _log_prob(rows, actions, _config("log_prob", options))


@in_any_layout("logits")
def entropy(
    logits: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None, **options: Unpack[SupportOptions]
) -> Array:
    r"""The entropy of each row's distribution.

    .. math:: H = -\sum_j p_j \log p_j, \qquad \frac{\partial H}{\partial z_j} = -p_j (\log p_j + H)

    Args:
        logits: float array; `axis` holds the classes.
        axis: the class axis or axes.
        where: the classes that take part.
        **options: see `SupportOptions`: `support`, `top_k`, `top_p`, `min_p`, and `LogitOptions`, `axis_name` apart.

    Returns:
        An array of the batch's shape, in nats, between 0 and the logarithm of the number of classes; float32 for
        narrower logits. 0 for a row without any class. A class of probability 0 counts 0.

    Raises:
        TypeError: logits are not floating-point.
        ValueError: no class, or an option out of range.

    Derivatives: as `softmax_statistics`, whose `entropy` it is.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import categorical
        >>> print(f"{categorical.entropy(jnp.array([0.0, 0.0, -jnp.inf])):.4f}")
        0.6931
    """
    rows = _checked(logits, axis, where, options)
    return _entropy(rows, _config("entropy", options))


@in_any_layout("logits")
def kl_divergence(
    logits: ArrayLike,
    other_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    r"""Kullback–Leibler divergence between softmax of two arrays of logits.

    .. math:: \mathrm{KL}(p \,\|\, q) = \sum_j p_j\,\bigl(e^{-\delta_j} - 1 + \delta_j\bigr), \qquad
        \delta_j = \log p_j - \log q_j

    The sum of :math:`p_j \delta_j`, in terms none of which is negative. So it keeps its digits where the two
    distributions are close, and where both are sure of the same class.

    Args:
        logits: float array, those of p; `axis` holds the classes.
        other_logits: float array of the same shape, those of q.
        axis: the class axis or axes.
        where: the classes that take part, for both.
        temperature: divides the logits of both, as in `softmax`.

    Returns:
        The divergence of each row in nats, never negative, of the batch's shape: float32 for narrower logits. +∞ where
        q rules out what p does not; 0 for a row without any class.

    Raises:
        TypeError: logits are not floating-point.
        ValueError: other_logits of another shape, no class, or a known temperature below 0.

    Derivatives: with respect to both, every mode and order; saves the logits and O(rows) numbers.
    :math:`\partial / \partial z_j = p_j (\delta_j - \mathrm{KL})` and :math:`\partial / \partial w_j = q_j - p_j`.
    Where the divergence is infinite, the former is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import categorical
        >>> print(f"{categorical.kl_divergence(jnp.array([20.0, 0.0]), jnp.array([21.0, 0.0])):.4g}")
        7.583e-10

    References:
        Kullback and Leibler, *On Information and Sufficiency*, 1951.
    """
    other_logits = checks.float_array("other_logits", other_logits)
    checks.has_shape("other_logits", other_logits, jnp.shape(logits), "that of logits")
    options: LogitOptions = {"temperature": temperature}
    return kl_of_rows(_checked(logits, axis, where, options), _checked(other_logits, axis, where, options))


def _checked(logits: ArrayLike, axis: Axis, where: ArrayLike | None, options: LogitOptions | SupportOptions) -> Rows:
    checks.only_options(options, SupportOptions)
    rows = checked_rows(logits, None, axis, where, options)
    if rows.logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {jnp.shape(logits)} and so no class along axis {axis}")
    return rows


@functools.partial(jax.jit, static_argnames="config")
def _log_prob(rows: Rows, actions: Array, config: Config) -> Array:
    def of_sample(labels: Array) -> Array:
        return row_statistics(dataclasses.replace(rows, labels=labels), config).log_prob

    extra = actions.ndim - rows.logits.ndim + 1
    # The samples share the sum over the classes, which does not depend on them.
    for _ in range(extra):
        of_sample = jax.vmap(of_sample)
    return of_sample(actions)


@functools.partial(jax.jit, static_argnames="config")
def _entropy(rows: Rows, config: Config) -> Array:
    return row_statistics(rows, config).entropy


def _config(want: str, options: LogitOptions | SupportOptions) -> Config:
    return Config((want,), options.get("implementation"), options.get("derivative", "vjp"))
