"""Contrast in blocks against the formula with all similarities, PyTorch's peers, eight devices; what a batch holds."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import metric_learning as peer
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

import jsoftmax

PEERS = json.loads(Path(peer.__file__).with_suffix(".json").read_text(encoding="utf-8"))
RANDOM = np.random.default_rng(0)
BATCH, EXTRA, WIDTH = 16, 8, 3
QUERIES, ITEMS = RANDOM.normal(size=(BATCH, WIDTH)), RANDOM.normal(size=(BATCH + EXTRA, WIDTH))
IDS = RANDOM.integers(0, 9, size=BATCH + EXTRA)
WEIGHTS = np.where(np.arange(BATCH) % 5 == 2, 0, np.linspace(0.5, 2, BATCH))
LOG_Q = np.linspace(-1.0, 1.0, BATCH + EXTRA)


def softmax_losses(z, positive, compared):
    """Of each row, the mean over its positives; 0 for a row without any."""
    z = jnp.where(compared, z, -jnp.inf)
    log_p = z - jnp.log(jnp.sum(jnp.exp(z), axis=1, keepdims=True))
    positive = positive & compared
    count = positive.sum(axis=1)
    return -jnp.where(positive, log_p, 0).sum(axis=1) / jnp.maximum(count, 1).astype(z.dtype), count > 0


def sigmoid_losses(z, positive, compared):
    probability = jax.nn.sigmoid(jnp.where(positive, z, -z))
    return -jnp.where(compared, jnp.log(jnp.where(compared, probability, 1)), 0).sum(axis=1), compared.any(axis=1)


def all_similarities(each, queries, items=None, labels=None, item_ids=None, log_q=0.0, weights=None, **options):
    """The mean, from an array of all similarities."""
    temperature, bias = options.get("temperature", 1.0), options.get("bias", 0.0)
    to_itself, symmetric = items is None, options.get("symmetric", each is softmax_losses)
    items = queries if to_itself else items
    batch, ids = len(queries), labels if item_ids is None else item_ids
    weights = jnp.ones(batch) if weights is None else weights
    takes_part = jnp.concatenate([weights != 0, jnp.ones(len(items) - batch, bool)])

    def one_way(rows, others, correction):
        own = np.arange(len(others)) == np.arange(batch)[:, None]
        alike = own if ids is None else ids[:batch, None] == ids[None, : len(others)]
        positive = own if labels is None else alike
        compared = ~own if to_itself else (own | ~alike if labels is None else np.ones_like(own))
        z = rows @ others.T / temperature + bias - jnp.broadcast_to(correction, own.shape)
        losses, found = each(z, positive, compared & jnp.broadcast_to(takes_part[: len(others)], own.shape))
        factors = jnp.where(found, weights, 0)
        return (factors * losses).sum() / factors.sum()

    there = one_way(queries, items, log_q)
    return (there + one_way(items[:batch], queries, 0.0)) / 2 if symmetric and not to_itself else there


SOFTMAX = {
    "plain": {},
    "ids": {"item_ids": IDS},
    "one way": {"symmetric": False, "log_q": LOG_Q, "temperature": 0.5},
    "labels": {"labels": IDS},
    "weights": {"weights": WEIGHTS, "item_ids": IDS, "log_q": LOG_Q},
    "to itself": {"labels": IDS[:BATCH], "weights": WEIGHTS},
}
SIGMOID = {
    "sigmoid": {"temperature": 0.5, "bias": -1.0},
    "sigmoid, ids": {"item_ids": IDS, "weights": WEIGHTS},
    "sigmoid, labels": {"labels": IDS, "bias": 0.5},
}
CASES = {name: (jsoftmax.contrastive_loss, softmax_losses, options) for name, options in SOFTMAX.items()}
CASES |= {name: (jsoftmax.sigmoid_contrastive_loss, sigmoid_losses, options) for name, options in SIGMOID.items()}


def vectors(name):
    return (jnp.asarray(QUERIES),) if name == "to itself" else (jnp.asarray(QUERIES), jnp.asarray(ITEMS))


@pytest.mark.parametrize("name", CASES)
def test_all_similarities(name, x64):
    """Value and gradients, in blocks of 5 queries."""
    loss, each, options = CASES[name]
    both = tuple(range(len(vectors(name))))
    in_blocks = functools.partial(loss, block_size=5, **options)
    value, gradients = jax.jit(jax.value_and_grad(in_blocks, both))(*vectors(name))
    formula = functools.partial(all_similarities, each, **options)
    expected, slopes = jax.jit(jax.value_and_grad(formula, both))(*vectors(name))
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    for one, other in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["weights", "sigmoid, ids"])
def test_reductions(name, x64):
    """A pair of weight 0 is never looked at."""
    loss, _, options = CASES[name]
    idle = jnp.asarray(WEIGHTS == 0)[:, None]
    given = [array.at[:BATCH].set(jnp.where(idle, jnp.nan, array[:BATCH])) for array in vectors(name)]

    @jax.jit
    def in_each_way(*given):
        return [loss(*given, reduction=how, block_size=7, **options) for how in ("mean", "sum", "none")]

    mean, total, each = in_each_way(*given)
    np.testing.assert_allclose(mean, in_each_way(*vectors(name))[0], rtol=1e-11)
    np.testing.assert_allclose(total, each.sum(), rtol=1e-11)
    np.testing.assert_array_equal(each[WEIGHTS == 0], 0)
    gradient = jax.jit(jax.grad(lambda q: loss(q, *given[1:], **options)))(given[0])
    np.testing.assert_array_equal(gradient[WEIGHTS == 0], 0)
    assert np.all(np.isfinite(gradient))


def unit(array):
    return array / jnp.linalg.norm(array, axis=1, keepdims=True)


def views(queries, items):
    return jnp.concatenate([unit(queries), unit(items)])


TWICE, NUMBERS = np.array([*peer.LABELS, *peer.LABELS]), np.tile(np.arange(peer.ROWS), 2)
THEIRS = {
    "clip": lambda q, x: jsoftmax.contrastive_loss(unit(q), unit(x), temperature=0.2),
    "siglip": lambda q, x: jsoftmax.sigmoid_contrastive_loss(unit(q), unit(x), temperature=0.1, bias=-2.0),
    "supcon": lambda q, x: jsoftmax.contrastive_loss(views(q, x), labels=TWICE, temperature=0.2),
    "ntxent": lambda q, x: jsoftmax.contrastive_loss(views(q, x), labels=NUMBERS, temperature=0.2),
}


@pytest.mark.parametrize("name", THEIRS)
def test_peers(name, x64):
    towers = jnp.asarray(peer.QUERIES), jnp.asarray(peer.ITEMS)
    value, gradients = jax.jit(jax.value_and_grad(THEIRS[name], (0, 1)))(*towers)
    np.testing.assert_allclose(value, PEERS[name]["value"], rtol=1e-10)
    for gradient, theirs in zip(gradients, PEERS[name]["gradients"], strict=True):
        np.testing.assert_allclose(gradient, theirs, rtol=1e-8, atol=1e-10)


def split(loss, options, check_vma=True):
    """The loss of pairs on eight devices, each of which has some negatives of its own."""
    mesh = Mesh(np.array(jax.devices()), "d")
    arrays = {name: jnp.asarray(value) for name, value in options.items() if np.ndim(value)}
    rest = {name: value for name, value in options.items() if name not in arrays}

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P(), check_vma=check_vma)
    def local(given, arrays):
        return loss(*given, axis_name="d", block_size=1, **arrays, **rest)

    return lambda *given: local(given, arrays)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["weights", "to itself", "sigmoid, ids"])
def test_eight_devices(name, check_vma, x64):
    """As one device, which has each device's own items first, then all further negatives: so their order matters."""
    loss, _, options = CASES[name]
    given = vectors(name)
    options = dict(options)
    if len(given) == 2:
        parts = np.concatenate([np.arange(BATCH).reshape(8, -1), BATCH + np.arange(EXTRA).reshape(8, -1)], axis=1)
        order = parts.ravel()
        given_split = (given[0], given[1][order])
        of_items = {key: options[key][order] for key in ("item_ids", "labels", "log_q") if key in options}
        split_options = options | of_items
    else:
        given_split, split_options = given, options
    both = tuple(range(len(given)))
    value, gradients = jax.jit(jax.value_and_grad(split(loss, split_options, check_vma), both))(*given_split)
    expected, slopes = jax.jit(jax.value_and_grad(functools.partial(loss, **options), both))(*given)
    np.testing.assert_allclose(value, expected, rtol=1e-11)
    np.testing.assert_allclose(gradients[0], slopes[0], rtol=1e-9, atol=1e-12)
    if len(given) == 2:
        np.testing.assert_allclose(gradients[1], slopes[1][order], rtol=1e-9, atol=1e-12)


@pytest.mark.optimized
def test_what_devices_send():
    """The vectors of each tower once, and their gradients back once, where they are summed."""
    program = jax.jit(jax.grad(split(jsoftmax.contrastive_loss, {}), (0, 1)))
    text = program.lower(*(jax.ShapeDtypeStruct((BATCH, 32), jnp.float32),) * 2).compile().as_text()
    sent = re.findall(r"= (\S+) (all-gather|reduce-scatter|all-reduce|collective-permute|all-to-all)\(", text)
    whole = [kind for shape, kind in sent if re.match(r"f32\[\d+,\d+", shape)]
    assert sorted(whole) == ["all-gather"] * 2 + ["reduce-scatter"] * 2


@pytest.mark.optimized
@pytest.mark.parametrize("loss", [jsoftmax.contrastive_loss, jsoftmax.sigmoid_contrastive_loss])
def test_a_batch_of_131072_fits(loss):
    """With gradients of both towers, ids and a temperature: some blocks of similarities, and copies of the vectors."""
    batch, width, block = 131_072, 256, 128

    def mean(queries, items, temperature, ids):
        return loss(queries, items, temperature=temperature, item_ids=ids, block_size=block)

    shapes = [((batch, width), jnp.float32)] * 2 + [((), jnp.float32), ((batch,), jnp.int32)]
    program = jax.jit(jax.value_and_grad(mean, (0, 1, 2))).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    held = program.compile().memory_analysis().temp_size_in_bytes
    similarities, tower = 4 * block * batch, 4 * batch * width
    assert held <= 5 * similarities + 5 * tower  # 1 GB, where all similarities are 69 GB


def test_learnt_temperature(x64):
    """Its gradient, in blocks, is that of the formula; and forward over reverse goes through."""
    given = vectors("plain")

    def mean(loss, temperature):
        return loss(*given, temperature=temperature)

    for name in ("plain", "sigmoid"):
        loss, each, _ = CASES[name]
        ours, formula = (functools.partial(mean, f) for f in (loss, functools.partial(all_similarities, each)))
        at = jnp.float64(0.7)
        slope, curve = jax.jit(lambda at, f=ours: jax.jvp(jax.grad(f), (at,), (jnp.ones_like(at),)))(at)
        np.testing.assert_allclose(slope, jax.jit(jax.grad(formula))(at), rtol=1e-9)
        np.testing.assert_allclose(curve, jax.jit(jax.grad(jax.grad(formula)))(at), rtol=1e-7)


def test_errors():
    one, other = jnp.ones((4, 3)), jnp.ones((3, 3))
    ids = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"queries has shape \(4, 3\) and items \(3, 3\)"):
        jsoftmax.contrastive_loss(one, other)
    with pytest.raises(ValueError, match="labels and item_ids are both given"):
        jsoftmax.sigmoid_contrastive_loss(one, one, labels=ids, item_ids=ids)
    with pytest.raises(ValueError, match="labels must be given where items is None"):
        jsoftmax.contrastive_loss(one)
    with pytest.raises(ValueError, match=r"item_ids has shape \(4,\), but needs \(5,\)"):
        jsoftmax.contrastive_loss(one, jnp.ones((5, 3)), item_ids=ids)
    with pytest.raises(ValueError, match="margin needs integer labels"):
        jsoftmax.contrastive_loss(one, one, labels=ids, margin=0.1)
    with pytest.raises(TypeError, match="unknown option 'class_weights'"):
        jsoftmax.contrastive_loss(one, one, class_weights=jnp.ones(4))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), but needs \(\)"):
        jsoftmax.sigmoid_contrastive_loss(one, one, bias=jnp.ones(4))
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        jsoftmax.contrastive_loss(one, one, block_size=0)
