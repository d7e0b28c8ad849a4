"""The language model in examples/language_model.py, in short."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import pytest

pytestmark = pytest.mark.optimized

VOCABULARY, SEEDS = 16384, (0, 1)


@pytest.fixture(scope="module")
def corpus():
    return language_model.load(VOCABULARY)


@pytest.fixture(scope="module")
def settings():
    return language_model.Settings(
        vocabulary=VOCABULARY, width=32, layers=1, heads=2, context=64, batch_size=8, block_size=64, steps=10
    )


@pytest.fixture(scope="module")
def trained(corpus, settings):
    @functools.cache
    def train(seed):
        # optax raises a float to the power of its integer step count.
        with jax.numpy_dtype_promotion("standard"):
            return language_model.train(["linear", "unfused"], settings._replace(seed=seed), corpus)

    return train


def test_tokens_make_up_the_text():
    text = 'def f(x):\n    return "π²" + x_1\t# ok\r\n\n\x0c  end'
    assert "".join(language_model.TOKEN.findall(text)) == text


@pytest.mark.slow
def test_corpus_fills_the_vocabulary_and_keeps_its_order(corpus):
    assert len(set(corpus.tokens)) == VOCABULARY
    numbers, counts = np.unique(corpus.train, return_counts=True)
    np.testing.assert_array_equal(numbers, np.arange(VOCABULARY))
    assert np.all(np.diff(counts[1:]) <= 0)  # most frequent first, after <unk>
    assert 0 <= corpus.held_out.min() <= corpus.held_out.max() < VOCABULARY
    assert language_model.load(VOCABULARY).tokens == corpus.tokens


def test_vocabulary_larger_than_the_text_is_refused():
    with pytest.raises(ValueError, match="vocabulary is 10000000, but the text has only"):
        language_model.load(10_000_000)


def test_labels_are_the_tokens_that_come_next():
    tokens, labels = language_model.windows(np.arange(10) ** 2, np.array([0, 4]), 3)
    np.testing.assert_array_equal(tokens, [[0, 1, 4], [16, 25, 36]])
    np.testing.assert_array_equal(labels, [[1, 4, 9], [25, 36, 49]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_loss_falls(seed, trained):
    for run in trained(seed).values():
        # A guess that knows nothing loses log(vocabulary).
        assert run.held_out_loss() < math.log(VOCABULARY) - 1 < run.before


# With the same parameters, a row's loss in either form is right to an ulp or two of the logsumexp, which is as large
# as the loss, and its mean over the rows to as much again. Parameters that differ in their last digits move the loss by
# that share of what it has fallen, which is less than the loss itself.
TOLERANCE = 8 * float(jnp.finfo(jnp.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_losses_of_all_steps_equal_those_of_the_unfused_run(seed, trained, settings):
    linear, unfused = (trained(seed)[name].losses for name in ("linear", "unfused"))
    assert len(linear) == len(unfused) == settings.steps
    np.testing.assert_allclose(linear, unfused, rtol=TOLERANCE)
    ours, theirs = (np.array(trained(seed)[name].logged) for name in ("linear", "unfused"))
    # Of nearly equal logits, either may come out first: a row or two of a thousand.
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=2 / (settings.batch_size * settings.context))
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=TOLERANCE)


@pytest.mark.slow
def test_step_saves_the_memory_of_the_logits(trained, settings):
    runs = trained(SEEDS[0])
    rows = settings.batch_size * settings.context
    saved = runs["unfused"].temporaries - runs["linear"].temporaries
    assert saved >= (rows - settings.block_size) * VOCABULARY * 4


@pytest.mark.slow
def test_main_prints_the_table_and_a_text(corpus, monkeypatch, capsys):
    monkeypatch.setattr(language_model, "load", lambda vocabulary: corpus)
    options = "--steps 2 --width 16 --layers 1 --heads 1 --context 16 --batch-size 4 --block-size 32 --loss both"
    monkeypatch.setattr(sys, "argv", ["language_model.py", *options.split()])
    with jax.numpy_dtype_promotion("standard"):
        language_model.main()
    printed = capsys.readouterr().out
    for part in ("linear", "unfused", "held-out loss after", "Largest relative difference", "What the model writes"):
        assert part in printed
