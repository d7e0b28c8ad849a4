"""What is promised of log-probabilities to the bit (docs/log-probabilities.md)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import jsoftmax

pytestmark = pytest.mark.exact

ROWS, FEATURES, CLASSES = 40, 24, 1000
random = np.random.default_rng(9)
FEATURE_ROWS = jnp.asarray(random.normal(size=(ROWS, FEATURES)), jnp.float32)
KERNEL = jnp.asarray(random.normal(size=(FEATURES, CLASSES)), jnp.float32)
LABELS = jnp.asarray(random.integers(0, CLASSES, ROWS))
TEMPERATURE = jnp.asarray(np.linspace(0.5, 2, ROWS), jnp.float32)
MINE = jnp.asarray(np.arange(ROWS) % 3 == 1)  # the rows that stay


def dense(features, labels, temperature):
    logits = jnp.matmul(features, KERNEL, preferred_element_type=jnp.float32)
    return jsoftmax.softmax_statistics(logits, labels, temperature=temperature)


def linear(features, labels, temperature, **options):
    return jsoftmax.linear_softmax_statistics(
        features, KERNEL, labels, temperature=temperature, block_size=16, **options
    )


def beside_the_loss(features, labels, temperature):
    return jsoftmax.linear_softmax_cross_entropy(
        features, KERNEL, labels, temperature=temperature, block_size=16, return_statistics=True
    )[1]


def over_devices(features, labels, temperature):
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))

    def local(features, kernel, labels, temperature):
        return jsoftmax.linear_softmax_statistics(
            features, kernel, labels, temperature=temperature, axis_name="classes"
        )

    call = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, "classes"), P(), P()), out_specs=P())
    return call(features, KERNEL, labels, temperature)


WAYS = {
    "dense": dense,
    "linear": linear,
    "highest": functools.partial(linear, precision="highest"),
    "top_p": functools.partial(linear, top_p=0.9),
    "active": lambda h, y, t: linear(h, y, t, active=MINE),
    "beside the loss": beside_the_loss,
    "classes over devices": over_devices,
}


def same_bits(actual, expected):
    for name, a, e in zip(expected._fields, actual, expected, strict=True):
        np.testing.assert_array_equal(a, e, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WAYS)
def test_a_row_does_not_depend_on_the_others(name, dtype):
    """Whatever they hold, in one program; nor on how often it ran."""
    program = jax.jit(WAYS[name])
    arrays = FEATURE_ROWS.astype(dtype), LABELS, TEMPERATURE
    first = program(*arrays)
    same_bits(program(*arrays), first)
    other_features = jnp.asarray(30 * np.random.default_rng(1).normal(size=FEATURE_ROWS.shape), dtype)
    others = other_features, (LABELS + 7) % CLASSES, 3 * TEMPERATURE
    changed = [
        jnp.where(MINE.reshape(-1, *[1] * (own.ndim - 1)), own, other)
        for own, other in zip(arrays, others, strict=True)
    ]
    second = program(*changed)
    same_bits(jax.tree.map(lambda x: x[MINE], second), jax.tree.map(lambda x: x[MINE], first))
    if name != "active":  # there the others are zeros
        assert not np.any(second.logsumexp[~MINE] == first.logsumexp[~MINE])


def test_compiled_again_it_is_the_same():
    program = jax.jit(linear)
    first = program(FEATURE_ROWS, LABELS, TEMPERATURE)
    jax.clear_caches()
    same_bits(program(FEATURE_ROWS, LABELS, TEMPERATURE), first)
