"""Hierarchical softmax: trees, and probabilities against a walk down the tree in plain Python."""

import heapq
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jsoftmax

WIDTH = 4
loss_of = jax.jit(jsoftmax.hierarchical_softmax_cross_entropy, static_argnames=("kernel_transposed", "ignore_index"))
log_softmax_of = jax.jit(jsoftmax.hierarchical_log_softmax, static_argnames="kernel_transposed")
top_k_of = jax.jit(jsoftmax.hierarchical_top_k, static_argnames=("k", "beam_size", "kernel_transposed"))


def model(tree, rows=3, seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    features = random.normal(size=(rows, WIDTH)).astype(np.float32)
    kernel = scale * random.normal(size=(WIDTH, tree.decisions)).astype(np.float32)
    return features, kernel.astype(np.float32), random.normal(size=tree.decisions).astype(np.float32)


def walk(tree, scores):
    """log p of every class from one row's scores: from the root down, in Python's floats."""
    found, todo = {}, [(int(tree.root), 0.0)]
    while todo:
        node, log_p = todo.pop()
        if node >= tree.decisions:
            found[node - tree.decisions] = log_p
            continue
        first, second = tree.children[node].tolist()
        s = float(scores[node])
        # log σ(s), from the side on which nothing cancels or overflows.
        of_first = -math.log1p(math.exp(-s)) if s > 0 else s - math.log1p(math.exp(s))
        todo += [(first, log_p + of_first), (second, log_p + of_first - s)]
    return np.array([found[v] for v in range(tree.classes)])


@st.composite
def parent_arrays(draw):
    """Random trees: each node hangs under one that was there before."""
    inner = draw(st.integers(1, 6))
    above = [-1] + [draw(st.integers(0, number - 1)) for number in range(1, inner)]
    bare = [node for node in range(inner) if node not in above]
    leaves = bare + draw(st.lists(st.integers(0, inner - 1), max_size=6))
    classes = len(leaves)
    return [classes + node for node in leaves] + [classes + node if node >= 0 else -1 for node in above], classes


@hypothesis.given(parent_arrays(), st.integers(0, 100))
@hypothesis.settings(max_examples=10)
def test_random_trees(drawn, seed):
    """Every class is a leaf, probabilities are those of a walk, and sum to one."""
    parents, classes = drawn
    tree = jsoftmax.parent_tree(parents, classes)
    features, kernel, bias = model(tree, seed=seed)
    scores = features.astype(np.float64) @ kernel.astype(np.float64) + bias
    expected = np.stack([walk(tree, row) for row in scores])
    np.testing.assert_allclose(np.exp(expected).sum(axis=1), 1, rtol=1e-12)
    log_p = jsoftmax.hierarchical_log_softmax(features, kernel, tree, bias=bias)
    np.testing.assert_allclose(log_p, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(log_p).sum(axis=1), 1, rtol=4e-6)


def test_siblings_of_a_taxonomy_stay_together():
    """Classes under a node are all classes below one decision."""
    tree = jsoftmax.nested_tree([[0, 1, 2], [3, [4, 5]], 6])
    below = {node: {node - tree.decisions} for node in range(tree.decisions, tree.decisions + tree.classes)}
    for node in range(tree.decisions)[::-1]:
        below[node] = set.union(*(below[child] for child in tree.children[node].tolist()))
    assert {frozenset(group) for group in below.values()} >= {
        frozenset(group) for group in ({0, 1, 2}, {3, 4, 5}, {4, 5}, set(range(7)))
    }
    parents = jsoftmax.parent_tree([8, 8, 8, 9, 10, 10, 7, -1, 7, 7, 9], 7)
    assert sorted((parents.turns != 0).sum(axis=1).tolist()) == sorted((tree.turns != 0).sum(axis=1).tolist())


@hypothesis.given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_huffman_tree_has_the_least_cost(counts):
    """Against a heap of weights: the sum of all that is joined is the least cost."""
    heap, cost = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        cost += joined
        heapq.heappush(heap, joined)
    tree = jsoftmax.huffman_tree(counts)
    depths = np.asarray(tree.turns != 0).sum(axis=1)
    assert tree.depth == depths.max()
    assert np.dot(depths, counts) == cost
    assert len(counts) == 1 or np.sum(2.0**-depths) == 1  # Kraft: no place is left free


def test_two_leaves_are_the_sigmoid():
    x = jnp.array([-90.0, -30.0, 0.0, 3.0, 40.0])
    tree, one = jsoftmax.huffman_tree([1, 1]), jnp.ones((1, 1))
    log_p = log_softmax_of(x[:, None], one, tree)
    first, second = tree.children[0] - tree.decisions
    np.testing.assert_allclose(log_p[:, first], jax.nn.log_sigmoid(x), rtol=1e-6)
    np.testing.assert_allclose(log_p[:, second], jax.nn.log_sigmoid(-x), rtol=1e-6)
    losses = loss_of(x[:, None], one, jnp.full(5, first), tree)
    np.testing.assert_allclose(losses, np.log1p(np.exp(-np.asarray(x, np.float64))), rtol=1e-6)
    logits = jnp.stack([x, jnp.zeros_like(x)], axis=1)
    np.testing.assert_allclose(log_p[:, first], jsoftmax.log_softmax(logits)[:, 0], rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_loss_is_the_label_s_log_probability(transposed):
    tree = jsoftmax.huffman_tree(1 / np.arange(1, 31))
    features, kernel, bias = model(tree, rows=30)
    labels, kernel = np.arange(30), kernel.T if transposed else kernel
    options = {"bias": bias, "kernel_transposed": transposed}
    log_p = log_softmax_of(features, kernel, tree, **options)
    losses = loss_of(features, kernel, labels, tree, **options)
    np.testing.assert_allclose(losses, -np.diagonal(log_p), rtol=1e-5)
    shaped = loss_of(features.reshape(5, 6, -1), kernel, labels.reshape(5, 6), tree, **options)
    np.testing.assert_allclose(shaped.reshape(-1), losses, rtol=1e-6)
    rows = jax.vmap(lambda row, label: loss_of(row, kernel, label, tree, **options))(features, labels)
    np.testing.assert_allclose(rows, losses, rtol=1e-5)


def test_derivatives(x64):
    tree = jsoftmax.huffman_tree([5, 3, 2, 1, 1])
    point = tuple(part.astype(np.float64) for part in model(tree, rows=5))

    def loss(features, kernel, bias):
        return loss_of(features, kernel, np.arange(5), tree, bias=bias)

    def all_classes(features, kernel, bias):
        return log_softmax_of(features, kernel, tree, bias=bias)

    check_grads(loss, point, order=2, modes=["fwd", "rev"], eps=1e-5, atol=1e-5, rtol=1e-5)
    check_grads(all_classes, point, order=1, modes=["rev"], eps=1e-5, atol=1e-6, rtol=1e-6)
    untouched = jax.grad(lambda kernel: loss(point[0], kernel, point[2])[0])(point[1])
    on_path = np.zeros(tree.decisions, bool)
    on_path[np.asarray(tree.path[0])[np.asarray(tree.turns[0]) != 0]] = True
    np.testing.assert_array_equal(np.any(untouched != 0, axis=0), on_path)


def test_wide_beam_is_exact():
    tree = jsoftmax.huffman_tree(1 / np.arange(1, 61))
    features, kernel, _ = model(tree, rows=20, scale=2.0)
    best, classes = jax.lax.top_k(log_softmax_of(features, kernel, tree), 5)
    top = top_k_of(features, kernel, tree, k=5, beam_size=60)
    assert np.all(top.exact)
    np.testing.assert_array_equal(top.classes, classes)
    np.testing.assert_allclose(top.log_prob, best, rtol=1e-5)


def test_narrow_beam_says_when_it_may_be_wrong():
    """0.51 shared by many classes against 0.49 for a single one, the first child, which a beam of one drops."""
    tree = jsoftmax.nested_tree([[0, 1, 2, 3], 4])
    kernel = jnp.zeros((1, tree.decisions)).at[0, tree.root].set(math.log(0.49 / 0.51))
    one = jnp.ones((1, 1))
    narrow, wide = (top_k_of(one, kernel, tree, k=1, beam_size=size) for size in (1, 2))
    assert not narrow.exact[0]
    assert (int(wide.classes[0, 0]), bool(wide.exact[0])) == (4, True)
    np.testing.assert_allclose(jnp.exp(wide.log_prob), 0.49, rtol=1e-6)
    random = model(tree, rows=200, scale=2.0)
    for size in (1, 2, 3):
        top = top_k_of(*random[:2], tree, k=1, beam_size=size)
        right = top.classes[:, 0] == jnp.argmax(log_softmax_of(*random[:2], tree), axis=1)
        assert np.all(right[top.exact])
    assert np.any(~top_k_of(*random[:2], tree, k=1, beam_size=1).exact)


def test_one_class():
    tree = jsoftmax.huffman_tree([3])
    features, kernel, bias = model(tree)
    np.testing.assert_array_equal(loss_of(features, kernel, np.zeros(3, np.int32), tree, bias=bias), 0)
    np.testing.assert_array_equal(log_softmax_of(features, kernel, tree), np.zeros((3, 1)))
    top = top_k_of(features, kernel, tree, k=1)
    assert (top.classes.tolist(), top.log_prob.tolist()) == ([[0]] * 3, [[0.0]] * 3)


def test_labels_that_are_no_class_or_ignored():
    tree = jsoftmax.huffman_tree([3, 2, 1])
    features, kernel, _ = model(tree, rows=5)
    features[3] = np.nan
    labels = np.array([0, 3, -1, -100, 2])
    losses = loss_of(features, kernel, labels, tree, ignore_index=-100)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, False, False])
    assert losses[3] == 0
    gradient = jax.grad(lambda h: loss_of(h, kernel, labels, tree, ignore_index=-100).sum())(features)
    np.testing.assert_array_equal(np.isnan(gradient).all(axis=1), np.isnan(losses))
    np.testing.assert_array_equal(gradient[3], 0)
    empty = loss_of(features[:0], kernel, labels[:0], tree)
    assert empty.shape == (0,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_features_have_a_float32_loss(dtype):
    tree = jsoftmax.huffman_tree([3, 2, 1])
    features, kernel = (jnp.asarray(part, dtype) for part in model(tree)[:2])
    losses, gradient = jax.value_and_grad(lambda k: loss_of(features, k, np.arange(3), tree).sum())(kernel)
    wide = loss_of(features.astype(jnp.float32), kernel.astype(jnp.float32), np.arange(3), tree).sum()
    assert (losses.dtype, gradient.dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(losses, wide, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jsoftmax.huffman_tree([]), r"counts has shape \(0,\), but needs \(classes,\)"),
        (lambda: jsoftmax.huffman_tree([1, -2]), "counts must be finite and at least 0, got -2"),
        (lambda: jax.jit(jsoftmax.huffman_tree)(jnp.ones(3)), "counts must be known"),
        (lambda: jsoftmax.nested_tree([[0, 1], []]), "nested holds an empty list"),
        (lambda: jsoftmax.nested_tree([0, [0, 1]]), "nested holds class 0 twice"),
        (lambda: jsoftmax.nested_tree([0, 2]), "class 1 is not among them"),
        (lambda: jsoftmax.parent_tree([2, 2, -1, -1], 2), "parents must have one root, .* got 2"),
        (lambda: jsoftmax.parent_tree([2, 1, -1], 2), "parents must be nodes from 2 to 2 or −1, got 1"),
        (lambda: jsoftmax.parent_tree([3, 3, 3, -1, 3], 3), "parents has a node without a class below it"),
        (lambda: jsoftmax.parent_tree([2, 3, -1, 4, 3], 2), "parents has a cycle: only 1 of 2"),
        (lambda: jsoftmax.parent_tree([0.5], 1), "parents has shape .* but needs integers"),
    ],
)
def test_bad_trees(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_arguments():
    tree = jsoftmax.huffman_tree([3, 2, 1])
    features, kernel, bias = model(tree)
    labels = np.arange(3)
    loss, top_k = jsoftmax.hierarchical_softmax_cross_entropy, jsoftmax.hierarchical_top_k
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 4\), but needs \(4, 2\).*kernel_transposed"):
        loss(features, kernel.T, labels, tree)
    with pytest.raises(ValueError, match=r"labels has shape \(1,\), but needs \(3,\)"):
        loss(features, kernel, labels[:1], tree)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), but needs \(2,\)"):
        loss(features, kernel, labels, tree, bias=bias[:1])
    for k, beam_size, message in ((0, None, "k must be between 1 and 3"), (2, 1, "beam_size must be at least k = 2")):
        with pytest.raises(ValueError, match=message):
            top_k(features, kernel, tree, k, beam_size=beam_size)
