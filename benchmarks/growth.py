"""How the time of value and gradients grows with rows, classes, features and the size of a block, in float32."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax
from benchmarks.harness import Row, measure

# Each curve changes one number of the shape, at the place that is named first.
DENSE = {
    "rows": (0, [(rows, 8192) for rows in (64, 128, 256, 512, 1024, 2048)]),
    "classes": (1, [(256, classes) for classes in (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)]),
}
LINEAR = {
    "features": (1, [(512, features, 8192, 128) for features in (64, 128, 256, 512, 1024)]),
    "block size": (3, [(2048, 128, 8192, block) for block in (32, 64, 128, 256, 512, 1024)]),
}
PLACES = {name: place for name, (place, _) in (DENSE | LINEAR).items()}


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for curves, functions in ((DENSE, _dense), (LINEAR, _linear)):
        for name, (_, shapes) in curves.items():
            for shape in shapes[:: len(shapes) - 1] if quick else shapes:
                text, settings = "×".join(map(str, shape)), {"repeats": 10, "max_seconds": 1.0, "progress": progress}
                arguments = _arguments(*shape[:-1]) if curves is LINEAR else _logits(*shape)
                rows += measure(
                    f"growth with {name}", text, "float32", functions(shape), arguments, reference="optax", **settings
                )
    return rows


def _dense(shape: tuple[int, ...]) -> dict[str, Callable]:
    losses = {
        "optax": optax.softmax_cross_entropy_with_integer_labels,
        "jsoftmax": jsoftmax.softmax_cross_entropy_with_integer_labels,
    }
    return {name: jax.value_and_grad(functools.partial(_mean, loss)) for name, loss in losses.items()}


def _mean(loss: Callable, logits: jax.Array, labels: jax.Array) -> jax.Array:
    return loss(logits, labels).mean()


def _linear(shape: tuple[int, ...]) -> dict[str, Callable]:
    def unfused(x, kernel, labels):
        return optax.softmax_cross_entropy_with_integer_labels(x @ kernel, labels).mean()

    ours = functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=shape[-1])
    return {name: jax.value_and_grad(loss, (0, 1)) for name, loss in (("optax", unfused), ("jsoftmax", ours))}


def _logits(rows: int, classes: int) -> tuple:
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(rows, classes)) * 3, jnp.float32)
    return logits, jnp.asarray(random.integers(0, classes, size=rows))


def _arguments(rows: int, features: int, classes: int) -> tuple:
    kernel, labels = _logits(features, classes)[0], _logits(rows, classes)[1]
    return _logits(rows, features)[0], kernel / features, labels


def curve(rows: Iterable[Row], name: str, program: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and milliseconds of one program along one of the curves."""
    points = [row for row in rows if row.subject == f"growth with {name}" and row.program == program]
    sizes = [int(row.shape.split("×")[PLACES[name]]) for row in points]
    return np.array(sizes), np.array([row.median_ms for row in points])


def slope(sizes: np.ndarray, times: np.ndarray) -> float:
    """The exponent p of time ~ size^p, fitted by least squares to the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
