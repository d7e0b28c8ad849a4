"""Losses of policies and preferences against published formulas, from logits, from features, and in blocks."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.test_util import check_grads

import jsoftmax

LOGITS = np.array([[0.5, -1.0, 2.0, 0.0], [3.0, 2.5, -4.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
OTHERS = np.array([[0.0, 1.0, 1.5, -0.5], [1.0, 2.0, 0.0, 1.0], [-1.0, 0.5, 2.0, 0.0]])
ACTIONS = np.array([2, 0, 3], np.int32)
ADVANTAGES = np.array([1.5, -0.7, 2.0])
WEIGHTS = np.array([1.0, 2.0, 0.5])
statistics = jsoftmax.softmax_statistics


@pytest.mark.usefixtures("x64")
def test_peer():
    """rlax 0.1.9 under JAX 0.10.2 in float64; its mean is over all actions, whatever their weights."""
    # rlax.policy_gradient_loss(z, ACTIONS, ADVANTAGES, WEIGHTS) and its gradient
    gradient = [
        [0.0792223547574899, 0.0176768967043744, -0.1449500385569129, 0.0480507870950486],
        [0.1988949174538944, -0.1624117757024285, -0.0002441762289921, -0.0362389655224737],
        [0.0712794067886615, 0.0787759274405126, 0.0870608640516919, -0.2371161982808659],
    ]
    # The middle row of the gradient of rlax.clipped_surrogate_pg_loss(r, ADVANTAGES, 0.2); the other two are clipped.
    unclipped = [0.290229658484955, -0.2369930554257509, -0.0003563046479906, -0.0528802984112135]

    def loss(z):
        return jsoftmax.policy_gradient_loss(statistics(z, ACTIONS), ADVANTAGES, weights=WEIGHTS)

    def clipped(z):
        return jsoftmax.clipped_policy_loss(statistics(z, ACTIONS), statistics(OTHERS, ACTIONS), ADVANTAGES)

    z = jnp.asarray(LOGITS)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-16)
    close(loss(z), 0.32612916504833833 * 3 / WEIGHTS.sum())
    close(jax.grad(loss)(z), np.array(gradient) * 3 / WEIGHTS.sum())
    close(clipped(z), -0.7190348500263949)
    close(jax.grad(clipped)(z), [np.zeros(4), unclipped, np.zeros(4)])
    # rlax.entropy_loss(z, WEIGHTS)
    with_bonus = jsoftmax.policy_gradient_loss(statistics(z, ACTIONS), 0 * ADVANTAGES, weights=WEIGHTS, entropy_bonus=1)
    close(with_bonus, -1.115082462864754 * 3 / WEIGHTS.sum())


@pytest.mark.usefixtures("x64")
def test_policy_gradient_in_closed_form():
    """A·(π − e_a) + β·π·(log π + H), each weighted."""

    def loss(z):
        return jsoftmax.policy_gradient_loss(
            statistics(z, ACTIONS), ADVANTAGES, entropy_bonus=0.3, weights=WEIGHTS, reduction="sum"
        )

    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    entropy = -np.sum(p * np.log(p), axis=-1, keepdims=True)
    expected = ADVANTAGES[:, None] * (p - np.eye(4)[ACTIONS]) + 0.3 * p * (np.log(p) + entropy)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(LOGITS)), WEIGHTS[:, None] * expected, rtol=1e-12, atol=1e-15)


def plain_clipped(log_prob, old, advantages, below, above, dual=None):
    """PPO's objective as papers print it, as a loss."""
    ratio = np.exp(log_prob - old)
    objective = np.minimum(ratio * advantages, np.clip(ratio, 1 - below, 1 + above) * advantages)
    if dual is not None:
        objective = np.where(advantages < 0, np.maximum(objective, dual * advantages), objective)
    return -objective


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dual", [None, 3.0])
def test_clip_beside_plain_numpy(dual):
    random = np.random.default_rng(0)
    log_prob, old = -random.exponential(size=(2, 200))
    advantages = random.normal(size=200)
    for clip in (0.2, (0.1, 0.3), 0.0, (1.0, 2.0)):
        below, above = clip if isinstance(clip, tuple) else (clip, clip)
        got = jsoftmax.clipped_policy_loss(log_prob, old, advantages, clip=clip, dual_clip=dual, reduction="none")
        np.testing.assert_allclose(got, plain_clipped(log_prob, old, advantages, below, above, dual), rtol=1e-12)
        loss = functools.partial(jsoftmax.clipped_policy_loss, clip=clip, dual_clip=dual, reduction="sum")
        gradient = jax.grad(loss)(jnp.asarray(log_prob), old, advantages)
        step = 1e-6
        moved = [plain_clipped(log_prob + h, old, advantages, below, above, dual) for h in (step, -step)]
        np.testing.assert_allclose(gradient, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_penalty_is_accurate_near_and_far():
    """k3, e^x − 1 − x, against mpmath; its derivative toward log π is 1 − e^x."""
    x = np.array([-700.0, -30.0, -1.0, -0.999, -1e-3, -1e-9, 0.0, 1e-12, 1e-5, 0.5, 1.0, 1.001, 30.0])

    def loss(log_prob, dtype=jnp.float64):
        reference, zero = jnp.asarray(x, dtype), jnp.zeros(x.size, dtype)
        return jsoftmax.clipped_policy_loss(
            log_prob, zero, zero, reference_policy=reference, kl_penalty=1.0, reduction="none"
        )

    with mpmath.workdps(50):
        exact = np.array([float(mpmath.expm1(v) - mpmath.mpf(v)) for v in x])
    np.testing.assert_allclose(loss(jnp.zeros(x.size)), exact, rtol=2e-15)
    single = loss(jnp.zeros(x.size, jnp.float32), jnp.float32)
    with mpmath.workdps(50):
        exact = np.array([float(mpmath.expm1(float(v)) - mpmath.mpf(float(v))) for v in x.astype(np.float32)])
    np.testing.assert_allclose(single, exact, rtol=5e-7)
    gradient = jax.grad(lambda z: loss(z).sum())(jnp.zeros(x.size))
    np.testing.assert_allclose(gradient, -np.expm1(x), rtol=1e-14)


def test_ratios_do_not_overflow():
    """Infinite ratios leave values and gradients finite; where the objective is clipped, the gradient is 0."""
    far = jnp.array([500.0, 500.0, -500.0, -500.0])
    advantages = jnp.array([1.0, -1.0, 1.0, -1.0])
    loss = functools.partial(jsoftmax.clipped_policy_loss, advantages=advantages, reduction="sum")
    value, gradient = jax.value_and_grad(loss)(far, jnp.zeros(4))
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, 0)
    assert loss(far, jnp.zeros(4), dual_clip=3.0) == -1.2 + 3.0 + 0.0 + 0.8
    for x in (far, -far):
        penalty = functools.partial(loss, reference_policy=x, kl_penalty=0.1)
        value, gradient = jax.value_and_grad(penalty)(jnp.zeros(4), jnp.zeros(4))
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


def test_actions_of_probability_zero():
    """A masked action that was no better or worse than expected counts 0; otherwise the loss is infinite."""
    policy = statistics(jnp.array([[0.0, -jnp.inf], [0.0, -jnp.inf]]), jnp.array([1, 1]))
    losses = jsoftmax.policy_gradient_loss(policy, jnp.array([0.0, 1.0]), reduction="none")
    np.testing.assert_array_equal(losses, [0, np.inf])


# --- From logits, from features, in blocks ---

GROUPS, SIZE, TOKENS, WIDTH, CLASSES = 3, 2, 4, 5, 9


def language_data():
    """Features of answers, (groups, size, tokens, width), and all that a loss of them takes."""
    random = np.random.default_rng(0)
    shape = (GROUPS, SIZE, TOKENS)
    old, reference = jnp.asarray(-random.exponential(size=(2, *shape)) - 1.0, jnp.float32)
    weights = jnp.asarray(np.arange(TOKENS) < random.integers(1, TOKENS + 1, size=(GROUPS, SIZE, 1)))
    rows = {
        "features": jnp.asarray(random.normal(size=(*shape, WIDTH)), jnp.float32),
        "actions": jnp.asarray(random.integers(0, CLASSES, size=shape)),
        "advantages": jnp.asarray(random.normal(size=shape), jnp.float32),
        "rewards": jnp.asarray(random.normal(size=shape[:2]), jnp.float32),
        "old": old,
        "reference": reference,
        "weights": weights,
    }
    return jnp.asarray(random.normal(size=(WIDTH, CLASSES)), jnp.float32), rows


OPTIONS = {"entropy_bonus": 0.1, "kl_penalty": 0.2}
LOSSES = {
    "policy gradient": lambda policy, rows, **options: jsoftmax.policy_gradient_loss(
        policy, rows["advantages"], entropy_bonus=0.1, weights=rows["weights"], **options
    ),
    "clipped": lambda policy, rows, **options: jsoftmax.clipped_policy_loss(
        policy, rows["old"], rows["advantages"], reference_policy=rows["reference"], weights=rows["weights"],
        **OPTIONS, **options
    ),
    "group relative": lambda policy, rows, **options: jsoftmax.group_relative_policy_loss(
        policy, rows["old"], rows["rewards"], reference_policy=rows["reference"], weights=rows["weights"],
        **OPTIONS, **options
    ),
}  # fmt: skip
by_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def from_logits(kernel, rows):
    return statistics(rows["features"] @ kernel, rows["actions"])


def from_features(kernel, rows):
    return jsoftmax.linear_softmax_statistics(rows["features"], kernel, rows["actions"], block_size=7)


@by_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_engine_gives_the_same(loss, reduction):
    kernel, rows = language_data()

    def total(source, kernel, features):
        data = {**rows, "features": features}
        return jnp.sum(loss(source(kernel, data), data, reduction=reduction))

    def both(source):
        return jax.jit(jax.value_and_grad(functools.partial(total, source), (0, 1)))(kernel, rows["features"])

    for actual, expected in zip(jax.tree.leaves(both(from_features)), jax.tree.leaves(both(from_logits)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@by_loss
def test_blockwise_gives_the_same(loss):
    """Rows of `blockwise` are groups of answers here."""
    kernel, rows = language_data()

    def summed(kernel, rows):
        return loss(from_logits(kernel, rows), rows, reduction="sum")

    expected = jax.value_and_grad(summed)(kernel, rows)
    actual = jax.jit(jax.value_and_grad(jsoftmax.blockwise(summed, block_size=2)))(kernel, rows)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@by_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_has_no_weight_may_hold_nan(loss, reduction):
    kernel, rows = language_data()
    bad = ~rows["weights"]
    nan = functools.partial(jnp.where, bad, jnp.nan)
    dirty = {
        **rows,
        "old": nan(rows["old"]),
        "reference": nan(rows["reference"]),
        "advantages": nan(rows["advantages"]),
    }
    dirty["actions"] = jnp.where(bad, -1, rows["actions"])
    logits = rows["features"] @ kernel
    dirty_logits = jnp.where(bad[..., None], jnp.nan, logits)

    def total(z, rows):
        return jnp.sum(loss(statistics(z, rows["actions"]), rows, reduction=reduction))

    value, gradient = jax.value_and_grad(total)(logits, rows)
    got, got_gradient = jax.value_and_grad(total)(dirty_logits, dirty)
    np.testing.assert_array_equal(got, value)
    np.testing.assert_array_equal(got_gradient, gradient)
    np.testing.assert_array_equal(got_gradient[bad], 0)
    assert np.any(got_gradient[~bad] != 0)


@by_loss
def test_no_weight_at_all(loss):
    kernel, rows = language_data()
    rows["weights"] = jnp.zeros_like(rows["weights"])
    value, gradient = jax.value_and_grad(lambda w: loss(from_logits(w, rows), rows))(kernel)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@by_loss
@pytest.mark.usefixtures("x64")
def test_derivative_modes(loss):
    kernel, rows = language_data()
    rows = {name: x.astype(jnp.float64) if x.dtype == jnp.float32 else x for name, x in rows.items()}
    logits = rows["features"] @ kernel.astype(jnp.float64)

    def f(z):
        return loss(statistics(z, rows["actions"], derivative="jvp"), rows)

    check_grads(jax.jit(f), (logits,), 1, ["fwd", "rev"], 1e-6, 1e-6, eps=1e-5)


@by_loss
def test_vmap_over_groups(loss):
    kernel, rows = language_data()
    each = jax.vmap(lambda rows: loss(from_logits(kernel, rows), rows, reduction="sum"))(rows)
    np.testing.assert_allclose(jnp.sum(each), loss(from_logits(kernel, rows), rows, reduction="sum"), rtol=1e-5)


def test_constants_have_no_gradient():
    log_prob, advantages = jnp.array([-1.0, -2.0]), jnp.array([1.0, -2.0])
    f = functools.partial(jsoftmax.clipped_policy_loss, log_prob)
    gradients = jax.grad(lambda old, a, r: f(old, a, reference_policy=r, kl_penalty=0.1), (0, 1, 2))(
        log_prob, advantages, log_prob - 1
    )
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)


def test_half_precision_log_probabilities():
    for dtype in (jnp.bfloat16, jnp.float16):
        loss = jsoftmax.policy_gradient_loss(jnp.array([-1.0, -2.0], dtype), jnp.array([0.5, 1.0], dtype))
        assert loss.dtype == jnp.float32
        assert loss == 1.25


# --- Groups ---


def test_advantages_of_groups():
    rewards = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    wide = rewards.astype(np.float64)
    centered = wide - wide.mean(-1, keepdims=True)
    got = jsoftmax.group_advantages(rewards)
    np.testing.assert_allclose(got, centered / wide.std(-1, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jsoftmax.group_advantages(rewards, scale=False), centered, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("scale", [True, False])
def test_groups_without_variance(size, scale):
    """0.1 is no binary fraction, so that the mean of several differs from each."""
    rewards = jnp.array([[0.1] * size, [1e30] * size, [0.0] * size])
    np.testing.assert_array_equal(jsoftmax.group_advantages(rewards, scale=scale), 0)


def test_averages_of_answers_and_of_tokens():
    """One of four tokens and one of one: as answers they count alike, as tokens they don't."""
    new = jnp.zeros((2, 4)).at[0].add(0.1)
    weights = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    loss = functools.partial(
        jsoftmax.group_relative_policy_loss, new, jnp.zeros((2, 4)), jnp.array([1.0, 0.0]), weights=weights
    )
    good, bad = -np.exp(0.1), 1.0
    np.testing.assert_allclose(loss(), (good + bad) / 2, rtol=1e-6)
    np.testing.assert_allclose(loss(average="token"), (4 * good + bad) / 5, rtol=1e-6)
    np.testing.assert_allclose(loss(scale=False), (good + bad) / 4, rtol=1e-6)


# --- Preferences ---


def test_sequences():
    log_prob = jnp.array([[-1.0, -2.0, jnp.nan], [-0.5, -0.25, -3.0]])
    mask = jnp.array([[True, True, False], [True, True, True]])
    np.testing.assert_array_equal(jsoftmax.sequence_log_prob(log_prob, mask), [-3.0, -3.75])
    np.testing.assert_array_equal(jsoftmax.sequence_log_prob(log_prob, mask, average=True), [-1.5, -1.25])
    np.testing.assert_array_equal(jsoftmax.sequence_log_prob(log_prob, jnp.zeros((2, 3)), average=True), 0)
    gradient = jax.grad(lambda x: jsoftmax.sequence_log_prob(x, mask).sum())(log_prob)
    np.testing.assert_array_equal(gradient, mask)
    policy = statistics(jnp.asarray(LOGITS), ACTIONS)
    np.testing.assert_allclose(jsoftmax.sequence_log_prob(policy), jnp.sum(policy.log_prob), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_preferences_in_both_tails(smoothing):
    """The published formula in mpmath, to margins of ±80 nats, at float32's accuracy."""
    margins = np.array([-800.0, -300, -50, -1, -0.01, 0, 0.01, 1, 50, 170, 300, 800], np.float32)
    zero = jnp.zeros(margins.size)
    loss = functools.partial(jsoftmax.preference_loss, beta=0.125, label_smoothing=smoothing, reduction="none")
    value = loss(jnp.asarray(margins), zero, zero, zero)
    gradient = jax.grad(lambda c: loss(c, zero, zero, zero).sum())(jnp.asarray(margins))
    with mpmath.workdps(60):
        epsilon = mpmath.mpf(float(np.float32(smoothing)))
        xs = [mpmath.mpf(float(m)) / 8 for m in margins]

        def softplus(x):
            return mpmath.log1p(mpmath.exp(x))

        exact = [float((1 - epsilon) * softplus(-x) + epsilon * softplus(x)) for x in xs]
        slope = [float((epsilon / (1 + mpmath.exp(-x)) - (1 - epsilon) / (1 + mpmath.exp(x))) / 8) for x in xs]
    some = np.abs(np.array(exact)) > 1e-37
    np.testing.assert_allclose(value[some], np.array(exact)[some], rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=2e-6, atol=1e-37 if smoothing == 0 else 1e-8)
    assert np.all(gradient[margins < 300] != 0)


def test_squared_preferences():
    """IPO: (x − 1/(2β))²."""
    args = [jnp.array(x) for x in ([-3.0, -1.0], [-5.0, -2.0], [-4.0, -1.5], [-4.5, -1.0])]
    x = np.array([(-3 + 4) - (-5 + 4.5), (-1 + 1.5) - (-2 + 1)])
    got = jsoftmax.preference_loss(*args, beta=0.25, objective="squared", reduction="none")
    np.testing.assert_allclose(got, (x - 2) ** 2, rtol=1e-6)
    mean = jsoftmax.preference_loss(*args, beta=0.25, objective="squared", weights=jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(mean, np.average((x - 2) ** 2, weights=[3, 1]), rtol=1e-6)


def test_preferences_without_weight_may_hold_nan():
    nan, weights = jnp.array([-1.0, jnp.nan]), jnp.array([True, False])
    value, gradient = jax.value_and_grad(jsoftmax.preference_loss)(nan, nan - 1, nan, nan, weights=weights)
    np.testing.assert_allclose(value, np.log1p(np.exp(-0.1)), rtol=1e-6)
    np.testing.assert_allclose(gradient, [-0.1 / (1 + np.exp(0.1)), 0], rtol=1e-6)
    assert jsoftmax.preference_loss(*[jnp.zeros(0)] * 4) == 0


def test_preferences_of_a_language_model():
    """From features, without logits: one step against the gradient makes the chosen sequence likelier."""
    kernel, rows = language_data()

    def loss(kernel):
        policy = from_features(kernel, rows)
        chosen, rejected = jnp.moveaxis(jsoftmax.sequence_log_prob(policy, rows["weights"]), 1, 0)
        reference = jax.lax.stop_gradient((chosen, rejected))
        return jsoftmax.preference_loss(chosen, rejected, *reference), (chosen - rejected).mean()

    (value, before), gradient = jax.value_and_grad(loss, has_aux=True)(kernel)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert loss(kernel - 0.5 * gradient)[1] > before


X = jnp.array([-1.0, -2.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jsoftmax.policy_gradient_loss(X.astype(int), X), TypeError, "policy must hold floating-point"),
        (lambda: jsoftmax.policy_gradient_loss(X, X[:1]), ValueError, r"advantages has shape \(1,\), but needs \(2,\)"),
        (lambda: jsoftmax.policy_gradient_loss(X, X, entropy_bonus=0.1), ValueError, "entropy_bonus needs the entropy"),
        (lambda: jsoftmax.policy_gradient_loss(X, X, reduction="avg"), ValueError, "reduction must be one of"),
        (lambda: jsoftmax.policy_gradient_loss(X, X, weights=jnp.ones(3)), ValueError, r"weights has shape \(3,\)"),
        (lambda: jsoftmax.policy_gradient_loss(X, X, weights=jnp.ones(2, int)), TypeError, "weights must hold"),
        (lambda: jsoftmax.clipped_policy_loss(X, X[:1], X), ValueError, "old_policy has shape"),
        (lambda: jsoftmax.clipped_policy_loss(X, X, X, clip=-0.1), ValueError, "clip must be between 0 and 1"),
        (lambda: jsoftmax.clipped_policy_loss(X, X, X, dual_clip=0.5), ValueError, "dual_clip must be at least 1"),
        (lambda: jsoftmax.clipped_policy_loss(X, X, X, kl_penalty=0.1), ValueError, "needs a reference_policy"),
        (lambda: jsoftmax.group_relative_policy_loss(X, X, X), ValueError, r"policy has shape \(2,\), but needs"),
        (lambda: jsoftmax.group_relative_policy_loss(X[None], X[None], X), ValueError, "rewards has shape"),
        (lambda: jsoftmax.group_relative_policy_loss(X[None], X[None], X[:1], average="no"), ValueError, "average"),
        (lambda: jsoftmax.group_advantages(X[:0]), ValueError, "rewards has shape"),
        (lambda: jsoftmax.sequence_log_prob(X[0]), ValueError, "at least one dimension"),
        (lambda: jsoftmax.preference_loss(X, X[:1], X, X), ValueError, "rejected has shape"),
        (lambda: jsoftmax.preference_loss(X, X, X, X[:1]), ValueError, "reference_rejected has shape"),
        (lambda: jsoftmax.preference_loss(X, X, X, X, beta=0.0), ValueError, "beta must be at least"),
        (lambda: jsoftmax.preference_loss(X, X, X, X, label_smoothing=2.0), ValueError, "label_smoothing must be"),
        (lambda: jsoftmax.preference_loss(X, X, X, X, objective="hinge"), ValueError, "objective must be one of"),
        (lambda: jsoftmax.preference_loss(X, X, X, X, objective="squared", label_smoothing=0.1), ValueError, "needs o"),
    ],
)  # fmt: skip
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()
