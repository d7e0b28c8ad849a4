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
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jsoftmax
from jsoftmax import plots

CLASSES = 10
BATCH_SIZE = 32
LEARNING_RATE = 3e-3


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
    right = np.asarray(logits).argmax(axis=-1) == data.labels
    error = jsoftmax.expected_calibration_error(logits, data.labels)
    return Scores(float(right.mean()), float(loss), float(error))


def draw(network: Network, history: History, held_out: Digits, path: Path) -> None:
    logits = predict(network, held_out.images)
    figure = Figure(figsize=(13, 9), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subfigures(2, 2).ravel()
    axes = plots.loss_curves({"train": history.train, "held out": history.held_out}, axes=panels[0].subplots())
    axes.set_title("Cross-entropy while training", fontsize=12, loc="left")
    plots.softmax_against_sigmoid(axes=panels[1].subplots())
    # The digit that the network is surest of, then those it is least sure of.
    from_unsure = np.argsort(np.asarray(jsoftmax.softmax(logits).max(axis=-1)))
    draw_digits(panels[2], held_out, np.asarray(logits), [from_unsure[-1], *from_unsure[2::-1]])
    temperatures, smoothing = panels[3].subplots(1, 2)
    plots.temperature_sweep(logits[from_unsure[0]], axes=temperatures)
    temperatures.set_title("Temperature, least sure digit", fontsize=12, loc="left")
    temperatures.set_xlabel("digit")
    draw_smoothing(smoothing)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_digits(panel: SubFigure, data: Digits, logits: np.ndarray, rows: list[int]) -> None:
    panel.suptitle("Held-out digits: surest, then three least sure (label in blue)", fontsize=12, x=0.09, ha="left")
    axes = panel.subplots(2, len(rows), height_ratios=[1, 1.2], sharey="row")
    for (image, bars), row in zip(axes.T, rows, strict=True):
        label, guess = int(data.labels[row]), logits[row].argmax()
        image.imshow(data.images[row, :, :, 0], cmap="gray_r")
        image.set(xticks=[], yticks=[])
        image.set_title(f"label {label}" if guess == label else f"label {label}, guess {guess}", fontsize=11)
        plots.probability_bars(logits[row], label, axes=bars)
        bars.set_title("", loc="left")
        bars.set(xlabel="digit", ylabel="")
        bars.tick_params(labelsize=8)
    axes[1, 0].set_ylabel("probability")


def draw_smoothing(axes: Axes) -> None:
    lead = jnp.linspace(-1, 12, 400)
    logits = jnp.zeros((400, CLASSES)).at[:, 0].set(lead)
    minima = []
    for share, (colour, _, style) in zip((0.0, 0.1, 0.3), plots.SERIES, strict=False):
        losses = jsoftmax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.zeros(400, jnp.int32), label_smoothing=share
        )
        axes.plot(lead, losses, linestyle=style, color=colour, label=f"ε = {share:g}")
        # Without smoothing the loss falls for ever.
        if share:
            minima.append((lead[losses.argmin()], losses.min()))
    axes.plot(*zip(*minima, strict=True), "ko", label="minimum")
    axes.set(ylim=(-0.15, 4.2), xlabel="lead of the label's logit", ylabel="loss (nats)")
    axes.set_title("Label smoothing", fontsize=12, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


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
