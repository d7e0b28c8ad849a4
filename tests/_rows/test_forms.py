"""The forms of the row state that can be forced: the same two numbers from each, whatever a row holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from jsoftmax._rows.forms import cpu
from jsoftmax._rows.logits import Transform
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.state import row_state

pytestmark = pytest.mark.exact

FORMS, DTYPES = ["cpu", "gpu", "tpu"], ["float32", "bfloat16", "float16"]
# On and off multiples of the GPU form's 4 and 16 slices, and below both.
SIZES = [1, 2, 3, 4, 5, 15, 16, 17, 35, 67, 289]


def rows_of_all_kinds(classes, dtype):
    """Normal logits, ties, many masks, nothing but one class, the ends of what is finite, and no distribution."""
    rng = np.random.default_rng(classes)
    lowest = float(jnp.finfo(dtype).min)
    z = rng.normal(size=(10, classes)) * 3
    z[1] = 2.5
    z[2, :-1][rng.random(classes - 1) < 0.7] = -np.inf
    z[3, 1:] = -np.inf
    z[4] = np.where(rng.random(classes) < 0.5, lowest, -np.inf)
    z[4, -1] = lowest
    z[5, :-1], z[5, -1] = lowest, -lowest
    z[6] = np.where(np.arange(classes) == classes // 2, 87.5, 0)  # no term of the sum is a normal float32
    z[7] = -np.inf
    z[8, classes // 2] = np.inf
    z[9, classes // 3] = np.nan
    return jnp.asarray(z, dtype)


def assert_state_is_right(state_of, classes, dtype):
    logits = rows_of_all_kinds(classes, dtype)
    maximum, others, _ = (np.asarray(number, float) for number in state_of(logits))
    z = np.sort(np.asarray(logits, float)[:7])
    top = z[:, -1:]
    expected = np.exp(z[:, :-1] - top).sum(axis=-1)
    np.testing.assert_array_equal(maximum[:7], top[:, 0])
    np.testing.assert_allclose(others[:7], expected, rtol=20 * 2.0**-24, atol=1.2e-38, err_msg=str(classes))
    # Of longer rows, XLA's library for CPUs gives the maximum of what stands behind a NaN.
    assert np.all(np.isnan(maximum[7:] if classes < 1000 else [*maximum[7:9], others[9]]))


@pytest.mark.parametrize("dtype", [*DTYPES[:2], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[2:])])
@pytest.mark.parametrize("form", FORMS)
def test_state_of_any_row(form, dtype):
    state_of = jax.jit(lambda logits: row_state(Rows(logits), form))
    for classes in SIZES:
        assert_state_is_right(state_of, classes, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_no_batch(form):
    """Of logits log 1, …, log n the others' sum is (1 + … + (n − 1)) / n."""
    state_of = jax.jit(lambda logits: row_state(Rows(logits), form))
    for classes in (1, 16, 35):
        maximum, others, _ = state_of(jnp.log(jnp.arange(1.0, classes + 1)))
        assert maximum.shape == others.shape == ()
        np.testing.assert_allclose(others, (classes - 1) / 2, rtol=1e-6)


def test_labels_of_more_classes_than_float32_tells_apart():
    classes = 2**24 + 2
    labels = np.array([[classes - 1]], np.int32)
    placed = jax.jit(cpu.place_label)(jnp.zeros((1, classes), jnp.int8), jnp.ones((1, 1), jnp.int8), labels)
    np.testing.assert_array_equal(np.flatnonzero(placed), [classes - 1])


def assert_rounded_once(found, expected):
    info = jnp.finfo(found.dtype)
    half_a_place = 0.51 * float(info.eps), 0.51 * float(info.smallest_subnormal)
    np.testing.assert_allclose(np.asarray(found, float), expected, rtol=half_a_place[0], atol=half_a_place[1])


@pytest.fixture
def three_at_once(monkeypatch):
    """On CPUs, rows take turns, three at a time, the last ones some of those before them."""
    monkeypatch.setattr(cpu, "CACHED", 1)
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_of_rows_in_turns(dtype, three_at_once):
    state_of = jax.jit(lambda logits: row_state(Rows(logits), "cpu", alone=True))
    assert "while" in state_of.lower(rows_of_all_kinds(67, dtype)).as_text()
    for classes in (1, 35, 67, 72, 289, 1009):
        assert_state_is_right(state_of, classes, dtype)


def test_prime_number_of_classes_with_a_gradient(three_at_once):
    """A second sum would write the exponentials again."""
    state_of = jax.jit(lambda logits: row_state(Rows(logits), "cpu"))
    assert "while" in state_of.lower(rows_of_all_kinds(67, "float32")).as_text()
    assert "while" not in state_of.lower(rows_of_all_kinds(72, "float32")).as_text()
    for classes in (65, 67, 72, 289):
        assert_state_is_right(state_of, classes, "float32")


@pytest.mark.parametrize(
    ("classes", "blocks"), [(72, 2), (65, 5), (1000, 8), (289, 17), (32_000, 160), (50_257, 29), (1_000_003, 1)]
)
def test_blocks_divide_the_classes(classes, blocks):
    """As many as there are classes in each, of at least 120 if there are two such; more if that does not divide."""
    assert cpu._block_count(classes) == blocks
    assert classes % blocks == 0


@pytest.mark.parametrize(("classes", "apart"), [(997, 0), (1000, 0), (1009, 113), (21_841, 81), (1_000_003, 67)])
def test_classes_apart_from_blocks(classes, apart):
    """ImageNet-21k's number of classes is prime."""
    assert cpu._classes_apart(classes) == apart
    assert not apart or cpu._block_count(classes - apart) > 1


@jax.jit
def state_alone(logits):
    return row_state(Rows(logits), "cpu", alone=True)


@pytest.mark.parametrize("top", [0, 895, 896, 1008])
@pytest.mark.parametrize("others", ["near a unit in blocks", "near a unit apart", "tiny", "one tie"])
def test_sums_of_blocks_and_classes_apart(top, others):
    """With the largest class in either, and others that come near to one in either or are lost beside it."""
    terms = np.full(1009, 2.0**-70)
    if others == "tiny":
        terms[:] = 2.0**-40
    elif others == "one tie":
        terms[5] = 1
    else:
        part = slice(0, 896) if "blocks" in others else slice(896, 1009)
        terms[part] = 0.9995 / (part.stop - part.start)
    terms[top] = 1
    logits = jnp.asarray(np.log(terms), jnp.float32)[None]
    expected = np.delete(np.exp(np.asarray(logits, float)[0]), top).sum()
    _, others_sum, _ = state_alone(logits)
    np.testing.assert_allclose(others_sum, [expected], rtol=2e-6)


@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)])
def test_values_in_turns_in_any_layout(dtype, three_at_once):
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(8, 5, 71)) * 3, dtype), rng.integers(0, 71, (8, 5))
    where = rng.random(logits.shape) < 0.8
    where[np.arange(8)[:, None], np.arange(5), labels] = True
    z = np.where(where, np.asarray(logits, float), -np.inf)
    expected = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, labels[..., None], -1)[..., 0]
    where[2, 3], expected[2, 3] = False, 0

    def loss(z, y, where):
        return jsoftmax.softmax_cross_entropy_with_integer_labels(z, y, where=where)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(loss, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    for function in (loss, jax.vmap(loss), jax.checkpoint(loss), split):
        value = jax.jit(function)(logits, labels, where)
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [DTYPES[1], pytest.param(DTYPES[2], marks=pytest.mark.slow)])
def test_gradients_in_turns_in_any_layout(dtype, three_at_once):
    """In 16 bits, for which exponentials are computed twice: ŷ − y, rounded once. One label is no class."""
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(8, 5, 71)) * 3, dtype), rng.integers(0, 71, (8, 5))
    labels[1, 2] = 71
    power = np.exp(np.asarray(logits, float))
    expected = power / power.sum(-1, keepdims=True) - np.eye(72)[labels][..., :-1]
    expected[1, 2] = np.nan

    def gradient(z, y):
        return jax.grad(lambda z: jsoftmax.softmax_cross_entropy_with_integer_labels(z, y).sum())(z)

    assert "while" in jax.jit(gradient).lower(logits, labels).as_text()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.shard_map(gradient, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    here, placed = (logits, labels), jax.device_put((logits, labels), jax.NamedSharding(mesh, jax.P("data")))
    for function, arguments in ((gradient, here), (jax.vmap(gradient), here), (split, placed), (gradient, placed)):
        found = jax.jit(function)(*arguments)
        assert found.dtype == dtype
        assert_rounded_once(found, expected)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bits_in_turns(dtype, three_at_once):
    """The loss and the gradient of the same numbers in float32, which is rounded once."""
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(size=(8, 35)) * 3, dtype), jnp.arange(8)
    loss = jax.jit(jax.value_and_grad(lambda z: jsoftmax.softmax_cross_entropy_with_integer_labels(z, labels).sum()))
    assert "while" in loss.lower(logits).as_text()
    (value, slope), (expected, wide) = loss(logits), loss(logits.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_rounded_once(slope, wide)


@pytest.mark.parametrize("form", FORMS)
def test_a_temperature_makes_differences_inexact(form):
    """Quotients of 16-bit logits have all the bits of float32: the rounding errors of their differences count."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(64, 12)), "bfloat16").at[:, 3].set(60)
    temperature = jnp.linspace(0.7, 0.9, 64)[:, None]
    _, others, _ = jax.jit(lambda rows: row_state(rows, form))(
        Rows(logits, transform=Transform(temperature=temperature))
    )
    z = np.asarray(logits.astype(jnp.float32) / temperature, float)
    expected = np.exp(np.delete(z, 3, axis=-1) - z[:, 3:4]).sum(axis=-1)
    np.testing.assert_allclose(others, expected, rtol=20 * 2.0**-24)


@pytest.mark.parametrize("form", FORMS)
def test_a_soft_cap_in_a_gradient(form):
    """Computed anew on GPUs, where it would be an array as large as the logits; derivatives are what they were."""
    rng = np.random.default_rng(0)
    logits, along = (jnp.asarray(rng.normal(size=(6, 11)) * 5, jnp.float32) for _ in range(2))
    labels = np.arange(6)

    def ours(z):
        losses = jsoftmax.softmax_cross_entropy_with_integer_labels(z, labels, softcap=4.0, implementation=form)
        return losses.sum()

    def plain(z):
        return -jax.nn.log_softmax(4 * jnp.tanh(z / 4))[np.arange(6), labels].sum()

    program = jax.jit(lambda z, along: jax.jvp(jax.grad(ours), (z,), (along,)))
    expected = jax.jit(lambda z, along: jax.jvp(jax.grad(plain), (z,), (along,)))(logits, along)
    for found, wanted in zip(program(logits, along), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    text = jax.jit(jax.grad(ours)).lower(logits).as_text()
    assert ("optimization_barrier" in text) == (form == "gpu")
