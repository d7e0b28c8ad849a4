"""Figures of softmax, its gradient and its calibration. They need matplotlib: `pip install 'jsoftmax[plots]'`.

Each function draws on `axes`, or on a new figure if there is none, and returns the axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import jsoftmax

# Okabe and Ito's colours, which colour-blind readers can tell apart; each series has a shape of its own, too.
BLUE, ORANGE, GREEN, PINK, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#9A9A9A"
SERIES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", ":"), (SKY, "v", (0, (5, 1, 1, 1))))

Axes = Any  # matplotlib's, or None; the package may not be installed


def softmax_against_sigmoid(*, axes: Axes = None) -> Axes:
    r"""The sigmoid of x, and on it the softmax of :math:`(x, 0)`: for two classes they are one function.

    Args:
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = _given_or_new(axes)
    curve, dots = np.linspace(-8, 8, 401, dtype=np.float32), np.arange(-8, 9, dtype=np.float32)
    pairs = np.stack([dots, np.zeros_like(dots)], axis=-1)
    axes.plot(curve, jax.nn.sigmoid(curve), color=BLUE, label="sigmoid(x)")
    axes.plot(
        dots, jsoftmax.softmax(pairs)[:, 0], "o", markersize=5, color=ORANGE, label="softmax([x, 0]), first entry"
    )
    axes.legend(frameon=False, loc="upper left")
    return _tidy(axes, "Two classes: softmax is the sigmoid", "x", "probability")


def probability_bars(
    logits: ArrayLike,
    label: int | None = None,
    *,
    names: Sequence[str] | None = None,
    temperature: float = 1.0,
    axes: Axes = None,
) -> Axes:
    """The probabilities of one row of logits as bars: the label's in blue, the guess in orange if it is another.

    Args:
        logits: float array `(classes,)`.
        label: the right class, if known.
        names: of the classes; their numbers if left out.
        temperature: divides the logits.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: logits that are not one row, or another number of names.
    """
    z = _one_row(logits)
    axes = _given_or_new(axes)
    probabilities = np.asarray(jsoftmax.softmax(z, temperature=temperature), np.float32)
    colours = [GREY] * len(probabilities)
    colours[int(np.argmax(probabilities))] = ORANGE
    if label is not None:
        colours[label] = BLUE
    axes.bar(range(len(probabilities)), probabilities, color=colours)
    axes.set_ylim(0, 1.02)
    _name_classes(axes, len(probabilities), names)
    return _tidy(axes, "Probabilities", "class", "probability")


def gradient_bars(logits: ArrayLike, label: int, *, names: Sequence[str] | None = None, axes: Axes = None) -> Axes:
    """ŷ − y as bars: what cross-entropy tells the logits of one row. The label's is negative, and they add up to 0.

    Args:
        logits: float array `(classes,)`.
        label: the right class.
        names: of the classes; their numbers if left out.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: logits that are not one row, or another number of names.
    """
    z = _one_row(logits)
    axes = _given_or_new(axes)
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels
    gradient = np.asarray(jax.grad(loss)(z, jnp.asarray(label)), np.float32)
    colours = [ORANGE] * len(gradient)
    colours[label] = BLUE
    axes.bar(range(len(gradient)), gradient, color=colours)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    _name_classes(axes, len(gradient), names)
    return _tidy(axes, f"Gradient of the loss, label {_name(label, names)}", "class", "ŷ − y")


def temperature_sweep(
    logits: ArrayLike,
    temperatures: Sequence[float] = (0.2, 1.0, 5.0),
    *,
    names: Sequence[str] | None = None,
    axes: Axes = None,
) -> Axes:
    """The probabilities of one row of logits at some temperatures, a line for each: the higher, the flatter.

    Args:
        logits: float array `(classes,)`.
        temperatures: up to five numbers, 0 included.
        names: of the classes; their numbers if left out.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: logits that are not one row, more than five temperatures, or another number of names.
    """
    z = _one_row(logits)
    series = _series("temperatures", temperatures)
    axes = _given_or_new(axes)
    for temperature, (colour, marker, _) in zip(temperatures, series, strict=True):
        probabilities = np.asarray(jsoftmax.softmax(z, temperature=temperature), np.float32)
        axes.plot(probabilities, marker=marker, markersize=5, linewidth=1, color=colour, label=f"T = {temperature:g}")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False)
    _name_classes(axes, z.shape[0], names)
    return _tidy(axes, "Temperature", "class", "probability")


def activation_comparison(*, axes: Axes = None) -> Axes:
    """Sigmoid, softmax, tanh, ReLU and GELU over the same x. Softmax is that of x beside two zeros.

    Args:
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = _given_or_new(axes)
    x = np.linspace(-4, 4, 401, dtype=np.float32)
    beside_zeros = np.stack([x, np.zeros_like(x), np.zeros_like(x)], axis=-1)
    curves = {
        "sigmoid(x)": jax.nn.sigmoid(x),
        "softmax([x, 0, 0]), first entry": jsoftmax.softmax(beside_zeros)[:, 0],
        "tanh(x)": np.tanh(x),
        "ReLU(x)": np.maximum(x, 0),
        "GELU(x)": jax.nn.gelu(x, approximate=False),
    }
    for (name, curve), (colour, _, style) in zip(curves.items(), SERIES, strict=True):
        axes.plot(x, curve, color=colour, linestyle=style, linewidth=1.8, label=name)
    axes.set_ylim(-1.2, 3.2)
    axes.legend(frameon=False, loc="upper left")
    return _tidy(axes, "Activations", "x", "value")


def reliability_diagram(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    bins: int = 15,
    equal_mass: bool = False,
    name: str = "",
    axes: Axes = None,
    **options: Any,
) -> Axes:
    """Accuracy over confidence, a dot for each bin, its area the share of the rows; on the diagonal they agree.

    A dot below the diagonal is a bin that is surer than right. Draw a second set on the same axes to compare.

    Args:
        logits: float array `(*batch, classes)`. Of probabilities, take the logarithm.
        labels: integers `(*batch,)`.
        bins: their number.
        equal_mass: whether bins hold equal numbers of rows instead of being equally wide.
        name: of the set, for the legend, which states the calibration error over these bins.
        axes: where to draw; None for a new figure.
        **options: see `reliability_bins`: `axis`, `where`, `weights`, `ignore_index`.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as `reliability_bins`, and for more than five sets on the same axes.
    """
    found = jsoftmax.reliability_bins(logits, labels, bins=bins, equal_mass=equal_mass, **options)
    share, confidence, accuracy, difference = (np.asarray(number) for number in found)
    axes = _given_or_new(axes, (4.6, 4.6))
    drawn = len(axes.collections)
    colour, marker, style = _series("reliability diagrams on the same axes", range(drawn + 1))[drawn]
    if not drawn:
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, zorder=0)
    filled = share > 0
    error = float(np.sum(share * np.abs(difference)))
    text = f"{name}: error {error:.3f}" if name else f"calibration error {error:.3f}"
    confidence, accuracy = confidence[filled], accuracy[filled]
    axes.plot(confidence, accuracy, color=colour, linestyle=style, linewidth=1)
    areas = 25 + 400 * share[filled]
    axes.scatter(confidence, accuracy, s=areas, color=colour, marker=marker, alpha=0.75, linewidths=0, label=text)
    axes.set(xlim=(-0.02, 1.04), ylim=(-0.02, 1.04), aspect="equal")
    legend = axes.legend(frameon=False, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_sizes([40])
    return _tidy(axes, "Reliability", "confidence", "accuracy")


def loss_curves(curves: Mapping[str, Sequence[float]], *, axes: Axes = None) -> Axes:
    """Losses over epochs, a line for each name, on a logarithmic scale.

    Args:
        curves: losses after each epoch, all above 0, by name; up to five.
        axes: where to draw; None for a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: more than five curves.
    """
    series = _series("curves", curves)
    axes = _given_or_new(axes)
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    for (name, losses), (colour, marker, style) in zip(curves.items(), series, strict=True):
        epochs = np.arange(1, len(losses) + 1)
        axes.plot(epochs, losses, color=colour, linestyle=style, marker=marker, markersize=4, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _tidy(axes, "Loss while training", "epoch", "mean loss (nats)")


def _given_or_new(axes: Axes, size: tuple[float, float] = (5.4, 3.4)) -> Axes:
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("jsoftmax.plots needs matplotlib to draw: pip install 'jsoftmax[plots]'") from None
    return plt.subplots(figsize=size, layout="constrained")[1]


def _tidy(axes: Axes, title: str, x_label: str, y_label: str) -> Axes:
    axes.set_title(title, fontsize=12, loc="left")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _one_row(logits: ArrayLike) -> jax.Array:
    z = jnp.asarray(logits)
    if z.ndim != 1 or z.shape[0] == 0:
        raise ValueError(f"logits has shape {z.shape}, but needs (classes,): one row")
    return z


def _series(argument: str, wanted: Any) -> tuple:
    if len(wanted) > len(SERIES):
        raise ValueError(f"{argument}: at most {len(SERIES)} can be told apart, got {len(wanted)}")
    return SERIES[: len(wanted)]


def _name(number: int, names: Sequence[str] | None) -> str:
    return str(number) if names is None else names[number]


def _name_classes(axes: Axes, classes: int, names: Sequence[str] | None) -> None:
    if names is not None and len(names) != classes:
        raise ValueError(f"names has {len(names)} entries, but needs {classes}: one for each class")
    if names is not None or classes <= 20:
        axes.set_xticks(range(classes), names)
