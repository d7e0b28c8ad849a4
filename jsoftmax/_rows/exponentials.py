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

from jsoftmax._rows.primitives import hidden, select, together

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
    high: float  # log 2, rounded to so few bits that n · high is exact, and its sum with a number of 16 bits
    low: float  # and the rest of it
    coefficients: tuple[float, ...]  # of e^r in powers of r, to about an eighth of an ulp
    few: tuple[float, ...]  # to three millionths


@functools.cache
def number_format(dtype: np.dtype) -> _Format:
    info = jnp.finfo(dtype)
    least = int(info.minexp) - UNIT_EXPONENT
    high = round(math.log(2) * 2**9) / 2**9
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
        _shortened([1 / math.factorial(k) for k in range(10)], 5),
    )


def _coefficients(degree: int) -> tuple[float, ...]:
    """Those of e^r for |r| ≤ (log 2)/2, one or two powers fewer than its series would take.

    The first two are exactly 1: so is the exponential of 0, and what is lost of the rest is small beside it.
    """
    return (1.0, 1.0, *_shortened([1 / math.factorial(k + 2) for k in range(2 * degree)], degree - 1))


def _shortened(series: list[float], terms: int) -> tuple[float, ...]:
    """A power series cut off in Chebyshev's polynomials."""
    near = Polynomial(series).convert(domain=(-math.log(2) / 2, math.log(2) / 2), kind=Chebyshev).truncate(terms)
    return tuple(map(float, near.convert(kind=Polynomial).coef))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnums=2, inline=True)  # traced once, though it may stand in a program many times
def exponentials(z: Array, maximum: Array, exact: bool = False) -> Array:
    """UNIT · e^(z − maximum) for z ≤ maximum; exactly UNIT at the maximum, 0 where the product would be subnormal.

    `exact` if both are numbers of 16 bits.
    """
    # In JAX's primitives: its operators are programs of their own, each traced anew for every shape.
    form, number = number_format(z.dtype), z.dtype.type
    n, biased, r = _of_16_bits(z, maximum, form) if exact else _with_rounding_error(z, maximum, form)
    # Of −∞ the rounding error is NaN, and of numbers far below, 2ⁿ is no exponent; `select` takes neither.
    power = _power(biased, r, form, form.coefficients)
    return lax.select(lax.lt(n, number(form.least)), lax.full_like(n, 0), power)


def _with_rounding_error(z: Array, maximum: Array, form: _Format) -> tuple[Array, Array, Array]:
    """n and r of the formula above, and between them n + bias, whose lowest bits are the exponent."""
    z, maximum = together(z, maximum)
    number = z.dtype.type
    difference, error = exact_difference(at_most(maximum, z), maximum)
    n = lax.round(lax.mul(difference, number(1 / math.log(2))), lax.RoundingMethod.TO_NEAREST_EVEN)
    r = lax.add(lax.sub(difference, lax.mul(n, number(form.high))), error)
    return n, lax.add(n, number(form.bias)), lax.sub(r, lax.mul(n, number(form.low)))


def _of_16_bits(z: Array, maximum: Array, form: _Format) -> tuple[Array, Array, Array]:
    """The same, with half the operations: of so short numbers, the sum of maximum and n · high is exact."""
    number = z.dtype.type
    # But for a maximum that is lost beside n · high. It is subtracted last.
    early = select(lax.lt(lax.abs(maximum), number(2.0**-6)), 0, maximum)
    bias, late = hidden(form.bias, maximum), lax.sub(maximum, early)
    z, maximum, early, late, bias = together(z, maximum, early, late, bias)
    n, biased = _powers_of_two(lax.sub(z, maximum), bias)
    r = lax.sub(z, lax.add(early, lax.mul(n, number(form.high))))
    return n, biased, lax.sub(r, lax.add(late, lax.mul(n, number(form.low))))


def for_rounding(z: Array, maximum: Array) -> Array:
    """e^(z − maximum) to 2⁻¹⁷, of differences that are exact: enough for results in 16 bits."""
    form, number = number_format(z.dtype), z.dtype.type
    z, maximum, bias = together(z, maximum, hidden(form.bias - UNIT_EXPONENT, maximum))
    difference = lax.sub(z, maximum)
    # 2ⁿ is 0 from here on, in the bits of the exponent as in truth: one instruction for the two of a select.
    least = lax.full_like(difference, number((form.least + UNIT_EXPONENT - 1) * math.log(2)))
    difference = lax.select(lax.lt(difference, least), least, difference)
    n, biased = _powers_of_two(difference, bias)
    r = lax.sub(difference, lax.mul(n, number(math.log(2))))
    return _power(biased, r, form, form.few)


def _powers_of_two(difference: Array, bias: Array) -> tuple[Array, Array]:
    """n and n + bias, by an addition that leaves no place for fractions. XLA would take out a bias that it knew."""
    biased = lax.add(lax.mul(difference, difference.dtype.type(1 / math.log(2))), bias)
    return lax.sub(biased, bias), biased


def _power(biased: Array, r: Array, form: _Format, coefficients: tuple[float, ...]) -> Array:
    """2ⁿ · e^r, in the units of the bias."""
    number = r.dtype.type
    bits = lax.bitcast_convert_type(biased, form.integers)
    power = lax.bitcast_convert_type(lax.shift_left(bits, bits.dtype.type(form.mantissa)), r.dtype)
    series = lax.full_like(r, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        series = lax.add(lax.mul(series, r), number(coefficient))
    return lax.mul(series, power)


@exponentials.defjvp
def _exponentials_jvp(exact, primals, tangents):
    out = exponentials(*primals, exact)
    return out, out * (tangents[0] - tangents[1])
