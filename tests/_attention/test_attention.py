"""Attention: both forms against jax.nn and float64, what is never read, derivative modes, and what is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jsoftmax
from jsoftmax.testing import float64

FORMS = {
    "plain": {"implementation": "plain"},
    "blockwise": {"implementation": "blockwise", "block_size": 4},
    "blockwise, every mode": {"implementation": "blockwise", "block_size": 4, "derivative": "jvp"},
}
by_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
EPS = float(jnp.finfo(jnp.float32).eps)


def inputs(batch=(2,), queries=6, keys=7, heads=4, groups=2, width=8, dtype=jnp.float32):
    """Neither length is a multiple of the block."""
    random = np.random.default_rng(queries * 100 + keys)
    arrays = {
        "query": random.normal(size=(*batch, queries, heads, width)),
        "key": random.normal(size=(*batch, keys, groups, width)),
        "value": random.normal(size=(*batch, keys, groups, width)),
    }
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def textbook(query, key, value, bias=None, mask=None, scale=None, softcap=None, temperature=1.0, window=(None, None)):
    """With every weight in memory and heads repeated; no row is fully masked. In float64."""
    repeats = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(array, repeats, axis=-2) for array in (key, value))
    z = jnp.einsum("btnh,bsnh->bnts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    z = (z if bias is None else z + jnp.broadcast_to(bias, z.shape)) / temperature
    offset = np.arange(z.shape[-1]) - np.arange(z.shape[-2])[:, None]
    left, right = window
    seen = (offset >= (-np.inf if left is None else -left)) & (offset <= (np.inf if right is None else right))
    seen = jnp.broadcast_to(seen, z.shape) & jnp.broadcast_to(True if mask is None else mask, z.shape)
    weights = jax.nn.softmax(jnp.where(seen, z, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def value_and_gradients(attend, arrays, **options):
    """A sum that asks every output something else, and its gradient by all arrays."""

    @jax.jit
    def run(arrays):
        def scalar(arrays):
            out = attend(**arrays, **options)
            dtype = jnp.float64 if out.dtype == jnp.float64 else jnp.float32
            return jnp.sum(out.astype(dtype) * jnp.sin(jnp.arange(out.size, dtype=dtype)).reshape(out.shape)), out

        return jax.grad(scalar, has_aux=True)(arrays)

    return run(arrays)


def in_float64(arrays, **options):
    with float64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        return jax.tree.map(np.asarray, value_and_gradients(textbook, wide, **options))


def assert_close(actual, expected, eps=EPS):
    """To rounding of the largest entry, or of 1, the size of the terms that an entry is the sum of."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=8 * eps * max(np.abs(e).max(), 1))


GRID = {
    "grouped, bias": {"bias": (2, 4, 6, 7)},
    "one head of keys, shared bias, causal": {"groups": 1, "bias": (1, 4, 1, 7), "is_causal": True},
    "as many heads, scale, mask": {"groups": 4, "scale": 0.5, "mask": (2, 1, 6, 7)},
    "lengths, window": {"key_value_seq_lengths": np.array([5, 7], np.int32), "local_window_size": (2, 1)},
}


@by_form
@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_equals_jax_nn(case, form):
    check_against_jax_nn(case, jnp.float32, form)


@pytest.mark.parametrize("name", ["plain", "blockwise"])
@pytest.mark.parametrize("case", list(GRID.values())[1:3], ids=list(GRID.keys())[1:3])
def test_equals_jax_nn_in_bfloat16(case, name):
    check_against_jax_nn(case, jnp.bfloat16, FORMS[name])


def check_against_jax_nn(case, dtype, form):
    """Where every query sees a key. jax.nn gets the narrow numbers in float32: its rounding is not ours."""
    case = dict(case)
    arrays = inputs(groups=case.pop("groups", 2), dtype=dtype)
    random = np.random.default_rng(0)
    if "bias" in case:
        arrays["bias"] = jnp.asarray(random.normal(size=case.pop("bias")), jnp.float32)
    if "mask" in case:
        case["mask"] = jnp.asarray(random.uniform(size=case.pop("mask")) < 0.5).at[..., 2].set(True)
    actual = value_and_gradients(functools.partial(jsoftmax.dot_product_attention, **form), arrays, **case)
    assert actual[1].dtype == dtype
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
        expected = value_and_gradients(jax.nn.dot_product_attention, wide, **case)
    assert_close(actual, expected, eps=float(jnp.finfo(dtype).eps) * (1 if dtype == jnp.bfloat16 else 2))


@pytest.mark.parametrize("form", [FORMS["plain"], FORMS["blockwise"]], ids=["plain", "blockwise"])
def test_float16(form):
    arrays = inputs(dtype=jnp.float16)
    actual = value_and_gradients(functools.partial(jsoftmax.dot_product_attention, **form), arrays, is_causal=True)
    assert_close(actual, in_float64(arrays, window=(None, 0)), eps=float(jnp.finfo(jnp.float16).eps))


@by_form
def test_every_option_and_its_derivative_against_float64(form):
    """Scale, cap and temperature are differentiated as well, and the bias is cut after the cap."""
    arrays = inputs()
    arrays["bias"] = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 6, 7)), jnp.float32)
    arrays |= {"scale": jnp.float32(0.6), "softcap": jnp.float32(1.5), "temperature": jnp.float32(0.7)}
    attend = functools.partial(jsoftmax.dot_product_attention, is_causal=True, **form)
    # Derivatives by one number are sums over all 336 pairs, whose terms cancel.
    assert_close(value_and_gradients(attend, arrays), in_float64(arrays, window=(None, 0)), eps=4 * EPS)


@by_form
def test_float64(x64, form):
    arrays = inputs(dtype=jnp.float64)
    actual = value_and_gradients(functools.partial(jsoftmax.dot_product_attention, **form), arrays)
    assert actual[1].dtype == jnp.float64
    assert_close(actual, value_and_gradients(textbook, arrays), eps=2.0**-52)


@pytest.mark.parametrize("block_size", [1, 100, 333, 4096])
def test_blocks_of_any_size_at_length_1000(block_size):
    arrays = inputs(batch=(1,), queries=1000, keys=1000, heads=1, groups=1)
    options = {"is_causal": True, "softcap": 3.0}
    if block_size == 1:
        arrays = jax.tree.map(lambda x: x[:, :9], arrays)
    ours = functools.partial(jsoftmax.dot_product_attention, **options)
    plain = value_and_gradients(functools.partial(ours, implementation="plain"), arrays)
    blocks = value_and_gradients(functools.partial(ours, implementation="blockwise", block_size=block_size), arrays)
    assert_close(blocks, plain, eps=4 * EPS)
    assert_close(blocks, in_float64(arrays, softcap=3.0, window=(None, 0)), eps=4 * EPS)


@pytest.mark.parametrize(("window", "is_causal"), [((3, 0), False), ((1, 2), True), ((0, 0), False), ((0, 9), False)])
def test_windows_skip_what_is_not_seen(window, is_causal):
    arrays = inputs(queries=13, keys=13)
    left, right = window
    attend = functools.partial(jsoftmax.dot_product_attention, **FORMS["blockwise"])
    actual = value_and_gradients(attend, arrays, local_window_size=window, is_causal=is_causal)
    assert_close(actual, in_float64(arrays, window=(left, 0 if is_causal else right)), eps=2 * EPS)


@by_form
def test_what_is_not_seen_is_not_read(form):
    """Padding that holds NaN: keys that no query sees, queries that see no key, masked entries of the bias."""
    arrays = inputs()
    mask = jnp.ones((2, 1, 6, 7), bool).at[:, :, :, 5:].set(False).at[1, :, 4:].set(False)
    arrays["bias"] = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 6, 7)), jnp.float32)
    dirty = {
        "query": arrays["query"].at[1, 4:].set(jnp.nan),
        "key": arrays["key"].at[:, 5:].set(jnp.nan),
        "value": arrays["value"].at[:, 5:].set(jnp.nan),
        "bias": jnp.where(mask, arrays["bias"], jnp.nan),
    }
    attend = functools.partial(jsoftmax.dot_product_attention, mask=mask, **form)
    gradients, output = value_and_gradients(attend, dirty)
    clean_gradients, clean_output = value_and_gradients(attend, arrays)
    assert_close((gradients, output), (clean_gradients, clean_output))
    np.testing.assert_array_equal(output[1, 4:], 0)
    np.testing.assert_array_equal(gradients["query"][1, 4:], 0)
    for name in ("key", "value"):
        np.testing.assert_array_equal(gradients[name][:, 5:], 0)
    np.testing.assert_array_equal(gradients["bias"][~jnp.broadcast_to(mask, (2, 4, 6, 7))], 0)
    # The rows that do see something are those of the sequences without their padding.
    first = {name: array[:1, :5] if name in ("key", "value") else array[:1] for name, array in arrays.items()}
    np.testing.assert_allclose(
        output[:1],
        np.asarray(in_float64({**first, "bias": first["bias"][..., :5]})[1], np.float32),
        atol=8 * EPS,
    )


@by_form
def test_a_query_that_sees_no_key_gives_zero(form):
    """jax.nn gives the mean of all values there, and a gradient to each."""
    arrays = inputs(batch=(1,))
    mask = jnp.zeros((1, 1, 6, 7), bool)
    gradients, output = value_and_gradients(
        functools.partial(jsoftmax.dot_product_attention, **form), arrays, mask=mask
    )
    for array in jax.tree.leaves((gradients, output)):
        np.testing.assert_array_equal(array, 0)
    theirs = jax.nn.dot_product_attention(**jax.tree.map(lambda x: x[:, :, :2], arrays), mask=mask)
    mean = np.mean(arrays["value"][0], axis=0)
    np.testing.assert_allclose(theirs[0, 0], mean, atol=1e-6)
    ways = {
        "lengths": {"key_value_seq_lengths": jnp.array([0])},
        "queries": {"query_seq_lengths": jnp.array([0])},
        "bias": {"bias": jnp.full((1, 1, 1, 7), -jnp.inf)},
        "window": {"local_window_size": (0, 0), "mask": ~jnp.eye(6, 7, dtype=bool)},
    }
    for name, way in ways.items():
        output = jsoftmax.dot_product_attention(**arrays, **form, **way)
        np.testing.assert_array_equal(output, 0, err_msg=name)


@by_form
def test_a_nan_stays_with_the_queries_that_see_it(form):
    arrays = inputs()
    lengths = jnp.array([3, 7])
    arrays["value"] = arrays["value"].at[1, 6].set(jnp.nan)
    output = jsoftmax.dot_product_attention(**arrays, key_value_seq_lengths=lengths, **form)
    assert np.isfinite(output[0]).all()
    assert np.isnan(output[1]).all()


def test_weights():
    arrays = inputs()
    output, weights = jsoftmax.dot_product_attention(**arrays, return_weights=True, is_causal=True, temperature=2.0)
    assert weights.shape == (2, 4, 6, 7)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=4 * EPS)
    np.testing.assert_array_equal(weights[..., 0, 1:], 0)
    weighted = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(arrays["value"], 2, axis=2))
    np.testing.assert_allclose(output, weighted, atol=8 * EPS)


@by_form
def test_without_a_batch(form):
    arrays = inputs(batch=(1,))
    bias = jnp.asarray(np.random.default_rng(3).normal(size=(4, 6, 7)), jnp.float32)
    mask = jnp.tril(jnp.ones((6, 7), bool))
    batched = jsoftmax.dot_product_attention(**arrays, bias=bias, mask=mask, **form)
    single = jax.tree.map(lambda x: x[0], arrays)
    np.testing.assert_array_equal(jsoftmax.dot_product_attention(**single, bias=bias, mask=mask, **form), batched[0])
    lengths = jsoftmax.dot_product_attention(**single, key_value_seq_lengths=jnp.int32(3), **form)
    shorter = {name: x if name == "query" else x[:3] for name, x in single.items()}
    np.testing.assert_allclose(lengths, jsoftmax.dot_product_attention(**shorter, **form), atol=4 * EPS)


@by_form
def test_empty(form):
    for sizes in ({"batch": (0,)}, {"queries": 0}, {"keys": 0}):
        arrays = inputs(**sizes)
        output = jsoftmax.dot_product_attention(**arrays, **form)
        assert output.shape == arrays["query"].shape
        np.testing.assert_array_equal(output, 0)


@by_form
def test_vmap(form):
    arrays = inputs(batch=(2,))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), arrays)

    def gradient(arrays):
        attend = functools.partial(jsoftmax.dot_product_attention, is_causal=True, **form)
        return jax.grad(lambda arrays: jnp.sum(jnp.sin(attend(**arrays))))(arrays)

    one_by_one = jax.jit(functools.partial(jax.lax.map, gradient))
    assert_close(jax.jit(jax.vmap(gradient))(stacked), one_by_one(stacked))


def second_order(attend, reverse_over_forward, arrays):
    """The second derivative along a direction: of the gradient, or the gradient of the derivative."""
    along = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), arrays)

    @jax.jit
    def run(arrays):
        def total(arrays):
            return jnp.sum(attend(**arrays) ** 3)

        if reverse_over_forward:
            return jax.grad(lambda arrays: jax.jvp(total, (arrays,), (along,))[1])(arrays)
        return jax.jvp(jax.grad(total), (arrays,), (along,))[1]

    return run(arrays)


@pytest.mark.parametrize(
    ("name", "reverse_over_forward"),
    [("plain", False), ("plain", True), ("blockwise", False), ("blockwise, every mode", True)],
)
def test_second_order(name, reverse_over_forward):
    arrays = inputs(batch=(1,), queries=5, keys=6, heads=2, groups=1, width=2)
    ours = functools.partial(jsoftmax.dot_product_attention, is_causal=True, softcap=2.0, **FORMS[name])
    actual = second_order(ours, reverse_over_forward, arrays)
    with float64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        expected = second_order(functools.partial(textbook, window=(None, 0), softcap=2.0), False, wide)
    assert_close(actual, expected, eps=8 * EPS)


@pytest.mark.parametrize("name", ["plain", "blockwise, every mode"])
def test_forward_mode(x64, name):
    arrays = tuple(inputs(batch=(1,), queries=5, keys=6, heads=2, groups=1, width=2, dtype=jnp.float64).values())
    attend = jax.jit(functools.partial(jsoftmax.dot_product_attention, is_causal=True, **FORMS[name]))
    check_grads(attend, arrays, order=1, modes=("fwd",), atol=1e-6, rtol=1e-6, eps=1e-5)


def compiled(length, **options):
    shape = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
    attend = functools.partial(jsoftmax.dot_product_attention, **options)
    gradients = jax.value_and_grad(lambda *arrays: jnp.sum(attend(*arrays)), (0, 1, 2))
    return jax.jit(gradients).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.exact
@pytest.mark.parametrize("derivative", ["vjp", pytest.param("jvp", marks=pytest.mark.slow)])
def test_memory_is_linear_in_the_length(derivative):
    """Compiled only. At 16,384, the weights of 8 heads would take 8.6 GB."""
    short, long = (compiled(length, is_causal=True, derivative=derivative) for length in (8192, 16384))
    one = 4 * 16384 * 8 * 64  # bytes of the query, 34 MB
    assert long <= 2.1 * short
    assert long <= 14 * one
    assert compiled(2048, implementation="plain") >= 4 * 8 * 2048**2


def test_the_form_is_chosen_by_what_the_weights_take():
    def is_plain(length, **options):
        shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        text = str(jax.make_jaxpr(functools.partial(jsoftmax.dot_product_attention, **options))(shape, shape, shape))
        return "scan" not in text

    assert is_plain(1448)  # 1448² · 4 = 8 MiB
    assert not is_plain(1449)
    assert is_plain(1449, return_weights=True)
    assert not is_plain(16, implementation="blockwise")


def test_cudnn_is_handed_what_it_gets_right(monkeypatch):
    arrays = inputs(dtype=jnp.bfloat16)
    call = functools.partial(jsoftmax.dot_product_attention, **arrays, implementation="cudnn")
    mask = jnp.ones((6, 7), bool)
    for options in ({"mask": mask}, {"softcap": 2.0}, {"temperature": 2.0}, {"return_weights": True}):
        with pytest.raises(ValueError, match=rf"takes no option but scale and is_causal, got {next(iter(options))}"):
            call(**options)
    with pytest.raises(ValueError, match="needs float16 or bfloat16, got query of dtype float32"):
        jsoftmax.dot_product_attention(**inputs(), implementation="cudnn")
    handed = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: handed.update(options) or q)
    call(is_causal=True, scale=0.5)
    assert handed == {"scale": 0.5, "is_causal": True, "implementation": "cudnn"}


SHAPE = (2, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": jnp.zeros((2, 3))}, ValueError, r"query has shape \(2, 3\), but needs \(batch, length, heads"),
        ({"query": jnp.zeros(SHAPE, int)}, TypeError, "query must hold floating-point numbers, got dtype int32"),
        ({"key": jnp.zeros(SHAPE, jnp.bfloat16)}, TypeError, "key has dtype bfloat16, but needs that of query"),
        ({"key": jnp.zeros((2, 3, 4, 7))}, ValueError, r"key has shape \(2, 3, 4, 7\) and query \(2, 3, 4, 8\)"),
        ({"query": jnp.zeros((2, 3, 6, 8))}, ValueError, "query has 6 heads, but needs a multiple of the 4 of key"),
        ({"value": jnp.zeros((2, 5, 4, 8))}, ValueError, r"value has shape \(2, 5, 4, 8\), but needs \(2, 3, 4, 8\)"),
        (
            {"bias": jnp.zeros((3, 4))},
            ValueError,
            r"bias has shape \(3, 4\), but needs one that broadcasts to \(2, 4, 3",
        ),
        ({"mask": jnp.zeros((3, 3))}, TypeError, "mask must be boolean"),
        ({"softcap": 0.0}, ValueError, "softcap must be at least 1.17549e-38, got 0.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be at least 1.17549e-38, got 0.0"),
        ({"temperature": jnp.ones(2)}, ValueError, r"temperature has shape \(2,\), but needs \(\): one number"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"derivative": "both"}, ValueError, "derivative must be one of 'vjp', 'jvp', got 'both'"),
        ({"implementation": "xla"}, ValueError, "implementation must be one of None, 'plain', 'blockwise', 'cudnn'"),
        ({"implementation": "blockwise", "return_weights": True}, ValueError, "needs implementation='plain'"),
        ({"key_value_seq_lengths": jnp.array([3])}, ValueError, r"key_value_seq_lengths has shape \(1,\)"),
        ({"query_seq_lengths": jnp.array([3.0, 1.0])}, TypeError, "query_seq_lengths must hold integer"),
        ({"local_window_size": (-1, 2)}, ValueError, r"local_window_size must not be negative, got \(-1, 2\)"),
    ],
)
def test_bad_input(change, error, message):
    good = {name: jnp.zeros(SHAPE) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        jsoftmax.dot_product_attention(**{**good, **change})
