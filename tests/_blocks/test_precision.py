"""The precision of a head's products: what is compiled, what is read, and the gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from jsoftmax import ranking
from jsoftmax.testing import float64

ROWS, FEATURES, CLASSES = 24, 16, 40
random = np.random.default_rng(5)
FEATURE_ROWS = jnp.asarray(random.normal(size=(ROWS, FEATURES)), jnp.float32)
KERNEL = jnp.asarray(random.normal(size=(FEATURES, CLASSES)), jnp.float32)
TEACHER = jnp.asarray(random.normal(size=(FEATURES, CLASSES)).astype(jnp.bfloat16), jnp.float32)
LABELS = jnp.asarray(random.integers(0, CLASSES, ROWS))
STORED = jnp.full((ROWS, 2), -1.0), jnp.asarray(np.arange(2 * ROWS).reshape(ROWS, 2) % CLASSES)

# Of features and kernel; each has a block that is whole, so that its products are in the program once.
CALLS = {
    "loss": lambda h, w, **o: jsoftmax.linear_softmax_cross_entropy(h, w, LABELS, block_size=8, **o),
    "statistics": lambda h, w, **o: jsoftmax.linear_softmax_statistics(h, w, LABELS, block_size=8, **o).log_prob.sum(),
    "jvp": lambda h, w, **o: jsoftmax.linear_softmax_cross_entropy(h, w, LABELS, derivative="jvp", **o),
    "evaluation": lambda h, w, **o: jsoftmax.linear_evaluation(h, w, LABELS, **o).loss,
    "distillation": lambda h, w, **o: jsoftmax.linear_distillation_loss(h, w, h, TEACHER.astype(w.dtype), **o),
    "stored": lambda h, w, **o: jsoftmax.linear_top_k_distillation_loss(h, w, *STORED, **o),
    "contrast": lambda h, w, **o: jsoftmax.contrastive_loss(h, w.T, **o),
    "sigmoid": lambda h, w, **o: jsoftmax.sigmoid_contrastive_loss(h, w.T, **o),
}
FOUND = {
    "top k": lambda h, w, **o: jsoftmax.linear_top_k(h, w, 3, **o)[0],
    "ranks": lambda h, w, **o: ranking.linear_ranks(h, w, LABELS, **o),
}


def products(function, *arguments):
    return re.findall(r"dot_general\[.*?preferred", str(jax.make_jaxpr(function)(*arguments)), re.DOTALL)


@pytest.mark.parametrize("name", CALLS)
def test_all_products_have_it(name):
    """Those of the gradients too; and none has, if none is asked for."""
    gradients = jax.grad(functools.partial(CALLS[name], precision="highest"), (0, 1))
    found = products(gradients, FEATURE_ROWS, KERNEL)
    assert len(found) >= 3
    assert all("HIGHEST" in product for product in found)
    assert not any("HIGHEST" in product for product in products(jax.grad(CALLS[name], (0, 1)), FEATURE_ROWS, KERNEL))


@pytest.mark.parametrize("name", FOUND)
def test_what_is_not_differentiated_has_it(name):
    (found,) = products(functools.partial(FOUND[name], precision="highest"), FEATURE_ROWS, KERNEL)
    assert "HIGHEST" in found
    assert "HIGHEST" not in products(FOUND[name], FEATURE_ROWS, KERNEL)[0]


@pytest.mark.parametrize("name", CALLS)
def test_narrow_factors_are_read_as_float32(name):
    """The float32 head of a bfloat16 model: of the same rounded numbers, what float64 gives."""
    narrow = FEATURE_ROWS.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    call = functools.partial(CALLS[name], precision="highest")
    value, gradients = jax.value_and_grad(call, (0, 1))(*narrow)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2
    with float64():
        exact = jax.value_and_grad(CALLS[name], (0, 1))(*(array.astype(jnp.float64) for array in narrow))
    np.testing.assert_allclose(value, exact[0], rtol=1e-5)
    for found, expected in zip(gradients, exact[1], strict=True):
        # What two parts of a loss add to a gradient is rounded to 8 bits for each of them, and their sum again.
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=0, atol=2**-7 * np.abs(expected).max())


def test_a_float32_kernel_is_not_rounded_to_the_features_dtype():
    h = FEATURE_ROWS.astype(jnp.bfloat16)
    expected = jsoftmax.linear_softmax_statistics(h.astype(jnp.float32), KERNEL, LABELS).log_prob
    in_float32 = jsoftmax.linear_softmax_statistics(h, KERNEL, LABELS, precision="default").log_prob
    rounded = jsoftmax.linear_softmax_statistics(h, KERNEL, LABELS).log_prob
    np.testing.assert_allclose(in_float32, expected, rtol=1e-5)
    assert np.abs(rounded - expected).max() > 1e-3


@pytest.mark.parametrize("name", [*CALLS, *FOUND])
def test_what_is_no_precision_is_refused(name):
    call = {**CALLS, **FOUND}[name]
    with pytest.raises(ValueError, match=r"precision must be a jax.lax.PrecisionLike such as 'highest', got 'exact'"):
        call(FEATURE_ROWS, KERNEL, precision="exact")
