"""Cross-entropy against the other items of the batch: two-tower retrieval."""

from typing import Unpack

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._blocks.pairs import checked_vectors
from jsoftmax._blocks.projection import Product, project
from jsoftmax._losses.row_losses import CrossEntropy, LossOptions, row_losses
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout


@in_any_layout("queries")
def in_batch_softmax_cross_entropy(
    queries: ArrayLike,
    items: ArrayLike,
    *,
    log_q: ArrayLike | None = None,
    item_ids: ArrayLike | None = None,
    **options: Unpack[LossOptions],
) -> Array:
    r"""Cross-entropy of each query's own item against all items of the batch: the loss of two-tower retrieval.

    .. math:: \mathrm{loss}_i = \log \sum_j e^{s_{ij}} - s_{ii}, \qquad
        s_{ij} = \frac{q_i \cdot x_j}{T} - \log Q_j

    Popular items are in many batches, and would be pushed down as negatives too often; subtracting the logarithm of how
    often an item is expected in a batch makes up for it. An item equal to a query's own one is no negative: given
    `item_ids`, it is left out of that row.

    Args:
        queries: float array `(batch, features)`.
        items: float array `(items, features)`, the first of which belong to the queries in their order; more are
            further negatives.
        log_q: `(items,)`, the logarithm of the items' expected counts, such as log(batch size · frequency); None for
            items that are all alike. Not differentiated.
        item_ids: integers `(items,)`, what each item is.
        **options: see `LossOptions`; `temperature`, which acts before the correction, is usually 0.01 to 0.1 for
            vectors of length 1.

    Returns:
        The loss of each query `(batch,)` in nats: float32, or float64 for float64 queries.

    Raises:
        TypeError: queries or items are not floating-point, item_ids are not integers.
        ValueError: shapes that do not fit, or an option out of range.

    Derivatives: with respect to queries, items and temperature; every mode with `derivative="jvp"`. Memory: the logits
    `(batch, items)`; where they are too many, see `contrastive_loss`.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> vectors = jnp.eye(3)
        >>> print(jsoftmax.in_batch_softmax_cross_entropy(vectors, vectors, temperature=0.5))
        [0.2395 0.2395 0.2395]

    References:
        Yi et al., *Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations*, 2019.
    """
    checks.only_options(options, LossOptions)
    queries, items = checked_vectors(queries, items)
    z = project(queries, items, Product(True, options.get("derivative", "vjp")))
    rows, count = z.shape
    if log_q is not None:
        log_q = checks.float_array("log_q", log_q).astype(z.dtype)
        checks.has_shape("log_q", log_q, (count,), "one number for each item")
        adjustment = options.get("logit_adjustment")
        log_q = lax.stop_gradient(log_q)
        options["logit_adjustment"] = -log_q if adjustment is None else jnp.asarray(adjustment) - log_q
    labels, where = jnp.arange(rows), None
    if item_ids is not None:
        item_ids = checks.integer_array("item_ids", item_ids)
        checks.has_shape("item_ids", item_ids, (count,), "what each item is")
        where = (item_ids[:rows, None] != item_ids[None]) | jnp.eye(rows, count, dtype=bool)
    if rows == 0:
        return jnp.zeros(0, z.dtype)
    return row_losses(CrossEntropy(), z, labels, where=where, **options)
