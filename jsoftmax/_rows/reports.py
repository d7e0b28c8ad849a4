"""Bad values, reported under `checkify.checkify` and passed over everywhere else.

`checkify.debug_check` would do, but for the effect it leaves in every program, which `jax.export` then refuses to
serialize. So this is a primitive of its own: the identity on a mask of idle rows, for which checkify alone has a rule.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
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


batching.primitive_batchers[_report] = _batch


def _let_checkify_report(report: Primitive) -> bool:
    """Whether it could: checkify's rules have no public registry, and where JAX has moved it nothing is reported."""
    try:
        from jax._src.checkify import FailedCheckError, assert_func, error_checks, get_traceback
    except ImportError:
        return False

    def check(*arguments, message):
        # JAX 0.12 puts a context in front of the error.
        *context, error, enabled, idle, bad, numbers, shown = arguments
        if FailedCheckError in enabled:
            bad = bad & ~idle
            first = jnp.argmax(bad)
            number = numbers.ravel()[first]
            row = jnp.where(number == _UNNUMBERED, first, number)
            failure = FailedCheckError(get_traceback(), message, row=row, shown=shown.ravel()[first])
            add: Any = assert_func
            error = add(*context, error, jnp.any(bad), failure)
        return error, idle

    error_checks[report] = check
    return True


can_report = _let_checkify_report(_report)
