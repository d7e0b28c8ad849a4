"""Losses of independent yes-or-no questions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax


def slopes(x, y, gamma):
    """By x and by y, of q^gamma · c with q = y σ(−x) + (1 − y) σ(x), and c the cross-entropy."""
    yes, no = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(x))
    missing = y * no + (1 - y) * yes
    loss = -y * np.log(yes) - (1 - y) * np.log(no)
    by_missing, by_loss = gamma * missing ** (gamma - 1) * loss, missing**gamma
    by_x = by_missing * (1 - 2 * y) * yes * no + by_loss * (yes - y)
    return by_x, by_missing * (no - yes) + by_loss * (np.log(no) - np.log(yes))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_focal_slopes_by_logits_and_by_hard_and_soft_labels(label, gamma, x64):
    x = np.linspace(-8.0, 8.0, 9)
    found = jax.grad(lambda x, y: jsoftmax.sigmoid_focal_loss(x, y, gamma=gamma).sum(), (0, 1))(x, jnp.full(9, label))
    np.testing.assert_allclose(found, slopes(x, label, gamma), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_slopes_are_finite_in_the_tails(gamma):
    x, y = jnp.array([-200.0, -80.0, 80.0, 200.0] * 2), jnp.repeat(jnp.array([0.0, 1.0]), 4)
    slopes = jax.grad(lambda x, y, g: jsoftmax.sigmoid_focal_loss(x, y, gamma=g).sum(), argnums=(0, 1, 2))(x, y, gamma)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
