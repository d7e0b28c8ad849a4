"""features · kernel, with gradients written as the products that run fast.

    logits = h·W        dh = dz·Wᵀ        dW = hᵀ·dz

Products take the features' dtype and give float32 at least. Autodiff would transpose inside hᵀ·dz and round dW to the
kernel's dtype before it could be added up (docs/architecture.md has the rates).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.varying import defvjp


def project(
    features: Float[Array, "rows features"], kernel: Float[Array, "_ _"], transposed: bool, derivative: str
) -> Float[Array, "rows classes"]:
    """(rows, features) · (features, classes), or (classes, features) if `transposed`, in float32 at least.

    The kernel is read in the features' dtype; its gradient has the kernel's own.
    """
    if derivative == "jvp":
        return _product(features, kernel, transposed)
    return _project(transposed, features, kernel)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=compute_dtype(left.dtype))


def _product(features: Array, kernel: Array, transposed: bool) -> Array:
    return _dot(features, kernel.astype(features.dtype), 1, 1 if transposed else 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(transposed: bool, features: Array, kernel: Array) -> Array:
    return _product(features, kernel, transposed)


def _project_fwd(transposed: bool, features: Array, kernel: Array):
    return _product(features, kernel, transposed), (features, kernel)


def _project_bwd(transposed: bool, residuals, logits_bar: Array):
    features, kernel = residuals
    # Cotangents of a mean over many rows are below what float16 can hold.
    dtype = jnp.float32 if features.dtype == jnp.float16 else features.dtype
    h, dz, w = features.astype(dtype), logits_bar.astype(dtype), kernel.astype(features.dtype).astype(dtype)
    features_bar = _dot(dz, w, 1, 0 if transposed else 1)
    # The barrier makes the small transpose a copy of its own; inside the product it costs half the speed.
    kernel_bar = _dot(dz, h, 0, 0) if transposed else _dot(lax.optimization_barrier(h.T), dz, 1, 0)
    return features_bar.astype(features.dtype), kernel_bar.astype(kernel.dtype)


defvjp(_project, _project_fwd, _project_bwd)
