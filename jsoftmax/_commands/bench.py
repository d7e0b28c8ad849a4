"""`python -m jsoftmax bench`: how fast, how large and how right, beside optax and a limit measured in the same run.

Programs take turns, so that what the machine does meanwhile falls on all of them alike. `benchmarks/` in the repository
measures more shapes and peers with the same functions.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax

FEWEST_TURNS = 5


class Program(NamedTuple):
    """Something to time: `run()` returns its result when it is there."""

    run: Callable[[], Any]
    compile_ms: float | None = None
    temp_mb: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One program at one shape; `ratio` is to the run's reference, which has 1.0, `of_limit` to what must be done."""

    subject: str
    shape: str
    dtype: str
    program: str
    median_ms: float
    spread_ms: float  # between the quartiles
    ratio: float
    of_limit: float | None
    compile_ms: float | None
    temp_mb: float | None
    peak_mb: float | None  # where the platform tells it, and it was above all peaks before it
    error: float | None  # against float64, relative to the largest expected


def compiled(function: Callable, arguments: tuple) -> Program:
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    compile_ms = 1e3 * (time.perf_counter() - start)
    memory = program.memory_analysis()  # None where the platform has none
    temp_mb = memory.temp_size_in_bytes / 1e6 if memory else None
    return Program(lambda: jax.block_until_ready(program(*arguments)), compile_ms, temp_mb)


def measure(
    subject: str,
    shape: str,
    dtype: str,
    programs: Mapping[str, Program],
    *,
    reference: str,
    limit: str | None = None,
    error: Callable[[Any], float] | None = None,
    repeats: int = 20,
    calls: int = 1,
    max_seconds: float = float("inf"),
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Run each program twice unmeasured, then all of them in turns of so many calls."""
    progress(f"{subject}, {shape}, {dtype}")
    peaks, errors = {}, {}
    for name, program in programs.items():
        before = _peak_bytes()
        program.run()
        output = program.run()
        peaks[name] = _peak_bytes() / 1e6 if _peak_bytes() > before else None
        errors[name] = error(output) if error and name != limit else None
        del output
    seconds, start = {name: [] for name in programs}, time.perf_counter()
    for turn in range(repeats):
        if turn >= FEWEST_TURNS and time.perf_counter() - start > max_seconds:
            break
        for name, program in programs.items():
            begin = time.perf_counter()
            for _ in range(calls):
                program.run()
            seconds[name].append((time.perf_counter() - begin) / calls)
    times = {name: np.array(each) for name, each in seconds.items()}
    rows = []
    for name, program in programs.items():
        low, median, high = (float(number) for number in np.percentile(times[name] * 1e3, [25, 50, 75]))
        # Turn by turn, the ratio is steadier than the times.
        ratio = float(np.median(times[name] / times[reference]))
        of_limit = float(np.median(times[name] / times[limit])) if limit else None
        memory = (program.compile_ms, program.temp_mb, peaks[name])
        rows.append(Row(subject, shape, dtype, name, median, high - low, ratio, of_limit, *memory, errors[name]))
    return rows


def _peak_bytes() -> int:
    """The most that the device has held so far; 0 where the platform does not tell."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def table(rows: list[Row]) -> str:
    head = f"{'':<24}{'ms':>9}{'spread':>8}{'ratio':>7}{'× limit':>8}{'compile':>9}{'temps MB':>10}{'error':>9}"
    lines, group = [], None
    for row in rows:
        if (row.subject, row.shape, row.dtype) != group:
            group = (row.subject, row.shape, row.dtype)
            lines += ["", f"{row.subject}, {row.shape}, {row.dtype}", head]
        line = f"  {row.program:<22}{row.median_ms:>9.4g}{row.spread_ms:>8.2g}{row.ratio:>7.2f}"
        columns = (
            (row.of_limit, 8, ".1f"),
            (row.compile_ms, 9, ".0f"),
            (row.temp_mb, 10, ".1f"),
            (row.error, 9, ".0e"),
        )
        lines.append((line + "".join(_cell(*column) for column in columns)).rstrip())
    return "\n".join(lines)


def _cell(number: float | None, width: int, form: str) -> str:
    return f"{'' if number is None else format(number, form):>{width}}"


def cross_entropy(
    rows: int,
    classes: int,
    dtype: str,
    peers: Callable[[Any, Any, bool], Mapping[str, Program]] = lambda logits, labels, gradient: {},
    **settings: Any,
) -> list[Row]:
    """Cross-entropy on logits, forwards and with its gradient. `peers` are other programs for the same work."""
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(rows, classes)) * 3, dtype)
    labels = jnp.asarray(random.integers(0, classes, size=rows))
    z = np.asarray(logits, np.float64)
    exact = _exact_loss(z, np.asarray(labels))
    losses = {
        "optax": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
        "jsoftmax": lambda z, y: jsoftmax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    }
    modes = {
        "cross-entropy, value": (losses, "read once", lambda z, y: z.max(axis=-1)),
        "cross-entropy, value and gradient": (
            {name: jax.value_and_grad(loss) for name, loss in losses.items()},
            "read and write once",
            lambda z, y: z + 1,
        ),
    }
    measured = []
    for subject, (functions, limit, least) in modes.items():
        programs = {name: compiled(f, (logits, labels)) for name, f in {**functions, limit: least}.items()}
        programs |= peers(logits, labels, "gradient" in subject)
        checks = {"reference": "optax", "limit": limit, "error": lambda output: _error(output, exact)}
        measured += measure(subject, f"{rows}×{classes}", dtype, programs, **checks, **settings)
    return measured


def linear(
    rows: int,
    features: int,
    classes: int,
    dtype: str,
    peers: Mapping[str, Callable] | None = None,
    **settings: Any,
) -> list[Row]:
    """Linear cross-entropy with both gradients. `peers` are losses of (features, kernel, labels)."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(rows, features)), dtype)
    kernel = jnp.asarray(random.normal(size=(features, classes)) / np.sqrt(features), dtype)
    labels = jnp.asarray(random.integers(0, classes, size=rows))
    exact = _exact_loss(np.asarray(x, np.float32) @ np.asarray(kernel, np.float32), np.asarray(labels))

    def unfused(x, kernel, labels):
        return optax.softmax_cross_entropy_with_integer_labels(x @ kernel, labels).mean()

    losses = {"unfused optax": unfused, "jsoftmax": jsoftmax.linear_softmax_cross_entropy, **(peers or {})}
    functions = {name: jax.value_and_grad(loss, (0, 1)) for name, loss in losses.items()}
    functions["three products"] = lambda x, kernel, labels: three_products(x, kernel)
    programs = {name: compiled(function, (x, kernel, labels)) for name, function in functions.items()}
    return measure(
        "linear cross-entropy, value and both gradients",
        f"{rows}×{features}×{classes}",
        dtype,
        programs,
        reference="unfused optax",
        limit="three products",
        error=lambda output: _error(output, exact),
        **settings,
    )


def three_products(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least that value and gradients multiply, with the logits in the place of their own gradient."""
    logits = x @ kernel
    return logits @ kernel.T, x.T @ logits


def _exact_loss(z: np.ndarray, labels: np.ndarray) -> float:
    largest = z.max(axis=-1)
    total = np.log(np.exp(z - largest[:, None]).sum(axis=-1, dtype=np.float64)) + largest
    return float((total - np.take_along_axis(z, labels[:, None], axis=-1)[:, 0]).mean())


def _error(output: Any, exact: float) -> float:
    return abs(float(output[0] if isinstance(output, tuple) else output) - exact) / exact


def main(rows: int, classes: int, features: int | None, dtype: str, as_json: bool) -> int:
    """Measure the shape on the first device that JAX sees, and print what came out."""
    settings: dict[str, Any] = {"max_seconds": 10.0}
    if features:
        measured = linear(rows, features, classes, dtype, **settings)
    else:
        measured = cross_entropy(rows, classes, dtype, **settings)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in measured], indent=1))
    else:
        device = jax.devices()[0]
        print(f"{device.platform} ({device.device_kind}), JAX {jax.__version__}\n{table(measured)}")
    return 0
