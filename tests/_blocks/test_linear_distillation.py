"""Distillation without logits: every divergence against wider arithmetic, two heads in blocks, a stored teacher."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from oracle import FIFTY_DIGITS, exact, ulps

import jsoftmax
from jsoftmax.testing import float64

EPS = float(jnp.finfo(jnp.float32).eps)
ROWS, WIDTH, TEACHER_WIDTH, CLASSES = 9, 5, 7, 13
NAN = np.nan


def inputs():
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    return {
        "features": draw(ROWS, WIDTH),
        "kernel": draw(WIDTH, CLASSES),
        "bias": draw(CLASSES),
        "teacher_features": draw(ROWS, TEACHER_WIDTH),
        "teacher_kernel": draw(CLASSES, TEACHER_WIDTH),
        "teacher_bias": draw(CLASSES),
        "weights": jnp.asarray(random.uniform(0.5, 2, ROWS), jnp.float32),
        "temperature": jnp.asarray(random.uniform(0.5, 2, ROWS), jnp.float32),
    }


LABELS = jnp.arange(ROWS)
WHERE = jnp.arange(CLASSES) != 11
HOW = {
    "by default": {},
    "reverse": {"divergence": "reverse", "label_weight": 0.25},
    "Jensen-Shannon": {"divergence": "jensen_shannon", "mixture_weight": 0.1, "where": WHERE},
    "without labels": {"divergence": "jensen_shannon", "labels": None, "derivative": "jvp"},
}
linear = functools.partial(jsoftmax.linear_distillation_loss, teacher_kernel_transposed=True, block_size=4)


def divergence_of(t, p, divergence="forward", mixture_weight=0.5):
    """The textbook's, from probabilities."""
    if divergence == "jensen_shannon":
        m = (1 - mixture_weight) * p + mixture_weight * t
        return (1 - mixture_weight) * textbook_kl(p, m) + mixture_weight * textbook_kl(t, m)
    return textbook_kl(t, p) if divergence == "forward" else textbook_kl(p, t)


def textbook_kl(p, q):
    some = p > 0
    return jnp.sum(jnp.where(some, p * jnp.log(jnp.where(some, p / jnp.where(some, q, 1), 1)), 0), axis=-1)


def textbook(arrays, labels=LABELS, label_weight=0.5, where=None, derivative="vjp", **options):
    """Both models' logits in memory."""
    student = arrays["features"] @ arrays["kernel"] + jnp.broadcast_to(arrays["bias"], (ROWS, CLASSES))
    teacher = arrays["teacher_features"] @ arrays["teacher_kernel"].T
    teacher = teacher + jnp.broadcast_to(arrays["teacher_bias"], teacher.shape)
    if where is not None:
        student, teacher = (jnp.where(where[None], z, -1e30) for z in (student, teacher))
    t, p = (jax.nn.softmax(z / arrays["temperature"][:, None]) for z in (teacher, student))
    losses = arrays["temperature"] ** 2 * divergence_of(t, p, **options)
    if labels is not None:
        hard = -jnp.take_along_axis(jax.nn.log_softmax(student), labels[:, None], axis=-1)[:, 0]
        losses = (1 - label_weight) * losses + label_weight * hard
    return jnp.sum(losses * arrays["weights"]) / jnp.sum(arrays["weights"])


@pytest.mark.parametrize("name", HOW)
def test_value_and_gradients_equal_the_textbook(name):
    arrays = inputs()
    got = jax.jit(jax.value_and_grad(lambda a: linear(**a, **{"labels": LABELS, **HOW[name]})))(arrays)
    with float64():
        wide = {name: jnp.asarray(np.asarray(array, np.float64)) for name, array in arrays.items()}
        expected = jax.jit(jax.value_and_grad(functools.partial(textbook, **HOW[name])))(wide)
        expected = jax.tree.map(np.asarray, expected)
    for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=32 * EPS * max(np.abs(e).max(), 0.1))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("apart", [1e-6, 1e-3, 1.0])
def test_two_that_nearly_agree(divergence, apart):
    """At 1e-6, divergences are about 1e-13: all digits of the value are there, and of the gradient."""
    random = np.random.default_rng(1)
    teacher = jnp.asarray(random.normal(size=(6, 20)), jnp.float32)
    student = teacher + jnp.asarray(random.normal(size=(6, 20)) * apart, jnp.float32)
    loss = functools.partial(jsoftmax.distillation_loss, divergence=divergence, mixture_weight=0.25)
    t, p = exact(teacher).p, exact(student).p
    log, mixture = FIFTY_DIGITS.log, p * 3 / 4 + t / 4
    if divergence == "forward":
        expected, slope = np.sum(t * log(t / p), -1), p - t
    elif divergence == "reverse":
        expected = np.sum(p * log(p / t), -1)
        slope = p * (log(p / t) - expected[:, None])
    else:
        first = np.sum(p * log(p / mixture), -1)
        expected = first * 3 / 4 + np.sum(t * log(t / mixture), -1) / 4
        slope = p * (log(p / mixture) - first[:, None]) * 3 / 4
    assert ulps(loss(student, teacher), expected, jnp.float32).max() <= 24
    gradient = jax.grad(lambda s: loss(s, teacher).sum())(student)
    largest = np.abs(slope.astype(np.float64)).max(axis=-1, keepdims=True)
    assert ulps(gradient, slope, jnp.float32, unit=np.broadcast_to(largest, slope.shape)).max() <= 24


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_blocks_keep_what_the_dense_loss_has(divergence):
    """Two heads that differ by a bias of 1e-6: the digits of the dense loss on the same logits."""
    a = inputs()
    head, shift = (a["features"], a["kernel"]), jnp.linspace(-1e-6, 1e-6, CLASSES, dtype=jnp.float32)
    got = jsoftmax.linear_distillation_loss(
        *head, *head, teacher_bias=shift, divergence=divergence, reduction="none", block_size=4
    )
    logits = a["features"] @ a["kernel"]
    expected = jsoftmax.distillation_loss(logits, logits + shift[None], divergence=divergence)
    assert 0 < expected.max() < 1e-11
    np.testing.assert_allclose(got, expected, rtol=0.2)  # a last digit of a logit is a tenth of the bias
    same = jsoftmax.linear_distillation_loss(*head, *head, divergence=divergence, reduction="none", block_size=4)
    np.testing.assert_array_equal(same, 0)


def test_options_one_a_row_and_batches():
    a = inputs()
    share = jnp.linspace(0, 1, ROWS, dtype=jnp.float32)
    call = functools.partial(linear, reduction="none", label_weight=share, labels=LABELS)
    flat = call(**a)
    student = a["features"] @ a["kernel"] + a["bias"][None]
    teacher = a["teacher_features"] @ a["teacher_kernel"].T + a["teacher_bias"][None]
    expected = jsoftmax.distillation_loss(student, teacher, LABELS, temperature=a["temperature"], label_weight=share)
    np.testing.assert_allclose(flat, expected * a["weights"], rtol=64 * EPS)
    per_row = ("features", "teacher_features", "weights", "temperature")
    square = {n: x.reshape(3, 3, *x.shape[1:]) if n in per_row else x for n, x in a.items()}
    targets = jax.nn.one_hot(LABELS, CLASSES).reshape(3, 3, CLASSES)
    square |= {"labels": targets, "label_weight": share.reshape(3, 3)}
    np.testing.assert_allclose(linear(**square, reduction="none").reshape(-1), flat, rtol=8 * EPS)


@pytest.mark.parametrize("skip_rows", [False, True])
def test_rows_of_no_weight_are_never_looked_at(skip_rows):
    a = inputs()
    idle = jnp.arange(ROWS) % 3 == 1
    a["weights"] = jnp.where(idle, 0, a["weights"])
    dirty = a | {n: jnp.where(idle[:, None], NAN, a[n]) for n in ("features", "teacher_features")}
    dirty["kernel"], dirty["teacher_kernel"] = a["kernel"].at[:, 11].set(NAN), a["teacher_kernel"].at[11].set(NAN)
    labels = jnp.where(idle, -7, LABELS)

    def value_and_gradients(arrays, **options):
        call = jax.value_and_grad(lambda arrays: linear(**arrays, where=WHERE, **options))
        return jax.tree.map(np.asarray, jax.jit(call)(arrays))

    value, gradients = value_and_gradients(dirty, labels=labels, skip_rows=skip_rows)
    expected, clean = value_and_gradients(a, labels=LABELS)
    np.testing.assert_allclose(value, expected, rtol=8 * EPS)
    del gradients["weights"], clean["weights"]  # that of a row which counts for nothing is 0 all the same
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, clean[name], rtol=1e-5, atol=32 * EPS)


def stored(k, **options):
    a = inputs()
    arrays = a["teacher_features"], a["teacher_kernel"]
    return jsoftmax.linear_top_k(*arrays, k, bias=a["teacher_bias"], kernel_transposed=True, block_size=4, **options)


def teacher_log_p(temperature=1.0, where=None):
    a = {name: np.asarray(array, np.float64) for name, array in inputs().items()}
    z = (a["teacher_features"] @ a["teacher_kernel"].T + a["teacher_bias"]) / temperature
    z = z if where is None else np.where(where, z, -np.inf)
    return z - np.log(np.sum(np.exp(z), -1, keepdims=True))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}, {"where": WHERE}])
def test_the_likeliest_classes(options):
    log_p = teacher_log_p(**options)
    found, classes = stored(4, **options)
    np.testing.assert_array_equal(classes, np.argsort(-log_p, axis=-1)[:, :4])
    np.testing.assert_allclose(found, -np.sort(-log_p, axis=-1)[:, :4], rtol=32 * EPS)
    assert classes.dtype == jnp.int32


def test_masked_classes_come_last_and_nothing_is_differentiated():
    found, classes = stored(CLASSES, where=WHERE)
    assert np.all(found[:, -1] == -np.inf)
    np.testing.assert_array_equal(classes[:, -1], 11)
    a = inputs()
    gradient = jax.grad(lambda w: jsoftmax.linear_top_k(a["features"], w, 2)[0].sum())(a["kernel"])
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("k", [2, 5])
def test_the_likeliest_classes_of_all_devices(k):
    """Of 12 classes in four parts, three a device: the second k is more than any of them has."""
    a = inputs()
    kernel = a["kernel"][:, :12]
    expected = jsoftmax.linear_top_k(a["features"], kernel, k)
    for check_vma in (True, False):
        split = jax.shard_map(
            lambda h, w: jsoftmax.linear_top_k(h, w, k, axis_name="model", block_size=4),
            mesh=jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]),
            in_specs=(P(), P(None, "model")),
            out_specs=P(),
            check_vma=check_vma,
        )
        found, classes = jax.jit(split)(a["features"], kernel)
        np.testing.assert_allclose(found, expected[0], rtol=8 * EPS)
        np.testing.assert_array_equal(classes, expected[1])


def test_a_stored_teacher():
    """The dense loss on the same logits, with its gradients; and with every class stored, distillation itself."""
    a = inputs()
    log_probs, classes = stored(4, temperature=2.0)
    names, options = ("features", "kernel", "bias", "weights"), {"temperature": 2.0, "reduction": "sum"}
    head = {name: a[name] for name in names}

    def in_blocks(head, log_probs):
        call = jsoftmax.linear_top_k_distillation_loss
        return call(teacher_log_probs=log_probs, teacher_indices=classes, block_size=4, **head, **options)

    def dense(head, log_probs):
        logits = head["features"] @ head["kernel"] + jnp.broadcast_to(head["bias"], (ROWS, CLASSES))
        losses = jsoftmax.top_k_distillation_loss(logits, log_probs, classes, temperature=2.0)
        return jnp.sum(losses * head["weights"])

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(head, log_probs) for f in (in_blocks, dense))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=64 * EPS)
    every = stored(CLASSES, temperature=2.0)
    whole = jsoftmax.linear_top_k_distillation_loss(
        **head, **dict(zip(("teacher_log_probs", "teacher_indices"), every, strict=True)), **options
    )
    pair = linear(**(a | {"temperature": 2.0}), reduction="sum")
    np.testing.assert_allclose(whole, pair, rtol=64 * EPS)


@pytest.mark.optimized
@pytest.mark.parametrize("frozen", [True, False])
def test_two_heads_of_a_large_vocabulary_need_one_block(frozen):
    """Eleven arrays of one block, and each kernel's gradient where there is one; all logits would be sixteen blocks."""
    rows, classes, block, width = 1024, 262_144, 128, 8
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    heads = [shape((rows, width)), shape((width, classes)), shape((rows, 2 * width)), shape((2 * width, classes))]
    loss = functools.partial(jsoftmax.linear_distillation_loss, temperature=2.0, block_size=block)
    program = jax.jit(jax.grad(loss, (0, 1) if frozen else (0, 1, 2, 3))).lower(*heads).compile()
    text = program.as_text()
    gradients = width * classes * (1 if frozen else 3)
    assert program.memory_analysis().temp_size_in_bytes <= 4 * (gradients + 11 * block * classes)
    assert f"[{rows},{classes}]" not in text
    assert len(re.findall(r" dot\(", text)) <= (4 if frozen else 6)  # a teacher that stands still has one product


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"divergence": "sideways"}, ValueError, "divergence must be one of 'forward', 'reverse', 'jensen_shannon'"),
        ({"mixture_weight": 2.0, "divergence": "jensen_shannon"}, ValueError, "mixture_weight must be between 0 and 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be at least 1.17549e-38"),
        ({"softcap": 1.0}, TypeError, "got an unknown option 'softcap'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"derivative": "fwd"}, ValueError, "derivative must be one of"),
        (
            {"teacher_features": jnp.ones((2, 7))},
            ValueError,
            r"teacher_features has shape \(2, 7\) and features \(9, 5\)",
        ),
        ({"teacher_kernel": jnp.ones((12, 7)), "teacher_bias": None}, ValueError, "need the same classes"),
        ({"teacher_kernel": jnp.ones((7, 13))}, ValueError, r"teacher_kernel has shape \(7, 13\), but needs \(7, 7\)"),
        ({"where": jnp.ones(4, bool)}, ValueError, r"where has shape \(4,\), but needs \(13,\)"),
        ({"labels": jnp.ones(3, int)}, ValueError, r"labels has shape \(3,\), but needs \(9,\)"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        linear(**(inputs() | change))


def test_bad_input_of_a_stored_teacher():
    a = inputs()
    with pytest.raises(ValueError, match="k must be between 1 and the 13 classes, got 14"):
        stored(14)
    call = functools.partial(jsoftmax.linear_top_k_distillation_loss, a["features"], a["kernel"])
    with pytest.raises(ValueError, match=r"teacher_log_probs has shape \(2, 3\) and features \(9, 5\)"):
        call(jnp.zeros((2, 3)), jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"teacher_indices has shape \(9, 2\), but needs \(9, 3\)"):
        call(jnp.zeros((9, 3)), jnp.zeros((9, 2), int))
    with pytest.raises(ValueError, match="temperature must be at least"):
        call(*stored(2), temperature=-1.0)
