"""Losses of policies: what an agent or a language model learns from the rewards of its own actions.

A policy enters by the statistics of its logits at the actions taken, so that a loss does not know whether there were
logits (`softmax_statistics`) or features and a kernel (`linear_softmax_statistics`).
"""

from typing import Unpack

from jax import Array
from jax.typing import ArrayLike

from jsoftmax._policies.actions import Policy, scaled
from jsoftmax._policies.objectives import objective
from jsoftmax._policies.options import PolicyOptions, RatioOptions, checked_actions
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout


@in_any_layout("policy")
def policy_gradient_loss(policy: Policy, advantages: ArrayLike, **options: Unpack[PolicyOptions]) -> Array:
    r"""The loss whose gradient is the policy gradient: REINFORCE, and the policy's part of A2C.

    .. math:: \mathrm{loss} = -A \log \pi(a) - \beta H(\pi), \qquad
        \frac{\partial\,\mathrm{loss}}{\partial z_j} = A\,(\pi_j - [j = a]) + \beta\,\pi_j (\log \pi_j + H)

    Args:
        policy: `softmax_statistics(logits, actions)`, or `linear_softmax_statistics` of features, kernel and actions;
            without an entropy bonus, log-probabilities of the actions will do. Of any shape; if actions are tokens of
            sequences, the last axis holds them.
        advantages: float array of the same shape: how much better than expected each action did. A constant.
        **options: see `PolicyOptions`: `weights`, `reduction`, `entropy_bonus`, `kl_penalty` and others. The policy
            itself, as a constant, is the old one of `kl_correction` and `sampler_policy`.

    Returns:
        A scalar, or an array of the policy's shape: float32, or float64 for float64. +∞ or −∞ if an action of
        probability 0 has an advantage, with the gradient of its formula; such an action without one counts 0.

    Raises:
        TypeError: what is not floating-point, or segment_ids that are not integers.
        ValueError: shapes that differ, an option that is unknown or out of range, a penalty without a reference, or an
            entropy bonus without statistics.

    Derivatives: with respect to policy, entropy_bonus, kl_penalty, weights and denominator; every mode that the
    statistics have.

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
    checks.only_options(options, PolicyOptions)
    actions = checked_actions(policy, None, advantages, options)
    return actions.loss(scaled(actions.advantages, actions.log_prob))


@in_any_layout("policy")
def clipped_policy_loss(
    policy: Policy, old_policy: Policy, advantages: ArrayLike, **options: Unpack[RatioOptions]
) -> Array:
    r"""The clipped objective of PPO, for several steps on actions that an older policy took, and its relatives.

    .. math:: \mathrm{loss} = -\min\bigl(r A,\ \mathrm{clip}(r, 1 - \varepsilon, 1 + \varepsilon)\,A\bigr)
        + \lambda\,\mathrm{KL} - \beta H(\pi), \qquad r = \pi(a) / \pi_{\mathrm{old}}(a)

    KL is an estimate of the divergence from a reference policy. CISPO and SAPO have other functions of the ratio
    (`objective`), GSPO that of whole sequences (`importance`).

    Args:
        policy: as in `policy_gradient_loss`.
        old_policy: the policy that took the actions, likewise. A constant.
        advantages: as in `policy_gradient_loss`.
        **options: see `RatioOptions`, `objective`, `importance`, `clip` and others, and `PolicyOptions`.

    Returns:
        A scalar, or an array of the policy's shape. Ratios end at the square root of the largest number, 1.8e19 in
        float32, beyond which an action gets no gradient; so a ratio never overflows. It is 0 for an action that the
        policy rules out, and 1 for one that the old policy ruled out as well.

    Raises:
        TypeError: what is not floating-point, or segment_ids that are not integers.
        ValueError: as `policy_gradient_loss`, or an option that the objective does not have.

    Derivatives: as `policy_gradient_loss`. Where the objective is clipped, the gradient is exactly 0.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> old, new = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.55, 0.9]))
        >>> print(jsoftmax.clipped_policy_loss(new, old, jnp.ones(2), reduction="none"))
        [-1.1 -1.2]

    References:
        Schulman et al., *Proximal Policy Optimization Algorithms*, 2017; Ye et al., *Mastering Complex Control in MOBA
        Games with Deep Reinforcement Learning*, 2020 (dual clip); Yu et al., *DAPO*, 2025 (two bounds, token mean);
        Zheng et al., *Group Sequence Policy Optimization*, 2025 (GSPO); MiniMax, *MiniMax-M1*, 2025 (CISPO); Gao et
        al., *Soft Adaptive Policy Optimization*, 2025 (SAPO); Schulman, *Approximating KL Divergence*, 2020 (k1 to k3);
        Yao et al., *Your Efficient RL Framework Secretly Brings You Off-Policy RL Training*, 2025 (importance_cap).
    """
    checks.only_options(options, RatioOptions)
    actions = checked_actions(policy, old_policy, advantages, options)
    log_ratio, importance = actions.log_ratio, options.get("importance", "token")
    checks.one_of("importance", importance, ("token", "sequence"))
    if importance == "sequence":
        log_ratio = actions.sequence_mean(log_ratio)
    own = {name: options.get(name) for name in ("clip", "dual_clip", "gate_temperature")}
    value = objective(options.get("objective", "clipped"), log_ratio, actions.log_prob, actions.advantages, own)
    return actions.loss(value)
