"""Learning from several answers to one question, each judged beside the others."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._policies.actions import Policy, checked_weights, log_prob_of
from jsoftmax._policies.policy_gradient import Clip, clipped_policy_loss
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.weights import shares


@in_any_layout("rewards")
def group_advantages(rewards: ArrayLike, *, scale: bool = True) -> Array:
    r"""Advantages of several answers to one question: rewards relative to those of their group.

    .. math:: A_i = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}

    Args:
        rewards: float array `(*batch, group)`.
        scale: whether to divide by the group's standard deviation (over its size, not its size less one); without, as
            Dr. GRPO has it, questions that are almost always or almost never solved do not count more than others.

    Returns:
        An array of the shape of rewards; exactly 0 in a group whose rewards are all equal. float32 for narrower ones.

    Raises:
        TypeError: rewards are not floating-point.
        ValueError: rewards without a group.

    Derivatives: none are taken of advantages in the losses here.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])))
        [[ 1. -1. -1.  1.]
         [ 0.  0.  0.  0.]]

    References:
        Shao et al., *DeepSeekMath*, 2024 (GRPO); Liu et al., *Understanding R1-Zero-Like Training*, 2025 (Dr. GRPO).
    """
    rewards = checks.float_array("rewards", rewards)
    rewards = rewards.astype(compute_dtype(rewards.dtype))
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards has shape {rewards.shape}, but needs (*batch, group)")
    # The mean of equal numbers need not be their value, and the quotient of two rounding errors is anything.
    equal = jnp.max(rewards, axis=-1, keepdims=True) == jnp.min(rewards, axis=-1, keepdims=True)
    centered = jnp.where(equal, 0, rewards - jnp.mean(rewards, axis=-1, keepdims=True))
    if not scale:
        return centered
    variance = jnp.mean(centered**2, axis=-1, keepdims=True)
    return centered * lax.rsqrt(jnp.where(equal, 1, variance))


@in_any_layout("policy")
def group_relative_policy_loss(
    policy: Policy,
    old_policy: Policy,
    rewards: ArrayLike,
    *,
    clip: Clip = 0.2,
    dual_clip: ArrayLike | None = None,
    scale: bool = True,
    reference_policy: Policy | None = None,
    kl_penalty: ArrayLike = 0.0,
    entropy_bonus: ArrayLike = 0.0,
    average: str = "sequence",
    weights: ArrayLike | None = None,
    reduction: str = "mean",
) -> Array:
    r"""GRPO: the clipped objective, every token of an answer with the advantage of that answer in its group.

    .. math:: \mathrm{loss} = \frac{1}{G} \sum_i \frac{1}{T_i} \sum_t \Bigl[
        -\min\bigl(r_{it} A_i,\ \mathrm{clip}(r_{it}, 1 - \varepsilon, 1 + \varepsilon)\,A_i\bigr)
        + \lambda\,\mathrm{KL}_{it} - \beta H_{it} \Bigr], \qquad A = \mathrm{group\_advantages}(\mathrm{rewards})

    Args:
        policy: as in `policy_gradient_loss`, of shape `(*batch, group, tokens)`.
        old_policy: the policy that wrote the answers, likewise. A constant.
        rewards: float array `(*batch, group)`, one reward for each answer.
        clip, dual_clip: as in `clipped_policy_loss`.
        scale: as in `group_advantages`.
        reference_policy, kl_penalty: as in `clipped_policy_loss`; the paper's λ is 0.04.
        entropy_bonus: as in `policy_gradient_loss`.
        average: "sequence" divides each answer's weights by their sum, as the paper does, so that answers count alike;
            "token" leaves them, so that tokens do, as DAPO has it.
        weights: `(*batch, group, tokens)`, a factor for each token, or booleans: 0 for padding and for the question.
        reduction: as in `policy_gradient_loss`, with the weights as `average` leaves them.

    Returns:
        A scalar, or an array of the policy's shape.

    Raises:
        TypeError, ValueError: as `clipped_policy_loss`; rewards that are not one for each sequence.

    Derivatives: as `clipped_policy_loss`.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> old = jnp.full((1, 2, 3), -1.0)  # one question, two answers of three tokens
        >>> new, rewards = old.at[0, 0].add(0.1), jnp.array([[1.0, 0.0]])
        >>> print(f"{jsoftmax.group_relative_policy_loss(new, old, rewards):.4f}")
        -0.0526

    References:
        Shao et al., *DeepSeekMath*, 2024; Yu et al., *DAPO*, 2025.
    """
    checks.one_of("average", average, ("sequence", "token"))
    log_prob = log_prob_of("policy", policy)
    if log_prob.ndim < 2:
        raise ValueError(f"policy has shape {log_prob.shape}, but needs (*batch, group, tokens)")
    rewards = checks.float_array("rewards", rewards)
    checks.has_shape("rewards", rewards, log_prob.shape[:-1], "one reward for each sequence of policy")
    advantages = jnp.broadcast_to(group_advantages(rewards, scale=scale)[..., None], log_prob.shape)
    weights = checked_weights(weights, log_prob)
    return clipped_policy_loss(
        policy,
        old_policy,
        advantages,
        clip=clip,
        dual_clip=dual_clip,
        reference_policy=reference_policy,
        kl_penalty=kl_penalty,
        entropy_bonus=entropy_bonus,
        weights=shares(weights, -1) if average == "sequence" else weights,
        reduction=reduction,
    )
