"""The three panels of the home page: error, memory and time, drawn from benchmarks/results.

python docs/figures/home.py
"""

import json
from pathlib import Path

from error_against_gap import STYLES, draw_errors, errors, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "cpu-jax0.10.2.json"
LINEAR = "linear cross-entropy, value and both gradients"
DENSE = "cross-entropy, value and gradient"


def measured() -> dict[tuple[str, str, str, str], dict]:
    """Rows of the benchmarks by subject, shape, dtype and program."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return {(row["subject"], row["shape"], row["dtype"], row["program"]): row for row in rows}


def draw_bars(axes: Axes, labels: list[str], pairs: list[tuple[float, float]], show: str) -> None:
    """The usual way and ours, side by side."""
    for program, shift in (("optax", -0.2), ("jsoftmax", 0.2)):
        values = [pair[program == "jsoftmax"] for pair in pairs]
        places = [place + shift for place in range(len(labels))]
        axes.bar(places, values, 0.38, color=STYLES[program]["color"])
        for place, value in zip(places, values, strict=True):
            axes.text(place, value, show.format(value), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(labels)), labels, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    error, memory, time = figure.subplots(1, 3, width_ratios=[1.25, 0.9, 1.25])

    found = errors()
    draw_errors(error, {name: found[name][0] for name in ("optax", "jsoftmax")})
    error.set(title="Error of the loss (units in the last place)")
    error.legend(frameon=False, fontsize=9, loc="center right")

    rows = measured()
    shape, dtypes = "2048×512×32768", ("float32", "bfloat16")
    pairs = [tuple(rows[LINEAR, shape, d, p]["temp_mb"] for p in ("unfused optax", "jsoftmax")) for d in dtypes]
    draw_bars(memory, list(dtypes), pairs, "{:.0f}")
    memory.set(title="Memory of linear cross-entropy (MB)", yticks=[])
    memory.spines["left"].set_visible(False)
    memory.set_xlabel("2048 rows, 512 features, 32,768 classes", fontsize=9)

    shapes = ["2048×32000", "8192×1000", "65536×10"]
    labels = [f"{shape}\n{dtype}" for dtype in dtypes for shape in shapes]
    pairs = [(1.0, rows[DENSE, shape, dtype, "jsoftmax"]["ratio"]) for dtype in dtypes for shape in shapes]
    draw_bars(time, labels, pairs, "{:.1f}")
    time.set(title="Time of loss and gradient on 2 CPU cores (optax = 1)", yticks=[])
    time.spines["left"].set_visible(False)
    time.tick_params(axis="x", labelsize=7)
    for axes in (error, memory, time):
        axes.title.set_fontsize(10)
    save(figure, HERE / "home.svg")


if __name__ == "__main__":
    main()
