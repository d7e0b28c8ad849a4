"""The distribution that a sampler drew from: its support, and every number of it, wherever the logits come from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_distribution, filtered_probabilities

import jsoftmax
from jsoftmax import categorical

INF, NAN = np.inf, np.nan
EPS = float(jnp.finfo(jnp.float32).eps)
ROWS, WIDTH, CLASSES = 9, 5, 16
random = np.random.default_rng(0)
FEATURES = jnp.asarray(random.normal(size=(ROWS, WIDTH)), jnp.float32)
KERNEL = jnp.asarray(random.normal(size=(WIDTH, CLASSES)) * 1.5, jnp.float32)
LOGITS = np.asarray(FEATURES, np.float64) @ np.asarray(KERNEL, np.float64)
LABELS = jnp.argmax(jnp.asarray(LOGITS, jnp.float32), axis=-1)
PLACES = jnp.concatenate(
    [LABELS[:, None], LABELS[:, None] // 2, jnp.full((ROWS, 1), -1), (LABELS[:, None] + 5) % 16], 1
)

# As their names say; "allowed" is the stored set, of which "both" filters what is left. Of "all" filters,
# each leaves out what the others would keep.
OPTIONS = {
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.2},
    "each row": {"temperature": jnp.linspace(0.5, 2, ROWS), "top_k": jnp.arange(ROWS) + 1},
    "allowed": {"support": PLACES},
    "both": {"support": PLACES, "top_p": 0.5, "temperature": 2.0},
}


def expected_probabilities(options):
    """Of each row, by sorting, in float64."""
    found = []
    for row, logits in enumerate(LOGITS):
        own = {name: np.asarray(value)[row] if np.ndim(value) else value for name, value in options.items()}
        allowed = np.isin(np.arange(CLASSES), own.pop("support", np.arange(CLASSES)))
        found.append(filtered_probabilities(logits, where=allowed, **own))
    return np.stack(found)


def statistics(logits_of, options):
    """Each number and its gradient by the logits or by what they are made of, all of one program."""

    @jax.jit
    def run(arrays):
        found, pull = jax.vjp(lambda arrays: logits_of(arrays, **options)[:4], arrays)
        ones, zeros = jnp.ones(ROWS), jnp.zeros(ROWS)
        pulled = [pull(tuple(ones if n == number else zeros for n in range(4)))[0] for number in range(4)]
        return found, pulled

    return run


def dense(arrays, **options):
    return jsoftmax.softmax_statistics(arrays["logits"], LABELS, **options)


def linear(arrays, **options):
    return jsoftmax.linear_softmax_statistics(arrays["features"], arrays["kernel"], LABELS, block_size=4, **options)


@pytest.mark.parametrize("name", ["top_k", "top_p", "all", "each row", "both"])
def test_statistics_of_what_is_left(name):
    """And their gradients: those of the same formula for the classes of the support alone."""
    options = OPTIONS[name]
    p = expected_probabilities(options)
    temperature = np.broadcast_to(np.asarray(options.get("temperature", 1.0), np.float64), ROWS)[:, None]
    z, some = LOGITS / temperature, p > 0
    log_p = np.log(np.where(some, p, 1))
    entropy, logsumexp = -np.sum(p * log_p, -1), np.log(np.sum(np.where(some, np.exp(z), 0), -1))
    label = np.arange(CLASSES) == np.asarray(LABELS)[:, None]
    expected = (logsumexp, np.sum(label * log_p, -1), np.sum(z * some, -1) / some.sum(-1), entropy)
    slopes = [p, label - p, some / some.sum(-1, keepdims=True), -p * (log_p + entropy[:, None])]
    slopes = [slope / temperature for slope in slopes]
    found, pulled = statistics(dense, options)({"logits": jnp.asarray(LOGITS, jnp.float32)})
    np.testing.assert_allclose(found, expected, rtol=64 * EPS, atol=64 * EPS)
    np.testing.assert_allclose([bar["logits"] for bar in pulled], slopes, atol=64 * EPS)
    found, pulled = statistics(linear, options)({"features": FEATURES, "kernel": KERNEL})
    np.testing.assert_allclose(found, expected, rtol=64 * EPS, atol=64 * EPS)
    h, w = np.asarray(FEATURES, np.float64), np.asarray(KERNEL, np.float64)
    np.testing.assert_allclose([bar["features"] for bar in pulled], [slope @ w.T for slope in slopes], atol=256 * EPS)
    np.testing.assert_allclose([bar["kernel"] for bar in pulled], [h.T @ slope for slope in slopes], atol=256 * EPS)


@pytest.mark.parametrize("options", [OPTIONS["top_p"], OPTIONS["all"], {"top_k": 3, "min_p": 0.3}])
def test_draws_have_these_probabilities(options):
    logits = jnp.asarray(LOGITS[0], jnp.float32)
    drawn = categorical.sample(jax.random.key(1), logits, sample_shape=(50_000,), **options)
    log_prob = categorical.log_prob(logits, jnp.arange(CLASSES), **options)
    assert np.all(log_prob <= 0)
    assert_distribution(drawn, np.exp(np.asarray(log_prob, np.float64)))
    with pytest.raises(AssertionError):
        assert_distribution(drawn, np.exp(np.asarray(categorical.log_prob(logits, jnp.arange(CLASSES)), np.float64)))


@pytest.mark.parametrize("options", [OPTIONS["all"], OPTIONS["each row"], OPTIONS["allowed"]])
def test_of_a_categorical_distribution(options):
    """Of several draws too, which share one support."""
    logits, p = jnp.asarray(LOGITS, jnp.float32), expected_probabilities(options)
    actions = jnp.broadcast_to(jnp.arange(CLASSES)[:, None], (CLASSES, ROWS))
    with np.errstate(divide="ignore"):
        expected = np.log(p).T
    np.testing.assert_allclose(categorical.log_prob(logits, actions, **options), expected, rtol=64 * EPS, atol=EPS)
    entropy = categorical.entropy(logits, **options)
    np.testing.assert_allclose(entropy, -np.sum(p * np.log(np.where(p > 0, p, 1)), -1), rtol=64 * EPS, atol=EPS)
    moved = categorical.entropy(logits.T, axis=0, **options)
    np.testing.assert_array_equal(moved, entropy)


def test_the_support_of_the_sampler_is_that_of_filter_classes():
    logits, options = jnp.asarray(LOGITS, jnp.float32), {"temperature": 1.3, "top_k": 6, "top_p": 0.7}
    kept = categorical.filter_classes(logits, **options)
    stored = jnp.where(kept, jnp.arange(CLASSES), -1)
    for found in (options, {"temperature": 1.3, "support": stored}):
        given = jsoftmax.softmax_statistics(logits, LABELS, **found)
        masked = jsoftmax.softmax_statistics(logits, LABELS, where=kept, temperature=1.3)
        jax.tree.map(np.testing.assert_array_equal, given, masked)


EDGES = {
    "a label that is left out": ([3.0, 0.0, 1.0, -1.0], 3, {"top_k": 2}),
    "a label outside the set": ([3.0, 0.0, 1.0, -1.0], 1, {"support": [0, 2, -1]}),
    "an empty set": ([3.0, 0.0, 1.0, -1.0], 0, {"support": [-1, -1, -1]}),
    "an empty set, filtered": ([3.0, 0.0, 1.0, -1.0], 0, {"support": [-1, 4, -1], "top_p": 0.5, "top_k": 1}),
    "one class": ([3.0, 0.0, 1.0, -1.0], 2, {"support": [2, 2, -1]}),
    "a NaN outside the set": ([NAN, 0.0, INF, -1.0], 1, {"support": [1, 3, -1], "top_p": 0.99}),
    "masks": ([-INF, 0.0, 1.0, -INF], 2, {"top_k": 3, "top_p": 1.0, "min_p": 0.0}),
    "temperature 0": ([3.0, 0.0, 3.0, -1.0], 0, {"temperature": 0.0, "top_p": 0.3, "min_p": 1.0}),
    "far apart": ([3e38, -3e38, 1.0, 0.0], 0, {"top_p": 0.9, "top_k": 3, "min_p": 1e-30}),
}


@pytest.mark.parametrize(
    ("name", "derivative"), [(name, "vjp") for name in EDGES] + [(name, "jvp") for name in list(EDGES)[:4:3]]
)
def test_gradients_are_never_nan(name, derivative):
    logits, label, options = (
        jnp.array(EDGES[name][0]),
        jnp.array(EDGES[name][1]),
        {**EDGES[name][2], "derivative": derivative},
    )
    if "support" in options:
        options["support"] = jnp.array(options["support"])

    found = jsoftmax.softmax_statistics(logits, label, **options)
    assert not np.isnan(found.log_prob)
    assert found.log_prob <= 0
    assert np.isfinite(found.entropy)

    def total(z, t):
        s = jsoftmax.softmax_statistics(z, label, **{"temperature": t} | options)
        return s.logsumexp + s.log_prob + s.mean_logit + s.entropy

    for gradient in jax.grad(total, (0, 1))(logits, jnp.float32(1.5)):
        assert np.isfinite(gradient).all()


def test_what_edges_give():
    z = jnp.array([3.0, 0.0, 1.0, -1.0])
    log_prob, entropy = functools.partial(categorical.log_prob, z), functools.partial(categorical.entropy, z)
    assert log_prob(3, top_k=2) == -INF
    gradient = jax.grad(lambda z: categorical.log_prob(z, 3, top_k=2))(z)
    np.testing.assert_allclose(gradient, [-1 / (1 + np.exp(-2)), 0, -1 / (1 + np.exp(2)), 0], rtol=8 * EPS)
    none = jnp.full(2, -1)
    empty = jsoftmax.softmax_statistics(z, 0, support=none)
    assert [float(number) for number in empty[:4]] == [-INF, 0, 0, 0]
    np.testing.assert_array_equal(jax.grad(lambda z: categorical.log_prob(z, 0, support=none))(z), 0)
    assert categorical.log_prob(z, 2, support=jnp.array([2])) == 0
    assert entropy(top_p=0.0) == 0
    assert np.isnan(log_prob(-1, top_p=0.5))  # no class at all, as ever
    for broken in ([NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF, -INF, -INF]):
        assert np.isnan(categorical.log_prob(jnp.array(broken), 1, top_k=1, top_p=0.5, min_p=0.1))


def test_rows_that_do_not_count():
    active = jnp.arange(ROWS) % 3 != 0
    features, options = FEATURES.at[::3].set(NAN), {"top_p": 0.8, "support": PLACES}

    def total(h, w):
        s = jsoftmax.linear_softmax_statistics(h, w, LABELS, active=active, block_size=2, **options)
        return s.log_prob.sum() + s.entropy.sum()

    value, gradients = jax.value_and_grad(total, (0, 1))(features, KERNEL)
    p = expected_probabilities(options)[np.asarray(active)]
    label = np.asarray(LABELS)[np.asarray(active)]
    log_p = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(value, log_p[np.arange(label.size), label].sum() - np.sum(p * log_p), rtol=64 * EPS)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_array_equal(gradients[0][::3], 0)


@pytest.mark.optimized
@pytest.mark.parametrize("options", [{"top_p": 0.9, "top_k": 50, "temperature": 0.7}, {"support": (64,)}])
def test_a_large_vocabulary_needs_one_block(options):
    """A few arrays of one block of logits, five of them at most, where all rows would need eight for one."""
    rows, width, classes, block = 1024, 16, 262_144, 128
    shape, dtype = jax.ShapeDtypeStruct, jnp.float32

    def total(h, w, labels, places):
        own = options | ({"support": places} if "support" in options else {})
        s = jsoftmax.linear_softmax_statistics(h, w, labels, block_size=block, **own)
        return jnp.sum(s.log_prob + s.entropy)

    shapes = shape((rows, width), dtype), shape((width, classes), dtype), shape((rows,), jnp.int32)
    places = shape((rows, 64), jnp.int32)
    program = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*shapes, places).compile()
    allowed = 4 * (width * classes + 5 * block * classes)
    assert program.memory_analysis().temp_size_in_bytes <= allowed
    assert f"[{rows},{classes}]" not in program.as_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, a number of classes, got 2.0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, ValueError, "top_p must be between 0 and 1, got 1.5"),
        ({"min_p": jnp.ones(2)}, ValueError, r"min_p has shape \(2,\), but needs \(\) or \(9,\)"),
        ({"support": PLACES[0]}, ValueError, r"support has shape \(4,\), but needs \(9, k\): the classes of each row"),
        ({"support": FEATURES}, TypeError, "support must hold integer class numbers, got dtype float32"),
    ],
)
def test_bad_input(options, error, message):
    for call in (
        functools.partial(dense, {"logits": jnp.asarray(LOGITS, jnp.float32)}),
        functools.partial(linear, {"features": FEATURES, "kernel": KERNEL}),
    ):
        with pytest.raises(error, match=message):
            call(**options)
