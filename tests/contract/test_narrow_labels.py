"""Integer labels in 8 or 16 bits, in which the number of classes, or one that is ignored, would be another number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from jsoftmax import ranking

LOGITS = np.random.default_rng(0).normal(size=(3, 300)).astype(np.float32)  # more classes than 8 bits can number
FEATURES, KERNEL = LOGITS[:, :4], LOGITS.T[:4] @ LOGITS
FUNCTIONS = {
    "integer": functools.partial(jsoftmax.softmax_cross_entropy_with_integer_labels, LOGITS),
    "256 classes": functools.partial(jsoftmax.softmax_cross_entropy_with_integer_labels, LOGITS[:, :256]),
    "one ignored": functools.partial(jsoftmax.softmax_cross_entropy_with_integer_labels, LOGITS, ignore_index=-100),
    "class weights": functools.partial(
        jsoftmax.softmax_cross_entropy_with_integer_labels, LOGITS, class_weights=np.exp(LOGITS[0])
    ),
    "focal": functools.partial(jsoftmax.softmax_focal_loss, LOGITS),
    "log_prob": lambda labels: jsoftmax.categorical.log_prob(LOGITS, labels),
    "ranks": functools.partial(ranking.ranks, LOGITS),
    "linear": functools.partial(jsoftmax.linear_softmax_cross_entropy, FEATURES, KERNEL),
    "sampled": functools.partial(
        jsoftmax.sampled_softmax_cross_entropy, FEATURES, KERNEL, key=jax.random.key(0), num_sampled=8
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize(("dtype", "labels"), [("uint8", [3, 156, 255]), ("int8", [0, 90, 127])])
def test_labels_of_8_bits(function, dtype, labels):
    """156 is −100 in 8 bits, and 256 is 0."""
    value = function(labels=jnp.asarray(np.array(labels), dtype))
    assert np.all(np.isfinite(value))
    np.testing.assert_array_equal(value, function(labels=jnp.asarray(labels, jnp.int32)))


@pytest.mark.parametrize(("dtype", "labels"), [("uint16", [0, 65_436]), ("int16", [0, 32_767])])
def test_labels_of_16_bits(dtype, labels):
    """65,436 is −100 in 16 bits."""
    loss = functools.partial(jsoftmax.softmax_cross_entropy_with_integer_labels, jnp.zeros((2, 70_000)))
    for options in ({}, {"ignore_index": -100}):
        np.testing.assert_allclose(loss(jnp.asarray(np.array(labels), dtype), **options), np.log(70_000), rtol=1e-6)
