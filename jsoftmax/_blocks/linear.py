"""Cross-entropy of features · kernel, block by block: the logits of all rows never exist.

No option is known here. A block is the dense loss on one block of logits; `Blocks` does the rest.
"""

import dataclasses
import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._blocks.blockwise import Blocks
from jsoftmax._blocks.projection import project
from jsoftmax._losses.row_losses import CrossEntropy, LossOptions, row_losses
from jsoftmax._losses.statistics import SoftmaxStatistics, softmax_statistics
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.options import LogitOptions
from jsoftmax._rows.shards import class_shards, devices_of_mesh, spec_of, vary_as, with_auto_axes
from jsoftmax._rows.weights import REDUCTIONS, shares


def default_block_size(classes: int, dtype) -> int:
    """Rows in a block: a power of two from 128 to 4096 whose logits fill 64 MiB on a CPU, 1 GiB on an accelerator.

    Large enough for the products to run at full speed, small beside the kernel's gradient. On a mesh set by
    `jax.set_mesh`, each of its devices gets as much.
    """
    budget, devices = 2**26 if jax.default_backend() == "cpu" else 2**30, devices_of_mesh()
    rows = budget * devices // (max(classes, 1) * jnp.dtype(compute_dtype(dtype)).itemsize)
    return min(max(1 << max(rows.bit_length() - 1, 0), 128 * devices), 4096 * devices)


@dataclasses.dataclass(frozen=True)
class _Block:
    """The dense computation on one block of rows; hashable, so that each program is compiled once."""

    compute: str  # "statistics", "losses" or their "sum"
    kernel_transposed: bool
    constants: tuple[tuple[str, Any], ...]  # options whose values are known

    def __call__(self, dtypes: tuple, params: dict, rows: dict) -> Any:
        del dtypes  # the kernel is narrowed within its product
        options = {**dict(self.constants), **params["options"], **rows["options"]}
        features, active = rows["features"], rows["active"]
        if active is not None:
            # A NaN in an idle row would reach the kernel's gradient as 0 · NaN.
            features = jnp.where(active[:, None], features, 0)
        logits = project(features, params["kernel"], self.kernel_transposed, options.get("derivative", "vjp"))
        if params["bias"] is not None:
            logits = logits + jnp.broadcast_to(params["bias"].astype(logits.dtype), logits.shape)
        where = None if params["where"] is None else jnp.broadcast_to(params["where"], logits.shape)
        if self.compute == "statistics":
            return softmax_statistics(logits, rows["labels"], where=where, **options)
        losses = row_losses(
            CrossEntropy(), logits, rows["labels"], where=where, active=active, numbers=rows["numbers"], **options
        )
        if rows["weights"] is not None:
            losses = losses * rows["weights"]
        return jnp.sum(losses) if self.compute == "sum" else losses


@functools.partial(jax.jit, static_argnums=0)
def _run(blocks: Blocks, params: dict, rows: dict) -> Any:
    return blocks.apply(params, rows)


def _checked(features, kernel, labels, bias, where, kernel_transposed, options, names) -> tuple[dict, dict, dict]:
    """Parameters and rows for `_Block`, and the options whose values are known."""
    checks.only_options(options, names)
    features, kernel = checks.float_array("features", features), checks.float_array("kernel", kernel)
    labels = checks.integer_array("labels", labels)
    if features.ndim == 0 or kernel.ndim != 2:
        raise ValueError(
            f"features has shape {features.shape} and kernel {kernel.shape}, but need (*batch, features) and a matrix"
        )
    batch, width = features.shape[:-1], features.shape[-1]
    classes = kernel.shape[0 if kernel_transposed else 1]
    checks.has_kernel_shape(kernel, width, classes, kernel_transposed)
    checks.has_shape("labels", labels, batch, "one class number for each row of features")
    if classes == 0:
        raise ValueError(f"kernel has shape {kernel.shape} and so no class; a loss needs one")
    if bias is not None:
        bias = checks.float_array("bias", bias)
        checks.has_shape("bias", bias, (classes,), "one number for each class")
    if where is not None:
        where = checks.bool_array("where", where)
        checks.has_shape("where", where, (classes,), "True for a class that takes part")
        # What a masked class has in the kernel must not reach the features' gradient as 0 · NaN.
        kernel = jnp.where(jnp.expand_dims(where, 1 if kernel_transposed else 0), kernel, 0)
    known: dict[str, Any] = {"axis_name": class_shards(options.get("axis_name")).names or None}
    shared, each = {}, {}
    for name, value in options.items():
        if name in known:
            continue
        if value is None or isinstance(value, str) or (checks.known(value) and jnp.ndim(value) == 0):
            known[name] = value if value is None or isinstance(value, str | int) else float(value)
        elif jnp.ndim(value) == 0 or name == "class_weights":
            shared[name] = jnp.asarray(value)
        else:
            each[name] = checks.scalar_or_rows(name, value, batch).reshape(-1)
    params = {"kernel": kernel, "bias": bias, "where": where, "options": shared}
    rows = {"features": features.reshape(-1, width), "labels": labels.reshape(-1), "options": each}
    numbers = jnp.arange(rows["labels"].shape[0])
    return params, {**rows, "active": None, "weights": None, "numbers": numbers}, known


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
    **options: Unpack[LossOptions],
) -> Array:
    r"""Cross-entropy of the logits `features @ kernel + bias`, which exist for one block of rows at a time.

    .. math:: \mathrm{loss} = \sum_i w_i\,\bigl(-\log p_{i, y_i}\bigr) \Big/ \sum_i w_i, \qquad
        p_i = \mathrm{softmax}(h_i W + b)

    With N rows of D features and V classes: a scalar result forms its gradients in the forward pass, three products of
    :math:`2 N D V` operations; `reduction="none"` takes a fourth; without derivatives there is one.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, as Flax and Haiku store it.
        labels: integers `(*batch,)`. One that is no class makes the result NaN.
        bias: float array `(classes,)`.
        weights: float array `(*batch,)`, a factor for each row. A row of weight 0 is never looked at, NaN or not.
        reduction: "mean" divides by the sum of the weights of the rows that are not ignored, and is 0 if there is none;
            "sum"; "none" for the loss of each row.
        where: boolean `(classes,)`, the classes that take part. Costs a copy of the kernel.
        kernel_transposed: whether kernel is `(classes, features)`, such as the embedding of a model that ties the two.
        block_size: rows at a time; None for `default_block_size`.
        **options: see `LossOptions`; `temperature`, `label_smoothing` and `z_loss` also one a row.

    Returns:
        A scalar, or `(*batch,)`, in nats: float32, or float64 for float64 features.

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
    checks.one_of("reduction", reduction, REDUCTIONS)
    params, rows, known = _checked(features, kernel, labels, bias, where, kernel_transposed, options, LossOptions)
    batch, dtype = jnp.shape(labels), compute_dtype(rows["features"].dtype)
    if weights is not None:
        weights = checks.float_array("weights", weights).astype(dtype)
        checks.has_shape("weights", weights, batch, "one factor for each row of features")
        rows["weights"], rows["active"] = weights.reshape(-1), weights.reshape(-1) != 0
    ignore_index = options.get("ignore_index")
    if ignore_index is not None:
        counted = rows["labels"] != ignore_index
        rows["active"] = counted if rows["active"] is None else rows["active"] & counted
    if reduction == "mean":
        share = jnp.ones(rows["labels"].shape, dtype) if rows["weights"] is None else rows["weights"]
        share = share if rows["active"] is None else jnp.where(rows["active"], share, 0)
        rows["weights"] = shares(share)
    compute = "losses" if reduction == "none" else "sum"
    out = _in_blocks(compute, params, rows, known, kernel_transposed, block_size)
    return out.reshape(batch) if reduction == "none" else out


def linear_softmax_statistics(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    kernel_transposed: bool = False,
    block_size: int | None = None,
    **options: Unpack[LogitOptions],
) -> SoftmaxStatistics:
    r"""`softmax_statistics` of the logits `features @ kernel + bias`, which exist for one block of rows at a time.

    Log-probabilities and entropies for policy gradients and preference losses, logsumexp for z-losses, from one pass:
    :math:`2 N D V` operations, and :math:`6 N D V` more for the gradients, with any cotangents.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, or `(classes, features)` with `kernel_transposed`.
        labels: integers `(*batch,)`.
        bias: float array `(classes,)`.
        where: boolean `(classes,)`, the classes that take part.
        kernel_transposed: whether kernel is `(classes, features)`.
        block_size: rows at a time; None for `default_block_size`.
        **options: see `LogitOptions`.

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
    params, rows, known = _checked(features, kernel, labels, bias, where, kernel_transposed, options, LogitOptions)
    out = _in_blocks("statistics", params, rows, known, kernel_transposed, block_size)
    return SoftmaxStatistics(*(number.reshape(jnp.shape(labels)) for number in out))


def _in_blocks(compute: str, params: dict, rows: dict, known: dict, transposed: bool, block_size: int | None) -> Any:
    if block_size is None:
        block_size = default_block_size(params["kernel"].shape[0 if transposed else 1], rows["features"].dtype)
    elif block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    # Typed alike, so that the gradient of the kernel is summed over rows, and that of features over classes, once.
    params, rows["features"] = vary_as(params, rows["labels"]), vary_as(rows["features"], params["kernel"])
    block = _Block(compute, transposed, tuple(sorted(known.items())))
    shards = class_shards(known["axis_name"])
    blocks = Blocks(block, block_size, known.get("derivative", "vjp"), shards)
    spec = () if compute == "sum" else spec_of(rows["labels"])
    return with_auto_axes(functools.partial(_run, blocks), spec, params, rows)
