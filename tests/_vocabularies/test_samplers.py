"""Samplers: what they draw against what they say they draw."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jsoftmax
from jsoftmax._vocabularies.samplers import _alias_table

CLASSES = 40
COUNTS = 1 / np.arange(1, CLASSES + 1) ** 1.5


def own_sampler(unique):
    """Made by a user, of two functions."""
    log_p = jnp.log(jnp.asarray(COUNTS[::-1] / COUNTS.sum(), jnp.float32))
    return jsoftmax.Sampler(
        CLASSES,
        lambda log_p, key, shape: jax.random.categorical(key, log_p, shape=shape),
        lambda log_p, classes: log_p[classes],
        log_p,
        unique,
    )


SAMPLERS = {
    "log_uniform": lambda unique: jsoftmax.log_uniform_sampler(CLASSES, unique=unique),
    "uniform": lambda unique: jsoftmax.uniform_sampler(CLASSES, unique=unique),
    "unigram": lambda unique: jsoftmax.unigram_sampler(COUNTS, 0.75, unique=unique),
    "own": own_sampler,
}
K = np.arange(CLASSES)
PROBABILITIES = {
    "log_uniform": np.log((K + 2) / (K + 1)) / np.log(CLASSES + 1),
    "uniform": np.full(CLASSES, 1 / CLASSES),
    "unigram": COUNTS**0.75 / np.sum(COUNTS**0.75),
    "own": COUNTS[::-1] / COUNTS.sum(),
}
EVERY_CLASS = jnp.arange(CLASSES)
# Of right samplers, one in 10,000 fails; the keys are fixed, so that it is none of these.
SURE = 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_with_replacement_are_as_often_as_expected(name):
    sampler, count = SAMPLERS[name](False), 1_000_000 if name != "own" else 100_000
    sample = sampler.sample(jax.random.key(0), count)
    expected = np.exp(np.asarray(sampler.log_expected_count(EVERY_CLASS, sample), np.float64))
    np.testing.assert_allclose(expected, count * PROBABILITIES[name], rtol=1e-5)
    observed = np.bincount(sample.classes, minlength=CLASSES)
    assert scipy.stats.chisquare(observed, expected * (count / expected.sum())).pvalue > SURE


@pytest.mark.slow
@pytest.mark.optimized  # it draws for longer than it compiles
@pytest.mark.parametrize("name", ["log_uniform", "uniform", "unigram"])
def test_draws_without_replacement_are_as_often_as_expected(name):
    """A million sampled classes; what a class is expected in a sample varies with the sample's draws."""
    sampler, count, samples = SAMPLERS[name](True), 20, 50_000

    def one(key):
        sample = sampler.sample(key, count)
        expected = jnp.exp(sampler.log_expected_count(EVERY_CLASS, sample))
        return jnp.zeros(CLASSES).at[sample.classes].add(1.0), expected

    present, expected = (np.asarray(x, np.float64) for x in jax.jit(jax.vmap(one))(_keys(samples)))
    assert np.all(present <= 1)
    np.testing.assert_array_equal(present.sum(axis=1), count)
    rare = expected.mean(axis=0) < 0.99  # of the others, too few are ever missing for a normal error
    assert rare.sum() > 30
    for error in (present - expected, present / expected - 1):  # the count itself, and the weights of an estimate
        z = error.mean(axis=0) / (error.std(axis=0) / math.sqrt(samples))
        assert np.sum(z[rare] ** 2) < scipy.stats.chi2.ppf(1 - SURE, rare.sum())


def _keys(count):
    return jax.random.split(jax.random.key(1), count)


@pytest.mark.optimized  # it draws for longer than it compiles
def test_expected_count_of_a_small_sample_is_the_probability_of_being_in_it():
    """Two of three classes, whose probabilities can be written out."""
    p = np.array([0.6, 0.3, 0.1])
    pairs = itertools.permutations(range(3), 2)
    exact = np.zeros(3)
    for first, second in pairs:
        exact[[first, second]] += p[first] * p[second] / (1 - p[first])
    sampler = jsoftmax.unigram_sampler(p)

    def expected(key):
        return jnp.exp(sampler.log_expected_count(jnp.arange(3), sampler.sample(key, 2)))

    found = np.asarray(jax.jit(jax.vmap(expected))(_keys(50_000)), np.float64)
    error = 4 * found.std(axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - exact) < error)
    assert np.all(error < 0.006)


def test_tries_are_the_draws_made():
    """Replayed in Python from the same draws."""
    count, sampler = 6, jsoftmax.unigram_sampler(COUNTS)
    for seed in range(10):
        key, drawn = jax.random.key(seed), []
        sample = sampler.sample(key, count)
        while len(set(drawn)) <= count:
            key, use = jax.random.split(key)
            drawn += sampler.draw(sampler.tables, use, (count + 1,)).tolist()
        order = list(dict.fromkeys(drawn))
        end, tries = drawn.index(order[count]) + 1, drawn.index(order[count - 1]) + 1
        assert sample.classes.tolist() == order[:count]
        assert int(sample.tries) == tries
        assert sample.others.tolist() == [end - drawn[:end].count(c) for c in order[:count]]


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_classes_at_once(name):
    sampler = SAMPLERS[name](True)
    sample = sampler.sample(jax.random.key(0), CLASSES)
    assert sorted(sample.classes.tolist()) == list(range(CLASSES))
    np.testing.assert_array_equal(sampler.log_expected_count(EVERY_CLASS, sample), 0)


def test_ten_million_classes_are_all_within_reach():
    """24 bits in one number would reach only some of the rare ones."""
    classes, count = 10_000_000, 400_000
    sampler = jsoftmax.log_uniform_sampler(classes, unique=False)
    drawn = np.asarray(sampler.sample(jax.random.key(0), count).classes)
    assert 0 <= drawn.min() <= drawn.max() < classes
    last_digit = np.bincount(drawn[drawn > classes // 2] % 10, minlength=10)
    assert scipy.stats.chisquare(last_digit).pvalue > SURE
    edges = np.array([0, 1, 2, 5, 10, 100, 10**4, 10**6, 3 * 10**6, classes])
    share = np.diff(np.log(edges + 1)) / np.log(classes + 1)
    assert scipy.stats.chisquare(np.histogram(drawn, edges)[0], count * share).pvalue > SURE


@pytest.mark.parametrize("p", [np.ones(7), 1 / np.arange(1, 5001.0), np.array([0.9, 0.05, 0.05]), np.ones(1)])
def test_alias_table_stands_for_its_probabilities(p):
    keep, alias = _alias_table(p)
    found = keep / p.size
    np.add.at(found, alias, (1 - keep) / p.size)
    np.testing.assert_allclose(found, p / p.sum(), rtol=1e-10)


def test_expected_count_of_a_rare_class_keeps_its_digits():
    """1 − (1 − p)^n is 0 in float32 for p = 1e-10."""
    sampler = jsoftmax.unigram_sampler([1.0, 1.0, 1e-10])
    sample = jsoftmax.Sample(jnp.array([0]), jnp.int32(3), jnp.array([3]))
    np.testing.assert_allclose(sampler.log_expected_count(jnp.array([2]), sample), math.log(1.5e-10), rtol=1e-6)


def test_sampler_is_a_pytree():
    sampler = jsoftmax.unigram_sampler(COUNTS)
    draw = jax.jit(lambda sampler, key: sampler.sample(key, 5).classes)
    np.testing.assert_array_equal(draw(sampler, jax.random.key(0)), sampler.sample(jax.random.key(0), 5).classes)
    batch = jax.vmap(lambda key: sampler.sample(key, 5).classes)(_keys(3))
    np.testing.assert_array_equal(batch[2], sampler.sample(_keys(3)[2], 5).classes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jsoftmax.log_uniform_sampler(0), "classes must be between 1 and .*, got 0"),
        (lambda: jsoftmax.unigram_sampler(np.ones((2, 2))), r"counts has shape \(2, 2\), but needs \(classes,\)"),
        (lambda: jsoftmax.unigram_sampler([1.0, 0.0]), "counts must be finite and above 0, got 0.0"),
        (lambda: jsoftmax.unigram_sampler([1.0, np.nan]), "counts must be finite and above 0, got nan"),
        (lambda: jax.jit(jsoftmax.unigram_sampler)(jnp.ones(3)), "counts must be known"),
        (lambda: jsoftmax.uniform_sampler(3).sample(jax.random.key(0), 0), "count must be at least 1, got 0"),
        (lambda: jsoftmax.uniform_sampler(3).sample(jax.random.key(0), 4), "count must be at most 3"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
