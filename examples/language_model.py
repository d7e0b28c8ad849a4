"""Train a small language model on Python's standard library, with and without the logits in memory.

    python examples/language_model.py

One model is trained twice from the same start. One run gives all logits to optax's cross-entropy, the other calls
`jsoftmax.linear_softmax_cross_entropy`, which makes them a block of rows at a time. The runs take turns step by step:
whatever else goes on weighs on both. The text is the source of Python's own modules: nothing is downloaded.

A token that is not in the vocabulary teaches nothing: its row is ignored, and the linear loss does not even multiply
it. Accuracy and logsumexp are logged beside the loss; the linear one has them from the same products.
"""

import argparse
import functools
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Column, Table

import jsoftmax

# A word or a sign with the space before it, a line break with the indentation after it, any other white space.
TOKEN = re.compile(r" ?\w+| ?[^\w\s]|\n *|\s")
# Tests come and go with the way Python was packaged, and encodings are tables of characters.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
HELD_OUT_EVERY = 20
UNKNOWN = 0  # the class of <unk>, the first of the vocabulary


class Settings(NamedTuple):
    vocabulary: int = 16384
    width: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 128
    batch_size: int = 16
    block_size: int = 256
    steps: int = 60
    learning_rate: float = 1e-2
    seed: int = 0


class Corpus(NamedTuple):
    tokens: list[str]  # the vocabulary, <unk> first
    train: np.ndarray
    held_out: np.ndarray


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm, self.mlp_norm = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.project_in, self.project_out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.expand, self.contract = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        parts = self.project_in(self.attention_norm(x)).reshape(*x.shape[:-1], 3, self.heads, -1)
        query, key, value = jnp.moveaxis(parts, -3, 0)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project_out(attended.reshape(x.shape))
        return x + self.contract(nnx.gelu(self.expand(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """From tokens to features; the head is a kernel that the loss is given."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs):
        width = settings.width
        self.embedding = nnx.Embed(settings.vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(settings.context, width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(width, settings.heads, rngs) for _ in range(settings.layers)))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, settings.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = self.positions(jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape))
        return self.norm(self.blocks(self.embedding(tokens) + positions))


class Logged(NamedTuple):
    accuracy: jax.Array
    logsumexp: jax.Array


def logged(argmax: jax.Array, logsumexp: jax.Array, labels: jax.Array) -> Logged:
    """Means over the rows that count."""
    known = labels != UNKNOWN
    return Logged(*(jnp.mean(number, where=known) for number in (argmax == labels, logsumexp)))


def linear_loss(features: jax.Array, kernel: jax.Array, labels: jax.Array, block_size: int) -> tuple[jax.Array, Logged]:
    loss, statistics = jsoftmax.linear_softmax_cross_entropy(
        features,
        kernel,
        labels,
        block_size=block_size,
        ignore_index=UNKNOWN,
        skip_rows=True,
        return_statistics=True,
    )
    return loss, logged(statistics.argmax, statistics.logsumexp, labels)


def unfused_loss(
    features: jax.Array, kernel: jax.Array, labels: jax.Array, block_size: int
) -> tuple[jax.Array, Logged]:
    del block_size  # all logits exist at once
    logits = features @ kernel
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    beside = logged(jnp.argmax(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1), labels)
    return jnp.mean(losses, where=labels != UNKNOWN), beside


LOSSES = {"linear": linear_loss, "unfused": unfused_loss}


def load(vocabulary: int, files: int | None = None) -> Corpus:
    """Every 20th file is held out; the vocabulary is what the others use most. `files` is how many to read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not LEFT_OUT.intersection(name.split("/"))]
    train, held_out = [], []
    for number, name in enumerate(names[:files]):
        part = train if number % HELD_OUT_EVERY else held_out
        part += TOKEN.findall((root / name).read_text(encoding="utf-8", errors="replace"))
    tokens = ["<unk>", *(token for token, _ in Counter(train).most_common(vocabulary - 1))]
    if len(tokens) < vocabulary:
        raise ValueError(f"vocabulary is {vocabulary}, but the text has only {len(tokens) - 1} different tokens")
    numbers = {token: number for number, token in enumerate(tokens)}
    streams = (np.array([numbers.get(token, UNKNOWN) for token in part], np.int32) for part in (train, held_out))
    return Corpus(tokens, *streams)


def windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """What the model sees, and what comes next at each place."""
    rows = tokens[starts[:, None] + np.arange(context + 1)]
    return rows[:, :-1], rows[:, 1:]


class Run:
    """One training run: its state, its compiled step and what was measured on the way."""

    def __init__(self, settings: Settings, loss: Callable, corpus: Corpus):
        self.graph, self.parameters = nnx.split(LanguageModel(settings, nnx.Rngs(settings.seed)))
        warmup, rate = settings.steps // 10 + 1, settings.learning_rate
        self.optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, warmup, settings.steps + 1))
        self.optimizer_state = self.optimizer.init(self.parameters)
        self.loss = functools.partial(loss, block_size=settings.block_size)
        self.losses, self.logged, self.seconds, self.peak = [], [], [], None
        starts = np.linspace(0, len(corpus.held_out) - settings.context - 1, 64, dtype=int)
        self.held_out = windows(corpus.held_out, starts, settings.context)
        self.before = self.held_out_loss()
        batch = jax.ShapeDtypeStruct((settings.batch_size, settings.context), jnp.int32)
        step = jax.jit(self.update, donate_argnums=(0, 1))
        self.compiled = step.lower(self.parameters, self.optimizer_state, batch, batch).compile()
        self.temporaries = self.compiled.memory_analysis().temp_size_in_bytes

    def update(self, parameters, optimizer_state, tokens, labels):
        def mean_loss(parameters):
            model = nnx.merge(self.graph, parameters)
            return self.loss(model(tokens), model.head.kernel[...], labels)

        (loss, beside), gradients = jax.value_and_grad(mean_loss, has_aux=True)(parameters)
        updates, optimizer_state = self.optimizer.update(gradients, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), optimizer_state, loss, beside

    def step(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        resident, start = reset_peak(), time.perf_counter()
        out = jax.block_until_ready(self.compiled(self.parameters, self.optimizer_state, tokens, labels))
        self.seconds.append(time.perf_counter() - start)
        if resident is not None:
            self.peak = max(self.peak or 0, process_memory("VmHWM") - resident)
        self.parameters, self.optimizer_state, loss, beside = out
        self.losses.append(float(loss))
        self.logged.append(Logged(*map(float, beside)))

    def held_out_loss(self) -> float:
        """By optax for both runs, so that neither is its own judge."""
        batches = zip(*(np.split(part, 8) for part in self.held_out), strict=True)
        return float(np.mean([judge(self.graph, self.parameters, *batch) for batch in batches]))


@functools.partial(jax.jit, static_argnums=0)
def judge(graph, parameters, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    model = nnx.merge(graph, parameters)
    losses = optax.softmax_cross_entropy_with_integer_labels(model.head(model(tokens)), labels)
    return jnp.mean(losses, where=labels != UNKNOWN)


def process_memory(field: str) -> int:
    """VmRSS: the bytes that this process holds; VmHWM: the most it has held."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> int | None:
    """The memory held now, from where the peak is counted afresh; None where that can't be had."""
    if jax.default_backend() != "cpu":
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return process_memory("VmRSS")
    except OSError:
        return None


def train(names: list[str], settings: Settings, corpus: Corpus, on_step: Callable = lambda: None) -> dict[str, Run]:
    runs = {name: Run(settings, LOSSES[name], corpus) for name in names}
    draws = np.random.default_rng(settings.seed)
    for step in range(settings.steps):
        starts = draws.integers(0, len(corpus.train) - settings.context, settings.batch_size)
        batch = windows(corpus.train, starts, settings.context)
        for name in names if step % 2 else names[::-1]:
            runs[name].step(*batch)
        on_step()
    return runs


def write(run: Run, corpus: Corpus, settings: Settings, temperature: float, count: int) -> str:
    """What the model makes of `def`, one sampled token after the other."""

    @jax.jit
    def draw(parameters, tokens, last, key):
        model = nnx.merge(run.graph, parameters)
        logits = model.head(model(tokens[None])[0, last]) / temperature
        return jax.random.categorical(key, logits.at[UNKNOWN].set(-jnp.inf))

    written = [corpus.tokens.index("\n"), corpus.tokens.index("def")]
    for key in jax.random.split(jax.random.key(settings.seed), count):
        seen = np.array(written[-settings.context :], np.int32)
        tokens = np.pad(seen, (0, settings.context - len(seen)))
        written.append(int(draw(run.parameters, tokens, len(seen) - 1, key)))
    return "".join(corpus.tokens[token] for token in written).strip()


def print_runs(console: Console, runs: dict[str, Run]) -> None:
    caption = None
    if len(runs) == 2:
        ours, peer = (np.array(run.losses) for run in runs.values())
        caption = f"Largest relative difference between the losses of a step: {np.max(np.abs(ours / peer - 1)):.1e}"
    table = Table("", *(Column(name, justify="right") for name in runs), caption=caption)
    rows = {
        "loss of the last step": lambda run: f"{run.losses[-1]:.6f}",
        "accuracy of the last step": lambda run: f"{run.logged[-1].accuracy:.4f}",
        "mean logsumexp of the last step": lambda run: f"{run.logged[-1].logsumexp:.4f}",
        "held-out loss before": lambda run: f"{run.before:.4f}",
        "held-out loss after": lambda run: f"{run.held_out_loss():.4f}",
        "temporaries of the compiled step (MiB)": lambda run: f"{run.temporaries / 2**20:.0f}",
        "measured peak above what was held (MiB)": lambda run: "—" if run.peak is None else f"{run.peak / 2**20:.0f}",
        "median time of a step (ms)": lambda run: f"{median(run.seconds[1:] or run.seconds) * 1e3:.0f}",
    }
    for name, show in rows.items():
        table.add_row(name, *(show(run) for run in runs.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=[*LOSSES, "both"], default="both", help="which run to make (default both)")
    for name, default in Settings._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    arguments = vars(parser.parse_args())
    loss, console, start = arguments.pop("loss"), Console(), time.perf_counter()
    names, settings = list(LOSSES) if loss == "both" else [loss], Settings(**arguments)
    corpus = load(settings.vocabulary)
    console.print(f"{len(corpus.train):,} tokens to learn from, {len(corpus.held_out):,} held out")
    with Progress(console=console) as progress:
        task = progress.add_task(f"Training: {' and '.join(names)}", total=settings.steps)
        runs = train(names, settings, corpus, lambda: progress.advance(task))
    print_runs(console, runs)
    text = write(runs[names[0]], corpus, settings, temperature=0.7, count=60)
    console.print(Panel(escape(text), title="What the model writes", expand=False))
    console.print(f"Done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
