"""Error of loss and gradient against the label's gap, float32: jsoftmax beside optax, jax.nn and PyTorch.

    python docs/figures/error_against_gap.py            # draws error_against_gap.svg
    python docs/figures/error_against_gap.py --torch    # renews error_against_gap_torch.csv; needs torch

Truth is mpmath with 50 digits at the logits as they are stored. PyTorch's values are kept in a file, since it is no
dependency; the first line of that file says which release they are from.
"""

import argparse
import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import mpmath
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jsoftmax

HERE = Path(__file__).parent
STORED = HERE / "error_against_gap_torch.csv"
GAPS = np.arange(0, 60.5, 0.5)
ROWS_PER_GAP, CLASSES = 4, 8
EXACT = mpmath.MPContext()
EXACT.dps = 50
# Okabe and Ito's colours, which colour-blind readers can tell apart.
STYLES = {
    "PyTorch": {"color": "#BBBBBB", "linewidth": 6},
    "jax.nn": {"color": "#E69F00", "linewidth": 3},
    "optax": {"color": "#D55E00", "linewidth": 1.2},
    "jsoftmax": {"color": "#0072B2", "linewidth": 1.6},
}


def logits() -> np.ndarray:
    """Rows whose label, class 0, lies about each gap above logsumexp of the others: (gaps · rows, classes), float32."""
    others = np.random.default_rng(0).normal(size=(len(GAPS), ROWS_PER_GAP, CLASSES - 1)) * 2
    label = np.log(np.exp(others).sum(axis=-1, keepdims=True)) + GAPS[:, None, None]
    # Coarse, so that libraries that differ in the last place of a logarithm agree on the row.
    label = np.round(label * 64) / 64 + 0.1
    return np.concatenate([label, others], axis=-1).astype(np.float32).reshape(-1, CLASSES)


def truth(rows: np.ndarray) -> tuple[list, list]:
    """Loss, and gradient at the label, of each row: log1p(s) and −s / (1 + s), s the others' share relative to it."""
    sums = [EXACT.fsum(EXACT.exp(EXACT.mpf(float(z)) - EXACT.mpf(float(row[0]))) for z in row[1:]) for row in rows]
    return [EXACT.log1p(s) for s in sums], [-s / (1 + s) for s in sums]


def by_jax(name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a library in JAX returns for loss and gradient at the label."""
    labels = jnp.zeros(len(rows), jnp.int32)
    losses = {
        "jsoftmax": lambda z: jsoftmax.softmax_cross_entropy_with_integer_labels(z, labels),
        "optax": lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels),
        "jax.nn": lambda z: -jax.nn.log_softmax(z)[:, 0],
    }
    loss = losses[name]
    return np.asarray(jax.jit(loss)(rows)), np.asarray(jax.jit(jax.grad(lambda z: loss(z).sum()))(rows)[:, 0])


def by_torch() -> tuple[np.ndarray, np.ndarray]:
    """What PyTorch returned, from the file."""
    with STORED.open(newline="", encoding="utf-8") as file:
        next(file)
        values = np.array([[float(value) for value in line] for line in csv.reader(file)], np.float32)
    return values[:, 0], values[:, 1]


def store_torch() -> None:
    import torch

    rows = torch.tensor(logits(), requires_grad=True)
    losses = torch.nn.functional.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long), reduction="none")
    losses.sum().backward()
    pairs = zip(losses.tolist(), rows.grad[:, 0].tolist(), strict=True)
    lines = [f"{loss:.9g},{gradient:.9g}" for loss, gradient in pairs]
    head = f"# torch {torch.__version__}, CPU: F.cross_entropy of each row of logits(), and its gradient at the label"
    STORED.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


def ulps(got: np.ndarray, expected: list) -> np.ndarray:
    """The worst error at each gap, in units of float32's last place at the true value."""
    one = [float(np.spacing(np.float32(abs(value)))) for value in expected]
    errors = [abs(float(value) - exact) / unit for value, exact, unit in zip(got, expected, one, strict=True)]
    return np.array(errors, np.float64).reshape(len(GAPS), ROWS_PER_GAP).max(axis=1)


def errors() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By library, the worst errors of loss and gradient at each gap."""
    rows = logits()
    exact = truth(rows)
    values = {name: by_torch() if name == "PyTorch" else by_jax(name, rows) for name in STYLES}
    return {name: (ulps(pair[0], exact[0]), ulps(pair[1], exact[1])) for name, pair in values.items()}


def draw_errors(axes: Axes, found: dict[str, np.ndarray]) -> None:
    """One panel: a series for each library, and where a result has no right digit left."""
    for name, worst in found.items():
        axes.semilogy(GAPS, np.maximum(worst, 0.1), label=name, **STYLES[name])
    axes.axhspan(2**23, 2**24, color="#F3D9CB", linewidth=0, zorder=0)
    axes.text(GAPS[-1], 2.0**22.6, "100 % wrong", ha="right", va="top", fontsize=9, color="#8A3D00")
    axes.set(xlabel="gap: the label's lead over the others (nats)", ylim=(0.08, 1e8), xlim=(GAPS[0] - 1, GAPS[-1] + 1))
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """The same bytes for the same figure."""
    with matplotlib.rc_context({"svg.hashsalt": "jsoftmax"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", action="store_true", help="renew PyTorch's values")
    if parser.parse_args().torch:
        store_torch()
    found = errors()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    promises = ((6, 40), (8, 40))
    for result, (axes, title) in enumerate(zip(panels, ("loss", "gradient at the label"), strict=True)):
        draw_errors(axes, {name: pair[result] for name, pair in found.items()})
        axes.step([0, 10, 60], [promises[result][0], *promises[result]], color="black", linewidth=1, linestyle=":")
        axes.set_title(title, fontsize=11)
    panels[0].text(60, 55, "what jsoftmax promises", ha="right", fontsize=9)
    panels[0].set_ylabel("worst error of 4 rows (ulp)")
    panels[1].legend(frameon=False, fontsize=9, loc="center right")
    save(figure, HERE / "error_against_gap.svg")


if __name__ == "__main__":
    main()
