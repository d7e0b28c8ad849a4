"""Gradients in bfloat16: float32, rounded once, whatever its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from jsoftmax._rows.dtypes import narrowed

ODD_NAN = np.array([-1, 0x7FFF_FFFF], np.int32).view(np.float32)


def of_float32(bits, **known):
    return np.asarray(jax.jit(lambda x: narrowed(x, jnp.bfloat16, **known))(bits.view(np.float32)), np.float32)


@pytest.mark.parametrize("no_odd_nan", [False, True])
def test_to_the_nearest(no_odd_nan):
    """As NumPy's conversion has it, but for the middle between two, which goes away from 0; and to infinity."""
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    bits = upper | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = bits[np.isfinite(bits.view(np.float32)) & (np.abs(bits.view(np.float32)) >= np.finfo(np.float32).tiny)]
    expected = bits.view(np.float32).astype(jnp.bfloat16).astype(np.float32)
    middle = bits & 0xFFFF == 0x8000
    found = of_float32(bits, no_odd_nan=no_odd_nan)
    np.testing.assert_array_equal(found[~middle], expected[~middle])
    np.testing.assert_array_equal(found[middle], (bits[middle] + 0x8000).view(np.float32))


@pytest.mark.parametrize("no_odd_nan", [False, True])
def test_ends(no_odd_nan):
    ends = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    found = of_float32(ends, no_odd_nan=no_odd_nan)
    np.testing.assert_array_equal(found, ends)
    np.testing.assert_array_equal(np.signbit(found[:4]), np.signbit(ends[:4]))


def test_any_nan_stays_one():
    assert np.all(np.isnan(of_float32(ODD_NAN, no_odd_nan=False)))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"class_weights": jnp.ones(70).at[:2].set(ODD_NAN)}])
def test_gradients_of_any_nan(options):
    """Of a cotangent or a class's weight."""
    logits = jnp.zeros((2, 70), jnp.bfloat16)
    labels = jnp.array([0, 1])

    def losses(z):
        return jsoftmax.softmax_cross_entropy_with_integer_labels(z, labels, **options)

    (gradient,) = jax.vjp(losses, logits)[1](jnp.asarray(ODD_NAN))
    assert np.all(np.isnan(np.asarray(gradient, np.float32)))
