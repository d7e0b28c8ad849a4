"""A row-wise loss in blocks, and its two ways to be differentiated, over the same loop:

- a single sum: pull back 1 through each block as soon as its value is known, and add up. The backward pass only scales.
- results per row: their cotangents come later, so that the backward pass runs each block again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._blocks.loops import over_blocks
from jsoftmax._blocks.row_sharding import RowSharding
from jsoftmax._blocks.split import Tree, even_size, row_count
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.shards import UNSPLIT, ClassShards
from jsoftmax._rows.varying import axes_of, defvjp, vary_floats


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A row-wise loss and the blocks to take it in.

    `loss(dtypes, params, rows)` returns a value to differentiate and auxiliary results, which are not. It gets the
    floating-point parameters widened to float32 at least, so that the gradients of a block come out in that precision,
    and the dtypes that they had. XLA sees the widening undone and drops both.
    """

    loss: Callable[[tuple, Tree, Tree], Tree]
    block_size: int
    derivative: str = "vjp"
    shards: ClassShards = UNSPLIT  # over which the result is the same
    row_sharding: RowSharding | None = None

    def apply(self, params: Tree, rows: Tree, active: Array | None = None) -> tuple[Tree, Tree]:
        if self.row_sharding is not None:
            here = dataclasses.replace(self, row_sharding=None)
            results = jax.eval_shape(self.evaluate_block, params, rows)
            return self.row_sharding.run(here.apply, params, (rows, active), results)
        count = row_count(rows)
        # So that their gradient is summed over devices once, and not for each block.
        params = vary_floats(params, axes_of(rows) - set(self.shards.names))
        plan = dataclasses.replace(self, block_size=even_size(count, self.block_size))
        value, aux = jax.eval_shape(self.evaluate_block, params, rows)
        _check_results("the result of loss", value, count)
        _check_results("aux of loss", aux, count)
        if self.derivative == "jvp":  # a loop whose end is traced has no reverse mode
            return _values(jax.checkpoint(plan.evaluate_block), plan, params, rows, None)
        if jax.tree.structure(value) == jax.tree.structure(0) and not value.shape:
            return _sum(plan, params, rows, active)
        return _per_row(plan, params, rows, active)

    def evaluate_block(self, params: Tree, rows: Tree) -> tuple[Tree, Tree]:
        dtypes, wide = _widened(params)
        value, aux = self.loss(dtypes, wide, rows)
        return value, lax.stop_gradient(aux)


def _check_results(name: str, results: Tree, count: int) -> None:
    for result in jax.tree.leaves(results):
        if result.shape and result.shape[0] != count:
            raise ValueError(
                f"{name} has shape {result.shape} for {count} rows; it needs one entry a row, or a scalar, their sum"
            )


def _widened(params: Tree) -> tuple[tuple, Tree]:
    dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(params))
    wide = jax.tree.map(lambda leaf: leaf.astype(compute_dtype(leaf.dtype)) if _is_float(leaf) else leaf, params)
    return dtypes, wide


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _floats(tree: Tree) -> tuple[list[Array], Callable[..., Tree]]:
    """The floating-point leaves, and a function that puts such leaves back beside the others (or beside None)."""
    leaves, structure = jax.tree.flatten(tree)

    def put_back(floats: list[Array], keep_others: bool = True) -> Tree:
        rest = iter(floats)
        return structure.unflatten(
            [next(rest) if _is_float(leaf) else leaf if keep_others else None for leaf in leaves]
        )

    return [leaf for leaf in leaves if _is_float(leaf)], put_back


def _gradients(
    plan: Blocks, params: Tree, rows: Tree, active: Array | None, cotangents: list[Array] | None
) -> tuple[tuple[Tree, Tree], Tree, Tree]:
    """Value and auxiliary results, and the cotangents of params (in float32 at least) and of rows, None for integers.

    `cotangents` belong to the floating-point leaves of the value; None stands for ones.
    """
    dtypes, wide = _widened(params)
    _, put_params = _floats(wide)

    def step(total: list[Array] | None, block: tuple[Tree, list[Array] | None]):
        block_rows, block_cotangents = block
        # Once more, inside the loop: XLA for GPUs sees only there that it is undone, and else keeps the wide copy.
        param_floats = _floats(_widened(params)[1])[0]
        row_floats, put_rows = _floats(block_rows)

        def evaluate(param_floats, row_floats):
            value, aux = plan.loss(dtypes, put_params(param_floats), put_rows(row_floats))
            return _floats(value)[0], (value, lax.stop_gradient(aux))

        floats, pull, results = jax.vjp(evaluate, param_floats, row_floats, has_aux=True)
        ones = jax.tree.map(jnp.ones_like, floats)
        params_bar, rows_bar = pull(ones if block_cotangents is None else block_cotangents)
        total = params_bar if total is None else [a + b for a, b in zip(total, params_bar, strict=True)]
        return total, (results, put_rows(rows_bar, keep_others=False))

    total, (results, rows_bar) = over_blocks(step, (rows, cotangents), plan.block_size, active)
    return results, put_params(total, keep_others=False), rows_bar


def _values(evaluate: Callable, plan: Blocks, params: Tree, rows: Tree, active: Array | None) -> Any:
    """`evaluate(params, block)` for every block, joined."""
    return over_blocks(lambda total, block: ((), evaluate(params, block)), rows, plan.block_size, active)[1]


def _as(bars: Tree, primals: Tree, scale: Array | None = None) -> Tree:
    """Cotangents in the dtypes of what they belong to."""

    def cast(primal: Array | None, bar: Array | None) -> Array | None:
        if primal is None or bar is None:
            return None
        return (bar if scale is None else bar * scale.astype(bar.dtype)).astype(primal.dtype)

    return jax.tree.map(cast, primals, bars, is_leaf=lambda leaf: leaf is None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(plan: Blocks, params: Tree, rows: Tree, active: Array | None) -> tuple[Array, Tree]:
    return _values(plan.evaluate_block, plan, params, rows, active)


def _sum_fwd(plan: Blocks, params: Tree, rows: Tree, active: Array | None):
    results, params_bar, rows_bar = _gradients(plan, params, rows, active, None)
    return results, (params, rows, params_bar, rows_bar)


def _sum_bwd(plan: Blocks, residuals, cotangent: tuple[Array, Tree]):
    params, rows, params_bar, rows_bar = residuals
    total_bar = plan.shards.mean(cotangent[0])
    return _as(params_bar, params, total_bar), _as(rows_bar, rows, total_bar), None


defvjp(_sum, _sum_fwd, _sum_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_row(plan: Blocks, params: Tree, rows: Tree, active: Array | None) -> tuple[Tree, Tree]:
    return _values(plan.evaluate_block, plan, params, rows, active)


def _per_row_fwd(plan: Blocks, params: Tree, rows: Tree, active: Array | None):
    # Through the forward rule of the loss, which forward mode can differentiate again; the loss itself it may not.
    def evaluate(params: Tree, block: Tree) -> tuple[Tree, Tree]:
        of_params, of_rows = _floats(params), _floats(block)

        def rule(param_floats, row_floats):
            value, aux = plan.evaluate_block(of_params[1](param_floats), of_rows[1](row_floats))
            return _floats(value)[0], (value, aux)

        return jax.vjp(rule, of_params[0], of_rows[0], has_aux=True)[2]

    return _values(evaluate, plan, params, rows, active), (params, rows, active)


def _per_row_bwd(plan: Blocks, residuals, cotangent: tuple[Tree, Tree]):
    params, rows, active = residuals
    floats = [leaf for leaf in jax.tree.leaves(cotangent[0]) if leaf.dtype != jax.dtypes.float0]
    _, params_bar, rows_bar = _gradients(plan, params, rows, active, floats)
    return _as(params_bar, params), _as(rows_bar, rows), None


defvjp(_per_row, _per_row_fwd, _per_row_bwd)
