"""Any row-wise loss, a block of rows at a time, so that what it makes for each row exists for one block only.

A loss is row-wise if the rows do not speak to each other: its result for some rows is their results side by side, or
summed. Two ways to differentiate it follow, over the same scan:

- a single sum: pull back 1 through each block as soon as its value is known, and add up. The backward pass only scales.
- results per row: their cotangents come later, so that the backward pass runs each block again.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jsoftmax._blocks.split import Tree, even_size, in_blocks, joined, row_count, split
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.options import DERIVATIVES
from jsoftmax._rows.shards import UNSPLIT, ClassShards, vary_as

DEFAULT_BLOCK_SIZE = 1024


def blockwise(
    loss: Callable[[Tree, Tree], Tree], *, block_size: int | None = None, derivative: str = "vjp"
) -> Callable[[Tree, Tree], Tree]:
    r"""The same loss, computed block of rows by block of rows.

    .. math:: \mathrm{loss}(\mathrm{params}, \mathrm{rows}) = \sum_b \mathrm{loss}(\mathrm{params}, \mathrm{rows}_b)
        \quad\text{or}\quad \mathrm{concatenate}_b\ \mathrm{loss}(\mathrm{params}, \mathrm{rows}_b)

    For losses whose intermediate results are far larger than their inputs: the logits of a language model, of two of
    them (distillation), or of a policy and its reference. Nothing is padded; a ragged end is a smaller block.

    Args:
        loss: a function of `(params, rows)`. `params` is any pytree; `rows` a pytree of arrays with one leading axis in
            common. It returns arrays with one entry a row, or scalars that are *sums* over rows (a mean is not), in any
            pytree. It must not close over traced values: pass them in `params`.
        block_size: rows at a time; None for 1024.
        derivative: "vjp" for reverse mode and forward over reverse; "jvp" for every mode, by `jax.checkpoint` of each
            block.

    Returns:
        A function of `(params, rows)`. A result that is one scalar has its gradients formed in the forward pass, so
        that nothing is computed twice; any other result runs each block once more in the backward pass.

    Raises:
        ValueError: block_size below 1, rows without a common leading axis, or a result that is neither kind.

    Derivatives: with respect to every floating-point leaf of `params` and `rows`. Gradients of `params` add up in
    float32 at least. Memory: one block's intermediate results, and one float32 copy of the gradient of `params`.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> def distill(params, rows):  # a student's head learns from a teacher's
        ...     student = jsoftmax.log_softmax(rows["h"] @ params["student"])
        ...     return jsoftmax.kl_divergence(student, jsoftmax.softmax(rows["h"] @ params["teacher"])).sum()
        >>> params = {"student": jnp.zeros((4, 9)), "teacher": jnp.arange(36.0).reshape(4, 9) / 36}
        >>> loss = jsoftmax.blockwise(distill, block_size=2)
        >>> print(f"{loss(params, {'h': jnp.ones((5, 4))}):.4f}")
        0.2007
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    checks.one_of("derivative", derivative, DERIVATIVES)
    plan = Blocks(_Narrowing(loss), block_size or DEFAULT_BLOCK_SIZE, derivative)

    def apply(params: Tree, rows: Tree) -> Tree:
        params, rows = jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, rows)
        return plan.apply(vary_as(params, *jax.tree.leaves(rows)), rows)

    return apply


@dataclasses.dataclass(frozen=True)
class _Narrowing:
    """A loss whose parameters come in float32 and are used in their own dtype."""

    loss: Callable[[Tree, Tree], Tree]

    def __call__(self, dtypes: tuple, params: Tree, rows: Tree) -> Tree:
        leaves, tree = jax.tree.flatten(params)
        narrow = [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
        return self.loss(tree.unflatten(narrow), rows)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A row-wise loss and the blocks to take it in.

    `loss(dtypes, params, rows)` gets the floating-point parameters widened to float32 at least, so that the gradients
    of a block come out in that precision, and the dtypes that they had. XLA sees the widening undone and drops both.
    """

    loss: Callable[[tuple, Tree, Tree], Tree]
    block_size: int
    derivative: str = "vjp"
    shards: ClassShards = UNSPLIT  # over which the result is the same

    def apply(self, params: Tree, rows: Tree) -> Tree:
        count = row_count(rows)
        plan = dataclasses.replace(self, block_size=even_size(count, self.block_size))
        results = jax.eval_shape(self.evaluate_block, params, rows)
        for result in jax.tree.leaves(results):
            if result.shape and result.shape[0] != count:
                raise ValueError(
                    f"loss returned shape {result.shape} for {count} rows; it needs one entry a row, or a scalar"
                )
        if self.derivative == "jvp":
            return in_blocks(jax.checkpoint(plan.evaluate_block), plan.block_size, params, rows)
        if jax.tree.structure(results) == jax.tree.structure(0) and not results.shape:
            return _sum(plan, params, rows)
        return _per_row(plan, params, rows)

    def evaluate_block(self, params: Tree, rows: Tree) -> Tree:
        dtypes, wide = _widened(params)
        return self.loss(dtypes, wide, rows)


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


def _gradients(plan: Blocks, params: Tree, rows: Tree, cotangents: list[Array] | None) -> tuple[Tree, Tree, Tree]:
    """The results, and the cotangents of params (in float32 at least) and of rows, None for integer leaves.

    `cotangents` belong to the floating-point leaves of the results; None stands for ones.
    """
    count = row_count(rows)
    dtypes, wide = _widened(params)
    wide_floats, put_params = _floats(wide)

    def of_block(block):
        block_rows, block_cotangents = block
        # Once more, inside the loop: XLA for GPUs sees only there that it is undone, and else keeps the wide copy.
        param_floats = _floats(_widened(params)[1])[0]
        row_floats, put_rows = _floats(block_rows)

        def evaluate(param_floats, row_floats):
            results = plan.loss(dtypes, put_params(param_floats), put_rows(row_floats))
            return _floats(results)[0], results

        floats, pull, results = jax.vjp(evaluate, param_floats, row_floats, has_aux=True)
        ones = jax.tree.map(jnp.ones_like, floats)
        params_bar, rows_bar = pull(ones if block_cotangents is None else block_cotangents)
        return results, params_bar, put_rows(rows_bar, keep_others=False)

    def step(total, block):
        results, params_bar, rows_bar = of_block(block)
        return [a + b for a, b in zip(total, params_bar, strict=True)], (results, rows_bar)

    whole, rest = split((rows, cotangents), count, plan.block_size)
    if count and count % plan.block_size == 0:
        total, last = [jnp.zeros_like(leaf) for leaf in wide_floats], (None, None)
    else:
        results, total, rows_bar = of_block(rest)
        last = results, rows_bar
    if count < plan.block_size:
        return last[0], put_params(total, keep_others=False), last[1]
    total, (results, rows_bar) = lax.scan(step, total, whole)
    return joined(results, last[0]), put_params(total, keep_others=False), joined(rows_bar, last[1])


def _as(bars: Tree, primals: Tree, scale: Array | None = None) -> Tree:
    """Cotangents in the dtypes of what they belong to."""

    def cast(primal: Array | None, bar: Array | None) -> Array | None:
        if primal is None or bar is None:
            return None
        return (bar if scale is None else bar * scale.astype(bar.dtype)).astype(primal.dtype)

    return jax.tree.map(cast, primals, bars, is_leaf=lambda leaf: leaf is None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(plan: Blocks, params: Tree, rows: Tree) -> Array:
    return in_blocks(plan.evaluate_block, plan.block_size, params, rows)


def _sum_fwd(plan: Blocks, params: Tree, rows: Tree):
    total, params_bar, rows_bar = _gradients(plan, params, rows, None)
    return total, (params, rows, params_bar, rows_bar)


def _sum_bwd(plan: Blocks, residuals, total_bar: Array):
    params, rows, params_bar, rows_bar = residuals
    total_bar = plan.shards.mean(total_bar)
    return _as(params_bar, params, total_bar), _as(rows_bar, rows, total_bar)


_sum.defvjp(_sum_fwd, _sum_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_row(plan: Blocks, params: Tree, rows: Tree) -> Tree:
    return in_blocks(plan.evaluate_block, plan.block_size, params, rows)


def _per_row_fwd(plan: Blocks, params: Tree, rows: Tree):
    # Through the forward rule of the loss, which forward mode can differentiate again; the loss itself it may not.
    def evaluate(params: Tree, block: Tree) -> Tree:
        of_params, of_rows = _floats(params), _floats(block)

        def rule(param_floats, row_floats):
            results = plan.evaluate_block(of_params[1](param_floats), of_rows[1](row_floats))
            return _floats(results)[0], results

        return jax.vjp(rule, of_params[0], of_rows[0], has_aux=True)[2]

    return in_blocks(evaluate, plan.block_size, params, rows), (params, rows)


def _per_row_bwd(plan: Blocks, residuals, cotangent: Tree):
    params, rows = residuals
    floats = [leaf for leaf in jax.tree.leaves(cotangent) if leaf.dtype != jax.dtypes.float0]
    _, params_bar, rows_bar = _gradients(plan, params, rows, floats)
    return _as(params_bar, params), _as(rows_bar, rows)


_per_row.defvjp(_per_row_fwd, _per_row_bwd)
