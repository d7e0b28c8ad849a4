"""Linear cross-entropy beside the unfused loss, other fused ones, and its three products alone."""

from collections.abc import Callable

from benchmarks.harness import DTYPES, Row
from benchmarks.peers import linear_losses
from jsoftmax._commands import bench

SHAPES = [(2048, 512, 32_768)]


def run(quick: bool, progress: Callable[[str], None]) -> list[Row]:
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            rows += bench.linear(*shape, dtype, linear_losses(), repeats=3 if quick else 5, progress=progress)
    return rows
