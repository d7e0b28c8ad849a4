"""Losses on the models of Flax NNX, Flax Linen, Haiku and Equinox, each trained in its library's own way.

Every model ends in logits and a temperature that is trained with it. optax's losses are the peer.
"""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import jsoftmax

ROWS, HIDDEN, CLASSES, STEPS = 256, 32, 10, 60
IGNORED = -1


def relaxed(optimizer):
    def update(*arguments, **options):
        # optax raises a float to the power of its integer step count.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments, **options)

    return optax.GradientTransformation(optimizer.init, update)


OPTIMIZER = relaxed(optax.adam(1e-2))


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:ROWS] / 16, jnp.float32), jnp.asarray(labels[:ROWS], jnp.int32)


# Each loss takes logits, integer labels and a temperature, and stands beside the same by optax.


def ours_smoothed(logits, labels, temperature):
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, label_smoothing=0.1).mean()


def optax_smoothed(logits, labels, temperature):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


def ours_tempered(logits, labels, temperature):
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, temperature=temperature).mean()


def optax_tempered(logits, labels, temperature):
    return optax.softmax_cross_entropy_with_integer_labels(logits / temperature, labels).mean()


def every_fourth_ignored(labels):
    return jnp.where(jnp.arange(ROWS) % 4 == 0, IGNORED, labels)


def ours_ignoring(logits, labels, temperature):
    labels = every_fourth_ignored(labels)
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, ignore_index=IGNORED).mean()


def optax_ignoring(logits, labels, temperature):
    labels = every_fourth_ignored(labels)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(labels == IGNORED, 0, losses).mean()


def ours_narrow(logits, labels, temperature):
    losses = jsoftmax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.bfloat16), labels)
    assert losses.dtype == jnp.float32
    return losses.mean()


def optax_narrow(logits, labels, temperature):
    logits = logits.astype(jnp.bfloat16).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def ours_dense(logits, labels, temperature):
    return jsoftmax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, CLASSES)).mean()


def optax_dense(logits, labels, temperature):
    return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, CLASSES)).mean()


# Each trainer gives the loss of every step and the first step's gradients.


def repeat(step, state, steps):
    losses, first = [], None
    for _ in range(steps):
        state, loss, gradients = step(state)
        losses.append(float(loss))
        first = gradients if first is None else first
    return losses, first


def train_flax_nnx(loss_function, images, labels, steps):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(64, HIDDEN, rngs=rngs)
            self.head = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)
            self.log_temperature = nnx.Param(jnp.zeros(()))

        def __call__(self, images):
            return self.head(nnx.relu(self.hidden(images))), jnp.exp(self.log_temperature[...])

    def model_loss(model):
        logits, temperature = model(images)
        return loss_function(logits, labels, temperature)

    @nnx.jit
    def update(model, optimizer):
        loss, gradients = nnx.value_and_grad(model_loss)(model)
        optimizer.update(model, gradients)
        return loss, gradients

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    return repeat(lambda _: (None, *update(model, optimizer)), None, steps)


def train_flax_linen(loss_function, images, labels, steps):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, images):
            logits = nn.Dense(CLASSES)(nn.relu(nn.Dense(HIDDEN)(images)))
            return logits, jnp.exp(self.param("log_temperature", nn.initializers.zeros, ()))

    def model_loss(parameters):
        logits, temperature = model.apply(parameters, images)
        return loss_function(logits, labels, temperature)

    @jax.jit
    def step(state):
        loss, gradients = jax.value_and_grad(model_loss)(state.params)
        return state.apply_gradients(grads=gradients), loss, gradients

    model = Model()
    parameters = model.init(jax.random.key(0), images)
    return repeat(step, TrainState.create(apply_fn=model.apply, params=parameters, tx=OPTIMIZER), steps)


def train_haiku(loss_function, images, labels, steps):
    @hk.without_apply_rng
    @hk.transform
    def model_loss():
        logits = hk.nets.MLP([HIDDEN, CLASSES])(images)
        temperature = jnp.exp(hk.get_parameter("log_temperature", (), init=jnp.zeros))
        return loss_function(logits, labels, temperature)

    @jax.jit
    def step(state):
        parameters, optimizer_state = state
        loss, gradients = jax.value_and_grad(model_loss.apply)(parameters)
        updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
        return (optax.apply_updates(parameters, updates), optimizer_state), loss, gradients

    parameters = model_loss.init(jax.random.key(0))
    return repeat(step, (parameters, OPTIMIZER.init(parameters)), steps)


class EquinoxModel(eqx.Module):
    layers: eqx.nn.MLP
    log_temperature: jax.Array


def train_equinox(loss_function, images, labels, steps):
    def model_loss(model):
        def row_loss(image, label):
            return loss_function(model.layers(image), label, jnp.exp(model.log_temperature))

        return jax.vmap(row_loss)(images, labels).mean()

    @eqx.filter_jit
    def step(state):
        model, optimizer_state = state
        loss, gradients = eqx.filter_value_and_grad(model_loss)(model)
        updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
        return (eqx.apply_updates(model, updates), optimizer_state), loss, gradients

    model = EquinoxModel(eqx.nn.MLP(64, CLASSES, HIDDEN, 1, key=jax.random.key(0)), jnp.zeros(()))
    return repeat(step, (model, OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))), steps)


# In either library the derivative by a logit is right to an ulp or two, and what follows is the same sum over rows. At
# the start the rows of a class pull together, so that a parameter's largest entry is as large as what is summed.
EPSILON = float(jnp.finfo(jnp.float32).eps)
TOLERANCE = 8 * EPSILON
# Both libraries then round that derivative to bfloat16, and may land on neighbours.
NARROW_TOLERANCE = float(jnp.finfo(jnp.bfloat16).eps)

# The loss must fall to this share of the first. With label smoothing of 0.1 the least that can be had is the entropy of
# the smoothed labels, 0.50 nats, and so a share of 0.22.
FALL, SMOOTHED_FALL = 0.05, 0.3


@pytest.mark.parametrize(
    ("trainer", "ours", "peer", "fall", "tolerance"),
    [
        pytest.param(train_flax_nnx, ours_smoothed, optax_smoothed, SMOOTHED_FALL, TOLERANCE, id="flax-nnx-smoothed"),
        pytest.param(train_flax_nnx, ours_tempered, optax_tempered, FALL, TOLERANCE, id="flax-nnx-tempered"),
        pytest.param(train_flax_linen, ours_narrow, optax_narrow, FALL, NARROW_TOLERANCE, id="flax-linen-bfloat16"),
        pytest.param(train_flax_linen, ours_dense, optax_dense, FALL, TOLERANCE, id="flax-linen-dense"),
        pytest.param(train_haiku, ours_ignoring, optax_ignoring, FALL, TOLERANCE, id="haiku-ignoring"),
        pytest.param(train_haiku, ours_narrow, optax_narrow, FALL, NARROW_TOLERANCE, id="haiku-bfloat16"),
        pytest.param(train_equinox, ours_dense, optax_dense, FALL, TOLERANCE, id="equinox-dense"),
        pytest.param(train_equinox, ours_tempered, optax_tempered, FALL, TOLERANCE, id="equinox-tempered"),
    ],
)
def test_model_learns_with_the_gradients_of_optax(trainer, ours, peer, fall, tolerance, digits):
    losses, gradients = trainer(ours, *digits, STEPS)
    (peer_loss,), peer_gradients = trainer(peer, *digits, 1)
    np.testing.assert_allclose(losses[0], peer_loss, rtol=TOLERANCE)
    leaves, peer_leaves = jax.tree.leaves(gradients), jax.tree.leaves(peer_gradients)
    assert len(leaves) == 5  # two kernels, two biases and the temperature
    for got, want in zip(leaves, peer_leaves, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.max(np.abs(want)))
    assert losses[-1] <= fall * losses[0]


def test_training_finds_the_best_temperature():
    """Given logits (8, 0) and three labels in four of class 0, it is the T at which p_0 = 3/4: 8 / log 3."""
    logits, labels = jnp.tile(jnp.array([8.0, 0.0]), (4, 1)), jnp.array([0, 0, 0, 1])
    optimizer = optax.sgd(1.0)

    @jax.jit
    def step(log_temperature, optimizer_state):
        gradient = jax.grad(lambda value: ours_tempered(logits, labels, jnp.exp(value)))(log_temperature)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return optax.apply_updates(log_temperature, updates), optimizer_state

    state = jnp.zeros(()), optimizer.init(jnp.zeros(()))
    for _ in range(200):
        state = step(*state)
    # A step multiplies what is missing by 1 − (3/16) (log 3)² = 0.77. What stays is the gradient's error, a few ulps,
    # over that curvature of 0.23.
    np.testing.assert_allclose(state[0], np.log(8 / np.log(3)), rtol=0, atol=4 * EPSILON / 0.22)
