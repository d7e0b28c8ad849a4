"""Cross-entropy on logits: value and gradient, beside optax and one pass that reads and writes the logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax
from benchmarks.harness import Row, measure

SHAPES = [(256, 32000), (2048, 32000), (8192, 1000), (65536, 10)]
DTYPES = ["float32", "bfloat16"]
PEERS = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "jsoftmax": jsoftmax.softmax_cross_entropy_with_integer_labels,
}


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for count, classes in SHAPES[:1] if quick else SHAPES:
        for dtype in DTYPES:
            random = np.random.default_rng(0)
            logits = jnp.asarray(random.normal(size=(count, classes)) * 3, dtype)
            labels = jnp.asarray(random.integers(0, classes, size=count))
            shape = f"{count}×{classes}"
            losses = {name: _mean(loss) for name, loss in PEERS.items()}
            gradients = {name: jax.value_and_grad(loss) for name, loss in losses.items()}
            exact = _exact(np.asarray(logits, np.float64), np.asarray(labels))

            def error(output, exact=exact) -> float:
                return float(abs(float(output[0] if isinstance(output, tuple) else output) - exact) / exact)

            common = {"reference": "optax", "progress": progress, "error": error}
            rows += measure("cross-entropy, value", shape, dtype, losses, (logits, labels), **common)
            subject = "cross-entropy, value and gradient"
            rows += measure(subject, shape, dtype, gradients, (logits, labels), **common)
            limit = {"optax": gradients["optax"], "read and write once": lambda logits, labels: logits + 1}
            rows += measure(subject + ", the limit", shape, dtype, limit, (logits, labels), reference="optax")[1:]
    return rows


def _mean(loss: Callable) -> Callable:
    return lambda logits, labels: loss(logits, labels).mean()


def _exact(z: np.ndarray, y: np.ndarray) -> float:
    largest = z.max(axis=-1)
    total = np.log(np.exp(z - largest[:, None]).sum(axis=-1)) + largest
    return float((total - np.take_along_axis(z, y[:, None], axis=-1)[:, 0]).mean())
