"""`make fuzz` in short: a batch of each dtype through every engine, and what a longer search has found."""

import fuzz
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jsoftmax
from jsoftmax._rows.forms import cpu

pytestmark = pytest.mark.exact


# Most of the time goes to compiling: options for the commonest dtype, 8 bits without devices.
BATCHES = [
    pytest.param(dtype, 65 if "8" in dtype else 64, dtype == "float32", marks=[pytest.mark.slow] * ("e5m2" in dtype))
    for dtype in fuzz.DTYPES
]


@pytest.mark.parametrize(("dtype", "classes", "options"), BATCHES)
def test_a_batch_of_hard_rows(dtype, classes, options, monkeypatch):
    """Those of 16 and of 8 bits take turns, as on CPUs the rows of large arrays do."""
    if jnp.dtype(dtype).itemsize < 4:
        monkeypatch.setattr(cpu, "CACHED", 1)
    found = fuzz.Found()
    assert fuzz.batch(0, found, dtypes=(dtype,), sizes=(classes,), options=(options,)) >= fuzz.BATCH
    names = {"loss with options", "gradient with options"} if options else {"loss", "gradient", "softmax", "logsumexp"}
    assert {name.split("/")[0] for name in found} == {*names, "edge rows"}


def test_a_wrong_result_is_found(monkeypatch):
    """Off by two millionths, 17 to 34 units."""
    right = jsoftmax.softmax_cross_entropy_with_integer_labels
    monkeypatch.setattr(
        jsoftmax, "softmax_cross_entropy_with_integer_labels", lambda *a, **options: right(*a, **options) * 1.000002
    )
    fuzz.program.cache_clear()
    with pytest.raises(AssertionError, match=r"is off by .* ulps .* of float32 by dense"):
        fuzz.batch(0, fuzz.Found(), dtypes=("float32",), sizes=(8,), options=(False,))
    fuzz.program.cache_clear()


def test_sums_on_shards_do_not_underflow_one_by_one():
    """Found at a label 85 above the others: on each of 8 devices their sum is subnormal, on all of them it is not."""
    logits = np.zeros((1, 64), np.float32)
    logits[0, 21] = 89.5
    row = oracle.exact(logits, oracle.LONG_DOUBLE)
    results = fuzz.program("sharded", 64, "float32")(jnp.asarray(logits), jnp.array([21]))
    assert np.all(oracle.ulps(results["loss"], oracle.losses(row, [21]), jnp.float32) <= 40)
    assert np.all(oracle.ulps(results["gradient"], oracle.gradients(row, np.array([21])), jnp.float32) <= 40)


# XLA's library for CPUs, asked for arrays of 4096 numbers and more, gives the maximum of what stands behind a NaN.
BESIDE_NAN = {
    "logsumexp": jsoftmax.logsumexp,
    "top_k": lambda z: jsoftmax.categorical.entropy(z, top_k=3),
    "sample": lambda z: jsoftmax.categorical.sample(jax.random.key(0), z),
    "sharded": lambda z: fuzz.program("sharded", 64, "float32")(z, jnp.zeros(len(z), jnp.int32))["gradient"],
}


@pytest.mark.parametrize("name", BESIDE_NAN)
def test_a_nan_with_nothing_behind_it_is_found(name):
    """Found on shards, whose stretch of a row may end in a NaN: 64 classes, of which each of 8 devices has 8."""
    logits = np.zeros((fuzz.BATCH, 64), np.float32)
    logits[::4, 3] = logits[2::4, 63] = np.nan
    found = np.asarray(BESIDE_NAN[name](jnp.asarray(logits)))
    bad = (found == -1 if name == "sample" else np.isnan(found)).reshape(fuzz.BATCH, -1)
    np.testing.assert_array_equal(bad, np.broadcast_to(np.arange(fuzz.BATCH)[:, None] % 2 == 0, bad.shape))


def test_another_format_of_8_bits():
    """The loss is that of the same numbers in float32, and the gradient is rounded once."""
    dtype = jnp.float8_e5m2fnuz
    logits, labels = jnp.array([[1.0, 2.0, 4.0, -16.0], [0.5, 0.5, 0.5, 0.5]]), jnp.array([0, 1])
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels
    values = [jax.value_and_grad(lambda z: jnp.sum(loss(z, labels)))(z) for z in (logits, logits.astype(dtype))]
    assert values[0][0] == values[1][0]
    np.testing.assert_array_equal(values[0][1].astype(dtype).view(jnp.uint8), values[1][1].view(jnp.uint8))


def test_a_format_of_scales_is_refused_by_name():
    with pytest.raises(TypeError, match=r"logits has dtype float8_e8m0fnu, a format of scales"):
        jsoftmax.softmax_cross_entropy_with_integer_labels(jnp.ones((2, 4), jnp.float8_e8m0fnu), jnp.zeros(2, int))
