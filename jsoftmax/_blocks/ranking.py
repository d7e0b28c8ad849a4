"""Ranks of labels from features and kernel, a block of rows at a time."""

import dataclasses
from typing import TypedDict

import jax
from jax import Array
from jax.lax import PrecisionLike
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike

from jsoftmax._blocks.head import checked_head, logits_of
from jsoftmax._blocks.projection import Product
from jsoftmax._blocks.row_sharding import checked_row_sharding
from jsoftmax._losses.ranking import TIES, checked_exclude, row_ranks
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import checked_rows
from jsoftmax._rows.shards import AxisName


class _RankOptions(TypedDict):
    axis_name: AxisName


@in_any_layout("features")
def linear_ranks(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    exclude: ArrayLike | None = None,
    ties: str = "realistic",
    kernel_transposed: bool = False,
    block_size: int | None = None,
    precision: PrecisionLike = None,
    row_sharding: Sharding | PartitionSpec | None = None,
    axis_name: AxisName = None,
) -> Array:
    r"""`ranks` of the logits `features @ kernel + bias`, which exist for one block of rows at a time.

    How a catalogue is ranked, exactly: all its items, none of them sorted.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, or `(classes, features)` with `kernel_transposed`, such as a table of
            items.
        labels: integers `(*batch,)`.
        bias: float array `(classes,)`.
        where: boolean `(classes,)`, the classes that take part. Costs a copy of the kernel.
        exclude: integers `(*batch, k)`, classes that are not counted in their row, such as what a user has seen. −1 is
            no class.
        ties: "realistic", "optimistic" or "pessimistic", as in `ranks`.
        kernel_transposed: whether kernel is `(classes, features)`.
        block_size: rows at a time; None for `default_block_size`.
        precision, row_sharding: as in `linear_softmax_cross_entropy`.
        axis_name: inside `shard_map`, the mesh axis (or axes) over which the classes are split.

    Returns:
        float32 `(*batch,)`, as `ranks`.

    Raises:
        TypeError: features or kernel are not floating-point, labels or exclude not integers.
        ValueError: shapes that do not fit, or another word for `ties`.

    Derivatives: none. Memory: one block of logits.

    Example:
        >>> import jax.numpy as jnp
        >>> from jsoftmax import ranking
        >>> users, items = jnp.eye(2, 3), jnp.array([[1.0, 0, 0], [2.0, 1, 0], [0, 3.0, 0]])
        >>> print(ranking.linear_ranks(users, items, jnp.array([0, 2]), kernel_transposed=True))
        [2. 1.]
    """
    checks.one_of("ties", ties, tuple(TIES))
    labels = checks.integer_array("labels", labels)
    options = {"axis_name": axis_name}
    head = checked_head(features, kernel, labels, bias, where, kernel_transposed, options, _RankOptions, precision)
    exclude = checked_exclude(exclude, head.batch)
    if exclude is not None:
        exclude = exclude.reshape(-1, exclude.shape[-1])
    head.rows["exclude"] = exclude
    block = _RankBlock(ties, head.product, axis_name)
    split = checked_row_sharding(row_sharding, head.batch)
    return head.run(block, block_size, row_sharding=split)[0].reshape(head.batch)


@dataclasses.dataclass(frozen=True)
class _RankBlock:
    """The ranks of one block of rows."""

    ties: str
    product: Product
    axis_name: AxisName

    def __call__(self, dtypes: tuple, params: dict, rows: dict) -> tuple[Array, tuple]:
        del dtypes
        params, rows = jax.lax.stop_gradient((params, rows))
        logits = logits_of(params, rows, self.product)
        checked = checked_rows(logits, rows["labels"], -1, params["where"], {"axis_name": self.axis_name})
        return row_ranks(checked, rows["exclude"], self.ties), ()
