"""Loss, accuracy and perplexity of a linear head, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax

ROWS, FEATURES, CLASSES = 37, 8, 29
random = np.random.default_rng(3)
FEATURE_ROWS = jnp.asarray(random.normal(size=(ROWS, FEATURES)), jnp.float32)
KERNEL = jnp.asarray(random.normal(size=(FEATURES, CLASSES)), jnp.float32)
LABELS = jnp.asarray(random.integers(0, CLASSES, ROWS))
WEIGHTS = jnp.asarray(np.where(np.arange(ROWS) % 4 == 0, 0, random.uniform(size=ROWS)), jnp.float32)
IGNORED = np.arange(ROWS) % 5 == 1


def expected(weights, bias=0.0):
    z = np.asarray(FEATURE_ROWS, np.float64) @ np.asarray(KERNEL, np.float64) + bias
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(ROWS), LABELS]
    hits = z.argmax(axis=1) == np.asarray(LABELS)
    return np.array([(weights * losses).sum(), (weights * hits).sum(), weights.sum()])


def test_default_call():
    found = jsoftmax.linear_evaluation(FEATURE_ROWS, KERNEL, LABELS)
    total, correct, count = expected(np.ones(ROWS))
    assert (found.correct, found.weight) == (correct, count)
    np.testing.assert_allclose(found.loss, total / count, rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, correct / count, rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, np.exp(total / count), rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_do_not_count(transposed):
    """By weight and by label, in blocks, whatever they hold; over leading dimensions of any number."""
    bias = jnp.linspace(-1, 1, CLASSES)
    weights = np.where(IGNORED, 0, np.asarray(WEIGHTS, np.float64))
    evaluate = jax.jit(jsoftmax.linear_evaluation, static_argnames=("ignore_index", "kernel_transposed", "block_size"))
    found = evaluate(
        jnp.where(weights[:, None] == 0, jnp.nan, FEATURE_ROWS).reshape(1, ROWS, FEATURES),
        KERNEL.T if transposed else KERNEL,
        jnp.where(IGNORED, -100, LABELS)[None],
        bias=bias,
        weights=WEIGHTS[None],
        ignore_index=-100,
        kernel_transposed=transposed,
        block_size=8,
    )
    np.testing.assert_allclose(found, expected(weights, np.linspace(-1, 1, CLASSES)), rtol=1e-5)


def test_parts_add_up():
    parts = [jsoftmax.linear_evaluation(FEATURE_ROWS[at], KERNEL, LABELS[at]) for at in (slice(20), slice(20, ROWS))]
    whole = jsoftmax.linear_evaluation(FEATURE_ROWS, KERNEL, LABELS)
    np.testing.assert_allclose(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5)


def test_no_row_counts():
    found = jsoftmax.linear_evaluation(FEATURE_ROWS, KERNEL, LABELS, weights=jnp.zeros(ROWS))
    assert (found.loss, found.accuracy, found.perplexity) == (0, 0, 1)


def test_one_product():
    text = str(jax.make_jaxpr(jsoftmax.linear_evaluation)(FEATURE_ROWS, KERNEL, LABELS))
    # One program for whole blocks, one for the parts of the last.
    assert 1 <= text.count("dot_general") <= 2


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"labels": LABELS.astype(jnp.float32)}, TypeError),
        ({"labels": LABELS[:3]}, ValueError),
        ({"labels": LABELS[:3], "ignore_index": 0}, ValueError),
        ({"weights": WEIGHTS[:3]}, ValueError),
    ],
)
def test_bad_input(given, error):
    arguments = {"features": FEATURE_ROWS, "kernel": KERNEL, "labels": LABELS, **given}
    with pytest.raises(error, match=next(iter(given))):
        jsoftmax.linear_evaluation(**arguments)
