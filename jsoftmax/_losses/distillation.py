"""Losses that teach a student by a teacher's distribution."""

from typing import TypedDict, Unpack

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._losses.activations import logsumexp
from jsoftmax._losses.divergences import js_of_rows, kl_of_rows
from jsoftmax._losses.row_losses import CrossEntropy, row_losses
from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.labels import is_class
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import checked_rows
from jsoftmax._rows.rows import Rows

DIVERGENCES = ("forward", "reverse", "jensen_shannon")


class DistillationOptions(TypedDict, total=False):
    """Options of distillation.

    temperature: T above 0, 1 by default; a number, traced if need be, or one a row; differentiable.
    label_weight: α, the share of the labels' cross-entropy at temperature 1, in [0, 1], 1/2 by default; a number or one
        a row; used with labels only.
    divergence: "forward" (the default) for KL(t ‖ p), which the student lowers by having every class that the teacher
        has; "reverse" for KL(p ‖ t), which it lowers by having none that the teacher does not have;
        "jensen_shannon" for what lies between, `jensen_shannon_divergence(student, teacher)`.
    mixture_weight: w of the latter in [0, 1], the teacher's share of the mixture, 1/2 by default: close to 0 it is w
        times the forward divergence, close to 1 it is 1 − w times the reverse one. One number; differentiable.
    """

    temperature: ArrayLike
    label_weight: ArrayLike
    divergence: str
    mixture_weight: ArrayLike


@in_any_layout("student_logits")
def distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike | None = None,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    **options: Unpack[DistillationOptions],
) -> Array:
    r"""Divergence of a student's distribution from its teacher's, both softened by a temperature.

    .. math:: \mathrm{loss} = (1 - \alpha)\,T^2\,D(t, p) - \alpha \log \mathrm{softmax}(s)_y, \qquad
        t = \mathrm{softmax}(u / T), \quad p = \mathrm{softmax}(s / T)

    for student logits s, teacher logits u, the weight α of the labels (without labels, 0), and D the divergence,
    :math:`\mathrm{KL}(t \,\|\, p)` by default. The factor T² keeps the gradient, which then is
    :math:`T\,(p - t)`, of the same size whatever the temperature. Both loss and gradient are right to
    rounding however close the two are: no logarithms are subtracted, but the logits themselves.

    Args:
        student_logits: float array; `axis` holds the classes.
        teacher_logits: float array of the same shape. Differentiable; wrap it in `jax.lax.stop_gradient` if the teacher
            is not to learn.
        labels: integers of the batch's shape, or floats of the shape of the logits, for the usual loss beside; or None.
        axis: the class axis, or a tuple of axes that together number the classes.
        where: boolean, of the shape of the logits or broadcasting to it, or of the batch's shape: the classes that take
            part, for both models. What it masks is never read; a row without any class gives 0.
        **options: see `DistillationOptions`: `temperature`, `label_weight`, `divergence`, `mixture_weight`.

    Returns:
        The loss of each row in nats, of the batch's shape: float32 for narrower logits. A class that the teacher has
        and to which the student gives a logit of −∞ makes the row +∞ (the other way round with "reverse", neither way
        with "jensen_shannon"); a NaN or +∞ makes its own row NaN.

    Raises:
        TypeError: logits are not floating-point, or `where` is not boolean.
        ValueError: teacher logits of another shape, no class, an unknown divergence, or a known number out of range.

    Derivatives: every mode. Saves both arrays of logits and O(rows) numbers. For two language models, whose logits are
    too large to keep, see `linear_distillation_loss`.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[3.0, 1.0, 0.0]])
        >>> print(jsoftmax.distillation_loss(student, teacher, temperature=2.0))
        [0.1207]
        >>> print(jsoftmax.distillation_loss(student, teacher, jnp.array([0]), temperature=2.0, label_weight=0.1))
        [0.1494]

    References:
        Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015;
        Agarwal et al., *On-Policy Distillation of Language Models*, 2024 (reverse and Jensen–Shannon).
    """
    checks.only_options(options, DistillationOptions)
    student, teacher = _checked_pair(student_logits, teacher_logits, axis, where, options.get("temperature", 1.0))
    softened = _temperature_squared(student) * _divergence(student, teacher, options)
    if labels is None:
        return softened
    label_weight = options.get("label_weight", 0.5)
    checks.within("label_weight", label_weight, 0.0, 1.0)
    label_weight = checks.scalar_or_rows("label_weight", jnp.asarray(label_weight, softened.dtype), softened.shape)
    # Plain autodiff would keep the probabilities of the labels' loss.
    hard = row_losses(CrossEntropy(), student_logits, labels, axis, where, derivative="jvp")
    return (1 - label_weight) * softened + label_weight * hard


@in_any_layout("student_logits")
def top_k_distillation_loss(
    student_logits: ArrayLike,
    teacher_log_probs: ArrayLike,
    teacher_indices: ArrayLike,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    r"""Distillation from a teacher of whom only the k likeliest classes were stored.

    .. math:: \mathrm{loss} = T^2 \Bigl(\sum_{i=1}^{k} t_i \log \frac{t_i}{p_i}
        + \bar t \log \frac{\bar t}{\bar p}\Bigr), \qquad
        \bar t = 1 - \sum_i t_i, \quad \bar p = \sum_{j\ \text{other}} p_j

    All other classes are one class more, the tail, so that the student learns how much they hold together but not how
    it is shared out. With k = V this is `distillation_loss`. The teacher's tail is :math:`(1 - t_1) - t_2 - \dots`,
    with :math:`1 - t_1` from the logarithm; the student's is a sum over the other classes.

    Args:
        student_logits: float array `(*batch, classes)`.
        teacher_log_probs: float array `(*batch, k)`: logarithms of the teacher's probabilities **at this temperature**;
            −∞ for an unused place.
        teacher_indices: integers `(*batch, k)`, their classes, all different. One that is no class makes its row NaN.
        where: boolean `(*batch,)`: the rows that take part. Others are never read and give 0.
        temperature: T above 0, a number, traced if need be, or one a row: divides the student's logits.

    Returns:
        The loss of each row in nats, `(*batch,)`: float32 for narrower logits.

    Raises:
        TypeError: logits or log-probabilities are not floating-point, indices not integers.
        ValueError: shapes that do not fit, more than one place a class, or a known temperature out of range.

    Derivatives: every mode, by student logits, log-probabilities and temperature.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> log_probs, indices = jnp.log(jnp.array([[0.6, 0.3]])), jnp.array([[4, 1]])
        >>> print(jsoftmax.top_k_distillation_loss(jnp.zeros((1, 5)), log_probs, indices))
        [0.6016]

    References:
        Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.
    """
    logits = checks.float_array("student_logits", student_logits)
    log_t = checks.float_array("teacher_log_probs", teacher_log_probs)
    indices = checks.integer_array("teacher_indices", teacher_indices)
    if logits.ndim == 0 or log_t.ndim == 0 or log_t.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"teacher_log_probs has shape {log_t.shape} and student_logits {logits.shape}, "
            "but they need the same batch: (*batch, k) and (*batch, classes)"
        )
    checks.has_shape("teacher_indices", indices, log_t.shape, "one class for each of teacher_log_probs")
    batch, (places, classes) = logits.shape[:-1], (log_t.shape[-1], logits.shape[-1])
    if not 1 <= places <= classes:
        raise ValueError(f"teacher_log_probs has {places} places, but needs 1 to {classes}, the number of classes")
    if where is not None:
        where = checks.bool_array("where", where)
        checks.has_shape("where", where, batch, "True for a row that takes part")
        logits, log_t = (jnp.where(where[..., None], array, 0) for array in (logits, log_t))
    dtype = compute_dtype(logits.dtype)
    temperature = _temperature(temperature, dtype, batch)
    z = logits.astype(dtype) / temperature[..., None]
    student = _with_tail(z, indices)
    teacher = jnp.concatenate([log_t.astype(dtype), _log_tail(log_t.astype(dtype))[..., None]], axis=-1)
    if places == classes:  # no class is left, and a tail that is rounding is not to be infinitely far from none
        student, teacher = student[..., :-1], teacher[..., :-1]
    losses = temperature**2 * kl_of_rows(Rows(teacher), Rows(student))
    return losses if where is None else jnp.where(where, losses, 0)


@in_any_layout("first_logits")
def jensen_shannon_divergence(
    first_logits: ArrayLike,
    second_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    weight: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
) -> Array:
    r"""Jensen–Shannon divergence of two distributions: how far both are from their mixture.

    .. math:: \mathrm{JS}_w = (1 - w)\,\mathrm{KL}(p \,\|\, m) + w\,\mathrm{KL}(q \,\|\, m), \qquad
        m = (1 - w)\,p + w\,q

    Always finite, 0 for equal distributions, and at most the entropy of the weights: :math:`\log 2` for
    :math:`w = 1/2`, which distributions without a common class reach. Right to rounding however close the two are.

    Args:
        first_logits: float array; `axis` holds the classes. p is its softmax.
        second_logits: float array of the same shape. q is its softmax.
        axis: the class axis or axes.
        where: the classes that take part, as in `distillation_loss`.
        weight: w in [0, 1], a number, traced if need be; differentiable. 1/2 is symmetric in the two.
        temperature: T above 0, divides both; a number or one a row; differentiable.

    Returns:
        The divergence of each row in nats, of the batch's shape: float32 for narrower logits. A row without any class
        gives 0; a NaN or +∞ makes its own row NaN.

    Raises:
        TypeError: logits are not floating-point, or `where` is not boolean.
        ValueError: second logits of another shape, no class, or a known weight or temperature out of range.

    Derivatives: every mode. Saves both arrays of logits and O(rows) numbers.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> apart = jsoftmax.jensen_shannon_divergence(jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0]))
        >>> print(f"{apart:.4f}")
        0.6931

    References:
        Lin, *Divergence Measures Based on the Shannon Entropy*, 1991.
    """
    second, first = _checked_pair(second_logits, first_logits, axis, where, temperature, ("second", "first"))
    return js_of_rows(first, second, _mixture_weight("weight", weight, first))


def _divergence(student: Rows, teacher: Rows, options: DistillationOptions) -> Array:
    divergence = options.get("divergence", "forward")
    checks.one_of("divergence", divergence, DIVERGENCES)
    if divergence == "jensen_shannon":
        weight = _mixture_weight("mixture_weight", options.get("mixture_weight", 0.5), student)
        return js_of_rows(student, teacher, weight)
    return kl_of_rows(teacher, student) if divergence == "forward" else kl_of_rows(student, teacher)


def _mixture_weight(name: str, weight: ArrayLike, rows: Rows) -> Array:
    checks.within(name, weight, 0.0, 1.0)
    weight = jnp.asarray(weight, rows.dtype)
    checks.has_shape(name, weight, (), "one number")
    return weight


def _checked_pair(student, teacher, axis, where, temperature, names=("student", "teacher")) -> tuple[Rows, Rows]:
    student, teacher = (checks.float_array(f"{n}_logits", x) for n, x in zip(names, (student, teacher), strict=True))
    checks.has_shape(f"{names[1]}_logits", teacher, student.shape, f"that of {names[0]}_logits")
    dtype = jnp.promote_types(compute_dtype(student.dtype), compute_dtype(teacher.dtype))
    # Only positive temperatures: at 0, two distributions are as far apart as can be or the same.
    if not checks.is_known(temperature, 1.0):
        checks.within("temperature", temperature, float(jnp.finfo(dtype).tiny), float("inf"))
    rows = [checked_rows(x.astype(dtype), None, axis, where, {"temperature": temperature}) for x in (student, teacher)]
    if rows[0].logits.shape[-1] == 0:
        raise ValueError(f"{names[0]}_logits has shape {student.shape} and so no class; a loss needs one")
    return rows[0], rows[1]


def _temperature(temperature: ArrayLike, dtype, batch: tuple[int, ...]) -> Array:
    checks.within("temperature", temperature, float(jnp.finfo(dtype).tiny), float("inf"))
    temperature = checks.scalar_or_rows("temperature", jnp.asarray(temperature, dtype), batch)
    return jnp.broadcast_to(temperature, batch)


def _temperature_squared(rows: Rows) -> Array | float:
    temperature = rows.transform.temperature
    return 1.0 if temperature is None else temperature[..., 0] ** 2


def _with_tail(z: Array, indices: Array) -> Array:
    """The logits of the classes at `indices`, and of all others as one class."""
    known = is_class(indices, z.shape[-1])
    index = jnp.where(known, indices, 0)
    rest = jnp.put_along_axis(jnp.ones(z.shape, bool), index, False, axis=-1, inplace=False)
    named = jnp.where(known, jnp.take_along_axis(z, index, axis=-1), jnp.nan)
    return jnp.concatenate([named, logsumexp(z, where=rest)[..., None]], axis=-1)


def _log_tail(log_t: Array) -> Array:
    """log(1 − Σ t): 1 − t of the largest without cancellation, then the others off it; −∞ for nothing left."""
    largest = jnp.argmax(log_t, axis=-1)[..., None]
    at_largest = jnp.arange(log_t.shape[-1]).reshape((1,) * (log_t.ndim - 1) + (-1,)) == largest
    others = jnp.sum(jnp.where(at_largest, 0, jnp.exp(log_t)), axis=-1)
    tail = -jnp.expm1(jnp.take_along_axis(log_t, largest, axis=-1)[..., 0]) - others
    some = tail > 0
    return jnp.where(some, jnp.log(jnp.where(some, tail, 1)), jnp.where(jnp.isnan(tail), jnp.nan, -jnp.inf))
