"""Fits against scipy's minima, calibration errors against closed forms and plain numpy, gradients by differences."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.test_util import check_grads
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss

import jsoftmax

NAN, INF = np.nan, np.inf
ROWS, CLASSES = 60, 4
SCALINGS = ["temperature", "bias_corrected", "vector"]
ERRORS = {
    "expected": jsoftmax.expected_calibration_error,
    "adaptive": jsoftmax.adaptive_calibration_error,
    "classwise": jsoftmax.classwise_calibration_error,
    "classwise, equal mass": functools.partial(jsoftmax.classwise_calibration_error, equal_mass=True),
}

# One scale and a bias for each class is between the two others.
by_scaling = pytest.mark.parametrize(
    "scaling", ["temperature", pytest.param("bias_corrected", marks=pytest.mark.slow), "vector"]
)
by_few_or_many = pytest.mark.parametrize("scaling", ["temperature", "vector"])
by_error = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


def sampled(rows=ROWS, classes=CLASSES, seed=0, spread=2.0):
    """Logits, and labels drawn from their softmax."""
    random = np.random.default_rng(seed)
    logits = spread * random.normal(size=(rows, classes))
    labels = np.argmax(logits + random.gumbel(size=logits.shape), axis=-1)
    return logits, labels


# Fits


def objective(numbers, logits, labels, weights, scaling, penalty=1e-6):
    """What is minimized, in numpy: 1/T, then the biases."""
    scales = logits.shape[-1] if scaling == "vector" else 1
    z = logits * numbers[:scales]
    if scaling != "temperature":
        z = z + numbers[scales:]
    losses = -np.take_along_axis(log_softmax(z, axis=-1), labels[:, None], axis=-1)[:, 0]
    return np.sum(weights * losses) / np.sum(weights) + penalty / 2 * np.sum(numbers[scales:] ** 2)


def objective_gradient(numbers, logits, labels, weights, scaling, penalty=1e-6):
    scales = logits.shape[-1] if scaling == "vector" else 1
    off = weights[:, None] * (softmax(logits * numbers[:scales] + numbers[scales:], axis=-1) - np.eye(CLASSES)[labels])
    by_scale = np.sum(off * logits, axis=0) / np.sum(weights)
    by_bias = np.sum(off, axis=0) / np.sum(weights) + penalty * numbers[scales:]
    return np.concatenate([by_scale if scales > 1 else by_scale.sum(keepdims=True), by_bias])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fit_is_the_minimum_that_scipy_finds(scaling, x64):
    logits, labels = sampled()
    logits = 3 * logits + np.array([1.0, 0.0, -1.0, 0.5])
    weights = np.random.default_rng(1).uniform(0.5, 2, size=ROWS)
    fit = jsoftmax.fit_temperature(jnp.asarray(logits), labels, scaling=scaling, weights=jnp.asarray(weights))
    if scaling == "temperature":
        found = minimize_scalar(
            lambda scale: objective(np.array([scale]), logits, labels, weights, scaling),
            bounds=(0.01, 100),
            method="bounded",
            options={"xatol": 1e-10},
        )
        scale, bias = found.x, np.zeros(CLASSES)
    else:
        scales = CLASSES if scaling == "vector" else 1
        start = np.concatenate([np.ones(scales), np.zeros(CLASSES)])
        arguments = (logits, labels, weights, scaling)
        found = minimize(
            objective, start, args=arguments, method="BFGS", jac=objective_gradient, options={"gtol": 1e-9}
        )
        scale, bias = found.x[:scales], found.x[scales:]
    np.testing.assert_allclose(fit.loss_after, found.fun - 0.5e-6 * np.sum(bias**2), rtol=0, atol=1e-10)
    np.testing.assert_allclose(1 / fit.temperature, np.squeeze(scale), rtol=0, atol=1e-6)
    np.testing.assert_allclose(fit.bias, bias - np.mean(bias), rtol=0, atol=1e-6)


@by_scaling
def test_gradient_at_the_minimum_vanishes(scaling, x64):
    """In float64 to its rounding, where the fit is not at a bound: the definition of the minimum."""
    logits, labels = sampled(seed=3)
    fit = jsoftmax.fit_temperature(jnp.asarray(logits), labels, scaling=scaling)
    scale, bias = 1 / fit.temperature, fit.bias
    p = softmax(logits * np.asarray(scale) + np.asarray(bias), axis=-1)
    off = p - np.eye(CLASSES)[labels]
    by_class = np.mean(off * logits, axis=0)
    slope = by_class if scaling == "vector" else np.sum(by_class)
    np.testing.assert_allclose(slope, 0, atol=1e-9)
    if scaling != "temperature":
        np.testing.assert_allclose(np.mean(off, axis=0) + 1e-6 * np.asarray(bias), 0, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_recovers_the_temperature_that_labels_were_drawn_at(temperature):
    logits, labels = sampled(rows=40_000)
    fit = jsoftmax.fit_temperature(jnp.asarray(logits * temperature, jnp.float32), labels)
    # The standard error of 1/T is one over the root of the information in all rows.
    p = softmax(logits, axis=-1)
    information = np.sum(p * logits**2) - np.sum(np.sum(p * logits, axis=-1) ** 2)
    assert abs(temperature / fit.temperature - 1) <= 4 / np.sqrt(information)
    assert 4 / np.sqrt(information) <= 0.03


def test_recovers_scales_and_biases():
    logits, labels = sampled(rows=40_000)
    scale, bias = np.array([0.5, 1.0, 1.5, 2.0]), np.array([1.0, -1.0, 0.5, -0.5])
    fit = jsoftmax.fit_temperature(jnp.asarray((logits - bias) / scale, jnp.float32), labels, scaling="vector")
    np.testing.assert_allclose(1 / fit.temperature, scale, rtol=0.06)
    np.testing.assert_allclose(fit.bias, bias, atol=0.06)
    np.testing.assert_allclose(jnp.sum(fit.bias), 0, atol=1e-6)


@by_scaling
def test_loss_never_rises(scaling):
    for seed, factor in enumerate((0.1, 0.5, 1.0, 3.0, 20.0)):
        logits, labels = sampled(seed=seed)
        z = jnp.asarray(factor * logits, jnp.float32)
        fit = jsoftmax.fit_temperature(z, labels, scaling=scaling)
        losses = [
            np.mean(-np.take_along_axis(log_softmax(np.asarray(each, np.float64), axis=-1), labels[:, None], axis=-1))
            for each in (z, fit.apply(z))
        ]
        np.testing.assert_allclose([fit.loss_before, fit.loss_after], losses, rtol=1e-5)
        assert fit.loss_after <= fit.loss_before * (1 + 1e-6)


@by_few_or_many
def test_gradient_by_finite_differences(scaling, x64):
    logits, labels = sampled()
    random = np.random.default_rng(1)
    weights, mix = random.uniform(0.5, 2, size=ROWS), random.normal(size=(2, CLASSES))

    def number(logits, weights, penalty):
        fit = jsoftmax.fit_temperature(logits, labels, scaling=scaling, weights=weights, bias_penalty=penalty)
        return jnp.sum(mix[0] * fit.temperature) + jnp.sum(mix[1] * fit.bias) + fit.loss_after

    # A large penalty, so that no direction is flat; a step far above what the search leaves uncertain, about 1e-11.
    at = (jnp.asarray(2 * logits), jnp.asarray(weights), jnp.asarray(0.1))
    number_and_gradients, step = jax.jit(jax.value_and_grad(number, (0, 1, 2))), 1e-4
    gradients = number_and_gradients(*at)[1]
    for _ in range(4):
        along = [random.normal(size=x.shape) for x in at]
        up, down = (
            number_and_gradients(*(x + sign * step * d for x, d in zip(at, along, strict=True)))[0] for sign in (1, -1)
        )
        slope = sum(np.vdot(g, d) for g, d in zip(gradients, along, strict=True))
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-5, atol=1e-6)
    if scaling == "temperature":  # forward mode says the same
        tangent = jax.jvp(number, at, tuple(map(jnp.asarray, along)))[1]
        np.testing.assert_allclose(tangent, slope, rtol=1e-9, atol=1e-12)


def test_temperature_scales_with_the_logits(x64):
    """T of c·z is c times T of z, so that ⟨dT/dz, z⟩ = T and ⟨z, d²T/dz² z⟩ = 0."""
    logits, labels = sampled()

    def temperature(factor):
        return jsoftmax.fit_temperature(factor * jnp.asarray(logits), labels).temperature

    one = jnp.asarray(1.0)
    np.testing.assert_allclose(jax.grad(temperature)(one), temperature(one), rtol=1e-9)
    np.testing.assert_allclose(jax.grad(jax.grad(temperature))(one), 0, atol=1e-7)


def test_ignored_and_weightless_rows_are_never_looked_at():
    scaling = "vector"
    logits, labels = sampled()
    z, y = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    ones = jnp.ones(60)
    expected = jsoftmax.fit_temperature(z, y, scaling=scaling, weights=ones.at[:10].set(0))
    bad = z.at[:10].set(jnp.nan)
    by_weight = jsoftmax.fit_temperature(bad, y, scaling=scaling, weights=ones.at[:10].set(0))
    by_label = jsoftmax.fit_temperature(bad, y.at[:10].set(-100), scaling=scaling, ignore_index=-100)
    by_where = jsoftmax.fit_temperature(bad, y, scaling=scaling, where=jnp.arange(60) >= 10)
    left_out = jsoftmax.fit_temperature(z[10:], y[10:], scaling=scaling)
    for fit in (by_weight, by_label, by_where):
        jax.tree.map(np.testing.assert_array_equal, fit, expected)
    for one, other in zip(expected, left_out, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(
        lambda z: jnp.sum(
            jsoftmax.fit_temperature(z, y.at[:10].set(-100), scaling=scaling, ignore_index=-100).temperature
        )
    )(bad)
    np.testing.assert_array_equal(gradient[:10], 0)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient[10:] != 0)


@by_few_or_many
def test_masked_classes(scaling):
    """By `where`, holding NaN, or by −∞: the fit is that of the other classes alone."""
    logits, labels = sampled()
    z = jnp.asarray(logits, jnp.float32)
    alone = jsoftmax.fit_temperature(z, labels, scaling=scaling)
    where = jnp.arange(CLASSES + 1) < CLASSES
    wide = jnp.pad(z, ((0, 0), (0, 1)), constant_values=np.nan)
    masked = jsoftmax.fit_temperature(wide, labels, where=where, scaling=scaling)
    infinite = jsoftmax.fit_temperature(jnp.where(where, wide, -jnp.inf), labels, scaling=scaling)
    for fit in (masked, infinite):
        np.testing.assert_allclose(fit.loss_after, alone.loss_after, rtol=1e-6)
        scale, bias = 1 / fit.temperature, fit.bias[:CLASSES] - jnp.mean(fit.bias[:CLASSES])
        np.testing.assert_allclose(scale[:CLASSES] if scaling == "vector" else scale, 1 / alone.temperature, rtol=2e-3)
        np.testing.assert_allclose(bias, alone.bias, atol=5e-3)
    gradient = jax.grad(lambda w: jsoftmax.fit_temperature(w, labels, where=where).temperature)(wide)
    np.testing.assert_array_equal(gradient[:, CLASSES], 0)
    assert np.all(np.isfinite(gradient))


def test_separable_rows_go_to_the_least_temperature():
    logits, _ = sampled()
    z = jnp.asarray(logits, jnp.float32)
    for scaling in ("temperature", "bias_corrected"):
        fit = jsoftmax.fit_temperature(z, jnp.argmax(z, axis=-1), scaling=scaling, bounds=(0.05, 10.0))
        np.testing.assert_allclose(fit.temperature, 0.05, rtol=1e-6)
        assert np.all(np.isfinite(fit.bias))
        assert fit.loss_after < fit.loss_before
    # Beyond what the usual formulas can tell: losses of 1e-26 still lead to the bound.
    confident = jnp.array([[60.0, 0.0], [0.0, 60.0]])
    fit = jsoftmax.fit_temperature(confident, jnp.array([0, 1]), bounds=(0.8, 10.0))
    np.testing.assert_allclose(fit.temperature, 0.8, rtol=1e-6)
    np.testing.assert_allclose(fit.loss_after, np.exp(-75.0), rtol=1e-5)
    np.testing.assert_array_equal(
        jax.grad(lambda z: jsoftmax.fit_temperature(z, jnp.argmax(z, axis=-1)).temperature)(z), 0
    )


def test_logits_that_mislead_go_to_the_greatest_temperature():
    logits, _ = sampled()
    z = jnp.asarray(logits, jnp.float32)
    fit = jsoftmax.fit_temperature(z, jnp.argmin(z, axis=-1))
    np.testing.assert_allclose(fit.temperature, 100.0, rtol=1e-6)


@by_scaling
def test_classes_without_rows_have_finite_biases(scaling):
    logits, labels = sampled()
    fit = jsoftmax.fit_temperature(jnp.asarray(logits, jnp.float32), np.minimum(labels, 1), scaling=scaling)
    assert all(np.all(np.isfinite(number)) for number in fit)
    assert fit.loss_after <= fit.loss_before


@by_scaling
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_fit(scaling, rows):
    fit = jsoftmax.fit_temperature(jnp.full((rows, 3), NAN), jnp.full(rows, -1), scaling=scaling, ignore_index=-1)
    np.testing.assert_array_equal(fit.temperature, 1)
    np.testing.assert_array_equal([*fit.bias, fit.loss_before, fit.loss_after], 0)
    one_class = jsoftmax.fit_temperature(jnp.ones((rows, 1)), jnp.zeros(rows, jnp.int32), scaling=scaling)
    np.testing.assert_array_equal(one_class.temperature, 1)


@pytest.mark.parametrize(
    ("row", "label"), [([NAN, 0, 0], 0), ([INF, 0, 0], 0), ([0, 0, 0], 3), ([0, 0, 0], -1), ([0, 0, -INF], 2)]
)
def test_a_row_without_a_loss_makes_the_fit_nan(row, label):
    for scaling in SCALINGS:
        fit = jsoftmax.fit_temperature(jnp.array([row, [1.0, 2.0, 0.0]]), jnp.array([label, 1]), scaling=scaling)
        assert np.all(np.isnan(fit.temperature))
        assert not np.isfinite(fit.loss_before)


@by_few_or_many
def test_many_sets_at_once(scaling):
    sets = [sampled(seed=seed) for seed in range(3)]
    z, y = jnp.asarray([2 * z for z, _ in sets], jnp.float32), jnp.asarray([y for _, y in sets])
    fit = functools.partial(jsoftmax.fit_temperature, scaling=scaling)
    together = jax.jit(jax.vmap(fit))(z, y)
    for number in range(3):
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4),
            jax.tree.map(lambda x, number=number: x[number], together),
            fit(z[number], y[number]),
        )


@pytest.mark.parametrize(("dtype", "scaling"), [(jnp.bfloat16, "temperature"), (jnp.float16, "vector")])
def test_narrow_logits(dtype, scaling):
    """The same fit as of the rounded logits in float32, and a gradient in their dtype."""
    logits, labels = sampled()
    narrow = jnp.asarray(logits, dtype)
    fit = jsoftmax.fit_temperature(narrow, labels, scaling=scaling)
    wide = jsoftmax.fit_temperature(narrow.astype(jnp.float32), labels, scaling=scaling)
    for one, other in zip(fit, wide, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)
    assert fit.apply(narrow).dtype == jnp.float32
    if scaling == "temperature":
        gradient = jax.grad(lambda z: jsoftmax.fit_temperature(z, labels).temperature)(narrow)
        assert gradient.dtype == dtype
        assert np.any(gradient != 0)


def test_any_axis_and_batch():
    logits, labels = sampled()
    z = jnp.asarray(logits, jnp.float32)
    flat = jsoftmax.fit_temperature(z, labels, scaling="vector")
    boxed, box_labels = jnp.moveaxis(z.reshape(4, 15, CLASSES), -1, 1), labels.reshape(4, 15)
    fit = jsoftmax.fit_temperature(boxed, box_labels, axis=1, scaling="vector")
    for one, other in zip(fit, flat, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        fit.apply(boxed, axis=1), jnp.moveaxis(fit.apply(z).reshape(4, 15, CLASSES), -1, 1), rtol=1e-6
    )
    assert fit.apply(jnp.array([0.0, 1.0, 2.0, -INF]))[3] == -INF


def test_float32_fit_in_double_precision(x64):
    logits, labels = sampled()
    fit = jsoftmax.fit_temperature(jnp.asarray(logits, jnp.float32), labels, scaling="vector")
    assert {number.dtype for number in fit} == {jnp.dtype(jnp.float32)}


# Errors


def known_set(confidences, right, rows=1):
    """Two-class logits of the given confidences (above 1/2), and labels right for the given numbers of 10 rows each."""
    p = np.repeat(confidences, 10)
    labels = np.concatenate([np.arange(10) >= number for number in right]).astype(np.int32)
    return jnp.log(jnp.asarray(np.stack([p, 1 - p], axis=-1), jnp.float32)), labels


def test_calibrated_by_construction():
    logits, labels = known_set([0.9, 0.7, 0.6], [9, 7, 6])
    for name, error in ERRORS.items():
        np.testing.assert_allclose(error(logits, labels, bins=3 if "mass" in name else 15), 0, atol=1e-6)
        for order in (2, INF):
            np.testing.assert_allclose(error(logits, labels, bins=15, order=order), 0, atol=1e-6)


def test_known_errors():
    """Three bins of 10 rows, off by 0.1, −0.2 and 0.3."""
    logits, labels = known_set([0.9, 0.7, 0.6], [8, 9, 3])
    gaps = np.array([0.1, 0.2, 0.3])
    for bins, error in ((11, jsoftmax.expected_calibration_error), (3, jsoftmax.adaptive_calibration_error)):
        for order, expected in ((1, gaps.mean()), (2, np.sqrt(np.mean(gaps**2))), (INF, 0.3)):
            np.testing.assert_allclose(error(logits, labels, bins=bins, order=order), expected, rtol=1e-6)
    # Of two classes, the second has the same gaps at 1 − p.
    np.testing.assert_allclose(jsoftmax.classwise_calibration_error(logits, labels, bins=11), gaps.mean(), rtol=1e-5)
    found = jsoftmax.reliability_bins(logits, labels, bins=11)
    np.testing.assert_allclose(found.share, [0, 0, 0, 0, 0, 0, 1 / 3, 1 / 3, 0, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(found.confidence[np.array([6, 7, 9])], [0.6, 0.7, 0.9], rtol=1e-6)
    np.testing.assert_allclose(found.accuracy[np.array([6, 7, 9])], [0.3, 0.9, 0.8], rtol=1e-6)
    np.testing.assert_allclose(found.difference[np.array([6, 7, 9])], [0.3, -0.2, 0.1], rtol=1e-5)


def test_constant_confidence():
    """All rows in one bin, whatever their order: |confidence − accuracy|, 0.8 and 6 of 10."""
    p = jnp.log(jnp.broadcast_to(jnp.array([0.8, 0.2]), (10, 2)))
    for labels in (np.arange(10) >= 6, np.arange(10) < 4):
        for name in ("expected", "adaptive"):
            np.testing.assert_allclose(ERRORS[name](p, labels.astype(np.int32)), 0.2, rtol=1e-6)


def test_upper_edges_belong_to_their_bin():
    """0.5 is the end of the first of two bins, and exactly 1 is in the last."""
    logits = jnp.array([[0.0, 0.0], [200.0, 0.0], [1.0, 0.0]])
    found = jsoftmax.reliability_bins(logits, jnp.array([0, 0, 0]), bins=2)
    np.testing.assert_allclose(found.share, [1 / 3, 2 / 3], rtol=1e-6)
    assert found.confidence[0] == 0.5
    all_sure = jsoftmax.reliability_bins(logits[1:2], jnp.array([1]))
    np.testing.assert_array_equal([all_sure.share[-1], all_sure.confidence[-1], all_sure.difference[-1]], 1)
    np.testing.assert_array_equal(all_sure.share[:-1], 0)
    np.testing.assert_array_equal(all_sure.difference[:-1], 0)


def test_confident_and_right_rows_keep_their_digits():
    """A difference of −(1 − p), where p rounds to 1."""
    logits = jnp.array([[30.0, 0.0, 0.0], [40.0, 0.0, 0.0]])
    exact = oracle.exact(np.asarray(logits)).not_p[:, 0].astype(np.float64)
    labels = jnp.zeros(2, jnp.int32)
    np.testing.assert_allclose(jsoftmax.expected_calibration_error(logits, labels), exact.mean(), rtol=1e-6)
    # Bins of equal mass tell the two apart, though both confidences are 1.
    found = jsoftmax.reliability_bins(logits, labels, bins=2, equal_mass=True)
    np.testing.assert_allclose(found.difference, -exact, rtol=1e-6)
    np.testing.assert_allclose(jsoftmax.brier_score(logits, labels), exact**2 + 2 * (exact / 2) ** 2, rtol=1e-5)


def plain_bins(values, bins, equal_mass):
    if not equal_mass:
        return np.maximum(np.ceil(values * bins).astype(int) - 1, 0)
    return np.argsort(np.argsort(values)) * bins // len(values)


def plain_error(values, happened, bins, order, equal_mass, weights):
    """With loops."""
    places = plain_bins(values, bins, equal_mass)
    sizes, shares = [], []
    for number in range(bins):
        inside = places == number
        mass = weights[inside].sum()
        shares.append(mass / weights.sum())
        gap = np.sum(weights[inside] * (values[inside] - happened[inside]))
        sizes.append(abs(gap) / mass if mass else 0)
    if order == INF:
        return max(sizes)
    return np.sum(np.array(shares) * np.array(sizes) ** order) ** (1 / order)


@pytest.mark.parametrize("order", [1, INF])
def test_errors_against_plain_numpy(order, x64):
    """Rows a multiple of the bins, none equal, so that there is one way to fill bins equally."""
    logits, labels = sampled(rows=300, seed=5)
    logits = 2 * logits
    weights = np.random.default_rng(0).uniform(0.5, 2, size=300)
    p = softmax(logits, axis=-1)
    z, ones = jnp.asarray(logits), np.ones(300)
    top, right = p.max(axis=-1), p.argmax(axis=-1) == labels
    for bins in (15,):
        for equal_mass, error in ((False, ERRORS["expected"]), (True, ERRORS["adaptive"])):
            expected = plain_error(top, right, bins, order, equal_mass, ones)
            np.testing.assert_allclose(error(z, labels, bins=bins, order=order), expected, rtol=1e-9)
        expected = plain_error(top, right, bins, order, False, weights)
        actual = ERRORS["expected"](z, labels, bins=bins, order=order, weights=jnp.asarray(weights))
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
        for equal_mass in (False, True):
            each = [plain_error(p[:, k], labels == k, bins, order, equal_mass, ones) for k in range(CLASSES)]
            actual = jsoftmax.classwise_calibration_error(z, labels, bins=bins, order=order, equal_mass=equal_mass)
            np.testing.assert_allclose(actual, np.mean(each), rtol=1e-9)


@pytest.mark.parametrize("rows", [7, 15, 100])
def test_equal_mass_bins_are_even(rows):
    logits, labels = sampled(rows=rows)
    found = jsoftmax.reliability_bins(jnp.asarray(logits, jnp.float32), labels, bins=15, equal_mass=True)
    assert np.max(np.abs(np.asarray(found.share) * rows - rows / 15)) < 1 + 1e-5
    np.testing.assert_allclose(np.sum(found.share), 1, rtol=1e-6)


@by_error
def test_errors_leave_out_what_does_not_count(error):
    logits, labels = sampled()
    z, y = jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    expected = error(z[10:], y[10:])
    bad, marked = z.at[:10].set(jnp.nan), y.at[:10].set(-100)
    ignored = functools.partial(error, labels=marked, ignore_index=-100)
    np.testing.assert_allclose(ignored(bad), expected, rtol=1e-5)
    np.testing.assert_allclose(error(bad, y, weights=jnp.ones(60).at[:10].set(0)), expected, rtol=1e-5)
    np.testing.assert_allclose(error(bad, y, where=jnp.arange(60) >= 10), expected, rtol=1e-5)
    gradient = jax.jit(jax.grad(ignored))(bad)
    np.testing.assert_array_equal(gradient[:10], 0)
    assert np.all(np.isfinite(gradient))
    assert error(bad[:10], marked[:10], ignore_index=-100) == 0
    assert error(z[:0], y[:0]) == 0


@by_error
@pytest.mark.parametrize(("row", "label"), [([NAN, 0, 0], 0), ([INF, 0, 0], 0), ([0, 0, 0], 3), ([0, 0, 0], -1)])
def test_errors_of_bad_rows_are_nan(error, row, label):
    logits, labels = jnp.array([row, [1.0, 2.0, 0.0]]), jnp.array([label, 1])
    assert np.isnan(error(logits, labels))
    score = jsoftmax.brier_score(logits, labels)
    assert np.isnan(score[0])
    assert np.isfinite(score[1])


@by_error
def test_errors_under_jit_and_vmap(error):
    sets = [sampled(rows=40, seed=seed) for seed in range(3)]
    z, y = jnp.asarray([z for z, _ in sets], jnp.float32), jnp.asarray([y for _, y in sets])
    together = jax.jit(jax.vmap(error))(z, y)
    np.testing.assert_allclose(together, [error(*each) for each in zip(z, y, strict=True)], rtol=1e-6)
    # bfloat16 logits are taken as they are, in float32.
    narrow = z[0].astype(jnp.bfloat16)
    np.testing.assert_array_equal(error(narrow, y[0]), error(narrow.astype(jnp.float32), y[0]))


def test_expected_error_by_finite_differences(x64):
    logits, labels = sampled(rows=40)
    error, z = functools.partial(jsoftmax.expected_calibration_error, order=2), jnp.asarray(logits)
    along = jnp.asarray(np.random.default_rng(0).normal(size=logits.shape))
    up, down = (error(z + sign * 1e-6 * along, labels) for sign in (1, -1))
    slope = jnp.vdot(jax.grad(error)(z, labels), along)
    np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-6)


# Brier's score


@pytest.mark.parametrize("classes", [2, 5])
def test_brier_score_is_scikit_learns(classes, x64):
    logits, labels = sampled(classes=classes)
    p = softmax(logits, axis=-1)
    actual = np.mean(jsoftmax.brier_score(jnp.asarray(logits), labels))
    np.testing.assert_allclose(actual, brier_score_loss(labels, p, scale_by_half=False), rtol=1e-12)
    if classes == 2:
        np.testing.assert_allclose(actual / 2, brier_score_loss(labels, p[:, 1]), rtol=1e-12)


def test_brier_score_accuracy_and_derivatives(x64):
    """At gaps to 40 in float32 against the oracle; derivatives of every mode in float64."""
    logits = np.array([[gap, 0.0, -1.0] for gap in range(-40, 41, 5)], np.float32)
    row, zeros = oracle.exact(logits), np.zeros(len(logits), np.int32)
    expected = row.not_p[:, 0] ** 2 + np.sum(row.p[:, 1:] ** 2, axis=-1)
    actual = jsoftmax.brier_score(jnp.asarray(logits), zeros)
    assert np.max(oracle.ulps(actual, expected, np.float32)) <= 16
    few = jnp.asarray(sampled(rows=3)[0])
    score = functools.partial(jsoftmax.brier_score, labels=jnp.array([0, 1, 2]))
    check_grads(score, (few,), order=1, modes=("fwd", "rev"), eps=1e-5, atol=1e-6, rtol=1e-6)


def test_brier_score_edges():
    logits = jnp.array([[NAN, 0.0], [0.0, 0.0], [0.0, 0.0]])
    labels, where = jnp.array([-1, 0, 1]), jnp.array([[True, True], [False, False], [True, False]])
    score = functools.partial(jsoftmax.brier_score, labels=labels, where=where, ignore_index=-1)
    # Ignored; without any class; the label masked, all probability on the other.
    np.testing.assert_array_equal(score(logits), [0, 0, 2])
    np.testing.assert_array_equal(jax.grad(lambda z: score(z).sum())(logits), 0)


# What is refused

Z, Y = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
fit, tiny, huge = jsoftmax.fit_temperature, "1.17549e-38", "3.40282e+38"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit(Z, Y, scaling="matrix"), ValueError, "scaling must be one of 'temperature', 'bias_corrected'"),
        (lambda: fit(Z, Y, bounds=(2.0, 5.0)), ValueError, f"bounds[0] must be between {tiny} and 1, got 2.0"),
        (lambda: fit(Z, Y, bounds=(0.1, 0.5)), ValueError, f"bounds[1] must be between 1 and {huge}, got 0.5"),
        (lambda: fit(Z, Y, bias_penalty=0.0), ValueError, f"bias_penalty must be between {tiny} and {huge}, got 0.0"),
        (lambda: fit(Z, Y, bias_penalty=jnp.ones(3)), ValueError, "bias_penalty has shape (3,), but needs (): one"),
        (lambda: fit(Z, Y, most_steps=0), ValueError, "most_steps must be at least 1, got 0"),
        (lambda: fit(Z, Y[:1]), ValueError, "labels has shape (1,), but needs (2,)"),
        (lambda: fit(Z, Z), TypeError, "labels must hold integer class numbers, got dtype float32"),
        (lambda: fit(Y, Y), TypeError, "logits must hold floating-point numbers, got dtype int32"),
        (lambda: fit(Z, Y, weights=jnp.ones(3)), ValueError, "weights has shape (3,), but needs (2,): one factor for"),
        (lambda: fit(Z, Y, weights=jnp.array([1.0, -1.0])), ValueError, "weights must be at least 0, got"),
        (lambda: fit(Z[:, :0], Y), ValueError, "logits has shape (2, 0) and so no class along axis -1"),
        (lambda: fit(Z, Y).apply(jnp.zeros((2, 4))), ValueError, "logits has shape (2, 4), but needs (2, 3)"),
        (lambda: ERRORS["expected"](Z, Y, bins=0), ValueError, "bins must be at least 1, got 0"),
        (lambda: ERRORS["adaptive"](Z, Y, order=0.5), ValueError, "order must be at least 1, got 0.5"),
        (lambda: ERRORS["classwise"](Z, Y, bins=-2), ValueError, "bins must be at least 1, got -2"),
        (lambda: jsoftmax.brier_score(Z, Y[:1]), ValueError, "labels has shape (1,), but needs (2,)"),
    ],
)
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
