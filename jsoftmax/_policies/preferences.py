"""Learning from which of two sequences is preferred."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._policies.actions import (
    Policy,
    checked_weights,
    constant_like,
    log_prob_of,
    reduced,
    silenced,
)
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.weights import REDUCTIONS, shares


@in_any_layout("policy")
def sequence_log_prob(policy: Policy, weights: ArrayLike | None = None, *, average: bool = False) -> Array:
    r"""Log-probabilities of sequences from those of their tokens.

    .. math:: \log \pi(y) = \sum_t w_t \log \pi(y_t \mid y_{<t})

    Args:
        policy: `softmax_statistics(logits, tokens)`, or `linear_softmax_statistics` of features, kernel and tokens, or
            log-probabilities; of shape `(*batch, tokens)`.
        weights: a factor for each token, or booleans: 0 for padding and for the question. A token of weight 0 is never
            looked at, NaN or not.
        average: whether to divide by the sum of the weights, for losses that are not to depend on length.

    Returns:
        `(*batch,)`, in nats: float32, or float64 for float64. 0 for a sequence without any token.

    Raises:
        TypeError: policy or weights are not floating-point.
        ValueError: weights of another shape, or a policy without tokens.

    Derivatives: with respect to policy and weights; every mode that the statistics have.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> tokens = jnp.log(jnp.array([[0.5, 0.25, jnp.nan], [0.5, 0.5, 0.5]]))
        >>> mask = jnp.array([[True, True, False], [True, True, True]])
        >>> print(jnp.exp(jsoftmax.sequence_log_prob(tokens, mask)))
        [0.125 0.125]
    """
    log_prob = log_prob_of("policy", policy)
    if log_prob.ndim == 0:
        raise ValueError("policy has shape (), but needs at least one dimension: the tokens")
    weights = checked_weights(weights, log_prob)
    (log_prob,) = silenced(weights, log_prob)
    return jnp.sum(log_prob * (shares(weights, -1) if average else weights), axis=-1)


@in_any_layout("chosen")
def preference_loss(
    chosen: ArrayLike,
    rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    objective: str = "sigmoid",
    weights: ArrayLike | None = None,
    reduction: str = "mean",
) -> Array:
    r"""DPO: make the chosen sequence likelier than the rejected one, relative to a reference policy. IPO likewise.

    .. math:: \mathrm{loss} = -(1 - \varepsilon) \log \sigma(\beta x) - \varepsilon \log \sigma(-\beta x), \qquad
        x = \log \frac{\pi(y_c)}{\pi_{\mathrm{ref}}(y_c)} - \log \frac{\pi(y_r)}{\pi_{\mathrm{ref}}(y_r)}

    Args:
        chosen: log-probabilities of the chosen sequences, from `sequence_log_prob`, of any shape.
        rejected: those of the rejected ones, of the same shape.
        reference_chosen: those of the chosen ones by the reference policy. A constant.
        reference_rejected: those of the rejected ones by the reference policy. A constant.
        beta: how strongly to keep to the reference, > 0; may be traced.
        label_smoothing: ε, the share of pairs taken to be in the wrong order, in [0, 1]; may be traced.
        objective: "sigmoid" as above; "squared" for IPO, :math:`(x - 1 / (2 \beta))^2`, usually with the averages over
            tokens.
        weights: a factor for each pair, or booleans. A pair of weight 0 is never looked at, NaN or not.
        reduction: as in `policy_gradient_loss`.

    Returns:
        A scalar, or an array of the shape of chosen: float32, or float64 for float64.

    Raises:
        TypeError: what is not floating-point.
        ValueError: shapes that differ, or an option that is unknown, out of range, or not of this objective.

    Derivatives: with respect to chosen, rejected, beta, label_smoothing and weights, every mode. Right in both tails: a
    loss of :math:`e^{-80}` is that, not 0.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> chosen, rejected = jnp.array([-12.0]), jnp.array([-20.0])
        >>> print(f"{jsoftmax.preference_loss(chosen, rejected, jnp.array([-15.0]), jnp.array([-15.0])):.4f}")
        0.3711

    References:
        Rafailov et al., *Direct Preference Optimization*, 2023; Azar et al., *A General Theoretical Paradigm to
        Understand Learning from Human Preferences*, 2024 (IPO); Mitchell, *A Note on DPO with Noisy Preferences*, 2023.
    """
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.one_of("objective", objective, ("sigmoid", "squared"))
    checks.within("label_smoothing", label_smoothing, 0.0, 1.0)
    checks.within("beta", beta, float(jnp.finfo(jnp.float32).tiny), float("inf"))
    if objective == "squared" and not checks.is_known(label_smoothing, 0.0):
        raise ValueError(f'label_smoothing={label_smoothing} needs objective="sigmoid"; the squared one has none')
    chosen = log_prob_of("chosen", chosen)
    rejected = log_prob_of("rejected", rejected)
    checks.has_shape("rejected", rejected, chosen.shape, "one sequence for each chosen one")
    meaning = "one log-probability for each of chosen"
    reference_chosen = constant_like("reference_chosen", reference_chosen, chosen, meaning)
    reference_rejected = constant_like("reference_rejected", reference_rejected, chosen, meaning)
    weights = checked_weights(weights, chosen)
    gains = silenced(weights, chosen - reference_chosen, rejected.astype(chosen.dtype) - reference_rejected)
    margin, beta = gains[0] - gains[1], jnp.asarray(beta, chosen.dtype)
    if objective == "squared":
        return reduced((margin - 0.5 / beta) ** 2, weights, reduction)
    wrong = jnp.asarray(label_smoothing, chosen.dtype)
    right_order, wrong_order = jnp.logaddexp(-beta * margin, 0.0), jnp.logaddexp(beta * margin, 0.0)
    return reduced((1 - wrong) * right_order + wrong * wrong_order, weights, reduction)
