"""The classes that a sampled loss compares, and their logits before any option."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._blocks.projection import Product, project
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._vocabularies.drawing import Sample


@in_any_layout("labels")
def touched_classes(labels: ArrayLike, sample: Sample) -> Array:
    """The classes whose parameters one batch reads: its labels, then the sampled ones.

    With them a step costs the same for any number of classes: read these rows of the kernel, differentiate with respect
    to the rows (`gathered=True`), and add what comes out to the kernel in place.

    Args:
        labels: integers `(*batch,)` or `(*batch, num_true)`. What is below 0 becomes class 0.
        sample: what a `Sampler` gave.

    Returns:
        int32 `(size of labels + count,)`; a class may be there more than once, so add, don't set.

    Raises:
        TypeError: labels are not integers.

    Example:
        >>> import functools, jax, jax.numpy as jnp, jsoftmax
        >>> sampler = jsoftmax.log_uniform_sampler(1000)
        >>> @functools.partial(jax.jit, donate_argnums=0)  # so that the kernel changes in place
        ... def step(kernel, features, labels, key):
        ...     sample = sampler.sample(key, 16)
        ...     classes = jsoftmax.touched_classes(labels, sample)
        ...     def loss(rows):
        ...         return jsoftmax.sampled_softmax_cross_entropy(
        ...             features, rows, labels, sample, sampler=sampler, kernel_transposed=True, gathered=True
        ...         ).mean()
        ...     value, gradient = jax.value_and_grad(loss)(kernel[classes])
        ...     return kernel.at[classes].add(-0.1 * gradient), value
        >>> kernel, value = step(jnp.zeros((1000, 4)), jnp.ones((8, 4)), jnp.arange(8), jax.random.key(0))
        >>> print(kernel.shape, int((kernel != 0).any(1).sum()) <= 24)
        (1000, 4) True
    """
    labels = checks.integer_array("labels", labels).astype(jnp.int32)
    return jnp.concatenate([jnp.maximum(labels, 0).reshape(-1), sample.classes])


def own_logits(features: Array, kernel: Array, bias: ArrayLike | None, at: Array, transposed: bool) -> Array:
    """(rows, some): each row with its own classes, which the kernel has `at` (rows, some)."""
    dtype = compute_dtype(features.dtype)
    own = read(kernel, at, transposed).astype(features.dtype)
    z = jnp.einsum("nd,ntd->nt", features, own, preferred_element_type=dtype)
    return z if bias is None else z + jnp.asarray(bias)[at].astype(dtype)


def candidate_logits(
    features: Array,
    kernel: Array,
    bias: ArrayLike | None,
    true_at: Array,
    sampled_at: Array,
    transposed: bool,
    derivative: str,
) -> Array:
    """(rows, num_true + sampled): each row with its own labels' classes, and with the sampled ones.

    `true_at` (rows, num_true) and `sampled_at` are where the kernel has them. They are read apart: of the gradient of
    one read of both, whose number need not divide by the devices, XLA counts class 0 twice where it splits the rows.
    """
    shared = project(features, read(kernel, sampled_at, transposed), Product(True, derivative))
    if bias is not None:
        shared = shared + jnp.broadcast_to(jnp.asarray(bias)[sampled_at].astype(shared.dtype), shared.shape)
    return jnp.concatenate([own_logits(features, kernel, bias, true_at, transposed), shared], axis=1)


def read(kernel: Array, at: Array, transposed: bool) -> Array:
    return kernel[at] if transposed else jnp.moveaxis(kernel[:, at], 0, -1)
