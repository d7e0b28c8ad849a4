"""Causal attention beside jax.nn, and its products alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jsoftmax
from benchmarks.harness import DTYPES, Row, measure

SHAPES = [(1, 1024, 8, 64), (1, 4096, 4, 64)]  # batch, length, heads, width


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for shape in SHAPES[: 1 if quick else None]:
        for dtype in DTYPES:
            random = np.random.default_rng(0)
            arrays = tuple(jnp.asarray(random.normal(size=shape), dtype) for _ in range(4))
            exact = _exact(*(np.asarray(array, np.float32) for array in arrays[:3]))
            forms = {
                "jax.nn": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
                "jsoftmax": lambda q, k, v: jsoftmax.dot_product_attention(q, k, v, is_causal=True),
                "products alone": _products,
            }
            for subject, mode in (("attention, value", _value), ("attention, value and gradients", _gradients)):
                rows += measure(
                    subject,
                    "×".join(map(str, shape)),
                    dtype,
                    {name: mode(form) for name, form in forms.items()},
                    arrays,
                    reference="jax.nn",
                    limit="products alone",
                    error=lambda output, exact=exact: _error(output, exact),
                    repeats=10,
                    progress=progress,
                )
    return rows


def _value(attend: Callable) -> Callable:
    return lambda q, k, v, weights: attend(q, k, v)


def _gradients(attend: Callable) -> Callable:
    """The gradients of a weighted sum to all three, after the value itself."""

    def program(q, k, v, weights):
        value, pull_back = jax.vjp(attend, q, k, v)
        return value, pull_back(weights)

    return program


def _products(q, k, v):
    return jnp.einsum("bhts,bshd->bthd", jnp.einsum("bthd,bshd->bhts", q, k), v)


def _exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """In float64, head by head, so that the weights of one at a time are in memory."""
    length, heads, width = q.shape[1:]
    hidden = np.triu(np.full((length, length), -np.inf), 1)
    out = np.empty(q.shape[1:])
    for head in range(heads):
        z = q[0, :, head].astype(np.float64) @ k[0, :, head].T.astype(np.float64) / np.sqrt(width) + hidden
        weights = np.exp(z - z.max(axis=-1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[0, :, head].astype(np.float64)
    return out[None]


def _error(output, exact: np.ndarray) -> float:
    output = output[0] if isinstance(output, tuple) else output
    return float(np.max(np.abs(np.asarray(output, np.float64) - exact)) / np.max(np.abs(exact)))
