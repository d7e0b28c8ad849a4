"""`make soak` in short: two threads, a few programs, and that its counts see what they are for."""

import itertools

import jax
import jax.numpy as jnp
import pytest
import soak


def lasting(named, calls, threads=2):
    """What some calls of these found, in the order of each thread."""
    found = soak.Soak(named)
    found.run(threads, lambda: found.count < calls)
    assert found.count >= calls
    return found


def test_nothing_is_compiled_again_and_threads_agree():
    chosen = ("cross-entropy, 6x17", "cross-entropy, eager, 6x17", "linear, eager, 33x17", "blockwise, 33x17")
    calls = {name: call for name, call in soak.calls().items() if name.startswith(chosen) and "float32" in name}
    assert len(calls) == len(chosen)
    found = lasting(calls, 100)
    assert found.compiled_again == found.differing == []
    assert found.programs >= len(calls)
    before = soak.caches()
    assert {"jsoftmax._rows.forms._forms", "jsoftmax._rows.exponentials.number_format"} <= set(before)
    lasting(calls, 20)
    assert soak.caches() == before


def test_what_compiles_at_every_call_is_seen():
    size = jnp.ones(7)
    found = lasting({"new": lambda: jax.jit(lambda x: x + 1)(size), "old": lambda: size}, 12, threads=1)
    assert set(found.compiled_again) == {"new"}
    assert found.differing == []


def test_another_result_is_seen():
    numbers = itertools.count()
    assert lasting({"counts": lambda: jnp.int32(next(numbers))}, 4).differing


def test_what_raises_in_a_thread_raises():
    with pytest.raises(ZeroDivisionError):
        lasting({"fails": lambda: 1 / 0}, 4)


def test_growth_of_known_sizes():
    assert soak.growth([100.0, 300.0, 100.0, 100.0, 100.0, 0.0, 110.0, 110.0, 110.0]) == pytest.approx(0.1)
    assert soak.growth([5.0]) == 0
    assert soak.resident_mb() > 10 or soak.resident_mb() == 0
