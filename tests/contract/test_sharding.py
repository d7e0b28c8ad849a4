"""Classes and rows split over 8 devices give what one device gives, and move no array of logits or features.

`test_layouts.py` has every function in every layout; here are hard rows, other meshes, and what is sent.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jsoftmax
from benchmarks import sharded as sharded_benchmark

ROWS, CLASSES, FEATURES = 8, 40, 5
# Sums in another order: a few units in the last place of the largest entry.
CLOSE = {"rtol": 1e-5, "atol": 3e-6}

MESHES = {"8": (1, 8), "2x4": (2, 4), "4x2": (4, 2), "rows": (8, 1)}
OPTIONS = {"temperature": P("data"), "softcap": P(), "label_smoothing": P("data"), "z_loss": P()}
OPTIONS |= {"class_weights": P("model")}


def mesh_of(name, kind=AxisType.Auto):
    return jax.make_mesh(MESHES[name], ("data", "model"), axis_types=(kind, kind))


def normal(key, *shape):
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), jnp.float32)


def options():
    return {
        "temperature": jnp.linspace(0.5, 2.0, ROWS),
        "softcap": jnp.float32(5.0),
        "label_smoothing": jnp.linspace(0.0, 0.3, ROWS),
        "z_loss": jnp.float32(0.01),
        "class_weights": jnp.linspace(0.5, 2.0, CLASSES),
    }


def integer_labels():
    return jnp.array([0, 4, 5, 39, 17, 17, 20, 33])


def allowed():
    """A mask of a whole shard of (8,), of some of every other, and of no label's class."""
    mask = normal(5, ROWS, CLASSES) > -0.5
    return mask.at[:, 8:10].set(False).at[:, 10:15].set(False).at[jnp.arange(ROWS), integer_labels()].set(True)


def masked_loss(p, labels, axis_name):
    chosen = {**p["options"], "smoothing": "others", "ignore_index": 20}
    return jsoftmax.softmax_cross_entropy_with_integer_labels(
        p["logits"], labels, where=p["where"], axis_name=axis_name, **chosen
    )


def dense_loss(p, labels, axis_name):
    targets = jsoftmax.softmax(p["targets"], axis_name=axis_name)
    weights = p["options"]["class_weights"]
    return jsoftmax.softmax_cross_entropy(
        p["logits"], targets, label_smoothing=0.1, class_weights=weights, axis_name=axis_name
    )


def statistics(p, labels, axis_name, **chosen):
    s = jsoftmax.softmax_statistics(p["logits"], labels, where=p["where"], axis_name=axis_name, **chosen)
    return s.logsumexp + 2 * s.log_prob + 3 * s.mean_logit + 4 * s.entropy + 0.1 * s.argmax.astype(jnp.float32)


def linear_losses(p, labels, axis_name, reduction="none", **chosen):
    weights = jnp.where(labels == 20, 0, 1 + labels.astype(jnp.float32) / CLASSES)
    return jsoftmax.linear_softmax_cross_entropy(
        p["features"],
        p["kernel"],
        labels,
        bias=p["bias"],
        weights=weights,
        reduction=reduction,
        block_size=3,
        axis_name=axis_name,
        **p["options"],
        **chosen,
    )


def linear_sum(p, labels, axis_name):
    return jnp.full(labels.shape, linear_losses(p, labels, axis_name, "sum"))


LOSSES = {
    "integer labels": masked_loss,
    "dense labels": dense_loss,
    "statistics": statistics,
    "linear": linear_losses,
}


def inputs():
    """What the losses above take, and how it is split: differentiable leaves, then the mask."""
    p = {
        "logits": 3 * normal(0, ROWS, CLASSES),
        "targets": normal(1, ROWS, CLASSES),
        "features": normal(2, ROWS, FEATURES),
        "kernel": normal(3, FEATURES, CLASSES),
        "bias": normal(4, CLASSES),
        "options": options(),
    }
    split = {
        "logits": P("data", "model"),
        "targets": P("data", "model"),
        "features": P("data"),
        "kernel": P(None, "model"),
        "bias": P("model"),
        "options": OPTIONS,
    }
    return p, split


def single(loss):
    """The loss on one device: of all rows, weighted so that no two count alike."""

    def total(p):
        losses = loss({**p, "where": allowed()}, integer_labels(), None)
        return jnp.vdot(losses, jnp.linspace(0.5, 1.5, ROWS)), losses

    return total


def split_over(mesh, loss, check_vma=True):
    """The same by `shard_map`."""
    _, split = inputs()

    def local(p, where, labels, factors):
        losses = loss({**p, "where": where}, labels, "model")
        return jax.lax.psum(jnp.vdot(losses, factors), "data"), losses

    rows = P("data")
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, P("data", "model"), rows, rows),
        out_specs=(P(), rows),
        check_vma=check_vma,
    )
    return lambda p: mapped(p, allowed(), integer_labels(), jnp.linspace(0.5, 1.5, ROWS))


def assert_close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, **CLOSE)


def value_and_grad(total):
    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("shape", ["8", "4x2", "rows"])
@pytest.mark.parametrize("name", ["integer labels", "statistics", "linear"])
def test_equals_one_device_on_many_meshes(name, shape):
    p, _ = inputs()
    expected = value_and_grad(single(LOSSES[name]))(p)
    assert_close(value_and_grad(split_over(mesh_of(shape), LOSSES[name]))(p), expected)


@pytest.mark.parametrize(
    ("name", "check_vma"), [("integer labels", True), ("dense labels", True), ("dense labels", False), ("linear", True)]
)
def test_forward_over_reverse_equals_one_device(name, check_vma):
    p, _ = inputs()
    along = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), p)

    def product(total):
        return jax.jit(lambda p: jax.jvp(jax.grad(lambda p: total(p)[0]), (p,), (along,))[1])(p)

    actual = product(split_over(mesh_of("2x4"), LOSSES[name], check_vma))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(product(single(LOSSES[name]))), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_linear_sum_equals_one_device(check_vma):
    """The rows of each part are summed before they are weighted, so that parts are compared with parts."""
    p, split = inputs()

    def parts(p):
        halves = [
            jax.tree.map(lambda leaf, spec, h=h: leaf[4 * h : 4 * h + 4] if spec[:1] == ("data",) else leaf, p, split)
            for h in (0, 1)
        ]
        sums = [linear_losses(q, integer_labels()[4 * h : 4 * h + 4], None, "sum") for h, q in enumerate(halves)]
        return sums[0] ** 2 + 3 * sums[1] ** 2

    def local(p, labels, factor):
        # Under a factor that is not the same on all shards of the classes, so that cotangents differ.
        share = (jax.lax.axis_index("model") + 1).astype(jnp.float32) / 10
        return jax.lax.psum(factor[0] * share * linear_losses(p, labels, "model", "sum") ** 2, ("data", "model"))

    mapped = jax.shard_map(
        local, mesh=mesh_of("2x4"), in_specs=(split, P("data"), P("data")), out_specs=P(), check_vma=check_vma
    )
    expected = jax.jit(jax.value_and_grad(parts))(p)
    actual = jax.jit(jax.value_and_grad(lambda p: mapped(p, integer_labels(), jnp.array([1.0, 3.0]))))(p)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=3e-5, atol=3e-4)


def sharded(function, *specs, out, axes=("data", "model"), shape="8", check_vma=True):
    mesh = jax.make_mesh(MESHES[shape], axes, axis_types=(AxisType.Auto,) * 2)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check_vma))


def edge_rows():
    """NaN, infinities, masks and labels of every kind, wherever in a row they are; and a confident row."""
    inf, nan = jnp.inf, jnp.nan
    row = 2 * normal(7, 16)
    rows = [row, row.at[5].set(-inf), row.at[13].set(-inf), row.at[9].set(nan), row.at[2].set(inf)]
    rows += [row.at[2].set(inf).at[9].set(nan), jnp.full(16, -inf), jnp.full(16, -inf).at[3].set(0.0)]
    rows += [row.at[9].set(nan), row, row, jnp.zeros(16), row.at[9].set(60.0)]
    return jnp.stack(rows), jnp.array([0, 3, 13, 4, 1, 1, 1, 3, -100, -1, 16, 15, 9])


def everything(logits, labels, axis_name=None):
    """What is the same on all shards, and what has one entry a class."""
    losses = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, ignore_index=-100, axis_name=axis_name)
    argmax = jsoftmax.softmax_statistics(logits, labels, axis_name=axis_name).argmax
    by_class = [f(logits, axis_name=axis_name) for f in (jsoftmax.softmax, jsoftmax.log_softmax)]
    return (losses, jsoftmax.logsumexp(logits, axis_name=axis_name), argmax), by_class


def with_slopes(function, logits, labels):
    slopes = jax.grad(lambda logits: function(logits, labels)[0][0].sum())(logits)
    return jax.tree.leaves((function(logits, labels), slopes))


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_edge_rows_equal_one_device(check_vma):
    split, axes = P(None, ("data", "model")), ("data", "model")
    local = functools.partial(everything, axis_name=axes)
    mapped = sharded(local, split, P(), out=(P(), split), check_vma=check_vma)
    for a, e in zip(with_slopes(mapped, *edge_rows()), with_slopes(everything, *edge_rows()), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=0)


def test_edge_rows_under_jit_equal_one_device():
    """Where XLA splits the classes, by the form that counts the largest."""
    logits, labels = edge_rows()
    placed = jax.device_put(logits, NamedSharding(mesh_of("8"), P(None, "model")))
    for a, e in zip(
        with_slopes(jax.jit(everything), placed, labels), with_slopes(everything, logits, labels), strict=True
    ):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=0)


def test_confident_rows_keep_their_accuracy():
    """A label 20 ahead of the rest: the loss is Σ e^(z_j − z_y) to first order, far below 1 ulp of 1."""
    logits = jnp.zeros((8, 64)).at[jnp.arange(8), 8 * jnp.arange(8)].set(20.0)  # on each of the shards
    labels = 8 * jnp.arange(8)
    split = P(None, "model")

    def local(logits, labels):
        def loss(z):
            return jsoftmax.softmax_cross_entropy_with_integer_labels(z, labels, axis_name="model")

        return loss(logits), jax.grad(lambda z: loss(z).sum())(logits)

    loss, slope = sharded(local, split, P(), out=(P(), split))(logits, labels)
    others = 63 * np.exp(np.longdouble(-20))
    np.testing.assert_allclose(loss, np.full(8, np.log1p(others)), rtol=6 * 2.0**-23)
    at_label = np.asarray(slope)[np.arange(8), 8 * np.arange(8)]
    np.testing.assert_allclose(at_label, np.full(8, -others / (1 + others)), rtol=8 * 2.0**-23)


def test_vocabulary_of_any_size_by_padding():
    """37 classes on 8 shards: three columns of padding, masked."""
    features, kernel, labels = normal(0, 6, FEATURES), normal(1, FEATURES, 37), jnp.array([0, 36, 5, 9, 20, 35])

    def local(features, kernel, where, labels):
        return jsoftmax.linear_softmax_cross_entropy(
            features, kernel, labels, where=where, label_smoothing=0.1, axis_name="model"
        )

    mapped = sharded(local, P(), P(None, "model"), P("model"), P(), out=P())
    padded = jnp.pad(kernel, ((0, 0), (0, 3)), constant_values=jnp.nan)

    def total(features, kernel):
        return mapped(features, kernel, jnp.arange(40) < 37, labels)

    actual, (features_bar, kernel_bar) = jax.value_and_grad(total, argnums=(0, 1))(features, padded)
    expected = jax.value_and_grad(
        lambda features, kernel: jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, label_smoothing=0.1),
        argnums=(0, 1),
    )(features, kernel)
    assert_close((actual, (features_bar, kernel_bar[:, :37])), expected)
    assert not np.any(kernel_bar[:, 37:])


@pytest.mark.parametrize("shard", [0, 7])
def test_labels_all_on_one_shard(shard):
    logits, labels = 3 * normal(0, ROWS, CLASSES), 5 * shard + jnp.arange(ROWS) % 5
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels
    split = P(None, "model")
    mapped = sharded(functools.partial(loss, axis_name="model"), split, P(), out=P())
    for function in (lambda f: f(logits, labels), lambda f: jax.grad(lambda z: f(z, labels).sum())(logits)):
        assert_close(function(mapped), function(loss))


def test_same_logits_everywhere_are_refused():
    def local(logits):
        return jsoftmax.logsumexp(logits, axis_name="model")

    with pytest.raises(ValueError, match=r"logits varies over the mesh axes \[\], but axis_name=\('model',\) says"):
        sharded(local, P(), out=P())(jnp.zeros((2, 8)))


COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def collectives(compiled):
    """The kinds and the shapes of all that is sent, from the optimised program."""
    sent = []
    for result, kind in COLLECTIVE.findall(compiled.as_text()):
        for dimensions in SHAPE.findall(result):
            sent.append((kind, tuple(int(size) for size in dimensions.split(",") if size)))
    return sent


def numbers_per_row(sent, rows):
    """Checks that only sums are sent, and gives the sizes of those that are not of a number or a few per row."""
    assert {kind for kind, _ in sent} == {"all-reduce"}
    return sorted(size for _, shape in sent if (size := int(np.prod(shape))) > 2 * rows)


N, D, V = 64, 16, 2048


def abstract(mesh, *specs):
    shapes = ((N, V), (N, D), (D, V), (N,))
    dtypes = (jnp.float32, jnp.float32, jnp.float32, jnp.int32)
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=None if spec is None else NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
    ]


def linear_mean(features, kernel, labels, axis_name=None):
    return jsoftmax.linear_softmax_cross_entropy(
        features, kernel, labels, reduction="sum", label_smoothing=0.1, block_size=16, axis_name=axis_name
    )


def dense_mean(logits, labels, axis_name=None):
    losses = jsoftmax.softmax_cross_entropy_with_integer_labels(
        logits, labels, label_smoothing=0.1, z_loss=0.01, axis_name=axis_name
    )
    return losses.sum()


LAYOUTS = {
    "classes": (P(), P(None, ("data", "model"))),
    "rows": (P(("data", "model")), P()),
    "both": (P("data"), P(None, "model")),
}


@pytest.mark.exact
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_sends_a_few_numbers_per_row_for_logits(layout, kind):
    mesh, (rows, columns) = mesh_of("2x4", kind), LAYOUTS[layout]
    split = P(*(*rows, None)[:1], columns[1] if len(columns) > 1 else None)
    logits, _, _, labels = abstract(mesh, split, None, None, rows)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(dense_mean), out_shardings=(None, logits.sharding)).lower(logits, labels)
        assert numbers_per_row(collectives(compiled.compile()), N) == []


@pytest.mark.exact
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_sends_the_sums_of_gradients_for_features(layout, kind):
    """No array of features, kernel or logits; of the gradients, the one that is a sum over devices."""
    mesh, (rows, columns) = mesh_of("2x4", kind), LAYOUTS[layout]
    _, features, kernel, labels = abstract(mesh, None, rows, columns, rows)
    with jax.set_mesh(mesh):
        function = jax.value_and_grad(linear_mean, argnums=(0, 1))
        shardings = (None, (features.sharding, kernel.sharding))
        compiled = jax.jit(function, out_shardings=shardings).lower(features, kernel, labels).compile()
    # Of a block's features, and of the kernel; where it is known which rows a device has, its blocks are its own.
    block = 8 if kind == AxisType.Auto else 16
    sums = {"classes": {16 * D}, "rows": {D * V}, "both": {block * D, D * V // 4}}
    assert set(numbers_per_row(collectives(compiled), 16)) == sums[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_equals_one_device(layout):
    mesh, (rows, columns) = mesh_of("2x4"), LAYOUTS[layout]
    features, kernel = normal(0, N, D), normal(1, D, V)
    labels = jnp.asarray(np.random.default_rng(2).integers(0, V, N))
    function = jax.jit(jax.value_and_grad(linear_mean, argnums=(0, 1)))
    expected = function(features, kernel, labels)
    placed = [
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((features, rows), (kernel, columns), (labels, rows))
    ]
    assert_close(function(*placed), expected)
    logits = features @ kernel
    split = NamedSharding(mesh, P(*(*rows, None)[:1], columns[1] if len(columns) > 1 else None))
    function = jax.jit(jax.value_and_grad(dense_mean))
    assert_close(function(jax.device_put(logits, split), placed[2]), function(logits, labels))


def local_program(engine, mesh):
    """value_and_grad inside shard_map, over classes and rows."""
    if engine == "dense":
        _, arrays = None, abstract(mesh, P("data", "model"), None, None, P("data"))
        arrays, specs = [arrays[0], arrays[3]], (P("data", "model"), P("data"))
        loss, count = dense_mean, 1
    else:
        arrays = abstract(mesh, None, P("data"), P(None, "model"), P("data"))[1:]
        specs, loss, count = (P("data"), P(None, "model"), P("data")), linear_mean, 2

    def local(*arrays):
        return jax.lax.psum(loss(*arrays, axis_name="model"), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return jax.jit(jax.value_and_grad(mapped, argnums=tuple(range(count)))).lower(*arrays).compile()


def test_shard_map_sends_a_few_numbers_per_row_for_logits():
    assert numbers_per_row(collectives(local_program("dense", mesh_of("2x4"))), N // 2) == []


def test_shard_map_sums_each_gradient_once():
    """All rows of the features' gradient in one sum over the shards of classes, the kernel's over those of rows."""
    sizes = numbers_per_row(collectives(local_program("linear", mesh_of("2x4"))), 16)
    assert sizes == sorted([N // 2 * D, D * V // 4])


def every_statistic(logits, labels, axis_name):
    return sum(jsoftmax.softmax_statistics(logits, labels, axis_name=axis_name)[:4])


def log_prob_and_entropy(logits, labels, axis_name):
    statistics = jsoftmax.softmax_statistics(logits, labels, axis_name=axis_name)
    return statistics.entropy - statistics.log_prob


integer = jsoftmax.softmax_cross_entropy_with_integer_labels


@pytest.mark.exact
@pytest.mark.parametrize(
    ("losses", "gradient", "numbers"),
    [
        (integer, True, 5),
        (functools.partial(integer, label_smoothing=0.1), True, 7),
        (log_prob_and_entropy, False, 6),
        (every_statistic, True, 8),
    ],
    ids=["loss", "smoothed", "entropy", "statistics"],
)
def test_numbers_sent_for_each_row(losses, gradient, numbers):
    """Those that the page on scaling out counts, four bytes each."""
    mesh, split = mesh_of("8"), P(None, "model")
    logits, _, _, labels = abstract(mesh, split, None, None, P())

    def local(logits, labels):
        return losses(logits, labels, axis_name="model").sum()

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(split, P()), out_specs=P())
    program = jax.jit(jax.value_and_grad(mapped) if gradient else mapped).lower(logits, labels).compile()
    assert sum(int(np.prod(shape)) for _, shape in collectives(program)) <= numbers * N


@pytest.mark.exact
@pytest.mark.parametrize("engine", ["dense", "linear"])
def test_memory_falls_with_the_number_of_shards(engine):
    sizes = {}
    for shards in (2, 8):
        mesh = jax.make_mesh((1, shards), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        sizes[shards] = local_program(engine, mesh).memory_analysis().temp_size_in_bytes
    assert sizes[8] < max(sizes[2] / 4 * 1.25, 32 * 4 * N)  # a few numbers a row remain


@pytest.mark.exact
@pytest.mark.parametrize(("data", "model"), [(2, 4), (1, 8), (8, 1)])
def test_plan_on_paper_is_what_compiles(data, model):
    """The bytes that the page on planning counts, in the program."""
    on_paper = sharded_benchmark.plan(64, 16, 512, data, model, itemsize=4)
    sent = sharded_benchmark.compiled_bytes(64, 16, 512, data, model)
    assert sent == {name: getattr(on_paper, name) for name in sent}


@pytest.mark.exact
def test_what_is_sent_is_found():
    """The expressions above read a program that gathers."""
    mesh = mesh_of("8")
    split, whole = NamedSharding(mesh, P("model")), NamedSharding(mesh, P())
    compiled = jax.jit(lambda x: x, in_shardings=split, out_shardings=whole).lower(jnp.zeros((16, 3))).compile()
    assert collectives(compiled) == [("all-gather", (16, 3))]
