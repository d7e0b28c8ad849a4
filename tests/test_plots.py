"""What each figure shows, read off its artists."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.special import erf, expit, softmax

from jsoftmax import plots

LOGITS = np.array([2.0, 1.0, 0.1], np.float32)
NAMES = ["cat", "dog", "horse"]


@pytest.fixture(autouse=True)
def drawing_nothing():
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    plt.close("all")
    matplotlib.use(backend)


@pytest.fixture
def axes():
    return plt.figure().subplots()


def heights(axes):
    return np.array([bar.get_height() for bar in axes.patches])


def colours(axes):
    return [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axes.patches]


def tick_labels(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def calibration_set():
    """Confidences of 0.9 and 0.6, 10 rows each, right 8 and 3 times."""
    p = np.repeat([0.9, 0.6], 10)
    labels = np.concatenate([np.arange(10) >= 8, np.arange(10) >= 3]).astype(np.int32)
    return jnp.log(jnp.asarray(np.stack([p, 1 - p], axis=-1), jnp.float32)), labels


EVERY = {
    "softmax_against_sigmoid": plots.softmax_against_sigmoid,
    "probability_bars": lambda **given: plots.probability_bars(LOGITS, 1, **given),
    "gradient_bars": lambda **given: plots.gradient_bars(LOGITS, 1, **given),
    "temperature_sweep": lambda **given: plots.temperature_sweep(LOGITS, **given),
    "activation_comparison": plots.activation_comparison,
    "reliability_diagram": lambda **given: plots.reliability_diagram(*calibration_set(), **given),
    "loss_curves": lambda **given: plots.loss_curves({"train": [1.0, 0.5]}, **given),
}


@pytest.mark.parametrize("name", EVERY)
def test_draws_where_it_is_told_and_labels_what_it_draws(name, axes):
    assert EVERY[name](axes=axes) is axes
    own = EVERY[name]()
    assert own is not axes
    assert own.figure is not axes.figure
    for each in (axes, own):
        assert each.get_xlabel()
        assert each.get_ylabel()
        assert each.get_title(loc="left")
        each.figure.canvas.draw()


def test_every_plot_is_tried():
    public = {name for name, value in vars(plots).items() if getattr(value, "__module__", "") == "jsoftmax.plots"}
    assert {name for name in public if not name.startswith("_")} == set(EVERY)


def test_softmax_against_sigmoid(axes):
    plots.softmax_against_sigmoid(axes=axes)
    curve, dots = axes.lines
    for line in (curve, dots):
        np.testing.assert_allclose(line.get_ydata(), expit(line.get_xdata().astype(np.float64)), rtol=1e-5)
    assert len(dots.get_xdata()) == 17
    assert legend(axes) == ["sigmoid(x)", "softmax([x, 0]), first entry"]


def test_probability_bars(axes):
    plots.probability_bars(LOGITS, 1, names=NAMES, temperature=0.5, axes=axes)
    np.testing.assert_allclose(heights(axes), softmax(LOGITS.astype(np.float64) / 0.5), rtol=1e-6)
    assert colours(axes) == [plots.ORANGE, plots.BLUE, plots.GREY]
    assert tick_labels(axes) == NAMES
    # A right guess is blue; without a label the guess alone stands out.
    assert colours(plots.probability_bars(LOGITS, 0)) == [plots.BLUE, plots.GREY, plots.GREY]
    assert colours(plots.probability_bars(LOGITS)) == [plots.ORANGE, plots.GREY, plots.GREY]
    assert tick_labels(plots.probability_bars(LOGITS)) == ["0", "1", "2"]


def test_gradient_bars(axes):
    plots.gradient_bars(LOGITS, 2, names=NAMES, axes=axes)
    expected = softmax(LOGITS.astype(np.float64)) - np.eye(3)[2]
    np.testing.assert_allclose(heights(axes), expected, rtol=1e-5)
    assert colours(axes) == [plots.ORANGE, plots.ORANGE, plots.BLUE]
    assert axes.get_title(loc="left").endswith("label horse")


def test_temperature_sweep(axes):
    temperatures = (0.5, 1.0, 8.0)
    plots.temperature_sweep(LOGITS, temperatures, names=NAMES, axes=axes)
    for line, temperature in zip(axes.lines, temperatures, strict=True):
        np.testing.assert_allclose(line.get_ydata(), softmax(LOGITS.astype(np.float64) / temperature), rtol=1e-5)
    assert legend(axes) == ["T = 0.5", "T = 1", "T = 8"]
    assert tick_labels(axes) == NAMES
    assert len({line.get_marker() for line in axes.lines}) == 3
    coldest = plots.temperature_sweep(LOGITS, (0.0,)).lines[0]
    np.testing.assert_array_equal(coldest.get_ydata(), [1, 0, 0])


def test_activation_comparison(axes):
    plots.activation_comparison(axes=axes)
    lines = {line.get_label(): line for line in axes.lines}
    x = lines["tanh(x)"].get_xdata().astype(np.float64)
    expected = {
        "sigmoid(x)": expit(x),
        "softmax([x, 0, 0]), first entry": np.exp(x) / (np.exp(x) + 2),
        "tanh(x)": np.tanh(x),
        "ReLU(x)": np.maximum(x, 0),
        "GELU(x)": x * (1 + erf(x / np.sqrt(2))) / 2,
    }
    assert legend(axes) == list(expected)
    for name, curve in expected.items():
        np.testing.assert_allclose(lines[name].get_ydata(), curve, rtol=1e-5, atol=1e-5)
    assert len({line.get_linestyle() for name, line in lines.items() if name in expected}) >= 4


@pytest.mark.parametrize("equal_mass", [False, True])
def test_reliability_diagram(axes, equal_mass):
    plots.reliability_diagram(*calibration_set(), bins=4, equal_mass=equal_mass, name="given", axes=axes)
    (dots,) = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), [[0.6, 0.3], [0.9, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(*dots.get_sizes(), rtol=1e-6)
    # Half the rows are off by 0.3, half by 0.1.
    assert legend(axes) == ["given: error 0.200"]
    diagonal = axes.lines[0]
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())


def test_reliability_diagrams_side_by_side(axes):
    logits, labels = calibration_set()
    plots.reliability_diagram(logits, labels, name="before", axes=axes)
    plots.reliability_diagram(logits / 2, labels, name="after", axes=axes, weights=jnp.ones(20), ignore_index=-1)
    before, after = axes.collections
    assert not np.array_equal(before.get_facecolor(), after.get_facecolor())
    assert [text.split(":")[0] for text in legend(axes)] == ["before", "after"]
    assert len(axes.lines) == 3  # the diagonal once


def test_areas_are_shares(axes):
    logits, labels = calibration_set()
    plots.reliability_diagram(logits[:15], labels[:15], axes=axes)
    few, many = axes.collections[0].get_sizes()
    offset = 2 * few - many  # areas are a + b·share, and one share is twice the other
    np.testing.assert_allclose([few - offset, many - offset], np.array([1, 2]) * (many - few), rtol=1e-6)
    assert offset > 0


def test_loss_curves(axes):
    curves = {"train": [2.0, 1.0, 0.5], "held out": [2.0, 1.5]}
    plots.loss_curves(curves, axes=axes)
    for line, (name, losses) in zip(axes.lines, curves.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), np.stack([np.arange(1, len(losses) + 1), losses], axis=-1))
    assert axes.get_yscale() == "log"


def test_bad_inputs():
    with pytest.raises(ValueError, match=r"logits has shape \(1, 3\), but needs \(classes,\): one row"):
        plots.probability_bars(LOGITS[None])
    with pytest.raises(ValueError, match=r"names has 2 entries, but needs 3: one for each class"):
        plots.gradient_bars(LOGITS, 0, names=NAMES[:2])
    with pytest.raises(ValueError, match=r"temperatures: at most 5 can be told apart, got 6"):
        plots.temperature_sweep(LOGITS, range(1, 7))
    with pytest.raises(TypeError, match="labels must hold integer class numbers"):
        plots.reliability_diagram(jnp.zeros((2, 3)), jnp.zeros(2))


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = None  # as if it were not installed
import jsoftmax
assert "jsoftmax.plots" not in sys.modules
import jsoftmax.plots
try:
    jsoftmax.plots.softmax_against_sigmoid()
except ImportError as error:
    print(error)
"""


def test_without_matplotlib():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MATPLOTLIB], capture_output=True, text=True, check=True)
    assert done.stdout == "jsoftmax.plots needs matplotlib to draw: pip install 'jsoftmax[plots]'\n"


def test_import_does_not_load_matplotlib():
    source = "import sys, jsoftmax, jsoftmax.plots; print([name for name in sys.modules if 'matplotlib' in name])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
