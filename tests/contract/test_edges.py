"""The table of edge inputs in the numerical contract, line by line, and what bad inputs raise.

Three lines concern reductions and row weights, which losses on logits don't have: "row weight 0", and the two of
"every row ignored, or no rows, reduction "mean"".
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import checkify

import jsoftmax

pytestmark = pytest.mark.exact

INF, NAN = np.inf, np.nan
FORMS, DERIVATIVES = ["cpu", "gpu", "tpu"], ["vjp", "jvp"]
GOOD = [0.5, -1.0, 2.0]  # the row beside the bad one, label 2
integer_loss, dense_loss = jsoftmax.softmax_cross_entropy_with_integer_labels, jsoftmax.softmax_cross_entropy
EVERY_OPTION = {
    "temperature": 0.7,
    "softcap": 5.0,
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "class_weights": np.array([0.5, 1.0, 2.0], np.float32),
    "logit_adjustment": np.array([0.1, -0.4, 0.3], np.float32),
}


def one_hot_loss(logits, labels, **options):
    return dense_loss(logits, jax.nn.one_hot(labels, logits.shape[-1]), **options)


# Of labels, form and derivative, every choice in the first three, and every two together in all.
ENGINES = [("integer", "cpu", "vjp"), ("integer", "gpu", "jvp"), ("dense", "tpu", "vjp")]
ENGINES += [
    pytest.param(engine, marks=pytest.mark.slow)
    for engine in (
        ("dense", "gpu", "vjp"),
        ("dense", "cpu", "jvp"),
        ("integer", "tpu", "vjp"),
        ("integer", "tpu", "jvp"),
    )
]
INTEGER = pytest.mark.parametrize("loss", ENGINES[:2], indirect=True, ids="-".join)


@pytest.fixture(params=ENGINES, ids="-".join)
def loss(request):
    """A loss of logits and integer labels."""
    labels, form, derivative = request.param
    function = {"integer": integer_loss, "dense": one_hot_loss}[labels]
    return functools.partial(function, implementation=form, derivative=derivative)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture(params=DERIVATIVES)
def derivative(request):
    return request.param


def value_and_gradient(loss, logits, labels, **options):
    """Of each row; the rows don't depend on each other."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)

    def both(z):
        value = loss(z, labels, **options)
        return value.sum(), value

    (_, value), gradient = jax.value_and_grad(both, has_aux=True)(logits)
    return np.asarray(value), np.asarray(gradient)


def beside_good(*rows):
    return np.array([*rows, GOOD], np.float32)


def assert_good_row_unharmed(value, gradient):
    row = oracle.exact([GOOD])
    assert oracle.ulps(value[-1], oracle.losses(row, np.array([2]))[0], np.float32) <= 6
    assert np.all(oracle.ulps(gradient[-1], oracle.gradients(row, np.array([2]))[0], np.float32) <= 8)


def test_infinite_mask_beside_the_label(loss):
    value, gradient = value_and_gradient(loss, beside_good([1.0, -INF, 3.0]), [0, 2])
    row = oracle.exact([[1.0, 3.0]])
    assert oracle.ulps(value[0], oracle.losses(row, np.array([0]))[0], np.float32) <= 6
    assert np.all(oracle.ulps(gradient[0, [0, 2]], oracle.gradients(row, np.array([0]))[0], np.float32) <= 8)
    assert gradient[0, 1] == 0
    assert jsoftmax.softmax(jnp.array([1.0, -INF, 3.0]))[1] == 0
    assert_good_row_unharmed(value, gradient)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
def test_infinite_mask_in_every_derivative_mode(loss, options):
    """Finite, and no dependence on the masked class."""
    f = jax.jit(functools.partial(loss, labels=jnp.array([0, 2]), **options))
    logits, tangent = jnp.asarray(beside_good([1.0, -INF, 3.0])), jnp.array([[0.0, 1.0, 0.0], [0.0] * 3])
    gradient = jax.grad(lambda z: f(z).sum())
    hessian = jax.jit(jax.jacfwd(gradient))(logits)
    assert np.all(np.isfinite(hessian))
    assert gradient(logits)[0, 1] == 0
    np.testing.assert_array_equal(hessian[0, 1], 0)
    np.testing.assert_array_equal(hessian[:, :, 0, 1], 0)
    if loss.keywords["derivative"] == "jvp":
        np.testing.assert_array_equal(jax.jvp(f, (logits,), (tangent,))[1], 0)


def test_infinite_mask_at_the_label(loss):
    value, gradient = value_and_gradient(loss, beside_good([1.0, -INF, 3.0]), [1, 2])
    assert value[0] == INF
    p = oracle.exact([[1.0, 3.0]]).p[0]
    assert np.all(oracle.ulps(gradient[0], np.array([p[0], -1, p[1]]), np.float32) <= 8)
    assert_good_row_unharmed(value, gradient)


UNDEFINED = {"nothing": [-INF] * 3, "NaN": [1.0, NAN, 3.0], "infinity": [1.0, INF, 3.0], "two": [INF, -INF, INF]}


@pytest.mark.parametrize("label", [0, 1])
def test_row_without_a_distribution(loss, label):
    value, gradient = value_and_gradient(loss, beside_good(*UNDEFINED.values()), [label] * len(UNDEFINED) + [2])
    assert np.all(np.isnan(value[:-1]))
    assert np.all(np.isnan(gradient[:-1]))
    assert_good_row_unharmed(value, gradient)


@pytest.mark.parametrize(
    ("row", "logsumexp"), list(zip(UNDEFINED.values(), [-INF, NAN, INF, INF], strict=True)), ids=UNDEFINED
)
def test_activations_without_a_distribution(row, logsumexp, form):
    logits = jnp.asarray(beside_good(row))
    for function in (jsoftmax.softmax, jsoftmax.log_softmax):
        out = function(logits)
        assert np.all(np.isnan(out[0]))
        assert np.all(np.isfinite(out[1]))
    statistics = jsoftmax.softmax_statistics(logits, jnp.array([0, 2]), implementation=form)
    np.testing.assert_array_equal(statistics.logsumexp[0], logsumexp)
    np.testing.assert_array_equal(jsoftmax.logsumexp(logits)[0], logsumexp)
    assert np.isnan(statistics.log_prob[0])
    assert np.isfinite(statistics.log_prob[1])


@INTEGER
def test_label_out_of_range(loss):
    """Negative labels don't count from the end."""
    labels = [-1, 3, -3, -100, 2**31 - 1, -(2**31)]
    value, gradient = value_and_gradient(loss, beside_good(*[[1.0, 2.0, 3.0]] * len(labels)), [*labels, 2])
    assert np.all(np.isnan(value[:-1]))
    assert np.all(np.isnan(gradient[:-1]))
    assert_good_row_unharmed(value, gradient)


@INTEGER
@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("ignored", [-100, 0])
def test_ignored_row(loss, ignored, options):
    rows = beside_good([1.0, 2.0, 3.0], *UNDEFINED.values())
    value, gradient = value_and_gradient(loss, rows, [ignored] * 5 + [2], ignore_index=ignored, **options)
    np.testing.assert_array_equal(value[:-1], 0)
    assert not np.any(np.signbit(value))
    np.testing.assert_array_equal(gradient[:-1], 0)
    assert value[-1] > 0
    assert np.all(gradient[-1] != 0)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
def test_masked_slot_is_never_read(loss, options):
    where = jnp.array([[True, False, True]] * 4 + [[True] * 3])
    labels = [0] * 4 + [2]
    rows = beside_good(*([1.0, held, 3.0] for held in (NAN, INF, -INF, 7.0)))
    value, gradient = value_and_gradient(loss, rows, labels, where=where, **options)
    other, other_gradient = value_and_gradient(
        loss, beside_good(*[[1.0, -2.0, 3.0]] * 4), labels, where=where, **options
    )
    np.testing.assert_array_equal(value, other)
    np.testing.assert_array_equal(gradient, other_gradient)
    assert np.all(np.isfinite(value))
    np.testing.assert_array_equal(gradient[:4, 1], 0)


def test_masked_slot_leaves_the_loss_of_the_others(loss):
    where = jnp.array([[True, False, True], [True] * 3])
    value, gradient = value_and_gradient(loss, beside_good([1.0, NAN, 3.0]), [0, 2], where=where)
    row = oracle.exact([[1.0, 3.0]])
    assert oracle.ulps(value[0], oracle.losses(row, np.array([0]))[0], np.float32) <= 6
    assert np.all(oracle.ulps(gradient[0, [0, 2]], oracle.gradients(row, np.array([0]))[0], np.float32) <= 8)
    assert_good_row_unharmed(value, gradient)


def test_mask_at_the_label(loss):
    where = jnp.array([[True, False, True]] * 2 + [[True] * 3])
    rows = beside_good([1.0, NAN, 3.0], [1.0, 2.0, 3.0])
    value, gradient = value_and_gradient(loss, rows, [1, 1, 2], where=where)
    np.testing.assert_array_equal(value[:2], INF)
    p = oracle.exact([[1.0, 3.0]]).p[0]
    assert np.all(oracle.ulps(gradient[:2, [0, 2]], np.array([p, p]), np.float32) <= 8)
    np.testing.assert_array_equal(gradient[:2, 1], 0)
    assert_good_row_unharmed(value, gradient)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
def test_fully_masked_row(loss, options):
    where = jnp.array([[False] * 3] * 3 + [[True] * 3])
    rows = beside_good(*([held] * 3 for held in (NAN, INF, 2.0)))
    value, gradient = value_and_gradient(loss, rows, [1, 1, 1, 2], where=where, **options)
    np.testing.assert_array_equal(value[:-1], 0)
    assert not np.any(np.signbit(value))
    np.testing.assert_array_equal(gradient[:-1], 0)
    assert np.all(gradient[-1] != 0)


def test_activations_of_fully_masked_row(form):
    logits, where = jnp.asarray(beside_good([NAN, 1.0, 2.0])), jnp.array([False, True])
    np.testing.assert_array_equal(jsoftmax.softmax(logits, where=where)[0], 0)
    assert jsoftmax.logsumexp(logits, where=where)[0] == -INF
    statistics = jsoftmax.softmax_statistics(logits, jnp.array([0, 2]), where=where, implementation=form)
    assert statistics.logsumexp[0] == -INF
    assert np.all(np.isfinite([number[1] for number in statistics]))
    for function in (jsoftmax.softmax, jsoftmax.logsumexp):
        gradient = jax.grad(lambda z, f=function: f(z, where=where)[1].sum())(logits)
        np.testing.assert_array_equal(gradient[0], 0)


@pytest.mark.parametrize(
    "function",
    [
        integer_loss,
        one_hot_loss,
        jsoftmax.softmax_focal_loss,
        jsoftmax.poly_loss_cross_entropy,
        functools.partial(integer_loss, label_smoothing=0.1),
        functools.partial(integer_loss, label_smoothing=0.1, smoothing="others"),
        functools.partial(integer_loss, temperature=0.3, softcap=3.0),
    ],
)
def test_one_class(function, form, derivative):
    loss = functools.partial(function, implementation=form, derivative=derivative)
    value, gradient = value_and_gradient(loss, [[3.5], [-1e8]], [0, 0])
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_no_class():
    logits = jnp.zeros((2, 0))
    for function in (jsoftmax.softmax, jsoftmax.log_softmax):
        assert function(logits).shape == (2, 0)
    np.testing.assert_array_equal(jsoftmax.logsumexp(logits), [-INF, -INF])
    for function in (integer_loss, one_hot_loss, jsoftmax.softmax_focal_loss, jsoftmax.poly_loss_cross_entropy):
        with pytest.raises(ValueError, match=r"logits has shape \(2, 0\).*class"):
            function(logits, jnp.zeros(2, int))


def test_no_rows(loss):
    value, gradient = value_and_gradient(loss, jnp.zeros((0, 3)), jnp.zeros(0, int))
    assert value.shape == (0,)
    assert gradient.shape == (0, 3)


@pytest.mark.parametrize("size", [1e-28, 1e25])
@pytest.mark.parametrize("classes", [3, 300])
def test_cotangent_of_any_size(loss, classes, size):
    """XLA may multiply it with constants: none of them makes it 0 or infinite."""
    z = np.random.default_rng(classes).normal(size=(2, classes)).astype(np.float32)
    labels, cotangent = jnp.array([0, classes - 1]), jnp.full(2, size, jnp.float32)
    (gradient,) = jax.jit(lambda z, bar: jax.vjp(lambda z: loss(z, labels), z)[1](bar))(z, cotangent)
    power = np.exp(z.astype(float))
    expected = (power / power.sum(-1, keepdims=True) - np.eye(classes)[labels]) * size
    np.testing.assert_allclose(gradient, expected, rtol=2e-6)


def test_half_precision_near_its_largest_number(loss):
    logits = np.array([[6e4, 6e4, -6e4], [-6e4, 6e4, 0.0]], np.float16)
    value, gradient = value_and_gradient(loss, logits, [0, 0])
    assert value.dtype == np.float32
    assert np.all(oracle.ulps(value, np.array([np.log(2), 2 * float(np.float16(6e4))]), np.float32) <= 6)
    np.testing.assert_array_equal(gradient, np.array([[-0.5, 0.5, 0], [-1, 1, 0]], np.float16))


def test_half_precision_with_many_classes(loss):
    """In float16 the sum would overflow. A sequential reduction of so many equal terms rounds them away."""
    if loss.keywords["implementation"] != "cpu" and jax.default_backend() == "cpu":
        pytest.skip("on a CPU the forms for accelerators add thousands of terms one by one")
    value, gradient = value_and_gradient(loss, jnp.zeros((1, 70_000), jnp.float16), [1])
    assert oracle.ulps(value[0], np.log(70_000), np.float32) <= 6
    assert gradient[0, 1] == -1  # −(1 − 1/70,000), rounded
    assert gradient[0, 0] == np.float16(1 / 70_000)


def test_temperature_zero(loss):
    logits = np.array([[1.0, 3.0, 3.0], [5.0, 1.0, 2.0], [2.0, 2.0, 2.0]], np.float32)
    np.testing.assert_array_equal(
        jsoftmax.softmax(logits, temperature=0.0),
        np.array([[0, 0.5, 0.5], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], np.float32),
    )
    for temperature in (0.0, jnp.zeros(3)):
        value, gradient = value_and_gradient(loss, logits, [1, 0, 0], temperature=temperature)
        assert np.all(oracle.ulps(value, np.log([2, 1, 3]), np.float32) <= 6)
        np.testing.assert_array_equal(gradient, 0)
    # Traced, and beside a row at temperature 1.
    mixed = jax.jit(lambda t: value_and_gradient_traced(loss, logits, jnp.array([1, 0, 0]), t))
    value, gradient, slope = mixed(jnp.array([0.0, 1.0, 1.0]))
    np.testing.assert_array_equal(gradient[0], 0)
    assert slope[0] == 0
    row = oracle.exact(logits[1:])
    assert np.all(oracle.ulps(gradient[1:], oracle.gradients(row, np.array([0, 0])), np.float32) <= 8)


def value_and_gradient_traced(loss, logits, labels, temperature):
    value = loss(logits, labels, temperature=temperature)
    slopes = jax.grad(lambda z, t: loss(z, labels, temperature=t).sum(), argnums=(0, 1))
    return value, *slopes(jnp.asarray(logits), temperature)


LOGITS, LABELS, DENSE = np.zeros((3, 4), np.float32), np.zeros(3, np.int32), np.zeros((3, 4), np.float32)
BAD = {
    "labels that broadcast": (integer_loss, (LOGITS, LABELS[:1]), {}, "labels", "(1,)", "(3,)"),
    "label that broadcasts": (integer_loss, (LOGITS, 0), {}, "labels", "()", "(3,)"),
    "labels with a class axis": (integer_loss, (LOGITS, LABELS[:, None]), {}, "labels", "(3, 1)", "(3,)"),
    "dense labels that broadcast": (dense_loss, (LOGITS, DENSE[:1]), {}, "labels", "(1, 4)", "(3, 4)"),
    "smoothing above 1": (integer_loss, (LOGITS, LABELS), {"label_smoothing": 1.5}, "label_smoothing", "1.5", "1"),
    "smoothing below 0": (dense_loss, (LOGITS, DENSE), {"label_smoothing": -0.1}, "label_smoothing", "-0.1", "0"),
    "smoothing": (integer_loss, (LOGITS, LABELS), {"smoothing": "even"}, "smoothing", "'even'", "'uniform'"),
    "derivative": (integer_loss, (LOGITS, LABELS), {"derivative": "all"}, "derivative", "'all'", "'vjp', 'jvp'"),
    "implementation": (
        dense_loss,
        (LOGITS, DENSE),
        {"implementation": "triton"},
        "implementation",
        "'triton'",
        "'cpu'",
    ),
    "cold": (integer_loss, (LOGITS, LABELS), {"temperature": -1.0}, "temperature", "-1.0", "at least 0"),
    "temperatures": (integer_loss, (LOGITS, LABELS), {"temperature": np.ones(2)}, "temperature", "(2,)", "(3,)"),
    "soft cap 0": (integer_loss, (LOGITS, LABELS), {"softcap": 0.0}, "softcap", "0.0", "at least"),
    "soft caps": (integer_loss, (LOGITS, LABELS), {"softcap": np.ones(3)}, "softcap", "(3,)", "()"),
    "z_loss": (integer_loss, (LOGITS, LABELS), {"z_loss": -1.0}, "z_loss", "-1.0", "at least 0"),
    "weights": (integer_loss, (LOGITS, LABELS), {"class_weights": np.ones(3)}, "class_weights", "(3,)", "(4,)"),
    "ignore_index": (dense_loss, (LOGITS, DENSE), {"ignore_index": 0}, "ignore_index", "0", "integer labels"),
    "where": (integer_loss, (LOGITS, LABELS), {"where": np.ones((2, 4), bool)}, "where", "(2, 4)", "(3, 4)"),
    "axis": (integer_loss, (LOGITS, LABELS), {"axis": 2}, "axis", "2", "2 dimensions"),
    "axis twice": (integer_loss, (LOGITS, LABELS), {"axis": (1, -1)}, "axis", "(1, -1)", "twice"),
    "no axis": (integer_loss, (np.float32(0), 0), {}, "logits", "()", "at least one dimension"),
    "gamma": (jsoftmax.softmax_focal_loss, (LOGITS, LABELS), {"gamma": -1.0}, "gamma", "-1.0", "at least 0"),
    "alpha": (jsoftmax.smooth_labels, (DENSE, 1.5), {}, "alpha", "1.5", "between 0 and 1"),
    "targets": (jsoftmax.kl_divergence, (LOGITS, DENSE[:1]), {}, "targets", "(1, 4)", "(3, 4)"),
    "answers": (jsoftmax.sigmoid_binary_cross_entropy, (LOGITS, DENSE[:1]), {}, "labels", "(1, 4)", "(3, 4)"),
}


@pytest.mark.parametrize(("function", "arguments", "options", "name", "got", "needs"), BAD.values(), ids=BAD)
def test_bad_input(function, arguments, options, name, got, needs):
    """The message names the argument, what it got and what it needs."""
    with pytest.raises(ValueError, match=rf"^{name}\b") as caught:
        function(*arguments, **options)
    assert got in str(caught.value)
    assert needs in str(caught.value)


WRONG_TYPE = {
    "integer logits": (integer_loss, (LOGITS.astype(int), LABELS), {}, "logits", "int"),
    "integer logits, dense": (dense_loss, (LOGITS.astype(int), DENSE), {}, "logits", "int"),
    "integer logits, focal": (jsoftmax.softmax_focal_loss, (LOGITS.astype(int), LABELS), {}, "logits", "int"),
    "integer logits, poly": (jsoftmax.poly_loss_cross_entropy, (LOGITS.astype(int), LABELS), {}, "logits", "int"),
    "integer logits, sigmoid": (
        jsoftmax.sigmoid_binary_cross_entropy,
        (LOGITS.astype(int), DENSE),
        {},
        "logits",
        "int",
    ),
    "floats as integer labels": (integer_loss, (LOGITS, LABELS.astype(np.float32)), {}, "labels", "float32"),
    "numbers as a mask": (integer_loss, (LOGITS, LABELS), {"where": DENSE}, "where", "float32"),
}


@pytest.mark.parametrize(("function", "arguments", "options", "name", "got"), WRONG_TYPE.values(), ids=WRONG_TYPE)
def test_bad_dtype(function, arguments, options, name, got):
    with pytest.raises(TypeError, match=rf"^{name} must .*got dtype {got}"):
        function(*arguments, **options)


@pytest.mark.parametrize(
    ("function", "arguments", "option"),
    [
        (integer_loss, (LOGITS, LABELS), {"temprature": 2.0}),
        (dense_loss, (LOGITS, DENSE), {"weights": 1.0}),
        (jsoftmax.softmax_focal_loss, (LOGITS, LABELS), {"alpha": 0.25}),
        (jsoftmax.poly_loss_cross_entropy, (LOGITS, LABELS), {"eps": 1.0}),
        (jsoftmax.softmax_statistics, (LOGITS, LABELS), {"label_smoothing": 0.1}),
    ],
)
def test_unknown_option(function, arguments, option):
    """A mistyped option must not be passed over."""
    with pytest.raises((TypeError, ValueError), match=next(iter(option))):
        function(*arguments, **option)


def reported(function, *arguments):
    """What checkify has to say, with and without jit."""
    errors = {checkify.checkify(f)(*arguments)[0].get() for f in (function, jax.jit(function))}
    (error,) = errors
    return error or ""


NANS = np.array([[1.0, 2.0, 3.0], [1.0, NAN, 3.0]], np.float32)
FINITE = np.nan_to_num(NANS)


def test_checkify_reports_labels():
    assert re.search(r"label 7 of row 1 .*3 classes", reported(integer_loss, FINITE, np.array([0, 7])))
    assert re.search(r"label -1 of row 0 ", reported(integer_loss, FINITE, np.array([-1, 7])))
    assert reported(integer_loss, FINITE, np.array([0, 2])) == ""


@pytest.mark.parametrize("function", [integer_loss, one_hot_loss, jsoftmax.softmax_focal_loss])
def test_checkify_reports_nan(function):
    assert re.search(r"logits of row 1 .*NaN", reported(function, NANS, np.array([0, 2])))
    assert reported(function, FINITE, np.array([0, 2])) == ""


def test_checkify_passes_over_what_takes_no_part():
    ignoring = functools.partial(integer_loss, ignore_index=-100)
    assert reported(ignoring, NANS, np.array([0, -100])) == ""
    masking = functools.partial(integer_loss, where=np.array([True, False, True]))
    assert reported(masking, NANS, np.array([0, 2])) == ""


@pytest.mark.parametrize("derivative", ["vjp", pytest.param("jvp", marks=pytest.mark.slow)])
def test_checkify_under_transformations(derivative):
    """The row is its number in the whole batch, whichever transformation made the batch."""
    loss = functools.partial(integer_loss, derivative=derivative)
    gradient = jax.grad(lambda z, y: loss(z, y).sum())
    bad = np.array([0, 7])
    for function in (
        gradient,
        jax.vmap(loss),
        jax.vmap(gradient),
        jax.grad(lambda z, y: jax.vmap(loss)(z, y).sum()),
        jax.checkpoint(loss),
    ):
        assert re.search(r"label 7 of row 1 .*3 classes", reported(function, FINITE, bad))
        assert re.search(r"logits of row 1 .*NaN", reported(function, NANS, np.array([0, 2])))
        assert reported(function, FINITE, np.array([0, 2])) == ""
    per_vmap = jax.vmap(loss, in_axes=(1, None))
    assert re.search(r"label 7 of row 1 ", reported(per_vmap, FINITE[:, None], bad))
