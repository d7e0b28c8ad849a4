"""Each notebook runs, and the .ipynb beside its .py holds the same cells, run, with their outputs.

To bring the .ipynb up to date, from `notebooks/` with what `make docs` installs:

    jupytext --to ipynb NAME.py && jupyter execute --inplace NAME.ipynb
"""

import json
import re
import runpy
from pathlib import Path

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

pytestmark = pytest.mark.optimized

SOURCES = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
MOST_BYTES = 300_000

by_notebook = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def cells_of_source(text: str) -> list[tuple[str, str]]:
    """Kind and source of each cell in jupytext's percent format."""
    _, *parts = CELL.split(text)
    cells = []
    for marker, body in zip(parts[::2], parts[1::2], strict=True):
        body = body.strip("\n")
        if "[markdown]" in marker:
            cells.append(("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))))
        else:
            cells.append(("code", body))
    return cells


@pytest.fixture
def drawing_nothing(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    backend, printing = matplotlib.get_backend(), np.get_printoptions()
    matplotlib.use("Agg")
    yield
    plt.close("all")
    np.set_printoptions(**printing)
    matplotlib.use(backend)


# Each teaches what the tests of the library hold; those that take some seconds run in the long form.
SLOW = {
    "attention_from_softmax",
    "calibration",
    "large_vocabularies",
    "gradient_verified",
    "image_classification",
    "many_devices",
    "policy_on_cartpole",
    "post_training",
    "retrieval",
    "sequence_tagging",
    "temperature_and_smoothing",
    "when_softmax_collapses",
}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW), id=path.stem) for path in SOURCES]
)
def test_runs(path, drawing_nothing, capsys):
    # A notebook's reader has JAX's own settings.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(path), run_name="__main__")


@by_notebook
def test_pair_is_in_step(path):
    notebook = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == cells_of_source(path.read_text(encoding="utf-8"))


@by_notebook
def test_pair_was_run(path):
    pair = path.with_suffix(".ipynb")
    assert pair.stat().st_size <= MOST_BYTES
    code = [cell for cell in json.loads(pair.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


def test_percent_format_is_read():
    text = "# ---\n# header\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nx = 1\n\ny = 2\n"
    assert cells_of_source(text) == [("markdown", "# Title\n\nText"), ("code", "x = 1\n\ny = 2")]
