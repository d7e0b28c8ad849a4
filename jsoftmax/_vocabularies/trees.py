"""Binary trees whose leaves are the classes: Huffman's, and any taxonomy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassTree:
    """A binary tree with one class at each leaf, and so one decision fewer than classes; a pytree.

    Made by `huffman_tree`, `nested_tree` and `parent_tree`. Class v is numbered decisions + v among the nodes.

    Attributes:
        path: int32 `(classes, depth)`, the decisions above each class, from the leaf to the root, then zeros.
        turns: int8 `(classes, depth)`, +1 where the path goes to the first child, −1 to the second, 0 past the root.
        children: int32 `(decisions, 2)`, the nodes below each decision.
        root: int32, the node at the top.
    """

    # Any: JAX puts its own objects in the leaves' places when it handles trees.
    path: Array | Any
    turns: Array | Any
    children: Array | Any
    root: Array | Any

    @property
    def classes(self) -> int:
        return self.path.shape[-2]

    @property
    def depth(self) -> int:
        """The most decisions on any path."""
        return self.path.shape[-1]

    @property
    def decisions(self) -> int:
        return self.children.shape[-2]


def huffman_tree(counts: ArrayLike | Sequence[Any]) -> ClassTree:
    r"""The tree with the fewest decisions on average: frequent classes are near the root.

    .. math:: \sum_v c_v \,\mathrm{depth}_v \;\text{is least}, \qquad
        H(p) \le \text{mean depth} < H(p) + 1 \;\text{bits}

    Args:
        counts: numbers `(classes,)` not below 0, whose values are known (not traced).

    Returns:
        A `ClassTree`.

    Raises:
        ValueError: counts of another shape, traced, not finite or below 0.

    Example:
        >>> import jsoftmax
        >>> tree = jsoftmax.huffman_tree([8, 4, 2, 1])
        >>> print((tree.turns != 0).sum(axis=1))
        [1 2 3 3]

    References:
        Huffman, *A Method for the Construction of Minimum-Redundancy Codes*, 1952.
    """
    if not checks.known(counts):
        raise ValueError("counts must be known, got a traced array; make the tree outside of jit and pass it in")
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or counts.size == 0:
        raise ValueError(f"counts has shape {counts.shape}, but needs (classes,): one number for each class")
    if not np.all((counts >= 0) & (counts < np.inf)):
        raise ValueError(f"counts must be finite and at least 0, got {counts[~((counts >= 0) & (counts < np.inf))][0]}")
    # Joined nodes come out in ascending order, so that two queues serve for a heap.
    classes = counts.size
    order = np.argsort(counts, kind="stable").tolist()
    weights, joined, pairs = counts.tolist(), [], []
    leaf = node = 0

    def lightest() -> tuple[float, int]:
        nonlocal leaf, node
        if node == len(joined) or (leaf < classes and weights[order[leaf]] <= joined[node]):
            leaf += 1
            return weights[order[leaf - 1]], classes - 1 + order[leaf - 1]
        node += 1
        return joined[node - 1], node - 1

    for _ in range(classes - 1):
        (one, first), (other, second) = lightest(), lightest()
        joined.append(one + other)
        pairs.append((first, second))
    return _tree(pairs, classes)


def nested_tree(nested: Sequence[Any]) -> ClassTree:
    """The tree of nested lists of class numbers, such as `[[0, 1], [2, [3, 4]]]`.

    A list of more than two entries becomes decisions between its halves, its own classes before the lists in it, so
    that siblings stay together.

    Args:
        nested: lists of lists and class numbers; the numbers are 0, 1, …, classes − 1, each once.

    Returns:
        A `ClassTree`.

    Raises:
        ValueError: an empty list, or class numbers that are not 0 to classes − 1, each once.

    Example:
        >>> import jsoftmax
        >>> tree = jsoftmax.nested_tree([[0, 1, 2], [3, 4]])
        >>> print(tree.classes, tree.decisions, (tree.turns != 0).sum(axis=1))
        5 4 [3 3 2 2 2]
    """
    # Depth first without recursion: a tree may be deeper than Python's stack. A list is known by its number here.
    lists, parents, leaves = [nested], [-1], {}
    for number, entries in enumerate(lists):
        if len(entries) == 0:
            raise ValueError("nested holds an empty list; each needs a class or a list")
        for entry in entries:
            if isinstance(entry, Sequence):
                lists.append(entry)
                parents.append(number)
            elif int(entry) in leaves:
                raise ValueError(f"nested holds class {int(entry)} twice")
            else:
                leaves[int(entry)] = number
    classes = len(leaves)
    if sorted(leaves) != list(range(classes)):
        wrong = sorted(set(range(classes)) - leaves.keys())[0]
        raise ValueError(f"nested holds {classes} classes, but class {wrong} is not among them; they count from 0")
    above = [classes + leaves[leaf] for leaf in range(classes)]
    return parent_tree(above + [classes + parent if parent >= 0 else -1 for parent in parents], classes)


def parent_tree(parents: ArrayLike | Sequence[Any], classes: int) -> ClassTree:
    """The tree of an array of parents, as taxonomies come: a hierarchy of any branching.

    A node of more than two children becomes decisions between halves of them, in their order.

    Args:
        parents: integers `(nodes,)`, the parent of each node, −1 for the root. The first nodes are the classes.
        classes: how many.

    Returns:
        A `ClassTree`.

    Raises:
        ValueError: not exactly one root, a parent that is a class or no node, a node without a class below it, or a
            cycle.

    Example:
        >>> import jsoftmax
        >>> tree = jsoftmax.parent_tree([4, 4, 4, 5, 5, -1], classes=4)  # animals 0 to 2 under 4, plant 3 under 5
        >>> print((tree.turns != 0).sum(axis=1))
        [3 3 2 1]
    """
    parents = np.asarray(parents)
    if parents.ndim != 1 or not np.issubdtype(parents.dtype, np.integer) or not 1 <= classes <= parents.size:
        raise ValueError(
            f"parents has shape {parents.shape} and dtype {parents.dtype}, but needs integers (nodes,), at least as "
            f"many as the {classes} classes, of which there is at least one"
        )
    if np.sum(parents == -1) != 1:
        raise ValueError(f"parents must have one root, a parent of −1, got {np.sum(parents == -1)}")
    wrong = parents[(parents != -1) & ((parents < classes) | (parents >= parents.size))]
    if wrong.size:
        raise ValueError(f"parents must be nodes from {classes} to {parents.size - 1} or −1, got {wrong[0]}")
    groups: dict[int, list[int]] = {node: [] for node in range(classes, parents.size)}
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            groups[parent].append(node)
    # From the root downwards; a group of one is no decision.
    pairs, root, reached = [], int(np.argmin(parents)), 0
    todo: list[tuple[list[int], int, int]] = [([root], -1, 0)]
    while todo:
        nodes, decision, side = todo.pop()
        while len(nodes) == 1 and nodes[0] >= classes:
            nodes = groups[nodes[0]]
        if not nodes:
            raise ValueError("parents has a node without a class below it, which is itself none of the classes")
        if len(nodes) == 1:
            here, reached = classes - 1 + nodes[0], reached + 1
        else:
            here = len(pairs)
            pairs.append([0, 0])
            half = (len(nodes) + 1) // 2
            todo += [(nodes[half:], here, 1), (nodes[:half], here, 0)]
        if decision >= 0:
            pairs[decision][side] = here
    if reached != classes:
        raise ValueError(f"parents has a cycle: only {reached} of {classes} classes are below the root")
    return _tree(pairs, classes)


def _tree(pairs: Sequence[Any], classes: int) -> ClassTree:
    """From the children of each decision, where class v is numbered classes − 1 + v."""
    children = np.asarray(pairs, np.int32).reshape(classes - 1, 2)
    parent = np.full(2 * classes - 1, -1, np.int32)
    turn = np.zeros(2 * classes - 1, np.int8)
    for side, sign in ((0, 1), (1, -1)):
        parent[children[:, side]] = np.arange(classes - 1)
        turn[children[:, side]] = sign
    path, turns = [], []
    node = np.arange(classes - 1, 2 * classes - 1)
    while np.any((node >= 0) & (parent[node] >= 0)):
        above = np.where(node >= 0, parent[node], -1)
        path.append(np.maximum(above, 0))
        turns.append(np.where(node >= 0, turn[node], 0))
        node = above
    shape = (classes, len(path))
    root = jnp.int32(np.argmin(parent))
    columns = (np.stack(column, axis=1) if column else np.zeros(shape) for column in (path, turns))
    path, turns = columns
    return ClassTree(jnp.asarray(path, jnp.int32), jnp.asarray(turns, jnp.int8), jnp.asarray(children), root)
