"""Losses of pairs: each query against all items of the batch, a block of queries at a time."""

import dataclasses
from typing import Any, TypedDict, Unpack

import jax.numpy as jnp
from jax import Array, lax
from jax.lax import PrecisionLike
from jax.typing import ArrayLike

from jsoftmax._blocks.head import logits_of, options_of, weighted
from jsoftmax._blocks.pairs import PairBlock, Pairs, checked_pairs, compared
from jsoftmax._blocks.projection import Product
from jsoftmax._losses.row_losses import LossOptions, MarginOptions
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import DERIVATIVES
from jsoftmax._rows.shards import AxisName
from jsoftmax._rows.weights import REDUCTIONS


class ContrastiveOptions(MarginOptions, total=False):
    """Options of `contrastive_loss`: those of `LogitOptions`, and of `LossOptions` these, with the same meaning.

    margin, angular_margin: what is taken off each query's own item.
    label_smoothing: the share ε of the target that goes to the other items.
    smoothing: where it goes.
    z_loss: λ of the penalty λ·logsumexp².
    """

    label_smoothing: ArrayLike
    smoothing: str
    z_loss: ArrayLike


@in_any_layout("queries")
def contrastive_loss(
    queries: ArrayLike,
    items: ArrayLike | None = None,
    *,
    labels: ArrayLike | None = None,
    item_ids: ArrayLike | None = None,
    log_q: ArrayLike | None = None,
    symmetric: bool = True,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    block_size: int | None = None,
    precision: PrecisionLike = None,
    **options: Unpack[ContrastiveOptions],
) -> Array:
    r"""InfoNCE: cross-entropy of each query's own item against all items, and of each item against all queries.

    .. math:: \mathrm{loss}_i = \tfrac12 \Bigl(\log \sum_j e^{s_{ij}} - s_{ii}\Bigr)
        + \tfrac12 \Bigl(\log \sum_j e^{s_{ji}} - s_{ii}\Bigr), \qquad s_{ij} = q_i \cdot x_j / T

    This is the loss of CLIP for any batch: similarities exist for one block of queries at a time, and then for one
    block of items. N pairs of D features take :math:`12 N^2 D` operations with gradients.

    Args:
        queries: float array `(batch, features)`, usually of length 1 each.
        items: float array `(items, features)`, the first of which belong to the queries in their order; more are
            further negatives. None for the queries themselves, none of which is compared with itself: then `labels` say
            which belong together. Two views of each image, one after the other, with `labels` 0 … n − 1 twice, make the
            NT-Xent loss of SimCLR; labels of classes make the supervised contrast of SupCon.
        labels: integers `(items,)`, what each item and the query of the same number belong to. All items of a query's
            label share its target evenly, as in SupCon.
        item_ids: integers `(items,)`, what each item is. An item equal to a query's own is no negative: it is left out
            of that row. Not together with `labels`.
        log_q: `(items,)`, the logarithm of the items' expected counts, taken off the queries' similarities as in
            `in_batch_softmax_cross_entropy`; not the items'. Not differentiated.
        symmetric: whether the mean of both directions is taken; False for queries against items alone.
        weights: float array `(batch,)`, a factor for each pair. A pair of weight 0 takes no part, neither as query nor
            as item, NaN or not.
        reduction: "mean" divides by the sum of the weights, and is 0 if there is none; "sum"; "none" for each pair. A
            query that nothing belongs to has loss 0 and does not count.
        block_size: queries at a time; None for `default_block_size`.
        precision: of the similarities, as in `linear_softmax_cross_entropy`.
        **options: `temperature` (usually 0.01 to 0.1, often learnt), `softcap`, `margin`, `angular_margin`,
            `label_smoothing`, `smoothing`, `z_loss`, `derivative`, `implementation`; and `axis_name`: inside
            `shard_map`, the mesh axis (or axes) over which the *pairs* are split. Each device compares its queries with
            the items of all; the mean is that of all pairs, the same on all devices.

    Returns:
        A scalar, or `(batch,)`, in nats: float32, or float64 for float64 queries.

    Raises:
        TypeError: queries or items are not floating-point, labels or item_ids not integers.
        ValueError: shapes that do not fit, labels together with item_ids, no labels where items is None, margins
            together with labels, or an option out of range.

    Derivatives: with respect to queries, items, weights, temperature and every differentiable option; reverse mode and
    forward over reverse, every mode with `derivative="jvp"`. Memory: one block of similarities and a float32 copy of
    the items' gradient. Over devices, items (and, for the other direction, queries) are gathered once, and their
    gradients are summed once where they belong: for n devices each receives (n − 1)/n of them, as in a ring, whose
    backward pass would send the vectors round a second time.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> vectors = jnp.eye(3)
        >>> print(f"{jsoftmax.contrastive_loss(vectors, vectors, temperature=0.5):.4f}")
        0.2395
        >>> views, of_image = jnp.concatenate([vectors, vectors]), jnp.array([0, 1, 2, 0, 1, 2])
        >>> print(f"{jsoftmax.contrastive_loss(views, labels=of_image, temperature=0.5):.4f}")
        0.4327

    References:
        van den Oord et al., *Representation Learning with Contrastive Predictive Coding*, 2018 (InfoNCE); Radford et
        al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021 (CLIP); Chen et al., *A
        Simple Framework for Contrastive Learning of Visual Representations*, 2020 (NT-Xent); Khosla et al.,
        *Supervised Contrastive Learning*, 2020.
    """
    checks.only_options(options, ContrastiveOptions)
    checks.one_of("reduction", reduction, REDUCTIONS)
    if items is None and labels is None:
        raise ValueError("labels must be given where items is None: they say which queries belong together")
    pairs = checked_pairs(queries, items, *_ids(labels, item_ids), weights, options.pop("axis_name", None))
    forward: LossOptions = {**options}
    if log_q is not None:
        log_q = checks.float_array("log_q", log_q)
        checks.has_shape("log_q", log_q, pairs.items.shape[:1], "one number for each item")
        forward["logit_adjustment"] = -pairs.gather(lax.stop_gradient(log_q))
    alike = labels is not None
    loss = _one_way(pairs, alike, reduction, block_size, precision, forward)
    if symmetric and not pairs.to_itself:
        loss = (loss + _one_way(pairs, alike, reduction, block_size, precision, {**options}, backwards=True)) / 2
    return loss if reduction == "none" else pairs.sum(loss)


def _one_way(
    pairs: Pairs,
    alike: bool,
    reduction: str,
    block_size: int | None,
    precision: PrecisionLike,
    options: LossOptions,
    backwards: bool = False,
) -> Array:
    head = pairs.head(options, LossOptions, reduction, precision, backwards)
    compute = "losses" if reduction == "none" else "sum"
    block = PairBlock(compute, False, head.product, head.constants, alike, pairs.to_itself)
    return head.run(block, block_size)[0]


def _ids(labels: ArrayLike | None, item_ids: ArrayLike | None) -> tuple[str, ArrayLike | None]:
    if labels is not None and item_ids is not None:
        raise ValueError("labels and item_ids are both given; labels say what is alike already")
    return ("item_ids", item_ids) if labels is None else ("labels", labels)


class _SigmoidOptions(TypedDict, total=False):
    temperature: ArrayLike
    bias: ArrayLike
    derivative: str


@in_any_layout("queries")
def sigmoid_contrastive_loss(
    queries: ArrayLike,
    items: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    bias: ArrayLike = 0.0,
    labels: ArrayLike | None = None,
    item_ids: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    block_size: int | None = None,
    derivative: str = "vjp",
    precision: PrecisionLike = None,
    axis_name: AxisName = None,
) -> Array:
    r"""The loss of SigLIP: of each query and each item, whether they belong together, as questions of their own.

    .. math:: \mathrm{loss}_i = -\sum_j \log \sigma\bigl(y_{ij}\,(q_i \cdot x_j / T + b)\bigr), \qquad
        y_{ij} = 1 \text{ if they do, else } {-1}

    Nothing is summed over a row before the logarithm, so that one direction is both. The authors start from T = 0.1 and
    b = −10, with which the many pairs that don't belong together begin right, and learn both.

    Args:
        queries: float array `(batch, features)`, usually of length 1 each.
        items: float array `(items, features)`, the first of which belong to the queries in their order.
        temperature: a number, or one a query.
        bias: a number.
        labels: integers `(items,)`: all items of a query's label belong to it.
        item_ids: integers `(items,)`: an item equal to a query's own one is left out of that row. Not with `labels`.
        weights: float array `(batch,)`. A pair of weight 0 takes no part, neither as query nor as item.
        reduction: "mean" divides by the sum of the weights; "sum"; "none" for the loss of each query.
        block_size: queries at a time; None for `default_block_size`.
        derivative: "vjp", or "jvp" for every mode.
        precision: of the similarities, as in `linear_softmax_cross_entropy`.
        axis_name: inside `shard_map`, the mesh axis (or axes) over which the pairs are split, as in `contrastive_loss`.

    Returns:
        A scalar, or `(batch,)`, in nats: float32, or float64 for float64 queries.

    Raises:
        TypeError: queries or items are not floating-point, labels or item_ids not integers.
        ValueError: shapes that do not fit, labels together with item_ids, or an option out of range.

    Derivatives: with respect to queries, items, weights, temperature and bias. Memory and what devices send: as
    `contrastive_loss`, in half its operations.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> vectors = jnp.eye(3)
        >>> print(f"{jsoftmax.sigmoid_contrastive_loss(vectors, vectors, temperature=0.1, bias=-5.0):.4f}")
        0.0201

    References:
        Zhai et al., *Sigmoid Loss for Language Image Pre-Training*, 2023.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("derivative", derivative, DERIVATIVES)
    checks.within("temperature", temperature, 0.0, float("inf"))
    checks.has_shape("bias", jnp.asarray(bias), (), "one number")
    pairs = checked_pairs(queries, items, *_ids(labels, item_ids), weights, axis_name)
    options = {"temperature": temperature, "bias": bias, "derivative": derivative}
    head = pairs.head(options, _SigmoidOptions, reduction, precision)
    block = _SigmoidBlock(reduction != "none", labels is not None, head.product, head.constants)
    loss = head.run(block, block_size)[0]
    return loss if reduction == "none" else pairs.sum(loss)


@dataclasses.dataclass(frozen=True)
class _SigmoidBlock:
    """The losses of one block of queries, or their sum."""

    is_sum: bool
    alike: bool
    product: Product
    constants: tuple[tuple[str, Any], ...]

    def __call__(self, dtypes: tuple, params: dict, rows: dict) -> tuple[Array, tuple]:
        del dtypes
        options, active = options_of(self.constants, params, rows), rows["active"]
        z = logits_of(params, rows, self.product)
        temperature, bias = (jnp.asarray(options[name], z.dtype) for name in ("temperature", "bias"))
        z = z / (temperature[:, None] if temperature.ndim else temperature) + bias
        positive, where = compared(params, rows, z.shape, self.alike, to_itself=False)
        each = jnp.logaddexp(jnp.where(positive, -z, z), 0.0)
        losses = jnp.sum(each if where is None else jnp.where(where, each, 0), axis=1)
        if active is not None:
            losses = jnp.where(active, losses, 0)
        return weighted(losses, rows, self.is_sum), ()
