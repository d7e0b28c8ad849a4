"""Reports where JAX has moved the private registry that they need: there are none, and nothing else changes."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jsoftmax._rows import reports

REGISTRY = "jax._src.checkify"


@pytest.fixture
def without_registry(monkeypatch):
    """Loads the module once more where the registry is not, or has lost what is asked of it."""

    def load(registry):
        monkeypatch.setitem(sys.modules, REGISTRY, registry)
        spec = importlib.util.spec_from_file_location("moved_reports", reports.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def reporting(module, bad):
    return module.report_rows("row {row} is bad", bad, jnp.zeros(3, bool))


def messages(module):
    error, idle = checkify.checkify(jax.jit(lambda bad: reporting(module, bad)))(jnp.array([False, True, False]))
    assert not np.any(idle)
    return error.get()


def test_a_report_is_made_here():
    assert reports.can_report
    assert "row 1 is bad" in messages(reports)


@pytest.mark.parametrize("registry", [None, type(sys)(REGISTRY)], ids=["gone", "without its names"])
def test_nothing_is_reported_where_the_registry_has_moved(registry, without_registry):
    moved = without_registry(registry)
    assert not moved.can_report
    assert messages(moved) is None
    np.testing.assert_array_equal(jax.vmap(lambda bad: reporting(moved, bad))(jnp.ones((2, 3), bool)), np.zeros((2, 3)))
