"""The linear engine: values and every gradient against the unfused computation in float64, and what is compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from jsoftmax import reference
from jsoftmax.testing import float64

BLOCK = 8


def inputs(rows, classes, features=5, dtype=jnp.float32):
    random = np.random.default_rng(rows * 1000 + classes)
    return {
        "features": jnp.asarray(random.normal(size=(rows, features)), dtype),
        "kernel": jnp.asarray(random.normal(size=(features, classes)), dtype),
        "bias": jnp.asarray(random.normal(size=classes), dtype),
        "weights": jnp.asarray(random.uniform(0.5, 2, size=rows), dtype),
        "labels": jnp.asarray(random.integers(0, classes, size=rows)),
    }


def unfused(features, kernel, labels, *, bias, weights, reduction, ignored=None, **options):
    """The textbook with every logit in memory."""
    o = {"temperature": 1.0, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "class_weights": None, **options}
    logits = features @ kernel + jnp.broadcast_to(bias, (features.shape[0], kernel.shape[1]))
    if o["softcap"] is not None:
        logits = o["softcap"] * jnp.tanh(logits / o["softcap"])
    logits = logits / o["temperature"]
    if o.get("where") is not None:
        logits = jnp.where(jnp.broadcast_to(o["where"], logits.shape), logits, -1e30)
    counted = jnp.ones(labels.shape, bool) if ignored is None else labels != ignored
    allowed = jnp.ones(logits.shape[-1], bool) if o.get("where") is None else o["where"]
    target = jax.nn.one_hot(jnp.where(counted, labels, 0), logits.shape[-1], dtype=logits.dtype)
    allowed = jnp.broadcast_to(allowed, target.shape).astype(target.dtype)
    count = jnp.sum(allowed, axis=-1, keepdims=True)
    spread = allowed * (1 - target) / (count - 1) if o.get("smoothing") == "others" else allowed / count
    target = (1 - o["label_smoothing"]) * target + o["label_smoothing"] * spread
    if o["class_weights"] is not None:
        target = target * jnp.broadcast_to(o["class_weights"], target.shape)
    losses = reference.cross_entropy(logits, target) + o["z_loss"] * reference.logsumexp(logits) ** 2
    weights = jnp.where(counted, weights, 0)
    if reduction == "none":
        return losses * weights
    return jnp.sum(losses * weights) / (jnp.sum(weights) if reduction == "mean" else 1)


def value_and_gradients(loss, data, options, reduction):
    """The loss and its gradient by every float that goes in, arrays and options alike."""
    numbers = {name: value for name, value in options.items() if isinstance(value, float | jax.Array)}
    masks = {name: value for name, value in numbers.items() if getattr(value, "dtype", None) == jnp.bool_}
    numbers = {name: jnp.asarray(value) for name, value in numbers.items() if name not in masks}
    fixed = {name: value for name, value in options.items() if name not in numbers}
    floats = {name: value for name, value in data.items() if name != "labels"}

    @jax.jit
    def run(floats, numbers):
        def scalar(floats, numbers):
            arrays = {**floats, "labels": data["labels"], "reduction": reduction}
            out = loss(**arrays, **numbers, **fixed)
            return jnp.sum(out * jnp.arange(1, out.size + 1, dtype=out.dtype).reshape(out.shape))

        return jax.value_and_grad(scalar, (0, 1))(floats, numbers)

    return run(floats, numbers)


def check_against_float64(data, options, reduction, **ours):
    """To float32 rounding of the largest entry, or of a tenth: derivatives by an option are sums whose terms cancel."""
    rename = {"ignore_index": "ignored"}
    actual = value_and_gradients(
        functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=BLOCK, **ours), data, options, reduction
    )
    with float64():

        def widen(value):
            if isinstance(value, float) or (isinstance(value, jax.Array) and value.dtype == jnp.float32):
                return jnp.asarray(np.asarray(value, np.float64))
            return value

        wide = {name: widen(value) for name, value in data.items()}
        textbook = {rename.get(name, name): widen(value) for name, value in options.items()}
        expected = value_and_gradients(unfused, wide, textbook, reduction)
        expected = jax.tree.map(np.asarray, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=4e-6 * max(np.abs(e).max(initial=0), 0.1))


REDUCTIONS = ["mean", "sum", "none"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 16, 21])
def test_any_number_of_rows(rows, reduction):
    check_against_float64(inputs(rows, 11), {}, reduction)


@pytest.mark.parametrize("classes", [1, 2, 7, 63, 64, 65, 130])  # off, at and around the blocks of the class sums
def test_any_number_of_classes(classes):
    check_against_float64(inputs(13, classes), {"label_smoothing": 0.1}, "mean")


OPTIONS = {
    "temperature": {"temperature": 0.7},
    "smoothing, uniform": {"label_smoothing": 0.1},
    "smoothing, others": {"label_smoothing": 0.1, "smoothing": "others"},
    "z-loss": {"z_loss": 0.01},
    "soft cap": {"softcap": 3.0},
    "class weights": {"class_weights": jnp.linspace(0.5, 2, 11)},
    "where": {"where": jnp.arange(11) != 3},
    "ignore_index": {"ignore_index": 4},
    "all": {
        "temperature": 1.3,
        "label_smoothing": 0.2,
        "z_loss": 0.02,
        "softcap": 4.0,
        "class_weights": jnp.linspace(0.5, 2, 11),
        "where": jnp.arange(11) != 10,
        "ignore_index": 2,
    },
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option(options, reduction):
    data = inputs(13, 11)
    labels = data["labels"]
    if "where" in options:  # a masked label costs +∞, which is another test's
        labels = jnp.where(options["where"][labels], labels, 0)
    check_against_float64({**data, "labels": labels}, options, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_derivative_mode(reduction):
    check_against_float64(inputs(13, 11), OPTIONS["temperature"], reduction, derivative="jvp")


def test_transposed_kernel():
    data = inputs(13, 11)

    def tied(kernel, **arguments):
        return jsoftmax.linear_softmax_cross_entropy(
            kernel=kernel.T, kernel_transposed=True, block_size=BLOCK, **arguments
        )

    actual = value_and_gradients(tied, data, {}, "mean")
    plain = functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=BLOCK)
    for a, e in zip(
        jax.tree.leaves(actual), jax.tree.leaves(value_and_gradients(plain, data, {}, "mean")), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_options_one_a_row():
    data = inputs(13, 11)
    options = {"temperature": jnp.linspace(0.5, 2, 13), "label_smoothing": jnp.linspace(0, 0.5, 13)}
    linear = jsoftmax.linear_softmax_cross_entropy(
        data["features"], data["kernel"], data["labels"], reduction="none", block_size=BLOCK, **options
    )
    logits = data["features"] @ data["kernel"]
    dense = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, data["labels"], **options)
    np.testing.assert_allclose(linear, dense, rtol=1e-5)


def test_batch_of_any_rank():
    data = inputs(12, 11)
    call = functools.partial(jsoftmax.linear_softmax_cross_entropy, kernel=data["kernel"], reduction="none")
    flat = call(data["features"], labels=data["labels"])
    shaped = call(data["features"].reshape(2, 3, 2, -1), labels=data["labels"].reshape(2, 3, 2))
    np.testing.assert_array_equal(shaped, flat.reshape(2, 3, 2))


def test_statistics_and_their_gradients_equal_the_dense_engine():
    data = inputs(13, 11)

    def total(statistics):
        return sum(jnp.sum(jnp.sin(number)) for number in statistics[:4])

    def linear(h, w):
        return jsoftmax.linear_softmax_statistics(h, w, data["labels"], bias=data["bias"], block_size=BLOCK)

    def dense(h, w):
        return jsoftmax.softmax_statistics(h @ w + jnp.broadcast_to(data["bias"], (13, 11)), data["labels"])

    at = data["features"], data["kernel"]
    for name, a, e in zip(jsoftmax.SoftmaxStatistics._fields, linear(*at), dense(*at), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6, err_msg=name)
    gradients = jax.grad(lambda *at: total(linear(*at)), (0, 1))(*at)
    for a, e in zip(gradients, jax.grad(lambda *at: total(dense(*at)), (0, 1))(*at), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_a_constant_on_the_bias_changes_nothing():
    """Features and kernel of eighths, so that logits and the shift are exact."""
    random = np.random.default_rng(0)
    h, w = (jnp.asarray(random.integers(-8, 9, size=shape) / 8, jnp.float32) for shape in ((13, 5), (5, 131)))
    labels = jnp.asarray(random.integers(0, 131, size=13))
    bias = jnp.asarray(random.integers(-8, 9, size=131) / 8, jnp.float32)
    call = functools.partial(jsoftmax.linear_softmax_cross_entropy, h, w, labels, block_size=BLOCK)
    assert call(bias=bias) == call(bias=bias + 1024)


def test_confident_rows_keep_their_loss():
    """Logits [20, 0, 0] and [40, 0, 0]: the loss is log1p(2e⁻ᵍ), of which float32 keeps every digit."""
    features, kernel, labels = jnp.array([[20.0], [40.0]]), jnp.array([[1.0, 0.0, 0.0]]), jnp.array([0, 0])
    losses = jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, reduction="none")
    np.testing.assert_allclose(losses, np.log1p(2 * np.exp([-20.0, -40.0])), rtol=5e-7)
    # dh = Σ_j dz_j·w_j, and only class 0 has a weight: −(1 − p_0), over two rows.
    dh = jax.grad(lambda h: jsoftmax.linear_softmax_cross_entropy(h, kernel, labels))(features)
    np.testing.assert_allclose(dh[:, 0], -np.exp([-20.0, -40.0]) / (1 + 2 * np.exp([-20.0, -40.0])), rtol=5e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_idle_rows_are_never_looked_at(reduction, derivative):
    """Weight 0 and ignore_index: loss 0, gradients exactly 0, the kernel's untouched by their NaN."""
    data = inputs(13, 11)
    labels, weights = data["labels"].at[2].set(-100), data["weights"].at[5].set(0)
    idle = jnp.array([2, 5])

    def loss(h, w, weights):
        out = jsoftmax.linear_softmax_cross_entropy(
            h, w, labels, weights=weights, reduction=reduction, ignore_index=-100, z_loss=0.1, block_size=4,
            derivative=derivative,
        )  # fmt: skip
        return jnp.sum(out)

    clean = jax.value_and_grad(loss, (0, 1, 2))(data["features"].at[idle].set(0), data["kernel"], weights)
    dirty = jax.value_and_grad(loss, (0, 1, 2))(data["features"].at[idle].set(jnp.nan), data["kernel"], weights)
    for c, d in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(d).all()
        np.testing.assert_array_equal(c, d)
    np.testing.assert_array_equal(dirty[1][0][idle], 0)
    np.testing.assert_array_equal(dirty[1][2][idle], 0)


def test_a_mean_over_no_rows_is_zero():
    data = inputs(4, 11)
    nothing = jnp.full(4, -100)
    for features, labels in ((data["features"], nothing), (data["features"][:0], nothing[:0])):
        value, gradient = jax.value_and_grad(jsoftmax.linear_softmax_cross_entropy)(
            features, data["kernel"], labels, ignore_index=-100
        )
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_masked_class_is_never_read(transposed):
    """Its column of the kernel and its bias may hold NaN."""
    data, where = inputs(6, 4), jnp.array([True, True, False, True])
    labels = jnp.array([0, 1, 3, 0, 1, 3])

    def loss(h, w, b):
        kernel = w.T if transposed else w
        return jsoftmax.linear_softmax_cross_entropy(
            h, kernel, labels, bias=b, where=where, block_size=4, label_smoothing=0.1, kernel_transposed=transposed
        )

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(
        data["features"], data["kernel"].at[:, 2].set(jnp.nan), data["bias"].at[2].set(jnp.nan)
    )
    kept = jnp.array([0, 1, 3])
    without = functools.partial(jsoftmax.linear_softmax_cross_entropy, labels=jnp.array([0, 1, 2, 0, 1, 2]))
    expected, expected_gradients = jax.value_and_grad(
        lambda h, w, b: without(h, w, bias=b, label_smoothing=0.1), (0, 1, 2)
    )(data["features"], data["kernel"][:, kept], data["bias"][kept])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], expected_gradients[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradients[1][:, kept], expected_gradients[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradients[1][:, 2], 0)
    np.testing.assert_array_equal(gradients[2][2], 0)


def test_edge_labels_and_masks():
    data = inputs(3, 4)
    call = functools.partial(jsoftmax.linear_softmax_cross_entropy, data["features"], data["kernel"], reduction="none")
    assert np.isnan(call(jnp.array([-1, 4, 2]))).tolist() == [True, True, False]
    masked = call(jnp.array([0, 1, 2]), where=jnp.array([True, False, True, True]))
    assert np.isinf(masked).tolist() == [False, True, False]
    np.testing.assert_array_equal(call(jnp.array([0, 1, 2]), where=jnp.zeros(4, bool)), 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes(dtype):
    """Against the unfused loss on the same narrow numbers in float32: what is rounded are the cotangents, once."""
    data = inputs(64, 40, features=16, dtype=dtype)
    at = data["features"], data["kernel"]

    def ours(h, w):
        return jsoftmax.linear_softmax_cross_entropy(h, w, data["labels"], block_size=16)

    def wide(h, w):
        return reference.cross_entropy(h.astype(jnp.float32) @ w.astype(jnp.float32), data["labels"]).mean()

    value, gradients = jax.value_and_grad(ours, (0, 1))(*at)
    expected, expected_gradients = jax.value_and_grad(wide, (0, 1))(*at)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == dtype
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=4 * float(jnp.finfo(dtype).eps) * np.abs(e).max())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": jnp.zeros((1,), int)}, ValueError, r"labels has shape \(1,\), but needs \(3,\)"),
        ({"labels": jnp.zeros(3)}, TypeError, "labels must hold integer class numbers, got dtype float32"),
        ({"features": jnp.zeros((3, 5), int)}, TypeError, "features must hold floating-point numbers, got dtype int32"),
        (
            {"kernel": jnp.zeros((4, 5))},
            ValueError,
            r"kernel has shape \(4, 5\), but needs \(5, 5\).*kernel_transposed",
        ),
        ({"kernel": jnp.zeros((5, 0))}, ValueError, r"kernel has shape \(5, 0\) and so no class"),
        ({"bias": jnp.zeros(3)}, ValueError, r"bias has shape \(3,\), but needs \(4,\)"),
        ({"weights": jnp.zeros(4)}, ValueError, r"weights has shape \(4,\), but needs \(3,\)"),
        ({"where": jnp.ones((3, 4), bool)}, ValueError, r"where has shape \(3, 4\), but needs \(4,\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"smoothing": "even"}, ValueError, "smoothing must be one of 'uniform', 'others', got 'even'"),
    ],
)
def test_bad_input(change, error, message):
    good = {"features": jnp.ones((3, 5)), "kernel": jnp.ones((5, 4)), "labels": jnp.zeros(3, int)}
    with pytest.raises(error, match=message):
        jsoftmax.linear_softmax_cross_entropy(**{**good, **change})


def compiled(rows, features, classes, dtype=jnp.float32, **options):
    shapes = [((rows, features), dtype), ((features, classes), dtype), ((rows,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    loss = functools.partial(jsoftmax.linear_softmax_cross_entropy, **options)
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()


@pytest.mark.exact
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_memory_is_the_kernels_gradient_and_one_block(dtype):
    rows, features, classes = 2048, 512, 32768
    block = jsoftmax.default_block_size(classes, dtype)
    program = compiled(rows, features, classes, dtype)
    allowed = 4 * (features * classes + block * classes)
    # On a CPU, bfloat16 products go through float32 copies of a block's cotangents and of the kernel.
    allowed += 4 * features * classes + 2 * block * classes if dtype == jnp.bfloat16 else 0
    # A fiftieth for what is O(rows + features) per block: gathered windows, sums, the transposed features.
    assert program.memory_analysis().temp_size_in_bytes <= 1.02 * allowed
    assert not re.search(rf"\[{rows},{classes}\]", program.as_text())


@pytest.mark.exact
def test_a_large_problem_still_needs_one_block():
    """N = 65,536, V = 131,072, compiled only: 34 GB of logits, of which a block of 128 rows exists at a time."""
    rows, features, classes = 65536, 64, 131072
    block = jsoftmax.default_block_size(classes, jnp.float32)
    program = compiled(rows, features, classes)
    assert not re.search(rf"\[{rows},{classes}\]", program.as_text())
    # dh, the features' gradient, is made in blocks and joined.
    allowed = 4 * (features * classes + block * classes + 2 * rows * features)
    assert program.memory_analysis().temp_size_in_bytes <= 1.02 * allowed


@pytest.mark.exact
def test_three_products():
    """2·N·D·V operations for each of h·W, dz·Wᵀ and hᵀ·dz: three in the body of the one loop, none outside."""
    program = compiled(64, 16, 1000, block_size=16)
    arguments = [((64, 16), jnp.float32), ((16, 1000), jnp.float32), ((64,), jnp.int32)]
    loss = functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=16)
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*(jnp.zeros(*shape) for shape in arguments))
    assert str(jaxpr).count("dot_general") == 3
    assert program.as_text().count("dot(") == 3
    evaluation = jax.make_jaxpr(loss)(*(jnp.zeros(*shape) for shape in arguments))
    assert str(evaluation).count("dot_general") == 1


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"derivative": "jvp"}], ids=["per row", "jvp"])
def test_recomputation_takes_a_fourth_product(options):
    loss = functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=16, **options)
    arguments = (jnp.zeros((64, 16)), jnp.zeros((16, 1000)), jnp.zeros(64, int))
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: loss(*a).sum(), (0, 1)))(*arguments)
    assert str(jaxpr).count("dot_general") == 4


def test_second_order():
    data = inputs(5, 7)

    def curvature(loss):
        def scalar(w):
            return jnp.sum(loss(data["features"], w, data["labels"]))

        return jax.jit(jax.jacfwd(jax.grad(scalar)))(data["kernel"])

    def textbook(h, w, labels):
        return reference.cross_entropy(h @ w, labels)

    for reduction in ("none", "sum"):
        ours = functools.partial(jsoftmax.linear_softmax_cross_entropy, reduction=reduction, block_size=2)
        np.testing.assert_allclose(curvature(ours), curvature(textbook), rtol=1e-4, atol=1e-6)
