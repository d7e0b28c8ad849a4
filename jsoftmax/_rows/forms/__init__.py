"""What is computed in another way on another machine, in the same functions a file:

    row_state(rows, empty, exact, capped, alone)    the largest logit of each row, and UNIT times the others'
                                                    exponentials' sum
    exponentials(z, maximum)                        UNIT · e^(z − maximum)
    shares(z, maximum, others, exact, rounded)      the probabilities, in units and as they are
    place_label(rows, entries, labels)              rows with the entries at their labels set, if these are classes

`exact` is `Rows.has_exact_differences`, `capped` whether there is a soft cap, `alone` whether nothing else of the
program needs the exponentials or has a place for them, `rounded` whether p is exact in that sense, and a product with
it rounded to 16 bits. Another form is another file and a name below. Each is the worst choice on the others' machine
(docs/architecture.md). The functions here take the form that suits the machine that the program is compiled for, or
the one that is named.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._rows.forms import cpu, gpu, partitioned, tpu
from jsoftmax._rows.platforms import FORMS, choose
from jsoftmax._rows.rows import Rows

FILES = {"cpu": cpu, "partitioned": partitioned, "gpu": gpu, "tpu": tpu}


@functools.cache
def _forms(function: str, *known: Any) -> list[Callable]:
    """`function` of each form, its last arguments given. The same objects each time, by which JAX knows a program."""

    def of(form: str) -> Callable:
        bare = getattr(FILES[form], function)
        return lambda *operands: bare(*operands, *known)

    return [of(form) for form in FORMS]


def row_state(rows: Rows, empty: Array | None, implementation: str | None, alone: bool) -> tuple[Array, Array]:
    # What acts on the logits may sum over shards, which only a program that is traced can; and it fuses.
    bare = Rows(rows.logits if rows.transform.is_identity else rows.z())
    like = jnp.sum(bare.logits[..., :0], axis=-1, dtype=rows.dtype)
    # A gradient in 16 bits has no place for exponentials in 32: to compute them again costs less than an array of them.
    alone = alone or rows.logits.dtype != rows.dtype
    forms = _forms("row_state", rows.has_exact_differences, rows.transform.softcap is not None, alone)
    return choose(implementation, forms, like, bare, empty, results=2)


def exponentials(z: Array, maximum: Array, implementation: str | None) -> Array:
    return choose(implementation, _forms("exponentials"), z, z, maximum)


def shares(
    z: Array, maximum: Array, others: Array, exact: bool, rounded: bool, implementation: str | None
) -> tuple[Array, Array]:
    return choose(implementation, _forms("shares", exact, rounded), z, z, maximum, others, results=2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def place_label(rows: Array, entries: Array, labels: Array, implementation: str | None) -> Array:
    return choose(implementation, _forms("place_label"), rows, rows, entries, labels)


@place_label.defjvp
def _place_label_jvp(implementation, primals, tangents):
    rows_dot, entries_dot, _ = tangents
    return place_label(*primals, implementation), tpu.place_label(rows_dot, entries_dot, primals[2])


_APART = [lax.optimization_barrier if form == "gpu" else (lambda logits: logits) for form in FORMS]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def apart(logits: Array, implementation: str | None) -> Array:
    """A gradient's own logits: what a soft cap makes of those that two passes share, XLA for GPUs would write out."""
    return choose(implementation, _APART, logits, logits)


@apart.defjvp
def _apart_jvp(implementation, primals, tangents):
    return apart(*primals, implementation), tangents[0]
