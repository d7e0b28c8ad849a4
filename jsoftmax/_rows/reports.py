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

from jsoftmax._rows.rows import Rows


def report_values(rows: Rows, idle: Array, numbers: Array | None) -> Array:
    """`idle` (*batch,), carrying a report of the first other row that holds NaN or a label that is no class.

    `numbers` are what rows are called; None for their flat indices.
    """
    if rows.logits.size == 0:
        return idle
    mask = rows.transform.where
    holds_nan = jnp.isnan(rows.logits) if mask is None else jnp.isnan(rows.logits) & mask
    idle = report_rows("logits of row {row} hold NaN", jnp.any(holds_nan, axis=-1), idle, numbers)
    labels = rows.integer_labels
    if labels is None:
        return idle
    message = f"label {{shown}} of row {{row}} is none of {rows.classes} classes"
    return report_rows(message, ~rows.is_class(labels), idle, numbers, labels)


def report_rows(
    message: str, bad: Array, idle: Array, numbers: Array | None = None, shown: Array | None = None
) -> Array:
    """`idle` (*batch,), carrying a report of the first other row that is `bad`.

    The message may name the `{row}`, and the `{shown}` integer of that row.
    """
    if bad.size == 0:
        return idle
    if numbers is None:
        numbers = jnp.full(idle.shape, _UNNUMBERED)
    return _report.bind(idle, bad, numbers, numbers if shown is None else shown, message=message)


_UNNUMBERED = -1  # such a row is called by its flat index, which vmap extends
_report = Primitive("report_rows")
_report.def_impl(lambda idle, bad, numbers, shown, message: idle)
_report.def_abstract_eval(lambda idle, bad, numbers, shown, message: idle)
mlir.register_lowering(_report, lambda context, idle, bad, numbers, shown, message: [idle])


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
    *context, error, enabled, idle, bad, numbers, shown = arguments
    if _checkify.FailedCheckError in enabled:
        bad = bad & ~idle
        first = jnp.argmax(bad)
        number = numbers.ravel()[first]
        row = jnp.where(number == _UNNUMBERED, first, number)
        values = {"row": row, "shown": shown.ravel()[first]}
        failure = _checkify.FailedCheckError(_checkify.get_traceback(), message, **values)
        add: Any = _checkify.assert_func
        error = add(*context, error, jnp.any(bad), failure)
    return error, idle


batching.primitive_batchers[_report] = _batch
_checkify.error_checks[_report] = _check
