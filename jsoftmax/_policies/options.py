"""Options of the losses of policies, and what they do: which actions count, and what holds the policy back."""

import dataclasses
from typing import TypedDict

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._losses.divergences import above_tangent
from jsoftmax._policies.actions import (
    Policy,
    bounded,
    checked_weights,
    constant_like,
    entropy_of,
    log_prob_of,
    log_ratio,
    most,
    reduced,
    silenced,
)
from jsoftmax._policies.sequences import Sequences, checked_sequences
from jsoftmax._rows import checks

# Of x = log π_ref − log π.
KL_ESTIMATORS = {"k1": lambda x: -x, "k2": lambda x: x * x / 2, "k3": above_tangent}


class PolicyOptions(TypedDict, total=False):
    r"""Options of all losses of policies.

    weights: a factor for each action, or booleans. An action of weight 0 is never looked at, NaN or not.
    average: "token" leaves the weights, so that tokens count alike, as DAPO has it; "sequence" divides them by their
        sum in each sequence, so that sequences do. "token" unless a function says otherwise.
    segment_ids: for rows that hold several sequences, the number of each token's sequence in its row: integers of the
        policy's shape, tokens last. Tokens of a number below 0 or from num_segments on are dropped, as if of weight 0.
    num_segments: how many sequences a row holds at most; as many as tokens if not given.
    reduction: "mean" (the default) divides by the sum of the weights, as `average` leaves them, and is 0 if that is;
        "sum"; "none" for each action's loss times its weight.
    denominator: what "mean" divides by instead, so that a token counts the same whatever the others of its batch: the
        number of answers times their greatest length (Dr. GRPO), or the tokens of all micro-batches of a step.
    entropy_bonus: β, which keeps the policy from settling too early; needs statistics; may be traced.
    reference_policy: the policy to stay close to, statistics or log-probabilities. A constant.
    kl_penalty: λ, which needs a reference_policy; may be traced.
    kl_estimator: of the divergence from the reference, with :math:`x = \log \pi_{\mathrm{ref}}(a) - \log \pi(a)`: "k3",
        :math:`e^x - 1 - x`; "k2", :math:`x^2 / 2`; "k1", :math:`-x`. The page on post-training says how their gradients
        differ.
    kl_correction: whether to multiply the estimate by the ratio :math:`\pi(a) / \pi_{\mathrm{old}}(a)`, with its slope.
        Then the gradient is that of :math:`\mathrm{KL}(\pi \,\|\, \pi_{\mathrm{ref}})` on average, for k1 and k3.
    sampler_policy: the policy that drew the actions, where that is not quite the one that the loss takes it for, such
        as an inference engine's numbers. A constant. Advantages are multiplied by the importance weight
        :math:`\min(\pi_{\mathrm{old}}(a) / \pi_{\mathrm{sampler}}(a), C)`, a constant too.
    importance_cap: C, 2 if not given; may be traced.
    """

    weights: ArrayLike | None
    average: str
    segment_ids: ArrayLike | None
    num_segments: int | None
    reduction: str
    denominator: ArrayLike | None
    entropy_bonus: ArrayLike
    reference_policy: Policy | None
    kl_penalty: ArrayLike
    kl_estimator: str
    kl_correction: bool
    sampler_policy: Policy | None
    importance_cap: ArrayLike


class RatioOptions(PolicyOptions, total=False):
    r"""Options of losses that compare the policy with an older one: those of `PolicyOptions`, and

    objective: what to make of the ratio r and the advantage A. "clipped" (PPO), the default, is
        :math:`\min(r A, \mathrm{clip}(r) A)`; "cispo" is :math:`\mathrm{clip}(r)\,A \log \pi(a)` with a constant for
        clip(r); "sapo" is :math:`\frac{4}{\tau} \sigma(\tau (r - 1))\,A`.
    importance: "token" for each token's own ratio, the default; "sequence" (GSPO) for the geometric mean, by the
        weights, of its sequence's.
    clip: ε, or a pair of those below and above 1, the former at most 1; may be traced. 0.2 if not given; for "cispo"
        (1, 4), weights up to 5.
    dual_clip: c > 1, a bound on the ratio of actions of negative advantage, whose loss has none otherwise; "clipped".
    gate_temperature: τ, or a pair of those for positive and other advantages, (1, 1.05) if not given; "sapo".
    """

    objective: str
    importance: str
    clip: ArrayLike | tuple[ArrayLike, ArrayLike]
    dual_clip: ArrayLike | None
    gate_temperature: ArrayLike | tuple[ArrayLike, ArrayLike]


@dataclasses.dataclass(frozen=True)
class Actions:
    """Actions that were taken, all arguments checked; those of weight 0 hold zeros."""

    log_prob: Array
    log_ratio: Array  # to the old policy
    advantages: Array
    weights: Array
    sequences: Sequences
    policy: Policy
    options: PolicyOptions

    def loss(self, objective: Array) -> Array:
        losses = self._penalty() - objective - self._entropy_term()
        weights = self.sequences.shares(self.weights) if self.options.get("average") == "sequence" else self.weights
        return reduced(losses, weights, self.options.get("reduction", "mean"), self.options.get("denominator"))

    def sequence_mean(self, numbers: Array) -> Array:
        """For each token, the weighted mean of its sequence."""
        shares = self.sequences.shares(self.weights)
        # Bounded, so that no ∞ meets −∞.
        return self.sequences.spread(self.sequences.sums(shares * bounded(numbers)), numbers.shape[-1])

    def _penalty(self) -> Array:
        penalty, name = self.options.get("kl_penalty", 0.0), self.options.get("kl_estimator", "k3")
        checks.one_of("kl_estimator", name, tuple(KL_ESTIMATORS))
        reference = self.options.get("reference_policy")
        if reference is None:
            if not checks.is_known(penalty, 0.0):
                raise ValueError(f"kl_penalty={penalty} needs a reference_policy, the policy to stay close to")
            return jnp.zeros_like(self.log_prob)
        (reference,) = silenced(self.weights, _constant_policy("reference_policy", reference, self.log_prob))
        # What the reference rules out counts as very unlikely there, so that the policy is still led away from it.
        least = lax.stop_gradient(self.log_prob) - most(self.log_prob.dtype)
        reference = jnp.where(jnp.isneginf(reference), least, reference)
        divergence = KL_ESTIMATORS[name](bounded(log_ratio(reference, self.log_prob)))
        if self.options.get("kl_correction", False):
            divergence *= jnp.exp(bounded(self.log_ratio))
        return jnp.asarray(penalty, self.log_prob.dtype) * divergence

    def _entropy_term(self) -> Array:
        bonus = self.options.get("entropy_bonus", 0.0)
        if checks.is_known(bonus, 0.0):
            return jnp.zeros_like(self.log_prob)
        (entropy,) = silenced(self.weights, entropy_of(self.policy, self.log_prob))
        return jnp.asarray(bonus, self.log_prob.dtype) * entropy


def checked_actions(
    policy: Policy, old_policy: Policy | None, advantages: ArrayLike, options: PolicyOptions
) -> Actions:
    """Without an old policy, it is the policy itself, as a constant."""
    log_prob = log_prob_of("policy", policy)
    old = lax.stop_gradient(log_prob) if old_policy is None else _constant_policy("old_policy", old_policy, log_prob)
    advantages = constant_like("advantages", advantages, log_prob, "one advantage for each action of policy")
    checks.one_of("average", options.get("average", "token"), ("token", "sequence"))
    sequences = checked_sequences(options.get("segment_ids"), options.get("num_segments"), log_prob.shape)
    weights = sequences.kept(checked_weights(options.get("weights"), log_prob))
    log_prob, old, advantages = silenced(weights, log_prob, old, advantages)
    advantages *= _importance(old, weights, options)
    return Actions(log_prob, log_ratio(log_prob, old), advantages, weights, sequences, policy, options)


def _importance(old: Array, weights: Array, options: PolicyOptions) -> Array:
    """min(π_old / π_sampler, C)."""
    sampler, cap = options.get("sampler_policy"), options.get("importance_cap", 2.0)
    if sampler is None:
        if "importance_cap" in options:
            raise ValueError(f"importance_cap={cap} needs a sampler_policy, the one that drew the actions")
        return jnp.ones_like(old)
    checks.within("importance_cap", cap, 0.0, float("inf"))
    (sampler,) = silenced(weights, _constant_policy("sampler_policy", sampler, old))
    ratio = jnp.exp(bounded(log_ratio(old, sampler)))
    return lax.stop_gradient(jnp.minimum(ratio, jnp.asarray(cap, old.dtype)))


def _constant_policy(name: str, policy: Policy, log_prob: Array) -> Array:
    return constant_like(name, log_prob_of(name, policy), log_prob, "that of policy")
