"""Figures of stored results: ratios to a peer, and how the time grows."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.growth import PLACES, curve, slope
from benchmarks.harness import Row

COLOURS = {"jsoftmax": "#0072B2", "optax": "#E69F00"}
SHADES = {"float32": "#0072B2", "bfloat16": "#56B4E9"}


def draw(rows: list[Row], path: Path) -> None:
    """As SVG beside the results at `path`."""
    if any(row.subject == "cross-entropy, value and gradient" for row in rows):
        _save(_ratios(rows), path.with_suffix(".svg"))
    if any(row.subject.startswith("growth") for row in rows):
        _save(_growth(rows), path.with_name(f"{path.stem}-growth.svg"))


def _ratios(rows: list[Row]) -> Figure:
    """Time of ours relative to the peer's, for losses and their gradients."""
    ours = [row for row in rows if row.program == "jsoftmax" and "cross-entropy, value and" in row.subject]
    shapes = list(dict.fromkeys((row.subject.startswith("linear"), row.shape) for row in ours))
    figure = Figure(figsize=(7, 0.5 * len(shapes) + 0.9), layout="constrained")
    axes = figure.subplots()
    for side, (dtype, colour) in enumerate(SHADES.items()):
        for place, (_, shape) in enumerate(shapes):
            ratio = next((row.ratio for row in ours if (row.shape, row.dtype) == (shape, dtype)), None)
            if ratio is not None:
                label = dtype if place == 0 else None
                axes.barh(place + 0.38 * (side - 0.5), ratio, 0.36, color=colour, label=label)
                axes.text(ratio, place + 0.38 * (side - 0.5), f" {ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=COLOURS["optax"], linewidth=1.2)
    axes.set_yticks(range(len(shapes)), [f"linear {shape}" if is_linear else shape for is_linear, shape in shapes])
    axes.invert_yaxis()
    axes.set(xlabel="time of value and gradient (optax = 1)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _growth(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(PLACES), sharey=True), PLACES, strict=True):
        _draw_curve(axes, rows, name)
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("ms")
    return figure


def _draw_curve(axes: Axes, rows: list[Row], name: str) -> None:
    for program, colour in COLOURS.items():
        sizes, times = curve(rows, name, program)
        # Only ours knows blocks.
        if sizes.size and not (name == "block size" and program == "optax"):
            label = f"{program}, slope {slope(sizes, times):.2f}"
            axes.plot(sizes, times, "o-", color=colour, markersize=3, linewidth=1.2, label=label)


def _save(figure: Figure, path: Path) -> None:
    # No date, fixed names of parts and letters as letters: the same figure is the same small file.
    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
