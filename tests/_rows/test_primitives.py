"""What stands in the place of `jnp.where` gives what NumPy's gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsoftmax._rows.primitives import select, together

FLOATS = np.array([[1.0, np.nan, -np.inf], [0.5, -0.0, np.inf]], np.float32)
INTEGERS = np.arange(3, dtype=np.int32)
MASK = np.array([[True, False, True], [False, True, False]])


@pytest.mark.parametrize(
    ("condition", "chosen", "otherwise"),
    [
        (MASK, FLOATS, -FLOATS),
        (MASK, FLOATS, np.nan),
        (MASK[0], -0.0, FLOATS),
        (MASK, INTEGERS, -1),
        (MASK[:, :1], INTEGERS, 7 * INTEGERS),
        (np.bool_(True), FLOATS[0], FLOATS[:, :1]),
    ],
)
def test_select_is_where(condition, chosen, otherwise):
    arrays = [jnp.asarray(x) if isinstance(x, np.ndarray | np.bool_) else x for x in (condition, chosen, otherwise)]
    found = jax.jit(lambda condition: select(condition, *arrays[1:]))(arrays[0])
    expected = np.where(condition, chosen, otherwise)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))
    assert found.dtype == arrays[1 + isinstance(chosen, float)].dtype


def test_select_promotes_no_arrays():
    with pytest.raises(ValueError, match="promotion"):
        select(MASK, jnp.asarray(FLOATS), jnp.asarray(INTEGERS))


def test_derivative_of_select():
    mask = jnp.asarray(MASK[0])
    slope = jax.grad(lambda x: select(mask, x, 2 * x).sum())(jnp.ones(3))
    np.testing.assert_array_equal(slope, [1, 2, 1])


def test_together_has_one_shape():
    assert [x.shape for x in together(jnp.ones(3), jnp.ones((2, 1)), jnp.ones(()))] == [(2, 3)] * 3
