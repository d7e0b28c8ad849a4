"""Weights for classes of which there are few examples."""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.weights import shares


@in_any_layout("counts")
def class_balanced_weights(counts: ArrayLike, beta: float = 0.999) -> Array:
    r"""Weights for `class_weights` by the effective number of examples of each class.

    .. math:: w_j \propto \frac{1 - \beta}{1 - \beta^{n_j}}, \qquad \sum_j w_j = \text{number of classes}

    From equal weights (:math:`\beta = 0`) to the inverse of the counts (:math:`\beta \to 1`): examples beyond about
    :math:`1 / (1 - \beta)` of a class are taken to say little that is new.

    Args:
        counts: `(classes,)`, how many examples each class has. A class without any gets weight 0.
        beta: in [0, 1), a number known when the program is traced.

    Returns:
        `(classes,)`: float32, or float64 for float64 counts.

    Raises:
        ValueError: counts with another number of axes than one, or beta outside [0, 1).

    Derivatives: none are meant; counts are data.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> print(jsoftmax.class_balanced_weights(jnp.array([1000, 100, 10]), beta=0.999))
        [0.0422 0.28   2.6778]

    References:
        Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, 2019.
    """
    counts = jnp.asarray(counts)
    if counts.ndim != 1:
        raise ValueError(f"counts has shape {counts.shape}, but needs (classes,): examples of each class")
    checks.within("beta", beta, 0.0, math.nextafter(1.0, 0.0))
    number = counts.astype(jnp.float64 if counts.dtype == jnp.float64 else jnp.float32)
    rate = math.log(beta) if beta > 0 else -math.inf
    seen = number > 0
    effective = -jnp.expm1(jnp.where(seen, number, 1) * rate)
    return shares(jnp.where(seen, 1 / effective, 0)) * counts.size
