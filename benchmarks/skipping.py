"""Linear cross-entropy where a share of the rows counts, and the others are skipped, beside all of them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jsoftmax
from benchmarks.harness import Row, measure

SHAPES = [(2048, 512, 32_768), (8192, 512, 32_768)]
PERCENT = (10, 50, 90)
SUBJECT = "linear cross-entropy of some rows, value and both gradients"


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        progress(f"{SUBJECT}, {'×'.join(map(str, shape))}")
        rows += _shares(*shape, repeats=3 if quick else 5)
    return rows


def _shares(count: int, width: int, classes: int, repeats: int) -> list[Row]:
    """Ratios are to all rows without skipping; each share's rows are spread evenly over the batch.

    As many rows alone, a batch of their own, are what skipping cannot be better than.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    features = jax.random.normal(keys[0], (count, width))
    kernel = jax.random.normal(keys[1], (width, classes)) * width**-0.5
    labels = jax.random.randint(keys[2], (count,), 0, classes)
    order = jax.random.permutation(keys[3], count)

    def loss(features, kernel, labels, order, percent, **options):
        counted = order < count * percent // 100
        labels = jnp.where(counted, labels, -100)
        return jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, ignore_index=-100, **options)

    def alone(features, kernel, labels, order, percent):
        some = order[: count * percent // 100]
        return jsoftmax.linear_softmax_cross_entropy(features[some], kernel, labels[some])

    def gradients(function, percent, **options):
        return jax.value_and_grad(functools.partial(function, percent=percent, **options), (0, 1))

    programs = {"all": gradients(loss, 100)}
    programs |= {f"{percent} %": gradients(loss, percent, skip_rows=True) for percent in (*PERCENT, 100)}
    programs |= {f"{percent} % alone": gradients(alone, percent) for percent in PERCENT}
    arguments = (features, kernel, labels, order)
    shape = f"{count}×{width}×{classes}"
    return measure(SUBJECT, shape, "float32", programs, arguments, reference="all", repeats=repeats)
