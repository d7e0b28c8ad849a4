"""The form of a computation that suits where it will run: known when a program is compiled, not when it is traced."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jsoftmax._rows.varying import axes_of, vary

IMPLEMENTATIONS = ("cpu", "gpu", "tpu", "accelerator")  # the last is another name of "gpu"
FORMS = ("cpu", "partitioned", "gpu", "tpu")


def choose(implementation: str | None, forms: Sequence[Callable], like: Array, *operands: Any, results: int = 1) -> Any:
    """One of the forms of a function, in the order of `FORMS`. Each of its results has the type of `like`.

    "partitioned" is for CPUs too, where XLA splits the arrays of a program over several of them: it takes no slices of
    the class axis, which might be the one that is split. No form is traced but the one that is compiled, which is why
    nothing here can be differentiated: callers have a rule. The operands' first axes are rows, so that `vmap` adds one.
    """
    if implementation is not None:
        return forms[FORMS.index({"accelerator": "gpu"}.get(implementation, implementation))](*operands)
    leaves, tree = jax.tree.flatten(operands)
    flat = tuple(_Flat(form, tree) for form in forms)
    out = _choice.bind(vary(like, axes_of(*leaves)), *leaves, forms=flat, results=results)
    return out[0] if results == 1 else tuple(out)


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A form as a function of leaves. Made of equal parts it is equal, so that JAX knows what it compiled before."""

    form: Callable
    tree: Any

    def __call__(self, *leaves: Array) -> list[Array]:
        out = self.form(*jax.tree.unflatten(self.tree, leaves))
        return list(out) if isinstance(out, tuple) else [out]


_choice = Primitive("choice_of_form")
_choice.multiple_results = True
_choice.def_abstract_eval(lambda like, *leaves, forms, results: [like] * results)


@_choice.def_impl
def _run(like: Array, *leaves: Array, forms: tuple, results: int) -> list[Array]:
    return forms[FORMS.index(_form_on(next(iter(like.devices())).platform, False))](*leaves)


def _form_on(platform: str, is_split: bool) -> str:
    if platform == "cpu":
        return "partitioned" if is_split else "cpu"
    # Slices of a class axis that is split over devices would move it.
    return "tpu" if platform == "tpu" or is_split else "gpu"


def _lower_choice(platform: str) -> Callable:
    def lower(context, like, *leaves, forms, results):
        form = forms[FORMS.index(_form_on(platform, _is_split(context)))]
        return mlir.lower_fun(lambda like, *leaves: form(*leaves), multiple_results=True)(context, like, *leaves)

    return lower


mlir.register_lowering(_choice, _lower_choice("gpu"))
mlir.register_lowering(_choice, _lower_choice("cpu"), platform="cpu")
mlir.register_lowering(_choice, _lower_choice("tpu"), platform="tpu")


def _batch_choice(operands, axes, **parameters):
    # Leading axes are rows, to every form.
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if isinstance(axis, int))

    def first(x: Array, axis: int | None) -> Array:
        return jnp.moveaxis(x, axis, 0) if isinstance(axis, int) else jnp.broadcast_to(x, (size, *x.shape))

    out = _choice.bind(*map(first, operands, axes), **parameters)
    return out, [0] * len(out)


batching.primitive_batchers[_choice] = _batch_choice


def is_partitioned() -> Array:
    """Whether XLA splits the arrays of the program over devices, as under `jit` with shardings.

    A constant by the time XLA sees the program, so that a `cond` on it costs nothing. Inside `shard_map` it is False.
    """
    return _is_partitioned.bind()


_is_partitioned = Primitive("is_partitioned")
_is_partitioned.def_impl(lambda: jnp.zeros((), bool))
_is_partitioned.def_abstract_eval(lambda: ShapedArray((), np.dtype(bool)))
mlir.register_lowering(_is_partitioned, lambda context: [mlir.ir_constant(np.array(_is_split(context)))])


def _is_split(context) -> bool:
    axes = context.module_context.axis_context
    if hasattr(axes, "manual_axes"):  # of `shard_map`: what XLA splits is left to the other axes of the mesh
        return math.prod(size for name, size in axes.mesh.shape.items() if name not in axes.manual_axes) > 1
    devices = getattr(axes, "num_devices", 1)
    return devices is not None and devices > 1
