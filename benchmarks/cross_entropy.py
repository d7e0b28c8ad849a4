"""Cross-entropy on logits beside optax, PyTorch, and one pass that reads the logits, or reads and writes them."""

from collections.abc import Callable
from typing import Any

from benchmarks.harness import DTYPES, MAX_SECONDS, SHAPES, Row
from benchmarks.peers import torch_cross_entropy
from jsoftmax._commands import bench

WITH_TORCH = ("Llama 2", "ImageNet")  # it takes long to compile


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for model, (count, classes) in list(SHAPES.items())[: 1 if quick else None]:
        for dtype in DTYPES:
            settings: dict[str, Any] = {"max_seconds": MAX_SECONDS, "progress": progress}
            settings |= {"peers": torch_cross_entropy} if model in WITH_TORCH else {}
            rows += bench.cross_entropy(count, classes, dtype, **settings)
    return rows
