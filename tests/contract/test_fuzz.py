"""`make fuzz` in short: a batch of each dtype through every engine, and what a longer search has found."""

import fuzz
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jsoftmax

pytestmark = pytest.mark.exact


@pytest.mark.parametrize("dtype", fuzz.DTYPES)
def test_a_batch_of_hard_rows(dtype):
    found = fuzz.Found()
    for seed in range(2):
        assert fuzz.batch(seed, found, dtypes=(dtype,), sizes=(64,)) >= 3 * fuzz.BATCH
    assert {name.split("/")[0] for name in found} == {"loss", "gradient", "softmax", "logsumexp"}


def test_a_wrong_result_is_found(monkeypatch):
    """Off by two millionths, 17 to 34 units."""
    right = jsoftmax.softmax_cross_entropy_with_integer_labels
    monkeypatch.setattr(
        jsoftmax, "softmax_cross_entropy_with_integer_labels", lambda *a, **options: right(*a, **options) * 1.000002
    )
    fuzz.program.cache_clear()
    with pytest.raises(AssertionError, match=r"of float32 by dense is off by .* ulps"):
        fuzz.batch(0, fuzz.Found(), dtypes=("float32",), sizes=(8,))
    fuzz.program.cache_clear()


def test_sums_on_shards_do_not_underflow_one_by_one():
    """Found at a label 85 above the others: on each of 8 devices their sum is subnormal, on all of them it is not."""
    logits = np.zeros((1, 64), np.float32)
    logits[0, 21] = 89.5
    row = oracle.exact(logits, oracle.LONG_DOUBLE)
    results = fuzz.program("sharded", 64, "float32")(jnp.asarray(logits), jnp.array([21]))
    assert np.all(oracle.ulps(results["loss"], oracle.losses(row, [21]), jnp.float32) <= 40)
    assert np.all(oracle.ulps(results["gradient"], oracle.gradients(row, np.array([21])), jnp.float32) <= 40)
