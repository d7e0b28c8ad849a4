"""The library's own exponential, against mpmath: as right as it says, at any difference."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import FIFTY_DIGITS

from jsoftmax._rows.exponentials import UNIT, exponentials, for_rounding

pytestmark = pytest.mark.exact

# Where UNIT · e^x is still a normal number.
LOWEST = {jnp.float32: -128.9, jnp.float64: -749.0}
both_dtypes = pytest.mark.parametrize("dtype", LOWEST, ids=lambda dtype: dtype.__name__)


@both_dtypes
@pytest.mark.parametrize("maximum", [0.0, 0.3, -7.7, 88.3, -1234.5, 1e6])
def test_right_to_little_more_than_an_ulp(dtype, maximum, x64):
    rng = np.random.default_rng(0)
    top = np.asarray(maximum, dtype)
    below = np.concatenate([rng.uniform(LOWEST[dtype], 0, 800), -rng.exponential(size=200)])
    z = np.minimum(top + below, top).astype(dtype)
    exact = FIFTY_DIGITS.exp(oracle.widen(z, FIFTY_DIGITS) - oracle.widen(top, FIFTY_DIGITS)) * UNIT
    error = oracle.ulps(jax.jit(exponentials)(z, top), exact, dtype)
    assert np.max(error) <= 1.2
    assert np.median(error) <= 0.4


@pytest.mark.parametrize("maximum", [0.0, 1e-30, -1e-3, 0.015625, 0.3, -7.7, 88.3, -1234.5, 31_000.0, 60_000.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_of_numbers_of_16_bits(dtype, maximum):
    """Among them some so close to 0 that their difference from a maximum, or the maximum's from them, is rounded."""
    rng = np.random.default_rng(0)
    top = np.asarray(maximum, dtype).astype(np.float32)
    near_zero = 2.0 ** -rng.uniform(0, 30, 200)
    z = np.concatenate([top - rng.uniform(0, 120, 800), top - rng.exponential(size=200), near_zero, -near_zero])
    z = np.minimum(np.asarray(z, dtype).astype(np.float32), top)
    z = z[top - z < 128]
    exact = FIFTY_DIGITS.exp(oracle.widen(z, FIFTY_DIGITS) - oracle.widen(top, FIFTY_DIGITS)) * UNIT
    error = oracle.ulps(jax.jit(exponentials, static_argnums=2)(z, top, True), exact, jnp.float32)
    assert np.max(error) <= 1.6
    far = exponentials(jnp.array([top, -jnp.inf, -1e30, jnp.nan]), jnp.asarray(top), True)
    np.testing.assert_array_equal(far, np.array([UNIT, 0, 0, np.nan]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_right_enough_to_be_rounded(dtype):
    """Of differences that are exact: all between two floats of 16 bits down to the smallest normal number."""
    top = jnp.float32(3.5)
    z = jnp.asarray(np.arange(-11_100, 1) / 128, dtype).astype(jnp.float32) + top
    exact = np.exp(np.asarray(z - top, float))
    np.testing.assert_allclose(jax.jit(for_rounding)(z, top), exact, rtol=2.0**-17)
    ends = for_rounding(jnp.array([top, -jnp.inf, jnp.nan]), top)
    np.testing.assert_allclose(ends, [1, 0, np.nan], rtol=2.0**-17)


@both_dtypes
def test_ends(dtype, x64):
    far = LOWEST[dtype] - 2
    z = jnp.array([[3.0, far + 3, -1e30, -jnp.inf, jnp.nan], [-jnp.inf, 0, 0, 0, 0]], dtype)
    maximum = jnp.array([[3.0], [jnp.nan]], dtype)
    expected = [[UNIT, 0, 0, 0, np.nan], [np.nan] * 5]
    np.testing.assert_array_equal(exponentials(z, maximum), np.array(expected))


def test_a_product_is_rounded_before_it_is_subtracted():
    """Compilers contract `a * b − m`; then the largest of a row, m itself, would not be 0 from itself."""
    a, b = np.float32(1e8), np.linspace(1.1, 1.9, 97, dtype=np.float32)
    actual = jax.jit(lambda b: exponentials(a * b, jnp.float32(a) * b))(b)
    np.testing.assert_array_equal(actual, np.full(97, UNIT, np.float32))
    maximum = (a * b).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda b, m: exponentials(a * b, m))(b, maximum), actual)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_derivative(mode):
    """e^(z − m) for z, and its negative for m, at a tie too, where a minimum alone would give half of it."""
    z, m = jnp.array([0.5, -1.0, -jnp.inf]), jnp.array([0.5, 0.5, 0.5])
    for_z, for_m = mode(exponentials, (0, 1))(z, m)
    np.testing.assert_allclose(for_z, np.diag(np.exp([0.0, -1.5, -np.inf]) * UNIT), rtol=1e-6)
    np.testing.assert_array_equal(for_m, -for_z)
