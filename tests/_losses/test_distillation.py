"""Distillation and Jensen–Shannon divergence: against mpmath, closed forms and PyTorch, and in blocks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from oracle import FIFTY_DIGITS, MP, exact, ulps, widen

import jsoftmax
from jsoftmax.testing import float64

EPS = float(jnp.finfo(jnp.float32).eps)
STUDENT = [[2.0, -1.0, 0.5, 3.0], [0.25, 0.0, -4.0, 1.5], [1.0, 1.0, 1.0, -2.0]]
TEACHER = [[1.5, -0.5, 0.0, 4.0], [-1.0, 2.0, 0.5, 0.25], [1.0, 0.75, 1.25, -2.0]]
# PyTorch 2.13.0 in float64, from student (requiring grad) and teacher as above:
#     each = T * T * torch.nn.functional.kl_div(torch.log_softmax(student / T, -1),
#         torch.log_softmax(teacher / T, -1), reduction="none", log_target=True).sum(-1)
#     torch.autograd.grad(each.sum(), student)
PYTORCH = {
    1.0: (
        [0.137883059674, 1.42864831106, 0.0201879371758],
        [
            [0.1767012609, 0.002479701156, 0.03942738065, -0.2186083427],
            [0.1548573327, -0.543827525, -0.1515350084, 0.5405052007],
            [0.006618294796, 0.07768373013, -0.08463153042, 0.0003295054955],
        ],
    ),
    4.0: (
        [0.244632602243, 2.48850740703, 0.0179864655573],
        [
            [0.200486501, -0.03423679887, 0.1377922227, -0.3040419248],
            [0.4218043033, -0.3968956843, -0.6014467446, 0.5765381256],
            [0.001294857032, 0.07100965614, -0.07291616032, 0.0006116471523],
        ],
    ),
    0.5: (
        [0.0261941865035, 0.769601323648, 0.019590971977],
        [
            [0.055887528, 8.555851582e-05, 0.002782476177, -0.05875556269],
            [0.0351152287, -0.4399165499, -0.02298974034, 0.4277910615],
            [0.01304799912, 0.07343809557, -0.08651843745, 3.234275621e-05],
        ],
    ),
}
# The same way: the mean of kl_div(m, log p) and kl_div(m, log q) with m = ((p + q) / 2).log().
PYTORCH_JENSEN_SHANNON = [0.0387441291014, 0.27576104986, 0.00505906051642]

loss, jensen_shannon = jsoftmax.distillation_loss, jsoftmax.jensen_shannon_divergence


def arrays(*rows, dtype=jnp.float32):
    return tuple(jnp.asarray(row, dtype) for row in rows)


@pytest.mark.parametrize("temperature", PYTORCH)
def test_equals_pytorch(temperature):
    student, teacher = arrays(STUDENT, TEACHER)
    losses, gradient = PYTORCH[temperature]
    np.testing.assert_allclose(loss(student, teacher, temperature=temperature), losses, rtol=8 * EPS)
    actual = jax.grad(lambda s: jnp.sum(loss(s, teacher, temperature=temperature)))(student)
    np.testing.assert_allclose(actual, gradient, rtol=8 * EPS, atol=4 * EPS * np.abs(gradient).max())


def test_jensen_shannon_equals_pytorch():
    np.testing.assert_allclose(jensen_shannon(*arrays(STUDENT, TEACHER)), PYTORCH_JENSEN_SHANNON, rtol=8 * EPS)


def kl(p, q):
    return np.sum(np.where(p == 0, 0, p * FIFTY_DIGITS.log(np.where(p == 0, 1, p) / q)), axis=-1)


def pairs(scale, classes, offset, dtype):
    """A teacher and students that differ from it by about `scale`, and by a constant."""
    random = np.random.default_rng(classes)
    teacher = jnp.asarray(random.normal(size=(16, classes)) * 3, dtype)
    student = teacher + jnp.asarray(random.normal(size=(16, classes)) * scale + offset, dtype)
    return student, teacher


@jax.jit
def both_and_gradients(student, teacher, weight):
    of_student = jax.value_and_grad(lambda s: jnp.sum(loss(s, teacher)))(student)[1]
    of_first = jax.grad(lambda a: jnp.sum(jensen_shannon(a, student, weight=weight)))(teacher)
    return loss(student, teacher), of_student, jensen_shannon(teacher, student, weight=weight), of_first


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("classes", [2, 37])
def test_near_and_far_against_fifty_digits(classes, dtype, x64):
    for scale, offset in ((1e-7, 0.0), (1e-4, 0.0), (1e-4, 100.0), (1e-2, 0.0), (1.0, 100.0), (20.0, 0.0)):
        student, teacher = pairs(scale, classes, offset, dtype)
        p, q, weight = exact(teacher).p, exact(student).p, 0.25
        mixture = (1 - weight) * p + weight * q
        divergence, of_student, jensen, of_first = both_and_gradients(student, teacher, jnp.asarray(weight, dtype))
        assert ulps(divergence, kl(p, q), dtype).max() <= 16
        assert ulps(jensen, (1 - weight) * kl(p, mixture) + weight * kl(q, mixture), dtype).max() <= 24
        # Entries that are small differences are right to the last place of the row, or of what they are made of.
        assert ulps(of_student, q - p, dtype, unit=largest(q - p)).max() <= 16
        logs = FIFTY_DIGITS.log(p / mixture)
        expected = (1 - weight) * p * (logs - kl(p, mixture)[..., None])
        assert ulps(of_first, expected, dtype, unit=largest(p * logs)).max() <= 24


def largest(rows):
    """The largest entry of each row, for all of its entries."""
    size = np.abs(rows.astype(np.float64))
    return np.broadcast_to(size.max(axis=-1, keepdims=True), size.shape)


def test_the_textbook_fails_where_this_does_not():
    """The check above can fail: log-probabilities that are subtracted lose every digit of a small divergence."""
    student, teacher = pairs(1e-4, 37, 0.0, jnp.float32)
    expected = kl(exact(teacher).p, exact(student).p)
    textbook = jsoftmax.kl_divergence(jsoftmax.log_softmax(student), jsoftmax.softmax(teacher))
    assert ulps(textbook, expected, jnp.float32).max() > 1e5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits(dtype):
    student, teacher = arrays(STUDENT, TEACHER, dtype=dtype)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(loss(s, teacher)))(student)
    wide = jax.grad(lambda s: jnp.sum(loss(s, teacher.astype(jnp.float32))))(student.astype(jnp.float32))
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, wide.astype(dtype))
    np.testing.assert_allclose(value, sum(PYTORCH[1.0][0]), rtol=8 * EPS)


def test_equal_rows_are_exactly_zero():
    (teacher,) = arrays(TEACHER)
    for function in (loss, jensen_shannon):
        value, gradient = jax.value_and_grad(lambda s, f=function: jnp.sum(f(s, teacher, temperature=0.3)))(teacher)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_jensen_shannon_at_its_bounds():
    apart = arrays([[0.0, -jnp.inf, 0.0]], [[-jnp.inf, 0.0, -jnp.inf]])
    for weight in (0.5, 0.1, 0.0, 1.0):
        bound = -sum(share * np.log(share) for share in (weight, 1 - weight) if share > 0)
        np.testing.assert_allclose(jensen_shannon(*apart, weight=weight), bound, rtol=2 * EPS)
    far = arrays([[0.0, 200.0], [0.0, 1e30]], [[0.0, -200.0], [0.0, -1e30]])
    value, gradient = jax.value_and_grad(lambda a: jnp.sum(jensen_shannon(a, far[1])))(far[0])
    np.testing.assert_allclose(value, 2 * np.log(2), rtol=2 * EPS)
    np.testing.assert_allclose(gradient, 0, atol=1e-30)
    random = jnp.asarray(np.random.default_rng(0).normal(size=(2, 400, 3)) * 50, jnp.float32)
    assert (jensen_shannon(*random) <= np.float32(np.log(2))).all()
    # p − q and q − p are rounded from different sides.
    np.testing.assert_allclose(jensen_shannon(*random), jensen_shannon(random[1], random[0]), atol=16 * EPS)


@pytest.mark.parametrize("weight", [1e-30, 1e-6, 1e-4, 0.999])
def test_jensen_shannon_with_hardly_any_weight_on_one_side(weight):
    """Where p is 80 nats below such a q, neither is all of the mixture."""
    random, weight = np.random.default_rng(0), np.float32(weight)
    apart = np.array([0.0, -80.0] + 7 * [-np.inf]), np.array([0.0, 0.0] + 7 * [-np.inf])
    near_and_far = random.normal(size=(2, 64, 9)) * np.repeat([0.01, 1.0, 10.0, 40.0], 16)[:, None]
    first, second = (jnp.asarray([*rows, row], jnp.float32) for rows, row in zip(near_and_far, apart, strict=True))
    p, q, w = exact(first).p, exact(second).p, FIFTY_DIGITS.numbers(float(weight))
    mixture = (1 - w) * p + w * q
    mixture = np.where(mixture == 0, 1, mixture)
    expected = (1 - w) * kl(p, mixture) + w * kl(q, mixture)
    assert ulps(jensen_shannon(first, second, weight=weight), expected, jnp.float32).max() <= 64


def test_classes_are_on_the_last_axis_of_any_batch():
    first, second = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 5)), jnp.float32)
    each = [[jensen_shannon(first[i, j], second[i, j]) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(jensen_shannon(first, second), each, rtol=8 * EPS)


def test_labels_beside_the_teacher():
    student, teacher = arrays(STUDENT, TEACHER)
    labels, temperature, weight = jnp.array([3, 1, 0]), 4.0, 0.25

    def mixed(s):
        return jnp.sum(loss(s, teacher, labels, temperature=temperature, label_weight=weight))

    hard = jnp.sum(jsoftmax.softmax_cross_entropy_with_integer_labels(student, labels))
    np.testing.assert_allclose(mixed(student), 0.75 * sum(PYTORCH[4.0][0]) + 0.25 * hard, rtol=8 * EPS)
    expected = 0.75 * np.array(PYTORCH[4.0][1]) + 0.25 * (jsoftmax.softmax(student) - jax.nn.one_hot(labels, 4))
    np.testing.assert_allclose(jax.grad(mixed)(student), expected, atol=8 * EPS)
    dense = loss(student, teacher, jax.nn.one_hot(labels, 4), label_weight=0.25)
    np.testing.assert_allclose(dense, loss(student, teacher, labels, label_weight=0.25), rtol=4 * EPS)


@pytest.mark.parametrize("function", [loss, jensen_shannon])
def test_masks_are_never_read(function):
    """A class that is masked, by where or by −∞ in both, and rows that are masked as a whole."""
    student, teacher = arrays(STUDENT, TEACHER)
    keep = jnp.array([True, False, True, True])
    expected = function(student[:, keep], teacher[:, keep], temperature=2.0)
    dirty = student.at[:, 1].set(jnp.nan), teacher.at[:, 1].set(jnp.nan)

    def total(s, t):
        return jnp.sum(function(s, t, where=keep, temperature=2.0))

    np.testing.assert_allclose(function(*dirty, where=keep, temperature=2.0), expected, rtol=4 * EPS)
    for gradient in jax.grad(total, (0, 1))(*dirty):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:, 1], 0)
    infinite = (array.at[:, 1].set(-jnp.inf) for array in (student, teacher))
    np.testing.assert_allclose(function(*infinite, temperature=2.0), expected, rtol=4 * EPS)
    rows = jnp.array([True, False, True])
    broken = student.at[1].set(jnp.nan)
    value = function(broken, teacher, where=rows)
    assert value[1] == 0
    gradient = jax.grad(lambda s: jnp.sum(function(s, teacher, where=rows)))(broken)
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.isfinite(gradient).all()
    assert np.isnan(function(broken, teacher)).tolist() == [False, True, False]


def test_a_class_that_only_one_of_them_has():
    teacher, student = arrays([[0.0, 1.0, -jnp.inf]], [[0.5, 0.0, 1.0]])
    p, q = (exact(array) for array in (teacher[:, :2], student))
    expected = np.sum(p.p * (p.log_p - q.log_p[:, :2]), axis=-1).astype(np.float64)
    np.testing.assert_allclose(loss(student, teacher), expected, rtol=8 * EPS)
    gradient = jax.grad(lambda s: jnp.sum(loss(s, teacher)))(student)
    np.testing.assert_allclose(gradient, jsoftmax.softmax(student) - jsoftmax.softmax(teacher), atol=4 * EPS)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(loss(s, student)))(teacher)
    assert value == np.inf
    np.testing.assert_allclose(gradient, jsoftmax.softmax(teacher) - jsoftmax.softmax(student), atol=4 * EPS)


FUNCTIONS = {
    "distillation": lambda s, t, x: loss(s, t, temperature=1.5 + x),
    "with labels": lambda s, t, x: loss(s, t, jnp.array([0, 3, 2]), temperature=1.5, label_weight=0.5 + x),
    "Jensen-Shannon": lambda s, t, x: jensen_shannon(s, t, weight=0.3 + x, temperature=1.5 + x),
    "top k": lambda s, t, x: jsoftmax.top_k_distillation_loss(
        s, jsoftmax.log_softmax(t)[:, :2] - 0.1, jnp.array([[0, 1], [3, 2], [1, 0]]), temperature=1.5 + x
    ),
}


@pytest.mark.parametrize(
    "function",
    [pytest.param(f, marks=[pytest.mark.slow] * (name != "Jensen-Shannon"), id=name) for name, f in FUNCTIONS.items()],
)
def test_every_mode_and_order(function, x64):
    at = *arrays(STUDENT, TEACHER, dtype=jnp.float64), jnp.float64(0.1)
    close = {"atol": 1e-6, "rtol": 1e-6, "eps": 1e-5}
    check_grads(jax.jit(function), at, order=1, modes=("fwd", "rev"), **close)
    # Their derivatives in turn, through both modes.
    gradient = jax.jit(jax.grad(lambda *at: jnp.sum(function(*at) ** 2), (0, 1, 2)))
    check_grads(gradient, at, order=1, modes=("fwd", "rev"), **close)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_vmap(function):
    student, teacher = arrays(STUDENT, TEACHER)
    several = jnp.stack([student, student * 2])
    mapped = jax.vmap(lambda s: function(s, teacher, 0.0))(several)
    expected = jax.lax.map(lambda s: function(s, teacher, 0.0), several)
    np.testing.assert_allclose(mapped, expected, rtol=8 * EPS)


def test_one_temperature_a_row_and_other_axes():
    student, teacher = arrays(STUDENT, TEACHER)
    temperatures = jnp.array([1.0, 4.0, 0.5])
    expected = [PYTORCH[float(t)][0][row] for row, t in enumerate(temperatures)]
    np.testing.assert_allclose(loss(student, teacher, temperature=temperatures), expected, rtol=8 * EPS)
    np.testing.assert_allclose(loss(student.T, teacher.T, axis=0, temperature=temperatures), expected, rtol=8 * EPS)


def test_top_k_is_the_divergence_of_classes_and_tail():
    student, teacher = arrays(STUDENT, TEACHER)
    indices = jax.lax.top_k(teacher, 2)[1]
    log_t = jnp.take_along_axis(jsoftmax.log_softmax(teacher, temperature=2.0), indices, axis=-1)
    p, q = (exact(np.asarray(array) / 2) for array in (teacher, student))

    def merged(row):
        named = np.take_along_axis(row.p, np.asarray(indices), axis=-1)
        return np.concatenate([named, 1 - named.sum(axis=-1, keepdims=True)], axis=-1)

    expected = 4 * kl(merged(p), merged(q)).astype(np.float64)
    actual = jsoftmax.top_k_distillation_loss(student, log_t, indices, temperature=2.0)
    # The teacher's log-probabilities are stored with half a place of rounding, whatever the divergence.
    np.testing.assert_allclose(actual, expected, rtol=16 * EPS, atol=EPS)
    whole = jsoftmax.top_k_distillation_loss(student, jsoftmax.log_softmax(teacher), jnp.indices((3, 4))[1])
    np.testing.assert_allclose(whole, PYTORCH[1.0][0], rtol=16 * EPS, atol=4 * EPS)


def test_a_small_tail_keeps_its_digits():
    """A teacher of two classes, sure to 1e-12: as a float32 probability its first is 1, its tail 0."""
    tail = MP.mpf(1) / 10**12
    log_t = jnp.asarray([[float(MP.log1p(-tail))]], jnp.float32)
    tail = -MP.expm1(widen(log_t, FIFTY_DIGITS)[0, 0])  # of what float32 holds
    student = jnp.zeros((1, 3))
    expected = (1 - tail) * MP.log((1 - tail) * 3) + tail * MP.log(tail * 3 / 2)
    actual = jsoftmax.top_k_distillation_loss(student, log_t, jnp.array([[0]]))
    assert ulps(actual, np.array([expected]), jnp.float32).max() <= 4
    gradient = jax.grad(lambda z: jsoftmax.top_k_distillation_loss(z, log_t, jnp.array([[0]]))[0])(
        jnp.array([[30.0, 0.0, 0.0]])
    )
    q = exact(np.array([[30.0, 0.0, 0.0]]))
    np.testing.assert_allclose(gradient[0, 1:], float(q.not_p[0, 0] - tail) / 2, rtol=1e-5)


def test_top_k_edges():
    student, teacher = arrays(STUDENT, TEACHER)
    log_t, indices = jsoftmax.log_softmax(teacher)[:, :2], jnp.array([[0, 1], [0, 4], [-1, 1]])
    call = jsoftmax.top_k_distillation_loss
    assert np.isnan(call(student, log_t, indices)).tolist() == [False, True, True]
    good, rows = jnp.array([[0, 1]] * 3), jnp.array([True, False, True])
    gradient = jax.grad(lambda s: jnp.sum(call(s, log_t, good, rows)))(student.at[1].set(jnp.nan))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)
    assert call(student.at[1].set(jnp.nan), log_t, good, rows)[1] == 0
    unused = jnp.concatenate([log_t, jnp.full((3, 1), -jnp.inf)], axis=-1)
    tail = jsoftmax.softmax(student)[:, 2:].sum(axis=-1)
    np.testing.assert_allclose(
        call(student, unused, jnp.array([[0, 1, 2]] * 3)) - call(student, log_t, good),
        (1 - jnp.exp(log_t).sum(axis=-1)) * (jnp.log(tail) - jsoftmax.log_softmax(student)[:, 3]),
        atol=16 * EPS,
    )


def heads(params, rows):
    student, teacher = (rows[name] @ params[name] for name in ("student", "teacher"))
    each = loss(student, jax.lax.stop_gradient(teacher), temperature=2.0)
    return jnp.sum(rows["weight"] * each)


def head_inputs(count, width, classes):
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape) / 4, jnp.float32)

    params = {"student": draw(width, classes), "teacher": draw(width, classes)}
    weight = jnp.full(count, 1 / count)
    return params, {"student": draw(count, width), "teacher": draw(count, width), "weight": weight}


def test_two_heads_in_blocks():
    params, rows = head_inputs(37, 5, 11)
    actual = jax.jit(jax.value_and_grad(jsoftmax.blockwise(heads, block_size=8), (0, 1)))(params, rows)
    with float64():
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (params, rows))
        expected = jax.tree.map(np.asarray, jax.value_and_grad(heads, (0, 1))(*wide))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=16 * EPS * max(np.abs(e).max(), 0.01))


@pytest.mark.exact
def test_two_heads_in_blocks_make_no_array_of_all_logits():
    rows, width, classes, block = 4096, 64, 32768, 128
    shapes = jax.eval_shape(functools.partial(head_inputs, rows, width, classes))
    program = jax.jit(jax.value_and_grad(jsoftmax.blockwise(heads, block_size=block), (0, 1))).lower(*shapes).compile()
    text = program.as_text()
    assert not re.search(rf"\[{rows},{classes}\]|\[{classes},{rows}\]", text)
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) <= max(block * classes, 2 * width * classes)
    # Both kernels' gradients and a dozen arrays of one block, where the logits of both would take 1.07 GB.
    assert program.memory_analysis().temp_size_in_bytes <= 4 * (2 * width * classes + 12 * block * classes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda z: loss(z, z[:1]),
            ValueError,
            r"teacher_logits has shape \(1, 4\), but needs \(3, 4\): that of student",
        ),
        (lambda z: loss(z, jnp.ones((3, 4), int)), TypeError, "teacher_logits must hold floating-point numbers"),
        (lambda z: loss(z, z, temperature=0.0), ValueError, "temperature must be at least 1.17549e-38, got 0.0"),
        (lambda z: loss(z, z, jnp.zeros(3, int), label_weight=2.0), ValueError, "label_weight must be between 0 and 1"),
        (lambda z: loss(z, z, jnp.zeros(1, int)), ValueError, r"labels has shape \(1,\), but needs \(3,\)"),
        (lambda z: loss(z[:, :0], z[:, :0]), ValueError, "no class"),
        (lambda z: jensen_shannon(z, z[0]), ValueError, "second_logits"),
        (lambda z: jensen_shannon(z, z, weight=-0.1), ValueError, "weight must be between 0 and 1, got -0.1"),
        (
            lambda z: jsoftmax.top_k_distillation_loss(z, z[:2, :2], jnp.zeros((2, 2), int)),
            ValueError,
            r"teacher_log_probs has shape \(2, 2\) and student_logits \(3, 4\)",
        ),
        (
            lambda z: jsoftmax.top_k_distillation_loss(z, z[:, :2], jnp.zeros((3, 1), int)),
            ValueError,
            r"teacher_indices has shape \(3, 1\), but needs \(3, 2\)",
        ),
        (
            lambda z: jsoftmax.top_k_distillation_loss(z[:, :1], z, jnp.zeros((3, 4), int)),
            ValueError,
            "teacher_log_probs has 4 places, but needs 1 to 1",
        ),
        (
            lambda z: jsoftmax.top_k_distillation_loss(z, z, z),
            TypeError,
            "teacher_indices must hold integer class numbers",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.zeros((3, 4)))
