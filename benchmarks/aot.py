"""What value and gradients hold, move and execute on an H200 and a TPU v5e, by compiling for them where they are not.

    make test-aot

makes an environment with the compilers of both, compiles, keeps the counts in results/aot.json, and fails if one is
above its bound. Instructions are counted for the H200 alone (sass.py). What this can't tell is time; and products are
not tuned for a GPU without one.
"""

import functools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jsoftmax
from benchmarks import head_sharding, sass

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "aot.json"
GPU = (HERE / "h200.txtpb").read_text(encoding="utf-8")
TARGETS = {
    "NVIDIA H200": {"topology_name": "h200", "platform": "cuda", "target_config": GPU, "topology": "1x1x1"},
    "TPU v5e": {"topology_name": "v5e:2x2", "platform": "tpu"},
}


class Work(NamedTuple):
    """Value and gradients of a loss, and the most temporary and moved bytes that they may take on either target.

    On the H200 also the most instructions for each of so many `elements`, kernel by kernel as they are launched.
    """

    loss: Callable
    gradients: tuple[int, ...]
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    most_temp: float
    most_moved: float
    elements: int
    most_instructions: tuple[float, ...]


def _mean_loss(logits, labels, **options):
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, **options).mean()


ROWS, WIDTH, DENSE, LINEAR = 8192, 4096, 131_072, 128_256
LEAST = 0.5  # instructions for a logit, below which a kernel does not count: it works on rows
BLOCK = 2048  # the default size there, 2³⁰ bytes of logits
STATISTICS, GRADIENT = {"bfloat16": 27, "float32": 42}, {"bfloat16": 27, "float32": 33}  # instructions


def _dense(rows: int, classes: int, dtype: str) -> Work:
    # Least: the logits read for the statistics and again for the gradient, which is written; a gather counts in full.
    size = jnp.dtype(dtype).itemsize * rows * classes
    shapes = (((rows, classes), dtype), ((rows,), "int32"))
    # More kernels than two would read the logits more often.
    most = STATISTICS[dtype], GRADIENT[dtype]
    return Work(_mean_loss, (0,), shapes, 0.01 * size, 4.1 * size, rows * classes, most)


def _capped(rows: int, classes: int, dtype: str) -> Work:
    """No array of capped logits, for which both passes compute the hyperbolic tangent."""
    loss = functools.partial(_mean_loss, softcap=30.0)
    return _dense(rows, classes, dtype)._replace(loss=loss, most_instructions=(90, 72))


# Of each block: its statistics and its gradient, from float32 logits.
OF_BLOCK = (STATISTICS["float32"], GRADIENT["float32"] + 3)
WORKS = {
    f"cross-entropy {ROWS}×{DENSE} bfloat16": _dense(ROWS, DENSE, "bfloat16"),
    f"cross-entropy {ROWS}×{DENSE} float32": _dense(ROWS, DENSE, "float32"),
    f"cross-entropy {BLOCK}×{LINEAR} float32": _dense(BLOCK, LINEAR, "float32"),  # has been split
    f"cross-entropy with softcap {ROWS}×{DENSE} bfloat16": _capped(ROWS, DENSE, "bfloat16"),
    # Temporary: the kernel's gradient in float32, a block's gradient, and the features' gradient twice. Moved by each
    # of four blocks: the kernel twice, its gradient in (but for the first) and out, the logits of the block five times.
    # Instructions: the first block, the others, the features' gradients put together, the kernel's gradient rounded.
    f"linear cross-entropy {ROWS}×{WIDTH}×{LINEAR} bfloat16": Work(
        jsoftmax.linear_softmax_cross_entropy,
        (0, 1),
        (((ROWS, WIDTH), "bfloat16"), ((WIDTH, LINEAR), "bfloat16"), ((ROWS,), "int32")),
        1.02 * (4 * WIDTH * LINEAR + 2 * BLOCK * LINEAR + 4 * ROWS * WIDTH),
        4 * ((2 * 2 + 2 * 4) * WIDTH * LINEAR + 5 * 4 * BLOCK * LINEAR) * 1.1,
        BLOCK * LINEAR,
        (*OF_BLOCK, *OF_BLOCK, 3, 10),
    ),
}


def compile_for(target: str, work: Work) -> jax.stages.Compiled:
    topology = topologies.get_topology_desc(**TARGETS[target])
    sharding = NamedSharding(Mesh(topology.devices[:1], ("x",)), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in work.shapes]

    def counted(*operands):
        return jax.value_and_grad(work.loss, work.gradients)(*operands)

    # What is decided by the backend is decided for the target.
    backend = TARGETS[target]["platform"].replace("cuda", "gpu")
    with mock.patch.object(jax, "default_backend", return_value=backend):
        return jax.jit(counted).lower(*arguments).compile()


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


def instructions(folder: Path, work: Work) -> tuple[list[float], bool]:
    """Of each kernel, the instructions for one logit, and whether any could not be counted or kept its numbers."""
    found = [kernel for kernel in sass.kernels(folder) if kernel.per_element(work.elements) >= LEAST]
    return (
        [round(kernel.per_element(work.elements), 1) for kernel in found],
        any(kernel.loops or kernel.spilled_bytes for kernel in found),
    )


def main() -> int:
    # No device is needed, and none is asked for.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    with tempfile.TemporaryDirectory() as folder:
        sass.dump_kernels(Path(folder))
        rows, failed = counts(Path(folder))
    heads, more_failed = head_sharding.counts()
    results = {"jax": jax.__version__, "rows": rows, "heads": heads}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if failed or more_failed else 0


def counts(folder: Path) -> tuple[list[dict], int]:
    """A row of results for each work and target, and how many are above a bound."""
    rows, failed = [], 0
    for name, work in WORKS.items():
        for target in TARGETS:
            compiled = compile_for(target, work)
            cost = compiled.cost_analysis() or {}
            temp, moved = compiled.memory_analysis().temp_size_in_bytes, moved_bytes(compiled.as_text())
            ok = temp <= work.most_temp and moved <= work.most_moved
            row = {"work": name, "target": target, "temp_bytes": temp, "moved_bytes": moved}
            shown = f"temps {temp / 1e9:.3f} GB, moved at most {moved / 1e9:.2f} GB"
            if target == "NVIDIA H200":
                per_logit, spilled = instructions(folder, work)
                ok &= not spilled and len(per_logit) == len(work.most_instructions)
                ok &= all(found <= most for found, most in zip(per_logit, work.most_instructions, strict=False))
                row["instructions"] = per_logit
                shown += f", instructions {' + '.join(map(str, per_logit))} for a logit"
            failed += not ok
            rows.append({**row, "compiler_bytes": cost.get("bytes accessed")})
            print(f"{name}, {target}: {shown} {'' if ok else 'TOO MUCH'}", flush=True)
    return rows, failed


if __name__ == "__main__":
    sys.exit(main())
