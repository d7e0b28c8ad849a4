"""Hierarchical softmax: a class is a path of yes-or-no decisions down a binary tree.

    log p_v = Σ over the path of log σ(±s_n),  s_n = h·w_n + b_n

The two probabilities of a decision sum to one, and so do those of all leaves.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._blocks.projection import Product, project
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.labels import is_class
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.varying import scan
from jsoftmax._vocabularies.trees import ClassTree


def _checked(
    features: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None, tree: ClassTree, transposed: bool
) -> tuple[Array, Array, Array | None]:
    features, kernel = checks.float_array("features", features), checks.float_array("kernel", kernel)
    if features.ndim == 0:
        raise ValueError("features has shape (), but needs (*batch, features)")
    width, decisions = features.shape[-1], tree.decisions
    needs = (decisions, width) if transposed else (width, decisions)
    meaning = "(decisions, features)" if transposed else "(features, decisions); see kernel_transposed"
    checks.has_shape("kernel", kernel, needs, meaning)
    if bias is not None:
        bias = checks.float_array("bias", bias)
        checks.has_shape("bias", bias, (decisions,), "one number for each decision of the tree")
    return features, kernel, bias


def _scores(features: Array, kernel: Array, bias: Array | None, nodes: Array, transposed: bool) -> Array:
    """s at some decisions of each row, (rows, some); of any numbers at all if the tree has no decision."""
    dtype = compute_dtype(features.dtype)
    if kernel.size == 0:
        return jnp.zeros(nodes.shape, dtype)
    rows = kernel[nodes] if transposed else jnp.moveaxis(kernel[:, nodes], 0, -1)
    rows = rows.astype(features.dtype)
    s = jnp.einsum("nd,nkd->nk", features, rows, preferred_element_type=dtype)
    return s if bias is None else s + bias[nodes].astype(dtype)


@in_any_layout("features")
def hierarchical_softmax_cross_entropy(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    tree: ClassTree,
    *,
    bias: ArrayLike | None = None,
    kernel_transposed: bool = False,
    ignore_index: int | None = None,
) -> Array:
    r"""Minus the log-probability of the path to the label: the cost is the length of the path, not the classes.

    .. math:: \mathrm{loss} = \sum_{n \in \mathrm{path}(y)} \log\bigl(1 + e^{-t_n s_n}\bigr), \qquad
        s_n = h w_n + b_n, \quad t_n = \pm 1

    N rows of D features take :math:`2 N D \,\mathrm{depth}` operations, three times that with gradients.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, decisions)`, or `(decisions, features)` with `kernel_transposed`, which is
            faster here: a decision is then one contiguous row.
        labels: integers `(*batch,)`. One that is no class makes its row NaN.
        tree: `huffman_tree`, `nested_tree` or `parent_tree`.
        bias: float array `(decisions,)`.
        kernel_transposed: whether kernel is `(decisions, features)`.
        ignore_index: rows with this label give loss 0 and gradient 0, whatever their features hold.

    Returns:
        The loss of each row `(*batch,)` in nats: float32, or float64 for float64 features. Exact: to evaluate, too.

    Raises:
        TypeError: features or kernel are not floating-point, labels are not integers.
        ValueError: shapes that do not fit.

    Derivatives: with respect to features, kernel and bias, every mode and order. The kernel's gradient is one
    scatter-add of the rows that were read. Memory: these rows, `(*batch, depth, features)`.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> tree = jsoftmax.huffman_tree([4, 2, 1, 1])  # one, two, three and three decisions
        >>> kernel = jnp.zeros((5, 3))
        >>> print(jsoftmax.hierarchical_softmax_cross_entropy(jnp.ones((4, 5)), kernel, jnp.arange(4), tree))
        [0.6931 1.3863 2.0794 2.0794]

    References:
        Morin and Bengio, *Hierarchical Probabilistic Neural Network Language Model*, 2005;
        Mikolov et al., *Distributed Representations of Words and Phrases*, 2013 (Huffman trees).
    """
    features, kernel, bias = _checked(features, kernel, bias, tree, kernel_transposed)
    labels, batch = checks.integer_array("labels", labels), features.shape[:-1]
    checks.has_shape("labels", labels, batch, "one class number for each row of features")
    labels, features = labels.reshape(-1), features.reshape(-1, features.shape[-1])
    idle = jnp.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    # A NaN in an ignored row would reach the kernel's gradient as 0 · NaN.
    features = jnp.where(idle[:, None], 0, features)
    known = is_class(labels, tree.classes)
    at = jnp.where(known & ~idle, labels, 0)
    turns = tree.turns[at]
    s = _scores(features, kernel, bias, tree.path[at], kernel_transposed)
    each = jnp.where(turns == 0, 0, jax.nn.softplus(-turns.astype(s.dtype) * s))
    # A factor of NaN reaches the gradient as well.
    losses = jnp.sum(each, axis=1) * jnp.where(known, 1, jnp.nan).astype(s.dtype)
    return jnp.where(idle, 0, losses).reshape(batch)


@in_any_layout("features")
def hierarchical_log_softmax(
    features: ArrayLike,
    kernel: ArrayLike,
    tree: ClassTree,
    *,
    bias: ArrayLike | None = None,
    kernel_transposed: bool = False,
) -> Array:
    r"""The log-probabilities of all classes under `hierarchical_softmax_cross_entropy`'s model.

    .. math:: \log p_v = -\sum_{n \in \mathrm{path}(v)} \log\bigl(1 + e^{-t_n s_n}\bigr)

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, decisions)`, or `(decisions, features)` with `kernel_transposed`.
        tree: `huffman_tree`, `nested_tree` or `parent_tree`.
        bias: float array `(decisions,)`.
        kernel_transposed: whether kernel is `(decisions, features)`.

    Returns:
        `(*batch, classes)` in nats: float32, or float64 for float64 features.

    Raises:
        TypeError: features or kernel are not floating-point.
        ValueError: shapes that do not fit.

    Derivatives: reverse mode and forward over reverse. Takes the product of features and kernel, and depth additions
    for each class. Memory: three arrays of the result's size.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> tree = jsoftmax.nested_tree([[0, 1], [2, 3]])
        >>> kernel = jnp.array([[0.0, 1.0, 2.0], [0.5, 0.0, 1.0]])
        >>> log_p = jsoftmax.hierarchical_log_softmax(jnp.ones((1, 2)), kernel, tree)
        >>> print(f"{jnp.exp(log_p).sum():.4f}")
        1.0000
    """
    features, kernel, bias = _checked(features, kernel, bias, tree, kernel_transposed)
    batch, features = features.shape[:-1], features.reshape(-1, features.shape[-1])
    dtype = compute_dtype(features.dtype)
    if tree.decisions == 0:
        return jnp.zeros((*batch, tree.classes), dtype)
    total = _all_log_probs(features, kernel, bias, tree, kernel_transposed)
    return total.reshape(*batch, tree.classes)


@functools.partial(jax.jit, static_argnums=4)
def _all_log_probs(features: Array, kernel: Array, bias: Array | None, tree: ClassTree, transposed: bool) -> Array:
    dtype = compute_dtype(features.dtype)
    s = project(features, kernel, Product(transposed))
    s = s if bias is None else s + jnp.broadcast_to(bias.astype(dtype), s.shape)
    # Either way at each decision, and a last entry that adds nothing.
    turned = jnp.concatenate([-jax.nn.softplus(-s), -jax.nn.softplus(s), jnp.zeros((s.shape[0], 1), dtype)], axis=1)
    side = jnp.where(tree.turns > 0, 0, tree.decisions)
    at = jnp.where(tree.turns == 0, 2 * tree.decisions, tree.path + side)

    def add(total: Array, column: Array) -> tuple[Array, None]:
        return total + turned[:, column], None

    return scan(add, jnp.zeros((s.shape[0], tree.classes), dtype), at.T)[0]


class TopClasses(NamedTuple):
    """The classes that a beam search found, best first.

    Attributes:
        log_prob: `(*batch, k)`, −∞ where fewer were found.
        classes: int32 `(*batch, k)`; −1 where fewer were found.
        exact: `(*batch,)`, whether nothing that was dropped on the way could have been among them.
    """

    log_prob: Array
    classes: Array
    exact: Array


@in_any_layout("features")
def hierarchical_top_k(
    features: ArrayLike,
    kernel: ArrayLike,
    tree: ClassTree,
    k: int,
    *,
    beam_size: int | None = None,
    bias: ArrayLike | None = None,
    kernel_transposed: bool = False,
) -> TopClasses:
    r"""The k most probable classes by a beam search down the tree, without scoring every class.

    At each level the beam keeps the `beam_size` most probable nodes. A node is at least as probable as anything below
    it, so that the answer is known to be exact if no node that was dropped was more probable than the last class found:
    `exact` says so for each row. Where it is False, try a wider beam.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, decisions)`, or `(decisions, features)` with `kernel_transposed`.
        tree: `huffman_tree`, `nested_tree` or `parent_tree`.
        k: how many classes.
        beam_size: how many nodes of a level to keep, at least k; None for 2k + 8.
        bias: float array `(decisions,)`.
        kernel_transposed: whether kernel is `(decisions, features)`.

    Returns:
        `TopClasses`.

    Raises:
        TypeError: features or kernel are not floating-point.
        ValueError: k that is not between 1 and the classes, a beam below k, or shapes that do not fit.

    Derivatives: not meant to be differentiated. N rows take at most :math:`2 N D \,\mathrm{depth} \cdot` beam_size
    operations.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> tree = jsoftmax.huffman_tree([4, 2, 1, 1])
        >>> top = jsoftmax.hierarchical_top_k(jnp.ones((1, 2)), jnp.full((2, 3), 0.5), tree, 2)
        >>> print(top.classes.shape, top.exact)
        (1, 2) [ True]
    """
    features, kernel, bias = _checked(features, kernel, bias, tree, kernel_transposed)
    if not 1 <= k <= tree.classes:
        raise ValueError(f"k must be between 1 and {tree.classes}, the number of classes, got {k}")
    size = 2 * k + 8 if beam_size is None else beam_size
    if size < k:
        raise ValueError(f"beam_size must be at least k = {k}, got {size}")
    batch, features = features.shape[:-1], features.reshape(-1, features.shape[-1])
    found = _beam_search(features, kernel, bias, tree, k, size, kernel_transposed)
    return TopClasses(*(numbers.reshape(*batch, *numbers.shape[1:]) for numbers in found))


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _beam_search(
    features: Array, kernel: Array, bias: Array | None, tree: ClassTree, k: int, size: int, transposed: bool
) -> TopClasses:
    rows, dtype = features.shape[0], compute_dtype(features.dtype)
    decisions = tree.decisions

    def descend(state: tuple[Array, Array, Array], _) -> tuple[tuple[Array, Array, Array], None]:
        log_p, nodes, dropped = state
        inner = nodes < decisions
        at = jnp.where(inner, nodes, 0)
        s = _scores(features, kernel, bias, at, transposed)
        below = tree.children[at] if decisions else jnp.zeros((*at.shape, 2), jnp.int32)
        # A class stays as it is, and has no second child.
        first = jnp.where(inner, log_p - jax.nn.softplus(-s), log_p)
        second = jnp.where(inner, log_p - jax.nn.softplus(s), -jnp.inf)
        together = jnp.concatenate([first, second], axis=1)
        nodes = jnp.concatenate([jnp.where(inner, below[..., 0], nodes), below[..., 1]], axis=1)
        best, order = lax.top_k(together, size + 1)
        kept = jnp.take_along_axis(nodes, order[:, :size], axis=1)
        return (best[:, :size], kept, jnp.maximum(dropped, best[:, size])), None

    log_p = jnp.full((rows, size), -jnp.inf, dtype).at[:, 0].set(0)
    start = (log_p, jnp.broadcast_to(tree.root, (rows, size)), jnp.full(rows, -jnp.inf, dtype))
    (log_p, nodes, dropped), _ = scan(descend, start, None, length=tree.depth)
    found = log_p[:, :k]
    classes = jnp.where(found > -jnp.inf, nodes[:, :k] - decisions, -1)
    return TopClasses(found, classes, dropped <= found[:, -1])
