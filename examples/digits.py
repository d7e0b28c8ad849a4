"""Train a small network on handwritten digits with jsoftmax, and draw what softmax does.

    python examples/digits.py --out out/digits.png

The data are the 1,797 digits of 8 by 8 pixels that come with scikit-learn; nothing is downloaded.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jsoftmax

CLASSES = 10
BATCH_SIZE = 32
LEARNING_RATE = 3e-3
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#B0B0B0"


class Digits(NamedTuple):
    images: np.ndarray  # (rows, 8, 8, 1), from 0 to 1
    labels: np.ndarray  # (rows,)


class History(NamedTuple):
    train: list[float]
    held_out: list[float]


class Scores(NamedTuple):
    accuracy: float
    negative_log_likelihood: float
    calibration_error: float


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 64, 128, rngs=rngs)
        self.head = nnx.Linear(128, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        features = nnx.relu(self.first(images))
        features = nnx.max_pool(nnx.relu(self.second(features)), (2, 2), (2, 2))
        features = nnx.relu(self.hidden(features.reshape(features.shape[0], -1)))
        return self.head(features)


def load(seed: int) -> tuple[Digits, Digits]:
    """A quarter of the digits is held out, with the same share of each class."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    parts = train_test_split(images, labels.astype(np.int32), test_size=0.25, stratify=labels, random_state=seed)
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])


def shift(images: jax.Array, key: jax.Array) -> jax.Array:
    """Move each image by up to one pixel each way."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 3)
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), (8, 8, 1)))(padded, corners)


def mean_loss(network: Network, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jsoftmax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()


@nnx.jit
def train_step(network: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array, key: jax.Array):
    gradients = nnx.grad(mean_loss)(network, shift(images, key), labels)
    optimizer.update(network, gradients)


@nnx.jit
def predict(network: Network, images: jax.Array) -> jax.Array:
    return network(images)


def train(data: Digits, held_out: Digits, *, seed: int, epochs: int, on_epoch=lambda: None) -> tuple[Network, History]:
    steps = len(data.labels) // BATCH_SIZE
    network = Network(nnx.Rngs(seed))
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * steps)
    optimizer = nnx.Optimizer(network, optax.adamw(schedule), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(seed), (epochs, steps))
    order = np.random.default_rng(seed)
    history = History([], [])
    for epoch in range(epochs):
        batches = order.permutation(len(data.labels))[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
        for step, rows in enumerate(batches):
            train_step(network, optimizer, data.images[rows], data.labels[rows], keys[epoch, step])
        history.train.append(score(network, data).negative_log_likelihood)
        history.held_out.append(score(network, held_out).negative_log_likelihood)
        on_epoch()
    return network, history


def score(network: Network, data: Digits) -> Scores:
    logits = predict(network, data.images)
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()
    probabilities = np.asarray(jsoftmax.softmax(logits))
    right = probabilities.argmax(axis=-1) == data.labels
    error = expected_calibration_error(probabilities.max(axis=-1), right)
    return Scores(float(right.mean()), float(loss), error)


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """How far confidence and accuracy lie apart, averaged over bins of equal width (Guo et al. 2017)."""
    bin_of_row = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of_row, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def draw(network: Network, history: History, held_out: Digits, path: Path) -> None:
    logits = predict(network, held_out.images)
    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subfigures(2, 2).ravel()
    draw_history(panels[0].subplots(), history)
    draw_sigmoid(panels[1].subplots())
    # The digit that the network is surest of, then those it is least sure of.
    from_unsure = np.argsort(np.asarray(jsoftmax.softmax(logits).max(axis=-1)))
    draw_digits(panels[2], held_out, np.asarray(logits), [from_unsure[-1], *from_unsure[2::-1]])
    temperatures, smoothing = panels[3].subplots(1, 2)
    draw_temperatures(temperatures, logits[from_unsure[0]])
    draw_smoothing(smoothing)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def tidy(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)


def draw_history(axes: Axes, history: History) -> None:
    epochs = np.arange(1, len(history.train) + 1)
    axes.plot(epochs, history.train, "o-", markersize=4, color=BLUE, label="train")
    axes.plot(epochs, history.held_out, "s--", markersize=4, color=ORANGE, label="held out")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    tidy(axes, "Cross-entropy while training", "epoch", "mean loss (nats)")


def draw_sigmoid(axes: Axes) -> None:
    curve, dots = jnp.linspace(-8, 8, 400), jnp.arange(-8.0, 9.0)
    pairs = jnp.stack([dots, jnp.zeros_like(dots)], axis=-1)
    axes.plot(curve, jax.nn.sigmoid(curve), color=BLUE, label="sigmoid(x)")
    axes.plot(dots, jsoftmax.softmax(pairs)[:, 0], "o", color=ORANGE, label="softmax([x, 0]), first entry")
    axes.legend(frameon=False, loc="upper left")
    tidy(axes, "Two classes: softmax is the sigmoid", "x", "probability")


def draw_digits(panel: SubFigure, data: Digits, logits: np.ndarray, rows: list[int]) -> None:
    panel.suptitle("Held-out digits: surest, then three least sure (label in blue)", fontsize=12, x=0.09, ha="left")
    axes = panel.subplots(2, len(rows), height_ratios=[1, 1.2], sharey="row")
    for (image, bars), row in zip(axes.T, rows, strict=True):
        label, probabilities = data.labels[row], np.asarray(jsoftmax.softmax(logits[row]))
        image.imshow(data.images[row, :, :, 0], cmap="gray_r")
        image.set(xticks=[], yticks=[])
        guess = probabilities.argmax()
        image.set_title(f"label {label}" if guess == label else f"label {label}, guess {guess}", fontsize=11)
        colours = [GREY] * CLASSES
        colours[guess], colours[label] = ORANGE, BLUE
        bars.bar(range(CLASSES), probabilities, color=colours)
        bars.set(ylim=(0, 1.02), xticks=range(CLASSES), xlabel="digit")
        bars.tick_params(labelsize=8)
        bars.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylabel("probability")


def draw_temperatures(axes: Axes, logits: jax.Array) -> None:
    for temperature, colour, marker in ((0.2, BLUE, "o"), (1.0, ORANGE, "s"), (5.0, GREEN, "^")):
        probabilities = jsoftmax.softmax(logits, temperature=temperature)
        axes.plot(probabilities, marker=marker, markersize=5, color=colour, linewidth=1, label=f"T = {temperature:g}")
    axes.set(xticks=range(CLASSES), ylim=(-0.03, 1.03))
    axes.legend(frameon=False)
    tidy(axes, "Temperature, least sure digit", "digit", "probability")


def draw_smoothing(axes: Axes) -> None:
    lead = jnp.linspace(-1, 12, 400)
    logits = jnp.zeros((400, CLASSES)).at[:, 0].set(lead)
    minima = []
    for share, colour, style in ((0.0, BLUE, "-"), (0.1, ORANGE, "--"), (0.3, GREEN, "-.")):
        losses = jsoftmax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.zeros(400, jnp.int32), label_smoothing=share
        )
        axes.plot(lead, losses, style, color=colour, label=f"ε = {share:g}")
        # Without smoothing the loss falls for ever.
        if share:
            minima.append((lead[losses.argmin()], losses.min()))
    axes.plot(*zip(*minima, strict=True), "ko", label="minimum")
    axes.set_ylim(-0.15, 4.2)
    axes.legend(frameon=False)
    tidy(axes, "Label smoothing", "lead of the label's logit", "loss (nats)")


def print_scores(console: Console, scores: dict[str, Scores]) -> None:
    table = Table()
    for heading in ("", "accuracy", "negative log-likelihood", "expected calibration error"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (accuracy, loss, error) in scores.items():
        table.add_row(name, f"{accuracy:.2%}", f"{loss:.4f}", f"{error:.4f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on handwritten digits with jsoftmax and draw a figure.")
    parser.add_argument("--seed", type=int, default=0, help="fixes the split, the network and the order (default 0)")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training digits (default 15)")
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"), help="where the figure goes")
    arguments = parser.parse_args()
    console = Console()
    start = time.perf_counter()
    data, held_out = load(arguments.seed)
    with Progress(console=console) as progress:
        task = progress.add_task(f"Training on {len(data.labels)} digits", total=arguments.epochs)
        network, history = train(
            data, held_out, seed=arguments.seed, epochs=arguments.epochs, on_epoch=lambda: progress.advance(task)
        )
    print_scores(console, {"train": score(network, data), "held out": score(network, held_out)})
    draw(network, history, held_out, arguments.out)
    print(f"Done in {time.perf_counter() - start:.0f} s. The figure is in {arguments.out}")


if __name__ == "__main__":
    main()
