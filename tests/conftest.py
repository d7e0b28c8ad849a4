"""The strict environment of every test: 8 CPU devices, no silent promotion of dtype or rank, shapes checked."""

import gc
import itertools
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

with install_import_hook("jsoftmax", "runtime_types.checked"):
    import jsoftmax  # noqa: F401

# Compilation makes the first example slow, and a failure must come back on the next run.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


# Most of the time goes to compiling. XLA's older emitters, in one piece, take 0.4 of it; later releases lack them.
QUICK = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """`-m "not exact"` compiles quickly, where XLA reads its flags: before the first program of a process."""
    if "not exact" in config.option.markexpr:
        os.environ["XLA_FLAGS"] += f" {QUICK}"


@pytest.fixture(autouse=True)
def optimize_what_runs_for_long(request):
    """Where only values are compared, compilation takes half the time with little optimization.

    Not so for `exact` tests, of last digits, bytes and instructions, and for `optimized` ones, which run for longer
    than they compile.
    """
    marks = {mark.name for mark in request.node.iter_markers()}
    jax.config.update("jax_disable_most_optimizations", not marks & {"exact", "optimized"})
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


def pytest_collection_finish(session):
    # A tenth of the time went to looking for garbage among the hundred thousands of objects that are imported.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


modules = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Programs of a thousand tests would hold gigabytes; those that modules share are worth keeping for one more."""
    yield
    if next(modules) % 2 == 0:
        jax.clear_caches()
