"""Ranks against sorting in NumPy: ties, −∞, NaN, masks, excluded classes, shards, blocks; what a catalogue holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import jsoftmax
from jsoftmax import ranking

RANDOM = np.random.default_rng(0)
ROWS, CLASSES, WIDTH = 24, 16, 3
# Few different numbers, so that most labels tie with others.
FEATURES = RANDOM.integers(-1, 2, size=(ROWS, WIDTH)).astype(np.float32)
KERNEL = RANDOM.integers(-1, 2, size=(WIDTH, CLASSES)).astype(np.float32)
BIAS = np.where(RANDOM.random(CLASSES) < 0.25, -np.inf, 0).astype(np.float32)
LABELS = RANDOM.integers(0, CLASSES, size=ROWS).astype(np.int32)
WHERE = RANDOM.random(CLASSES) < 0.8
EXCLUDE = RANDOM.integers(-1, CLASSES, size=(ROWS, 6)).astype(np.int32)
LOGITS = FEATURES @ KERNEL + BIAS
TIES = ["optimistic", "realistic", "pessimistic"]


def by_sorting(logits, labels, where=None, exclude=None, ties="realistic"):
    """The first, last or middle place of the label's logit among those that are left, in order."""
    found = []
    for row, (z, label) in enumerate(zip(logits, labels, strict=True)):
        kept = set(range(len(z))) if where is None else set(np.flatnonzero(where))
        own = z[label] if label in kept else -np.inf
        kept -= {label} if exclude is None else {label, *exclude[row]}
        falling = -np.sort(-np.array([own, *(z[j] for j in kept)]))
        places = 1 + np.flatnonzero(falling == own)
        found.append({"optimistic": places[0], "pessimistic": places[-1], "realistic": places.mean()}[ties])
    return np.array(found, np.float32)


def dense(ties, **options):
    return ranking.ranks(LOGITS, LABELS, ties=ties, **options)


def linear(ties, **options):
    return ranking.linear_ranks(FEATURES, KERNEL, LABELS, bias=BIAS, ties=ties, block_size=7, **options)


def split(ties, where=None, exclude=None):
    """Classes over eight devices."""
    mesh = Mesh(np.array(jax.devices()), "c")
    where = np.ones(CLASSES, bool) if where is None else where
    options = {"ties": ties, "exclude": exclude, "axis_name": "c", "block_size": 7}

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "c"), P("c"), P("c")), out_specs=P())
    def of_shards(kernel, bias, where):
        return ranking.linear_ranks(jnp.asarray(FEATURES), kernel, LABELS, bias=bias, where=where, **options)

    return of_shards(KERNEL, BIAS, where)


OPTIONS = {"plain": {}, "where": {"where": WHERE}, "exclude": {"exclude": EXCLUDE}}
OPTIONS["both"] = {**OPTIONS["where"], **OPTIONS["exclude"]}
ONE_OPTION = ["where", "exclude"]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("engine", [dense, linear, split], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["plain", "both", *(pytest.param(n, marks=pytest.mark.slow) for n in ONE_OPTION)])
def test_equal_to_sorting(name, engine, ties):
    np.testing.assert_array_equal(engine(ties, **OPTIONS[name]), by_sorting(LOGITS, LABELS, ties=ties, **OPTIONS[name]))


def test_default_counts_half_of_the_ties():
    np.testing.assert_array_equal(ranking.ranks(jnp.zeros((1, 5)), jnp.array([2])), 3)


def test_values_that_are_no_numbers():
    """NaN where the row holds one, and where the label is no class; ∞ and −∞ are the ends of the order."""
    nan, inf = np.nan, np.inf
    logits = np.array([[nan, 1, 2], [0, 1, 2], [0, 1, 2], [inf, 1, 2], [0, -inf, -inf], [inf, inf, 2]], np.float32)
    labels = np.array([1, 3, -1, 0, 1, 0])
    np.testing.assert_array_equal(ranking.ranks(logits, labels), [nan, nan, nan, 1, 2.5, 1.5])
    masked = np.array([False, True, True])
    np.testing.assert_array_equal(ranking.ranks(logits[:1], labels[:1], where=masked), [2])


def test_axes_and_dtypes():
    cube = RANDOM.normal(size=(4, 5, 3)).astype(np.float32)
    labels = RANDOM.integers(0, 5, size=(4, 3))
    moved = np.moveaxis(cube, 1, 2).reshape(12, 5)
    expected = by_sorting(moved, labels.ravel()).reshape(4, 3)
    np.testing.assert_array_equal(ranking.ranks(cube, labels, axis=1), expected)
    seen = RANDOM.integers(-1, 5, size=(12, 2))
    expected = by_sorting(moved, labels.ravel(), exclude=seen).reshape(4, 3)
    np.testing.assert_array_equal(ranking.ranks(cube, labels, axis=1, exclude=seen.reshape(4, 3, 2)), expected)
    half = jnp.asarray(moved, jnp.bfloat16)
    expected = by_sorting(np.asarray(half, np.float32), labels.ravel())
    np.testing.assert_array_equal(ranking.ranks(half, labels.ravel().astype(np.uint8)), expected)


def test_scores():
    ranks = np.array([1.0, 2.5, 10.0, 11.0, np.nan], np.float32)
    np.testing.assert_array_equal(ranking.hits(ranks, 10), [1, 1, 1, 0, np.nan])
    np.testing.assert_allclose(ranking.reciprocal_rank(ranks), [1, 0.4, 0.1, 1 / 11, np.nan], rtol=1e-6)
    np.testing.assert_allclose(ranking.reciprocal_rank(ranks, 10), [1, 0.4, 0.1, 0, np.nan], rtol=1e-6)
    gains = 1 / np.log2(1 + ranks.astype(np.float64))
    np.testing.assert_allclose(ranking.ndcg(ranks), gains, rtol=1e-6)
    np.testing.assert_allclose(ranking.ndcg(ranks, 10), np.where(ranks == 11, 0, gains), rtol=1e-6)


def test_scikit_learn():
    """NDCG of one right class among scores without ties."""
    from sklearn.metrics import ndcg_score

    scores = RANDOM.normal(size=(6, 20)).astype(np.float32)
    labels = RANDOM.integers(0, 20, size=6)
    theirs = ndcg_score(np.eye(20)[labels], scores, k=10)
    np.testing.assert_allclose(ranking.ndcg(ranking.ranks(scores, labels), 10).mean(), theirs, rtol=1e-6)


def test_gradient_is_zero():
    def mean(features):
        return ranking.linear_ranks(features, KERNEL, LABELS, block_size=7).mean()

    np.testing.assert_array_equal(jax.grad(mean)(jnp.asarray(FEATURES)), 0)


@pytest.mark.optimized
def test_a_million_items_in_one_block():
    """NDCG@10 of 4096 users: nothing but one block of logits, beside results of a few numbers a row."""
    users, items, width, block = 4096, 1_000_000, 8, 128

    def score(features, kernel, labels, exclude):
        options = {"kernel_transposed": True, "block_size": block, "exclude": exclude}
        return ranking.ndcg(ranking.linear_ranks(features, kernel, labels, **options), 10).mean()

    shapes = [((users, width), jnp.float32), ((items, width), jnp.float32), ((users,), jnp.int32)]
    shapes.append(((users, 50), jnp.int32))
    program = jax.jit(score).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    held = program.memory_analysis().temp_size_in_bytes
    assert held <= 1.2 * block * items * 4 + items * width * 4


def test_errors():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="ties must be one of 'optimistic', 'realistic', 'pessimistic', got 'average'"):
        ranking.ranks(logits, labels, ties="average")
    with pytest.raises(ValueError, match=r"exclude has shape \(2,\), but needs \(2, 'k'\)"):
        ranking.ranks(logits, labels, exclude=labels)
    with pytest.raises(TypeError, match="labels must hold integer"):
        ranking.ranks(logits, logits)
    with pytest.raises(ValueError, match="no class"):
        ranking.ranks(logits[:, :0], labels)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        ranking.hits(jnp.ones(3), 0)
    with pytest.raises(TypeError, match="ranks must hold floating-point"):
        ranking.ndcg(labels)
    with pytest.raises(ValueError, match="kernel has shape"):
        jsoftmax.ranking.linear_ranks(logits, jnp.zeros((2, 3)), labels)
