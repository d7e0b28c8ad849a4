"""Rows that XLA splits over devices: each has its own blocks, and the head is gathered and its gradient summed once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jsoftmax
from benchmarks.head_sharding import SENT, head_sized
from jsoftmax import ranking

ROWS, WIDTH, CLASSES = 64, 8, 96
HEADS = {"features": P("data"), "classes": P(None, "model"), "both": P("data", "model")}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)


def arguments():
    random = np.random.default_rng(0)
    features = jnp.asarray(random.normal(size=(ROWS, WIDTH)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(WIDTH, CLASSES)), jnp.float32)
    return features, kernel, jnp.asarray(random.integers(0, CLASSES, ROWS))


def place(mesh, head):
    rows = P("data")
    specs = (rows, head, rows)
    return tuple(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments(), specs, strict=True))


def assert_close(results, expected):
    """Up to sums in another order."""
    for one, other in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=2e-5, atol=2e-6)


sent_of_head = functools.partial(head_sized, width=WIDTH, classes=CLASSES)


def bodies(text):
    """What a loop or a branch runs."""
    return "".join(re.findall(r"^%\S*(?:body|region)\S* .*?^}", text, re.MULTILINE | re.DOTALL))


@pytest.mark.exact
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("head", "sent"), [pytest.param("features", 2, marks=pytest.mark.slow), ("classes", 1), ("both", 2)]
)
def test_head_is_gathered_and_summed_once_whatever_the_blocks(head, sent, kind):
    mesh = mesh_of(kind)
    given = place(mesh, HEADS[head])
    expected = jax.value_and_grad(jsoftmax.linear_softmax_cross_entropy, (0, 1))(*arguments())
    for block_size in (2, 16):  # eight blocks, and one
        options: dict = {"block_size": block_size}
        if kind == "auto":
            options["row_sharding"] = given[0].sharding

        def loss(*args, options=options):
            return jsoftmax.linear_softmax_cross_entropy(*args, **options)

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile()
        assert sent_of_head(compiled.as_text()) == dict.fromkeys(["all-gather", "all-reduce"][2 - sent :], 1)
        assert_close(compiled(*given), expected)


@pytest.mark.exact
def test_without_row_sharding_it_is_summed_in_every_block():
    """What is counted is there: in the body of the loop, beside the sum at its end."""
    features, kernel, labels = place(mesh_of("auto"), HEADS["both"])

    def loss(*args):
        return jsoftmax.linear_softmax_cross_entropy(*args, block_size=4)

    text = jax.jit(jax.grad(loss, 1)).lower(features, kernel, labels).compile().as_text()
    assert "all-reduce" in sent_of_head(bodies(text))


@pytest.mark.parametrize(
    "options",
    [{"skip_rows": True}, {"reduction": "none"}, {"derivative": "jvp"}, pytest.param({}, marks=pytest.mark.slow)],
    ids=str,
)
def test_batches_of_two_axes_equal_one_device(options):
    """Rows of a batch, and places of a sequence, over different axes of the mesh; an eighth of them counts."""
    mesh = mesh_of("auto")
    features, kernel, labels = arguments()
    batch = (8, 8)
    weights = (jnp.arange(ROWS) % 8 == 3).astype(jnp.float32).reshape(batch)
    given = (features.reshape(*batch, WIDTH), kernel, labels.reshape(batch), weights)

    def loss(features, kernel, labels, weights, sharding=None):
        out = jsoftmax.linear_softmax_cross_entropy(
            features,
            kernel,
            labels,
            weights=weights,
            block_size=4,
            row_sharding=sharding,
            return_statistics=True,
            **options,
        )
        return out[0].sum(), out[1]

    grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=4)
    sharding = NamedSharding(mesh, P("data", "model", None))
    split = [jax.device_put(x, NamedSharding(mesh, P("data", "model"))) for x in (given[0], given[2], given[3])]
    assert_close(grad(split[0], kernel, split[1], split[2], sharding), grad(*given))


def test_blockwise_and_statistics_take_it():
    mesh = mesh_of("auto")
    features, kernel, labels = place(mesh, P())
    (alone, *_) = arguments()

    def loss(params, rows):
        each = jsoftmax.softmax_cross_entropy_with_integer_labels(rows["h"] @ params, rows["y"])
        return each.sum(), each

    total = jsoftmax.blockwise(loss, has_aux=True, block_size=4)
    rows = {"h": features, "y": labels}
    active = jnp.arange(ROWS) % 2 == 0
    given = (kernel, rows)
    assert_close(total(*given, row_sharding=features.sharding), total(*given))
    assert_close(total(*given, row_sharding=alone.sharding), total(*given))  # of one device
    with jax.set_mesh(mesh):
        statistics = jsoftmax.linear_softmax_statistics(
            features, kernel, labels, active=active, block_size=2, row_sharding=P("data")
        )
    expected = jsoftmax.softmax_statistics(features @ kernel, labels)
    assert_close(statistics, jax.tree.map(lambda x: jnp.where(active, x, 0), expected))


def teacher(features, kernel):
    """Another model's features and head, split as these are."""
    return jnp.tanh(features), jnp.flip(kernel)


def distilled(features, kernel, labels, **options):
    return jsoftmax.linear_distillation_loss(features, kernel, *teacher(features, kernel), labels, **options)


def distilled_top_k(features, kernel, labels, **options):
    classes = jnp.stack([labels, (labels + 5) % CLASSES], axis=-1)
    log_probs = jnp.full(classes.shape, -1.0)
    return jsoftmax.linear_top_k_distillation_loss(features, kernel, log_probs, classes, **options)


def top_k(features, kernel, labels, **options):
    del labels
    return jsoftmax.linear_top_k(features, kernel, 3, **options)


OTHERS = {
    "distillation": jax.value_and_grad(distilled, (0, 1)),
    "top-k distillation": jax.value_and_grad(distilled_top_k, (0, 1)),
    "top k": top_k,
    "ranks": ranking.linear_ranks,
}


@pytest.mark.exact
@pytest.mark.parametrize(
    "name",
    ["distillation", "top k", *(pytest.param(n, marks=pytest.mark.slow) for n in ("top-k distillation", "ranks"))],
)
def test_other_functions_take_it(name):
    """The head is gathered before the loop; within it, nothing is sent at all."""
    given = place(mesh_of("auto"), HEADS["features"])
    told = functools.partial(OTHERS[name], block_size=4, row_sharding=given[0].sharding)
    compiled = jax.jit(told).lower(*given).compile()
    assert_close(compiled(*given), OTHERS[name](*arguments()))
    assert "all-gather" in sent_of_head(compiled.as_text())
    assert "while(" in compiled.as_text()
    assert not SENT.findall(bodies(compiled.as_text()))


def test_bad_shardings_are_named():
    features, kernel, labels = arguments()
    loss = jsoftmax.linear_softmax_cross_entropy
    mesh = mesh_of("auto")
    with pytest.raises(ValueError, match=r"mesh axis 'data', but the mesh has \(\)"):
        loss(features, kernel, labels, row_sharding=P("data"))
    with pytest.raises(ValueError, match="splits 62 rows over 4 devices"):
        loss(features[:62], kernel, labels[:62], row_sharding=NamedSharding(mesh, P("data")))
