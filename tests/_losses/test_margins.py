"""Margins, adjusted logits and balanced weights: formulas in float64, peers, every engine, a cosine's ends."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import metric_learning as peer
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, PartitionSpec as P
from jax.test_util import check_grads

import jsoftmax

PEERS = json.loads(Path(peer.__file__).with_suffix(".json").read_text(encoding="utf-8"))
integer_loss = jsoftmax.softmax_cross_entropy_with_integer_labels
RANDOM = np.random.default_rng(0)
ROWS, CLASSES, WIDTH = 6, 16, 3


def unit(array, axis=-1):
    return array / np.sqrt((array * array).sum(axis=axis, keepdims=True))


FEATURES, KERNEL = unit(RANDOM.normal(size=(ROWS, WIDTH))), unit(RANDOM.normal(size=(CLASSES, WIDTH)))
LABELS = np.array([0, 15, 3, 3, 8, 11])
FEATURES[1] = unit(-KERNEL[15] + 0.1)  # its angle and the margin are beyond π
COSINES = FEATURES @ KERNEL.T
PRIOR = np.log(unit(np.arange(1.0, 17)) ** 2)
ONE_A_ROW = np.linspace(0.1, 0.4, ROWS)
CASES = {
    "margin": {"margin": 0.35},
    "angular": {"angular_margin": 0.5},
    "both": {"margin": 0.1, "angular_margin": 0.3},
    "one a row": {"margin": ONE_A_ROW, "angular_margin": ONE_A_ROW[::-1].copy()},
    "adjusted": {"logit_adjustment": PRIOR},
    "everything": {"margin": 0.2, "angular_margin": ONE_A_ROW, "logit_adjustment": PRIOR, "label_smoothing": 0.1},
}
TEMPERATURE = 1 / 16


def expected(cosines, labels, margin=0.0, angular_margin=0.0, logit_adjustment=0.0, label_smoothing=0.0):
    """The papers' formulas, by angles."""
    own = oracle.at_labels(cosines, labels)
    theta, m = np.arccos(own), np.broadcast_to(angular_margin, own.shape)
    own = np.where(theta + m > np.pi, own - m * np.sin(m), np.cos(theta + m)) - margin
    z = np.where(np.arange(cosines.shape[1]) == labels[:, None], own[:, None], cosines) / TEMPERATURE
    log_p = oracle.exact(z + logit_adjustment, oracle.LONG_DOUBLE).log_p
    loss = -oracle.at_labels(log_p, labels) * (1 - label_smoothing) - label_smoothing * log_p.mean(axis=1)
    return loss.astype(np.float64)


def dense(features, kernel, options):
    logits = jnp.dot(features, kernel.T, precision="highest")
    return integer_loss(logits, LABELS, temperature=TEMPERATURE, **options)


def linear(features, kernel, options):
    return jsoftmax.linear_softmax_cross_entropy(
        *(features, kernel, LABELS),
        **dict(kernel_transposed=True, block_size=4, reduction="none", temperature=TEMPERATURE, **options),
    )


def split(features, kernel, options):
    """Classes over eight devices."""
    mesh = Mesh(np.array(jax.devices()), "c")
    parts = {name: P("c") if name == "logit_adjustment" else P() for name in options}

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("c"), parts), out_specs=P())
    def loss(features, kernel, options):
        return linear(features, kernel, options | {"axis_name": "c"})

    return loss(features, kernel, jax.tree.map(jnp.asarray, options))


def sampled(features, kernel, options):
    """All classes, as the sample."""
    options = {name: value for name, value in options.items() if "margin" in name}
    sampler = jsoftmax.uniform_sampler(CLASSES)
    sample = jsoftmax.Sample(jnp.arange(CLASSES, dtype=jnp.int32), jnp.int32(CLASSES), jnp.full(CLASSES, CLASSES))
    return jsoftmax.sampled_softmax_cross_entropy(
        *(features, kernel, LABELS, sample),
        **dict(sampler=sampler, subtract_log_q=False, kernel_transposed=True, temperature=TEMPERATURE, **options),
    )


ENGINES = {"dense": dense, "linear": linear, "split": split}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_formula(engine, name, x64):
    loss = ENGINES[engine](jnp.asarray(FEATURES), jnp.asarray(KERNEL), CASES[name])
    np.testing.assert_allclose(loss, expected(COSINES, LABELS, **CASES[name]), rtol=1e-10)


@pytest.mark.parametrize("name", ["margin", "angular", "one a row"])
def test_sampled(name, x64):
    loss = sampled(jnp.asarray(FEATURES), jnp.asarray(KERNEL), CASES[name])
    np.testing.assert_allclose(loss, expected(COSINES, LABELS, **CASES[name]), rtol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_in_batch(name, x64):
    """Each query's own item is its label; what items are expected to be counted joins the adjustment."""
    log_q = np.linspace(-1.0, 1.0, CLASSES)
    own = np.arange(ROWS)
    loss = jsoftmax.in_batch_softmax_cross_entropy(
        FEATURES, KERNEL, log_q=log_q, temperature=TEMPERATURE, **CASES[name]
    )
    options = CASES[name] | {"logit_adjustment": CASES[name].get("logit_adjustment", 0.0) - log_q}
    np.testing.assert_allclose(loss, expected(COSINES, own, **options), rtol=1e-10)


@pytest.mark.parametrize(("name", "option"), [("cosface", {"margin": 0.35}), ("arcface", {"angular_margin": 0.5})])
def test_pytorch_metric_learning(name, option, x64):
    def loss(features, kernel):
        features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
        kernel = kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)
        labels = jnp.array(peer.LABELS)
        return jsoftmax.linear_softmax_cross_entropy(
            features, kernel, labels, temperature=1 / 16, block_size=4, **option
        )

    value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.asarray(peer.FEATURES), jnp.asarray(peer.KERNEL))
    np.testing.assert_allclose(value, PEERS[name]["value"], rtol=1e-10)
    for gradient, theirs in zip(gradients, PEERS[name]["gradients"], strict=True):
        np.testing.assert_allclose(gradient, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_derivatives(derivative, x64):
    """Of the logits and of everything that acts on them, in the modes that are promised."""

    @jax.jit
    def loss(logits, margin, angular_margin, adjustment):
        options = {"margin": margin, "angular_margin": angular_margin, "logit_adjustment": adjustment}
        return integer_loss(logits, LABELS[2:4], temperature=0.5, derivative=derivative, **options)

    at = tuple(map(jnp.asarray, (COSINES[2:4, :5], ONE_A_ROW[:2], 0.3, PRIOR[:5])))
    order = 1 if derivative == "vjp" else 2
    check_grads(loss, at, order=order, modes=("rev",), eps=1e-5, atol=1e-6, rtol=1e-6)


def test_derivative_at_the_ends_of_the_cosine():
    """Right up to the last number below 1, and there for 1 and what rounding leaves above it."""
    m, last = oracle.MP.mpf(0.5), 1 - 2.0**-24
    cosines = np.array([last, 1 - 1e-6, 0.5, -0.5, math.cos(math.pi - 0.5) + 1e-3, -0.9, -last, -1.0], np.float32)
    slope = jax.vmap(jax.grad(lambda c: turned(c)))
    value, derivative = turned(jnp.asarray(cosines)), slope(jnp.asarray(cosines))
    for c, v, d in zip(cosines, value, derivative, strict=True):
        c = oracle.MP.mpf(float(c))
        theta = oracle.MP.acos(c)
        beyond = theta + m > oracle.MP.pi
        exact = c - m * oracle.MP.sin(m) if beyond else oracle.MP.cos(theta + m)
        exact_slope = 1 if beyond else oracle.MP.sin(theta + m) / oracle.MP.sin(theta)
        np.testing.assert_allclose(float(v), float(exact), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(float(d), float(exact_slope), rtol=2e-6, atol=2e-7)
    ends = jnp.array([1.0, 1 + 2.0**-22])
    np.testing.assert_allclose(turned(ends), math.cos(0.5), rtol=1e-6)
    np.testing.assert_allclose(slope(ends), derivative[0], rtol=1e-4)


def turned(cosine):
    """What the label's logit becomes: the loss of two classes of which the other has logit 0, undone."""
    rows = jnp.stack([cosine, jnp.zeros_like(cosine)], axis=-1)
    loss = integer_loss(rows, jnp.zeros(cosine.shape, jnp.int32), angular_margin=0.5)
    return -jnp.log(jnp.expm1(loss))


@pytest.mark.optimized
def test_confident_rows_keep_their_digits():
    """p_y is 1 in float32, and the loss about e^−40, right to what rounding a logit of 50 costs."""
    cosines = np.array([[0.99, -0.25, 0.125], [0.875, 0.0, -0.5]], np.float32)
    logits = cosines.astype(np.float64)
    for options in ({"margin": 0.25}, {"angular_margin": 0.25}):
        value = integer_loss(cosines, np.zeros(2, np.int32), temperature=1 / 64, **options)
        own = logits[:, 0] - 0.25 if "margin" in options else np.cos(np.arccos(logits[:, 0]) + 0.25)
        row = oracle.exact(np.concatenate([own[:, None], logits[:, 1:]], axis=1) * 64)
        np.testing.assert_allclose(value, oracle.losses(row, np.zeros(2, int)).astype(float), rtol=64 * 2.0**-23)
        assert np.all(np.asarray(value) < 1e-10)


TO_ROUND_ALIKE = {
    "temperature": {},
    "margin": {"margin": 0.1},
    "angular": {"angular_margin": 0.3},
    "adjusted": {"logit_adjustment": np.float32(RANDOM.normal(size=64))},
}


@pytest.mark.optimized
@pytest.mark.parametrize("temperature", [1 / 64, 0.017])
@pytest.mark.parametrize("name", TO_ROUND_ALIKE)
def test_row_and_label_are_rounded_alike(name, temperature):
    """Losses below 1e−12 with a product in front: two ways to round a logit would be 4e−6 apart."""
    random = np.random.default_rng(1)
    cosines, labels = random.uniform(-0.5, 0.3, size=(512, 64)), random.integers(0, 64, size=512)
    cosines[np.arange(512), labels] = random.uniform(0.95, 0.999, size=512)

    @jax.jit
    def loss(cosines):
        return integer_loss(cosines * np.float32(1.0000001), labels, temperature=temperature, **TO_ROUND_ALIKE[name])

    assert np.all(np.asarray(loss(cosines.astype(np.float32))) < 1e-12)


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_idle_and_masked_rows(derivative):
    """An ignored row of NaN has a gradient of 0; a label of −∞ has an infinite loss, and a finite gradient."""
    logits = jnp.array([[np.nan, 0.5, 0.2], [0.1, -np.inf, 0.3], [0.1, 0.4, -np.inf]])
    options = {"margin": 0.2, "angular_margin": 0.3, "ignore_index": -1, "derivative": derivative}
    labels = jnp.array([-1, 1, 0])
    value, gradient = jax.value_and_grad(
        lambda z: (lambda v: (v[2], v))(integer_loss(z, labels, **options)), has_aux=True
    )(logits)
    assert value[1][0] == 0
    assert value[1][1] == np.inf
    assert np.isfinite(value[0])
    each = jax.grad(lambda z: integer_loss(z, labels, **options).sum())(logits)
    np.testing.assert_array_equal(each[0], 0)
    assert np.all(np.isfinite(each))
    np.testing.assert_array_equal(gradient[0], 0)


def test_bfloat16_cosines_are_turned_in_float32():
    cosines = jnp.asarray(COSINES, jnp.bfloat16)
    loss = integer_loss(cosines, LABELS, temperature=TEMPERATURE, angular_margin=0.5)
    wide = integer_loss(cosines.astype(jnp.float32), LABELS, temperature=TEMPERATURE, angular_margin=0.5)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, wide, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_class_balanced_weights(beta):
    counts = np.array([1, 5, 0, 100, 100_000])
    exact = np.where(counts > 0, (1 - beta) / np.where(counts > 0, 1 - np.longdouble(beta) ** counts, 1), 0)
    weights = jsoftmax.class_balanced_weights(counts, beta)
    np.testing.assert_allclose(weights, (exact / exact.sum() * 5).astype(float), rtol=1e-5)


def test_errors():
    logits, dense_labels = jnp.zeros((2, 3)), jnp.full((2, 3), 1 / 3)
    with pytest.raises(ValueError, match="angular_margin needs integer labels"):
        jsoftmax.softmax_cross_entropy(logits, dense_labels, angular_margin=0.1)
    with pytest.raises(ValueError, match=r"angular_margin must be between 0 and 1\.5708, got 2"):
        integer_loss(logits, np.zeros(2, int), angular_margin=2.0)
    with pytest.raises(ValueError, match=r"margin has shape \(3,\), but needs \(\) or \(2,\)"):
        integer_loss(logits, np.zeros(2, int), margin=np.zeros(3))
    with pytest.raises(ValueError, match=r"logit_adjustment has shape \(2,\), but needs \(3,\)"):
        integer_loss(logits, np.zeros(2, int), logit_adjustment=np.zeros(2))
    with pytest.raises(ValueError, match="beta must be between 0 and 1, got 1"):
        jsoftmax.class_balanced_weights(np.ones(3), beta=1.0)
    with pytest.raises(ValueError, match="counts has shape"):
        jsoftmax.class_balanced_weights(1)
