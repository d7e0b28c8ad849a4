"""Drawing classes, with and without replacement, and how often each class is expected.

A sampler is two functions, one draw and its log-probability; everything else is written here once. Sampling without
replacement draws until `count` different classes have come up. How often class i is expected in such a sample follows
from the draws of the others alone: with M_i of them until `count` others had come up,

    P(i is in the sample | M_i) = 1 − (1 − p_i)^M_i

since i is left out exactly if it missed all M_i of them. M_i does not depend on the draws of i, so that the mean of
this number is the probability itself, and Σ f_i / P(i | M_i) over the sample estimates Σ f_i without bias.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.varying import searchsorted, while_loop


class Sample(NamedTuple):
    """Classes that a sampler has drawn.

    Attributes:
        classes: (count,) int32.
        tries: how many draws it took; `count` with replacement.
        others: (count,), for each sampled class the draws of *other* classes until `count` others had come up.
    """

    classes: Array
    tries: Array
    others: Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tables"], meta_fields=["classes", "draw", "log_prob", "unique"]
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    r"""A distribution over classes to draw negatives from.

    Made by `log_uniform_sampler`, `uniform_sampler` and `unigram_sampler`, or from two functions of your own. A pytree:
    pass it to a compiled function as an argument, and its tables do not become constants of the program.

    Attributes:
        classes: how many there are.
        draw: `(tables, key, shape)` → int32 class numbers, drawn independently.
        log_prob: `(tables, classes)` → log-probability of each class in one draw.
        tables: any pytree of arrays that the two need.
        unique: whether a sample holds no class twice.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> def draw(logits, key, shape):  # a sampler of your own
        ...     return jax.random.categorical(key, logits, shape=shape)
        >>> def log_prob(logits, classes):
        ...     return jax.nn.log_softmax(logits)[classes]
        >>> sampler = jsoftmax.Sampler(4, draw, log_prob, tables=jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), unique=False)
        >>> sample = sampler.sample(jax.random.key(0), 5)
        >>> print(sample.classes.shape, jnp.exp(sampler.log_expected_count(jnp.array([0, 3]), sample)).round(3))
        (5,) [2.  0.5]
    """

    classes: int
    draw: Callable[[Any, Array, tuple[int, ...]], Array]
    log_prob: Callable[[Any, Array], Array]
    tables: Any = ()
    unique: bool = True

    @in_any_layout("key")
    def sample(self, key: Array, count: int) -> Sample:
        """`count` classes; memory and time do not depend on the number of classes that are not drawn.

        The same for the same key on any device and in any layout. With `jax_enable_x64` the library's samplers draw in
        float64, and another sample.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if self.unique and count > self.classes:
            raise ValueError(f"count must be at most {self.classes}, the number of classes, to be unique, got {count}")
        return _sample(self, key, count)

    @in_any_layout("classes")
    def log_expected_count(self, classes: ArrayLike, sample: Sample) -> Array:
        """The logarithm of how often each of `classes` is expected in `sample`; not differentiated."""
        classes, count = checks.integer_array("classes", classes), sample.classes.shape[0]
        log_p = lax.stop_gradient(self.log_prob(self.tables, classes))
        if not self.unique:
            return log_p + np.log(count).astype(log_p.dtype)
        if count == self.classes:
            return jnp.zeros_like(log_p)
        order = jnp.argsort(sample.classes)
        at = order[searchsorted(sample.classes, classes.astype(jnp.int32), sorter=order).clip(0, count - 1)]
        missed = jnp.where(sample.classes[at] == classes, sample.others[at], sample.tries).astype(log_p.dtype)
        return jnp.log(-jnp.expm1(missed * jnp.log1p(-jnp.exp(log_p))))


@functools.partial(jax.jit, static_argnames="count")
def _sample(sampler: Sampler, key: Array, count: int) -> Sample:
    if not sampler.unique:
        classes = sampler.draw(sampler.tables, key, (count,)).astype(jnp.int32)
        return Sample(classes, jnp.int32(count), jnp.full(count, count, jnp.int32))
    if count == sampler.classes:
        return Sample(jnp.arange(count, dtype=jnp.int32), jnp.int32(count), jnp.full(count, count, jnp.int32))
    return _distinct(sampler, key, count)


class _Search(NamedTuple):
    key: Array
    classes: Array  # (count + 1,), different ones in the order in which they came up, then −1
    found: Array  # how many they are
    tries: Array  # draws until there were `count`
    draws: Array  # draws until there were `count` and the next would have been another
    own: Array  # (count + 1,), how many of these each class had


def _distinct(sampler: Sampler, key: Array, count: int) -> Sample:
    """Draw until another class than the first `count` comes up, many draws at a time.

    Sorted and counted, never scattered: of a scatter whose indices XLA splits over devices unevenly, it counts the
    padding at index 0.
    """
    size = count + 1

    def step(state: _Search) -> _Search:
        key, use = jax.random.split(state.key)
        drawn = sampler.draw(sampler.tables, use, (size,)).astype(jnp.int32)
        first = _first_positions(jnp.concatenate([state.classes, drawn]))[size:]
        new = first == jnp.arange(size, 2 * size, dtype=jnp.int32)
        found = state.found + jnp.cumsum(new, dtype=jnp.int32)
        # A draw goes to the place of its class, or to the next free one; past the last, that is out of bounds.
        places = jnp.arange(size, dtype=jnp.int32)
        slots = jnp.concatenate([places, found - 1])[first]
        within = found <= count
        here = jnp.sort(jnp.where(within, slots, size))
        ends = searchsorted(here, jnp.arange(size + 1, dtype=jnp.int32)).astype(jnp.int32)
        known = jnp.concatenate([places < state.found, new])
        in_order = jnp.concatenate([state.classes, drawn])[jnp.argsort(~known, stable=True)[:size]]
        return _Search(
            key=key,
            classes=jnp.where(places < found[-1], in_order, -1),
            found=found[-1],
            tries=state.tries + jnp.sum(found - new.astype(jnp.int32) < count, dtype=jnp.int32),
            draws=state.draws + jnp.sum(within, dtype=jnp.int32),
            own=state.own + ends[1:] - ends[:-1],
        )

    zero, places = jnp.int32(0), jnp.zeros(size, jnp.int32)
    start = _Search(key, places - 1, zero, zero, zero, places)
    end = while_loop(lambda state: state.found <= count, step, start)
    return Sample(end.classes[:count], end.tries, end.draws + 1 - end.own[:count])


def _first_positions(values: Array) -> Array:
    """For each of the values, the position at which it stands for the first time."""
    positions = jnp.arange(values.shape[0], dtype=jnp.int32)
    order = jnp.argsort(values, stable=True).astype(jnp.int32)
    ordered = values[order]
    starts = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    # The inverse of a permutation is the order of its entries.
    return order[lax.cummax(jnp.where(starts, positions, 0))][jnp.argsort(order)]
