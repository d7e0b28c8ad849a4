"""How well a linear head predicts: loss, accuracy and perplexity, without logits and without gradients."""

from typing import NamedTuple, Unpack

import jax.numpy as jnp
from jax import Array
from jax.lax import PrecisionLike
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike

from jsoftmax._blocks.linear import linear_softmax_cross_entropy
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import LogitOptions


class Evaluation(NamedTuple):
    """Sums over rows, so that those of batches and of devices add up: `jax.tree.map(jnp.add, one, other)`, `lax.psum`.

    Attributes:
        total: Σ w · loss, in nats.
        correct: Σ w over the rows whose label has the largest logit.
        weight: Σ w.
    """

    total: Array
    correct: Array
    weight: Array

    @property
    def loss(self) -> Array:
        """The mean negative log-likelihood, in nats; 0 if no row counts."""
        return self.total / self._divisor

    @property
    def accuracy(self) -> Array:
        """The share of rows whose label has the largest logit; 0 if no row counts."""
        return self.correct / self._divisor

    @property
    def perplexity(self) -> Array:
        """e^loss: among how many equally probable classes the model hesitates."""
        return jnp.exp(self.loss)

    @property
    def _divisor(self) -> Array:
        return jnp.where(self.weight == 0, 1, self.weight)


@in_any_layout("features")
def linear_evaluation(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    where: ArrayLike | None = None,
    kernel_transposed: bool = False,
    block_size: int | None = None,
    precision: PrecisionLike = None,
    row_sharding: Sharding | PartitionSpec | None = None,
    **options: Unpack[LogitOptions],
) -> Evaluation:
    r"""Loss, accuracy and perplexity of the logits `features @ kernel + bias`, a block of rows at a time.

    .. math:: \mathrm{loss} = -\sum_i w_i \log p_{i, y_i} \Big/ \sum_i w_i, \qquad
        \mathrm{perplexity} = e^{\mathrm{loss}}

    One product of :math:`2 N D V` operations for the rows that count; the others are not multiplied.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, or `(classes, features)` with `kernel_transposed`.
        labels: integers `(*batch,)`. One that is no class makes the result NaN.
        bias: float array `(classes,)`.
        weights: float array `(*batch,)`, how much each row counts. One of weight 0 is never looked at, NaN or not.
        ignore_index: rows with this label don't count.
        where: boolean `(classes,)`, the classes that take part.
        kernel_transposed: whether kernel is `(classes, features)`.
        block_size: rows at a time; None for `default_block_size`.
        precision, row_sharding: as in `linear_softmax_cross_entropy`.
        **options: see `LogitOptions`.

    Returns:
        `Evaluation`, of scalars: float32, or float64 for float64 features. Of equal largest logits the first counts as
        the model's answer, as in `argmax`. Inside `shard_map`, of the device's own rows.

    Raises:
        TypeError: features or kernel are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, or an option out of range.

    Derivatives: those of `linear_softmax_cross_entropy`, by `total` and `loss`. Memory: one block of logits.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> features, kernel, labels = jnp.eye(3), 2 * jnp.eye(3, 5), jnp.array([0, 1, -1])
        >>> found = jsoftmax.linear_evaluation(features, kernel, labels, ignore_index=-1)
        >>> print(f"{found.loss:.4f} {found.accuracy:.2f} {found.perplexity:.4f}")
        0.4327 1.00 1.5413
        >>> more = jsoftmax.linear_evaluation(features, kernel, labels[::-1], ignore_index=-1)
        >>> print(f"{jax.tree.map(jnp.add, found, more).accuracy:.2f}")
        0.75

    References:
        Jelinek et al., *Perplexity: a measure of the difficulty of speech recognition tasks*, 1977.
    """
    checks.only_options(options, LogitOptions)
    labels = checks.integer_array("labels", labels)
    total, found = linear_softmax_cross_entropy(
        features,
        kernel,
        labels,
        bias=bias,
        weights=weights,
        reduction="sum",
        where=where,
        kernel_transposed=kernel_transposed,
        block_size=block_size,
        return_statistics=True,
        skip_rows=True,
        precision=precision,
        row_sharding=row_sharding,
        ignore_index=ignore_index,
        **options,
    )
    weights = jnp.ones(labels.shape, total.dtype) if weights is None else jnp.asarray(weights).astype(total.dtype)
    if ignore_index is not None:
        weights = jnp.where(labels == ignore_index, 0, weights)
    correct = jnp.where(found.argmax == labels, weights, 0)
    return Evaluation(total, jnp.sum(correct), jnp.sum(weights))
