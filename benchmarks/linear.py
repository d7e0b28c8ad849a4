"""Linear cross-entropy: value and both gradients, beside the unfused loss and whichever peers are installed."""

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax
from benchmarks.harness import Row, measure

SHAPES = [(2048, 512, 32768)]
DTYPES = ["float32", "bfloat16"]


def unfused(features, kernel, labels):
    return optax.softmax_cross_entropy_with_integer_labels(features @ kernel, labels).mean()


def _tokamax() -> Callable:
    api = importlib.import_module("tokamax")
    return lambda features, kernel, labels: api.linear_softmax_cross_entropy_loss(
        features, labels, kernel, reduction="mean"
    )


def _jax_cce() -> Callable:
    api = importlib.import_module("jax_cce")
    return lambda features, kernel, labels: api.linear_cross_entropy(features, kernel.T, labels)


def peers() -> dict[str, Callable]:
    """Ours, the unfused loss, and the peers that this environment has."""
    found = {"unfused optax": unfused, "jsoftmax": jsoftmax.linear_softmax_cross_entropy}
    for name, load in (("tokamax", _tokamax), ("jax-cce", _jax_cce)):
        try:
            found[name] = load()
        except ImportError:
            continue
    return found


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for count, width, classes in SHAPES:
        for dtype in DTYPES:
            random = np.random.default_rng(0)
            features = jnp.asarray(random.normal(size=(count, width)), dtype)
            kernel = jnp.asarray(random.normal(size=(width, classes)) / np.sqrt(width), dtype)
            labels = jnp.asarray(random.integers(0, classes, size=count))
            z = np.asarray(features, np.float32) @ np.asarray(kernel, np.float32)
            total = np.log(np.exp(z).sum(axis=-1, dtype=np.float64))
            exact = float((total - np.take_along_axis(z, np.asarray(labels)[:, None], axis=-1)[:, 0]).mean())
            rows += measure(
                "linear cross-entropy, value and both gradients",
                f"{count}×{width}×{classes}",
                dtype,
                {name: jax.value_and_grad(loss, (0, 1)) for name, loss in peers().items()},
                (features, kernel, labels),
                reference="unfused optax",
                error=lambda output, exact=exact: abs(float(output[0]) - exact) / exact,
                repeats=3 if quick else 5,
                progress=progress,
            )
    return rows
