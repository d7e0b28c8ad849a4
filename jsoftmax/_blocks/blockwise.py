"""Any row-wise loss, a block of rows at a time, so that what it makes for each row exists for one block only.

A loss is row-wise if the rows do not speak to each other: its result for some rows is their results side by side, or
summed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, Sharding
from jax.typing import ArrayLike

from jsoftmax._blocks.blocks import Blocks
from jsoftmax._blocks.row_sharding import checked_row_sharding
from jsoftmax._blocks.split import Tree, row_count
from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import DERIVATIVES

DEFAULT_BLOCK_SIZE = 1024


def blockwise(
    loss: Callable[[Tree, Tree], Tree],
    *,
    has_aux: bool = False,
    block_size: int | None = None,
    derivative: str = "vjp",
) -> Callable[..., Tree]:
    r"""The same loss, computed block of rows by block of rows.

    .. math:: \mathrm{loss}(\mathrm{params}, \mathrm{rows}) = \sum_b \mathrm{loss}(\mathrm{params}, \mathrm{rows}_b)
        \quad\text{or}\quad \mathrm{concatenate}_b\ \mathrm{loss}(\mathrm{params}, \mathrm{rows}_b)

    For losses whose intermediate results are far larger than their inputs: the logits of a language model, of two of
    them (distillation), or of a policy and its reference. Nothing is padded; a ragged end is a smaller block.

    Args:
        loss: a function of `(params, rows)`. `params` is any pytree; `rows` a pytree of arrays with one leading axis in
            common. It returns arrays with one entry a row, or scalars that are *sums* over rows (a mean is not), in any
            pytree. It must not close over traced values: pass them in `params`.
        has_aux: whether the loss returns a pair `(value, aux)`. Only the value is differentiated; `aux` is a pytree of
            arrays with one entry a row or of sums over rows, metrics say, and costs no product more.
        block_size: rows at a time; None for 1024.
        derivative: "vjp" for reverse mode and forward over reverse; "jvp" for every mode, by `jax.checkpoint` of each
            block.

    Returns:
        A function of `(params, rows, active=None, *, row_sharding=None)`. A result that is one scalar has its gradients
        formed in the forward pass, so that nothing is computed twice; any other result runs each block once more in the
        backward pass. So add several losses up, each with its weight, and give them one by one in `aux`.

        `active` is boolean, one a row: the rows that count. The others are sorted behind them and, but for less than a
        quarter of a block, not computed: their entries in results and gradients are 0. What they would add to a sum
        must be 0 too, since some of them are computed. With "jvp", all are.

        `row_sharding` is how XLA splits the rows over devices, as in `linear_softmax_cross_entropy`.

    Raises:
        ValueError: block_size below 1, rows without a common leading axis, a result or aux that is neither kind, or
            no pair with `has_aux`.

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

    # Of this function, so that its programs live as long as it does.
    @functools.partial(jax.jit, static_argnums=0)
    def run(blocks: Blocks, params: list[Array], rows: Tree, active: Array | None) -> tuple[Tree, Tree]:
        return blocks.apply(params, rows, active)

    @in_any_layout("rows")
    def apply(
        params: Tree,
        rows: Tree,
        active: ArrayLike | None = None,
        *,
        row_sharding: Sharding | PartitionSpec | None = None,
    ) -> Any:
        leaves, tree = jax.tree.flatten(params)
        arrays = [jnp.asarray(leaf) for leaf in leaves if _is_numeric(leaf)]
        others = tuple(_ARRAY if _is_numeric(leaf) else leaf for leaf in leaves)
        rows = jax.tree.map(jnp.asarray, rows)
        if active is not None:
            active = checks.bool_array("active", active)
            checks.has_shape("active", active, (row_count(rows),), "True for a row that counts")
        split = checked_row_sharding(row_sharding, (row_count(rows),))
        narrowing = _Narrowing(loss, has_aux, tree, others)
        blocks = Blocks(narrowing, block_size or DEFAULT_BLOCK_SIZE, derivative, row_sharding=split)
        value, aux = run(blocks, arrays, rows, active)
        return (value, aux) if has_aux else value

    return apply


_ARRAY = object()


def _is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float)


@dataclasses.dataclass(frozen=True)
class _Narrowing:
    """A loss whose parameters come in float32 and are used in their own dtype, and in their places in a tree."""

    loss: Callable[[Tree, Tree], Tree]
    has_aux: bool
    tree: Any
    others: tuple  # leaves of the tree, and `_ARRAY` in the place of each array

    def __call__(self, dtypes: tuple, params: list[Array], rows: Tree) -> tuple[Tree, Tree]:
        narrow = iter([leaf.astype(dtype) for leaf, dtype in zip(params, dtypes, strict=True)])
        given = self.tree.unflatten([next(narrow) if leaf is _ARRAY else leaf for leaf in self.others])
        out = self.loss(given, rows)
        if not self.has_aux:
            return out, ()
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"loss returned {type(out).__name__}, but with has_aux=True needs a pair (value, aux)")
        return out
