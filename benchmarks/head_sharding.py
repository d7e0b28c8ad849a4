"""What four TPUs send each other for a head that is split over them, by compiling for them where they are not.

The linear loss takes its rows in blocks; how often something of the head's size is sent must not depend on how many.
"""

import re
from collections import Counter
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jsoftmax

ROWS, WIDTH, CLASSES = 8192, 1024, 32_768
HEADS = {"features": P("data"), "classes": P(None, "model"), "both": P("data", "model")}
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
BLOCKS = (16, 2)
MOST = 2  # gathered once, summed once
SENT = re.compile(r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def head_sized(program: str, width: int, classes: int) -> Counter:
    """How often each kind of message carries a kernel, or what one of two or of four devices has of it."""
    sizes = {width * classes // parts for parts in (1, 2, 4)}
    found = Counter()
    for shapes, kind in SENT.findall(program):
        arrays = re.findall(r"\w+\[(\d+(?:,\d+)*)\]", shapes)
        found[kind] += sum(int(np.prod([int(size) for size in array.split(",")])) in sizes for array in arrays)
    return +found


def compiled(head: str, kind: str, blocks: int) -> str:
    """Value and gradients for v5e:2x2, each device with a number of blocks of its rows."""
    devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(2, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    features = array((ROWS, WIDTH), jnp.bfloat16, P("data"))
    kernel = array((WIDTH, CLASSES), jnp.bfloat16, HEADS[head])
    labels = array((ROWS,), jnp.int32, P("data"))

    def loss(features, kernel, labels):
        told = {"row_sharding": P("data")} if kind == "Auto" else {}
        return jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, block_size=ROWS // 2 // blocks, **told)

    step = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (features.sharding, kernel.sharding)))
    with mock.patch.object(jax, "default_backend", return_value="tpu"), jax.set_mesh(mesh):
        return step.lower(features, kernel, labels).compile().as_text()


def counts() -> tuple[list[dict], int]:
    """A row of results for each head and kind of axis, and how many send more than that, or more for more blocks."""
    rows, failed = [], 0
    for kind in KINDS:
        for head in HEADS:
            many, few = (head_sized(compiled(head, kind, blocks), WIDTH, CLASSES) for blocks in BLOCKS)
            ok = many == few and many.total() <= MOST
            failed += not ok
            rows.append({"head": head, "axes": kind, "sent": dict(many), "with fewer blocks": dict(few)})
            print(f"head split over {head}, axes {kind}: sent {dict(many)} {'' if ok else 'TOO MUCH'}", flush=True)
    return rows, failed
