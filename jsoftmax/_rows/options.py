"""Options of all that takes logits, each checked here and nowhere else; those of losses are in `row_losses.py`."""

from typing import TypedDict

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.axes import Axis, batch_shape, classes_last, normalize_axes
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.logits import Transform
from jsoftmax._rows.platforms import IMPLEMENTATIONS
from jsoftmax._rows.rows import Rows
from jsoftmax._rows.shards import AxisName, class_shards
from jsoftmax._rows.support import in_support
from jsoftmax._rows.varying import varying

DERIVATIVES = ("vjp", "jvp")


class LogitOptions(TypedDict, total=False):
    """Options of everything that takes logits.

    temperature: divides the logits; a float, a traced scalar or one number a row; differentiable. 0 is the limit in
        which a row's largest logits share all probability.
    softcap: bounds the logits beforehand, `softcap * tanh(logits / softcap)`, as Gemma 2 does; differentiable.
    derivative: "vjp" (the default) has reverse mode and forward over reverse; "jvp" has every mode and order. Both
        save the same; the second takes more time, and with several options more temporary memory.
    implementation: None chooses by the platform the program is compiled for; "cpu", "gpu" or "tpu" forces that form.
        "accelerator" is the old name of "gpu".
    axis_name: inside `shard_map`, the mesh axis (or axes) over which the classes are split. Whatever has one entry a
        class is then this device's stretch of it; integer labels number the classes of all; results are the same on
        all devices.
    """

    temperature: ArrayLike
    softcap: ArrayLike | None
    derivative: str
    implementation: str | None
    axis_name: AxisName


class SupportOptions(LogitOptions, total=False):
    """Options of what asks for the distribution of a draw: which classes of a row could be drawn.

    They act in this order, after `where`, soft cap and temperature, as in `categorical.sample`. What they keep is a
    constant to derivatives.

    support: integers `(*batch, k)`, the only classes that take part, such as a sampler stored them; a place that holds
        no class, such as −1, is unused. A row all of whose places are is one whose classes are all masked.
    top_k: k ≥ 1, an integer or one a row: classes with fewer than k above them.
    top_p: P in [0, 1], a number or one a row: classes above which the others of what is left hold less than P.
    min_p: the least probability that is kept, as a share of the largest, in [0, 1]; a number or one a row.
    """

    support: ArrayLike | None
    top_k: ArrayLike | None
    top_p: ArrayLike | None
    min_p: ArrayLike | None


def logit_transform(where: Array | None, options: LogitOptions, batch: tuple[int, ...], dtype) -> Transform:
    """The `Transform` of checked options; what is known to change nothing is left out."""
    softcap, temperature = options.get("softcap"), options.get("temperature", 1.0)
    may_freeze = False
    if softcap is not None:
        checks.within("softcap", softcap, float(jnp.finfo(dtype).tiny), float("inf"))
        softcap = jnp.asarray(softcap, dtype)
        checks.has_shape("softcap", softcap, (), "one number")
    if checks.is_known(temperature, 1.0):
        temperature = None
    else:
        checks.within("temperature", temperature, 0.0, float("inf"))
        may_freeze = not checks.known(temperature) or bool(np.any(np.asarray(temperature) == 0))
        temperature = checks.scalar_or_rows("temperature", jnp.asarray(temperature, dtype), batch)
        temperature = jnp.broadcast_to(temperature, batch)[..., None]
    return Transform(where, softcap, temperature, may_freeze=may_freeze)


def checked_rows(
    logits: ArrayLike,
    labels: ArrayLike | None,
    axis: Axis,
    where: ArrayLike | None,
    options: LogitOptions | SupportOptions,
) -> Rows:
    """Logits, labels and options as the engines take them: classes in the last axis, those ruled out masked."""
    logits = checks.float_array("logits", logits)
    if logits.ndim == 0:
        raise ValueError("logits has shape (), but needs at least one dimension: the classes")
    axes = normalize_axes(axis, logits.ndim)
    batch = batch_shape(logits.shape, axes)
    checks.one_of("derivative", options.get("derivative", "vjp"), DERIVATIVES)
    checks.one_of("implementation", options.get("implementation"), (None, *IMPLEMENTATIONS))
    if labels is not None:
        labels = _checked_labels(jnp.asarray(labels), logits, axes, batch)
    if where is not None:
        where = checks.bool_array("where", where)
        if where.ndim != logits.ndim and where.shape == batch:
            where = jnp.expand_dims(where, axes)
        try:
            where = jnp.broadcast_to(where, logits.shape)
        except ValueError:
            needs = f"{batch} or what broadcasts to {logits.shape}"
            raise ValueError(
                f"where has shape {where.shape}, but needs {needs}: True for a class that takes part"
            ) from None
        where = classes_last(where, axes)
    transform = logit_transform(where, options, batch, compute_dtype(logits.dtype))
    shards = class_shards(options.get("axis_name"))
    if shards.names and shards.are_typed and not varying(logits) >= set(shards.names):
        raise ValueError(
            f"logits varies over the mesh axes {sorted(varying(logits))}, but axis_name={shards.names} says that its "
            "classes are split over those; name them in in_specs"
        )
    return in_support(Rows(classes_last(logits, axes), labels, transform, shards=shards), options)


def _checked_labels(labels: Array, logits: Array, axes: tuple[int, ...], batch: tuple[int, ...]) -> Array:
    if jnp.issubdtype(labels.dtype, jnp.integer):
        checks.has_shape("labels", labels, batch, "one class number for each row of logits")
        return checks.integer_array("labels", labels)
    labels = checks.float_array("labels", labels)
    checks.has_shape("labels", labels, logits.shape, "one probability for each logit")
    return classes_last(labels, axes).astype(compute_dtype(logits.dtype))
