"""softmax, log_softmax and logsumexp beside jax.nn, and the logits read and written once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jsoftmax
from benchmarks.harness import DTYPES, SHAPES, Row, measure

NAMES = ("softmax", "log_softmax", "logsumexp")


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for model in ("ImageNet",) if quick else ("ImageNet", "Llama 2"):
        count, classes = SHAPES[model]
        for dtype in DTYPES:
            for name in NAMES:
                rows += _measure(name, count, classes, dtype, progress)
    return rows


def _measure(name: str, count: int, classes: int, dtype: str, progress: Callable[[str], None]) -> list[Row]:
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(count, classes)) * 3, dtype)
    ours, theirs = getattr(jsoftmax, name), getattr(jax.nn, name)
    exact = _exact(name, np.asarray(logits, np.float64))
    weights = jnp.asarray(random.normal(size=exact.shape), dtype)

    def error(output) -> float:
        output = output[1] if isinstance(output, tuple) else output
        return float(np.max(np.abs(np.asarray(output, np.float64) - exact)) / np.max(np.abs(exact)))

    def differentiated(function: Callable) -> Callable:
        """The gradient of a weighted sum, and the value itself."""

        def program(logits, weights):
            value, pull_back = jax.vjp(lambda z: function(z, axis=-1), logits)
            return pull_back(weights)[0], value

        return program

    shape, common = f"{count}×{classes}", {"reference": "jax.nn", "limit": "limit", "error": error}
    functions = {
        "jax.nn": lambda z, weights: theirs(z, axis=-1),
        "jsoftmax": lambda z, weights: ours(z, axis=-1),
        "limit": lambda z, weights: z.max(axis=-1) if name == "logsumexp" else z + 1,
    }
    rows = measure(f"{name}, value", shape, dtype, functions, (logits, weights), progress=progress, **common)
    functions = {"jax.nn": differentiated(theirs), "jsoftmax": differentiated(ours), "limit": lambda z, weights: z + 1}
    subject = f"{name}, value and gradient"
    return rows + measure(subject, shape, dtype, functions, (logits, weights), progress=progress, **common)


def _exact(name: str, z: np.ndarray) -> np.ndarray:
    largest = z.max(axis=-1, keepdims=True)
    logsumexp = np.log(np.exp(z - largest).sum(axis=-1, keepdims=True)) + largest
    return {"softmax": np.exp(z - logsumexp), "log_softmax": z - logsumexp, "logsumexp": logsumexp[:, 0]}[name]
