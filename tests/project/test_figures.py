"""The numbers behind the figures of the documentation, and the figures themselves."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = sorted((DOCS / "figures").glob("*.svg"))
IMAGE = re.compile(r"!\[([^]]*)\]\(([^)\s]+)\)")
MOST_BYTES = 100_000


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "figures")
        yield importlib.import_module("error_against_gap")


@pytest.fixture(scope="module")
def errors(script):
    return script.errors()


def test_ours_stay_below_the_promise(script, errors):
    """The contract's bounds, in ulps; rows at a gap of 10 may be a little above it. And what the pages say is drawn."""
    loss, gradient = errors["jsoftmax"]
    assert max(np.max(loss), np.max(gradient)) <= 3
    assert np.median(loss) <= 1  # near one unit
    confident = script.GAPS >= 9.5
    assert np.all(loss <= np.where(confident, 40, 6))
    assert np.all(gradient <= np.where(confident, 40, 8))


@pytest.mark.parametrize("name", ["optax", "jax.nn", "PyTorch"])
def test_peers_lose_every_digit(script, errors, name):
    """A result of 0 is off by the whole value: between 2^23 and 2^24 units in the last place."""
    for worst in errors[name]:
        assert worst[0] < 8
        assert 14 <= script.GAPS[worst >= 2**23][0] <= 16
        assert np.all(worst[script.GAPS > 18.4] >= 2**23)


def test_stored_values_belong_to_the_rows(script):
    """Where nothing cancels yet, PyTorch's loss and gradient are right."""
    near = np.repeat(script.GAPS <= 3, script.ROWS_PER_GAP)
    for got, exact in zip(script.by_torch(), script.truth(script.logits()), strict=True):
        assert got.shape == near.shape
        np.testing.assert_allclose(got[near], np.array(exact, np.float64)[near], rtol=1e-5)


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_figures_are_small_and_shown(path):
    assert path.stat().st_size <= MOST_BYTES
    alternatives = [
        text
        for page in DOCS.rglob("*.md")
        for text, target in IMAGE.findall(page.read_text(encoding="utf-8"))
        if (page.parent / target).resolve() == path.resolve()
    ]
    assert alternatives
    assert all(len(text) > 40 for text in alternatives)  # they say what is to be seen
