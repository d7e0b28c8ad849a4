"""Learning from several answers to one question, each judged beside the others."""

from typing import Unpack

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._policies.actions import Policy, log_prob_of
from jsoftmax._policies.options import RatioOptions
from jsoftmax._policies.policy_gradient import clipped_policy_loss
from jsoftmax._policies.sequences import checked_sequences
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout


@in_any_layout("rewards")
def group_advantages(rewards: ArrayLike, *, scale: bool = True, baseline: str = "mean") -> Array:
    r"""Advantages of several answers to one question: rewards relative to those of their group.

    .. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}

    Args:
        rewards: float array `(*batch, group)`.
        scale: whether to divide by the group's standard deviation (over its size, not its size less one); without, as
            Dr. GRPO has it, questions that are almost always or almost never solved do not count more than others.
        baseline: what is taken off. "mean" is the group's; "leave_one_out" that of the others in the group, which does
            not depend on the answer itself (RLOO, usually with `scale=False`), so that the policy gradient has no bias.

    Returns:
        An array of the shape of rewards; exactly 0 in a group whose rewards are all equal, or that has one answer only.
        float32 for narrower ones.

    Raises:
        TypeError: rewards are not floating-point.
        ValueError: rewards without a group, or an unknown baseline.

    Derivatives: none are taken of advantages in the losses here.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])))
        [[ 1. -1. -1.  1.]
         [ 0.  0.  0.  0.]]
        >>> print(jsoftmax.group_advantages(jnp.array([1.0, 0.0, 0.0]), scale=False, baseline="leave_one_out"))
        [ 1.  -0.5 -0.5]

    References:
        Shao et al., *DeepSeekMath*, 2024 (GRPO); Liu et al., *Understanding R1-Zero-Like Training*, 2025 (Dr. GRPO);
        Kool, van Hoof and Welling, *Buy 4 REINFORCE Samples, Get a Baseline for Free*, 2019; Ahmadian et al., *Back to
        Basics*, 2024 (RLOO).
    """
    checks.one_of("baseline", baseline, ("mean", "leave_one_out"))
    rewards = checks.float_array("rewards", rewards)
    rewards = rewards.astype(compute_dtype(rewards.dtype))
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards has shape {rewards.shape}, but needs (*batch, group)")
    # The mean of equal numbers need not be their value, and the quotient of two rounding errors is anything.
    equal = jnp.max(rewards, axis=-1, keepdims=True) == jnp.min(rewards, axis=-1, keepdims=True)
    centered = jnp.where(equal, 0, rewards - jnp.mean(rewards, axis=-1, keepdims=True))
    if scale:
        variance = jnp.mean(centered**2, axis=-1, keepdims=True)
        centered *= lax.rsqrt(jnp.where(equal, 1, variance))
    size = rewards.shape[-1]
    # The distance from the mean of the others is G / (G − 1) times that from the mean of all.
    return centered if baseline == "mean" else centered * (size / max(size - 1, 1))


@in_any_layout("policy")
def group_relative_policy_loss(
    policy: Policy,
    old_policy: Policy,
    rewards: ArrayLike,
    *,
    scale: bool = True,
    baseline: str = "mean",
    **options: Unpack[RatioOptions],
) -> Array:
    r"""GRPO: the clipped objective, every token of an answer with the advantage of that answer in its group.

    .. math:: \mathrm{loss} = \frac{1}{G} \sum_i \frac{1}{T_i} \sum_t \Bigl[
        -\min\bigl(r_{it} A_i,\ \mathrm{clip}(r_{it}, 1 - \varepsilon, 1 + \varepsilon)\,A_i\bigr)
        + \lambda\,\mathrm{KL}_{it} - \beta H_{it} \Bigr], \qquad A = \mathrm{group\_advantages}(\mathrm{rewards})

    Args:
        policy: as in `policy_gradient_loss`, of shape `(*batch, group, tokens)`; or `(*batch, tokens)` with
            `segment_ids`, if the answers of a group are packed into one row.
        old_policy: the policy that wrote the answers, likewise. A constant.
        rewards: float array `(*batch, group)`, one reward for each answer. Answer i is the tokens of segment i.
        scale, baseline: as in `group_advantages`.
        **options: as in `clipped_policy_loss`; but `average` is "sequence" if not given, as in the paper, and
            `num_segments` is the size of the group.

    Returns:
        A scalar, or an array of the policy's shape. An answer whose tokens all have weight 0 counts in its group's
        advantages, but not in the mean.

    Raises:
        TypeError, ValueError: as `clipped_policy_loss`; rewards that are not one for each sequence.

    Derivatives: as `clipped_policy_loss`.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> old = jnp.full((1, 2, 3), -1.0)  # one question, two answers of three tokens
        >>> new, rewards = old.at[0, 0].add(0.1), jnp.array([[1.0, 0.0]])
        >>> print(f"{jsoftmax.group_relative_policy_loss(new, old, rewards):.4f}")
        -0.0526
        >>> packed, ids = [x.reshape(1, 6) for x in (new, old)], jnp.array([[0, 0, 0, 1, 1, 1]])
        >>> print(f"{jsoftmax.group_relative_policy_loss(*packed, rewards, segment_ids=ids):.4f}")
        -0.0526

    References:
        Shao et al., *DeepSeekMath*, 2024; Yu et al., *DAPO*, 2025; Liu et al., *Understanding R1-Zero-Like Training*,
        2025 (Dr. GRPO).
    """
    log_prob, ids = log_prob_of("policy", policy), options.get("segment_ids")
    least, needs = (2, "(*batch, group, tokens)") if ids is None else (1, "(*batch, tokens) with segment_ids")
    if log_prob.ndim < least:
        raise ValueError(f"policy has shape {log_prob.shape}, but needs {needs}")
    rewards = checks.float_array("rewards", rewards)
    advantages = group_advantages(rewards, scale=scale, baseline=baseline)
    batch = log_prob.shape[:-1]
    if ids is None:
        checks.has_shape("rewards", rewards, batch, "one reward for each sequence of policy")
        advantages = advantages[..., None]
    else:
        checks.has_shape("rewards", rewards, (*batch, *rewards.shape[-1:]), "one reward for each segment of a row")
        options["num_segments"] = rewards.shape[-1]
    sequences = checked_sequences(ids, options.get("num_segments"), log_prob.shape)
    advantages = sequences.spread(advantages, log_prob.shape[-1])
    return clipped_policy_loss(policy, old_policy, advantages, **{"average": "sequence", **options})
