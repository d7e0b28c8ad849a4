"""Rows of every hard kind through every engine, against the oracle, in bulk. Stopped, it goes on later.

    make fuzz ROWS=1000000

Rows come in batches of one shape, so that a program is compiled once, and each row is of a kind of its own: confident,
tied, dominated, huge, tiny, with holes of −∞. Half of the batches have options, all at once: temperature, label
smoothing, z-loss and ignored rows. Then NaN or ±∞ spoil an eighth of the rows, and no other may change. What was
found is kept in benchmarks/results/fuzz.json: how many rows, how long, and the worst error in ulps of each function,
dtype and engine. A row above its bound ends the search and is printed as it is. `tests/contract/test_fuzz.py` runs a
few batches.
"""

import argparse
import contextlib
import functools
import json
import time
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
# Exact in every dtype, so that what is left is the error of the loss; every eighth row is ignored.
SHARE, Z_LOSS, IGNORED = 0.125, 2.0**-13, -1
TEMPERATURES = 2.0 ** (np.arange(BATCH) % 4 - 1)
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


def spoil(random: np.random.Generator, z: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same rows with an eighth of them without a distribution, as far as the format can say so; and which."""
    spoiled, z = random.random(len(z)) < 1 / 8, z.copy()
    each, classes = np.flatnonzero(spoiled), z.shape[1]
    z[each, random.integers(classes, size=each.size)] = random.choice([np.nan, np.inf], each.size)
    z[each[random.random(each.size) < 1 / 3]] = -np.inf
    return np.asarray(jnp.asarray(z, dtype)).astype(np.float64), spoiled


@functools.cache
def program(engine: str, classes: int, dtype: str, with_options: bool = False):
    """Loss and gradient of each row, and what else the engine has, of logits and labels."""
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels
    options: dict[str, Any] = {"implementation": "accelerator"} if engine == "accelerator" else {}
    if with_options:
        options |= {"temperature": TEMPERATURES, "label_smoothing": SHARE, "z_loss": Z_LOSS, "ignore_index": IGNORED}
    if engine == "linear":
        loss = functools.partial(_linear, jnp.eye(classes, dtype=dtype))
    if engine == "sharded":
        loss = _over_devices(functools.partial(loss, axis_name="classes", **options))
    else:
        loss = functools.partial(loss, **options)
    suffix = " with options" if with_options else ""

    def results(logits, labels):
        out = {
            f"loss{suffix}": loss(logits, labels),
            f"gradient{suffix}": jax.grad(lambda z: jnp.sum(loss(z, labels)))(logits),
        }
        if engine == "dense" and not with_options:
            out |= {"softmax": jsoftmax.softmax(logits), "logsumexp": jsoftmax.logsumexp(logits)}
        return out

    return jax.jit(results)


def _linear(kernel, logits, labels, **options):
    return jsoftmax.linear_softmax_cross_entropy(
        logits, kernel, labels, reduction="none", block_size=BATCH // 2, **options
    )


def _over_devices(loss):
    mesh = jax.make_mesh((len(jax.devices()),), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(loss, mesh=mesh, in_specs=(P(None, "classes"), P()), out_specs=P())


def bound(name: str, dtype: str, gap: np.ndarray) -> np.ndarray:
    """CONTRACT: ulps of the output."""
    if dtype not in ("float32", "float64") and name.split()[0] in ROUNDED_ONCE:
        return np.full_like(gap, 0.51)
    if name == "logsumexp":
        return np.full_like(gap, 4.0)
    if "options" in name:
        return np.full_like(gap, 16.0)  # of the terms, which may cancel
    if dtype == "float64":
        return np.full_like(gap, 6.0)
    return np.where(gap <= 10, 6.0 if name == "loss" else 8.0, 40.0)


def truths(z: np.ndarray, labels: np.ndarray, dtype: Any, with_options: bool) -> dict[str, tuple]:
    """By name: each result, its dtype, the gaps that decide on its bound, and the sizes of terms that may cancel."""
    wide = oracle.loss_dtype(dtype)
    # What is subnormal may be flushed to 0.
    least = np.ldexp(float(jnp.finfo(wide).smallest_normal), jnp.finfo(wide).nmant)
    row = oracle.exact(z / TEMPERATURES[:, None] if with_options else z, oracle.LONG_DOUBLE)
    gaps = oracle.gaps(row)
    at_label = oracle.at_labels(gaps, np.maximum(labels, 0))
    if not with_options:
        size = np.maximum.reduce([np.abs(row.maximum), row.log_total, np.abs(row.logsumexp), np.full(len(z), least)])
        return {
            "loss": (oracle.losses(row, labels), wide, at_label),
            "gradient": (oracle.gradients(row, labels), dtype, gaps),
            "softmax": (row.p, dtype, gaps),
            "logsumexp": (row.logsumexp, dtype, at_label, size),
        }
    pairs = oracle.regularized(row, np.maximum(labels, 0), SHARE, Z_LOSS)
    (loss, loss_size), (slope, slope_size) = pairs
    # The square of logsumexp may be too large for the dtype.
    loss = np.where(row.logsumexp**2 < float(jnp.finfo(wide).max), loss, np.inf)
    loss, slope = (np.where(_column(labels, x) == IGNORED, 0, x) for x in (loss, slope / TEMPERATURES[:, None]))
    slope_size = slope_size / TEMPERATURES[:, None]
    return {
        "loss with options": (loss, wide, at_label, np.maximum(loss_size, least)),
        "gradient with options": (slope, dtype, gaps, np.maximum(slope_size, least)),
    }


def _column(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    return rows.reshape(rows.shape + (1,) * (like.ndim - 1))


def errors(actual: np.ndarray, expected: np.ndarray, dtype: Any, unit: np.ndarray | None = None) -> np.ndarray:
    """In ulps; ∞ is off by nothing from ∞."""
    actual = np.asarray(actual).astype(np.float64)
    infinite = np.isposinf(np.asarray(expected, np.float64)) & np.isposinf(actual)
    return np.where(infinite, 0, oracle.ulps(actual, expected, dtype, unit))


def check_spoiled(
    clean: dict, results: dict, z: np.ndarray, labels: np.ndarray, spoiled: np.ndarray, where: str
) -> None:
    """A row without a distribution gives NaN, or 0 if it is ignored, and no other row sees it."""
    for name, actual in results.items():
        expected = np.where(_column(labels == IGNORED, actual), 0.0, np.nan)
        if name == "logsumexp":
            expected = z.max(axis=-1)  # NaN, ∞ or −∞
        same = np.array_equal(actual[~spoiled], clean[name][~spoiled])
        expected = np.broadcast_to(expected, actual.shape)[spoiled]
        if not (same and np.array_equal(actual[spoiled].astype(np.float64), expected, equal_nan=True)):
            raise AssertionError(
                f"{name} of {'spoiled rows is wrong' if same else 'rows beside spoiled ones changes'} {where}"
            )


class Found(dict):
    """From function, dtype and engine to rows, seconds and the worst error."""

    def add(self, key: tuple[str, ...], rows: int, seconds: float, worst: float) -> None:
        old = self.get("/".join(key), {"rows": 0, "seconds": 0.0, "worst_ulps": 0.0})
        self["/".join(key)] = {
            "rows": old["rows"] + rows,
            "seconds": round(old["seconds"] + seconds, 3),
            "worst_ulps": round(max(old["worst_ulps"], worst), 3),
        }


def batch(
    seed: int,
    found: Found,
    dtypes: tuple[str, ...] = DTYPES,
    sizes: tuple[int, ...] = CLASSES,
    options: tuple[bool, ...] = (False, True),
) -> int:
    """One batch through every engine that takes it; how many rows that were."""
    random = np.random.default_rng(seed)
    dtype, classes, with_options = str(random.choice(dtypes)), int(random.choice(sizes)), bool(random.choice(options))
    with float64() if dtype == "float64" else contextlib.nullcontext(), np.errstate(all="ignore"):
        z, labels = draw(random, classes, jnp.dtype(dtype))
        if with_options:
            labels = np.where(np.arange(BATCH) % 8 == 5, IGNORED, labels)
        truth = truths(z, labels, jnp.dtype(dtype), with_options)
        bad, spoiled = spoil(random, z, jnp.dtype(dtype))
        names = [name for name in engines_of(classes) if name != "linear" or np.all(np.isfinite(z))]
        for engine in names:
            start = time.perf_counter()
            run = program(engine, classes, dtype, with_options)
            clean, beside = (
                jax.tree.map(np.asarray, run(jnp.asarray(each, dtype), jnp.asarray(labels, jnp.int32)))
                for each in (z, bad)
            )
            seconds = time.perf_counter() - start
            where = f"of {dtype} by {engine}, seed {seed}"
            for name, actual in clean.items():
                expected, out_dtype, gap, *unit = truth[name]
                error, most = errors(actual, expected, out_dtype, *unit), bound(name, dtype, gap)
                if np.any(error > most):
                    at = np.unravel_index(np.argmax(error - most), error.shape)
                    raise AssertionError(
                        f"{name} is off by {error[at]:.3g} ulps (allowed {most[at]:.3g}) {where}, "
                        f"row {at[0]}, label {labels[at[0]]}, logits {z[at[0]].tolist()}"
                    )
                found.add((name, dtype, engine), BATCH, seconds, float(np.max(error)))
            check_spoiled(clean, beside, bad, labels, spoiled, where)
            found.add(("edge rows", dtype, engine), int(spoiled.sum()), 0.0, 0.0)
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
