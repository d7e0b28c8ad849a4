"""Draws have the distribution they claim, and what is known of that distribution is right to the last digits."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle
import pytest
from jax.experimental import checkify
from jax.test_util import check_grads
from oracle import assert_distribution, filtered_probabilities

import jsoftmax
from jsoftmax import categorical

INF, NAN = np.inf, np.nan
KEY = jax.random.key(0)
LOGITS = np.array([[0.5, -1.0, 2.0, 0.0], [3.0, 2.5, -4.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
OTHERS = np.array([[0.0, 1.0, 1.5, -0.5], [1.0, 2.0, 0.0, 1.0], [-1.0, 0.5, 2.0, 0.0]])
ACTIONS = np.array([2, 0, 3], np.int32)

# --- What is known of the distribution ---


@pytest.mark.usefixtures("x64")
def test_peer():
    """distrax 0.1.9 under JAX 0.10.2 in float64, where `p = distrax.Categorical(logits=LOGITS)`."""
    # p.log_prob(ACTIONS), p.entropy(), p.kl_divergence(distrax.Categorical(logits=OTHERS))
    log_prob = [-0.342349582389822, -0.5554802913534862, -1.2425355294551628]
    entropy = [0.8782811752687326, 0.8884654038515716, 1.380070811244773]
    divergence = [0.244756196251165, 0.3905559723132244, 0.5355879160401134]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-14)
    close(categorical.log_prob(LOGITS, ACTIONS), log_prob)
    close(categorical.entropy(LOGITS), entropy)
    close(categorical.kl_divergence(LOGITS, OTHERS), divergence)


def random_logits(scale, shape=(40, 8), seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_log_prob_and_entropy_are_accurate(scale):
    logits = random_logits(scale)
    row, actions = oracle.exact(logits), np.argmax(logits, axis=-1)
    got = categorical.log_prob(logits, actions)
    assert np.max(oracle.ulps(got, oracle.at_labels(row.log_p, actions), np.float32)) <= 6
    assert np.max(oracle.ulps(categorical.entropy(logits), row.entropy, np.float32)) <= 16


def exact_divergence(z, w):
    """KL and its derivatives, with 50 digits."""
    p, q = (oracle.exact(x) for x in (z, w))
    delta = p.log_p - q.log_p
    value = np.sum(p.p * delta, axis=-1)
    return value, p.p * (delta - value[..., None]), q.p - p.p


def divergence_pairs():
    """Logits and others: near and far, flat and sure of themselves."""
    for number, (scale, apart) in enumerate([(1, 1), (1, 1e-3), (5, 0.1), (0, 1e-4), (20, 3), (30, 30)]):
        z = random_logits(scale, seed=number)
        yield z, z + random_logits(apart, seed=number + 10)
    sure = [[20.0, 0.0, 0.0], [60.0, 0.0, 0.0], [20.0, 0.0, 0.0]]
    also = [[21.0, 0.0, 0.0], [40.0, 1.0, 2.0], [0.0, 20.0, 0.0]]
    yield np.array(sure, np.float32), np.array(also, np.float32)


@pytest.mark.parametrize(("z", "w"), list(divergence_pairs()))
def test_divergence_is_accurate(z, w):
    """To 32 units in the last place of a row's largest entry; a sum of p·log(p/q) is wrong by up to 1e8 of them."""
    value, d_z, d_w = exact_divergence(z, w)
    got = categorical.kl_divergence(z, w)
    assert np.max(oracle.ulps(got, value, np.float32)) <= 16
    gradients = jax.grad(lambda z, w: categorical.kl_divergence(z, w).sum(), (0, 1))(z, w)
    for gradient, expected in zip(gradients, (d_z, d_w), strict=True):
        largest = np.max(np.abs(expected.astype(np.float64)), axis=-1, keepdims=True)
        unit = np.broadcast_to(largest, expected.shape)
        assert np.max(oracle.ulps(gradient, expected, np.float32, unit)) <= 32


def test_divergence_beside_the_usual_sum():
    """Of two sure rows: 1.5165120759e-9 by mpmath. The usual sum in float32 is 4.1e-9."""
    z, w = jnp.array([20.0, 0, 0]), jnp.array([21.0, 0, 0])
    with mpmath.workdps(40):
        s, t = (2 * mpmath.exp(-g) for g in (20, 21))
        at_top = mpmath.log1p(t) - mpmath.log1p(s)
        exact = (at_top + s * (1 + at_top)) / (1 + s)
    np.testing.assert_allclose(categorical.kl_divergence(z, w), float(exact), rtol=1e-6)
    usual = jnp.sum(jax.nn.softmax(z) * (jax.nn.log_softmax(z) - jax.nn.log_softmax(w)))
    assert abs(usual / float(exact) - 1) > 0.5


def test_divergence_at_the_edges():
    kl = categorical.kl_divergence
    z = jnp.array([[1.0, 2.0, -INF], [1.0, 2.0, 3.0], [1.0, NAN, 0.0], [1.0, 2.0, 3.0], [INF, 0.0, 0.0]])
    w = jnp.array([[0.0, 2.0, 1.0], [1.0, 2.0, -INF], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    got = kl(z, w)
    p, q = np.exp([1, 2]) / np.exp([1, 2]).sum(), np.exp([0, 2, 1]) / np.exp([0, 2, 1]).sum()
    np.testing.assert_allclose(got[0], np.sum(p * np.log(p / q[:2])), rtol=1e-6)  # a class that p leaves out counts 0
    np.testing.assert_array_equal(got[1:], [INF, NAN, 0, NAN])
    where = jnp.array([True, True, False])
    both = kl(jnp.array([1.0, 2.0, NAN]), jnp.array([0.0, 2.0, INF]), where=where)
    np.testing.assert_array_equal(both, kl(jnp.array([1.0, 2.0]), jnp.array([0.0, 2.0])))
    gradients = jax.grad(lambda z, w: kl(z, w, where=where), (0, 1))(jnp.array([1.0, 2.0, NAN]), jnp.array([0.0, 2, 9]))
    for gradient in gradients:
        assert gradient[2] == 0
        assert np.all(np.isfinite(gradient))
    assert kl(z[0], w[0], where=jnp.zeros(3, bool)) == 0
    assert kl(jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0,)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_divergence_in_every_derivative_mode():
    where = jnp.array([True, False, True, True])
    w = LOGITS[:2] + 3 * (OTHERS[:2] - LOGITS[:2])
    f = functools.partial(categorical.kl_divergence, where=where)
    check_grads(jax.jit(f), (jnp.asarray(LOGITS[:2]), jnp.asarray(w)), 2, ["fwd", "rev"], 1e-6, 1e-6, eps=1e-5)
    warm = jax.jit(lambda t: categorical.kl_divergence(LOGITS[:2], w, temperature=t))
    check_grads(warm, (jnp.float64(1.3),), 1, ["fwd", "rev"], 1e-6, 1e-6, eps=1e-5)


def test_masks_and_temperature_of_the_distribution():
    """What a mask leaves is the distribution of the classes that are left."""
    logits, where = jnp.asarray(LOGITS, jnp.float32).at[:, 1].set(NAN), jnp.array([True, False, True, True])
    kept, actions = LOGITS[:, [0, 2, 3]].astype(np.float32), jnp.array([0, 2, 3])
    for options in ({}, {"temperature": 0.5}):
        row = oracle.exact(kept / options.get("temperature", 1))
        log_prob = functools.partial(categorical.log_prob, where=where, **options)
        assert np.max(oracle.ulps(log_prob(logits, actions), np.diagonal(row.log_p), np.float32)) <= 6
        got = categorical.entropy(logits, where=where, **options)
        assert np.max(oracle.ulps(got, row.entropy, np.float32)) <= 16
        gradient = jax.grad(lambda z: log_prob(z, actions).sum() + categorical.entropy(z, where=where).sum())(logits)  # noqa: B023
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[:, 1], 0)
    assert np.all(categorical.log_prob(logits, jnp.ones(3, int), where=where) == -INF)
    # Certainty has no entropy, and −∞ is no 0 · ∞.
    np.testing.assert_array_equal(categorical.entropy(jnp.array([[0.0, -INF], [200.0, 0.0]])), 0)


def test_score_function():
    """The gradient of log π(a) is e_a − π."""
    logits = LOGITS.astype(np.float32)
    gradient = jax.grad(lambda z: categorical.log_prob(z, ACTIONS).sum())(logits)
    assert np.max(oracle.ulps(gradient, -oracle.gradients(oracle.exact(logits), ACTIONS), np.float32)) <= 8


def test_log_prob_of_several_draws():
    logits = jnp.asarray(LOGITS, jnp.float32)
    drawn = categorical.sample(KEY, logits, sample_shape=(5, 2))
    got = categorical.log_prob(logits, drawn)
    each = [categorical.log_prob(logits, actions) for actions in drawn.reshape(-1, 3)]
    np.testing.assert_array_equal(got, jnp.stack(each).reshape(5, 2, 3))
    gradient = jax.grad(lambda z: categorical.log_prob(z, drawn).sum())(logits)
    expected = sum(np.eye(4)[np.asarray(a)] - jsoftmax.softmax(logits) for a in drawn.reshape(-1, 3))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(categorical.log_prob(logits, jnp.array([-1, 4, 0]))[:2]).all()


# --- Filters ---


ROW = np.array([0.5, 2.0, -1.0, 2.5, 0.0, -INF, 1.0, -3.0, 2.0, 1.2], np.float32)
MASK = np.array([True, True, True, False, True, True, True, True, True, True])
OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 4.0},
    "top_k": {"top_k": 4},
    "top_k of ties": {"top_k": 2},  # both of the classes of 2.0 come along
    "top_k of all": {"top_k": 1000},
    "top_p": {"top_p": 0.8},
    "top_p of all": {"top_p": 1.0},
    "top_p of one": {"top_p": 1e-9},
    "top_p of nothing": {"top_p": 0.0},
    "min_p": {"min_p": 0.2},
    "where": {"where": MASK},
    "all": {"where": MASK, "temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.15},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@by_options
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_filters_keep_what_sorting_keeps(options, dtype):
    kept = categorical.filter_classes(jnp.asarray(ROW, dtype), **options)
    np.testing.assert_array_equal(kept, filtered_probabilities(jnp.asarray(ROW, dtype), **options) > 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_filters_of_many_classes(dtype):
    """262,144 of them, many equal in bfloat16. The nucleus is right to the rounding of a sum."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=2**18) * 3, dtype)
    wide = np.asarray(z, np.float64)
    for k in (1, 50, 2**18 - 1):
        np.testing.assert_array_equal(categorical.filter_classes(z, top_k=k), wide >= np.sort(wide)[-k])
    p = np.exp(wide) / np.exp(wide).sum()
    for top_p in (0.1, 0.9, 0.9999):
        kept = np.asarray(categorical.filter_classes(z, top_p=top_p))
        lowest = p[kept].min()
        assert np.all(p[~kept] < lowest)
        assert p[kept].sum() >= top_p - 1e-6  # enough, and
        assert p[p > lowest].sum() <= top_p + 1e-6  # no class more than that
    assert np.all(categorical.filter_classes(z, top_p=1.0))


@pytest.mark.usefixtures("x64")
def test_filters_in_float64_tell_close_logits_apart():
    z = jnp.array([1.0, 1.0 + 2e-16, 1.0 + 4e-16, -5.0])
    np.testing.assert_array_equal(categorical.filter_classes(z, top_k=1), [False, False, True, False])
    np.testing.assert_array_equal(categorical.filter_classes(z, top_k=2), [False, True, True, False])


def test_filters_of_signs_and_of_equal_logits():
    z = jnp.array([-0.0, 0.0, -1e-30, 1e-30, -2.0])
    np.testing.assert_array_equal(categorical.filter_classes(z, top_k=2), [True, True, False, True, False])
    assert np.all(categorical.filter_classes(jnp.full(7, -3e38), top_k=1))
    assert np.all(categorical.filter_classes(jnp.zeros(7), top_p=0.1))


def test_filters_one_a_row_and_traced():
    logits = jnp.asarray(np.stack([ROW, ROW, ROW]))
    k, p, m = jnp.array([1, 4, 9]), jnp.array([1.0, 0.8, 0.5]), jnp.array([0.0, 0.2, 0.1])
    together = jax.jit(lambda k, p, m: categorical.filter_classes(logits, top_k=k, top_p=p, min_p=m))(k, p, m)
    for row, options in enumerate(zip(k.tolist(), p.tolist(), m.tolist(), strict=True)):
        options = dict(zip(("top_k", "top_p", "min_p"), options, strict=True))
        np.testing.assert_array_equal(together[row], filtered_probabilities(ROW, **options) > 0)
    mapped = jax.vmap(lambda z, k: categorical.filter_classes(z, top_k=k))(logits, k)
    np.testing.assert_array_equal(mapped, categorical.filter_classes(logits, top_k=k))


def test_filters_leave_rows_without_a_distribution():
    """So that they are still found to be such."""
    for row in ([1.0, NAN, 2.0], [INF, 0.0, 1.0]):
        kept = categorical.filter_classes(jnp.array(row), top_k=1, top_p=0.5, min_p=0.5)
        assert np.all(kept)
        assert np.isnan(categorical.entropy(jnp.array(row), where=kept))
    assert not np.any(categorical.filter_classes(jnp.full(3, -INF), top_k=1))


def test_filtered_distribution():
    kept = categorical.filter_classes(ROW, top_p=0.8)
    expected = filtered_probabilities(ROW, top_p=0.8)
    np.testing.assert_allclose(categorical.log_prob(ROW, jnp.int32(3), where=kept), np.log(expected[3]), rtol=1e-6)
    positive = expected[expected > 0]
    np.testing.assert_allclose(categorical.entropy(ROW, where=kept), -np.sum(positive * np.log(positive)), rtol=1e-6)


def test_class_axes():
    logits = jnp.asarray(random_logits(2, (3, 4, 5)))
    kept = categorical.filter_classes(logits, axis=1, top_k=2)
    np.testing.assert_array_equal(
        kept, jnp.moveaxis(categorical.filter_classes(jnp.moveaxis(logits, 1, 2), top_k=2), 2, 1)
    )
    assert categorical.sample(KEY, logits, axis=1).shape == (3, 5)
    drawn = categorical.sample(KEY, logits, axis=(0, 2), sample_shape=(200,))
    assert drawn.shape == (200, 4)
    assert 5 < np.max(drawn) < 15
    assert categorical.log_prob(logits, drawn, axis=(0, 2)).shape == (200, 4)


# --- Draws ---


@by_options
def test_draws_have_the_distribution(options):
    drawn = categorical.sample(KEY, ROW, sample_shape=(100_000,), **options)
    assert drawn.dtype == jnp.int32
    assert_distribution(drawn, filtered_probabilities(ROW, **options))


def test_wrong_distributions_are_found():
    drawn = categorical.sample(KEY, ROW, sample_shape=(100_000,))
    with pytest.raises(AssertionError):
        assert_distribution(drawn, filtered_probabilities(ROW, temperature=1.03))
    with pytest.raises(AssertionError):
        assert_distribution(drawn, filtered_probabilities(ROW, top_k=8))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_draws_of_other_dtypes(dtype, x64):
    logits = jnp.asarray(ROW, dtype)
    drawn = categorical.sample(KEY, logits, sample_shape=(100_000,), temperature=0.7)
    assert_distribution(drawn, filtered_probabilities(logits, temperature=0.7))


def test_large_logits_keep_their_noise():
    """Beside 1e6, the noise alone would be rounded to sixteenths."""
    drawn = categorical.sample(KEY, jnp.array([1e6, 1e6 + 1, 1e6, 0.0]), sample_shape=(100_000,))
    assert_distribution(drawn, filtered_probabilities([0, 1, 0, -INF]))


@pytest.mark.slow
@pytest.mark.optimized  # it draws for longer than it compiles
def test_classes_of_tiny_probability_are_drawn():
    """64,000 of 2e-8 each, 1.3e-3 in all. With 23 bits of noise, as in jax.random's default, none ever is."""
    logits = jnp.full(64_001, np.log(2e-8), jnp.float32).at[0].set(0)
    drawn = categorical.sample(jax.random.key(0, impl="unsafe_rbg"), logits, sample_shape=(7_500,))
    expected = 7_500 * 64_000 * 2e-8
    assert 0 < np.count_nonzero(drawn) < expected + 4 * np.sqrt(expected)


def test_a_million_draws_stay_within_mask_and_nucleus():
    drawn = categorical.sample(KEY, ROW, where=MASK, sample_shape=(1_000_000,), temperature=3.0, top_p=0.9)
    allowed = np.flatnonzero(filtered_probabilities(ROW, where=MASK, temperature=3.0, top_p=0.9))
    assert set(np.unique(drawn)) == set(allowed)
    assert not {3, 5} & set(allowed)


@pytest.mark.parametrize("traced", [False, True])
def test_temperature_zero_splits_ties_evenly(traced):
    logits = jnp.array([1.0, 3.0, 3.0 - 1e-6, 3.0, -INF])
    draw = functools.partial(categorical.sample, KEY, logits, sample_shape=(30_000,))
    drawn = jax.jit(lambda t: draw(temperature=t))(jnp.float32(0)) if traced else draw(temperature=0)
    assert_distribution(drawn, np.array([0, 0.5, 0, 0.5, 0]))


def test_temperature_zero_as_a_constant_of_a_program():
    """The compiler may not fold what stands for the limit into 0/0."""
    logits = jnp.array([[0.3, 0.1], [-0.2, 0.4], [1.0, 1.0]])
    np.testing.assert_array_equal(jax.jit(lambda z: categorical.sample(KEY, z, temperature=0.0))(logits)[:2], [0, 1])
    softmax = jax.jit(lambda z: jsoftmax.softmax(z, temperature=0.0))(logits)
    np.testing.assert_array_equal(softmax, [[1, 0], [0, 1], [0.5, 0.5]])


def test_temperature_one_a_row():
    logits = jnp.broadcast_to(jnp.asarray(ROW), (3, 10))
    drawn = categorical.sample(KEY, logits, sample_shape=(50_000,), temperature=jnp.array([0.0, 0.5, 2.0]))
    assert np.all(drawn[:, 0] == 3)
    for row, temperature in ((1, 0.5), (2, 2.0)):
        assert_distribution(drawn[:, row], filtered_probabilities(ROW, temperature=temperature))


def test_rows_and_samples_are_independent():
    """Of two rows, and of two draws of one row, every pair comes as often as the product says."""
    logits = jnp.log(jnp.array([[0.2, 0.8], [0.5, 0.5]]))
    drawn = np.asarray(categorical.sample(KEY, logits, sample_shape=(50_000, 2)))
    p, q = np.array([0.2, 0.8]), np.array([0.5, 0.5])
    assert_distribution(drawn[:, 0, 0] * 2 + drawn[:, 0, 1], np.outer(p, q).ravel())
    assert_distribution(drawn[:, 0, 0] * 2 + drawn[:, 1, 0], np.outer(p, p).ravel())


def test_transformations():
    logits = jnp.asarray(random_logits(2, (6, 10)))
    draw = functools.partial(categorical.sample, top_p=0.9, temperature=0.8)
    np.testing.assert_array_equal(jax.jit(draw)(KEY, logits), draw(KEY, logits))
    keys = jax.random.split(KEY, 6)
    mapped = jax.vmap(draw)(keys, logits)
    np.testing.assert_array_equal(mapped, [draw(k, z) for k, z in zip(keys, logits, strict=True)])
    old_style = categorical.sample(jax.random.PRNGKey(0), logits)
    np.testing.assert_array_equal(old_style, categorical.sample(KEY, logits))


BAD = np.array([[0.0, 1.0, 2.0], [0.0, NAN, 2.0], [-INF, -INF, -INF], [INF, 0.0, 0.0]], np.float32)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5, "min_p": 0.1}, {"temperature": 0.0}])
def test_rows_without_a_distribution_are_not_drawn_from(options):
    drawn = categorical.sample(KEY, BAD, sample_shape=(50,), **options)
    np.testing.assert_array_equal(drawn[:, 1:], -1)
    assert np.all(drawn[:, 0] >= 0)
    several = categorical.sample_without_replacement(KEY, BAD, 2, **options)
    np.testing.assert_array_equal(several[1:], -1)
    masked = categorical.sample(KEY, BAD, where=jnp.array([[False] * 3] + [[True, False, True]] * 3), **options)
    np.testing.assert_array_equal(masked[0], -1)
    assert masked[1] in (0, 2)


def test_checkify_reports_rows_without_a_distribution():
    several = functools.partial(categorical.sample_without_replacement, count=2)
    mapped = jax.vmap(categorical.sample, in_axes=(None, 0))
    for draw in (categorical.sample, several, mapped):
        checked = jax.jit(checkify.checkify(functools.partial(draw, KEY)))

        def reported(logits, checked=checked):
            return checked(logits)[0].get() or ""

        assert re.search(r"row 1 hold NaN", reported(BAD))
        assert re.search(r"row 2 of logits has no class to draw", reported(BAD[[0, 0, 2, 0]]))
        assert re.search(r"row 3 of logits .*infinity", reported(BAD[[0, 0, 0, 3]]))
        assert reported(BAD[[0, 0, 0, 0]]) == ""


# --- Without replacement ---


def test_without_replacement_follows_plackett_and_luce():
    p = filtered_probabilities(ROW[:5])
    drawn = np.asarray(categorical.sample_without_replacement(KEY, ROW[:5], 3, sample_shape=(200_000,)))
    assert all(np.all(drawn[:, i] != drawn[:, j]) for i, j in itertools.combinations(range(3), 2))
    assert_distribution(drawn[:, 0], p)
    pairs = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(5)] for i in range(5)])
    assert_distribution(drawn[:, 0] * 5 + drawn[:, 1], pairs.ravel())
    triples = np.zeros((5, 5, 5))
    for i, j, k in itertools.permutations(range(5), 3):
        triples[i, j, k] = pairs[i, j] * p[k] / (1 - p[i] - p[j])
    assert_distribution(drawn @ [25, 5, 1], triples.ravel())


def test_without_replacement_draws_every_class_once():
    drawn = categorical.sample_without_replacement(KEY, random_logits(3, (20, 6)), 6)
    np.testing.assert_array_equal(np.sort(drawn, axis=-1), np.tile(np.arange(6), (20, 1)))
    few = categorical.sample_without_replacement(KEY, ROW, 8, where=MASK, sample_shape=(100,), top_k=3)
    np.testing.assert_array_equal(np.sort(few[:, :3], axis=-1), np.tile([1, 8, 9], (100, 1)))
    np.testing.assert_array_equal(few[:, 3:], -1)
    ties = categorical.sample_without_replacement(KEY, jnp.array([1.0, 2.0, 2.0]), 3, temperature=0.0)
    assert set(ties.tolist()[:2]) == {1, 2}
    assert ties[2] == -1
    keys = jax.random.split(KEY, 4)

    def draw(key):
        return categorical.sample_without_replacement(key, ROW, 2)

    np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), [draw(key) for key in keys])


# --- Small shapes and bad inputs ---


def test_empty_batches_and_single_classes():
    assert categorical.sample(KEY, jnp.zeros((0, 3)), sample_shape=(2,)).shape == (2, 0)
    assert categorical.sample(KEY, jnp.zeros((2, 3)), sample_shape=(0,)).shape == (0, 2)
    assert categorical.filter_classes(jnp.zeros((0, 3)), top_k=2).shape == (0, 3)
    np.testing.assert_array_equal(categorical.sample(KEY, jnp.zeros((4, 1)), top_p=0.1), 0)
    assert categorical.log_prob(jnp.zeros((0, 3)), jnp.zeros(0, int)).shape == (0,)
    assert categorical.entropy(jnp.zeros(1)) == 0
    assert categorical.kl_divergence(jnp.zeros(1), jnp.ones(1)) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: categorical.sample(KEY, z.astype(int)), TypeError, "logits must hold floating-point"),
        (lambda z: categorical.sample(KEY, z[:, :0]), ValueError, r"logits has shape \(3, 0\) and so no class"),
        (lambda z: categorical.sample(KEY, z, temperature=-1.0), ValueError, "temperature must be at least 0"),
        (lambda z: categorical.sample(KEY, z, temperature=jnp.ones(2)), ValueError, r"temperature has shape \(2,\)"),
        (lambda z: categorical.sample(KEY, z, top_k=0), ValueError, "top_k must be at least 1, got 0"),
        (lambda z: categorical.sample(KEY, z, top_k=2.0), TypeError, "top_k must be an integer"),
        (lambda z: categorical.sample(KEY, z, top_k=jnp.ones(4, int)), ValueError, r"top_k has shape \(4,\)"),
        (lambda z: categorical.sample(KEY, z, top_p=1.1), ValueError, "top_p must be between 0 and 1, got 1.1"),
        (lambda z: categorical.filter_classes(z, min_p=-0.1), ValueError, "min_p must be between 0 and 1, got -0.1"),
        (lambda z: categorical.sample(KEY, z, where=jnp.ones(4)), TypeError, "where must be boolean"),
        (lambda z: categorical.sample_without_replacement(KEY, z, 5), ValueError, "count .* the 4 classes, got 5"),
        (lambda z: categorical.sample_without_replacement(KEY, z, 0), ValueError, "count .* got 0"),
        (lambda z: categorical.log_prob(z, jnp.zeros(4, int)), ValueError, r"actions .* \(4,\), but needs \(3,\)"),
        (lambda z: categorical.log_prob(z, jnp.zeros(3)), TypeError, "actions must hold integer"),
        (lambda z: categorical.log_prob(z, jnp.zeros(3, int), z_loss=1.0), TypeError, "unknown option 'z_loss'"),
        (lambda z: categorical.entropy(z[:, :0]), ValueError, "no class"),
        (lambda z: categorical.kl_divergence(z, z[:2]), ValueError, r"other_logits has shape \(2, 4\)"),
        (lambda z: categorical.kl_divergence(z, z.astype(int)), TypeError, "other_logits must hold floating"),
    ],
)  # fmt: skip
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.asarray(LOGITS, jnp.float32))
