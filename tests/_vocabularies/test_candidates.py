"""Negatives that each row names: against the full loss of a mask, an unbiased estimate, and the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax

RANDOM = np.random.default_rng(0)
ROWS, WIDTH, CLASSES, COUNT = 6, 5, 40, 8
FEATURES, KERNEL = RANDOM.normal(size=(ROWS, WIDTH)), RANDOM.normal(size=(WIDTH, CLASSES))
BIAS, LABELS = RANDOM.normal(size=CLASSES), np.array([0, 3, 3, 17, 39, 5])
# No class twice in a row, some of them unused, and in two rows the label.
CANDIDATES = np.stack([RANDOM.permutation(CLASSES)[:COUNT] for _ in range(ROWS)])
CANDIDATES[2, 1:4], CANDIDATES[4, 0], CANDIDATES[:2, 5] = -1, CLASSES, LABELS[:2]
loss = jsoftmax.candidate_softmax_cross_entropy
OPTIONS = {"plain": {}, "margin": {"margin": 0.3, "temperature": np.linspace(0.5, 2, ROWS)}, "capped": {"softcap": 3.0}}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_full_loss_of_the_named_classes(name, transposed, x64):
    """The same as all logits with the others masked; and so are the gradients."""
    allowed = (CANDIDATES[..., None] == np.arange(CLASSES)).any(axis=1) | (LABELS[:, None] == np.arange(CLASSES))

    def full(features, kernel, bias):
        options = {"where": allowed, **OPTIONS[name]}
        return jsoftmax.softmax_cross_entropy_with_integer_labels(features @ kernel + bias[None], LABELS, **options)

    def named(features, kernel, bias):
        options = {"bias": bias, "kernel_transposed": transposed, **OPTIONS[name]}
        return loss(features, kernel.T if transposed else kernel, LABELS, CANDIDATES, **options)

    at = tuple(map(jnp.asarray, (FEATURES, KERNEL, BIAS)))
    (expected, wanted), (value, got) = (jax.jit(functools.partial(jax.vjp, f))(*at) for f in (full, named))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for one, other in zip(got(jnp.ones(ROWS)), wanted(jnp.ones(ROWS)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_correction_makes_the_sum_unbiased(x64):
    """The mean of e^(loss + s_y) over many draws is Σ e^(s_j), the label's own draws left out."""
    draws, z = 40_000, FEATURES[0] @ KERNEL / 2
    p = np.arange(1.0, CLASSES + 1) / (CLASSES * (CLASSES + 1) / 2)
    drawn = RANDOM.choice(CLASSES, p=p, size=(draws, COUNT))
    options = {"log_q": np.log(COUNT * p[drawn]), "temperature": 2.0}
    losses = loss(np.tile(FEATURES[0], (draws, 1)), KERNEL, np.full(draws, LABELS[3]), drawn, **options)
    sums = np.exp(losses + z[LABELS[3]])
    # Five standard errors of the mean.
    assert abs(sums.mean() - np.exp(z).sum()) < 5 * sums.std() / np.sqrt(draws)


def test_rows_that_are_no_use():
    """An ignored row of NaN is 0, with no gradient; a label that is no class is NaN, in its row alone."""
    features = np.where(np.arange(ROWS)[:, None] == 1, np.nan, FEATURES).astype(np.float32)
    labels = np.array([0, -100, CLASSES, 17, 39, 5])

    def total(features):
        losses = loss(features, KERNEL.astype(np.float32), labels, CANDIDATES, ignore_index=-100)
        return jnp.delete(losses, 2).sum(), losses

    (value, losses), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(features)
    assert losses[1] == 0
    assert np.isnan(losses[2])
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient[1], 0)


def test_errors():
    with pytest.raises(ValueError, match=r"candidates has shape \(8,\), but needs \(6, 'k'\)"):
        loss(FEATURES, KERNEL, LABELS, CANDIDATES[0])
    with pytest.raises(ValueError, match=r"log_q has shape \(6,\), but needs \(6, 8\)"):
        loss(FEATURES, KERNEL, LABELS, CANDIDATES, log_q=np.zeros(6))
    with pytest.raises(TypeError, match="candidates must hold integer"):
        loss(FEATURES, KERNEL, LABELS, CANDIDATES * 1.0)
    with pytest.raises(TypeError, match="unknown option 'label_smoothing'"):
        loss(FEATURES, KERNEL, LABELS, CANDIDATES, label_smoothing=0.1)
