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


def draw_bars(axes: Axes, pairs: dict[str, tuple[float, float]], colours: tuple[str, str], show: str) -> None:
    """Two bars for each label, with their values on top; no frame."""
    for side, shift in enumerate((-0.2, 0.2)):
        values = [pair[side] for pair in pairs.values()]
        places = [place + shift for place in range(len(pairs))]
        axes.bar(places, values, 0.38, color=colours[side])
        for place, value in zip(places, values, strict=True):
            axes.text(place, value, show.format(value), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(pairs)), list(pairs), fontsize=8)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    error, memory, time = figure.subplots(1, 3, width_ratios=[1.2, 0.8, 1])
    optax, ours = STYLES["optax"]["color"], STYLES["jsoftmax"]["color"]

    found = errors()
    draw_errors(error, {name: found[name][0] for name in ("optax", "jsoftmax")})
    error.set(title="Error of the loss (ulp)", xlabel="the label's lead (nats)")
    error.legend(frameon=False, fontsize=9, loc="center right")

    rows = measured()
    dtypes, shapes = ("float32", "bfloat16"), ("2048×32000", "8192×1000", "65536×10")

    def megabytes(dtype, program):
        return rows[LINEAR, "2048×512×32768", dtype, program]["temp_mb"]

    pairs = {dtype: (megabytes(dtype, "unfused optax"), megabytes(dtype, "jsoftmax")) for dtype in dtypes}
    draw_bars(memory, pairs, (optax, ours), "{:.0f}")
    memory.set_title("Memory, linear loss (MB)")

    pairs = {shape: tuple(rows[DENSE, shape, dtype, "jsoftmax"]["ratio"] for dtype in dtypes) for shape in shapes}
    draw_bars(time, pairs, (ours, "#56B4E9"), "{:.1f}")
    time.axhline(1, color=optax, linewidth=1.2)
    time.set_ylim(0, 1.75)
    time.text(2.45, 1.62, "float32", color=ours, ha="right", fontsize=9)
    time.text(2.45, 1.48, "bfloat16", color="#56B4E9", ha="right", fontsize=9)
    time.set_title("Time, loss and gradient (optax = 1)")
    for axes in (error, memory, time):
        axes.title.set_fontsize(10)
    save(figure, HERE / "home.svg")


if __name__ == "__main__":
    main()
