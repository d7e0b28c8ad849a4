"""Sequences of tokens: one a row, or several packed into a row, told apart by `segment_ids`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._policies.actions import Policy, checked_weights, log_prob_of, silenced
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.weights import parts


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where the sequences of packed rows are."""

    ids: Array  # the number of each token's sequence in its row; any for tokens of none
    inside: Array  # which tokens are of one
    count: int


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Which tokens of the last axis are of one sequence: those of a segment or, without segments, all of a row."""

    segments: Segments | None

    def sums(self, numbers: Array) -> Array:
        """One number for each sequence of a row, (*batch, count)."""
        if numbers.ndim == 0:
            raise ValueError("policy has shape (), but needs at least one dimension: the tokens")
        if self.segments is None:
            return jnp.sum(numbers, axis=-1, keepdims=True)
        of_row = functools.partial(jax.ops.segment_sum, num_segments=self.segments.count)
        return jnp.vectorize(of_row, signature="(t),(t)->(s)")(numbers, self.segments.ids)

    def spread(self, numbers: Array, tokens: int) -> Array:
        """That of its sequence for each token; `sums` backwards."""
        if self.segments is None:
            return jnp.broadcast_to(numbers, (*numbers.shape[:-1], tokens))
        return jnp.take_along_axis(numbers, self.segments.ids, axis=-1)

    def shares(self, weights: Array) -> Array:
        """The weights, divided by their sum in each sequence; 0 where there is none."""
        return parts(weights, self.spread(self.sums(weights), weights.shape[-1]))

    def kept(self, weights: Array) -> Array:
        """The weights, 0 for tokens of no sequence."""
        return weights if self.segments is None else jnp.where(self.segments.inside, weights, 0)


def checked_sequences(segment_ids: ArrayLike | None, num_segments: int | None, shape: tuple[int, ...]) -> Sequences:
    """Of log-probabilities of a shape; without num_segments, a row may hold as many sequences as tokens."""
    if segment_ids is None:
        if num_segments is not None:
            raise ValueError(f"num_segments={num_segments} needs segment_ids, the number of each token's sequence")
        return Sequences(None)
    ids = checks.integer_array("segment_ids", segment_ids)
    checks.has_shape("segment_ids", ids, shape, "the number of its sequence for each token of policy")
    count = max(math.prod(shape[-1:]), 1) if num_segments is None else num_segments
    if count < 1:
        raise ValueError(f"num_segments must be at least 1, got {num_segments}")
    inside = (ids >= 0) & (ids < count)
    return Sequences(Segments(jnp.where(inside, ids, 0), inside, count))


@in_any_layout("policy")
def sequence_log_prob(
    policy: Policy,
    weights: ArrayLike | None = None,
    *,
    average: bool = False,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
) -> Array:
    r"""Log-probabilities of sequences from those of their tokens.

    .. math:: \log \pi(y) = \sum_t w_t \log \pi(y_t \mid y_{<t})

    Args:
        policy: `softmax_statistics(logits, tokens)`, or `linear_softmax_statistics` of features, kernel and tokens, or
            log-probabilities; of shape `(*batch, tokens)`.
        weights: a factor for each token, or booleans: 0 for padding and for the question. A token of weight 0 is never
            looked at, NaN or not.
        average: whether to divide by the sum of the weights, for losses that are not to depend on length.
        segment_ids: for rows that hold several sequences, the number of each token's sequence in its row: integers
            `(*batch, tokens)`. Tokens of a number below 0 or from num_segments on are dropped, as if of weight 0.
        num_segments: how many sequences a row holds at most, which segment_ids need: the size of a result is known when
            a program is traced.

    Returns:
        `(*batch,)`, or `(*batch, num_segments)` with segment_ids, in nats: float32, or float64 for float64. 0 for a
        sequence without any token.

    Raises:
        TypeError: policy or weights are not floating-point, segment_ids are not integers.
        ValueError: weights or segment_ids of another shape, segment_ids without num_segments or the other way round, or
            a policy without tokens.

    Derivatives: with respect to policy and weights; every mode that the statistics have.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> tokens = jnp.log(jnp.array([[0.5, 0.25, jnp.nan], [0.5, 0.5, 0.5]]))
        >>> mask = jnp.array([[True, True, False], [True, True, True]])
        >>> print(jnp.exp(jsoftmax.sequence_log_prob(tokens, mask)))
        [0.125 0.125]
        >>> packed = jnp.log(jnp.array([0.5, 0.25, 0.5, 0.5, 0.5]))
        >>> print(jnp.exp(jsoftmax.sequence_log_prob(packed, segment_ids=jnp.array([0, 0, 1, 1, 1]), num_segments=2)))
        [0.125 0.125]
    """
    log_prob = log_prob_of("policy", policy)
    sequences = checked_sequences(segment_ids, num_segments, log_prob.shape)
    if segment_ids is not None and num_segments is None:
        raise ValueError("segment_ids needs num_segments, how many sequences a row holds at most")
    weights = sequences.kept(checked_weights(weights, log_prob))
    (log_prob,) = silenced(weights, log_prob)
    sums = sequences.sums(log_prob * (sequences.shares(weights) if average else weights))
    return sums[..., 0] if segment_ids is None else sums
