"""`blockwise`: a user's own loss, in blocks, is the same loss with the same derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax

FEATURES, CLASSES, BLOCK = 4, 7, 3
# Sums in another order: a few units in the last place of the largest entry.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, e, **CLOSE)


def distillation(params, rows):
    """A student's head against a teacher's, per row: two arrays of logits."""
    student = jsoftmax.log_softmax(rows["h"] @ params["student"], temperature=params["temperature"])
    teacher = jsoftmax.softmax(rows["h"] @ params["teacher"], temperature=params["temperature"])
    return rows["weight"] * jsoftmax.kl_divergence(student, teacher) * params["temperature"] ** 2


def summed(params, rows):
    return distillation(params, rows).sum()


def several(params, rows):
    """Results of every kind: per row, summed, and integers."""
    each = distillation(params, rows)
    return {"each": each, "total": each.sum(), "best": jnp.argmax(rows["h"] @ params["student"], axis=-1)}


def inputs(count):
    random = np.random.default_rng(count)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    params = {
        "student": normal(FEATURES, CLASSES),
        "teacher": normal(FEATURES, CLASSES),
        "temperature": jnp.float32(2.0),
        "step": jnp.int32(3),  # an integer leaf has no derivative and must not get in the way
    }
    rows = {"h": normal(count, FEATURES), "weight": jnp.asarray(random.uniform(size=count), jnp.float32)}
    return params, rows


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
# Below the block, above it, ragged; the block, two of it.
@pytest.mark.parametrize("count", [1, 4, 11, *(pytest.param(count, marks=pytest.mark.slow) for count in (3, 6))])
@pytest.mark.parametrize("loss", [summed, distillation], ids=["sum", "per row"])
def test_value_and_gradients_equal_the_unblocked_loss(loss, count, derivative):
    params, rows = inputs(count)
    cotangent = jnp.linspace(0.5, 2.0, count)
    blocked = jsoftmax.blockwise(loss, block_size=BLOCK, derivative=derivative)

    def scalar(function):
        def total(params, rows):
            out = function(params, rows)
            return out * 3 if out.ndim == 0 else jnp.sum(out * cotangent)

        return jax.jit(jax.value_and_grad(total, (0, 1), allow_int=True))(params, rows)

    close(scalar(blocked), scalar(loss))


@pytest.mark.parametrize("count", [BLOCK, 3 * BLOCK, 3 * BLOCK + 1])
def test_the_first_block_apart(count, monkeypatch):
    """As on accelerators, where the first block's gradients start the sums in place of zeros."""

    def each(params, rows):
        return rows["weight"] * jnp.sum(jnp.tanh(rows["h"] @ params["student"]), axis=-1)

    def results(transform):
        params, rows = inputs(count)
        params = {"student": params["student"]}
        total, pull = jax.vjp(transform(lambda params, rows: each(params, rows).sum()), params, rows)
        every, pull_each = jax.vjp(transform(each), params, rows)
        return total, pull(jnp.float32(3)), every, pull_each(jnp.linspace(0.5, 2.0, count))

    expected = results(lambda loss: loss)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    close(results(lambda loss: jsoftmax.blockwise(loss, block_size=BLOCK)), expected)


def test_results_of_every_kind():
    params, rows = inputs(8)
    blocked = jsoftmax.blockwise(several, block_size=BLOCK)
    close(blocked(params, rows), several(params, rows))

    def mixed(function):
        out = function(params, rows)
        return jnp.sum(out["each"] ** 2) + out["total"]

    def at(function):
        return jax.grad(lambda w: mixed(lambda p, r: function({**p, "student": w}, r)))(params["student"])

    close(at(blocked), at(several))


def test_no_rows():
    params, rows = inputs(3)
    nothing = jax.tree.map(lambda leaf: leaf[:0], rows)
    assert jsoftmax.blockwise(summed, block_size=BLOCK)(params, nothing) == 0
    assert jsoftmax.blockwise(distillation, block_size=BLOCK)(params, nothing).shape == (0,)


@pytest.mark.parametrize("loss", [summed, distillation], ids=["sum", "per row"])
def test_forward_over_reverse(loss):
    params, rows = inputs(5)
    blocked = jsoftmax.blockwise(loss, block_size=BLOCK)

    def hessian(function):
        def total(w):
            return jnp.sum(function({**params, "student": w}, rows))

        return jax.jit(jax.jacfwd(jax.grad(total)))(params["student"])

    close(hessian(blocked), hessian(loss))


def test_every_mode_with_derivative_jvp():
    params, rows = inputs(5)

    def of(function):
        def total(w):
            return jnp.sum(function({**params, "student": w}, rows))

        @jax.jit
        def modes(at):
            return (
                jax.jvp(total, (at,), (jnp.ones_like(at),)),
                jax.jacfwd(total)(at),
                jax.linearize(total, at)[1](at),
                jax.jacrev(jax.jacfwd(total))(at),
            )

        return modes(params["student"])

    close(of(jsoftmax.blockwise(distillation, block_size=BLOCK, derivative="jvp")), of(distillation))


def test_jit_vmap_scan_and_remat():
    params, rows = inputs(6)
    blocked = jsoftmax.blockwise(summed, block_size=4)
    weights = jnp.stack([rows["weight"], 2 * rows["weight"]])
    each = jax.jit(jax.vmap(lambda weight: blocked(params, {**rows, "weight": weight})))(weights)
    one = summed(params, rows)
    close(each, jnp.stack([one, 2 * one]))
    total, _ = jax.lax.scan(
        lambda total, weight: (total + blocked(params, {**rows, "weight": weight}), None), 0.0, weights
    )
    close(total, 3 * one)
    gradient = jax.grad(lambda w: jax.checkpoint(blocked)({**params, "student": w}, rows))(params["student"])
    close(gradient, jax.grad(lambda w: summed({**params, "student": w}, rows))(params["student"]))


def test_gradients_of_narrow_parameters_add_up_in_float32():
    """256 blocks of 2⁻⁸ are 1; added in bfloat16, the sum would stop at 2⁻⁸ · 256 only by luck and at 0.5 for 2⁻⁹."""
    params, rows = {"w": jnp.ones((), jnp.bfloat16)}, {"x": jnp.full((512, 1), 2.0**-9, jnp.bfloat16)}

    def loss(params, rows):
        return jnp.sum((rows["x"] * params["w"]).astype(jnp.float32))

    gradient = jax.grad(jsoftmax.blockwise(loss, block_size=1))(params, rows)["w"]
    assert gradient.dtype == jnp.bfloat16
    assert gradient == 1.0
    in_bfloat16, _ = jax.lax.scan(lambda total, x: (total + x, None), jnp.bfloat16(0), rows["x"][:, 0])
    assert in_bfloat16 != 1.0  # the check can fail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"derivative": "both"}, "derivative must be one of 'vjp', 'jvp', got 'both'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        jsoftmax.blockwise(summed, **arguments)


def test_bad_rows_and_results():
    params, rows = inputs(4)
    with pytest.raises(
        ValueError, match=r"rows needs arrays with one leading axis in common, got shapes \[\(4, 4\), \(3,\)\]"
    ):
        jsoftmax.blockwise(summed)(params, {**rows, "weight": rows["weight"][:3]})
    with pytest.raises(
        ValueError, match=r"the result of loss has shape \(2,\) for 4 rows; it needs one entry a row, or a scalar"
    ):
        jsoftmax.blockwise(lambda params, rows: jnp.ones(2))(params, rows)


def test_parameters_may_hold_what_is_no_array():
    """As the activation function of an Equinox module."""
    params = {"kernel": jnp.ones((3, 4)), "activation": jnp.tanh, "name": "head", "bias": None, "scale": 2.0}

    def loss(params, rows):
        assert params["name"] == "head"
        return jnp.sum(params["activation"](rows @ params["kernel"]) * params["scale"])

    rows = jnp.linspace(0.0, 1.0, 15).reshape(5, 3)
    value, gradient = jax.value_and_grad(
        lambda kernel: jsoftmax.blockwise(loss, block_size=2)({**params, "kernel": kernel}, rows)
    )(params["kernel"])
    wanted = jax.value_and_grad(lambda kernel: loss({**params, "kernel": kernel}, rows))(params["kernel"])
    np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted[1], rtol=1e-6)
