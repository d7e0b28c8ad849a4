"""Sampled softmax and in-batch negatives: against TensorFlow's formula, the full loss, and the contract."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jsoftmax

in_batch_loss = jax.jit(jsoftmax.in_batch_softmax_cross_entropy)
sampled_loss = jax.jit(
    jsoftmax.sampled_softmax_cross_entropy,
    static_argnames=(
        *("num_sampled", "num_true", "remove_accidental_hits", "subtract_log_q", "correct_label"),
        *("kernel_transposed", "gathered", "ignore_index", "derivative"),
    ),
)
ROWS, WIDTH, CLASSES = 6, 5, 40
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(ROWS, WIDTH)).astype(np.float32)
KERNEL = RANDOM.normal(size=(WIDTH, CLASSES)).astype(np.float32)
BIAS = RANDOM.normal(size=CLASSES).astype(np.float32)
LABELS = np.array([0, 3, 3, 17, 39, 5], np.int32)
KEY = jax.random.key(0)


def full_loss(features, kernel, labels=LABELS, **options):
    return jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, bias=BIAS, reduction="none", **options)


# tf.nn.sampled_softmax_loss of TensorFlow 2.21.0 in float64, with these inputs and
#     sampled_values = (SAMPLED, 5 * p[labels], 5 * p[SAMPLED]), p = (1, 2, …, 12) / 78
# No label is sampled twice: TensorFlow would remove one of the hits only.
# Each case: the loss, the features' gradient in row 0 and the bias's gradient of its sum.
SAMPLED = [0, 8, 7, 8, 11]
TENSORFLOW = {
    (1, True): (
        [0.05267697530686915, 1.2920950985067592, 4.387515541227656, 2.90991576700101],
        [0.019224398718933434, -0.037146115600346585, -0.05936466254475692],
        [
            *(1.731724604711, 0, 0, 0, 0, -0.725305332597),
            *(0, -0.344928190567, 0.230746338392, 0, 0, -0.892237419939),
        ],
    ),
    (1, False): (
        [0.7198324860832493, 1.2920950985067592, 4.399870480300327, 2.9629638236730114],
        [0.009865311626987543, -0.019062130966344015, -0.030463938258739776],
        [
            *(1.721724017944, 0, 0, 0, 0, -0.725305332597),
            *(0, -0.363828445811, 0.218465731223, 0, 0, -0.851055970759),
        ],
    ),
    (2, True): (
        [1.9724973914662889, 1.6987198045062044, 3.6204393902483565, 3.34048347706183],
        [-0.048796277915770944, 0.7294692440272952, 0.8370641071314436],
        [
            *(2.089211840967, -0.479168015903, -0.438577127349, -0.358045102768, -0.476415948529, -0.264299585878),
            *(0, 0.113550937544, 0.21219395835, 0, 0, -0.398450956433),
        ],
    ),
    (2, False): (
        [2.629459410697361, 1.6987198045062044, 3.632039837599997, 3.392312307496363],
        [-0.059277168119608516, 0.7630194446153291, 0.8837994988153877],
        [
            *(2.090907242187, -0.489200201426, -0.439285543234, -0.358045102768, -0.477607146495, -0.264299585878),
            *(0, 0.095191618818, 0.200386345506, 0, 0, -0.35804762671),
        ],
    ),
}


@pytest.mark.parametrize(("num_true", "remove"), TENSORFLOW)
@pytest.mark.parametrize("transposed", [True, False])
def test_tensorflow(num_true, remove, transposed, x64):
    kernel = np.sin(np.arange(36.0)).reshape(12, 3)
    bias, features = np.cos(np.arange(12.0)), np.sin(0.5 + np.arange(12.0)).reshape(4, 3)
    labels = np.array([[0, 1], [5, 3], [7, 2], [11, 4]])
    labels = labels if num_true == 2 else labels[:, 0]
    sampler = jsoftmax.unigram_sampler(np.arange(1, 13), unique=False)
    sample = jsoftmax.Sample(jnp.array(SAMPLED, jnp.int32), jnp.int32(5), jnp.full(5, 5, jnp.int32))

    def loss(features, bias):
        return sampled_loss(
            features,
            kernel if transposed else kernel.T,
            labels,
            sample,
            bias=bias,
            sampler=sampler,
            num_true=num_true,
            remove_accidental_hits=remove,
            kernel_transposed=transposed,
        )

    losses, d_features, d_bias = TENSORFLOW[num_true, remove]
    np.testing.assert_allclose(loss(features, bias), losses, rtol=1e-12)
    gradients = jax.grad(lambda *of: loss(*of).sum(), (0, 1))(features, bias)
    np.testing.assert_allclose(gradients[0][0], d_features, rtol=1e-11)
    np.testing.assert_allclose(gradients[1], d_bias, atol=2e-12)


@pytest.mark.parametrize("correct_label", [True, False])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 3.0, "z_loss": 0.1}])
def test_all_classes_sampled_is_the_full_loss(correct_label, options):
    def ours(features, kernel):
        return sampled_loss(
            features, kernel, LABELS, KEY, num_sampled=CLASSES, bias=BIAS, correct_label=correct_label, **options
        )

    np.testing.assert_allclose(ours(FEATURES, KERNEL), full_loss(FEATURES, KERNEL, **options), rtol=2e-6)
    for one, other in zip(
        jax.grad(lambda *of: ours(*of).sum(), (0, 1))(FEATURES, KERNEL),
        jax.grad(lambda *of: full_loss(*of, **options).sum(), (0, 1))(FEATURES, KERNEL),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def mean_over_keys(sampler, num_sampled, keys, **options):
    """The mean of the loss and of the kernel's gradient, and the gradient's standard error, as a norm."""

    def one(key):
        def loss(kernel):
            sample = sampler.sample(key, num_sampled)
            return sampled_loss(FEATURES, kernel, LABELS, sample, bias=BIAS, sampler=sampler, **options).mean()

        return jax.value_and_grad(loss)(KERNEL)

    values, gradients = jax.jit(jax.vmap(one))(jax.random.split(KEY, keys))
    error = jnp.linalg.norm(gradients.std(axis=0)) / math.sqrt(keys)
    return values.mean(), gradients.mean(axis=0), error


BIASED = [("unique", True, True), ("unique", True, False), ("replaced", False, False)]


@pytest.mark.slow
@pytest.mark.optimized  # it draws for longer than it compiles
@pytest.mark.parametrize(("name", "unique", "correct_label"), BIASED)
def test_bias_of_the_gradient_falls_with_the_samples(name, unique, correct_label):
    """Measured over 1,500 keys: 0.6 to 0.7 of the full gradient with 2 samples, 0.14 with 32 of the 40 classes."""
    exact = jax.grad(lambda kernel: full_loss(FEATURES, kernel).mean())(KERNEL)
    sampler, curve = jsoftmax.log_uniform_sampler(CLASSES, unique=unique), {}
    for count in (2, 8, 32, 256) if not unique else (2, 8, 32):
        _, mean, error = mean_over_keys(sampler, count, 1500, correct_label=correct_label)
        curve[count] = float(jnp.linalg.norm(mean - exact) / jnp.linalg.norm(exact))
        assert error < 0.02 * jnp.linalg.norm(exact)
    biases = list(curve.values())
    assert all(later < 0.95 * earlier for earlier, later in itertools.pairwise(biases)), curve
    assert biases[-1] < 0.15, curve


@pytest.mark.parametrize("unique", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sum_of_the_corrected_exponentials_estimates_the_denominator_without_bias(unique):
    """The logit of the label is the same number added, so that loss and label give back the estimated sum."""
    sampler = jsoftmax.log_uniform_sampler(CLASSES, unique=unique)
    z = FEATURES @ KERNEL + BIAS

    def one(key):
        sample = sampler.sample(key, 10)
        losses = sampled_loss(FEATURES, KERNEL, LABELS, sample, bias=BIAS, sampler=sampler, correct_label=False)
        return jnp.exp(losses + z[np.arange(ROWS), LABELS])

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 10_000)), np.float64)
    error = found.std(axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - np.exp(z.astype(np.float64)).sum(axis=1)) < 4 * error)
    assert np.all(error < 0.03 * found.mean(axis=0))


def test_accidental_hits_are_removed():
    """A sample of nothing but the label leaves the label alone."""
    sample = jsoftmax.Sample(jnp.array([3, 3], jnp.int32), jnp.int32(2), jnp.full(2, 2, jnp.int32))
    options = {"sampler": jsoftmax.uniform_sampler(CLASSES, unique=False), "subtract_log_q": False}
    labels = np.full(ROWS, 3, np.int32)
    np.testing.assert_array_equal(sampled_loss(FEATURES, KERNEL, labels, sample, **options), 0)
    kept = sampled_loss(FEATURES, KERNEL, labels, sample, remove_accidental_hits=False, **options)
    np.testing.assert_allclose(kept, math.log(3), rtol=1e-6)
    gradient = jax.grad(lambda kernel: sampled_loss(FEATURES, kernel, labels, sample, **options).sum())(KERNEL)
    np.testing.assert_array_equal(gradient, 0)


def compiled_step(classes):
    """One step of SGD on the rows that it touches."""
    sampler = jsoftmax.log_uniform_sampler(classes)

    def step(kernel, features, labels, key):
        sample = sampler.sample(key, 64)
        at = jsoftmax.touched_classes(labels, sample)

        def loss(rows):
            losses = sampled_loss(
                features, rows, labels, sample, sampler=sampler, kernel_transposed=True, gathered=True
            )
            return losses.mean()

        value, gradient = jax.value_and_grad(loss)(kernel[at])
        return kernel.at[at].add(-0.1 * gradient), value

    shapes = [((classes, 16), jnp.float32), ((32, 16), jnp.float32), ((32,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(step, donate_argnums=0).lower(*arguments, jax.random.key(0)).compile()


@pytest.mark.exact
def test_memory_does_not_grow_with_the_classes():
    small, large = (compiled_step(classes).memory_analysis() for classes in (10_000, 10_000_000))
    assert large.alias_size_in_bytes == 10_000_000 * 16 * 4  # the kernel is changed where it is
    assert large.temp_size_in_bytes <= small.temp_size_in_bytes + 1024
    assert large.temp_size_in_bytes < 2**20


def test_gathered_rows_have_the_kernel_s_loss_and_gradient():
    sampler, options = jsoftmax.log_uniform_sampler(CLASSES), {"z_loss": 0.01, "temperature": 2.0}
    sample = sampler.sample(KEY, 12)
    at = jsoftmax.touched_classes(LABELS, sample)

    def loss(kernel, bias, gathered):
        losses = sampled_loss(
            FEATURES, kernel, LABELS, sample, bias=bias, sampler=sampler, gathered=gathered, **options
        )
        return losses.mean()

    value, whole = jax.value_and_grad(loss, (0, 1))(KERNEL, BIAS, False)
    same, rows = jax.value_and_grad(loss, (0, 1))(KERNEL[:, at], BIAS[at], True)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    np.testing.assert_allclose(jnp.zeros_like(KERNEL).at[:, at].add(rows[0]), whole[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jnp.zeros_like(BIAS).at[at].add(rows[1]), whole[1], rtol=1e-5, atol=1e-7)


def test_transformations():
    def loss(features, kernel, key):
        return sampled_loss(features, kernel, LABELS, key, num_sampled=8)

    expected = loss(FEATURES, KERNEL, KEY)
    eager = jsoftmax.sampled_softmax_cross_entropy(FEATURES, KERNEL, LABELS, KEY, num_sampled=8)
    np.testing.assert_allclose(eager, expected, rtol=1e-5)
    keys = jax.random.split(KEY, 3)
    several = jax.vmap(loss, in_axes=(None, None, 0))(FEATURES, KERNEL, keys)
    np.testing.assert_allclose(several[1], loss(FEATURES, KERNEL, keys[1]), rtol=1e-5)
    shaped = sampled_loss(FEATURES.reshape(2, 3, WIDTH), KERNEL, LABELS.reshape(2, 3), KEY, num_sampled=8)
    np.testing.assert_array_equal(shaped, expected.reshape(2, 3))


def test_derivatives(x64):
    features, kernel = FEATURES.astype(np.float64), KERNEL.astype(np.float64)
    for derivative, modes in (("vjp", ["rev"]), ("jvp", ["fwd", "rev"])):

        def loss(features, kernel, bias, temperature, derivative=derivative):
            options = {"bias": bias, "temperature": temperature, "z_loss": 0.1, "derivative": derivative}
            return sampled_loss(features, kernel, LABELS, KEY, num_sampled=8, **options)

        point = (features, kernel, BIAS.astype(np.float64), np.float64(1.5))
        check_grads(loss, point, order=1, modes=modes, eps=1e-5, atol=1e-6, rtol=1e-6)


def test_labels_that_are_no_class_or_ignored():
    labels = np.array([0, CLASSES, -1, -100, 4, 5], np.int32)
    features = FEATURES.copy()
    features[3] = np.nan

    def loss(features, kernel):
        return sampled_loss(features, kernel, labels, KEY, num_sampled=8, ignore_index=-100)

    losses = loss(features, KERNEL)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, False, False, False])
    assert losses[3] == 0
    gradient = jax.grad(lambda features: loss(features, KERNEL).sum())(features)
    np.testing.assert_array_equal(np.isnan(gradient).all(axis=1), np.isnan(losses))
    np.testing.assert_array_equal(gradient[3], 0)
    kernel_gradient = jax.grad(lambda kernel: loss(features, kernel)[jnp.array([0, 3, 4, 5])].sum())(KERNEL)
    assert np.all(np.isfinite(kernel_gradient))
    several = sampled_loss(
        FEATURES[:1], KERNEL, np.array([[3, -100]]), KEY, num_sampled=8, num_true=2, ignore_index=-100
    )
    one = sampled_loss(FEATURES[:1], KERNEL, np.array([3]), KEY, num_sampled=8)
    np.testing.assert_allclose(several, one, rtol=1e-6)


def test_no_rows_and_one_class():
    empty = np.zeros(0, np.int32)
    assert sampled_loss(FEATURES[:0], KERNEL, empty, KEY, num_sampled=4).shape == (0,)
    np.testing.assert_array_equal(
        jax.grad(lambda k: sampled_loss(FEATURES[:0], k, empty, KEY, num_sampled=4).sum())(KERNEL), 0
    )
    single = sampled_loss(FEATURES, KERNEL[:, :1], np.zeros(ROWS, np.int32), KEY, num_sampled=1)
    np.testing.assert_array_equal(single, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_features_have_a_float32_loss(dtype):
    features, kernel = FEATURES.astype(dtype), KERNEL.astype(dtype)
    wide = sampled_loss(features.astype(np.float32), kernel.astype(np.float32), LABELS, KEY, num_sampled=8)
    losses, gradient = jax.value_and_grad(
        lambda kernel: sampled_loss(features, kernel, LABELS, KEY, num_sampled=8).sum()
    )(jnp.asarray(kernel))
    assert (losses.dtype, gradient.dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(losses, wide.sum(), rtol=1e-5)


def test_in_batch_negatives():
    """Against the formula in float64, with a duplicate of a positive and two further negatives."""
    items, log_q = RANDOM.normal(size=(ROWS + 2, WIDTH)).astype(np.float32), np.log(np.linspace(0.1, 2, ROWS + 2))
    ids = np.array([7, 1, 2, 7, 4, 5, 6, 1])
    z = FEATURES.astype(np.float64) @ items.T.astype(np.float64) / 0.5 - log_q
    for i in range(ROWS):
        z[i, (ids == ids[i]) & (np.arange(ROWS + 2) != i)] = -np.inf
    expected = np.log(np.exp(z).sum(axis=1)) - np.diagonal(z)
    options = {"log_q": log_q.astype(np.float32), "item_ids": ids, "temperature": 0.5}
    np.testing.assert_allclose(in_batch_loss(FEATURES, items, **options), expected, rtol=1e-5)
    stacked = jax.vmap(lambda queries: in_batch_loss(queries, items, **options))(np.stack([FEATURES, -FEATURES]))
    np.testing.assert_allclose(stacked[0], expected, rtol=1e-5)
    assert in_batch_loss(FEATURES[:0], items).shape == (0,)


def test_in_batch_derivatives(x64):
    items = RANDOM.normal(size=(ROWS, WIDTH))

    def loss(queries, items, temperature):
        return in_batch_loss(queries, items, item_ids=np.array([0, 1, 0, 2, 3, 4]), temperature=temperature)

    point = (FEATURES.astype(np.float64), items, np.float64(0.7))
    check_grads(loss, point, order=1, modes=["rev"], eps=1e-5, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_sampled": None}, ValueError, "num_sampled must be given with a key, got None"),
        ({"num_sampled": 0}, ValueError, "count must be at least 1, got 0"),
        ({"num_sampled": CLASSES + 1}, ValueError, "count must be at most 40"),
        ({"num_true": 0}, ValueError, "num_true must be at least 1, got 0"),
        ({"num_true": 2}, ValueError, r"labels has shape \(6,\), but needs \(6, 2\)"),
        ({"labels": LABELS[:1]}, ValueError, r"labels has shape \(1,\), but needs \(6,\)"),
        ({"labels": LABELS * 1.0}, TypeError, "labels must hold integer class numbers"),
        (
            {"kernel": KERNEL[:4]},
            ValueError,
            r"kernel has shape \(4, 40\), but needs \(5, 40\).*kernel_transposed=True",
        ),
        ({"kernel": KERNEL[:, :0]}, ValueError, "kernel has no class"),
        ({"bias": BIAS[:3]}, ValueError, r"bias has shape \(3,\), but needs \(40,\)"),
        ({"sampler": jsoftmax.uniform_sampler(9)}, ValueError, "sampler has 9 classes, but needs 40"),
        ({"gathered": True}, ValueError, "gathered=True needs the sampler"),
        ({"label_smoothing": 0.1}, TypeError, "unknown option 'label_smoothing'"),
        ({"temperature": np.ones(2)}, ValueError, r"temperature has shape \(2,\)"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"features": FEATURES, "kernel": KERNEL, "labels": LABELS, "key": KEY, "num_sampled": 8} | change
    with pytest.raises(error, match=message):
        sampled_loss(**arguments)


def test_bad_arguments_in_batch():
    with pytest.raises(ValueError, match=r"queries has shape \(6, 5\) and items \(2, 5\), but need"):
        in_batch_loss(FEATURES, FEATURES[:2])
    with pytest.raises(ValueError, match=r"log_q has shape \(2,\), but needs \(6,\)"):
        in_batch_loss(FEATURES, FEATURES, log_q=np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="item_ids must hold integer"):
        in_batch_loss(FEATURES, FEATURES, item_ids=np.zeros(6))
