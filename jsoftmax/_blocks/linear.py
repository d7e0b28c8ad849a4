"""Cross-entropy and statistics of features · kernel, block by block: the logits of all rows never exist.

No option is known here. A block is the dense loss on one block of logits (`head.py`); `Blocks` does the rest.
"""

from typing import Any, Unpack

from jax.lax import PrecisionLike
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike

from jsoftmax._blocks.head import Head, checked_head, counted, in_blocks
from jsoftmax._blocks.row_sharding import checked_row_sharding
from jsoftmax._losses.row_losses import LossOptions
from jsoftmax._losses.statistics import SoftmaxStatistics
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import SupportOptions


@in_any_layout("features")
def linear_softmax_cross_entropy(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    where: ArrayLike | None = None,
    kernel_transposed: bool = False,
    block_size: int | None = None,
    return_statistics: bool = False,
    skip_rows: bool = False,
    precision: PrecisionLike = None,
    row_sharding: Sharding | PartitionSpec | None = None,
    **options: Unpack[LossOptions],
) -> Any:
    r"""Cross-entropy of the logits `features @ kernel + bias`, which exist for one block of rows at a time.

    .. math:: \mathrm{loss} = \sum_i w_i\,\bigl(-\log p_{i, y_i}\bigr) \Big/ \sum_i w_i, \qquad
        p_i = \mathrm{softmax}(h_i W + b)

    With N rows of D features and V classes: a scalar result forms its gradients in the forward pass, three products of
    :math:`2 N D V` operations; `reduction="none"` takes a fourth; without derivatives there is one.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, as Flax and Haiku store it.
        labels: integers `(*batch,)`, of which one that is no class makes the result NaN; or probabilities
            `(*batch, classes)`.
        bias: float array `(classes,)`.
        weights: float array `(*batch,)`, a factor for each row. A row of weight 0 is never looked at, NaN or not.
        reduction: "mean" divides by the sum of the weights of the rows that are not ignored, and is 0 if there is none;
            "sum"; "none" for the loss of each row.
        where: boolean `(classes,)`, the classes that take part. Costs a copy of the kernel.
        kernel_transposed: whether kernel is `(classes, features)`, such as the embedding of a model that ties the two.
        block_size: rows at a time; None for `default_block_size`.
        return_statistics: whether to return `SoftmaxStatistics` of each row as well, for metrics: accuracy, perplexity,
            entropy, z. From the same products, not differentiated; zeros for rows that do not count. They are of the
            logits without margins or adjustment.
        skip_rows: whether rows of weight 0 or with an ignored label are left out of the products. The others are
            gathered in front of them, and time falls with their share; not with `derivative="jvp"`. Where XLA splits
            the rows over devices, say so by `row_sharding`, so that each skips its own.
        precision: of the product of features and kernel, a `jax.lax.PrecisionLike` such as "highest". None multiplies
            in the features' dtype, as the platform does by default. With a precision, features and kernel are read as
            float32 at least: the float32 head of a bfloat16 model. Its kernel, if it is narrower, is copied.
        row_sharding: how XLA splits the rows over devices: `features.sharding`, or a `PartitionSpec` on the mesh of
            `jax.set_mesh`. Each device then has blocks of its own, the kernel is gathered and its gradient summed once
            a step and not once a block. Known by itself for axes of type Explicit; not needed inside `shard_map`.
        **options: see `LossOptions`; `temperature`, `label_smoothing`, `z_loss` and margins also one a row.

    Returns:
        A scalar, or `(*batch,)`, in nats: float32, or float64 for float64 features. With `return_statistics`, a pair of
        that and `SoftmaxStatistics`, each `(*batch,)`.

    Raises:
        TypeError: features or kernel are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, or an option out of range.

    Derivatives: with respect to features, kernel, bias, weights and every differentiable option; reverse mode and
    forward over reverse, every mode with `derivative="jvp"`. Memory beyond the results: one block of logits and a
    float32 copy of the kernel's gradient. Products take the features' dtype and add up in float32. Gradients are formed
    before a backward pass could scale them: put the loss scale of float16 into `weights`, with `reduction="sum"`.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> features, kernel = jnp.ones((6, 4)), jnp.eye(4, 10)
        >>> loss = jsoftmax.linear_softmax_cross_entropy(features, kernel, jnp.arange(6), block_size=4)
        >>> print(f"{loss:.4f}")
        2.1591

    References:
        Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, 2024;
        Hsu et al., *Liger Kernel*, 2024 (gradients in the forward pass).
    """
    head = checked_head(features, kernel, labels, bias, where, kernel_transposed, options, LossOptions, precision)
    dtype, ignore_index = compute_dtype(head.rows["features"].dtype), options.get("ignore_index")
    ignored = None if ignore_index is None or head.rows["labels"].ndim != 1 else head.rows["labels"] == ignore_index
    head.rows.update(counted(weights, ignored, reduction, head.batch, dtype))
    compute = "losses" if reduction == "none" else "sum"
    split = checked_row_sharding(row_sharding, head.batch)
    loss, statistics = in_blocks(head, compute, block_size, split, return_statistics, skip_rows)
    loss = loss.reshape(head.batch) if reduction == "none" else loss
    return (loss, _in_shape(statistics, head)) if return_statistics else loss


@in_any_layout("features")
def linear_softmax_statistics(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    kernel_transposed: bool = False,
    block_size: int | None = None,
    active: ArrayLike | None = None,
    precision: PrecisionLike = None,
    row_sharding: Sharding | PartitionSpec | None = None,
    **options: Unpack[SupportOptions],
) -> SoftmaxStatistics:
    r"""`softmax_statistics` of the logits `features @ kernel + bias`, which exist for one block of rows at a time.

    Log-probabilities and entropies for policy gradients and preference losses, logsumexp for z-losses, from one pass:
    :math:`2 N D V` operations, and :math:`6 N D V` more for the gradients, with any cotangents.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, or `(classes, features)` with `kernel_transposed`.
        labels: integers `(*batch,)`, or probabilities `(*batch, classes)`.
        bias: float array `(classes,)`.
        where: boolean `(classes,)`, the classes that take part.
        kernel_transposed: whether kernel is `(classes, features)`.
        block_size: rows at a time; None for `default_block_size`.
        active: boolean `(*batch,)`, the rows that count; None for all. The others, of a prompt or of padding, give
            zeros and are left out of the products, as with `skip_rows` of `linear_softmax_cross_entropy`.
        precision: as in `linear_softmax_cross_entropy`.
        row_sharding: as in `linear_softmax_cross_entropy`.
        **options: see `SupportOptions`, for the distribution of draws that were filtered, and `LogitOptions`.

    Returns:
        `SoftmaxStatistics`, each `(*batch,)`: float32, or float64 for float64 features.

    Raises:
        TypeError: features or kernel are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, or an option out of range.

    Derivatives: as `linear_softmax_cross_entropy`. Memory: one block of logits, and in the backward pass a float32 copy
    of the kernel's gradient.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> statistics = jsoftmax.linear_softmax_statistics(jnp.ones((2, 3)), jnp.eye(3, 4), jnp.array([0, 3]))
        >>> print(statistics.log_prob, statistics.argmax)
        [-1.2143 -2.2143] [0 0]
    """
    head = checked_head(features, kernel, labels, bias, where, kernel_transposed, options, SupportOptions, precision)
    if active is not None:
        active = checks.bool_array("active", active)
        checks.has_shape("active", active, head.batch, "True for a row that counts")
        head.rows["active"] = active.reshape(-1)
    split = checked_row_sharding(row_sharding, head.batch)
    return _in_shape(in_blocks(head, "statistics", block_size, split, skip=active is not None)[0], head)


def _in_shape(statistics: SoftmaxStatistics, head: Head) -> SoftmaxStatistics:
    return SoftmaxStatistics(*(number.reshape(head.batch) for number in statistics))
