"""Attention block by block: the weights of a query are never in memory all at once.

One block of queries meets one block of keys after another and carries, for each query, the largest logit m so far, the
sum ℓ = Σ e^(z − m) and the sum of values a = Σ e^(z − m)·v. A larger logit rescales both sums. In the end

    output = a / ℓ        weights p = e^(z − m) / ℓ

With the output's cotangent d_o, the derivative needs each block's logits once more and nothing else:

    d_v = pᵀ·d_o        d_p = d_o·vᵀ        d_z = p · (d_p − d_o·output)

Blocks at the end of a length that is no multiple of their size begin early, and what they repeat is masked.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._attention.logits import (
    Numbers,
    Span,
    Visibility,
    block_of,
    combine,
    compare,
    distribute,
    logits_of,
    seen_with,
    unread,
)
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.exponentials import UNIT, exponentials
from jsoftmax._rows.varying import cond, defvjp, scan


class Inputs(NamedTuple):
    """Everything that is differentiated."""

    query: Any  # (batch, groups, heads, queries, width)
    key: Any  # (batch, groups, keys, width)
    value: Any  # (batch, groups, keys, width of values)
    bias: Any  # five axes, or None
    numbers: Numbers


class Block(NamedTuple):
    """What one block of queries and one of keys need."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    seen: Array | None


class Sums(NamedTuple):
    """Of the keys so far, for each query."""

    maximum: Array  # m
    total: Array  # ℓ
    values: Array  # a


def attend_in_blocks(inputs: Inputs, visibility: Visibility, block_size: int, derivative: str) -> Array:
    """The output (batch, groups, heads, queries, width of values) in the query's dtype."""
    if derivative == "vjp":
        return _reverse_mode(block_size, inputs, visibility)
    return _evaluate(block_size, inputs, visibility)[0]


def _span(number: Any, size: int, length: int) -> Span:
    size = min(size, length)
    fresh = None if length % size == 0 else number * size
    return Span(jnp.minimum(number * size, length - size), size, fresh)


def _spans(inputs: Inputs, i: Any, j: Any, size: int) -> tuple[Span, Span]:
    return _span(i, size, inputs.query.shape[3]), _span(j, size, inputs.key.shape[2])


def _counts(inputs: Inputs, size: int) -> tuple[Array, Array]:
    """The numbers of the blocks of queries and of keys."""
    return jnp.arange(-(-inputs.query.shape[3] // size)), jnp.arange(-(-inputs.key.shape[2] // size))


def _block(inputs: Inputs, visibility: Visibility, queries: Span, keys: Span) -> Block:
    query = _part(inputs.query, queries)
    key, value = _part(inputs.key, keys), _part(inputs.value, keys)
    bias = None if inputs.bias is None else block_of(inputs.bias, queries, keys).astype(compute_dtype(query.dtype))
    seen = seen_with(bias, visibility.seen(queries, keys))
    return Block(*unread(query, key, value, seen), bias, seen)


def _part(array: Array, span: Span) -> Array:
    return lax.dynamic_slice_in_dim(array, span.start, span.size, array.ndim - 2)


def _add_part(array: Array, part: Array, starts: dict[int, Any]) -> Array:
    """`array` with `part` added where it starts along some axes."""
    at = [starts[axis] if axis in starts and array.shape[axis] != 1 else 0 for axis in range(array.ndim)]
    at = [jnp.asarray(start, jnp.int32) for start in at]
    return lax.dynamic_update_slice(array, lax.dynamic_slice(array, at, part.shape) + part, at)


def _joined(blocks: Array, length: int) -> Array:
    """Blocks (blocks, batch, groups, heads, size, width) side by side, without what the last one repeats."""
    count, size = blocks.shape[0], blocks.shape[-2]
    rows = jnp.moveaxis(blocks, 0, 3).reshape(*blocks.shape[1:4], count * size, blocks.shape[-1])
    repeated = count * size - length
    if repeated == 0:
        return rows
    last = (count - 1) * size
    return jnp.concatenate([rows[:, :, :, :last], rows[:, :, :, last + repeated :]], axis=3)


def _evaluate(block_size: int, inputs: Inputs, visibility: Visibility) -> tuple[Array, Array, Array]:
    """The output, and m and ℓ of every query."""
    rows, columns = _counts(inputs, block_size)
    dtype = compute_dtype(inputs.query.dtype)

    # Under checkpoint, reverse mode through these loops keeps the sums of one block of queries.
    @jax.checkpoint
    def of_queries(i):
        @jax.checkpoint
        def step(sums, j):
            queries, keys = _spans(inputs, i, j, block_size)
            reached = visibility.reaches(queries, keys)
            return _if(reached, lambda: _merge(inputs.numbers, _block(inputs, visibility, queries, keys), sums), sums)

        shape = (*inputs.query.shape[:3], min(block_size, inputs.query.shape[3]))
        zeros = jnp.zeros(shape, dtype)
        empty = Sums(zeros - jnp.inf, zeros, jnp.zeros((*shape, inputs.value.shape[-1]), dtype))
        sums, _ = scan(lambda sums, j: (step(sums, j), None), empty, columns)
        total = jnp.where(sums.total == 0, 1, sums.total)[..., None]
        return (sums.values / total).astype(inputs.query.dtype), _finite(sums.maximum)[..., None], total

    output, maximum, total = (_joined(blocks, inputs.query.shape[3]) for blocks in lax.map(of_queries, rows))
    return output, maximum, total


def _if(condition: Array | bool, compute, otherwise):
    return compute() if condition is True else cond(condition, compute, lambda: otherwise)


def _finite(maximum: Array) -> Array:
    """0 for a query that sees no key."""
    return jnp.where(jnp.isneginf(maximum), 0, maximum)


def _merge(numbers: Numbers, block: Block, sums: Sums) -> Sums:
    z = logits_of(compare(block.query, block.key), block.bias, numbers, block.seen)
    # The output does not depend on m, so that m may be a constant to derivatives.
    maximum = lax.stop_gradient(jnp.maximum(sums.maximum, jnp.max(z, axis=-1)))
    top = _finite(maximum)
    old = exponentials(sums.maximum, top) / UNIT
    new = exponentials(z, top[..., None]) / UNIT
    total = sums.total * old + jnp.sum(new, axis=-1)
    return Sums(maximum, total, sums.values * old[..., None] + combine(new, block.value))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reverse_mode(block_size: int, inputs: Inputs, visibility: Visibility) -> Array:
    return _evaluate(block_size, inputs, visibility)[0]


def _reverse_mode_fwd(block_size: int, inputs: Inputs, visibility: Visibility):
    output, maximum, total = _evaluate(block_size, inputs, visibility)
    return output, (inputs, visibility, output, maximum, total)


def _reverse_mode_bwd(block_size: int, residuals, output_bar: Array):
    inputs, visibility, output, maximum, total = residuals
    rows, columns = _counts(inputs, block_size)
    dtype = compute_dtype(inputs.query.dtype)
    along = jnp.sum(output_bar.astype(dtype) * output.astype(dtype), axis=-1, keepdims=True)

    def of_queries(bars, i):
        def step(carry, j):
            bars, query_bar = carry
            queries, keys = _spans(inputs, i, j, block_size)

            def compute():
                block = _block(inputs, visibility, queries, keys)
                at_queries = (_part(array, queries) for array in (output_bar, along, maximum, total))
                return _pull_back(inputs.numbers, block, *at_queries)

            zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), jax.eval_shape(compute))
            part = _if(visibility.reaches(queries, keys), compute, zeros)
            bars = Inputs(
                None,
                _add_part(bars.key, part.key, {2: keys.start}),
                _add_part(bars.value, part.value, {2: keys.start}),
                None if part.bias is None else _add_part(bars.bias, part.bias, {3: queries.start, 4: keys.start}),
                jax.tree.map(jnp.add, bars.numbers, part.numbers),
            )
            return (bars, query_bar + part.query), None

        shape = (*inputs.query.shape[:3], min(block_size, inputs.query.shape[3]), inputs.query.shape[4])
        (bars, query_bar), _ = scan(step, (bars, jnp.zeros(shape, dtype)), columns)
        return bars, query_bar.astype(inputs.query.dtype)

    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, dtype), inputs._replace(query=None))
    bars, query_bar = scan(of_queries, zeros, rows)
    bars = bars._replace(query=_joined(query_bar, inputs.query.shape[3]))
    return jax.tree.map(lambda array, bar: bar.astype(array.dtype), inputs, bars), None


defvjp(_reverse_mode, _reverse_mode_fwd, _reverse_mode_bwd)


def _pull_back(numbers: Numbers, block: Block, output_bar: Array, along: Array, maximum: Array, total: Array) -> Inputs:
    """What one block adds to the cotangents."""
    # Cotangents of a mean over many rows are below what float16 can hold.
    dtype = jnp.float32 if block.query.dtype == jnp.float16 else block.query.dtype
    query, key, value = (array.astype(dtype) for array in (block.query, block.key, block.value))
    apply = functools.partial(logits_of, seen=block.seen)
    z, pull = jax.vjp(apply, compare(block.query, block.key), block.bias, numbers)
    p = exponentials(z, maximum) / (UNIT * total)
    output_bar = output_bar.astype(dtype)
    products_bar, bias_bar, numbers_bar = pull(p * (compare(output_bar, value) - along))
    return Inputs(
        combine(products_bar, key), distribute(products_bar, query), distribute(p, output_bar), bias_bar, numbers_bar
    )
