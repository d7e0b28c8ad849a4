"""The dense engine: rows of logits in, the numbers out that every softmax loss is made of.

    logsumexp       log Σ_j e^(z_j)
    log_prob        log p_y, or Σ_j y_j log p_j for dense labels
    mean_log_prob   Σ_j w_j log p_j, where w_j is 1/K for the K classes that take part, times the class weight
    entropy         −Σ_j p_j log p_j

This file holds the only derivative rules of the library's losses. With cotangents a, b, c, d of the four,

    dz_j = a·p_j + b·(y_j − Y·p_j) + c·(w_j − W·p_j) − d·p_j·(log p_j + entropy)

where Y = Σ y_j (1 for an integer label) and W = Σ w_j. For cross-entropy, b = −1, this is the ŷ − y of every
derivation. The same line read as weights on dz is the forward derivative, so that one function, `_slope`, serves both
modes and, through `probabilities`, all higher orders.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jsoftmax._rows import forms
from jsoftmax._rows.dtypes import narrowed
from jsoftmax._rows.exponentials import UNIT, gap
from jsoftmax._rows.labels import take, take_label
from jsoftmax._rows.primitives import select
from jsoftmax._rows.probabilities import How, Shares, probabilities
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.state import RowState, logsumexp, row_state
from jsoftmax._rows.varying import defvjp


class RowStatistics(NamedTuple):
    """What the engines give to the losses, each (*batch,); None for what was not asked for."""

    logsumexp: Any = None
    log_prob: Any = None
    mean_log_prob: Any = None
    entropy: Any = None
    argmax: Any = None


DIFFERENTIABLE = RowStatistics._fields[:4]


class Config(NamedTuple):
    """What is known when the program is traced."""

    want: tuple[str, ...]  # fields of RowStatistics
    implementation: str | None = None  # "cpu", "gpu", "tpu", or None: by the platform compiled for
    derivative: str = "vjp"  # "vjp", or "jvp" for every derivative mode
    alone: bool = True  # as no derivative is taken


def row_statistics(rows: Rows, config: Config) -> RowStatistics:
    """The statistics that `config.want` names, differentiable as `config.derivative` says."""
    in_reverse = config.derivative == "vjp"
    statistics: Any = _reverse_mode(config, rows) if in_reverse else _evaluate(config, rows)[0]
    return statistics._replace(argmax=_argmax(rows)) if "argmax" in config.want else statistics


def _argmax(rows: Rows) -> Array:
    """The first of the largest, or of the NaN."""
    z = jax.lax.stop_gradient(rows).z()
    here = jnp.argmax(z, axis=-1).astype(jnp.int32)
    if not rows.shards.names:
        return here
    largest = take(z, here[..., None])[..., 0]
    is_nan = jnp.isnan(largest)
    is_top = largest == rows.shards.max(select(is_nan, -jnp.inf, largest))
    is_it = select(rows.shards.any(is_nan), is_nan, is_top)
    return rows.shards.min(select(is_it, here + rows.shards.first(z.shape[-1]), rows.classes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluate(config: Config, rows: Rows) -> tuple[RowStatistics, RowState]:
    z, empty = rows.z(), rows.empty()
    state = row_state(rows, config.implementation, config.alone and "entropy" not in config.want)
    top = state.maximum[..., None]
    values = {}
    if "logsumexp" in config.want:
        values["logsumexp"] = logsumexp(rows, state)
    if "log_prob" in config.want:
        values["log_prob"] = -_negative_log_prob(rows, z, state)
    if "mean_log_prob" in config.want:
        weight, total = rows.mean_weights(z)
        values["mean_log_prob"] = -(_weighted_gap(rows, weight, z, top) + total * state.log_total)
    if "entropy" in config.want:
        terms = forms.exponentials(z, top, config.implementation)
        far = _weighted_gap(rows, terms, z, top)
        values["entropy"] = state.log_total + far / (UNIT * (1 + state.others))
    if empty is not None:
        values = {name: v if name == "logsumexp" else select(empty, 0, v) for name, v in values.items()}
    return RowStatistics(**values), state


def _negative_log_prob(rows: Rows, z: Array, state: RowState) -> Array:
    """Σ y_j ((m − z_j) + log1p(s)): no term is negative, so that nothing cancels."""
    if rows.integer_labels is not None:
        return -gap(rows.label_z(), state.maximum) + state.log_total
    y = rows.dense_labels
    return _weighted_gap(rows, y, z, state.maximum[..., None]) + rows.shards.sum(jnp.sum(y, axis=-1)) * state.log_total


def _weighted_gap(rows: Rows, weight: Array, z: Array, top: Array) -> Array:
    """Σ_j weight_j (m − z_j), a weight of 0 winning over a mask's ∞."""
    return rows.shards.sum(jnp.sum(select(weight == 0, 0, -weight * gap(z, top)), axis=-1))


@functools.partial(_evaluate.defjvp, symbolic_zeros=True)
def _evaluate_jvp(config, primals, tangents):
    (rows,), (rows_dot,) = primals, tangents
    statistics, state = _evaluate(config._replace(alone=False), rows)
    # Zeros that are only symbols are left out, so that no array of them is kept.
    rows_dot = jax.tree.map(lambda dot: None if isinstance(dot, SymbolicZero) else dot, rows_dot)
    # Under checkpoint, nothing but the logits and O(rows) numbers waits for a transpose.
    push = jax.checkpoint(functools.partial(_push_forward, config))
    statistics_dot = push(rows, state, statistics.entropy, rows_dot)
    return (statistics, state), (statistics_dot, jax.tree.map(jnp.zeros_like, state))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reverse_mode(config: Config, rows: Rows) -> RowStatistics:
    return _evaluate(config, rows)[0]


def _reverse_mode_fwd(config: Config, rows: Rows):
    statistics, state = _evaluate(config._replace(alone=False), rows)
    return statistics, (rows, state, statistics.entropy)


def _reverse_mode_bwd(config: Config, residuals, cotangent: RowStatistics):
    rows, state, entropy = residuals
    return (_pull_back(config, rows, state, entropy, rows.shards.total(cotangent)),)


defvjp(_reverse_mode, _reverse_mode_fwd, _reverse_mode_bwd)


def _pull_back(config: Config, rows: Rows, state: RowState, entropy: Array | None, cotangent: RowStatistics) -> Rows:
    """The cotangent of `rows`. A row whose cotangents are all 0 gets exact zeros, even if it holds NaN."""
    bars = [bar for bar in cotangent[:4] if bar is not None]
    active = functools.reduce(jnp.logical_or, [bar != 0 for bar in bars])
    if rows.transform.softcap is not None:
        rows = dataclasses.replace(rows, logits=forms.apart(rows.logits, config.implementation))
    shares = _shares(config, rows, state)
    slope = functools.partial(_slope, config, rows, entropy, shares, cotangent, active)
    if rows.transform.is_identity:
        logits_bar, transform_bar = slope(rows.logits.dtype), rows.transform
    else:
        apply, at = _differentiable(rows)
        logits_bar, transform_bar = jax.vjp(apply, *at)[1](slope(state.maximum.dtype))
    labels_bar = weights_bar = None
    if rows.dense_labels is not None and cotangent.log_prob is not None:
        log_p = _usable_log_p(shares[0], active)
        labels_bar = (cotangent.log_prob[..., None] * log_p).astype(rows.dense_labels.dtype)
    if rows.class_weights is not None and cotangent.mean_log_prob is not None:
        share, _ = dataclasses.replace(rows, class_weights=None).mean_weights(rows.z())
        each = cotangent.mean_log_prob[..., None] * share * _usable_log_p(shares[0], active)
        weights_bar = jnp.sum(each, axis=range(each.ndim - 1)).astype(rows.class_weights.dtype)
    return Rows(logits_bar, labels_bar, transform_bar, weights_bar, shards=rows.shards)


def _push_forward(config: Config, rows: Rows, state: RowState, entropy: Array | None, rows_dot: Rows) -> RowStatistics:
    """The tangents of the statistics: the sum over classes of slope times dz."""
    apply, at = _differentiable(rows)
    along = _differentiable(rows_dot)[1]
    along = jax.tree.map(lambda x, x_dot: jnp.zeros_like(x) if x_dot is None else x_dot, at, along)
    _, z_dot = jax.jvp(apply, at, along)
    shares = _shares(config, rows, state)
    active = jnp.ones(state.maximum.shape, bool) if rows.active is None else rows.active
    tangents = {}
    for name in DIFFERENTIABLE:
        if name in config.want:
            unit = RowStatistics(**{name: jnp.ones_like(state.maximum)})
            slope = _slope(config, rows, entropy, shares, unit, active, z_dot.dtype)
            tangents[name] = rows.shards.sum(jnp.sum(slope * z_dot, axis=-1))
    if "log_prob" in tangents and rows.dense_labels is not None and rows_dot.labels is not None:
        along = rows_dot.labels * _usable_log_p(shares[0], active)
        tangents["log_prob"] += rows.shards.sum(jnp.sum(along, axis=-1))
    if "mean_log_prob" in tangents and rows_dot.class_weights is not None:
        share, _ = dataclasses.replace(rows, class_weights=None).mean_weights(rows.z())
        along = jnp.broadcast_to(rows_dot.class_weights, share.shape) * share * _usable_log_p(shares[0], active)
        tangents["mean_log_prob"] += rows.shards.sum(jnp.sum(along, axis=-1))
    return RowStatistics(**tangents)


def _differentiable(rows: Rows):
    """z as a function of what can be differentiated in it, and the point at which it is taken."""

    def apply(logits, transform):
        options = dataclasses.replace(transform, where=rows.transform.where)
        return dataclasses.replace(rows, logits=logits, transform=options).z()

    return apply, (rows.logits, rows.transform.unmasked)


def _shares(config: Config, rows: Rows, state: RowState) -> tuple[Shares, Shares | None]:
    label_z = None if rows.integer_labels is None else rows.label_z()
    only_p = rows.dense_labels is None and rows.class_weights is None and "entropy" not in config.want
    exact = rows.has_exact_differences
    # Neither a difference of p and a weight nor, by the other rule, a sum of products with tangents.
    rounded = exact and only_p and "mean_log_prob" not in config.want and config.derivative == "vjp"
    how = How(rows.shards, config.implementation, exact, only_p, rounded)
    return probabilities(rows.z(), label_z, state, how)


def _usable_log_p(shares: Shares, active: Array) -> Array:
    """log p as a derivative with respect to labels and class weights: 0 for masked classes and idle rows."""
    return select(active[..., None] & ~jnp.isneginf(shares.log_p), shares.log_p, 0)


def _slope(config, rows, entropy, shares, cotangent, active, dtype) -> Array:
    """dz of the equation above, rounded to `dtype`; the label's entry comes from 1 − p_y, never from p_y − 1."""
    row, label = shares
    # Of p alone, nothing else can bring a NaN of more than 16 bits.
    a, b, c, d = (None if bar is None else select(bar == bar, bar, jnp.nan)[..., None] for bar in cotangent[:4])
    labels, only_p = rows.local_labels, row.log_p is None
    if b is not None and labels is not None:
        b = select(rows.is_class(rows.labels)[..., None], b, jnp.nan)

    def terms(share: Shares, factor, toward_label, weight):
        slope = jnp.zeros_like(share.p) if factor is None else factor * share.p
        if toward_label is not None:
            slope += b * toward_label
        if weight is not None:
            slope += c * weight
        if d is not None:
            slope -= d * share.p * select(share.p == 0, 0, share.log_p + entropy[..., None])
        return narrowed(select(active[..., None], slope, 0), dtype, only_p)

    # What multiplies p is put together first: one number a row, and one product a class.
    factor, weight = a, None
    if c is not None:
        weight, total = rows.mean_weights(rows.z())
        factor = (0 if a is None else a) - c * total[..., None]
    if labels is None or b is None:
        return terms(row, factor, None if b is None else _toward_dense(rows, row), weight)
    at_label = Shares(*(number[..., None] for number in label))
    label_weight = None if weight is None else take_label(weight, labels)
    entry = terms(at_label, factor, at_label.not_p, label_weight)
    slope = terms(row, (0 if factor is None else factor) - b, None, weight)
    return forms.place_label(slope, entry, lax.expand_dims(labels, (labels.ndim,)), config.implementation)


def _toward_dense(rows: Rows, row: Shares) -> Array:
    """y_j − Y·p_j without cancellation: y_j (1 − p_j) − Σ_{i≠j} y_i · p_j."""
    y = rows.dense_labels
    return y * row.not_p - (rows.shards.sum(jnp.sum(y, axis=-1, keepdims=True)) - y) * row.p
