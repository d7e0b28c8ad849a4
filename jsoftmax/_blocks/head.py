"""The last layer of a classifier, features · kernel + bias: its arguments, and the dense loss on a block of logits."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jsoftmax._blocks.blocks import Blocks
from jsoftmax._blocks.projection import Product, checked_precision, project
from jsoftmax._blocks.row_sharding import RowSharding
from jsoftmax._losses.row_losses import CrossEntropy, row_losses
from jsoftmax._losses.statistics import SoftmaxStatistics, softmax_statistics
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.options import SupportOptions
from jsoftmax._rows.shards import class_shards, devices_of_mesh
from jsoftmax._rows.support import checked_support
from jsoftmax._rows.varying import axes_of, vary_floats
from jsoftmax._rows.weights import REDUCTIONS, shares


def default_block_size(classes: int, dtype: DTypeLike) -> int:
    """Rows in a block: a power of two from 128 to 4096 whose logits fill 64 MiB on a CPU, 1 GiB on an accelerator.

    Large enough for the products to run at full speed, small beside the kernel's gradient. On a mesh set by
    `jax.set_mesh`, each of its devices gets as much.
    """
    budget, devices = 2**26 if jax.default_backend() == "cpu" else 2**30, devices_of_mesh()
    rows = budget * devices // (max(classes, 1) * jnp.dtype(compute_dtype(dtype)).itemsize)
    return min(max(1 << max(rows.bit_length() - 1, 0), 128 * devices), 4096 * devices)


def logits_of(params: dict, rows: dict, product: Product, of: str = "") -> Array:
    """features · kernel + bias of a block of rows; of those that are not active, nothing but the bias."""
    features, bias = rows[f"{of}features"], params[f"{of}bias"]
    if rows["active"] is not None:
        # A NaN in an idle row would reach the kernel's gradient as 0 · NaN.
        features = jnp.where(rows["active"][:, None], features, 0)
    logits = project(features, params[f"{of}kernel"], product)
    return logits if bias is None else logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)


def options_of(constants: tuple[tuple[str, Any], ...], params: dict, rows: dict) -> dict[str, Any]:
    """The options of a block: those that are known, that all blocks share, and of its own rows."""
    return {**dict(constants), **params["options"], **rows["options"]}


def weighted(losses: Array, rows: dict, is_sum: bool) -> Array:
    losses = losses if rows["weights"] is None else losses * rows["weights"]
    return jnp.sum(losses) if is_sum else losses


@dataclasses.dataclass(frozen=True)
class Block:
    """The dense computation on one block of rows; hashable, so that each program is compiled once."""

    compute: str  # "statistics", "losses" or their "sum"
    with_statistics: bool  # beside the losses, not differentiated
    product: Product
    constants: tuple[tuple[str, Any], ...]  # options whose values are known

    def __call__(self, dtypes: tuple, params: dict, rows: dict) -> Any:
        del dtypes  # the kernel is narrowed within its product
        options, active = options_of(self.constants, params, rows), rows["active"]
        logits = logits_of(params, rows, self.product)
        rows, where = self.targets(params, rows, logits.shape)
        if self.compute == "statistics":
            return self._statistics(logits, where, rows, options), ()
        losses = row_losses(
            CrossEntropy(), logits, rows["labels"], where=where, active=active, numbers=rows["numbers"], **options
        )
        aux = self._statistics(lax.stop_gradient(logits), where, rows, options) if self.with_statistics else ()
        return weighted(losses, rows, self.compute == "sum"), aux

    def targets(self, params: dict, rows: dict, shape: tuple[int, ...]) -> tuple[dict, Array | None]:
        """The rows with their labels, and which classes take part in logits of this shape."""
        return rows, None if params["where"] is None else jnp.broadcast_to(params["where"], shape)

    def _statistics(self, logits: Array, where: Array | None, rows: dict, options: dict) -> SoftmaxStatistics:
        """Of rows that do not count, zeros: their labels need be no classes."""
        of_logits: Any = {name: value for name, value in options.items() if name in SupportOptions.__annotations__}
        statistics = softmax_statistics(logits, rows["labels"], where=where, **of_logits)
        active = rows["active"]
        return statistics if active is None else jax.tree.map(lambda s: jnp.where(active, s, 0), statistics)


@functools.partial(jax.jit, static_argnums=0)
def _run(blocks: Blocks, params: dict, rows: dict, skipping: Array | None) -> Any:
    return blocks.apply(params, rows, skipping)


class Head(NamedTuple):
    """The checked arguments of a linear loss."""

    params: dict[str, Any]
    rows: dict[str, Any]
    known: dict[str, Any]  # options whose values are known
    batch: tuple[int, ...]
    product: Product

    @property
    def constants(self) -> tuple[tuple[str, Any], ...]:
        return hashable(self.known)

    def run(self, block: Callable, block_size: int | None, **how: Any) -> Any:
        """`run_blocks` of these arguments."""
        return run_blocks(block, self.params, self.rows, self.known, self.product, block_size, **how)


def checked_head(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    kernel_transposed: bool,
    options: Mapping[str, Any],
    names: type,
    precision: lax.PrecisionLike = None,
) -> Head:
    checks.only_options(options, names)
    features, kernel, bias = checked_product(features, kernel, bias, kernel_transposed)
    batch, width = features.shape[:-1], features.shape[-1]
    classes = kernel.shape[0 if kernel_transposed else 1]
    labels = checked_labels(labels, batch, classes)
    if where is not None:
        where = checks.bool_array("where", where)
        kernel = without_masked(kernel, where, kernel_transposed)
    known, shared, each = divided(options, batch)
    known["axis_name"] = class_shards(options.get("axis_name")).names or None
    params = {"kernel": kernel, "bias": bias, "where": where, "options": shared}
    rows = {"features": features.reshape(-1, width), "labels": labels, "options": each}
    rows |= {"active": None, "weights": None, "numbers": jnp.arange(labels.shape[0])}
    product = Product(kernel_transposed, options.get("derivative", "vjp"), checked_precision(precision))
    return Head(params, rows, known, batch, product)


def checked_product(
    features: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None, transposed: bool, of: str = ""
) -> tuple[Array, Array, Array | None]:
    """Features, kernel and bias of a head, whose arguments' names begin with `of`."""
    features, kernel = checks.float_array(f"{of}features", features), checks.float_array(f"{of}kernel", kernel)
    if features.ndim == 0 or kernel.ndim != 2:
        raise ValueError(
            f"{of}features has shape {features.shape} and {of}kernel {kernel.shape}, but need (*batch, features) and a "
            "matrix"
        )
    classes = kernel.shape[0 if transposed else 1]
    checks.has_kernel_shape(kernel, features.shape[-1], classes, transposed, f"{of}kernel")
    if classes == 0:
        raise ValueError(f"{of}kernel has shape {kernel.shape} and so no class; a loss needs one")
    if bias is not None:
        bias = checks.float_array(f"{of}bias", bias)
        checks.has_shape(f"{of}bias", bias, (classes,), "one number for each class")
    return features, kernel, bias


def without_masked(kernel: Array, where: Array, transposed: bool) -> Array:
    """What a masked class has in the kernel must not reach the features' gradient as 0 · NaN."""
    checks.has_shape(
        "where", where, kernel.shape[:1] if transposed else kernel.shape[1:], "True for a class that takes part"
    )
    return jnp.where(jnp.expand_dims(where, 1 if transposed else 0), kernel, 0)


def checked_labels(labels: ArrayLike, batch: tuple[int, ...], classes: int) -> Array:
    """Class numbers or probabilities, one row after the other."""
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == len(batch) + 1:
        checks.has_shape("labels", labels, (*batch, classes), "one probability for each class of each row of features")
    else:
        labels = checks.integer_array("labels", labels)
        checks.has_shape("labels", labels, batch, "one class number for each row of features")
    return labels.reshape(-1, *labels.shape[len(batch) :])


def counted(
    weights: ArrayLike | None, ignored: Array | None, reduction: str, batch: tuple[int, ...], dtype
) -> dict[str, Any]:
    """Which rows count, and the factor of each in the result; None for all and for 1."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    active = None if ignored is None else ~ignored
    if weights is not None:
        weights = checks.float_array("weights", weights).astype(dtype)
        checks.has_shape("weights", weights, batch, "one factor for each row of features")
        weights = weights.reshape(-1)
        active = weights != 0 if active is None else active & (weights != 0)
    if reduction == "mean":
        weights = jnp.ones(math.prod(batch), dtype) if weights is None else weights
        weights = shares(weights if active is None else jnp.where(active, weights, 0))
    return {"weights": weights, "active": active}


def hashable(known: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options whose values are known, as a block has them."""
    return tuple(sorted(known.items()))


def divided(options: Mapping[str, Any], batch: tuple[int, ...]) -> tuple[dict, dict, dict]:
    """Options whose values are known, that are the same for all rows, and that each row has of its own."""
    known, shared, each = {}, {}, {}
    for name, value in options.items():
        if name == "axis_name":
            continue
        if value is None or isinstance(value, str):
            known[name] = value
        elif checks.known(value) and jnp.ndim(value) == 0:
            known[name] = int(value) if jnp.issubdtype(jnp.asarray(value).dtype, jnp.integer) else float(value)
        elif jnp.ndim(value) == 0 or name in ("class_weights", "logit_adjustment"):
            shared[name] = jnp.asarray(value)
        elif name == "support":
            support = checked_support(value, batch)
            each[name] = support.reshape(-1, support.shape[-1])
        else:
            each[name] = checks.scalar_or_rows(name, value, batch).reshape(-1)
    return known, shared, each


def in_blocks(
    head: Head,
    compute: str,
    block_size: int | None,
    row_sharding: RowSharding | None,
    with_statistics: bool = False,
    skip: bool = False,
) -> Any:
    """Value and statistics, from as many rows at a time; those that don't count are skipped if `skip`."""
    block = Block(compute, with_statistics, head.product, head.constants)
    return head.run(block, block_size, skip=skip, row_sharding=row_sharding)


def run_blocks(
    block: Callable[[tuple, dict, dict], Any],
    params: dict[str, Any],
    rows: dict[str, Any],
    known: dict[str, Any],
    product: Product,
    block_size: int | None,
    skip: bool = False,
    row_sharding: RowSharding | None = None,
) -> Any:
    """What `block` makes of as many rows at a time, for the kernel and the features of those names and all beside."""
    if block_size is None:
        block_size = default_block_size(params["kernel"].shape[0 if product.transposed else 1], rows["features"].dtype)
    elif block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    shards = class_shards(known.get("axis_name"))
    # Typed alike, so that the gradient of the kernel is summed over rows, and that of features over classes, once.
    params, rows = vary_floats((params, rows), axes_of(params, rows) - set(shards.names))
    rows["features"] = vary_floats(rows["features"], axes_of(params["kernel"]))
    blocks = Blocks(block, block_size, product.derivative, shards, row_sharding)
    return _run(blocks, params, rows, rows["active"] if skip else None)
