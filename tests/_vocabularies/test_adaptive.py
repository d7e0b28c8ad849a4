"""Adaptive softmax: against PyTorch, and every row counted whatever the capacity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jsoftmax

ADAPTIVE = jsoftmax.AdaptiveSoftmax(8, 20, (5, 11), div_value=2.0, head_bias=True)
LABELS = np.array([0, 4, 5, 10, 11, 19])
FEATURES = np.sin(0.3 * np.arange(48.0)).reshape(6, 8)

# torch.nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 11], div_value=2.0, head_bias=True) of PyTorch 2.13.0 in float64, its
# weights (here transposed), in the order of `params`, filled with sin(0), sin(1), sin(2), …; `output`, `log_prob` and
# `predict` for FEATURES and LABELS, and gradients of the sum of −output · (1, 2, …, 6).
OUTPUT = [
    *(-3.4081965203944993, -7.28567239023214, -7.126514804461016),
    *(-5.155519351167177, -6.510845187090036, -7.337742982972968),
]
LOG_PROB = [
    *(-3.4081965203944993, -3.960603025031533, -3.082847092901952, -1.581933480026816, -0.8377952402657638),
    *(-3.9779768310284935, -4.496026147772985, -4.140831222350445, -3.2389566311290343, -2.6195817140699456),
    *(-2.852156913523529, -5.414125298269133, -5.225217690497262, -5.045823888355207, -5.040877726215468),
    *(-5.214926682738925, -5.4079509499658, -5.442484906784719, -5.28677819255787, -5.083986842267114),
]
PREDICTED = [4, 1, 3, 0, 2, 4]
D_FEATURES = [  # of row 4
    *(6.831732615325006, 0.6362435240398965, -6.667422177779359, -6.25215373508589),
    *(-5.657685596203303, -4.303733660327663, 3.7521428591976, 8.171495326657512),
]
D_HEAD = [  # column 0
    *(1.0971343062926364, 0.9083481502953984, 0.6384219593212516, 0.31146743610191163),
    *(-0.04330954555614339, -0.39421781449637355, -0.709911780147328, -0.9621914407733394),
]
D_BIAS = [
    *(0.6330069579551556, 3.772900693710409, 3.8906763047027337, 4.686808499848257),
    *(2.6821788118068843, -5.942793207730119, -9.722778060293319),
]
D_PROJECT = [6.317895993643456, 6.666281503776779, 6.48363485110331, 5.784505563263558]  # first cluster, row 0
D_KERNEL = [-1.3825879434179478, -1.5069426104719474]  # second cluster, column 8


def filled(dtype):
    count = 0

    def fill(leaf):
        nonlocal count
        count += leaf.size
        return jnp.asarray(np.sin(np.arange(count - leaf.size, count)).reshape(leaf.shape), dtype)

    shapes = ADAPTIVE.init(jax.random.key(0))
    head, bias = fill(shapes["head"]), fill(shapes["bias"])
    tails = tuple({name: fill(tail[name]) for name in ("project", "kernel")} for tail in shapes["tails"])
    return {"head": head, "bias": bias, "tails": tails}


@functools.partial(jax.jit, static_argnames=("capacity", "ignore_index", "derivative"))
def losses_of(params, features, labels, **options):
    return ADAPTIVE.cross_entropy(params, features, labels, **options)


def check_against_torch(dtype, capacity, rtol):
    params, features = filled(dtype), FEATURES.astype(dtype)

    def total(params, features):
        losses = losses_of(params, features, LABELS, capacity=capacity)
        return jnp.sum(losses * jnp.arange(1, 7, dtype=losses.dtype)), losses

    (_, losses), (d_params, d_features) = jax.value_and_grad(total, (0, 1), has_aux=True)(params, features)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol)
    close(losses, -np.array(OUTPUT))
    close(ADAPTIVE.log_prob(params, features)[0], LOG_PROB)
    close(d_features[4], D_FEATURES)
    close(d_params["head"][:, 0], D_HEAD)
    close(d_params["bias"], D_BIAS)
    close(d_params["tails"][0]["project"][0], D_PROJECT)
    close(d_params["tails"][1]["kernel"][:, 8], D_KERNEL)
    assert ADAPTIVE.predict(params, features).tolist() == PREDICTED


@pytest.mark.parametrize("capacity", [None, 1])
def test_torch(capacity):
    check_against_torch(np.float32, capacity, 16 * float(jnp.finfo(jnp.float32).eps))


def test_torch_in_float64(x64):
    check_against_torch(np.float64, None, 1e-13)


@pytest.mark.parametrize("capacity", [1, 4, 100, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["mixed", "one cluster", "head alone"])
def test_any_capacity_gives_every_row_its_loss_and_gradient(capacity, kind):
    """Against log_prob, which routes nothing; 13 rows overflow a capacity of 3 more than once."""
    random = np.random.default_rng(0)
    low, high = {"mixed": (0, 20), "one cluster": (11, 20), "head alone": (0, 5)}[kind]
    labels = random.integers(low, high, size=13)
    features, params = random.normal(size=(13, 8)).astype(np.float32), filled(np.float32)
    weight = jnp.arange(1, 14, dtype=jnp.float32)

    def routed(params, features):
        return jnp.sum(losses_of(params, features, labels, capacity=capacity) * weight)

    def dense(params, features):
        log_p = ADAPTIVE.log_prob(params, features)
        return -jnp.sum(jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0] * weight)

    ours = jax.jit(jax.value_and_grad(routed, (0, 1)))(params, features)
    exact = jax.jit(jax.value_and_grad(dense, (0, 1)))(params, features)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), ours, exact)


def test_probabilities_sum_to_one():
    params = filled(np.float32)
    p = jnp.exp(ADAPTIVE.log_prob(params, FEATURES.astype(np.float32).reshape(2, 3, 8)))
    assert p.shape == (2, 3, 20)
    np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=2e-6)


@pytest.mark.parametrize("capacity", [None, 2])
def test_predictions_are_the_largest_log_prob(capacity):
    adaptive = jsoftmax.AdaptiveSoftmax(8, 30, (2, 10))
    params = jax.tree.map(lambda leaf: 3 * leaf, adaptive.init(jax.random.key(0)))
    features = jax.random.normal(jax.random.key(1), (50, 8))
    expected = jnp.argmax(adaptive.log_prob(params, features), axis=1)
    assert len(np.unique(np.searchsorted([2, 10], expected, side="right"))) == 3  # head and both clusters
    predict = jax.jit(functools.partial(adaptive.predict, capacity=capacity))
    np.testing.assert_array_equal(predict(params, features), expected)


def test_vmap_and_forward_mode(x64):
    params = filled(np.float64)
    one_by_one = jax.vmap(lambda features, label: losses_of(params, features, label))(FEATURES, LABELS)
    np.testing.assert_allclose(one_by_one, -np.array(OUTPUT), rtol=1e-12)

    def loss(params, features):
        return losses_of(params, features, LABELS, capacity=2, derivative="jvp")

    check_grads(loss, (params, FEATURES), order=1, modes=["fwd", "rev"], eps=1e-5, atol=1e-6, rtol=1e-6)


def test_labels_that_are_no_class_or_ignored():
    labels, features = np.array([0, 20, -1, -100, 11, 5]), FEATURES.astype(np.float32)
    features[3] = np.nan
    params = filled(np.float32)
    losses = losses_of(params, features, labels, ignore_index=-100)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, False, False, False])
    assert losses[3] == 0

    def kept(params, features):
        return jnp.sum(losses_of(params, features, labels, ignore_index=-100)[jnp.array([0, 3, 4, 5])])

    d_params, d_features = jax.grad(kept, (0, 1))(params, features)
    np.testing.assert_array_equal(d_features[1:4], 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(d_params))


def test_no_rows():
    params = filled(np.float32)
    features, labels = np.zeros((0, 8), np.float32), np.zeros(0, np.int32)
    assert losses_of(params, features, labels).shape == (0,)
    assert ADAPTIVE.predict(params, features).shape == (0,)
    gradient = jax.grad(lambda params: losses_of(params, features, labels).sum())(params)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_bfloat16():
    params, features = filled(jnp.bfloat16), FEATURES.astype(jnp.bfloat16)
    losses = losses_of(params, features, LABELS)
    assert losses.dtype == jnp.float32
    # Two products in a row, each of 8 terms of size 1, rounded to 8 bits in between.
    np.testing.assert_allclose(losses, -np.array(OUTPUT), atol=16 * float(jnp.finfo(jnp.bfloat16).eps))
    gradient = jax.grad(lambda params: losses_of(params, features, LABELS).sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jsoftmax.AdaptiveSoftmax(8, 20, ()), r"cutoffs must ascend between 1 and 20 − 1, got \(\)"),
        (lambda: jsoftmax.AdaptiveSoftmax(8, 20, (5, 5)), r"cutoffs must ascend .*, got \(5, 5\)"),
        (lambda: jsoftmax.AdaptiveSoftmax(8, 20, (20,)), r"cutoffs must ascend .*, got \(20,\)"),
        (lambda: jsoftmax.AdaptiveSoftmax(8, 20, (5,), div_value=0.5), "div_value must be at least 1, got .*0.5"),
        (lambda: losses_of(filled(np.float32), FEATURES[:, :3], LABELS), r"features has shape \(6, 3\), but needs"),
        (lambda: losses_of(filled(np.float32), FEATURES, LABELS[:1]), r"labels has shape \(1,\), but needs \(6,\)"),
        (lambda: losses_of(filled(np.float32), FEATURES, LABELS, capacity=0), "capacity must be at least 1, got 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
