"""Losses of every kind in a process that lives for long: memory, caches, compilations and threads.

    make soak MINUTES=60

Some threads share the functions below, under `jit` and outside it, and call them at random with one of many shapes. A
shape must give the very bits that it gave before, in whichever thread. Once all threads have seen all shapes, nothing
may be compiled, and the memory of the process and the library's caches must stay as they are. What was seen is kept in
benchmarks/results/soak.json. `tests/contract/test_soak.py` runs some seconds of it.
"""

import argparse
import functools
import hashlib
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

import jsoftmax
from jsoftmax import categorical

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "soak.json"
SHAPES = [(rows, classes) for rows in (1, 6, 33, 128) for classes in (2, 17, 300, 1030)]
DTYPES = ("float32", "bfloat16")
FEATURES = 8
EVERY = 10.0  # seconds from one look at the memory to the next
MOST_GROWTH = 0.02  # of the memory once all was seen

integer = jsoftmax.softmax_cross_entropy_with_integer_labels
linear = jsoftmax.linear_softmax_cross_entropy


def arrays(rows: int, classes: int, dtype: str) -> dict[str, Any]:
    """The same for the same shape, in every thread."""
    numbers = np.random.default_rng((rows, classes))
    shapes = {"logits": (rows, classes), "others": (rows, classes), "h": (rows, FEATURES), "w": (FEATURES, classes)}
    made = {name: numbers.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    made = {name: jnp.asarray(array, dtype) for name, array in made.items()}
    labels = jnp.asarray(numbers.integers(0, classes, rows), jnp.int32)
    return made | {"labels": labels, "weights": jnp.asarray(numbers.uniform(0, 2, rows), jnp.float32)}


def of_logits(loss: Callable) -> Callable:
    return lambda a: jax.value_and_grad(lambda z: jnp.sum(loss(z, a)))(a["logits"])


def of_features(loss: Callable) -> Callable:
    return lambda a: jax.value_and_grad(lambda h, w: jnp.sum(loss(h, w, a)), (0, 1))(a["h"], a["w"])


def in_blocks(params, rows):
    return jnp.sum(integer(rows["h"] @ params, rows["labels"]))


blocks = jsoftmax.blockwise(in_blocks, block_size=16)
KEY = jax.random.key(0)
WORKS: dict[str, Callable] = {
    "cross-entropy": of_logits(lambda z, a: integer(z, a["labels"], label_smoothing=0.1, z_loss=1e-3)),
    "focal": of_logits(lambda z, a: jsoftmax.softmax_focal_loss(z, a["labels"], derivative="jvp")),
    "distillation": of_logits(lambda z, a: jsoftmax.distillation_loss(z, a["others"], temperature=2.0)),
    "entropy": of_logits(lambda z, a: categorical.entropy(z)),
    "sample": lambda a: categorical.sample(KEY, a["logits"], top_p=0.9),
    "linear": of_features(lambda h, w, a: linear(h, w, a["labels"], weights=a["weights"], block_size=16)),
    "blockwise": of_features(lambda h, w, a: blocks(w, {"h": h, "labels": a["labels"]})),
    "sampled": of_features(
        lambda h, w, a: jsoftmax.sampled_softmax_cross_entropy(h, w, a["labels"], KEY, num_sampled=2)
    ),
    "contrast": of_features(lambda h, w, a: jsoftmax.contrastive_loss(h, a["h"], block_size=16)),
}
EAGER = ("cross-entropy", "linear", "blockwise", "sampled")  # these are called outside jit as well


def calls() -> dict[Hashable, Callable[[], Any]]:
    """From a name and a shape to a call. Each shape is made once, and is compiled for once."""
    made = functools.cache(arrays)
    programs = {name: jax.jit(work) for name, work in WORKS.items()}
    programs |= {f"{name}, eager": WORKS[name] for name in EAGER}
    return {
        f"{name}, {rows}x{classes}, {dtype}": lambda f=function, s=(rows, classes, dtype): f(made(*s))
        for name, function in programs.items()
        for rows, classes in SHAPES
        for dtype in DTYPES
    }


_compiled = threading.local()


@functools.cache
def _listen() -> None:
    def count(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            _compiled.programs = compiled_here() + 1

    jax.monitoring.register_event_duration_secs_listener(count)


def compiled_here() -> int:
    """How many programs this thread has compiled."""
    return getattr(_compiled, "programs", 0)


def digest(results: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results))).hexdigest()


def caches() -> dict[str, int]:
    """How much is in each cache of the library."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "jsoftmax"]
    found = {id(f): f for module in modules for f in vars(module).values() if hasattr(f, "cache_info")}
    return {f"{f.__module__}.{f.__qualname__}": f.cache_info().currsize for f in found.values()}


def resident_mb() -> float:
    """Of this process; 0 where the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0.0
    return pages * 4096 / 2**20


class Soak:
    """Calls that were made, and what is wrong with them."""

    def __init__(self, named: dict[Hashable, Callable[[], Any]]):
        _listen()
        self.named = named
        self.seen: dict[Hashable, str] = {}
        self.count = self.programs = 0
        self.compiled_again: list[Hashable] = []
        self.differing: list[Hashable] = []
        self.lock = threading.Lock()
        self.is_warm = False

    def call(self, name: Hashable) -> None:
        known, before = self.is_warm, compiled_here()
        found = digest(self.named[name]())
        programs = compiled_here() - before
        with self.lock:
            self.count += 1
            self.programs += programs
            if known and programs:
                self.compiled_again.append(name)
            if self.seen.setdefault(name, found) != found:
                self.differing.append(name)

    def work(self, seed: int, goes_on: Callable[[], bool], meeting: threading.Barrier) -> None:
        """All calls in an order of this thread's own; once all threads are through, any of them while it goes on.

        Two threads that meet a shape for the first time may both compile for it.
        """
        order, numbers = list(self.named), random.Random(seed)
        numbers.shuffle(order)
        for name in order:
            self.call(name)
        meeting.wait()
        self.is_warm = True
        while goes_on():
            self.call(numbers.choice(order))

    def run(self, threads: int, goes_on: Callable[[], bool], look: Callable[[], None] = lambda: None) -> None:
        failed: list[BaseException] = []
        meeting = threading.Barrier(threads)

        def guarded(seed: int) -> None:
            try:
                self.work(seed, lambda: goes_on() and not failed, meeting)
            except BaseException as error:
                failed.append(error)
                meeting.abort()

        running = [threading.Thread(target=guarded, args=(seed,), daemon=True) for seed in range(threads)]
        for thread in running:
            thread.start()
        while alive := [thread for thread in running if thread.is_alive()]:
            look()
            alive[0].join(EVERY)
        if failed:
            raise failed[0]


def growth(sizes: Iterable[float]) -> float:
    """Of the last third beyond the first, by their medians."""
    sizes = list(sizes)
    third = max(len(sizes) // 3, 1)
    first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
    return (last - first) / first if first else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=3, help="default: %(default)s")
    wanted = parser.parse_args()
    soak, start = Soak(calls()), time.monotonic()
    end, warm, sizes = start + 60 * wanted.minutes, [], []
    with Progress() as progress:
        task = progress.add_task("minutes", total=wanted.minutes)

        def look() -> None:
            minutes = (time.monotonic() - start) / 60
            progress.update(task, completed=minutes, description=f"{soak.count} calls, {resident_mb():.0f} MB")
            if soak.is_warm:
                if not warm:
                    warm.append((minutes, caches()))
                sizes.append(resident_mb())

        soak.run(wanted.threads, lambda: time.monotonic() < end, look)
    assert warm, f"{soak.count} calls in {wanted.minutes} minutes are too few for {len(soak.named)} of them to be warm"
    facts = {
        "jax": jax.__version__,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "warm_after_minutes": round(warm[0][0], 1),
        "threads": wanted.threads,
        "shapes": len(soak.named),
        "programs": soak.programs,
        "calls": soak.count,
        "compiled_again": len(soak.compiled_again),
        "differing": len(soak.differing),
        "memory_mb": [round(sizes[0]), round(min(sizes)), round(max(sizes)), round(sizes[-1])],
        "memory_growth": round(growth(sizes), 4),
        "caches_when_warm": warm[0][1],
        "caches": caches(),
    }
    print(json.dumps(facts, indent=1))
    wrong = [*soak.compiled_again, *soak.differing]
    assert not wrong, f"compiled again, or with other bits than before: {sorted(set(map(str, wrong)))[:20]}"
    assert facts["caches"] == facts["caches_when_warm"], "a cache has grown"
    assert facts["memory_growth"] <= MOST_GROWTH, f"memory grew by {facts['memory_growth']:.1%}"
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
