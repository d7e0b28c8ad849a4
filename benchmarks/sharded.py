"""What a step of linear cross-entropy sends, holds and computes on each device of a mesh, on paper and as compiled.

    python -m benchmarks.sharded

prints the plan for vocabularies and meshes of every size, and beside it, for the sizes that compile here, the bytes in
the collectives of the compiled program.
"""

import os
import re
import sys
from typing import NamedTuple

NUMBERS_A_ROW = 5  # the largest logit; the sum of the others, its count, a flag for NaN; the label's logit
DEVICES = 64
# Groups of one device, in each of XLA's notations: {{0},{1}}, [2,1]<=[2], and mesh['data'=1,'model'=2] {'data'}.
ALL_REDUCE = re.compile(
    r"= (?P<result>.+?) all-reduce(?:-start)?\(.*?"
    r"replica_groups=(?P<alone>\{\{\d+\}|\[\d+,1\]|mesh\[[^\]]*'(?P<axis>\w+)'=1\b[^\]]*\] \{'(?P=axis)'\})?"
)


class Plan(NamedTuple):
    """Per device and step, in bytes and floating-point operations. A sum is counted by the size of what is summed."""

    statistics: int  # over the shards of classes
    features_gradient: int  # over the shards of classes
    kernel_gradient: int  # over the shards of rows
    kernel: int
    accumulator: int  # of the kernel's gradient, in float32
    block: int  # of logits, in float32
    operations: int


def plan(
    rows: int, features: int, classes: int, data: int, model: int, itemsize: int = 2, block_size: int = 2048
) -> Plan:
    """`data` shards of rows times `model` shards of classes; features and kernel in numbers of `itemsize` bytes."""
    own_rows, own_classes = rows // data, -(-classes // model)
    return Plan(
        statistics=4 * NUMBERS_A_ROW * own_rows if model > 1 else 0,
        features_gradient=itemsize * own_rows * features if model > 1 else 0,
        kernel_gradient=itemsize * features * own_classes if data > 1 else 0,
        kernel=itemsize * features * own_classes,
        accumulator=4 * features * own_classes,
        block=4 * min(block_size, own_rows) * own_classes,
        operations=6 * own_rows * features * own_classes,
    )


def compiled_bytes(rows: int, features: int, classes: int, data: int, model: int, devices=None) -> dict[str, int]:
    """What the compiled program of value and gradients sums over devices, in float32, by what it is."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

    import jsoftmax

    devices = np.array(devices or jax.devices())[: data * model].reshape(data, model)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = (P("data"), P(None, "model"), P("data"))

    def local(features, kernel, labels):
        total = jsoftmax.linear_softmax_cross_entropy(
            features, kernel, labels, reduction="sum", axis_name="model", block_size=rows
        )
        return jax.lax.psum(total, "data")

    shapes = ((rows, features), (features, classes), (rows,))
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, (jnp.float32, jnp.float32, jnp.int32), specs, strict=True)
    ]
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    program = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1))).lower(*arrays).compile().as_text()
    kinds = {(rows // data, features): "features_gradient", (features, classes // model): "kernel_gradient"}
    sums = dict.fromkeys((*kinds.values(), "statistics"), 0)
    for found in ALL_REDUCE.finditer(program):
        if found["alone"]:  # among one device: nothing is sent
            continue
        for dimensions in re.findall(r"f32\[([\d,]*)\]", found["result"]):
            shape = tuple(int(size) for size in dimensions.split(",") if size)
            if shape:  # the loss itself is one number
                sums[kinds.get(shape, "statistics")] += 4 * int(np.prod(shape))
    return sums


MESHES = ((1, 8), (8, 8), (32, 16), (128, 32))
VOCABULARIES = (262_144, 1_048_576, 10_000_000)


def main() -> int:
    rows, features = 2**22, 4096
    print(f"{rows:,} rows of {features:,} features in bfloat16; per device and step")
    print("classes     mesh       statistics  features  kernel grad.  kernel  accumulator   block   operations")
    for classes in VOCABULARIES:
        for data, model in MESHES:
            p = plan(rows, features, classes, data, model)
            sizes = "  ".join(f"{size / 1e9:9.3f}" for size in p[:-1])
            print(f"{classes:>10,}  {data:>3}x{model:<3}  {sizes}  {p.operations:.2e}")
    print(f"\ncompiled for {DEVICES} devices, float32: bytes on paper and in the program")
    for data, model in ((1, 64), (8, 8), (64, 1)):
        on_paper = plan(512, 64, 8192, data, model, itemsize=4)
        for name, size in compiled_bytes(512, 64, 8192, data, model).items():
            print(f"{data:>3}x{model:<3} {name:<18} {getattr(on_paper, name):>10,} {size:>10,}")
    return 0


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main())
