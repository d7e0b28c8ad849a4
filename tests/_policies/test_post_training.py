"""Objectives of post-training: against TRL and Liger, packed against unpacked, and where probabilities are 0 or 1."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.test_util import check_grads

import jsoftmax

PEERS = json.loads(pathlib.Path(__file__).with_name("peers_post_training.json").read_text())
GIVEN = {name: np.array(value) for name, value in PEERS["inputs"].items()}
LONGEST = 8  # of an answer, in the peers' denominators


def on_policy(policy, **options):
    advantages = np.broadcast_to(GIVEN["advantages"][:, None], policy.shape)
    return jsoftmax.clipped_policy_loss(policy, GIVEN["old"], advantages, weights=GIVEN["mask"], **options)


def on_pairs(chosen, rejected, **options):
    return jsoftmax.preference_loss(chosen, rejected, **options)


def on_answers(policy, **options):
    return jsoftmax.unpaired_preference_loss(policy, GIVEN["reference_chosen"], GIVEN["desirable"], **options)


REFERENCES = {name: GIVEN[name] for name in ("reference_chosen", "reference_rejected")}
PENALTY = {"reference_policy": GIVEN["reference"], "kl_penalty": 0.5}
# The options that make one of the other, by the peers' names.
CALLS = {
    "GRPO": (on_policy, {**PENALTY, "kl_penalty": 0.04, "clip": (0.2, 0.28), "average": "sequence"}),
    "dual clip": (on_policy, {"clip": (0.2, 0.28), "dual_clip": 1.5, "average": "sequence"}),
    "GSPO": (on_policy, {"importance": "sequence", "clip": (0.03, 0.04), "average": "sequence"}),
    "DAPO": (on_policy, {"clip": (0.2, 0.28)}),
    "Dr. GRPO": (on_policy, {"clip": (0.2, 0.28), "denominator": len(GIVEN["mask"]) * LONGEST}),
    "CISPO": (on_policy, {"objective": "cispo", "clip": (1.0, 0.3)}),
    "SAPO": (on_policy, {"objective": "sapo", "average": "sequence"}),
    "corrected KL": (on_policy, {**PENALTY, "clip": (0.2, 0.28), "kl_correction": True}),
    "truncated importance": (
        on_policy, {**PENALTY, "clip": (0.2, 0.28), "sampler_policy": GIVEN["sampler"], "importance_cap": 1.2}
    ),
    "SimPO": (on_pairs, {"beta": 2.0, "margin": 0.5, "label_smoothing": 0.1}),
    "CPO": (on_pairs, {"beta": 0.1}),
    "ORPO": (on_pairs, {"objective": "odds_ratio", "beta": 0.3, "likelihood_bonus": 1.0}),
    "DPO": (on_pairs, {"beta": 0.1, **REFERENCES}),
    "KTO": (on_answers, {"beta": 0.5, "baseline": 0.3}),
}  # fmt: skip


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", PEERS["cases"])
def test_peers(case):
    """Values and gradients; TRL computes ORPO's in float32."""
    _, name = case.split(" ", 1)
    function, options = CALLS[name]
    inputs = (GIVEN["chosen"], GIVEN["rejected"]) if function is on_pairs else (GIVEN["policy"],)
    inputs = (GIVEN["chosen"],) if function is on_answers else inputs
    loss = functools.partial(function, **options)
    value, gradients = jax.value_and_grad(loss, tuple(range(len(inputs))))(*map(jnp.asarray, inputs))
    rtol = 2e-6 if case == "trl ORPO" else 1e-11
    np.testing.assert_allclose(value, PEERS["cases"][case]["value"], rtol=rtol)
    for actual, expected in zip(gradients, PEERS["cases"][case]["gradients"], strict=True):
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-7 if case == "trl ORPO" else 1e-15)


def test_every_call_has_a_peer():
    assert set(CALLS) == {case.split(" ", 1)[1] for case in PEERS["cases"]}


# --- Packed ---

LENGTHS = ((3, 1, 2), (2, 4, 0))  # of the sequences in two rows; the third of the second row has no token
TOKENS = 8


def packed():
    """Answers one after the other in rows, the same ones by themselves, and where each token lies there."""
    random = np.random.default_rng(0)
    ids, places = np.full((2, TOKENS), 7), np.full((2, 3, TOKENS), -1)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            ids[row, start : start + length] = number
            places[row, number, :length] = range(start, start + length)
            start += length
    ids[0, -1] = -3  # below the numbers; the rest of what is not used is above them
    values = {name: random.normal(size=(2, TOKENS)) - 1 for name in ("policy", "old", "reference", "sampler")}
    values["weights"] = random.uniform(0.5, 1.5, size=(2, TOKENS))
    unused = ids != np.clip(ids, 0, 2)
    for name in values:
        values[name][unused] = np.nan
    alone = {name: np.take_along_axis(x[:, None], np.maximum(places, 0), -1) for name, x in values.items()}
    alone["weights"] = np.where(places >= 0, alone["weights"], 0)
    return jnp.asarray(ids), {n: jnp.asarray(x) for n, x in values.items()}, alone, places


PACKED_OPTIONS = {
    "default": {},
    "tokens": {"average": "token", "kl_estimator": "k2"},
    "GSPO": {"importance": "sequence", "clip": (0.3, 0.3)},
    "CISPO": {"objective": "cispo", "denominator": 10.0, "average": "token"},
    "SAPO, a cap": {"objective": "sapo", "importance": "sequence"},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", PACKED_OPTIONS.values(), ids=PACKED_OPTIONS.keys())
def test_packed_is_unpacked(options):
    """Also its gradient, which is 0 for tokens of no sequence, whatever they hold."""
    ids, rows, alone, places = packed()
    rewards = jnp.array([[1.0, 0.0, 0.5], [0.0, 3.0, 1.0]])

    def loss(policy, data, **more):
        return jsoftmax.group_relative_policy_loss(
            policy, data["old"], rewards, weights=data["weights"], reference_policy=data["reference"], kl_penalty=0.1,
            sampler_policy=data["sampler"], **options, **more,
        )  # fmt: skip

    expected, d_alone = jax.value_and_grad(loss)(jnp.asarray(alone["policy"]), alone)
    value, d_policy = jax.jit(jax.value_and_grad(lambda p: loss(p, rows, segment_ids=ids)))(rows["policy"])
    back = np.zeros((2, TOKENS))
    for row, number, place in np.argwhere(places >= 0):
        back[row, places[row, number, place]] = d_alone[row, number, place]
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(d_policy, back, rtol=1e-12, atol=1e-16)
    assert np.count_nonzero(back) > 5


@pytest.mark.parametrize("average", [False, True])
def test_packed_sequences(average):
    ids, rows, alone, _ = packed()
    expected = jsoftmax.sequence_log_prob(alone["policy"], alone["weights"], average=average)
    options = {"average": average, "segment_ids": ids, "num_segments": 3}
    actual = jsoftmax.sequence_log_prob(rows["policy"], rows["weights"], **options)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert actual[1, 2] == 0
    gradient = jax.grad(lambda p: jsoftmax.sequence_log_prob(p, rows["weights"], **options).sum())(rows["policy"])
    assert np.all(np.isfinite(gradient))
    more = jsoftmax.sequence_log_prob(rows["policy"], rows["weights"], **{**options, "num_segments": 5})
    np.testing.assert_array_equal(more, np.pad(actual, ((0, 0), (0, 2))))


def test_sequences_of_whole_rows_need_no_number():
    """As many sequences as tokens, if nothing is said: here one a token, whose average is itself."""
    policy, old = jnp.array([[-1.0, -2.0, -0.5]]), jnp.array([[-1.1, -1.5, -0.5]])
    loss = functools.partial(jsoftmax.clipped_policy_loss, policy, old, jnp.ones((1, 3)), reduction="none")
    of_tokens = loss(segment_ids=jnp.array([[0, 1, 2]]), importance="sequence", average="sequence")
    np.testing.assert_allclose(of_tokens, loss(), rtol=1e-6)


# --- Closed forms ---


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("estimator", "correction", "gradient"),
    [("k1", False, "none"), ("k2", False, "reverse"), ("k3", False, "forward"), ("k1", True, "reverse"),
     ("k3", True, "reverse")],
)  # fmt: skip
def test_gradients_of_the_estimators_on_average(estimator, correction, gradient):
    """Over all actions by their probabilities: of KL(π‖ref), of KL(ref‖π), or of nothing. A value is never biased."""
    random = np.random.default_rng(0)
    z, other = jnp.asarray(random.normal(size=(2, 5)))
    p, q = jax.nn.softmax(z), jax.nn.softmax(other)

    def average(z):
        policy = jax.nn.log_softmax(z)
        return jsoftmax.policy_gradient_loss(
            policy, jnp.zeros(5), weights=p, reference_policy=jnp.log(q), kl_penalty=1.0, kl_estimator=estimator,
            kl_correction=correction,
        )  # fmt: skip

    reverse = np.sum(p * np.log(p / q))
    expected = {"none": np.zeros(5), "reverse": p * (np.log(p / q) - reverse), "forward": p - q}[gradient]
    np.testing.assert_allclose(jax.grad(average)(z), expected, rtol=1e-10, atol=1e-15)
    if estimator != "k2":
        np.testing.assert_allclose(average(z), reverse, rtol=1e-12)


def test_leave_one_out():
    rewards = np.array([[1.0, 0.0, 4.0, 0.5], [0.1, 0.1, 0.1, 0.1]], np.float32)
    others = (rewards.sum(-1, keepdims=True) - rewards) / 3
    got = jsoftmax.group_advantages(rewards, scale=False, baseline="leave_one_out")
    np.testing.assert_allclose(got, np.where([[1], [0]], rewards - others, 0), rtol=1e-6)
    np.testing.assert_array_equal(jsoftmax.group_advantages(jnp.array([[3.0]]), baseline="leave_one_out"), 0)
    mean = functools.partial(jsoftmax.group_advantages, jnp.asarray(rewards[0]))
    np.testing.assert_allclose(mean(baseline="leave_one_out"), mean() * 4 / 3, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_reinforce_with_importance():
    """min(π / π_sampler, C)·A as the constant of the policy gradient."""
    policy, sampler = jnp.log(jnp.array([0.5, 0.9, 0.2])), jnp.log(jnp.array([0.4, 0.1, 0.4]))
    advantages = jnp.array([1.0, -2.0, 3.0])
    loss = functools.partial(jsoftmax.policy_gradient_loss, reduction="sum")
    gradient = jax.grad(loss)(policy, advantages, sampler_policy=sampler)
    np.testing.assert_allclose(gradient, -advantages * np.array([1.25, 2.0, 0.5]), rtol=1e-14)


@pytest.mark.usefixtures("x64")
def test_derivative_modes():
    policy, old = jnp.asarray(GIVEN["policy"]), jnp.asarray(GIVEN["old"])
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, size=policy.shape))

    def f(policy, weights, penalty):
        return jsoftmax.clipped_policy_loss(
            policy, old, jnp.ones_like(policy), objective="sapo", importance="sequence", average="sequence",
            reference_policy=GIVEN["reference"], kl_penalty=penalty, kl_estimator="k2", kl_correction=True,
            segment_ids=ids, weights=weights, denominator=7.0,
        )  # fmt: skip

    check_grads(jax.jit(f), (policy, jnp.full_like(policy, 0.5), jnp.array(0.3)), 1, ["fwd", "rev"], 1e-5, 1e-5)


# --- Tails ---


def test_odds_ratio_in_both_tails():
    """Against mpmath: log(1 + odds_r / odds_c), and both slopes, from p of 1e-30 to 1 − 1e-30, in float32."""
    logs = np.array([-70.0, -10.0, -1.0, -0.7, -0.69, -0.1, -1e-4, -1e-12, -1e-30], np.float32)
    chosen, rejected = (x.ravel() for x in np.meshgrid(logs, logs))
    loss = functools.partial(jsoftmax.preference_loss, objective="odds_ratio", beta=1.0, reduction="none")
    value = loss(chosen, rejected)
    gradients = jax.grad(lambda c, r: loss(c, r).sum(), (0, 1))(jnp.asarray(chosen), jnp.asarray(rejected))
    with mpmath.workdps(60):
        exact, slopes = [], []
        for c, r in zip(chosen, rejected, strict=True):
            c, r = mpmath.mpf(float(c)), mpmath.mpf(float(r))
            odds = [mpmath.exp(x) / -mpmath.expm1(x) for x in (c, r)]
            exact.append(float(mpmath.log1p(odds[1] / odds[0])))
            share = odds[1] / (odds[0] + odds[1])
            slopes.append([float(share / mpmath.expm1(c)), float(-share / mpmath.expm1(r))])
    some = np.array(exact) > 1e-36
    # A difference of logarithms up to 140 has an error of some 2e-5, and e to it that relative error.
    np.testing.assert_allclose(value[some], np.array(exact)[some], rtol=5e-5)
    for actual, expected in zip(gradients, np.array(slopes).T, strict=True):
        large = (np.abs(expected) > 1e-30) & some
        np.testing.assert_allclose(actual[large], expected[large], rtol=5e-5)
        assert np.all(np.isfinite(actual))
    exactly = loss(jnp.array([0.0, -1.0]), jnp.array([-1.0, 0.0]))
    np.testing.assert_allclose(exactly, [0, 87.9], atol=0.1)


def test_unpaired_preferences_in_both_tails():
    margins = np.array([-800.0, -80.0, -1.0, 0.0, 1.0, 80.0, 800.0], np.float32)
    loss = functools.partial(jsoftmax.unpaired_preference_loss, beta=1.0, reduction="none")
    zero = jnp.zeros(margins.size)
    for desirable in (True, False):
        value = loss(margins, zero, jnp.full(margins.size, desirable))
        with mpmath.workdps(40):
            exact = [float(1 / (1 + mpmath.exp(float(m if desirable else -m)))) for m in margins]
        np.testing.assert_allclose(value, exact, rtol=1e-6, atol=1e-37)


@pytest.mark.usefixtures("x64")
def test_baseline_of_unpaired_preferences():
    """The mean by the weights, at least 0, and a constant; λ counts in the losses, not in the mean."""
    policy, reference = jnp.array([-3.0, -2.0, jnp.nan]), jnp.array([-2.5, -3.0, jnp.nan])
    desirable, weights = jnp.array([True, False, True]), jnp.array([3.0, 1.0, 0.0])
    for ratios, z in ((jnp.array([1.0, 2.0, jnp.nan]), 1.25), (jnp.array([-1.0, 2.0, 9.0]), 0.0)):
        loss = functools.partial(
            jsoftmax.unpaired_preference_loss, desirable=desirable, weights=weights, beta=0.5,
            desirable_weight=1.5, undesirable_weight=0.7,
        )  # fmt: skip
        x = np.array([-0.5, 1.0])
        expected = (3 * 1.5 / (1 + np.exp(0.5 * (x[0] - z))) + 0.7 / (1 + np.exp(-0.5 * (x[1] - z)))) / 4
        np.testing.assert_allclose(loss(policy, reference, baseline=ratios), expected, rtol=1e-14)
        gradients = jax.grad(lambda p, r, b, loss=loss: loss(p, r, baseline=b), (0, 1, 2))(policy, reference, ratios)
        assert gradients[0][0] < 0 < gradients[0][1]
        np.testing.assert_array_equal(gradients[0][2], 0)
        np.testing.assert_array_equal(gradients[1:], 0)


INF = jnp.inf
# Of an action: its new and old log-probability, and the ratio that counts; for each, an advantage of 1, −1 and 0.
IMPOSSIBLE = np.repeat([(-INF, -1.0, 0.0), (-INF, -INF, 1.0), (-1.0, -INF, 1.8e19)], 3, axis=0).astype(np.float32)


@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clipped", "cispo", "sapo"])
def test_actions_outside_the_support(objective, importance):
    """Finite losses, but for log p itself, and finite gradients of all objectives, penalties and importances."""
    new, old = (jnp.asarray(np.stack([x, np.full(9, -1.0, np.float32)], axis=-1)) for x in IMPOSSIBLE.T[:2])
    advantages = np.tile([1.0, -1.0, 0.0], 3)
    f = functools.partial(
        jsoftmax.clipped_policy_loss, advantages=jnp.asarray(np.stack([advantages] * 2, axis=-1), jnp.float32),
        importance=importance, reduction="none",
    )  # fmt: skip
    if objective == "clipped":
        ratio = IMPOSSIBLE[:, 2] if importance == "token" else np.sqrt(IMPOSSIBLE[:, 2])
        np.testing.assert_allclose(f(new, old, clip=(1.0, INF))[:, 0], -advantages * ratio, rtol=0.05)

    @functools.partial(jax.jit, static_argnames="estimator")
    def loss_and_gradient(new, estimator):
        def loss(new):
            losses = f(
                new, old, objective=objective, reference_policy=old, kl_penalty=0.1, kl_estimator=estimator,
                sampler_policy=old,
            )  # fmt: skip
            return losses.sum(), losses

        gradient, losses = jax.grad(loss, has_aux=True)(new)
        return losses, gradient

    for estimator in ("k1", "k2", "k3"):
        losses, gradient = loss_and_gradient(new, estimator)
        assert np.all(np.isfinite(gradient))
        assert not np.any(np.isnan(losses))
        assert objective == "cispo" or np.all(np.isfinite(losses))


def test_what_the_reference_rules_out_is_left():
    """It costs 44 and more, and the policy is led away from it as from what is very unlikely there."""
    z = jnp.zeros(2)

    def loss(z):
        policy = jax.nn.log_softmax(z)
        return jsoftmax.policy_gradient_loss(
            policy, z * 0, reference_policy=jnp.array([-INF, 0.0]), kl_penalty=1.0, weights=jnp.array([1.0, 0.0])
        )

    np.testing.assert_allclose(loss(z), np.log(np.sqrt(3.4e38)) - 1, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(loss)(z), [0.5, -0.5], rtol=1e-6)


@pytest.mark.parametrize("objective", ["sigmoid", "squared", "odds_ratio"])
def test_preferences_without_probability(objective):
    chosen, rejected = jnp.array([-INF, -INF, -1.0, 0.0, 0.0]), jnp.array([-1.0, -INF, -INF, 0.0, -INF])
    loss = functools.partial(jsoftmax.preference_loss, objective=objective, reduction="none")
    references = () if objective == "odds_ratio" else (jnp.full(5, -2.0), jnp.full(5, -3.0))
    value = loss(chosen, rejected, *references)
    same = loss(jnp.array([-5.0]), jnp.array([-5.0]))
    assert not np.any(np.isnan(value))
    np.testing.assert_allclose(value[1], same[0], rtol=1e-6)
    assert value[0] == INF
    gradients = jax.grad(lambda c, r: loss(c, r, *references).sum(), (0, 1))(chosen, rejected)
    if objective != "squared":
        assert np.all(np.isfinite(gradients))
        assert value[2] == 0


def test_no_weight_no_look():
    """In what the new options take, too; and no number for an empty batch or a group of one."""
    mask = jnp.array([[True, False], [True, True]])
    nan = jnp.where(mask, -1.0, jnp.nan)

    def loss(policy):
        return jsoftmax.group_relative_policy_loss(
            policy, nan, jnp.array([1.0, 0.0]), weights=mask, sampler_policy=nan, reference_policy=nan, kl_penalty=0.1,
            importance="sequence", objective="cispo", denominator=4.0,
        )  # fmt: skip

    gradient = jax.grad(loss)(nan)
    assert gradient[0, 1] == 0
    assert np.all(np.isfinite(gradient))
    empty = jnp.zeros((0, 2))
    assert jsoftmax.clipped_policy_loss(empty, empty, empty, average="sequence", importance="sequence") == 0
    assert jsoftmax.unpaired_preference_loss(jnp.zeros(0), jnp.zeros(0), jnp.zeros(0, bool)) == 0
    assert jsoftmax.group_relative_policy_loss(-jnp.ones((3, 1, 2)), -jnp.ones((3, 1, 2)), jnp.ones((3, 1))) == 0


X, IDS = jnp.array([-1.0, -2.0]), jnp.array([0, 1])
CLIPPED = functools.partial(jsoftmax.clipped_policy_loss, X, X, X)
UNPAIRED = functools.partial(jsoftmax.unpaired_preference_loss, X, X)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CLIPPED(objective="ppo"), ValueError, "objective must be one of 'clipped', 'cispo', 'sapo'"),
        (lambda: CLIPPED(objective="sapo", clip=0.2), ValueError, 'clip=0.2 is no option of objective="sapo"'),
        (lambda: CLIPPED(gate_temperature=1.0), ValueError, 'gate_temperature=1.0 is no option of objective="clipped"'),
        (lambda: CLIPPED(objective="sapo", gate_temperature=0.0), ValueError, "gate_temperature must be at least"),
        (lambda: CLIPPED(importance="row"), ValueError, "importance must be one of"),
        (lambda: CLIPPED(average="answer"), ValueError, "average must be one of"),
        (lambda: CLIPPED(kl_estimator="k4"), ValueError, "kl_estimator must be one of"),
        (lambda: CLIPPED(importance_cap=2.0), ValueError, "needs a sampler_policy"),
        (lambda: CLIPPED(sampler_policy=X, importance_cap=-1.0), ValueError, "importance_cap must be at least 0"),
        (lambda: CLIPPED(sampler_policy=X[:1]), ValueError, "sampler_policy has shape"),
        (lambda: CLIPPED(segment_ids=X), TypeError, "segment_ids must hold integer"),
        (lambda: CLIPPED(segment_ids=IDS[:1]), ValueError, r"segment_ids has shape \(1,\), but needs \(2,\)"),
        (lambda: CLIPPED(num_segments=2), ValueError, "needs segment_ids"),
        (lambda: CLIPPED(denominator=2.0, reduction="sum"), ValueError, 'denominator=2.0 is what reduction="mean"'),
        (lambda: CLIPPED(denominator=0.0), ValueError, "denominator must be at least"),
        (lambda: CLIPPED(temperature=2.0), TypeError, "unknown option 'temperature'; the options are weights"),
        (lambda: jsoftmax.policy_gradient_loss(X, X, clip=0.2), TypeError, "unknown option 'clip'"),
        (lambda: jsoftmax.policy_gradient_loss(X[0], X[0], average="sequence"), ValueError, "at least one dimension"),
        (lambda: jsoftmax.sequence_log_prob(X, segment_ids=IDS), ValueError, "segment_ids needs num_segments"),
        (lambda: jsoftmax.group_relative_policy_loss(X, X, X[None], segment_ids=IDS), ValueError, "rewards has shape"),
        (lambda: jsoftmax.group_advantages(X, baseline="none"), ValueError, "baseline must be one of"),
        (lambda: jsoftmax.preference_loss(X, X, X), ValueError, "reference_chosen alone is not enough"),
        (lambda: jsoftmax.preference_loss(X, X, X, X, objective="odds_ratio"), ValueError, "takes no references"),
        (lambda: jsoftmax.preference_loss(X, X, margin=1.0, objective="squared"), ValueError, "margin=1.0 needs ob"),
        (lambda: UNPAIRED(jnp.ones(2)), TypeError, "desirable must be boolean"),
        (lambda: UNPAIRED(jnp.ones(1, bool)), ValueError, "desirable has shape"),
        (lambda: UNPAIRED(jnp.ones(2, bool), baseline=X[:1]), ValueError, "baseline has shape"),
    ],
)  # fmt: skip
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()
