"""Beside the loss at no further product: auxiliary results, statistics of rows; and rows that cost nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jsoftmax
from jsoftmax.testing import float64

ROWS, FEATURES, CLASSES, BLOCK = 37, 8, 29, 8
random = np.random.default_rng(16)
FEATURE_ROWS = jnp.asarray(random.normal(size=(ROWS, FEATURES)), jnp.float32)
KERNEL = jnp.asarray(random.normal(size=(FEATURES, CLASSES)), jnp.float32)
LABELS = jnp.asarray(random.integers(0, CLASSES, ROWS))
EVERY_THIRD = np.arange(ROWS) % 3 == 0
PADDED = jnp.asarray(np.where(EVERY_THIRD, -100, LABELS))  # of which no row is a class

linear = functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=BLOCK)


def value_and_gradients(loss, *arguments):
    """Of a result of any shape, with a cotangent of its own for each entry."""

    def scalar(*arguments):
        out = loss(*arguments)
        return jnp.sum(out * jnp.linspace(0.5, 2, out.size, dtype=out.dtype).reshape(out.shape))

    return jax.jit(jax.value_and_grad(scalar, tuple(range(len(arguments)))))(*arguments)


def close(actual, expected):
    """To rounding of the largest entry."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=3e-6 * max(np.abs(e).max(initial=0), 0.1))


@pytest.mark.exact
@pytest.mark.parametrize(
    ("reduction", "derivative"), [("mean", "vjp"), ("sum", "jvp"), pytest.param("none", "vjp", marks=pytest.mark.slow)]
)
def test_statistics_are_those_of_the_logits_to_the_bit(reduction, derivative):
    options = {"temperature": 1.5, "softcap": 20.0, "derivative": derivative}
    run = functools.partial(linear, reduction=reduction, return_statistics=True, **options)
    loss, found = jax.jit(run)(FEATURE_ROWS, KERNEL, LABELS)
    # The block's own product, as the compiler may add up another shape's in another order.
    blocks = [FEATURE_ROWS[i : i + BLOCK] for i in range(0, ROWS, BLOCK)]
    logits = jnp.concatenate([jax.jit(jnp.matmul)(block, KERNEL) for block in blocks])
    expected = jax.jit(functools.partial(jsoftmax.softmax_statistics, **options))(logits, LABELS)
    for name, mine, theirs in zip(expected._fields, found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
    close(loss, linear(FEATURE_ROWS, KERNEL, LABELS, reduction=reduction, **options))


def test_statistics_leave_the_gradient_alone():
    def paired(features, kernel):
        loss, statistics = linear(features, kernel, LABELS, return_statistics=True)
        return loss + 3 * jnp.sum(statistics.entropy)  # which is no part of what is differentiated

    found = jax.jit(jax.grad(paired, (0, 1)))(FEATURE_ROWS, KERNEL)
    expected = jax.jit(jax.grad(functools.partial(linear, labels=LABELS), (0, 1)))(FEATURE_ROWS, KERNEL)
    close(found, expected)


def test_statistics_of_rows_that_do_not_count_are_zero():
    _, found = linear(FEATURE_ROWS.at[0].set(jnp.nan), KERNEL, PADDED, ignore_index=-100, return_statistics=True)
    for number in found:
        assert np.all(np.asarray(number)[EVERY_THIRD] == 0)
        assert np.all(np.isfinite(number))


# Blocks of one row, whole and ragged ones, one larger than all.
@pytest.mark.parametrize(("reduction", "size"), [("mean", 8), ("sum", 1), ("none", 13), ("sum", 64)])
def test_skipped_rows_change_nothing(reduction, size):
    def loss(features, kernel, **options):
        return linear(features, kernel, PADDED, ignore_index=-100, reduction=reduction, **options)

    skipping = functools.partial(loss, skip_rows=True, block_size=size)
    close(
        value_and_gradients(skipping, FEATURE_ROWS, KERNEL),
        value_and_gradients(functools.partial(loss, block_size=size), FEATURE_ROWS, KERNEL),
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_any_share_of_rows_may_count(share):
    weights = jnp.asarray(
        (np.random.default_rng(1).uniform(size=ROWS) < share) * np.linspace(0.5, 2, ROWS), jnp.float32
    )
    holed = jnp.where(weights[:, None] == 0, jnp.nan, FEATURE_ROWS)  # what doesn't count may hold anything

    def loss(features, kernel, weights, **options):
        return linear(features, kernel, LABELS, weights=weights, **options)

    found = value_and_gradients(functools.partial(loss, skip_rows=True), holed, KERNEL, weights)
    with float64():
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (FEATURE_ROWS, KERNEL, weights)]

        def dense(features, kernel, weights):
            losses = jsoftmax.softmax_cross_entropy_with_integer_labels(features @ kernel, jnp.asarray(LABELS))
            return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1e-300)

        value, gradients = jax.tree.map(np.asarray, value_and_gradients(dense, *wide))
    # A row of weight 0 is not looked at, so that its weight's own derivative is 0.
    gradients = (*gradients[:2], np.where(np.asarray(weights) == 0, 0, gradients[2]))
    close(found, (value, gradients))


@pytest.mark.parametrize("rows", [7, 22])
def test_any_number_of_rows_may_count(rows):
    """None is met twice, and of those that don't count, less than a quarter of a block."""
    places, size = jnp.arange(rows), 8

    def ones(params, rows):
        each = jnp.ones(rows.shape)
        return params * jnp.sum(each), (each, jnp.sum(each))

    ones = jax.jit(jsoftmax.blockwise(ones, has_aux=True, block_size=size))
    for count in range(rows + 1):
        active = jnp.asarray(np.random.default_rng(1).permutation(places) < count)
        value, (each, met) = ones(jnp.float32(1), places, active)
        assert np.all(each[active])
        assert value == met == jnp.sum(each)
        assert count <= met < count + size // 4


def test_skipping_under_vmap_scan_and_forward_over_reverse():
    def loss(features):
        return linear(features, KERNEL, PADDED, ignore_index=-100, skip_rows=True)

    plain = functools.partial(linear, kernel=KERNEL, labels=PADDED, ignore_index=-100)
    several = jnp.stack([FEATURE_ROWS, 2 * FEATURE_ROWS])
    expected = jnp.stack([plain(rows) for rows in several])
    close(jax.vmap(loss)(several), expected)
    close(jax.lax.scan(lambda carry, rows: (carry, loss(rows)), 0, several)[1], expected)
    direction = jnp.ones_like(FEATURE_ROWS)

    def curvature(function):
        return jax.jvp(jax.grad(function), (FEATURE_ROWS,), (direction,))[1]

    close(curvature(loss), curvature(plain))


def test_skipping_where_each_device_has_its_own_rows():
    """Loops of another length on each device; classes split beside them."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, classes = 32, 28
    features, kernel, labels = FEATURE_ROWS[:rows], KERNEL[:, :classes], PADDED[:rows] % classes
    labels = jnp.where(jnp.arange(rows) < 11, -100, labels)  # a device without any row that counts

    def loss(features, kernel, labels):
        options = {"ignore_index": -100, "reduction": "sum", "axis_name": "model", "skip_rows": True}
        return jax.lax.psum(linear(features, kernel, labels, **options), "data")

    split = jax.shard_map(loss, mesh=mesh, in_specs=(P("data"), P(None, "model"), P("data")), out_specs=P())
    found = jax.jit(jax.value_and_grad(split, (0, 1)))(features, kernel, labels)
    whole = functools.partial(linear, labels=labels, ignore_index=-100, reduction="sum")
    close(found, jax.value_and_grad(whole, (0, 1))(features, kernel))


def test_statistics_of_active_rows_alone():
    active = ~EVERY_THIRD

    def log_prob(features, kernel, **options):
        return jsoftmax.linear_softmax_statistics(features, kernel, LABELS, block_size=BLOCK, **options).log_prob

    def silenced(features, kernel):
        return jnp.where(active, log_prob(features, kernel), 0)

    found = value_and_gradients(functools.partial(log_prob, active=active), FEATURE_ROWS, KERNEL)
    close(found, value_and_gradients(silenced, FEATURE_ROWS, KERNEL))


def test_probability_targets():
    """Of every row's own, in blocks, as dense; a smoothed label among them."""
    targets = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, CLASSES)), jnp.float32))

    def dense(features, kernel):
        return jsoftmax.softmax_cross_entropy(features @ kernel, targets, label_smoothing=0.1).mean()

    found = value_and_gradients(functools.partial(linear, labels=targets, label_smoothing=0.1), FEATURE_ROWS, KERNEL)
    close(found, value_and_gradients(dense, FEATURE_ROWS, KERNEL))


def counted(params, rows):
    """A trainer's loss: cross-entropy and z-loss, each summed, by given weights; and what is logged."""
    logits = jnp.tanh(rows["h"] @ params["in"]) @ params["out"]
    statistics = jsoftmax.softmax_statistics(logits, rows["y"])
    cross_entropy, z = -statistics.log_prob * rows["w"], statistics.logsumexp**2 * rows["w"]
    hits = jnp.where(statistics.argmax == rows["y"], rows["w"], 0)
    return (cross_entropy + 1e-2 * z).sum(), {"ce": cross_entropy.sum(), "z": z.sum(), "hits": hits}


@pytest.fixture(scope="module")
def head():
    params = {"in": jnp.eye(FEATURES) + 0.1, "out": KERNEL}
    weight = jnp.where(EVERY_THIRD, 0, 1).astype(jnp.float32)
    return params, {"h": FEATURE_ROWS, "y": LABELS, "w": weight}


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
@pytest.mark.parametrize("active", [None, ~EVERY_THIRD], ids=["all", "some"])
def test_auxiliary_results_of_any_head(head, active, derivative):
    blocked = jsoftmax.blockwise(counted, has_aux=True, block_size=BLOCK, derivative=derivative)
    run = jax.jit(jax.value_and_grad(lambda params, rows: blocked(params, rows, active), has_aux=True))
    (value, aux), gradient = run(*head)
    (value_, aux_), gradient_ = jax.jit(jax.value_and_grad(counted, has_aux=True))(*head)
    close((value, aux, gradient), (value_, aux_, gradient_))


def test_auxiliary_results_are_constants(head):
    params, rows = head
    blocked = jsoftmax.blockwise(counted, has_aux=True, block_size=BLOCK)
    gradient = jax.grad(lambda params: blocked(params, rows)[1]["z"])(params)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def products(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_three_products_with_every_output():
    loss = functools.partial(linear, labels=LABELS[:32], return_statistics=True)
    arguments = (FEATURE_ROWS[:32], KERNEL)
    assert products(jax.grad(lambda *a: loss(*a)[0], (0, 1)), *arguments) == 3
    assert products(loss, *arguments) == 1


@pytest.mark.exact
@pytest.mark.parametrize("frozen", ["features", "kernel"])
def test_two_products_beside_what_is_frozen(frozen):
    """What is compiled: JAX drops the product of a gradient that nobody asks for."""
    number = {"features": 1, "kernel": 0}[frozen]

    def gradient(features, kernel):
        return jax.grad(functools.partial(linear, labels=LABELS[:32], return_statistics=True), number, has_aux=True)(
            features, kernel
        )

    program = jax.jit(gradient).lower(FEATURE_ROWS[:32], KERNEL).compile().as_text()
    assert program.count(" dot(") == 2


def test_bad_input(head):
    params, rows = head
    with pytest.raises(ValueError, match=r"aux of loss has shape \(2,\) for 37 rows; it needs one entry a row"):
        jsoftmax.blockwise(lambda p, r: (jnp.sum(r["w"]), jnp.ones(2)), has_aux=True)(params, rows)
    with pytest.raises(ValueError, match=r"loss returned \w+, but with has_aux=True needs a pair \(value, aux\)"):
        jsoftmax.blockwise(lambda p, r: jnp.sum(r["w"]), has_aux=True)(params, rows)
    with pytest.raises(ValueError, match=r"active has shape \(3,\), but needs \(37,\): True for a row that counts"):
        jsoftmax.blockwise(counted, has_aux=True)(params, rows, jnp.ones(3, bool))
    with pytest.raises(TypeError, match="active must be boolean"):
        jsoftmax.linear_softmax_statistics(FEATURE_ROWS, KERNEL, LABELS, active=jnp.ones(ROWS))
    with pytest.raises(ValueError, match=r"labels has shape \(37, 3\), but needs \(37, 29\): one probability"):
        linear(FEATURE_ROWS, KERNEL, jnp.ones((ROWS, 3)))
