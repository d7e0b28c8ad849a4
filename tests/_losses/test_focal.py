"""Focal loss over classes that exclude each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from jsoftmax._losses.cross_entropy import Focal, Poly

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(6, 5)) * 3
LOGITS[0, 2] = 60.0  # as confident as float64 can say
LABELS = np.array([2, 0, 4, 1, 1, 3])
DENSE = RANDOM.dirichlet(np.ones(5), size=6)


def focal(logits, targets, gamma):
    """Of each row, by definition, and the derivatives of all of them together by logits and by γ."""
    others = np.exp(logits[:, None] - logits[..., None]) * (1 - np.eye(5))  # e^(z_k − z_j) by j and k
    log_p, missing = -np.log1p(others.sum(-1)), others.sum(-1) / (1 + others.sum(-1))
    each = targets * missing**gamma * -log_p
    slope = targets * (gamma * missing ** (gamma - 1) * np.exp(log_p) * log_p - missing**gamma)
    by_logits = slope - slope.sum(-1, keepdims=True) * np.exp(log_p)
    return each.sum(-1), by_logits, (each * np.log(missing)).sum()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("labels", "targets"), [(LABELS, np.eye(5)[LABELS]), (DENSE, DENSE)], ids=["integer", "dense"])
def test_values_and_slopes(labels, targets, gamma, x64):
    def total(logits, gamma):
        losses = jsoftmax.softmax_focal_loss(logits, labels, gamma=gamma)
        return losses.sum(), losses

    slopes, losses = jax.grad(total, (0, 1), has_aux=True)(jnp.asarray(LOGITS), jnp.asarray(gamma))
    for found, expected in zip((losses, *slopes), focal(LOGITS, targets, gamma), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_another_loss_with_one_parameter_is_another_tree():
    """If they are equal, `jit` may run the program of the one for the other: where their hashes meet in its tables."""
    assert jax.tree.structure(Focal(2.0)) != jax.tree.structure(Poly(2.0))
    assert jax.tree.map(lambda gamma: gamma + 1, Focal(2.0)) == Focal(3.0)
