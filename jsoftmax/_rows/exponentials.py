"""Exponentials of differences z − m ≤ 0, the one costly function of a row: right to little more than an ulp.

    z − m = n·log 2 + r,  |r| ≤ (log 2)/2        e^(z − m) = 2ⁿ · (1 + r + r² Σ_k c_k r^k)

Our own, because `jnp.exp` takes the difference after it was rounded, and half a place of −80 is 32 ulp of its
exponential. Here that rounding error goes into r, where nothing is lost of it; and 2ⁿ goes straight into the bits of
the exponent, in units, so that it does not underflow. It costs about as much as `jnp.exp` (docs/architecture.md).
"""

import functools
import math
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.polynomial import Chebyshev, Polynomial

from jsoftmax._rows.primitives import together

# Exponentials are kept in these units: a row's total stays far from overflow, and the terms of a sum that is itself a
# normal number do not underflow one by one.
UNIT_EXPONENT = 60
UNIT = 2.0**UNIT_EXPONENT


def at_most(maximum: Array, z: Array) -> Array:
    """z, which is ≤ maximum or NaN. It keeps XLA from contracting a product in z, and what follows, into an FMA.

    One instruction of x86, where a minimum that hands on both sides' NaN is four.
    """
    z, maximum = together(z, maximum)
    return lax.select(lax.lt(maximum, z), maximum, z)


def gap(z: Array, maximum: Array) -> Array:
    """z − maximum ≤ 0."""
    z, maximum = together(z, maximum)
    return lax.sub(at_most(maximum, z), maximum)


def exact_difference(a: Array, b: Array) -> tuple[Array, Array]:
    """a − b, rounded, and what the rounding took away (Knuth's two-sum)."""
    a, b = together(a, b)
    difference = lax.sub(a, b)
    back = lax.sub(difference, a)
    return difference, lax.sub(lax.sub(a, lax.sub(difference, back)), lax.add(b, back))


def add_in_pairs(parts: list[Array]) -> Array:
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


class _Format(NamedTuple):
    """A floating-point format, as the reduction needs it."""

    integers: Any  # of the same width
    mantissa: int  # bits
    bias: float  # added to n, puts UNIT · 2ⁿ as a biased exponent into the lowest bits of the sum
    least: int  # the smallest n for which UNIT · 2ⁿ is normal
    high: float  # log 2, rounded to so few bits that its product with any n is exact
    low: float  # and the rest of it
    coefficients: tuple[float, ...]  # of e^r in powers of r, to about an eighth of an ulp
    few: tuple[float, ...]  # to a millionth


@functools.cache
def number_format(dtype: np.dtype) -> _Format:
    info = jnp.finfo(dtype)
    least = int(info.minexp) - UNIT_EXPONENT
    kept = 2.0 ** (info.nmant - least.bit_length())
    high = round(math.log(2) * kept) / kept
    bias = 1.5 * 2.0**info.nmant + UNIT_EXPONENT + 1 - int(info.minexp)
    wide = info.bits == 64
    return _Format(
        jnp.int64 if wide else jnp.int32,
        info.nmant,
        bias,
        least,
        high,
        float(Decimal(2).ln() - Decimal(high)),
        _coefficients(11 if wide else 6),
        _coefficients(5),
    )


def _coefficients(degree: int) -> tuple[float, ...]:
    """Those of e^r for |r| ≤ (log 2)/2: the series cut off in Chebyshev's polynomials, one or two powers shorter.

    The first two are exactly 1: so is the exponential of 0, and what is lost of the rest is small beside it.
    """
    rest = Polynomial([1 / math.factorial(k + 2) for k in range(2 * degree)])
    near = rest.convert(domain=(-math.log(2) / 2, math.log(2) / 2), kind=Chebyshev).truncate(degree - 1)
    return (1.0, 1.0, *map(float, near.convert(kind=Polynomial).coef))


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)  # traced once, though it may stand in a program a hundred times
def exponentials(z: Array, maximum: Array) -> Array:
    """UNIT · e^(z − maximum) for z ≤ maximum; exactly UNIT at the maximum, 0 where the product would be subnormal."""
    # In JAX's primitives: its operators are programs of their own, each traced anew for every shape.
    form, number = number_format(z.dtype), z.dtype.type
    z, maximum = together(z, maximum)
    # Of −∞ the rounding error is NaN, and of numbers far below, 2ⁿ is no exponent; `select` takes neither.
    difference, error = exact_difference(at_most(maximum, z), maximum)
    n = _powers_of_two(difference)
    r = lax.add(lax.sub(difference, lax.mul(n, number(form.high))), error)
    r = lax.sub(r, lax.mul(n, number(form.low)))
    power = _power(n, r, form, form.coefficients)
    return lax.select(lax.lt(n, number(form.least)), lax.full_like(n, 0), power)


def for_rounding(z: Array, maximum: Array) -> Array:
    """`exponentials`, to 2⁻¹⁷: enough for results in 16 bits, of differences that are exact."""
    form, number = number_format(z.dtype), z.dtype.type
    difference = lax.sub(*together(z, maximum))
    # 2ⁿ is 0 from here on, in the bits of the exponent as in truth: one instruction for the two of a select.
    least = lax.full_like(difference, number((form.least - 1) * math.log(2)))
    difference = lax.select(lax.lt(difference, least), least, difference)
    n = _powers_of_two(difference)
    r = lax.sub(difference, lax.mul(n, number(math.log(2))))
    return _power(n, r, form, form.few)


def _powers_of_two(difference: Array) -> Array:
    """n of the formula above, as a float."""
    scaled = lax.mul(difference, difference.dtype.type(1 / math.log(2)))
    return lax.round(scaled, lax.RoundingMethod.TO_NEAREST_EVEN)


def _power(n: Array, r: Array, form: _Format, coefficients: tuple[float, ...]) -> Array:
    """UNIT · 2ⁿ · e^r."""
    number = n.dtype.type
    series = lax.full_like(r, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        series = lax.add(lax.mul(series, r), number(coefficient))
    bits = lax.bitcast_convert_type(lax.add(n, number(form.bias)), form.integers)
    power = lax.bitcast_convert_type(lax.shift_left(bits, bits.dtype.type(form.mantissa)), n.dtype)
    return lax.mul(series, power)


@exponentials.defjvp
def _exponentials_jvp(primals, tangents):
    out = exponentials(*primals)
    return out, out * (tangents[0] - tangents[1])
