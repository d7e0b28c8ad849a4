"""A problem of 64 × 10, where the arithmetic is nothing: what a call and a compilation cost."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax
from benchmarks.harness import Program, Row, compiled
from jsoftmax._commands import bench

ROWS, CLASSES = 64, 10
LOSSES = {
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "jsoftmax": jsoftmax.softmax_cross_entropy_with_integer_labels,
}


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(ROWS, CLASSES)), jnp.float32)
    labels = jnp.asarray(random.integers(0, CLASSES, size=ROWS))
    settings = {"reference": "optax", "max_seconds": 10.0, "progress": progress}

    def mean(loss: Callable) -> Callable:
        return lambda z, y: loss(z, y).mean()

    def called(function: Callable) -> Program:
        return Program(lambda: jax.block_until_ready(function(logits, labels)))

    gradients = {name: jax.value_and_grad(mean(loss)) for name, loss in LOSSES.items()}
    ways = {
        "eager": {name: called(loss) for name, loss in LOSSES.items()},
        "eager value and gradient": {name: called(gradient) for name, gradient in gradients.items()},
        "jit": {name: called(jax.jit(loss)) for name, loss in LOSSES.items()},
        "jit, value and gradient": {name: called(jax.jit(gradient)) for name, gradient in gradients.items()},
    }
    rows = []
    for way, programs in ways.items():
        # Under jit a call takes some microseconds, less than what it takes to wake a thread now and then.
        turns = {"repeats": 50, "calls": 200 if way.startswith("jit") and not quick else 1}
        rows += bench.measure(f"small, {way}", f"{ROWS}×{CLASSES}", "float32", programs, **turns, **settings)
    settings |= {"repeats": 5, "max_seconds": 20.0}
    builds = {name: _compilation(gradient, (logits, labels)) for name, gradient in gradients.items()}
    rows += bench.measure(
        "small, compilation of value and gradient", f"{ROWS}×{CLASSES}", "float32", builds, **settings
    )
    return rows


def _compilation(function: Callable, arguments: tuple) -> Program:
    """Tracing, lowering and compiling anew, as the first call of a fresh process does."""

    def run() -> None:
        jax.clear_caches()
        compiled(function, arguments)

    return Program(run)
