"""`linear_softmax_cross_entropy` as the head of language models in Flax NNX, Flax Linen, Haiku and Equinox.

Each library trains in its own way and with its own complication: tied embeddings, gradients accumulated over
microbatches, a checkpointed model, an ensemble under vmap. The peer makes all logits and gives them to optax.
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

import jsoftmax

CLASSES, WIDTH, ROWS, LENGTH, STEPS = 97, 16, 8, 12, 40
# Several blocks of rows, the last of them smaller, in a batch and in a microbatch.
BLOCK_SIZE, MICROBATCHES = 20, 2
MEMBERS, IGNORED = 3, -1


def relaxed(optimizer):
    def update(*arguments, **options):
        # optax raises a float to the power of its integer step count.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments, **options)

    return optax.GradientTransformation(optimizer.init, update)


OPTIMIZER = relaxed(optax.adam(3e-2))


@pytest.fixture(scope="module")
def text():
    """Tokens and their successors, one for each token, so that they can be learned."""
    draws = np.random.default_rng(0)
    tokens = draws.integers(0, CLASSES, (ROWS, LENGTH))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(draws.permutation(CLASSES)[tokens], jnp.int32)


# Each head takes features, a kernel and labels, and stands beside the same by optax.


def linear_tied(features, embedding, labels):
    return jsoftmax.linear_softmax_cross_entropy(
        features, embedding, labels, kernel_transposed=True, block_size=BLOCK_SIZE
    )


def unfused_tied(features, embedding, labels):
    return optax.softmax_cross_entropy_with_integer_labels(features @ embedding.T, labels).mean()


def weights_of(labels):
    """Rows count differently, and every fifth is padding."""
    places = jnp.arange(labels.size).reshape(labels.shape)
    return jnp.where(places % 5 == 0, 0.0, 0.5 + (places % 3).astype(jnp.float32))


def linear_weighted(features, kernel, bias, labels, weights):
    return jsoftmax.linear_softmax_cross_entropy(
        features, kernel, labels, bias=bias, weights=weights, reduction="sum", block_size=BLOCK_SIZE
    )


def unfused_weighted(features, kernel, bias, labels, weights):
    logits = features @ kernel + jnp.broadcast_to(bias, (*labels.shape, CLASSES))
    return (optax.softmax_cross_entropy_with_integer_labels(logits, labels) * weights).sum()


def linear_ignoring(features, kernel, labels):
    return jsoftmax.linear_softmax_cross_entropy(
        features, kernel, labels, ignore_index=IGNORED, z_loss=1e-3, block_size=BLOCK_SIZE
    )


def unfused_ignoring(features, kernel, labels):
    logits, counted = features @ kernel, labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    losses += 1e-3 * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.where(counted, losses, 0).sum() / counted.sum().astype(losses.dtype)


def linear_smoothed(features, kernel, labels):
    return jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, label_smoothing=0.1, block_size=BLOCK_SIZE)


def unfused_smoothed(features, kernel, labels):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
    return optax.softmax_cross_entropy(features @ kernel, targets).mean()


# Each trainer gives the loss of every step and the first step's gradients.


def repeat(step, state, steps):
    losses, first = [], None
    for _ in range(steps):
        state, loss, gradients = step(state)
        losses.append(float(loss))
        first = gradients if first is None else first
    return losses, first


def train_flax_nnx(head, tokens, labels, steps):
    """An MLP whose kernel is its own embedding."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embedding = nnx.Embed(CLASSES, WIDTH, rngs=rngs)
            self.expand = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
            self.contract = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, tokens):
            return self.contract(nnx.relu(self.expand(self.embedding(tokens))))

    def model_loss(model):
        return head(model(tokens), model.embedding.embedding[...], labels)

    @nnx.jit
    def update(model, optimizer):
        loss, gradients = nnx.value_and_grad(model_loss)(model)
        optimizer.update(model, gradients)
        return loss, gradients

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    return repeat(lambda _: (None, *update(model, optimizer)), None, steps)


def train_flax_linen(head, tokens, labels, steps):
    """A GRU whose gradients are added up over microbatches."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            features = nn.RNN(nn.GRUCell(WIDTH))(nn.Embed(CLASSES, WIDTH)(tokens))
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (WIDTH, CLASSES))
            return features, kernel, self.param("bias", nn.initializers.zeros, (CLASSES,))

    def model_loss(parameters, batch):
        tokens, labels, weights = batch
        return head(*model.apply(parameters, tokens), labels, weights)

    @jax.jit
    def step(state):
        def accumulate(total, batch):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(model_loss)(state.params, batch)), None

        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        (loss, gradients), _ = jax.lax.scan(accumulate, nothing, microbatches)
        return state.apply_gradients(grads=gradients), loss, gradients

    weights = weights_of(labels)
    batches = tokens, labels, weights / weights.sum()
    microbatches = jax.tree.map(lambda leaf: leaf.reshape(MICROBATCHES, -1, LENGTH), batches)
    model = Model()
    parameters = model.init(jax.random.key(0), tokens)
    return repeat(step, TrainState.create(apply_fn=model.apply, params=parameters, tx=OPTIMIZER), steps)


def train_haiku(head, tokens, labels, steps):
    """A checkpointed GRU; the first place of each row is not counted."""

    @hk.without_apply_rng
    @hk.transform
    def model_loss():
        core = hk.GRU(WIDTH)
        inputs = hk.Embed(CLASSES, WIDTH)(tokens)
        features, _ = hk.dynamic_unroll(core, inputs, core.initial_state(ROWS), time_major=False)
        kernel = hk.get_parameter("kernel", (WIDTH, CLASSES), init=hk.initializers.VarianceScaling())
        return head(features, kernel, labels.at[:, 0].set(IGNORED))

    @jax.jit
    def step(state):
        parameters, optimizer_state = state
        loss, gradients = jax.value_and_grad(jax.checkpoint(model_loss.apply))(parameters)
        updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
        return (optax.apply_updates(parameters, updates), optimizer_state), loss, gradients

    parameters = model_loss.init(jax.random.key(0))
    return repeat(step, (parameters, OPTIMIZER.init(parameters)), steps)


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    layers: eqx.nn.MLP
    kernel: jax.Array

    def __init__(self, key):
        of_embedding, of_layers, of_kernel = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(CLASSES, WIDTH, key=of_embedding)
        self.layers = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, key=of_layers)
        self.kernel = jax.random.normal(of_kernel, (WIDTH, CLASSES)) / WIDTH**0.5

    def __call__(self, token):
        return self.layers(self.embedding(token))


def train_equinox(head, tokens, labels, steps):
    """An ensemble of MLPs, each with a start of its own."""

    def model_loss(model):
        return head(jax.vmap(jax.vmap(model))(tokens), model.kernel, labels)

    @eqx.filter_jit
    def step(state):
        ensemble, optimizer_state = state
        losses, gradients = eqx.filter_vmap(eqx.filter_value_and_grad(model_loss))(ensemble)
        updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
        return (eqx.apply_updates(ensemble, updates), optimizer_state), losses.mean(), gradients

    ensemble = eqx.filter_vmap(EquinoxModel)(jax.random.split(jax.random.key(0), MEMBERS))
    return repeat(step, (ensemble, OPTIMIZER.init(eqx.filter(ensemble, eqx.is_inexact_array))), steps)


# Either head's derivative by a logit is right to an ulp or two, and what follows is the same sums in another order. The
# rows of a class pull together, so that a parameter's largest entry is about as large as what is summed.
TOLERANCE = 8 * float(jnp.finfo(jnp.float32).eps)

# The loss must fall to this share of the first. With label smoothing of 0.1 the least that can be had is the entropy of
# the smoothed labels, 0.78 nats of log(97), and so a share of 0.17.
FALL, SMOOTHED_FALL = 0.05, 0.25


# An MLP of two layers has 4 parameters, a GRU 10 in Flax and 3 in Haiku; besides, the embedding, the kernel if it is
# another, and the bias if there is one.
@pytest.mark.parametrize(
    ("trainer", "linear", "unfused", "leaf_count", "fall"),
    [
        pytest.param(train_flax_nnx, linear_tied, unfused_tied, 5, FALL, id="flax-nnx-tied"),
        pytest.param(train_flax_linen, linear_weighted, unfused_weighted, 13, FALL, id="flax-linen-microbatches"),
        pytest.param(train_haiku, linear_ignoring, unfused_ignoring, 5, FALL, id="haiku-checkpoint"),
        pytest.param(train_equinox, linear_smoothed, unfused_smoothed, 6, SMOOTHED_FALL, id="equinox-ensemble"),
    ],
)
def test_model_learns_with_the_gradients_of_all_logits(trainer, linear, unfused, leaf_count, fall, text):
    losses, gradients = trainer(linear, *text, STEPS)
    (peer_loss,), peer_gradients = trainer(unfused, *text, 1)
    np.testing.assert_allclose(losses[0], peer_loss, rtol=TOLERANCE)
    leaves, peer_leaves = jax.tree.leaves(gradients), jax.tree.leaves(peer_gradients)
    assert len(leaves) == leaf_count
    for got, want in zip(leaves, peer_leaves, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.max(np.abs(want)))
    assert losses[-1] <= fall * losses[0]
