"""`python -m benchmarks.large_vocabulary`: what each loss for many classes costs, and what is learned with it.

A small model predicts the next of 32,768 tokens of Python's standard library from the two before it. It is trained
from the same start with each loss, all of them taking turns step by step, and judged by the exact negative
log-likelihood of held-out text. The numbers go to benchmarks/results, the figure to docs.
"""

import argparse
import dataclasses
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax
from benchmarks.harness import RESULTS

ROOT = Path(__file__).parent.parent
VOCABULARY, WIDTH, CONTEXT, ROWS = 32768, 64, 2, 512
HELD_OUT, RATE = 4096, 1e-2
TIMED = 12  # steps of the full loss, which only needs timing: it is the linear one, computed at once


@dataclasses.dataclass(frozen=True)
class Method:
    """A last layer: its parameters, the loss to train with, the exact loss, and the operations of products a row."""

    init: Callable[[], Any]
    train: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
    exact: Callable[[Any, jax.Array, jax.Array], jax.Array]
    operations: float


def linear(head: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    return jsoftmax.linear_softmax_cross_entropy(features, head, labels, kernel_transposed=True)


def full(head: jax.Array, features: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    del key
    return jsoftmax.softmax_cross_entropy_with_integer_labels(features @ head.T, labels).mean()


def sampled(count: int) -> Method:
    sampler = jsoftmax.log_uniform_sampler(VOCABULARY)

    def train(head, features, labels, key):
        losses = jsoftmax.sampled_softmax_cross_entropy(
            features, head, labels, key, num_sampled=count, sampler=sampler, kernel_transposed=True
        )
        return losses.mean()

    return Method(kernel, train, linear, 6 * WIDTH * (count + 1))


def kernel(count: int = VOCABULARY) -> jax.Array:
    return jnp.zeros((count, WIDTH))


def methods(counts: np.ndarray) -> dict[str, Method]:
    adaptive = jsoftmax.AdaptiveSoftmax(WIDTH, VOCABULARY, (512, 4096))
    share = counts / counts.sum()
    of_tails = sum(share[start:end].sum() * width * (WIDTH + end - start) for start, end, width in adaptive.clusters)
    tree = jsoftmax.huffman_tree(counts)

    def adaptive_loss(params, features, labels):
        return adaptive.cross_entropy(params, features, labels).mean()

    def path_loss(head, features, labels):
        losses = jsoftmax.hierarchical_softmax_cross_entropy(features, head, labels, tree, kernel_transposed=True)
        return losses.mean()

    def without_key(loss: Callable) -> Callable:
        return lambda params, features, labels, key: loss(params, features, labels)

    return {
        "full": Method(kernel, full, linear, 6 * WIDTH * VOCABULARY),
        "linear": Method(kernel, without_key(linear), linear, 6 * WIDTH * VOCABULARY),
        "sampled, 1024": sampled(1024),
        "sampled, 128": sampled(128),
        "adaptive": Method(
            lambda: adaptive.init(jax.random.key(1)),
            without_key(adaptive_loss),
            adaptive_loss,
            6 * (WIDTH * (adaptive.cutoffs[0] + 2) + of_tails),
        ),
        "hierarchical": Method(
            lambda: kernel(tree.decisions), without_key(path_loss), path_loss, 6 * WIDTH * tree.depth
        ),
    }


class Run:
    """One model in training, and what its steps took."""

    def __init__(self, method: Method, steps: int):
        embedding = jax.random.normal(jax.random.key(0), (CONTEXT, VOCABULARY, WIDTH)) * WIDTH**-0.5
        self.method, self.seconds, self.curve = method, [], []
        self.params = {"embedding": embedding, "head": method.init()}
        optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
        self.state = optimizer.init(self.params)

        def features(params, tokens):
            return jnp.tanh(sum(params["embedding"][place][tokens[:, place]] for place in range(CONTEXT)))

        def update(params, state, tokens, labels, key):
            def loss(params):
                return method.train(params["head"], features(params, tokens), labels, key)

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        def judge(params, tokens, labels):
            return method.exact(params["head"], features(params, tokens), labels)

        example = (np.zeros((ROWS, CONTEXT), np.int32), np.zeros(ROWS, np.int32), jax.random.key(0))
        self.step_program = jax.jit(update, donate_argnums=(0, 1)).lower(self.params, self.state, *example).compile()
        self.judge = jax.jit(judge)
        head = jax.jit(jax.value_and_grad(method.train, (0, 1)))
        rows = (jnp.zeros((ROWS, WIDTH)), example[1], example[2])
        self.temp_mb = head.lower(self.params["head"], *rows).compile().memory_analysis().temp_size_in_bytes / 1e6

    def step(self, tokens: np.ndarray, labels: np.ndarray, key: jax.Array) -> None:
        start = time.perf_counter()
        self.params, self.state = self.step_program(self.params, self.state, tokens, labels, key)
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - start)

    def held_out(self, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        parts = zip(np.split(tokens, 4), np.split(labels, 4), strict=True)
        return np.mean([self.judge(self.params, *part) for part in parts], axis=0)


def load() -> Any:
    """The corpus of the example, run by its path: examples are no package."""
    return runpy.run_path(str(ROOT / "examples" / "language_model.py"))["load"](VOCABULARY)


def examples(tokens: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tokens[at[:, None] + np.arange(CONTEXT)], tokens[at + CONTEXT]


def held_out_examples(corpus: Any) -> tuple[np.ndarray, np.ndarray]:
    return examples(corpus.held_out, np.linspace(0, len(corpus.held_out) - CONTEXT - 1, HELD_OUT, dtype=int))


def trained(
    methods: dict[str, Method], corpus: Any, steps: int, progress: Callable[[str], None], only_timed: str = ""
) -> dict[str, Run]:
    """All methods from one start, in turns step by step; one may end when it has been timed."""
    runs = {}
    for name, method in methods.items():
        progress(f"compiling {name}")
        runs[name] = Run(method, steps)
    random = np.random.default_rng(0)
    for step in range(steps):
        batch = examples(corpus.train, random.integers(0, len(corpus.train) - CONTEXT - 1, ROWS))
        for name, one in runs.items():
            if name != only_timed or step < TIMED:
                one.step(*batch, jax.random.key(step))
        progress(f"step {step + 1} of {steps}")
    progress("")
    return runs


def run(steps: int, progress: Callable[[str], None]) -> dict:
    corpus = load()
    counts, held_out = np.bincount(corpus.train, minlength=VOCABULARY), held_out_examples(corpus)
    runs = trained(methods(counts), corpus, steps, progress, only_timed="full")
    learned = {name: round(float(one.held_out(*held_out)), 3) for name, one in runs.items() if name != "full"}
    rows = [
        {
            "loss": name,
            "operations_per_row": round(one.method.operations),
            "temp_mb": round(one.temp_mb, 2),
            "step_ms": round(median(one.seconds[2:]) * 1e3, 2),
            "held_out_nats": learned["linear" if name == "full" else name],
        }
        for name, one in runs.items()
    ]
    unigram = -np.log((counts[held_out[1]] + 1) / (counts.sum() + VOCABULARY)).mean()
    facts = {"jax": jax.__version__, "processors": os.cpu_count(), "steps": steps, "rows_a_step": ROWS}
    return {**facts, "vocabulary": VOCABULARY, "width": WIDTH, "unigram_nats": round(float(unigram), 3), "rows": rows}


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for panel, field, label in (
        (axes[0], "operations_per_row", "operations of a row, loss and gradients"),
        (axes[1], "step_ms", "median time of a step (ms)"),
    ):
        for row in results["rows"]:
            panel.plot(row[field], row["held_out_nats"], "o")
            below = row["loss"] in ("full", "sampled, 128", "hierarchical")
            offset = (-6, -12) if below else (6, 4)
            panel.annotate(
                row["loss"], (row[field], row["held_out_nats"]), offset, textcoords="offset points", fontsize=8
            )
        panel.axhline(results["unigram_nats"], color="grey", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", xlabel=label)
        panel.margins(x=0.3, y=0.15)
    axes[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_major_formatter("{x:.0f}")
    axes[1].xaxis.set_minor_formatter("")
    axes[0].set_ylabel("held-out loss (nats a token)")
    axes[0].annotate(
        "frequencies alone",
        (0.02, results["unigram_nats"]),
        (0, -10),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        color="grey",
    )
    figure.savefig(path, dpi=100)


def show_progress(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_vocabulary", description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()

    results = run(arguments.steps, show_progress)
    for row in results["rows"]:
        print(f"{row['loss']:<16}", *(f"{name} {value:<12}" for name, value in list(row.items())[1:]))
    print("unigram", results["unigram_nats"])
    if not arguments.no_save:
        (RESULTS / "large-vocabulary.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results, ROOT / "docs" / "large_vocabularies.png")


if __name__ == "__main__":
    main()
