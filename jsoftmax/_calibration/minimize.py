"""The minimum of a smooth convex function of a few numbers within bounds, differentiable.

L-BFGS steps from optax are projected onto the bounds; numbers that sit at a bound and push against it stand still. The
minimum is where the residual x − clip(x − ∇f(x)) vanishes, and the implicit function theorem differentiates that
equation: numbers at a bound do not move, the others by the inverse of the Hessian.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jsoftmax._rows.varying import axes_of, vary_floats, while_loop

Vector = Float[Array, "numbers"]


class Point(NamedTuple):
    """A place, and the function there."""

    x: Vector
    value: Array
    gradient: Vector


class Search(NamedTuple):
    """A step on trial along the direction of L-BFGS."""

    size: Array
    point: Point
    accepted: Array


class Progress(NamedTuple):
    point: Point
    lbfgs: Any
    steps: Array
    done: Array


def minimize(f: Callable[[Vector], Array], start: Vector, lower: Vector, upper: Vector, most_steps: int) -> Vector:
    """Where `f` is least between `lower` and `upper`. Differentiable by what `f` closes over, in every mode.

    Stops where a step improves neither the value nor the gradient: at the rounding of `f`. A NaN stays one.
    """

    def residual(x: Vector) -> Vector:
        return x - jnp.clip(x - jax.grad(f)(x), lower, upper)

    def solve(_, x: Vector) -> Vector:
        return _projected_lbfgs(f, x, lower, upper, most_steps)

    return lax.custom_root(residual, start, solve, _solve_directly)


def _solve_directly(linear: Callable[[Vector], Vector], y: Vector) -> Vector:
    # One column at a time: each is a pass over all rows of data.
    matrix = lax.map(linear, vary_floats(jnp.eye(y.shape[0], dtype=y.dtype), axes_of(y))).T
    return jnp.linalg.solve(matrix, y)


def _projected_lbfgs(f: Callable, start: Vector, lower: Vector, upper: Vector, most_steps: int) -> Vector:
    import optax  # here, as it takes longer to import than all of this library

    lbfgs = optax.scale_by_lbfgs()
    eps = float(jnp.finfo(start.dtype).eps)

    def at(x: Vector) -> Point:
        return Point(x, *jax.value_and_grad(f)(x))

    def free(point: Point) -> Array:
        """Numbers that may move: not those at a bound whose gradient pushes them out."""
        return ~((point.x <= lower) & (point.gradient > 0) | (point.x >= upper) & (point.gradient < 0))

    def residual(point: Point) -> Array:
        return jnp.max(jnp.abs(point.x - jnp.clip(point.x - point.gradient, lower, upper)))

    def search(point: Point, direction: Vector) -> Search:
        def attempt(last: Search) -> Search:
            size = last.size / 2
            trial = at(jnp.clip(point.x + size * direction, lower, upper))
            move = trial.x - point.x
            # Armijo's condition with slopes for differences of values, which rounding would drown near the minimum.
            enough = jnp.vdot(trial.gradient, move) <= -0.8 * jnp.vdot(point.gradient, move)
            not_above = trial.value <= point.value + 4 * eps * jnp.abs(point.value)
            return Search(size, trial, enough & not_above)

        first = Search(jnp.asarray(2, start.dtype), point, jnp.asarray(False))
        return while_loop(lambda last: ~last.accepted & (last.size > 2.0**-30), attempt, first)

    def step(now: Progress) -> Progress:
        point, moves = now.point, free(now.point)
        gradient = jnp.where(moves, point.gradient, 0)
        # optax has a counter and weights of JAX's default dtypes in its state.
        with jax.numpy_dtype_promotion("standard"):
            direction, state = lbfgs.update(gradient, now.lbfgs, point.x)
        direction = jnp.where(moves, -jnp.asarray(direction), 0)
        descends = jnp.vdot(direction, gradient) < 0
        found = search(point, jnp.where(descends, direction, -gradient))
        better = (found.point.value < point.value) | (residual(found.point) < residual(point))
        # The curvature seen so far belongs to the numbers that were free.
        same = jnp.all(free(found.point) == moves)
        state = jax.tree.map(lambda new, fresh: jnp.where(same, new, fresh), state, lbfgs.init(point.x))
        keep = found.accepted & better
        point = jax.tree.map(lambda new, old: jnp.where(keep, new, old), found.point, point)
        return Progress(point, state, now.steps + 1, ~keep)

    start_point = at(start)
    done = ~(residual(start_point) > 0)
    first = Progress(start_point, lbfgs.init(start), jnp.asarray(0, jnp.int32), done)
    return while_loop(lambda now: ~now.done & (now.steps < most_steps), step, first).point.x
