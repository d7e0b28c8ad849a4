"""From row statistics to a loss per row: every shared option, once.

A loss is a function f of log p_y, and the options act on it in this order:

    loss = (1 − ε)·w_y·f(log p_y) − ε·Σ_j (w_j / K) log p_j + λ·logsumexp²

with ε the label smoothing, w the class weights and λ the z-loss. Rows that are ignored or have no class left count 0.
Margins and the adjustment of logits act before, where logits are made (`_rows/logits.py`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis
from jsoftmax._rows.logits import Transform
from jsoftmax._rows.options import LogitOptions, checked_rows
from jsoftmax._rows.primitives import select
from jsoftmax._rows.probabilities import row_shares
from jsoftmax._rows.reports import report_values
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.statistics import Config, RowStatistics, row_statistics

SMOOTHINGS = ("uniform", "others")
RowLoss = Callable[[Array], Array]  # log p_y to loss; a pytree if it has parameters
Loss = TypeVar("Loss")


def with_parameters(loss: type[Loss]) -> type[Loss]:
    """A decorator of dataclasses: a loss whose fields are arrays, which may be traced.

    Not `jax.tree_util.register_dataclass`: if two such classes have as many fields, JAX holds their trees equal though
    their hashes differ, and now and then `jit` runs the program of the one for the other.
    """
    jax.tree_util.register_pytree_node(
        loss, lambda value: (tuple(vars(value).values()), None), lambda _, values: loss(*values)
    )
    return loss


class MarginOptions(LogitOptions, total=False):
    """Options that act on the label's logit, before all others."""

    margin: ArrayLike
    angular_margin: ArrayLike


class LossOptions(MarginOptions, total=False):
    """Options of softmax losses.

    label_smoothing: the share ε of the target that goes to other classes; a number, traced if need be, or one a row.
    smoothing: where it goes. "uniform": ε/K to each of the K classes that take part, the label among them (Szegedy et
        al. 2016; optax, PyTorch). "others": ε/(K − 1) to each class but the label.
    z_loss: λ of the penalty λ·logsumexp² that keeps logits near normalized (Chowdhery et al. 2022).
    class_weights: (classes,) factors of the classes' terms in the loss, as in PyTorch; differentiable.
    ignore_index: rows with this integer label give loss 0 and gradient 0, whatever their logits hold.
    margin: m that comes off the label's logit, before soft cap and temperature; one number, or one a row (CosFace, Wang
        et al. 2018; AM-softmax). The scale of these papers is 1 / temperature.
    angular_margin: m, from 0 to π/2, by which the label's angle grows: its logit is taken to be a cosine cos θ and
        becomes cos(θ + m), or cos θ − m sin m where θ + m is beyond π (ArcFace, Deng et al. 2019). With both, `margin`
        comes off the result. Both need integer labels.
    logit_adjustment: (classes,) numbers added to the logits after the temperature: τ·log of the classes' frequencies,
        for long tails (Menon et al. 2021). Predict without it. Differentiable, as the margins are.
    """

    label_smoothing: ArrayLike
    smoothing: str
    z_loss: ArrayLike
    class_weights: ArrayLike | None
    ignore_index: int | None
    logit_adjustment: ArrayLike | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["label_smoothing", "z_loss"],
    meta_fields=["smoothing", "ignore_index"],
)
@dataclasses.dataclass(frozen=True)
class Terms:
    """What is added to the bare loss; None means nothing."""

    label_smoothing: Any
    z_loss: Any
    smoothing: str
    ignore_index: int | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """−log p_y."""

    def __call__(self, log_prob: Array) -> Array:
        return 0.0 - log_prob  # −(+0) would be −0


def row_losses(
    row_loss: RowLoss,
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    active: Array | None = None,
    numbers: Array | None = None,
    **options: Unpack[LossOptions],
) -> Array:
    """Check everything, then the loss of every row.

    Rows that are not `active` give 0 with gradient 0. `numbers` are the rows' own, for reports.
    """
    checks.only_options(options, LossOptions)
    rows = checked_rows(logits, labels, axis, where, options)
    if rows.logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {jnp.shape(logits)} and so no class along axis {axis}; a loss needs one")
    terms, class_weights = _checked_terms(rows, options)
    config = Config((), options.get("implementation"), options.get("derivative", "vjp"))
    transform = _checked_transform(rows, options)
    rows = dataclasses.replace(rows, transform=transform, class_weights=class_weights, active=active)
    return _row_losses(row_loss, rows, terms, numbers, config)


def _checked_terms(rows: Rows, options: LossOptions) -> tuple[Terms, Array | None]:
    batch, classes = rows.logits.shape[:-1], rows.logits.shape[-1]
    smoothing, ignore_index = options.get("smoothing", "uniform"), options.get("ignore_index")
    checks.one_of("smoothing", smoothing, SMOOTHINGS)
    if ignore_index is not None and rows.integer_labels is None:
        raise ValueError(
            f"ignore_index={ignore_index} needs integer labels; give dense labels a row weight of 0 instead"
        )
    numbers = {}
    for name, high in (("label_smoothing", 1.0), ("z_loss", float("inf"))):
        value = options.get(name, 0.0)
        checks.within(name, value, 0.0, high)
        if checks.is_known(value, 0.0):
            numbers[name] = None
        else:
            numbers[name] = checks.scalar_or_rows(name, jnp.asarray(value, rows.dtype), batch)
    class_weights = options.get("class_weights")
    if class_weights is not None:
        class_weights = checks.float_array("class_weights", class_weights).astype(rows.dtype)
        checks.has_shape("class_weights", class_weights, (classes,), "one factor for each class")
    return Terms(**numbers, smoothing=smoothing, ignore_index=ignore_index), class_weights


def _checked_transform(rows: Rows, options: LossOptions) -> Transform:
    """With margins and adjustment."""
    batch, added = rows.logits.shape[:-1], {}
    for name in ("margin", "angular_margin"):
        value = options.get(name, 0.0)
        if checks.is_known(value, 0.0):
            continue
        if rows.integer_labels is None:
            raise ValueError(f"{name} needs integer labels, of which each row has one; got dense labels")
        value = checks.scalar_or_rows(name, jnp.asarray(value, rows.dtype), batch)
        added[name] = value[..., None] if value.ndim else value
    checks.within("angular_margin", options.get("angular_margin", 0.0), 0.0, math.pi / 2)
    adjustment = options.get("logit_adjustment")
    if adjustment is not None:
        adjustment = checks.float_array("logit_adjustment", adjustment).astype(rows.dtype)
        if adjustment.shape != rows.logits.shape:
            checks.has_shape("logit_adjustment", adjustment, rows.logits.shape[-1:], "one number for each class")
        added["adjustment"] = adjustment
    return dataclasses.replace(rows.transform, **added)


@functools.partial(jax.jit, static_argnames="config")
def _row_losses(row_loss: RowLoss, rows: Rows, terms: Terms, numbers: Array | None, config: Config) -> Array:
    idle = jnp.zeros(rows.logits.shape[:-1], bool) if rows.active is None else ~rows.active
    if terms.ignore_index is not None:
        idle |= rows.labels == terms.ignore_index
        rows = dataclasses.replace(rows, labels=select(idle, 0, rows.labels), active=~idle)
    idle = report_values(rows, idle, numbers)
    empty = rows.empty()
    want = ["log_prob"]
    want += ["mean_log_prob"] if terms.label_smoothing is not None else []
    want += ["logsumexp"] if terms.z_loss is not None else []
    statistics = row_statistics(_weighted(rows), config._replace(want=tuple(want)))
    # Here and not at the end, so that an infinite or NaN statistic of an idle row meets no factor of 0.
    statistics = _silence(statistics, idle if empty is None else idle | empty)
    if rows.dense_labels is None or isinstance(row_loss, CrossEntropy):
        loss = row_loss(statistics.log_prob)
    else:
        loss = _dense_losses(row_loss, _weighted(rows), config)
    if rows.class_weights is not None and rows.integer_labels is not None:
        loss = loss * rows.label_weight()
    if terms.label_smoothing is not None:
        share = terms.label_smoothing
        if terms.smoothing == "others":
            count = rows.class_count(rows.z())
            share = share * count / jnp.maximum(count - 1, 1)
        loss = (1 - share) * loss - share * statistics.mean_log_prob
    if terms.z_loss is not None:
        loss = loss + terms.z_loss * statistics.logsumexp**2
    return loss


def _weighted(rows: Rows) -> Rows:
    """Dense labels carry their class weights with them."""
    if rows.dense_labels is None or rows.class_weights is None:
        return rows
    return dataclasses.replace(rows, labels=rows.dense_labels * jnp.broadcast_to(rows.class_weights, rows.logits.shape))


def _silence(statistics: RowStatistics, idle: Array) -> RowStatistics:
    """Statistics of −0 for idle rows: the loss of a log-probability of −0 is 0, and not −0."""
    return jax.tree.map(lambda number: select(idle, -0.0, number), statistics)


def _dense_losses(row_loss: RowLoss, rows: Rows, config: Config) -> Array:
    """Σ_j y_j f(log p_j), where a class that the label leaves out counts nothing."""
    unused, empty = rows.dense_labels == 0, rows.empty()
    if empty is not None:
        unused |= empty[..., None]
    shares = row_shares(rows, config.implementation)
    # The inner select keeps the derivative at a mask's −∞ finite.
    each = row_loss(select(unused, 0, shares.log_p))
    return rows.shards.sum(jnp.sum(select(unused, 0, rows.dense_labels * each), axis=-1))
