"""`python -m benchmarks.log_probabilities`: by how much log-probabilities differ between two ways to compute them.

A trainer and a sampler that share their parameters still differ in the last digits: by the shape of a batch, by blocks,
by devices, by dtypes. The numbers go to benchmarks/results and from there to the page on log-probabilities.
"""

import argparse
import functools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

import jsoftmax
from benchmarks.harness import RESULTS
from jsoftmax.testing import float64

ROWS, FEATURES, CLASSES = 512, 256, 32_768
FEW = 8  # rows of the batch in a batch of their own
DEVICES = 8

Ways = dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]]


def linear(features: jax.Array, kernel: jax.Array, labels: jax.Array, **options) -> jax.Array:
    return jsoftmax.linear_softmax_statistics(features, kernel, labels, **options).log_prob


def dense(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """With logits in float32."""
    return jsoftmax.softmax_statistics(features.astype(jnp.float32) @ kernel, labels).log_prob


def rounded_logits(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """What a model whose logits are bfloat16 has."""
    logits = jnp.matmul(features, kernel.astype(features.dtype), preferred_element_type=jnp.float32)
    return jsoftmax.softmax_statistics(logits.astype(jnp.bfloat16), labels).log_prob


def few(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return linear(features[:FEW], kernel, labels[:FEW])


def over_devices(features: jax.Array, kernel: jax.Array, labels: jax.Array, classes: bool) -> jax.Array:
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    specs = (P(), P(None, "x"), P()) if classes else (P("x"), P(), P("x"))
    call = functools.partial(linear, axis_name="x") if classes else linear
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P() if classes else P("x"))(
        features, kernel, labels
    )


def ways(block_size: int) -> Ways:
    """Each beside the linear loss in one block."""
    return {
        "dense": dense,
        "eight blocks": functools.partial(linear, block_size=block_size),
        f"{FEW} of the rows alone": few,
        f"classes over {DEVICES} devices": functools.partial(over_devices, classes=True),
        f"rows over {DEVICES} devices": functools.partial(over_devices, classes=False),
        'precision="highest"': functools.partial(linear, precision="highest"),
        "bfloat16 logits": rounded_logits,
    }


def run(rows: int = ROWS, features: int = FEATURES, classes: int = CLASSES) -> dict:
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (rows, features))
    w = jax.random.normal(keys[1], (features, classes)) * 2 * features**-0.5  # logits of a deviation of 2
    labels = jax.random.categorical(keys[2], h @ w)
    whole, found = functools.partial(linear, block_size=rows), []
    for dtype in (jnp.float32, jnp.bfloat16):
        # The kernel of a bfloat16 model is kept in float32, as its optimizer has it.
        arrays = h.astype(dtype), w, labels
        with float64():
            exact = np.asarray(jax.jit(whole)(*(jnp.asarray(a, jnp.float64) for a in arrays[:2]), labels))
        base = np.asarray(jax.jit(whole)(*arrays))
        for name, way in {"linear, one block": whole, **ways(rows // 8)}.items():
            found.append(row(name, dtype, np.asarray(jax.jit(way)(*arrays)), base, exact))
    facts = {"jax": jax.__version__, "platform": jax.default_backend(), "rows": rows, "features": features}
    return {**facts, "classes": classes, "deviation": round(float(np.std(base)), 2), "found": found}


def row(name: str, dtype, actual: np.ndarray, base: np.ndarray, exact: np.ndarray) -> dict:
    base, exact = base[: len(actual)], exact[: len(actual)]
    return {
        "way": name,
        "dtype": jnp.dtype(dtype).name,
        "from_linear": float(f"{np.abs(actual - base).max():.2g}"),
        "same_bits": round(float((actual == base).mean()), 3),
        "from_float64": float(f"{np.abs(actual - exact).max():.2g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.log_probabilities", description=__doc__)
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)  # of what it splits over devices
    results = run()
    for found in results["found"]:
        print(*found.values(), sep="\t")
    if not arguments.no_save:
        (RESULTS / "log-probabilities.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
