"""For GPUs, which are bound by instructions: the hardware's exponential, and few of the costly merges of a row state.

A row is cut into slices that meet class by class in a tournament. Each loser is another class than its champion, so
that Σ e^(loser − champion) is the sum of the others, with no mask and with ties counted right. One reduction then
merges (champion, others), of which there are as few as a slice has classes. XLA reads each logit once for all of that.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jsoftmax._rows.exponentials import UNIT, UNIT_EXPONENT, add_in_pairs, exact_difference, number_format
from jsoftmax._rows.forms import tpu
from jsoftmax._rows.forms.tpu import place_label as place_label
from jsoftmax._rows.primitives import select
from jsoftmax._rows.rows import Rows


def row_state(rows: Rows, empty: Array | None, exact: bool, capped: bool, alone: bool) -> tuple[Array, Array]:
    # A soft cap is too costly for XLA to compute it anew for each of its uses: it would be written out.
    if capped:
        return tpu.row_state(rows, empty, exact, capped, alone)
    z = rows.z()
    # As many as fit a thread's registers. With more, XLA splits the program in two that both read all logits.
    slices = 16 if exact else 4
    width = z.shape[-1] // slices

    def merge(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        maximum, lesser = jnp.maximum(left[0], right[0]), jnp.minimum(left[0], right[0])
        above = select(left[0] >= right[0], left[1], right[1])
        below = select(left[0] >= right[0], right[1], left[1])
        return maximum, above + (1 + below / UNIT) * _below(lesser, maximum)

    def reduced(maximum: Array, others: Array) -> tuple[Array, Array]:
        init = (np.array(-np.inf, z.dtype), np.zeros((), z.dtype))
        return tuple(lax.reduce((maximum, others), init, merge, (z.ndim - 1,)))

    tail = z[..., slices * width :]
    of_tail = reduced(tail, jnp.zeros_like(tail))
    if not width:
        return of_tail
    champions, losers = [z[..., k * width : (k + 1) * width] for k in range(slices)], []
    while len(champions) > 1:
        one, other = champions[::2], champions[1::2]
        losers += map(jnp.minimum, one, other)
        champions = list(map(jnp.maximum, one, other))
    state = reduced(champions[0], _sum_below(losers, champions[0], exact))
    return merge(state, of_tail) if tail.shape[-1] else state


def _sum_below(losers: list[Array], champion: Array, exact: bool) -> Array:
    if not exact:
        return add_in_pairs([_below(loser, champion) for loser in losers])
    # float32 has numbers below all 16-bit ones: in place of −∞ they have a rounding error, and need no select.
    floor = jnp.maximum(champion - (200 + jnp.abs(champion) / 8), jnp.finfo(champion.dtype).min)
    base = select(jnp.isneginf(champion), 0, champion)
    return add_in_pairs([_with_error(*_in_units(jnp.maximum(loser, floor), base)) for loser in losers])


def _below(loser: Array, champion: Array) -> Array:
    """UNIT · e^(loser − champion), 0 for two classes of −∞."""
    power, error = _in_units(loser, champion)
    return select(power > 0, _with_error(power, error), 0)


def exponentials(z: Array, maximum: Array) -> Array:
    """UNIT · e^(z − maximum)."""
    return _corrected(*_in_units(jnp.minimum(z, maximum), maximum), False)


def shares(z: Array, maximum: Array, others: Array, exact: bool, rounded: bool) -> tuple[Array, Array]:
    """UNIT · p and p: one exponential and one factor a row. No p that is a normal number is made of one that is not."""
    del rounded
    share, z = 1 / (1 + others), jnp.minimum(z, maximum)
    scaled, error = _in_units(z, maximum)
    plain = jnp.exp(z - maximum)
    return _corrected(scaled, error, exact) * share, _corrected(plain, error, exact) * share


def _in_units(z: Array, maximum: Array) -> tuple[Array, Array]:
    """UNIT · e^(z − maximum) of the difference as it was rounded, and what the rounding took away."""
    # The square of e^((z − maximum)/2), since e^(z − maximum) may not be a normal number. The unit goes into the bits
    # of one factor's exponent: XLA would move a constant out of the square, which is no normal number then.
    difference, error = exact_difference(z, maximum)
    root = jnp.exp(0.5 * difference)
    form = number_format(z.dtype)
    bits = lax.bitcast_convert_type(root, form.integers) + (UNIT_EXPONENT << form.mantissa)
    return lax.bitcast_convert_type(bits, z.dtype) * root, error


def _corrected(power: Array, error: Array, exact: bool) -> Array:
    # Of numbers far below, the rounding error may be NaN.
    return power if exact else select(power == 0, 0, _with_error(power, error))


def _with_error(power: Array, error: Array) -> Array:
    return power + power * error
