"""Every public function under JAX's transformations, every derivative mode, and what the compiled program keeps."""

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jsoftmax

integer_loss, dense_loss = jsoftmax.softmax_cross_entropy_with_integer_labels, jsoftmax.softmax_cross_entropy
CLASSES = 5
# The same numbers summed in another order.
assert_close = functools.partial(np.testing.assert_allclose, rtol=16 * float(jnp.finfo(jnp.float32).eps), atol=1e-7)


def soft(labels, dtype=np.float32):
    """Dense labels with some mass on every class."""
    return jax.nn.one_hot(labels, CLASSES, dtype=dtype) * 0.8 + 0.04


def statistics(logits, labels, **options):
    """All statistics but argmax as one array."""
    return jnp.stack(jsoftmax.softmax_statistics(logits, labels, **options)[:4], axis=-1)


def with_margins(z, y, **options):
    return integer_loss(z / 10, y, margin=0.2, **options)


SOFTMAX_LOSSES = {
    "integer": integer_loss,
    "dense": lambda z, y, **options: dense_loss(z, soft(y), **options),
    "focal": jsoftmax.softmax_focal_loss,
    "dense focal": lambda z, y, **options: jsoftmax.softmax_focal_loss(z, soft(y), **options),
    "poly": jsoftmax.poly_loss_cross_entropy,
    "margins": functools.partial(with_margins, angular_margin=0.3, logit_adjustment=np.float32([0, 1, 2, -1, 0.5])),
    "dense poly": lambda z, y, **options: jsoftmax.poly_loss_cross_entropy(z, soft(y), **options),
}
FUNCTIONS = SOFTMAX_LOSSES | {
    "statistics": statistics,
    "softmax": lambda z, y: jsoftmax.softmax(z),
    "log_softmax": lambda z, y: jsoftmax.log_softmax(z),
    "logsumexp": lambda z, y: jsoftmax.logsumexp(z),
    "sigmoid": lambda z, y: jsoftmax.sigmoid_binary_cross_entropy(z, soft(y)),
    "sigmoid focal": lambda z, y: jsoftmax.sigmoid_focal_loss(z, soft(y), alpha=0.3),
    "divergence": lambda z, y: jsoftmax.kl_divergence(z, soft(y)),
    "smooth_labels": lambda z, y: jsoftmax.smooth_labels(soft(y) * z, 0.1),
}
LABELS = np.array([[0, 4, 2], [1, 1, 3]], np.int32)
LOGITS = np.random.default_rng(0).normal(size=(2, 3, CLASSES)).astype(np.float32) * 3
WEIGHT = np.random.default_rng(1).normal(size=(2, 3, CLASSES)).astype(np.float32)


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def scalar(f):
    """A scalar whose gradient asks every output something else."""

    def total(z, y):
        out = f(z, y)
        return jnp.sum(out * WEIGHT.ravel()[: out.size].reshape(out.shape))

    return total


def test_jit(function):
    assert_close(jax.jit(function)(LOGITS, LABELS), function(LOGITS, LABELS))


def test_vmap(function):
    expected = function(LOGITS, LABELS)
    assert_close(jax.vmap(jax.vmap(function))(LOGITS, LABELS), expected)
    moved = jax.vmap(function, in_axes=(2, 1), out_axes=1)(np.moveaxis(LOGITS, 1, 2), LABELS)
    assert_close(moved, expected)
    shared = jax.vmap(function, in_axes=(0, None))(LOGITS, LABELS[0])
    assert_close(shared, function(LOGITS, np.stack([LABELS[0], LABELS[0]])))
    several_labels = jax.vmap(function, in_axes=(None, 0))(LOGITS[0], LABELS)
    assert_close(several_labels, function(np.stack([LOGITS[0], LOGITS[0]]), LABELS))


def test_grad_of_vmap_and_vmap_of_grad(function):
    whole = jax.grad(lambda z: jnp.sum(jax.vmap(function)(z, LABELS) ** 2))(LOGITS)
    each = jax.vmap(jax.vmap(jax.grad(lambda z, y: jnp.sum(function(z, y) ** 2))))(LOGITS, LABELS)
    assert_close(whole, each, atol=1e-5)


def test_scan(function):
    def step(total, row):
        out = function(*row)
        return total + out.sum(), out

    def scanned(z):
        return jax.lax.scan(step, 0.0, (z, LABELS))

    expected = function(LOGITS, LABELS)
    assert_close(scanned(LOGITS)[1], expected)
    gradient = jax.grad(lambda z: scanned(z)[0])(LOGITS)
    assert_close(gradient, jax.grad(lambda z: function(z, LABELS).sum())(LOGITS), atol=1e-6)


def test_remat(function):
    plain, saving_nothing = (jax.value_and_grad(scalar(f)) for f in (function, jax.checkpoint(function)))
    for one, other in zip(saving_nothing(LOGITS, LABELS), plain(LOGITS, LABELS), strict=True):
        assert_close(one, other)


def test_export(function):
    """Serialized and read again, the value and the gradient."""
    compiled = jax.jit(jax.value_and_grad(scalar(function)))
    blob = jax.export.export(compiled)(LOGITS, LABELS).serialize()
    for one, other in zip(jax.export.deserialize(blob).call(LOGITS, LABELS), compiled(LOGITS, LABELS), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["temperature", "label_smoothing", "z_loss"])
@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_vmap_over_an_option(name, derivative):
    values = np.array([0.2, 0.5, 1.0], np.float32)

    def loss(z, y, option):
        return integer_loss(z, y, derivative=derivative, **{name: option})

    for in_axes, arguments in (
        ((None, None, 0), (LOGITS, LABELS, values)),
        ((1, None, 0), (LOGITS, LABELS[:, 0], values)),
        ((1, 1, 0), (LOGITS, LABELS, values)),
    ):
        for function in map(jax.jit, (loss, jax.grad(lambda *a: loss(*a).sum(), argnums=2))):
            mapped = jax.vmap(function, in_axes)(*arguments)
            parts = [a if axis is None else np.moveaxis(a, axis, 0) for a, axis in zip(arguments, in_axes, strict=True)]
            one_by_one = [
                function(*(p if axis is None else p[i] for p, axis in zip(parts, in_axes, strict=True)))
                for i in range(3)
            ]
            assert_close(mapped, np.stack(one_by_one), rtol=1e-5)


@pytest.mark.parametrize("name", ["temperature", "label_smoothing", "z_loss", "margin"])
def test_an_option_for_each_row(name):
    values = np.array([[0.2, 0.5, 1.0], [0.3, 0.9, 0.7]], np.float32)
    each = [[integer_loss(LOGITS[i, j], LABELS[i, j], **{name: values[i, j]}) for j in range(3)] for i in range(2)]
    assert_close(integer_loss(LOGITS, LABELS, **{name: values}), np.array(each))


# Every option at once, each differentiable one an argument.
OPTIONS = {
    "temperature": 0.7,
    "softcap": 4.0,
    "label_smoothing": 0.2,
    "z_loss": 0.05,
    "class_weights": np.array([0.5, 1.0, 2.0, 0.25, 1.5]),
    "logit_adjustment": np.array([0.1, -0.4, 0.3, 0.0, 0.2]),
}
WHERE = np.array([[True] * 5, [True, True, False, True, True]])
TWO_LABELS = np.array([0, 3])


def everything_on(name, derivative, smoothing="uniform"):
    """A loss of its logits and options in float64, the mean over two rows, and where to take it."""

    def loss(logits, dense, options):
        labels = jnp.where(WHERE, dense, 0) if name.startswith("dense") else TWO_LABELS
        function = {"dense": dense_loss, "integer": integer_loss}.get(name)
        if function is None:
            poly = name.endswith("poly")
            function = jsoftmax.poly_loss_cross_entropy if poly else jsoftmax.softmax_focal_loss
        out = function(logits, labels, where=WHERE, smoothing=smoothing, derivative=derivative, **options)
        return jnp.dot(out, np.array([0.3, -1.1]))

    point = np.random.default_rng(2).normal(size=(2, CLASSES)), soft(TWO_LABELS, np.float64), OPTIONS
    return jax.jit(loss), jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), point)


def any_statistic(derivative):
    """The statistics under random cotangents."""
    cotangent = np.random.default_rng(3).normal(size=(2, 4))

    def total(logits, dense, options):
        masked = jnp.where(WHERE, dense, 0)
        out = [statistics(logits, y, where=WHERE, derivative=derivative, **options) for y in (TWO_LABELS, masked)]
        return jnp.sum(cotangent * out[0] - cotangent[::-1] * out[1])

    _, (logits, dense, _) = everything_on("dense", derivative)
    options = {"temperature": jnp.array([0.7, 1.3]), "softcap": jnp.asarray(4.0)}
    return jax.jit(total), (logits, dense, options)


CHECKED = ["integer", "dense"]
CHECKED += [pytest.param(name, marks=pytest.mark.slow) for name in ("any statistic", "focal", "dense poly", "others")]
check = functools.partial(check_grads, eps=1e-5, atol=1e-6, rtol=1e-6)


def checked(name, derivative):
    if name == "any statistic":
        return any_statistic(derivative)
    if name == "others":
        return everything_on("integer", derivative, "others")
    return everything_on(name, derivative)


@pytest.mark.parametrize("name", CHECKED)
def test_every_derivative_mode_by_finite_differences(name, x64):
    f, point = checked(name, "jvp")
    check(f, point, order=1, modes=["fwd", "rev"])
    # Both modes of the next order: forwards over reverse and reverse over reverse.
    check(jax.jit(jax.grad(f, argnums=(0, 1, 2))), point, order=1, modes=["fwd", "rev"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["integer", "any statistic"])
def test_third_order_by_finite_differences(name, x64):
    """In all eight nestings, along one direction: `check` with `order=3` runs hundreds of programs for the same."""
    f, point = checked(name, "jvp")
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=jnp.shape(x)), x.dtype), point)

    def forwards(function):
        return lambda *point: jax.jvp(function, point, direction)[1]

    def backwards(function):
        gradient = jax.grad(function, argnums=(0, 1, 2))
        return lambda *point: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, direction, gradient(*point))))

    for first, second in itertools.product((forwards, backwards), repeat=2):
        check(jax.jit(second(first(f))), point, order=1, modes=["fwd", "rev"])


@pytest.mark.parametrize("name", ["integer", "dense", "any statistic"])
def test_reverse_mode_by_finite_differences(name, x64):
    f, point = checked(name, "vjp")
    check(f, point, order=1, modes=["rev"])
    check(jax.jit(jax.grad(f, argnums=(0, 1, 2))), point, order=1, modes=["fwd"])


@pytest.mark.parametrize(
    "name", ["integer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "any statistic"))]
)
def test_modes_agree(name, x64):
    """jvp, linearize, jacfwd and the four Hessians of one loss are the same numbers."""
    f, (logits, *rest) = checked(name, "jvp")

    def g(z):
        return f(z, *rest)

    near = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    gradient, tangent = jax.grad(g)(logits), jnp.asarray(WEIGHT[0, :2], jnp.float64)
    near(jax.jvp(g, (logits,), (tangent,))[1], jnp.vdot(gradient, tangent))
    near(jax.linearize(g, logits)[1](tangent), jnp.vdot(gradient, tangent))
    near(jax.jacfwd(g)(logits), gradient)
    pairs = itertools.product((jax.jacfwd, jax.jacrev), repeat=2)
    hessians = [jax.jit(outer(inner(g)))(logits) for outer, inner in pairs]
    for hessian in hessians[1:]:
        near(hessian, hessians[0])


def test_default_rule_has_no_forward_mode():
    """As documented: it takes derivative="jvp"."""
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda z: integer_loss(z, LABELS), (LOGITS,), (LOGITS,))


ROWS, MANY = 256, 32_000


@pytest.mark.exact
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"z_loss": 1e-4}, {"ignore_index": 0}], ids=str)
def test_no_temporary_of_the_logits_size(options):
    """Value and gradient of 256 × 32,000 logits, 33 MB, keep less than 2 MB beside them."""
    loss = jax.value_and_grad(lambda z, y: integer_loss(z, y, **options).mean())
    shapes = jax.ShapeDtypeStruct((ROWS, MANY), jnp.float32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    compiled = jax.jit(loss).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2e6


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["integer", "focal", "poly", "dense", "statistics"])
def test_nothing_but_inputs_is_saved(name, dtype, derivative):
    """Between the forward and the backward pass wait the caller's own logits (and labels) and numbers per row."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), dtype)
    labels = np.arange(8) if name != "dense" else jax.nn.softmax(logits.astype(jnp.float32)[::-1])
    function = {"dense": dense_loss, "statistics": statistics}.get(name) or SOFTMAX_LOSSES[name]
    options = {"temperature": 0.7, "softcap": 20.0, "derivative": derivative}
    _, pull_back = jax.vjp(lambda z: function(z, labels, **options), logits)
    inputs = [np.asarray(x) for x in (logits, labels)]
    for saved in map(np.asarray, jax.tree.leaves(pull_back)):
        own = any(saved.dtype == x.dtype and np.array_equal(saved, x) for x in inputs)
        assert own or saved.size <= 8 * 4, (saved.dtype, saved.shape)
