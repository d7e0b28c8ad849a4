"""Learning from which of two sequences is preferred, or from which sequences are good and which are not."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._policies.actions import checked_weights, constant_like, log_prob_of, log_ratio, reduced, scaled, silenced
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.weights import shares

OBJECTIVES = ("sigmoid", "squared", "odds_ratio")


@in_any_layout("chosen")
def preference_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    reference_chosen: ArrayLike | None = None,
    reference_rejected: ArrayLike | None = None,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    margin: ArrayLike = 0.0,
    likelihood_bonus: ArrayLike = 0.0,
    objective: str = "sigmoid",
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    denominator: ArrayLike | None = None,
) -> Array:
    r"""DPO: make the chosen sequence likelier than the rejected one, relative to a reference policy. And its relatives.

    .. math:: \mathrm{loss} = -(1 - \varepsilon) \log \sigma(\beta x - \gamma)
        - \varepsilon \log \sigma(\gamma - \beta x) - \alpha \log \pi(y_c), \qquad
        x = \log \frac{\pi(y_c)}{\pi_{\mathrm{ref}}(y_c)} - \log \frac{\pi(y_r)}{\pi_{\mathrm{ref}}(y_r)}

    ==========  =============================================================================================
    DPO         with both references
    IPO         with both references, `objective="squared"`, averages over tokens
    SimPO       without references, `margin=` γ, averages over tokens
    CPO         without references, `likelihood_bonus=` α
    ORPO        without references, `objective="odds_ratio"`, `likelihood_bonus=1.0`, averages over tokens
    ==========  =============================================================================================

    Args:
        chosen: log-probabilities of the chosen sequences, from `sequence_log_prob`, of any shape; averages over tokens
            with its `average=True`.
        rejected: those of the rejected ones, of the same shape.
        reference_chosen: those of the chosen ones by the reference policy. A constant. Without references, those terms
            of x are 0.
        reference_rejected: those of the rejected ones by the reference policy. A constant.
        beta: how strongly to keep to the reference, > 0; may be traced.
        label_smoothing: ε, the share of pairs taken to be in the wrong order, in [0, 1]; may be traced.
        margin: γ, by which the chosen sequence is to be ahead; may be traced.
        likelihood_bonus: α, which keeps the chosen sequence likely; its log-probability is that of `chosen`. May be
            traced.
        objective: "sigmoid" as above; "squared", :math:`(x - 1 / (2 \beta))^2`; "odds_ratio", β times that of
            "sigmoid" with β = 1 and :math:`x = \log \mathrm{odds}(y_c) - \log \mathrm{odds}(y_r)`, odds being
            :math:`p / (1 - p)`, which needs averages over tokens to be more than a ratio of probabilities.
        weights: a factor for each pair, or booleans. A pair of weight 0 is never looked at, NaN or not.
        reduction: "mean" divides by the sum of the weights, and is 0 if that is; "sum"; "none" for each pair's loss
            times its weight.
        denominator: what "mean" divides by instead, such as the number of pairs in all micro-batches of a step.

    Returns:
        A scalar, or an array of the shape of chosen: float32, or float64 for float64. A sequence of probability 0 makes
        the loss infinite in its direction, with a finite gradient (but for "squared"); if both have none, x is 0.

    Raises:
        TypeError: what is not floating-point.
        ValueError: shapes that differ, one reference without the other, or an option that is unknown, out of range, or
            not of this objective.

    Derivatives: with respect to chosen, rejected, beta, label_smoothing, margin, likelihood_bonus and weights, every
    mode. Right in both tails: a loss of :math:`e^{-80}` is that, not 0. A probability that rounds to 1 has odds of 8e37
    in float32.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> chosen, rejected = jnp.array([-12.0]), jnp.array([-20.0])
        >>> print(f"{jsoftmax.preference_loss(chosen, rejected, jnp.array([-15.0]), jnp.array([-15.0])):.4f}")
        0.3711
        >>> simpo = jsoftmax.preference_loss(chosen / 10, rejected / 10, beta=2.0, margin=1.0)  # ten tokens each
        >>> print(f"{simpo:.4f}")
        0.4375

    References:
        Rafailov et al., *Direct Preference Optimization*, 2023; Azar et al., *A General Theoretical Paradigm to
        Understand Learning from Human Preferences*, 2024 (IPO); Mitchell, *A Note on DPO with Noisy Preferences*, 2023;
        Meng, Xia and Chen, *SimPO*, 2024; Xu et al., *Contrastive Preference Optimization*, 2024 (CPO); Hong, Lee and
        Thorne, *ORPO*, 2024.
    """
    checks.one_of("objective", objective, OBJECTIVES)
    checks.within("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.within("beta", beta, float(jnp.finfo(jnp.float32).tiny), float("inf"))
    for name, value in (("label_smoothing", label_smoothing), ("margin", margin)):
        if objective == "squared" and not checks.is_known(value, 0.0):
            raise ValueError(f'{name}={value} needs objective="sigmoid" or "odds_ratio"; "squared" has none')
    chosen = log_prob_of("chosen", chosen)
    rejected = log_prob_of("rejected", rejected).astype(chosen.dtype)
    checks.has_shape("rejected", rejected, chosen.shape, "one sequence for each chosen one")
    references = _references(reference_chosen, reference_rejected, objective, chosen)
    weights = checked_weights(weights, chosen)
    chosen, rejected, *references = silenced(weights, chosen, rejected, *references)
    beta, gamma, epsilon, alpha = (
        jnp.asarray(number, chosen.dtype) for number in (beta, margin, label_smoothing, likelihood_bonus)
    )
    if objective == "odds_ratio":
        losses = beta * _pair_loss(log_ratio(_log_odds(chosen), _log_odds(rejected)) - gamma, epsilon)
    else:
        gains = (log_ratio(chosen, references[0]), log_ratio(rejected, references[1])) if references else ()
        x = log_ratio(*(gains or (chosen, rejected)))
        losses = (x - 0.5 / beta) ** 2 if objective == "squared" else _pair_loss(beta * x - gamma, epsilon)
    return reduced(losses - scaled(alpha, chosen), weights, reduction, denominator)


@in_any_layout("policy")
def unpaired_preference_loss(
    policy: ArrayLike,
    reference_policy: ArrayLike,
    desirable: ArrayLike,
    *,
    baseline: ArrayLike = 0.0,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
    weights: ArrayLike | None = None,
    reduction: str = "mean",
    denominator: ArrayLike | None = None,
) -> Array:
    r"""KTO: make desirable sequences likelier and the others less likely, relative to a reference policy.

    .. math:: \mathrm{loss} = \begin{cases} \lambda_D\,\sigma(\beta (z - x)) & \text{if desirable} \\
        \lambda_U\,\sigma(\beta (x - z)) & \text{otherwise} \end{cases} \qquad
        x = \log \frac{\pi(y)}{\pi_{\mathrm{ref}}(y)}, \quad
        z = \max\bigl(0, \mathrm{mean}(\mathrm{baseline})\bigr)

    Args:
        policy: log-probabilities of the sequences, from `sequence_log_prob`, of any shape.
        reference_policy: those by the reference policy, of the same shape. A constant.
        desirable: booleans of the same shape: which sequences are good.
        baseline: what z, the divergence of the policy from its reference, is estimated by: a number, or one for each
            sequence, of which the mean by the weights is taken. In the paper, x of answers to other questions, such as
            each question with the next one's answer. A constant.
        beta: how strongly to keep to the reference, > 0; may be traced.
        desirable_weight: λ_D, a factor of the loss of desirable sequences; may be traced.
        undesirable_weight: λ_U, likewise of the others. The paper has the factors make up for unequal numbers.
        weights: a factor for each sequence, or booleans. One of weight 0 is never looked at, NaN or not.
        reduction, denominator: as in `preference_loss`; "mean" does not divide by λ_D and λ_U.

    Returns:
        A scalar, or an array of the shape of policy: float32, or float64 for float64. Between 0 and the larger λ: a
        sequence of probability 0 has the limit, without a gradient.

    Raises:
        TypeError: what is not floating-point, or desirable that is not boolean.
        ValueError: shapes that differ, or an option out of range.

    Derivatives: with respect to policy, beta, desirable_weight, undesirable_weight and weights, every mode.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> policy, reference = jnp.array([-12.0, -20.0]), jnp.array([-15.0, -15.0])
        >>> print(f"{jsoftmax.unpaired_preference_loss(policy, reference, jnp.array([True, False])):.4f}")
        0.4015

    References:
        Ethayarajh et al., *KTO: Model Alignment as Prospect Theoretic Optimization*, 2024.
    """
    checks.within("beta", beta, float(jnp.finfo(jnp.float32).tiny), float("inf"))
    policy = log_prob_of("policy", policy)
    reference = constant_like("reference_policy", reference_policy, policy, "one log-probability for each of policy")
    desirable = checks.bool_array("desirable", desirable)
    checks.has_shape("desirable", desirable, policy.shape, "one boolean for each log-probability of policy")
    weights = checked_weights(weights, policy)
    baseline = checks.scalar_or_rows("baseline", checks.float_array("baseline", baseline), policy.shape)
    baseline = jnp.broadcast_to(baseline.astype(policy.dtype), policy.shape)
    policy, reference, baseline = silenced(weights, policy, reference, baseline)
    divergence = lax.stop_gradient(jnp.maximum(jnp.sum(baseline * shares(weights)), 0))
    factors = [jnp.asarray(factor, policy.dtype) for factor in (desirable_weight, undesirable_weight, beta)]
    ahead = factors[2] * (log_ratio(policy, reference) - divergence)
    losses = jnp.where(desirable, factors[0], factors[1]) * jax.nn.sigmoid(jnp.where(desirable, -ahead, ahead))
    return reduced(losses, weights, reduction, denominator)


def _references(chosen: ArrayLike | None, rejected: ArrayLike | None, objective: str, like: Array) -> list[Array]:
    given = {"reference_chosen": chosen, "reference_rejected": rejected}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) == 1:
        raise ValueError(f"{next(iter(given))} alone is not enough; give both references, or none")
    if given and objective == "odds_ratio":
        raise ValueError('objective="odds_ratio" takes no references')
    return [constant_like(name, value, like, "one log-probability for each of chosen") for name, value in given.items()]


def _pair_loss(margin: Array, smoothing: Array) -> Array:
    right_order, wrong_order = jnp.logaddexp(-margin, 0.0), jnp.logaddexp(margin, 0.0)
    return scaled(1 - smoothing, right_order) + scaled(smoothing, wrong_order)


def _log_odds(log_prob: Array) -> Array:
    """log(p / (1 − p)). Near p = 1, expm1 has the digits of 1 − p; near 0, log p is all that counts."""
    below = jnp.minimum(log_prob, -float(jnp.finfo(log_prob.dtype).tiny))
    return below - jnp.log(-jnp.expm1(below))
