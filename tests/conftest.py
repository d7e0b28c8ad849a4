"""The strict environment of every test: 8 CPU devices, no silent promotion of dtype or rank, shapes checked."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

with install_import_hook("jsoftmax", "beartype.beartype"):
    import jsoftmax  # noqa: F401

# Compilation makes the first example slow, and a failure must come back on the next run.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def compile_as_users_do(request):
    """Where only values are compared, compilation takes half the time with little optimization.

    Programs whose last digits, bytes, instructions or time matter are compiled as users compile them: those of modules
    and tests that are marked `optimized`.
    """
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """float64 for the length of a test."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """What a module compiled is of no use to the next, and holds gigabytes after a thousand tests."""
    yield
    jax.clear_caches()
