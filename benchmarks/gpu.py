"""`python -m benchmarks gpu`: all that an accelerator is to show, in one call of at most ten minutes.

Each result is printed and kept as a line of JSON as soon as it is there, what is right before what is fast: a call that
is cut short has lost nothing but the rest. Parts for which no time is left are named. `--quick` takes small shapes and
keeps nothing.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax
from benchmarks import harness
from benchmarks.harness import Program, Row, compiled, results_name
from benchmarks.peers import absent, linear_losses, torch_cross_entropy
from jsoftmax._commands import bench
from jsoftmax._commands.verify import verify

SECONDS = 570.0
VERIFY_SECONDS = 150.0
GAPS = (0, 1, 5, 10, 20, 40, 60, 80, 87)  # of a label's logit above logsumexp of the others


class Size(NamedTuple):
    """How large everything is."""

    copied: int  # bytes
    product: int  # rows and columns of two square matrices
    checked: tuple[int, ...]  # classes
    verified: int | None  # results, at most
    dense: tuple[tuple[int, int, str], ...]  # rows, classes, dtype
    linear: tuple[int, int, int, str]
    blocks: tuple[int, ...]
    turns: dict[str, Any]


FULL = Size(
    2**31,
    8192,
    (128, 1003, 50_257),
    None,
    ((8192, 131_072, "bfloat16"), (8192, 131_072, "float32"), (8192, 1000, "bfloat16"), (65_536, 1000, "float32")),
    (8192, 4096, 128_256, "bfloat16"),
    (1024, 2048, 4096, 8192),
    {"repeats": 20, "max_seconds": 8.0},
)
QUICK = Size(
    2**20, 64, (67,), 2, ((16, 67, "bfloat16"),), (16, 8, 67, "float32"), (4,), {"repeats": 2, "max_seconds": 1.0}
)


def results(size: Size) -> Iterator[dict]:
    """Every result; the parts in the order of what matters most."""
    start = time.perf_counter()
    device = jax.devices()[0]
    yield {"device": f"{device.platform} ({device.device_kind})", "jax": jax.__version__, "absent": absent()}
    parts = [_errors, _limits, *(functools.partial(_dense, case=case) for case in size.dense), _linear, _verified]
    for part in parts:
        name = getattr(part, "func", part).__name__
        if time.perf_counter() - start > SECONDS - 60:
            yield {"no time for": name}
            continue
        begun = time.perf_counter()
        try:
            yield from part(size)
            peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
            yield {"part": name, "seconds": round(time.perf_counter() - begun, 1), "peak GB so far": peak / 1e9}
        except Exception as error:  # whatever it is, the other parts are worth having
            yield {"failed": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def _errors(size: Size) -> Iterator[dict]:
    """The worst error at each gap, in ulps of the result's dtype, beside what the contract allows."""
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels
    both = jax.jit(lambda z, y: (loss(z, y), jax.grad(lambda z: loss(z, y).sum())(z)))
    for dtype, gap in itertools.product(("float32", "bfloat16", "float16"), GAPS):
        worst = np.zeros(2)
        for classes in size.checked:
            logits, labels = _rows(classes, gap, dtype)
            got, expected = both(logits, labels), _exact(np.asarray(logits, np.longdouble), labels)
            worst = np.maximum(worst, [_ulps(*pair) for pair in zip(got, expected, strict=True)])
        far = gap > 10
        allowed = 40 if far else 6, 0.51 if dtype != "float32" else 40 if far else 8
        ok = bool(np.all(worst <= allowed))
        yield {"ulps": dtype, "gap": gap, "loss": worst[0], "gradient": worst[1], "allowed": allowed, "ok": ok}


def _rows(classes: int, gap: float, dtype: str) -> tuple[jax.Array, np.ndarray]:
    """32 rows whose labels are `gap` above the rest: ordinary rows, with masks, and with ties beside the label."""
    random, rows = np.random.default_rng(classes), np.arange(32)
    z, labels = 2 * random.normal(size=(32, classes)), random.integers(classes, size=32)
    z[10:20, ::3] = -np.inf
    z[20:, :2] = z[20:].max()
    z[rows, labels] = -np.inf
    z[rows, labels] = np.log(np.exp(z).sum(axis=-1)) + gap
    return jnp.asarray(z, dtype), labels


def _exact(z: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and gradients in the precision of z, from a sum without the largest class."""
    rows, top = np.arange(len(z)), z.argmax(axis=-1)
    e = np.exp(z - z[rows, top][:, None])
    e[rows, top] = 0
    others = e.sum(axis=-1)
    e[rows, top] = 1
    gradient = e / (1 + others)[:, None]
    at_top = top == labels
    gradient[rows, labels] = -np.where(at_top, others, 1 + others - e[rows, labels]) / (1 + others)
    return z[rows, top] - z[rows, labels] + np.log1p(others), gradient


def _ulps(got: jax.Array, expected: np.ndarray) -> float:
    info = jnp.finfo(got.dtype)
    smallest = float(info.smallest_normal)
    one = np.exp2(np.floor(np.log2(np.maximum(np.abs(expected), smallest)))) * float(info.eps)
    error = np.abs(np.asarray(got, np.longdouble) - expected) / one
    # Near the smallest normal number nothing is promised.
    return float(np.max(np.where(np.abs(expected) >= 1.01 * smallest, error, 0)))


def _limits(size: Size) -> Iterator[dict]:
    """What the device does at best: bytes read and written a second, and operations of a product."""
    array = jnp.zeros(size.copied // 4, jnp.float32)
    matrix = jnp.zeros((size.product, size.product), jnp.bfloat16)
    programs = {"copy": compiled(lambda z: z + 1, (array,)), "product": compiled(jnp.matmul, (matrix, matrix))}
    copy, product = bench.measure("limits", "", "", programs, reference="copy", **size.turns)
    yield {
        "copy TB/s": 2 * size.copied / copy.median_ms / 1e9,
        "product TFLOP/s": 2 * size.product**3 / product.median_ms / 1e9,
    }


def _dense(size: Size, case: tuple[int, int, str]) -> Iterator[dict]:
    count, classes, dtype = case
    logits = 3 * jax.random.normal(jax.random.key(0), (count, classes), dtype)
    labels = jax.random.randint(jax.random.key(1), (count,), 0, classes)
    losses = {
        "jsoftmax": lambda z, y: jsoftmax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
        "optax": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
        "jax.nn": lambda z, y: -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=-1).mean(),
    }
    gradients = {name: jax.value_and_grad(loss) for name, loss in losses.items()}
    for subject, functions, least in (
        ("cross-entropy, value", losses, lambda z, y: z.max(axis=-1)),
        ("cross-entropy, value and gradient", gradients, lambda z, y: z + 1),
    ):
        programs = _programs({**functions, "limit": least}, (logits, labels))
        if size is FULL:
            programs |= torch_cross_entropy(logits, labels, functions is gradients)
        yield from _measured(size, subject, f"{count}×{classes}", dtype, programs)


def _linear(size: Size) -> Iterator[dict]:
    """Sizes of blocks, other fused losses, the unfused loss, and the three products alone."""
    rows, width, classes, dtype = size.linear
    x = jax.random.normal(jax.random.key(0), (rows, width), dtype)
    kernel = jax.random.normal(jax.random.key(1), (width, classes), dtype) / width**0.5
    labels = jax.random.randint(jax.random.key(2), (rows,), 0, classes)
    ours = jsoftmax.linear_softmax_cross_entropy
    losses: dict[str, Callable] = {"jsoftmax": ours}
    losses |= {f"jsoftmax, blocks of {block}": functools.partial(ours, block_size=block) for block in size.blocks}
    losses["optax"] = lambda x, w, y: optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean()
    losses |= linear_losses()
    functions: dict[str, Callable] = {name: jax.value_and_grad(loss, (0, 1)) for name, loss in losses.items()}
    functions["limit"] = lambda x, w, y: bench.three_products(x, w)
    programs = _programs(functions, (x, kernel.astype(dtype), labels))
    yield from _measured(size, "linear cross-entropy", f"{rows}×{width}×{classes}", dtype, programs)


def _programs(functions: Mapping[str, Callable], arguments: tuple) -> dict[str, Program]:
    """Those that compile and run: a peer may need more memory than there is."""
    found = {}
    for name, function in functions.items():
        try:
            program = compiled(function, arguments)
            program.run()
        except Exception as error:
            if name in ("jsoftmax", "limit"):
                raise
            print(f"left out: {name}, {type(error).__name__}", flush=True)
        else:
            found[name] = program
    return found


def _measured(size: Size, subject: str, shape: str, dtype: str, programs: dict[str, Program]) -> Iterator[dict]:
    measured: list[Row] = bench.measure(
        subject, shape, dtype, programs, reference="jsoftmax", limit="limit", **size.turns
    )
    yield from map(dataclasses.asdict, measured)


def _verified(size: Size) -> Iterator[dict]:
    """`python -m jsoftmax verify` on this device, as far as time goes."""
    start, checked, wrong = time.perf_counter(), 0, []
    everything = True
    for result in verify((jax.default_backend(),)):
        checked += 1
        wrong += [] if result.ok else [dataclasses.asdict(result)]
        if checked == size.verified or time.perf_counter() - start > VERIFY_SECONDS:
            everything = False
            break
    yield {"gradients verified": checked, "all of them": everything, "wrong": wrong}


def main(quick: bool) -> int:
    path: Path | None = None if quick else harness.RESULTS / f"{results_name()}-gpu.jsonl"
    if path:
        path.unlink(missing_ok=True)
    failed = 0
    for result in results(QUICK if quick else FULL):
        line = json.dumps(result, ensure_ascii=False)
        print(line, flush=True)
        failed += result.get("ok") is False or "failed" in result or bool(result.get("wrong"))
        if path:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return 1 if failed else 0
