"""Bad values, reported under `checkify.checkify` and passed over everywhere else.

`checkify.debug_check` would do, but for the effect it leaves in every program, which `jax.export` then refuses to
serialize. So this is a primitive of its own: the identity on a mask of idle rows, for which checkify alone has a rule.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax._src import checkify as _checkify  # rules of checkify have no public registry
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jsoftmax._labels import is_class


def report_values(logits: Array, labels: Array | None, idle: Array) -> Array:
    """`idle` (*batch,), carrying a report of the first other row that holds NaN or a label that is no class."""
    if logits.size == 0:
        return idle
    classes = logits.shape[-1]
    row_holds_nan = jnp.any(jnp.isnan(logits), axis=-1)
    idle = _report.bind(idle, row_holds_nan, jnp.zeros(idle.shape, jnp.int32), message="logits of row {row} hold NaN")
    if labels is None:
        return idle
    message = f"label {{shown}} of row {{row}} is none of {classes} classes"
    return _report.bind(idle, ~is_class(labels, classes), labels, message=message)


_report = Primitive("report_rows")
_report.def_impl(lambda idle, bad, shown, message: idle)
_report.def_abstract_eval(lambda idle, bad, shown, message: idle)
mlir.register_lowering(_report, lambda context, idle, bad, shown, message: [idle])


def _batch(arguments, dimensions, message):
    pairs = list(zip(arguments, dimensions, strict=True))
    size = next(array.shape[dimension] for array, dimension in pairs if dimension is not None)
    front = [
        jnp.broadcast_to(array, (size, *array.shape)) if dimension is None else jnp.moveaxis(array, dimension, 0)
        for array, dimension in pairs
    ]
    return _report.bind(*front, message=message), 0


def _check(*arguments, message):
    # JAX 0.12 puts a context in front of the error.
    *context, error, enabled, idle, bad, shown = arguments
    if _checkify.FailedCheckError in enabled:
        bad = bad & ~idle
        row = jnp.argmax(bad)
        failure = _checkify.FailedCheckError(_checkify.get_traceback(), message, row=row, shown=shown.ravel()[row])
        add: Any = _checkify.assert_func
        error = add(*context, error, jnp.any(bad), failure)
    return error, idle


batching.primitive_batchers[_report] = _batch
_checkify.error_checks[_report] = _check
