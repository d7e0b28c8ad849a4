"""Time several programs in turns, so that what the machine does meanwhile falls on all of them alike."""

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """One program at one shape; `ratio` is to the run's own reference, which has 1.0."""

    subject: str
    shape: str
    dtype: str
    program: str
    median_ms: float
    spread_ms: float  # between the quartiles
    ratio: float
    temp_mb: float
    error: float | None  # largest relative to the largest expected, against float64


def measure(
    subject: str,
    shape: str,
    dtype: str,
    programs: dict[str, Callable],
    arguments: tuple,
    *,
    reference: str,
    error: Callable | None = None,
    repeats: int = 20,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Compile each program, run it twice unmeasured, then all of them in turns."""
    compiled, outputs = {}, {}
    for name, program in programs.items():
        progress(f"{subject} {shape} {dtype}: compiling {name}")
        compiled[name] = jax.jit(program).lower(*arguments).compile()
        for _ in range(2):
            outputs[name] = jax.block_until_ready(compiled[name](*arguments))
    errors = {name: error(output) if error else None for name, output in outputs.items()}
    del outputs
    seconds = {name: [] for name in compiled}
    for turn in range(repeats):
        progress(f"{subject} {shape} {dtype}: turn {turn + 1} of {repeats}")
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, program in compiled.items():
        low, median, high = np.percentile(np.array(seconds[name]) * 1e3, [25, 50, 75])
        # Turn by turn, the ratio is steadier than the times.
        ratio = float(np.median(np.array(seconds[name]) / np.array(seconds[reference])))
        temps = program.memory_analysis().temp_size_in_bytes / 1e6
        rows.append(Row(subject, shape, dtype, name, float(median), float(high - low), ratio, temps, errors[name]))
    return rows


def table(rows: list[Row]) -> str:
    head = f"{'':<32}{'median ms':>11}{'spread':>9}{'ratio':>8}{'temps MB':>10}{'error':>10}"
    lines, group = [], None
    for row in rows:
        if (row.subject, row.shape, row.dtype) != group:
            group = (row.subject, row.shape, row.dtype)
            lines += ["", f"{row.subject}, {row.shape}, {row.dtype}", head]
        error = "" if row.error is None else f"{row.error:.1e}"
        times = f"{row.median_ms:>11.2f}{row.spread_ms:>9.2f}{row.ratio:>8.2f}"
        lines.append(f"  {row.program:<30}{times}{row.temp_mb:>10.1f}{error:>10}")
    return "\n".join(lines)


def save(rows: list[Row], name: str) -> Path:
    """The rows and the versions that gave them, under benchmarks/results."""
    RESULTS.mkdir(exist_ok=True)
    device = jax.devices()[0]
    facts = {
        "device": f"{device.platform} ({device.device_kind})",
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return path
