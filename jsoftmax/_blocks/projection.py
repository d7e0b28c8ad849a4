"""features · kernel, with gradients written as the products that run fast.

    logits = h·W        dh = dz·Wᵀ        dW = hᵀ·dz

Products take the features' dtype, or with a precision float32 at least, and give float32 at least. Autodiff would
transpose inside hᵀ·dz and round dW to the kernel's dtype before it could be added up (docs/architecture.md has the
rates).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.varying import defvjp


class Product(NamedTuple):
    """What is known of a head's product when its program is traced."""

    transposed: bool = False  # whether the kernel is (classes, features)
    derivative: str = "vjp"
    precision: Any = None  # a `jax.lax.PrecisionLike`; None for the features' dtype and the platform's default

    def factor_dtype(self, features: Array) -> jnp.dtype:
        return features.dtype if self.precision is None else compute_dtype(features.dtype)

    def dot(self, left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
        dimensions, dtype = (((left_axis,), (right_axis,)), ((), ())), compute_dtype(left.dtype)
        return lax.dot_general(left, right, dimensions, precision=self.precision, preferred_element_type=dtype)


def checked_precision(precision: lax.PrecisionLike) -> Any:
    """As JAX reads it: it may also be a name of an algorithm, or one for each factor."""
    if precision is None:
        return None
    factor = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(functools.partial(lax.dot, precision=precision), factor, factor)
    except (TypeError, ValueError) as error:
        raise ValueError(f"precision must be a jax.lax.PrecisionLike such as 'highest', got {precision!r}") from error
    return precision


def project(
    features: Float[Array, "rows features"], kernel: Float[Array, "_ _"], product: Product
) -> Float[Array, "rows classes"]:
    """(rows, features) · (features, classes), or (classes, features) if transposed, in float32 at least.

    The kernel is read in the dtype of the factors; its gradient has the kernel's own.
    """
    return (_logits if product.derivative == "jvp" else _project)(product, features, kernel)


def _logits(product: Product, features: Array, kernel: Array) -> Array:
    dtype = product.factor_dtype(features)
    return product.dot(features.astype(dtype), kernel.astype(dtype), 1, 1 if product.transposed else 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(product: Product, features: Array, kernel: Array) -> Array:
    return _logits(product, features, kernel)


def _project_fwd(product: Product, features: Array, kernel: Array):
    return _logits(product, features, kernel), (features, kernel)


def _project_bwd(product: Product, residuals, logits_bar: Array):
    features, kernel = residuals
    factors = product.factor_dtype(features)
    # Cotangents of a mean over many rows are below what float16 can hold.
    dtype = jnp.float32 if factors == jnp.float16 else factors
    h, dz, w = features.astype(dtype), logits_bar.astype(dtype), kernel.astype(factors).astype(dtype)
    features_bar = product.dot(dz, w, 1, 0 if product.transposed else 1)
    if product.transposed:
        kernel_bar = product.dot(dz, h, 0, 0)
    else:
        # The barrier makes the small transpose a copy of its own; inside the product it costs half the speed.
        kernel_bar = product.dot(lax.optimization_barrier(h.T), dz, 1, 0)
    return features_bar.astype(features.dtype), kernel_bar.astype(kernel.dtype)


defvjp(_project, _project_fwd, _project_bwd)
