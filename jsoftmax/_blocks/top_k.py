"""The likeliest classes of features · kernel, block by block, with their log-probabilities: a teacher to be stored."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.lax import PrecisionLike
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike

from jsoftmax._blocks.head import checked_head, logits_of, options_of
from jsoftmax._blocks.projection import Product
from jsoftmax._blocks.row_sharding import checked_row_sharding
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import LogitOptions, checked_rows
from jsoftmax._rows.probabilities import row_shares
from jsoftmax._rows.shards import ClassShards, class_shards


@in_any_layout("features")
def linear_top_k(
    features: ArrayLike,
    kernel: ArrayLike,
    k: int,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    kernel_transposed: bool = False,
    block_size: int | None = None,
    precision: PrecisionLike = None,
    row_sharding: Sharding | PartitionSpec | None = None,
    **options: Unpack[LogitOptions],
) -> tuple[Array, Array]:
    r"""The k likeliest classes of each row of the logits `features @ kernel + bias`, and their log-probabilities.

    .. math:: \log p_j = z_j - \log \sum_i e^{z_i}, \qquad z = (h W + b) / T

    Logits exist for one block of rows at a time. The sum is over all classes, not over the k.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, or `(classes, features)` with `kernel_transposed`.
        k: how many classes of each row, at most as many as there are.
        bias: float array `(classes,)`.
        where: boolean `(classes,)`, the classes that take part. Others come last, with −∞.
        kernel_transposed: whether kernel is `(classes, features)`.
        block_size: rows at a time; None for `default_block_size`.
        precision, row_sharding: as in `linear_softmax_cross_entropy`.
        **options: see `LogitOptions`. With `axis_name`, each device finds the likeliest of its classes, and they are
            merged; classes are numbered over all devices.

    Returns:
        Log-probabilities, `(*batch, k)`, from the largest down: float32, or float64 for float64 features. And the
        classes, int32 `(*batch, k)`; of equal ones, the first.

    Raises:
        TypeError: features or kernel are not floating-point.
        ValueError: k below 1 or above the number of classes, shapes that do not fit, or an option out of range.

    Derivatives: none; what is stored is a constant. Memory: one block of logits, and k numbers for each row.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> log_probs, classes = jsoftmax.linear_top_k(jnp.array([[1.0, 3.0]]), jnp.eye(2, 4), 2)
        >>> print(log_probs, classes)
        [[-0.211 -2.211]] [[1 0]]
    """
    rows = jnp.shape(features)[:-1]
    head = checked_head(
        features, kernel, jnp.zeros(rows, jnp.int32), bias, where, kernel_transposed, options, LogitOptions, precision
    )
    shards = class_shards(head.known["axis_name"])
    here = head.params["kernel"].shape[0 if kernel_transposed else 1]
    if not 1 <= k <= shards.count(here):
        raise ValueError(f"k must be between 1 and the {shards.count(here)} classes, got {k}")
    params, rows = jax.lax.stop_gradient((head.params, head.rows))
    block = _Block(k, head.product, shards, head.constants)
    split = checked_row_sharding(row_sharding, head.batch)
    found = head._replace(params=params, rows=rows).run(block, block_size, row_sharding=split)[0]
    return tuple(array.reshape(*head.batch, k) for array in found)


@dataclasses.dataclass(frozen=True)
class _Block:
    """The likeliest classes of one block of rows."""

    k: int
    product: Product
    shards: ClassShards
    constants: tuple[tuple[str, Any], ...]

    def __call__(self, dtypes: tuple, params: dict, rows: dict) -> Any:
        del dtypes
        options: Any = options_of(self.constants, params, rows)
        logits = logits_of(params, rows, self.product)
        where = None if params["where"] is None else jnp.broadcast_to(params["where"], logits.shape)
        rows_of_block = checked_rows(logits, None, -1, where, options)
        return self._likeliest(row_shares(rows_of_block, options.get("implementation")).log_p), ()

    def _likeliest(self, log_p: Array) -> tuple[Array, Array]:
        here = log_p.shape[-1]
        best, classes = lax.top_k(log_p, min(self.k, here))
        if not self.shards.names:
            return best, classes
        best, at = lax.top_k(self._side_by_side(best), self.k)
        classes = self._side_by_side(classes + self.shards.first(here))
        return best, jnp.take_along_axis(classes, at, axis=-1)

    def _side_by_side(self, found: Array) -> Array:
        """What every shard found, the same on all of them: by a sum, whose result JAX knows to be the same."""
        places, (rows, size) = self.shards.count(1), found.shape
        mine = jnp.arange(places).reshape(1, places, 1) == self.shards.first(1)
        every = jnp.where(mine, found[:, None, :], jnp.zeros((), found.dtype))
        return self.shards.sum(every).reshape(rows, places * size)
