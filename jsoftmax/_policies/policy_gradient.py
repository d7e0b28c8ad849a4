"""Losses of policies: what an agent or a language model learns from the rewards of its own actions.

A policy enters by the statistics of its logits at the actions taken, so that a loss does not know whether there were
logits (`softmax_statistics`) or features and a kernel (`linear_softmax_statistics`).
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._losses.divergences import above_tangent
from jsoftmax._policies.actions import (
    Policy,
    bounded,
    checked_weights,
    constant_like,
    entropy_of,
    log_prob_of,
    reduced,
    silenced,
)
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.weights import REDUCTIONS

Clip = ArrayLike | tuple[ArrayLike, ArrayLike]


@in_any_layout("policy")
def policy_gradient_loss(
    policy: Policy,
    advantages: ArrayLike,
    *,
    entropy_bonus: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
) -> Array:
    r"""The loss whose gradient is the policy gradient: REINFORCE, and the policy's part of A2C.

    .. math:: \mathrm{loss} = -A \log \pi(a) - \beta H(\pi), \qquad
        \frac{\partial\,\mathrm{loss}}{\partial z_j} = A\,(\pi_j - [j = a]) + \beta\,\pi_j (\log \pi_j + H)

    Args:
        policy: `softmax_statistics(logits, actions)`, or `linear_softmax_statistics` of features, kernel and actions;
            without an entropy bonus, log-probabilities of the actions will do. Of any shape.
        advantages: float array of the same shape: how much better than expected each action did. A constant.
        entropy_bonus: β, which keeps the policy from settling too early; may be traced.
        weights: a factor for each action, or booleans. An action of weight 0 is never looked at, NaN or not.
        reduction: "mean" divides by the sum of the weights, and is 0 if that is; "sum"; "none" for each action's loss
            times its weight.

    Returns:
        A scalar, or an array of the policy's shape: float32, or float64 for float64.

    Raises:
        TypeError: what is not floating-point.
        ValueError: shapes that differ, an unknown reduction, or an entropy bonus without statistics.

    Derivatives: with respect to policy, entropy_bonus and weights; every mode that the statistics have.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> actions, advantages = jnp.array([0, 2]), jnp.array([1.0, -1.0])
        >>> def loss(logits):
        ...     return jsoftmax.policy_gradient_loss(jsoftmax.softmax_statistics(logits, actions), advantages)
        >>> print(jax.grad(loss)(jnp.zeros((2, 3))))
        [[-0.3333  0.1667  0.1667]
         [-0.1667 -0.1667  0.3333]]

    References:
        Williams, *Simple Statistical Gradient-Following Algorithms*, 1992 (REINFORCE); Mnih et al., *Asynchronous
        Methods for Deep Reinforcement Learning*, 2016 (A2C and the entropy bonus).
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    log_prob = log_prob_of("policy", policy)
    advantages = constant_like("advantages", advantages, log_prob, "one advantage for each action of policy")
    weights = checked_weights(weights, log_prob)
    log_prob, advantages = silenced(weights, log_prob, advantages)
    # An action of probability 0 with no advantage counts 0, not 0 · ∞.
    losses = jnp.where(advantages == 0, 0, -advantages * log_prob)
    return reduced(losses - _entropy_term(policy, log_prob, entropy_bonus, weights), weights, reduction)


@in_any_layout("policy")
def clipped_policy_loss(
    policy: Policy,
    old_policy: Policy,
    advantages: ArrayLike,
    *,
    clip: Clip = 0.2,
    dual_clip: ArrayLike | None = None,
    reference_policy: Policy | None = None,
    kl_penalty: ArrayLike = 0.0,
    entropy_bonus: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
) -> Array:
    r"""The clipped objective of PPO, for several steps on actions that an older policy took.

    .. math:: \mathrm{loss} = -\min\bigl(r A,\ \mathrm{clip}(r, 1 - \varepsilon, 1 + \varepsilon)\,A\bigr)
        + \lambda\,\mathrm{KL} - \beta H(\pi), \qquad r = \pi(a) / \pi_{\mathrm{old}}(a)

    KL is the k3 estimate :math:`e^x - 1 - x` of the divergence from a reference policy, :math:`x = \log
    \pi_{\mathrm{ref}}(a) - \log \pi(a)`: never negative, and right where the two are close.

    Args:
        policy: as in `policy_gradient_loss`.
        old_policy: the policy that took the actions, likewise. A constant.
        advantages: as in `policy_gradient_loss`.
        clip: ε, or a pair of those below and above 1, both at least 0; may be traced.
        dual_clip: c > 1, a bound on the ratio of actions of negative advantage, whose loss has none otherwise.
        reference_policy: the policy to stay close to, likewise. A constant.
        kl_penalty: λ, which needs a reference_policy; may be traced.
        entropy_bonus: β, as in `policy_gradient_loss`.
        weights: a factor for each action, as in `policy_gradient_loss`.
        reduction: as in `policy_gradient_loss`.

    Returns:
        A scalar, or an array of the policy's shape. Ratios end at the square root of the largest number, 1.8e19 in
        float32, beyond which an action gets no gradient; so a ratio never overflows.

    Raises:
        TypeError: what is not floating-point.
        ValueError: shapes that differ, an unknown reduction, a clip or dual_clip out of range, a penalty without a
            reference, or an entropy bonus without statistics.

    Derivatives: as `policy_gradient_loss`. Where the objective is clipped, the gradient is exactly 0.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> old, new = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.55, 0.9]))
        >>> print(jsoftmax.clipped_policy_loss(new, old, jnp.ones(2), reduction="none"))
        [-1.1 -1.2]

    References:
        Schulman et al., *Proximal Policy Optimization Algorithms*, 2017; Ye et al., *Mastering Complex Control in MOBA
        Games with Deep Reinforcement Learning*, 2020 (dual clip); Yu et al., *DAPO*, 2025 (two bounds); Schulman,
        *Approximating KL Divergence*, 2020 (k3).
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    log_prob = log_prob_of("policy", policy)
    old_log_prob = constant_like("old_policy", log_prob_of("old_policy", old_policy), log_prob, "that of policy")
    advantages = constant_like("advantages", advantages, log_prob, "one advantage for each action of policy")
    weights = checked_weights(weights, log_prob)
    log_prob, old_log_prob, advantages = silenced(weights, log_prob, old_log_prob, advantages)
    losses = -_clipped_objective(log_prob - old_log_prob, advantages, clip, dual_clip)
    losses += _penalty(log_prob, reference_policy, kl_penalty, weights)
    return reduced(losses - _entropy_term(policy, log_prob, entropy_bonus, weights), weights, reduction)


def _clipped_objective(log_ratio: Array, advantages: Array, clip: Clip, dual_clip: ArrayLike | None) -> Array:
    """min(r·A, clip(r)·A) by the side on which A clips, so that no gradient passes an unselected, infinite r."""
    below, above = clip if isinstance(clip, tuple) else (clip, clip)
    checks.within("clip", below, 0.0, 1.0)
    checks.within("clip", above, 0.0, float("inf"))
    below, above = jnp.asarray(below, log_ratio.dtype), jnp.asarray(above, log_ratio.dtype)
    good = advantages > 0
    fixed = jnp.where(good, log_ratio > jnp.log1p(above), log_ratio < jnp.log1p(-below))
    bound = jnp.where(good, 1 + above, 1 - below)
    if dual_clip is not None:
        checks.within("dual_clip", dual_clip, 1.0, float("inf"))
        most = jnp.asarray(dual_clip, log_ratio.dtype)
        over = ~good & (log_ratio > jnp.log(most))
        fixed, bound = fixed | over, jnp.where(over, most, bound)
    ratio = jnp.exp(bounded(jnp.where(fixed, 0, log_ratio)))
    return jnp.where(fixed, bound, ratio) * advantages


def _penalty(log_prob: Array, reference_policy: Policy | None, kl_penalty: ArrayLike, weights: Array) -> Array:
    if reference_policy is None:
        if not checks.is_known(kl_penalty, 0.0):
            raise ValueError(f"kl_penalty={kl_penalty} needs a reference_policy, the policy to stay close to")
        return jnp.zeros_like(log_prob)
    reference = log_prob_of("reference_policy", reference_policy)
    reference = constant_like("reference_policy", reference, log_prob, "that of policy")
    (reference,) = silenced(weights, reference)
    return jnp.asarray(kl_penalty, log_prob.dtype) * above_tangent(bounded(reference - log_prob))


def _entropy_term(policy: Policy, log_prob: Array, entropy_bonus: ArrayLike, weights: Array) -> Array:
    if checks.is_known(entropy_bonus, 0.0):
        return jnp.zeros_like(log_prob)
    return jnp.asarray(entropy_bonus, log_prob.dtype) * silenced(weights, entropy_of(policy, log_prob))[0]
