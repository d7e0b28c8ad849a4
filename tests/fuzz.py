"""Rows of every hard kind through every engine, against the oracle, in bulk. Stopped, it goes on later.

    make fuzz ROWS=1000000

Rows come in batches of one shape, so that a program is compiled once, and each row is of a kind of its own: confident,
tied, dominated, huge, tiny, with holes of −∞. What was found is kept in benchmarks/results/fuzz.json: how many rows,
how long, and the worst error in ulps of each function, dtype and engine. A row above its bound ends the search and is
printed as it is. `tests/contract/test_fuzz.py` runs a few batches.
"""

import argparse
import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.sharding import PartitionSpec as P
from rich.progress import Progress

import jsoftmax
from jsoftmax.testing import float64

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "fuzz.json"
BATCH = 1024
DTYPES = ("float32", "float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
CLASSES = (1, 2, 3, 8, 17, 33, 64, 65, 257, 1000)
ENGINES = ("dense", "accelerator", "linear", "sharded")
# A CPU reduces the accelerator's form class by class; kernels here are the identity; shards are of 8 devices.
MOST_CLASSES = {"accelerator": 16, "linear": 65, "sharded": 1000}
ROUNDED_ONCE = ("softmax", "logsumexp", "gradient")  # results in the logits' own dtype
KINDS = ("confident", "tied", "dominated", "huge", "tiny", "holes", "plain")


def engines_of(classes: int) -> list[str]:
    fits = [name for name in ENGINES if classes <= MOST_CLASSES.get(name, classes)]
    return [name for name in fits if name != "sharded" or classes % len(jax.devices()) == 0]


def draw(random: np.random.Generator, classes: int, dtype: Any, rows: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    """Logits that `dtype` holds, and labels that name none of their holes."""
    info, each = jnp.finfo(dtype), np.arange(rows)
    largest = float(info.max) / 4
    # Products with −∞ are NaN: batches without any are for the linear engine, too.
    kind = random.choice(KINDS if random.random() < 0.5 else [kind for kind in KINDS if kind != "holes"], rows)[:, None]
    labels = random.integers(classes, size=rows)
    z = random.normal(size=(rows, classes)) * 10 ** random.uniform(-3, 1.2, (rows, 1))
    few = np.take_along_axis(z, random.integers(min(3, classes), size=z.shape), axis=1)
    z = np.where(kind == "tied", few, z)
    z = np.where(kind == "huge", z * 10 ** random.uniform(0, 0.9 * np.log10(largest), (rows, 1)), z)
    z = np.where(kind == "tiny", z * float(info.smallest_normal) * 10 ** random.uniform(-2, 9, (rows, 1)), z)
    lift = np.where(kind[:, 0] == "confident", random.uniform(-85, 87, rows), 0)
    lift = np.where(kind[:, 0] == "dominated", random.uniform(20, 1e4, rows), lift)
    z[each, labels] += lift
    holes = (kind == "holes") & (random.random(z.shape) < random.random((rows, 1)))
    holes[each, labels] = False
    z = np.asarray(jnp.asarray(np.clip(z, -largest, largest), dtype)).astype(np.float64)
    if not np.isinf(np.asarray(-np.inf, dtype).astype(np.float64)):  # a format without infinities
        return z, labels
    return np.where(holes, -np.inf, z), labels


@functools.cache
def program(engine: str, classes: int, dtype: str):
    """Loss and gradient of each row, and what else the engine has, of logits and labels."""
    integer = jsoftmax.softmax_cross_entropy_with_integer_labels
    if engine == "linear":
        eye = jnp.eye(classes, dtype=dtype)
        loss = functools.partial(_linear, eye)
    elif engine == "sharded":
        loss = _over_devices(functools.partial(integer, axis_name="classes"))
    else:
        loss = functools.partial(integer, implementation={"dense": None}.get(engine, engine))

    def results(logits, labels):
        out = {
            "loss": loss(logits, labels),
            "gradient": jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits),
        }
        if engine == "dense":
            out |= {"softmax": jsoftmax.softmax(logits), "logsumexp": jsoftmax.logsumexp(logits)}
        return out

    return jax.jit(results)


def _linear(kernel, logits, labels):
    return jsoftmax.linear_softmax_cross_entropy(logits, kernel, labels, reduction="none", block_size=BATCH // 2)


def _over_devices(loss):
    mesh = jax.make_mesh((len(jax.devices()),), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(loss, mesh=mesh, in_specs=(P(None, "classes"), P()), out_specs=P())


def bound(name: str, dtype: str, gap: np.ndarray) -> np.ndarray:
    """CONTRACT: ulps of the output."""
    if dtype not in ("float32", "float64") and name in ROUNDED_ONCE:
        return np.full_like(gap, 0.51)
    if name == "logsumexp":
        return np.full_like(gap, 4.0)
    if dtype == "float64":
        return np.full_like(gap, 6.0)
    return np.where(gap <= 10, 6.0 if name == "loss" else 8.0, 40.0)


def errors(
    results: dict, z: np.ndarray, labels: np.ndarray, dtype: str
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The name of each result, its errors in ulps and the gaps that decide on its bound, the worst of each row."""
    with np.errstate(all="ignore"):
        row = oracle.exact(z, oracle.LONG_DOUBLE)
        wide, gaps = oracle.loss_dtype(dtype), oracle.gaps(row)
        at_label = oracle.at_labels(gaps, labels)
        # Of a sum of two numbers, which may cancel. What is subnormal may be flushed to 0.
        least = np.ldexp(float(jnp.finfo(wide).smallest_normal), jnp.finfo(wide).nmant)
        size = np.maximum.reduce([np.abs(row.maximum), row.log_total, np.abs(row.logsumexp), np.full(len(z), least)])
        truth = {
            "loss": (oracle.losses(row, labels), wide, at_label),
            "gradient": (oracle.gradients(row, labels), dtype, gaps),
            "softmax": (row.p, dtype, gaps),
            "logsumexp": (row.logsumexp, dtype, at_label, size),
        }
        for name, actual in results.items():
            expected, out_dtype, gap, *unit = truth[name]
            actual = np.asarray(actual).astype(np.float64)
            yield name, oracle.ulps(actual, expected, out_dtype, *unit), gap


class Found(dict):
    """From function, dtype and engine to rows, seconds and the worst error."""

    def add(self, key: tuple[str, ...], rows: int, seconds: float, worst: float) -> None:
        old = self.get("/".join(key), {"rows": 0, "seconds": 0.0, "worst_ulps": 0.0})
        self["/".join(key)] = {
            "rows": old["rows"] + rows,
            "seconds": round(old["seconds"] + seconds, 3),
            "worst_ulps": round(max(old["worst_ulps"], worst), 3),
        }


def batch(seed: int, found: Found, dtypes: tuple[str, ...] = DTYPES, sizes: tuple[int, ...] = CLASSES) -> int:
    """One batch through every engine that takes it; how many rows that were."""
    random = np.random.default_rng(seed)
    dtype, classes = str(random.choice(dtypes)), int(random.choice(sizes))
    with float64() if dtype == "float64" else contextlib.nullcontext():
        z, labels = draw(random, classes, jnp.dtype(dtype))
        arrays = jnp.asarray(z, dtype), jnp.asarray(labels, jnp.int32)
        names = [name for name in engines_of(classes) if name != "linear" or np.all(np.isfinite(z))]
        for engine in names:
            start = time.perf_counter()
            results = jax.tree.map(np.asarray, program(engine, classes, dtype)(*arrays))
            seconds = time.perf_counter() - start
            for name, error, gap in errors(results, z, labels, jnp.dtype(dtype)):
                most = bound(name, dtype, gap)
                if np.any(error > most):
                    at = np.unravel_index(np.argmax(error - most), error.shape)
                    raise AssertionError(
                        f"{name} of {dtype} by {engine} is off by {error[at]:.3g} ulps (allowed {most[at]:.3g}), "
                        f"seed {seed}, label {labels[at[0]]}, logits {z[at[0]].tolist()}"
                    )
                found.add((name, dtype, engine), BATCH, seconds, float(np.max(error)))
    return BATCH * len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="until so many were looked at (default 1,000,000)")
    wanted = parser.parse_args().rows
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"seed": 0, "rows": 0, "found": {}}
    found = Found(kept["found"])
    with Progress() as progress:
        task = progress.add_task("rows", total=wanted, completed=kept["rows"])
        while kept["rows"] < wanted:
            count = batch(kept["seed"], found)
            kept = {"seed": kept["seed"] + 1, "rows": kept["rows"] + count, "jax": jax.__version__, "found": found}
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            progress.update(task, completed=kept["rows"])
    for name, numbers in sorted(found.items()):
        print(f"{name:40} {numbers['rows']:>10,} rows {numbers['worst_ulps']:>8.3f} ulps")


if __name__ == "__main__":
    main()
