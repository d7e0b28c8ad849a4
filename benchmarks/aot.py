"""What value and gradients hold and move on an H200 and on a TPU v5e, by compiling for them where they are not.

    make test-aot

makes an environment with the compilers of both, compiles, keeps the counts in results/aot.json, and fails if one is
above its bound. What this can't tell is time; and products are not tuned for a GPU without one.
"""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jsoftmax

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "aot.json"
GPU = (HERE / "h200.txtpb").read_text(encoding="utf-8")
TARGETS = {
    "NVIDIA H200": {"topology_name": "h200", "platform": "cuda", "target_config": GPU, "topology": "1x1x1"},
    "TPU v5e": {"topology_name": "v5e:2x2", "platform": "tpu"},
}


class Work(NamedTuple):
    """Value and gradients of a loss, and the most temporary and moved bytes that they may take on either target."""

    loss: Callable
    gradients: tuple[int, ...]
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    most_temp: float
    most_moved: float


def _mean_loss(logits, labels):
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


ROWS, WIDTH, DENSE, LINEAR = 8192, 4096, 131_072, 128_256
BLOCK = 2048  # the default size there, 2³⁰ bytes of logits; it is asked from the backend that JAX sees
LOGITS = 2 * ROWS * DENSE  # bytes
WORKS = {
    # Least: the logits read for the statistics and again for the gradient, which is written; a gather counts in full.
    f"cross-entropy {ROWS}×{DENSE} bfloat16": Work(
        _mean_loss, (0,), (((ROWS, DENSE), "bfloat16"), ((ROWS,), "int32")), 0.01 * LOGITS, 4.1 * LOGITS
    ),
    # Temporary: the kernel's gradient in float32 and a block's gradient. Moved by each of four blocks: the kernel
    # twice, its gradient in and out, the logits of the block five times.
    f"linear cross-entropy {ROWS}×{WIDTH}×{LINEAR} bfloat16": Work(
        functools.partial(jsoftmax.linear_softmax_cross_entropy, block_size=BLOCK),
        (0, 1),
        (((ROWS, WIDTH), "bfloat16"), ((WIDTH, LINEAR), "bfloat16"), ((ROWS,), "int32")),
        1.02 * (4 * WIDTH * LINEAR + 2 * BLOCK * LINEAR),
        4 * ((2 * 2 + 2 * 4) * WIDTH * LINEAR + 5 * 4 * BLOCK * LINEAR) * 1.2,
    ),
}


def compile_for(target: str, work: Work) -> jax.stages.Compiled:
    topology = topologies.get_topology_desc(**TARGETS[target])
    sharding = NamedSharding(Mesh(topology.devices[:1], ("x",)), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in work.shapes]
    return jax.jit(jax.value_and_grad(work.loss, work.gradients)).lower(*arguments).compile()


BITS = {"pred": 8, "bf16": 16}
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "partition-id", "after-all"}
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
STEP = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", re.MULTILINE)


def moved_bytes(program: str) -> float:
    """What each step of an optimised program reads and writes, each array once, in loops as often as they run.

    An upper bound on traffic: a gather reads some entries of its operand, and an update in place writes a part.
    """
    bodies = {name: (body, bool(entry)) for entry, name, body in COMPUTATION.findall(program)}

    def moved(name: str) -> float:
        types, total = {}, 0.0
        for result, type_, operation, rest in STEP.findall(bodies[name][0]):
            types[result] = type_
            if operation == "while":
                condition, body = (re.search(rf"{part}=%?([\w.\-]+)", rest).group(1) for part in ("condition", "body"))
                # Known, or the number up to which the loop counts.
                trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', rest) or re.search(
                    r" constant\((\d+)\)", bodies[condition][0]
                )
                total += int(trips.group(1)) * moved(body)
            elif operation not in FREE:
                operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                total += _size(type_) + sum(_size(types.get(operand, "")) for operand in operands)
        return total

    return moved(next(name for name, (_, entry) in bodies.items() if entry))


def _size(type_: str) -> int:
    """Bytes of an array or a tuple, from its type as text."""
    total = 0
    for dtype, dimensions in re.findall(r"\b(pred|bf16|[a-z]\d+)\[([\d,]*)\]", type_):
        bits = BITS.get(dtype) or int(dtype[1:])
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
    return total


def main() -> int:
    # No device is needed, and none is asked for.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    rows, failed = [], 0
    for name, work in WORKS.items():
        for target in TARGETS:
            compiled = compile_for(target, work)
            cost = compiled.cost_analysis() or {}
            temp, moved = compiled.memory_analysis().temp_size_in_bytes, moved_bytes(compiled.as_text())
            ok = temp <= work.most_temp and moved <= work.most_moved
            failed += not ok
            counted = cost.get("bytes accessed")
            rows.append(
                {"work": name, "target": target, "temp_bytes": temp, "moved_bytes": moved, "compiler_bytes": counted}
            )
            shown = f"temps {temp / 1e9:.3f} GB, moved at most {moved / 1e9:.2f} GB"
            print(f"{name}, {target}: {shown} {'' if ok else 'TOO MUCH'}", flush=True)
    RESULTS.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
