"""Distillation of a head, features · kernel, block by block: neither model's logits exist for all rows.

A block is the dense loss of `_losses/distillation.py` on one block of logits, or of two; `Blocks` does the rest.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
from jax import Array
from jax.lax import PrecisionLike
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike

from jsoftmax._blocks.head import (
    checked_labels,
    checked_product,
    counted,
    divided,
    hashable,
    logits_of,
    options_of,
    run_blocks,
    weighted,
    without_masked,
)
from jsoftmax._blocks.projection import Product, checked_precision
from jsoftmax._blocks.row_sharding import checked_row_sharding
from jsoftmax._losses.distillation import DistillationOptions, distillation_loss, top_k_distillation_loss
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import DERIVATIVES


@in_any_layout("features")
def linear_distillation_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    teacher_features: ArrayLike,
    teacher_kernel: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    kernel_transposed: bool = False,
    teacher_kernel_transposed: bool = False,
    block_size: int | None = None,
    skip_rows: bool = False,
    derivative: str = "vjp",
    precision: PrecisionLike = None,
    row_sharding: Sharding | PartitionSpec | None = None,
    **options: Unpack[DistillationOptions],
) -> Array:
    r"""`distillation_loss` of the logits of two heads, which exist for one block of rows at a time.

    .. math:: s = h W + b, \qquad u = h' W' + b'

    for the student and the teacher. The two may differ in everything but their classes.

    Args:
        features: float array `(*batch, features)`, of the student.
        kernel: float array `(features, classes)`, as Flax and Haiku store it.
        teacher_features: float array `(*batch, teacher features)`, for the same rows.
        teacher_kernel: float array `(teacher features, classes)`. The teacher is differentiable; under `jit`, a teacher
            that is not differentiated costs one product and no gradient.
        labels: integers `(*batch,)`, or probabilities `(*batch, classes)`, for the usual loss beside; or None.
        bias, teacher_bias: float arrays `(classes,)`.
        where: boolean `(classes,)`, the classes that take part, for both.
        weights: float array `(*batch,)`, a factor for each row. A row of weight 0 is never looked at, NaN or not.
        reduction: "mean" divides by the sum of the weights, and is 0 if that is 0; "sum"; "none" for each row's loss.
        kernel_transposed, teacher_kernel_transposed: whether the kernel is `(classes, features)`.
        block_size: rows at a time; None for `default_block_size`.
        skip_rows: whether rows of weight 0 are left out of the products, as in `linear_softmax_cross_entropy`.
        derivative: "vjp" for reverse mode and forward over reverse; "jvp" for every mode.
        precision, row_sharding: as in `linear_softmax_cross_entropy`.
        **options: see `DistillationOptions`: `temperature`, `label_weight`, `divergence`, `mixture_weight`.

    Returns:
        A scalar, or `(*batch,)`, in nats: float32, or float64 for float64 features.

    Raises:
        TypeError: features or kernels are not floating-point.
        ValueError: shapes that do not fit, an unknown option, or a known number out of range.

    Derivatives: with respect to features, kernels, biases, weights and numbers among the options. A scalar forms its
    gradients in the forward pass. Memory beyond the results: a few arrays of one block of logits, and float32 copies of
    the kernels' gradients.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> student, teacher = (jnp.ones((6, 4)), jnp.eye(4, 9)), (jnp.ones((6, 3)), jnp.eye(3, 9))
        >>> print(f"{jsoftmax.linear_distillation_loss(*student, *teacher, temperature=2.0):.4f}")
        0.0476
        >>> print(f"{jsoftmax.linear_distillation_loss(*student, *teacher, divergence='reverse'):.4f}")
        0.0567

    References:
        Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015;
        Agarwal et al., *On-Policy Distillation of Language Models*, 2024 (reverse and Jensen–Shannon).
    """
    checks.only_options(options, DistillationOptions)
    features, kernel, bias = checked_product(features, kernel, bias, kernel_transposed)
    teacher_features, teacher_kernel, teacher_bias = checked_product(
        teacher_features, teacher_kernel, teacher_bias, teacher_kernel_transposed, "teacher_"
    )
    batch, classes = features.shape[:-1], kernel.shape[0 if kernel_transposed else 1]
    if teacher_features.shape[:-1] != batch:
        raise ValueError(
            f"teacher_features has shape {teacher_features.shape} and features {features.shape}, but need "
            "the same batch"
        )
    if teacher_kernel.shape[0 if teacher_kernel_transposed else 1] != classes:
        raise ValueError(
            f"teacher_kernel has shape {teacher_kernel.shape} and kernel {kernel.shape}, but they need the same classes"
        )
    if where is not None:
        where = checks.bool_array("where", where)
        kernel = without_masked(kernel, where, kernel_transposed)
        teacher_kernel = without_masked(teacher_kernel, where, teacher_kernel_transposed)
    known = derivative, checked_precision(precision)
    heads = ("", Product(kernel_transposed, *known)), ("teacher_", Product(teacher_kernel_transposed, *known))
    params = {"kernel": kernel, "bias": bias, "teacher_kernel": teacher_kernel, "teacher_bias": teacher_bias}
    labels = None if labels is None else checked_labels(labels, batch, classes)
    rows = {"features": features, "teacher_features": teacher_features}
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in rows.items()} | {"labels": labels}
    split = checked_row_sharding(row_sharding, batch)
    how = {"reduction": reduction, "block_size": block_size, "skip": skip_rows, "row_sharding": split}
    return _in_blocks(_divergence, heads, params | {"where": where}, rows, batch, weights, options, **how)


@in_any_layout("features")
def linear_top_k_distillation_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    teacher_log_probs: ArrayLike,
    teacher_indices: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    kernel_transposed: bool = False,
    block_size: int | None = None,
    skip_rows: bool = False,
    derivative: str = "vjp",
    precision: PrecisionLike = None,
    row_sharding: Sharding | PartitionSpec | None = None,
    temperature: ArrayLike = 1.0,
) -> Array:
    r"""`top_k_distillation_loss` of the logits `features @ kernel + bias`, for one block of rows at a time.

    .. math:: \mathrm{loss} = T^2 \Bigl(\sum_{i=1}^{k} t_i \log \frac{t_i}{p_i}
        + \bar t \log \frac{\bar t}{\bar p}\Bigr)

    The teacher is what `linear_top_k` stored of it: k classes, and a tail for all others together.

    Args:
        features: float array `(*batch, features)`, of the student.
        kernel: float array `(features, classes)`.
        teacher_log_probs: float array `(*batch, k)`, **at this temperature**; −∞ for an unused place.
        teacher_indices: integers `(*batch, k)`, their classes, all different.
        bias: float array `(classes,)`.
        weights: float array `(*batch,)`, a factor for each row. A row of weight 0 is never looked at, NaN or not.
        reduction: "mean", "sum" or "none", as in `linear_distillation_loss`.
        kernel_transposed: whether kernel is `(classes, features)`.
        block_size: rows at a time; None for `default_block_size`.
        skip_rows: whether rows of weight 0 are left out of the products.
        derivative: "vjp" for reverse mode and forward over reverse; "jvp" for every mode.
        precision, row_sharding: as in `linear_softmax_cross_entropy`.
        temperature: T above 0, a number, traced if need be, or one a row: divides the student's logits.

    Returns:
        A scalar, or `(*batch,)`, in nats: float32, or float64 for float64 features.

    Raises:
        TypeError: features, kernel or log-probabilities are not floating-point, indices not integers.
        ValueError: shapes that do not fit, or a known temperature out of range.

    Derivatives: as `linear_distillation_loss`.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> features, kernel = jnp.ones((6, 4)), jnp.eye(4, 9)
        >>> stored = jsoftmax.linear_top_k(jnp.ones((6, 3)), jnp.eye(3, 9), 2)
        >>> print(f"{jsoftmax.linear_top_k_distillation_loss(features, kernel, *stored):.4f}")
        0.0038

    References:
        Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015.
    """
    features, kernel, bias = checked_product(features, kernel, bias, kernel_transposed)
    log_probs = checks.float_array("teacher_log_probs", teacher_log_probs)
    indices = checks.integer_array("teacher_indices", teacher_indices)
    batch = features.shape[:-1]
    if log_probs.ndim == 0 or log_probs.shape[:-1] != batch:
        raise ValueError(
            f"teacher_log_probs has shape {log_probs.shape} and features {features.shape}, but they need the same batch"
        )
    checks.has_shape("teacher_indices", indices, log_probs.shape, "one class for each of teacher_log_probs")
    rows = {"features": features, "log_probs": log_probs, "indices": indices}
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in rows.items()}
    params = {"kernel": kernel, "bias": bias, "where": None}
    heads = (("", Product(kernel_transposed, derivative, checked_precision(precision))),)
    split = checked_row_sharding(row_sharding, batch)
    how = {"reduction": reduction, "block_size": block_size, "skip": skip_rows, "row_sharding": split}
    return _in_blocks(_top_k, heads, params, rows, batch, weights, {"temperature": temperature}, **how)


def _divergence(logits: list[Array], where: Array | None, rows: dict, options: dict) -> Array:
    student, teacher = logits
    return distillation_loss(student, teacher, rows["labels"], where=where, **options)


def _top_k(logits: list[Array], where: Array | None, rows: dict, options: dict) -> Array:
    del where  # that of the rows alone
    (student,) = logits
    return top_k_distillation_loss(student, rows["log_probs"], rows["indices"], rows["active"], **options)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A dense loss on one block of the logits of one or two heads; hashable, so that each program is compiled once."""

    loss: Callable[..., Array]
    heads: tuple[tuple[str, Product], ...]  # how the names of each begin, and its product
    summed: bool
    constants: tuple[tuple[str, Any], ...]  # options whose values are known

    def __call__(self, dtypes: tuple, params: dict, rows: dict) -> Any:
        del dtypes  # the kernels are narrowed within their products
        options = options_of(self.constants, params, rows)
        logits = [logits_of(params, rows, product, of) for of, product in self.heads]
        where = params["where"] if rows["active"] is None else _mask(params["where"], rows["active"], logits[0])
        losses = self.loss(logits, where, rows, options)
        return weighted(losses, rows, self.summed), ()


def _mask(where: Array | None, active: Array, logits: Array) -> Array:
    """Of rows that do not count, no class takes part."""
    rows = jnp.broadcast_to(active[:, None], logits.shape)
    return rows if where is None else rows & jnp.broadcast_to(where, logits.shape)


def _in_blocks(
    loss: Callable[..., Array],
    heads: tuple[tuple[str, Product], ...],
    params: dict[str, Any],
    rows: dict[str, Any],
    batch: tuple[int, ...],
    weights: ArrayLike | None,
    options: Any,
    *,
    reduction: str,
    **how: Any,
) -> Array:
    product = heads[0][1]
    checks.one_of("derivative", product.derivative, DERIVATIVES)
    known, params["options"], rows["options"] = divided(options, batch)
    rows |= counted(weights, None, reduction, batch, compute_dtype(rows["features"].dtype))
    block = _Block(loss, heads, reduction != "none", hashable(known))
    losses = run_blocks(block, params, rows, {}, product, **how)[0]
    return losses.reshape(batch) if reduction == "none" else losses
