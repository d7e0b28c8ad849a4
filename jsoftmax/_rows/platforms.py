"""The form of a computation that suits where it will run: known when a program is compiled, not when it is traced."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jsoftmax._rows.varying import cond

IMPLEMENTATIONS = ("cpu", "accelerator")


def choose(
    implementation: str | None, *operands: Any, cpu: Callable, accelerator: Callable, partitioned: Callable
) -> Any:
    """One of three forms of the same function, applied to the operands.

    `partitioned` is for CPUs too, where XLA splits the arrays of a program over several of them: it takes no slices
    of the class axis, which might be the one that is split.
    """
    if implementation is not None:
        return {"cpu": cpu, "accelerator": accelerator}[implementation](*operands)

    def on_cpus(*operands: Any) -> Any:
        return cond(is_partitioned(), partitioned, cpu, *operands)

    return lax.platform_dependent(*operands, cpu=on_cpus, default=accelerator)


def is_partitioned() -> Array:
    """Whether XLA splits the arrays of the program over devices, as under `jit` with shardings.

    A constant by the time XLA sees the program, so that a `cond` on it costs nothing. Inside `shard_map` it is False.
    """
    return _is_partitioned.bind()


_is_partitioned = Primitive("is_partitioned")
_is_partitioned.def_impl(lambda: jnp.zeros((), bool))
_is_partitioned.def_abstract_eval(lambda: ShapedArray((), np.dtype(bool)))


def _lower(context):
    # Of the contexts, only that of `jit` has a number of devices; in that of `shard_map` a program is one device's.
    devices = getattr(context.module_context.axis_context, "num_devices", 1)
    return [mlir.ir_constant(np.array(devices is not None and devices > 1))]


mlir.register_lowering(_is_partitioned, _lower)
