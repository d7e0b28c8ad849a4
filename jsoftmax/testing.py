"""Check the gradient of a loss, ours or yours, against independent answers.

>>> import jax.numpy as jnp, jsoftmax
>>> from jsoftmax.testing import check_gradients
>>> logits, labels = jnp.array([[1.0, 2.0, 0.5], [20.0, 0.0, 0.0]]), jnp.array([1, 0])
>>> report = check_gradients(jsoftmax.softmax_cross_entropy_with_integer_labels, logits, labels)
>>> report.ok
True
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import Array

from jsoftmax import reference
from jsoftmax._rows import checks

Loss = Callable[[Array, Array], Array]

# What JAX's float64 leaves uncertain in an answer of size about 1, autodiff of a textbook formula.
_AUTODIFF_NOISE = 256 * np.finfo(np.float64).eps


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The gradient against one answer: the worst entry and by how much it is off."""

    answer: str
    worst_ulps: float
    index: tuple[int, ...]
    got: float
    expected: float

    def __str__(self) -> str:
        return (
            f"against {self.answer}: {self.worst_ulps:.2f} ulp at {self.index}"
            f" (got {self.got:.9g}, expected {self.expected:.9g})"
        )


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` found; `ok` if no answer is further off than `max_ulps`."""

    comparisons: tuple[Comparison, ...]
    max_ulps: float

    @property
    def worst_ulps(self) -> float:
        return max(comparison.worst_ulps for comparison in self.comparisons)

    @property
    def ok(self) -> bool:
        return self.worst_ulps <= self.max_ulps

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"WRONG: more than {self.max_ulps:g} ulp off"
        return "\n".join([f"gradient {verdict}", *(f"  {comparison}" for comparison in self.comparisons)])


def check_gradients(
    loss: Loss,
    logits: Array,
    labels: Array,
    *,
    textbook: Loss | None = None,
    mode: str = "reverse",
    max_ulps: float = 8.0,
    relative_to: str = "entry",
) -> GradientReport:
    r"""Compare the gradient of a loss with ŷ − y, with autodiff of a textbook formula and with finite differences.

    The three answers are independent of each other and of the loss's derivative rule:

    - ŷ − y in extended precision, its label entry from the sum of the other probabilities (cross-entropy only);
    - JAX's autodiff of the textbook formula in float64;
    - fourth-order central differences of the loss itself in float64, at 64 entries.

    Each is taken at the given logits as they are stored, on the CPU; an error counts as far as it exceeds the answer's
    own uncertainty.

    Args:
        loss: a function of logits and labels, one number a row or in all.
        logits: float array `(*batch, classes)`. Differentiated on the device on which it lies.
        labels: integers `(*batch,)`, or floats of the shape of `logits`.
        textbook: the formula to compare with, written for float64; None for cross-entropy.
        mode: "reverse" (`jax.grad`) or "forward" (`jax.jacfwd`), which needs a loss with `derivative="jvp"`.
        max_ulps: the error allowed, in units of the last place of the logits' dtype.
        relative_to: the size whose last place counts, each "entry"'s own or its "row"'s largest: an entry that is the
            difference of two terms is right to the latter at best.

    Returns:
        A `GradientReport`. Print it, or assert its `ok`.

    Raises:
        TypeError: logits are not floating-point.
        ValueError: an unknown mode or `relative_to`.
    """
    logits = checks.float_array("logits", logits)
    checks.one_of("mode", mode, ("reverse", "forward"))
    answers = gradient_answers(loss, logits, labels, textbook)
    gradient = gradient_of(loss, logits, labels, mode)
    return compare_gradient(gradient, answers, max_ulps=max_ulps, relative_to=relative_to)


Answers = dict[str, tuple[np.ndarray, np.ndarray | float]]  # by name: the gradient and its own uncertainty


def gradient_of(loss: Loss, logits: Array, labels: Array, mode: str) -> Array:
    """The gradient of the sum of `loss`, in reverse or forward mode."""
    differentiate = jax.grad if mode == "reverse" else jax.jacfwd
    return jax.jit(differentiate(lambda z: jnp.sum(loss(z, labels))))(logits)


def gradient_answers(loss: Loss, logits: Array, labels: Array, textbook: Loss | None) -> Answers:
    """What the gradient of `loss` should be, by the ways of `check_gradients`."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels)
    y = y if np.issubdtype(y.dtype, np.integer) else y.astype(np.float64)
    answers: Answers = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]), float64():
        if textbook is None:
            answers["ŷ − y"] = _closed_form(z, y), 0.0
        formula = reference.cross_entropy if textbook is None else textbook
        by_autodiff = np.asarray(jax.grad(lambda z: jnp.sum(formula(z, jnp.asarray(y))))(jnp.asarray(z)))
        answers["autodiff in float64"] = by_autodiff, _AUTODIFF_NOISE * (1 + np.abs(by_autodiff))
        answers["finite differences"] = _finite_differences(lambda z: jnp.sum(loss(z, jnp.asarray(y))), z)
    return answers


def compare_gradient(gradient: Array, answers: Answers, *, max_ulps: float, relative_to: str) -> GradientReport:
    """A gradient against each of its `answers`."""
    checks.one_of("relative_to", relative_to, ("entry", "row"))
    unit = _last_place(gradient, next(iter(answers.values()))[0], relative_to)
    got = np.asarray(gradient, np.float64)
    return GradientReport(tuple(_compare(name, got, *answer, unit) for name, answer in answers.items()), max_ulps)


def float64() -> Any:
    """float64 for the length of a with statement, by the name that it has in this release of JAX."""
    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return home.enable_x64(True)


def _closed_form(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """ŷ − y in extended precision; 1 − ŷ from the sum of the others."""
    e = np.exp(z.astype(np.longdouble) - z.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    if not np.issubdtype(y.dtype, np.integer):
        return y.sum(axis=-1, keepdims=True) * p - y
    others = e.copy()
    np.put_along_axis(others, y[..., None], 0, axis=-1)
    np.put_along_axis(p, y[..., None], -others.sum(axis=-1, keepdims=True) / e.sum(axis=-1, keepdims=True), axis=-1)
    return p


def _finite_differences(f: Callable[[Array], Array], z: np.ndarray, entries: int = 64, step: float = 2**-8):
    """df at evenly spread entries (NaN elsewhere), with the difference between two step sizes as its uncertainty."""
    chosen = np.unique(np.linspace(0, z.size - 1, entries).round().astype(int))
    moves = step * np.array([-4, -2, -1, 1, 2, 4])

    def moved(entry, move):
        return f(jnp.ravel(z).at[entry].add(move).reshape(z.shape))

    at = np.asarray(jax.jit(lambda e, h: jax.lax.map(lambda one: jax.vmap(moved, (None, 0))(one, h), e))(chosen, moves))

    def fourth_order(far: int, near: int, h: float) -> np.ndarray:
        return (8 * (at[:, -1 - near] - at[:, near]) - (at[:, -1 - far] - at[:, far])) / (12 * h)

    best, coarse = np.full((2, z.size), np.nan)
    best[chosen], coarse[chosen] = fourth_order(1, 2, step), fourth_order(0, 1, 2 * step)
    noise = 64 * np.finfo(np.float64).eps * (1 + np.abs(at).max()) / step
    return best.reshape(z.shape), np.abs(best - coarse).reshape(z.shape) + noise


def _last_place(gradient: Array, expected: np.ndarray, relative_to: str) -> np.ndarray:
    size = np.abs(np.asarray(expected, np.float64))
    if relative_to == "row":
        size = np.broadcast_to(size.max(axis=-1, keepdims=True), size.shape)
    limits = jnp.finfo(gradient.dtype)
    # Powers of two in float64, so that dtypes that NumPy lacks are measured too.
    exponent = np.floor(np.log2(np.maximum(size, float(limits.tiny))))
    return np.exp2(exponent) * float(limits.eps)


def _compare(name: str, got: np.ndarray, expected: np.ndarray, uncertainty, unit: np.ndarray) -> Comparison:
    off = np.maximum(np.abs(got - expected) - uncertainty, 0) / unit
    known = ~np.isnan(np.asarray(expected, np.float64))
    # A NaN where a number is due is infinitely wrong.
    off = np.where(known, np.where(np.isnan(off), np.inf, off), -1).astype(np.float64)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(off), off.shape))
    return Comparison(name, float(off[index]), index, float(got[index]), float(expected[index]))
