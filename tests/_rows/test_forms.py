"""The forms of the row state that can be forced: the same two numbers from each, whatever a row holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsoftmax._rows.logits import Transform
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.state import row_state

pytestmark = pytest.mark.exact

FORMS = ["cpu", "gpu", "tpu"]
# On and off multiples of the GPU form's 4 and 16 slices, and below both.
SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 35, 67]


def rows_of_all_kinds(classes, dtype):
    """Normal logits, ties, many masks, nothing but one class, the ends of what is finite, and no distribution."""
    rng = np.random.default_rng(classes)
    lowest = float(jnp.finfo(dtype).min)
    z = rng.normal(size=(10, classes)) * 3
    z[1] = 2.5
    z[2, :-1][rng.random(classes - 1) < 0.7] = -np.inf
    z[3, 1:] = -np.inf
    z[4] = np.where(rng.random(classes) < 0.5, lowest, -np.inf)
    z[4, -1] = lowest
    z[5, :-1], z[5, -1] = lowest, -lowest
    z[6] = np.where(np.arange(classes) == classes // 2, 87.5, 0)  # no term of the sum is a normal float32
    z[7] = -np.inf
    z[8, classes // 2] = np.inf
    z[9, classes // 3] = np.nan
    return jnp.asarray(z, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_state_of_any_row(form, dtype):
    state_of = jax.jit(lambda logits: row_state(Rows(logits), form))
    for classes in SIZES:
        logits = rows_of_all_kinds(classes, dtype)
        maximum, others, _ = (np.asarray(number, float) for number in state_of(logits))
        z = np.sort(np.asarray(logits, float)[:7])
        top = z[:, -1:]
        expected = np.exp(z[:, :-1] - top).sum(axis=-1)
        np.testing.assert_array_equal(maximum[:7], top[:, 0])
        np.testing.assert_allclose(others[:7], expected, rtol=20 * 2.0**-24, atol=1.2e-38, err_msg=str(classes))
        assert np.all(np.isnan(maximum[7:]))


@pytest.mark.parametrize("form", FORMS)
def test_a_temperature_makes_differences_inexact(form):
    """Quotients of 16-bit logits have all the bits of float32: the rounding errors of their differences count."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(64, 12)), "bfloat16").at[:, 3].set(60)
    temperature = jnp.linspace(0.7, 0.9, 64)[:, None]
    _, others, _ = jax.jit(lambda rows: row_state(rows, form))(
        Rows(logits, transform=Transform(temperature=temperature))
    )
    z = np.asarray(logits.astype(jnp.float32) / temperature, float)
    expected = np.exp(np.delete(z, 3, axis=-1) - z[:, 3:4]).sum(axis=-1)
    np.testing.assert_allclose(others, expected, rtol=20 * 2.0**-24)
