"""Cross-entropy on logits beside optax, PyTorch, and one pass that reads the logits, or reads and writes them."""

from collections.abc import Callable

from benchmarks.harness import DTYPES, MAX_SECONDS, SHAPES, Row
from benchmarks.peers import torch_cross_entropy
from jsoftmax import _bench


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for count, classes in list(SHAPES.values())[: 1 if quick else None]:
        for dtype in DTYPES:
            settings = {"max_seconds": MAX_SECONDS, "progress": progress}
            rows += _bench.cross_entropy(count, classes, dtype, torch_cross_entropy, **settings)
    return rows
