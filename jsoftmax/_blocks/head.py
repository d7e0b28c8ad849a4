"""The last layer of a classifier, features · kernel + bias: its arguments, and the dense loss on a block of logits."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._blocks.blocks import Blocks
from jsoftmax._blocks.projection import project
from jsoftmax._losses.row_losses import CrossEntropy, row_losses
from jsoftmax._losses.statistics import SoftmaxStatistics, softmax_statistics
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.options import SupportOptions
from jsoftmax._rows.shards import class_shards, devices_of_mesh
from jsoftmax._rows.support import checked_support
from jsoftmax._rows.varying import axes_of, vary_floats


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
    with_statistics: bool  # beside the losses, not differentiated
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
            return self._statistics(logits, where, rows, options), ()
        losses = row_losses(
            CrossEntropy(), logits, rows["labels"], where=where, active=active, numbers=rows["numbers"], **options
        )
        if rows["weights"] is not None:
            losses = losses * rows["weights"]
        aux = self._statistics(jax.lax.stop_gradient(logits), where, rows, options) if self.with_statistics else ()
        return (jnp.sum(losses) if self.compute == "sum" else losses), aux

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
    transposed: bool


def checked_head(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None,
    where: ArrayLike | None,
    kernel_transposed: bool,
    options: Mapping[str, Any],
    names: type,
) -> Head:
    checks.only_options(options, names)
    features, kernel = checks.float_array("features", features), checks.float_array("kernel", kernel)
    labels = jnp.asarray(labels)
    if features.ndim == 0 or kernel.ndim != 2:
        raise ValueError(
            f"features has shape {features.shape} and kernel {kernel.shape}, but need (*batch, features) and a matrix"
        )
    batch, width = features.shape[:-1], features.shape[-1]
    classes = kernel.shape[0 if kernel_transposed else 1]
    checks.has_kernel_shape(kernel, width, classes, kernel_transposed)
    if jnp.issubdtype(labels.dtype, jnp.floating) and labels.ndim == features.ndim:
        checks.has_shape("labels", labels, (*batch, classes), "one probability for each class of each row of features")
    else:
        labels = checks.integer_array("labels", labels)
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
        if value is None or isinstance(value, str):
            known[name] = value
        elif checks.known(value) and jnp.ndim(value) == 0:
            known[name] = int(value) if jnp.issubdtype(jnp.asarray(value).dtype, jnp.integer) else float(value)
        elif jnp.ndim(value) == 0 or name == "class_weights":
            shared[name] = jnp.asarray(value)
        elif name == "support":
            support = checked_support(value, batch)
            each[name] = support.reshape(-1, support.shape[-1])
        else:
            each[name] = checks.scalar_or_rows(name, value, batch).reshape(-1)
    params = {"kernel": kernel, "bias": bias, "where": where, "options": shared}
    flat = labels.reshape(-1, *labels.shape[len(batch) :])
    rows = {"features": features.reshape(-1, width), "labels": flat, "options": each}
    numbers = jnp.arange(flat.shape[0])
    rows |= {"active": None, "weights": None, "numbers": numbers}
    return Head(params, rows, known, batch, kernel_transposed)


def in_blocks(
    head: Head, compute: str, block_size: int | None, with_statistics: bool = False, skip: bool = False
) -> Any:
    """Value and statistics, from as many rows at a time; those that don't count are skipped if `skip`."""
    params, rows, known = head.params, dict(head.rows), head.known
    if block_size is None:
        block_size = default_block_size(params["kernel"].shape[0 if head.transposed else 1], rows["features"].dtype)
    elif block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    block = _Block(compute, with_statistics, head.transposed, tuple(sorted(known.items())))
    shards = class_shards(known["axis_name"])
    # Typed alike, so that the gradient of the kernel is summed over rows, and that of features over classes, once.
    params, rows = vary_floats((params, rows), axes_of(params, rows) - set(shards.names))
    rows["features"] = vary_floats(rows["features"], axes_of(params["kernel"]))
    blocks = Blocks(block, block_size, known.get("derivative", "vjp"), shards)
    return _run(blocks, params, rows, rows["active"] if skip else None)
