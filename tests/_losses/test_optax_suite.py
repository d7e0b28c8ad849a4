"""optax's own tests of its softmax, sigmoid, poly, focal and KL losses, which ship in its wheel, run on ours."""

import functools
import types
from importlib import metadata

import jax
import numpy as np
import pytest
from optax.losses import _classification, _classification_test, _smoothing, _smoothing_test

import jsoftmax

WITH_OPTIONS = {
    "softmax_cross_entropy": jsoftmax.softmax_cross_entropy,
    # optax has a second function for logits of −∞; ours takes them as it is.
    "safe_softmax_cross_entropy": jsoftmax.softmax_cross_entropy,
    "softmax_cross_entropy_with_integer_labels": jsoftmax.softmax_cross_entropy_with_integer_labels,
    "poly_loss_cross_entropy": jsoftmax.poly_loss_cross_entropy,
}
PLAIN = {
    "kl_divergence": jsoftmax.kl_divergence,
    "sigmoid_binary_cross_entropy": jsoftmax.sigmoid_binary_cross_entropy,
    "sigmoid_focal_loss": jsoftmax.sigmoid_focal_loss,
    "smooth_labels": jsoftmax.smooth_labels,
}
CASES = [
    _classification_test.SoftmaxCrossEntropyTest,
    _classification_test.SafeSoftmaxCrossEntropyTest,
    _classification_test.SoftmaxCrossEntropyWithIntegerLabelsTest,
    _classification_test.SigmoidCrossEntropyTest,
    _classification_test.PolyLossTest,
    _classification_test.KLDivergenceTest,
    _classification_test.SigmoidFocalLossTest,
    _smoothing_test.SmoothLabelsTest,
]
TESTS = [case(name) for case in CASES for name in dir(case) if name.startswith("test")]

# Where we differ on purpose, and why.
MASKED_LABEL = "a class that `where` masks can't be a label: mass there gives ∞, for dense labels as for integer ones"
DIFFERENCES = {
    "SoftmaxCrossEntropyTest.test_mask": MASKED_LABEL,
    "PolyLossTest.test_mask": MASKED_LABEL,
}
if metadata.version("optax") in ("0.2.5", "0.2.6", "0.2.7"):
    DIFFERENCES["SigmoidFocalLossTest.test_large_logit"] = (
        "optax's 1 − sigmoid(z) is right to 2e-5, as later tests allow"
    )


def name_of(test):
    return test.id().split(".", test.id().count(".") - 1)[-1]


@pytest.fixture
def ours(monkeypatch):
    """Our functions under optax's names, in modules of optax's names."""
    names = {name: functools.partial(function, derivative="jvp") for name, function in WITH_OPTIONS.items()}
    for tests, theirs in ((_classification_test, _classification), (_smoothing_test, _smoothing)):
        stand_in = types.SimpleNamespace(**{**vars(theirs), **names, **PLAIN})
        monkeypatch.setattr(tests, theirs.__name__.rpartition(".")[-1], stand_in)


@pytest.mark.parametrize("test", TESTS, ids=name_of)
def test_optax(test, ours):
    """With derivative="jvp", as optax checks forward mode too; the default is compared with it in other files."""
    for name, reason in DIFFERENCES.items():
        if name_of(test).startswith(name):
            pytest.skip(reason)
    np.random.seed(0)  # noqa: NPY002  (optax's tests draw from it)
    # As optax runs them: their own arithmetic relies on promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        test.debug()


def test_names_are_ours(ours):
    """No test above ran optax's function by mistake."""
    for name, function in WITH_OPTIONS.items():
        assert getattr(_classification_test._classification, name).func is function
    for name, function in PLAIN.items():
        module = _smoothing_test._smoothing if name == "smooth_labels" else _classification_test._classification
        assert getattr(module, name) is function
