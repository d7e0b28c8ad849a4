"""Scaled dot-product attention: softmax of products of queries and keys, as weights of values."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._attention.blockwise import Inputs, attend_in_blocks
from jsoftmax._attention.logits import Numbers, Span, Visibility, combine, compare, logits_of, seen_with, unread
from jsoftmax._losses.activations import softmax
from jsoftmax._rows import checks
from jsoftmax._rows.dtypes import compute_dtype
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._rows.options import DERIVATIVES

IMPLEMENTATIONS = ("plain", "blockwise", "cudnn")
# Of all weights, in float32: what the plain form may take if nobody says otherwise.
MOST_BYTES = 2**23


@in_any_layout("query")
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_weights: bool = False,
    block_size: int | None = None,
    derivative: str = "vjp",
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    r"""Attention: every query's average of the values, weighted by softmax of its products with the keys.

    .. math:: \mathrm{output}_t = \sum_s p_{ts}\, v_s, \qquad p_t = \mathrm{softmax}_s(z_{ts}), \qquad
        z_{ts} = \frac{c \tanh(a\, q_t \cdot k_s / c) + b_{ts}}{T}

    with scale a, soft cap c, bias b and temperature T. Names, shapes and positional arguments are those of
    `jax.nn.dot_product_attention`. A query that sees no key gives 0 and has gradient 0; there it gets the mean of all
    values, masked or not.

    With T queries, S keys, N heads of width H, and K heads of key and value: each of those serves N/K heads of query.

    Args:
        query: float array `(*batch, T, N, H)`; one batch axis or none.
        key: float array `(*batch, S, K, H)` of the same dtype.
        value: float array `(*batch, S, K, any width)` of the same dtype.
        bias: float array that broadcasts to `(*batch, N, T, S)`, added to the logits. −∞ is a mask.
        mask: boolean, broadcasting to the same: True for a pair of query and key that takes part.
        scale: a number; None for :math:`1/\sqrt{H}`.
        softcap: bounds the scaled products, before the bias, as Gemma 2 does.
        temperature: divides the logits, bias included; a number above 0. The larger, the more even the weights.
        is_causal: whether a query at t sees keys up to t only.
        query_seq_lengths: integers of the batch's shape: queries from there on are padding and give 0.
        key_value_seq_lengths: the same of keys and values, which no query sees from there on.
        local_window_size: (left, right), or one number for both: a query at t sees keys from t − left to t + right.
        return_weights: whether to return the weights, too. Needs the plain form.
        block_size: queries and keys at a time in the blockwise form; None chooses by the number of heads.
        derivative: "vjp" for reverse mode and forward over reverse; "jvp" for every mode. The plain form always has
            every mode.
        implementation: "plain" has all weights in memory at once, "blockwise" those of one block of queries and keys.
            None takes the plain form if its weights fit into 8 MiB in float32, or if they are to be returned. "cudnn"
            is `jax.nn.dot_product_attention(implementation="cudnn")`, for NVIDIA GPUs: float16 or bfloat16 with no
            option but `scale` and `is_causal`, for which its results are right. It is never chosen for you.

    Returns:
        The output `(*batch, T, N, width of value)` in the query's dtype, and with `return_weights` also the weights
        `(*batch, N, T, S)`. Softmax and all sums are computed in float32 at least.

    Raises:
        TypeError: arrays that are not floating-point or differ in dtype, a mask that is not boolean, lengths that are
            not integers.
        ValueError: shapes that do not fit, a known scale, cap or temperature out of range, or an implementation that
            cannot do what is asked.

    Derivatives: by query, key, value, bias, scale, softcap and temperature. The blockwise form saves the output and two
    numbers a query, computes each block once more in the backward pass, and needs memory linear in T and S: a bias or
    mask as large as the weights is only read block by block. Causal and local attention skip the blocks in which
    nothing is seen. What is never seen in either form may hold NaN: keys and values that no query sees, queries that
    see no key, and entries of the bias that are masked.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> query = key = value = jnp.eye(3).reshape(3, 1, 3)  # three tokens, one head
        >>> print(jsoftmax.dot_product_attention(query, key, value, is_causal=True, scale=1.0)[:, 0])
        [[1.     0.     0.    ]
         [0.2689 0.7311 0.    ]
         [0.2119 0.2119 0.5761]]

    References:
        Vaswani et al., *Attention Is All You Need*, 2017; Milakov and Gimelshein, *Online Normalizer Calculation for
        Softmax*, 2018; Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021; Dao et al.,
        *FlashAttention*, 2022; Ainslie et al., *GQA*, 2023 (grouped heads).
    """
    checks.one_of("derivative", derivative, DERIVATIVES)
    checks.one_of("implementation", implementation, (None, *IMPLEMENTATIONS))
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    query, key, value = (checks.float_array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    _check_shapes(query, key, value)
    if implementation == "cudnn":
        options = {
            "bias": bias,
            "mask": mask,
            "softcap": softcap,
            "temperature": None if checks.is_known(temperature, 1.0) else temperature,
            "query_seq_lengths": query_seq_lengths,
            "key_value_seq_lengths": key_value_seq_lengths,
            "local_window_size": local_window_size,
            "return_weights": return_weights or None,
            "derivative": None if derivative == "vjp" else derivative,
        }
        return _cudnn(query, key, value, scale, is_causal, options)
    batch, shape = query.shape[:-3], (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    groups = key.shape[-2]
    inputs = Inputs(
        query=_grouped(query, groups),
        key=_grouped(key, groups)[:, :, 0],
        value=_grouped(value, groups)[:, :, 0],
        bias=None if bias is None else _five_axes("bias", checks.float_array("bias", bias), shape, groups),
        numbers=_numbers(query, scale, softcap, temperature),
    )
    left, right = _window(local_window_size, is_causal)
    visibility = Visibility(
        None if mask is None else _five_axes("mask", checks.bool_array("mask", mask), shape, groups),
        _lengths("query_seq_lengths", query_seq_lengths, batch),
        _lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        left,
        right,
    )
    if implementation is None:
        fits = math.prod(shape) * 4 <= MOST_BYTES
        implementation = "plain" if return_weights or fits else "blockwise"
    if implementation == "blockwise" and return_weights:
        raise ValueError("return_weights=True needs implementation='plain': the blockwise form has no array of weights")
    if math.prod(shape) == 0:
        output, weights = jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype), jnp.zeros(shape, query.dtype)
        return (output, weights) if return_weights else output
    weights = None
    if implementation == "plain":
        output, weights = _plain(inputs, visibility)
    else:
        size = block_size or default_attention_block_size(math.prod(shape[:-2]))
        output = _blockwise(inputs, visibility, size, derivative)
    output = jnp.moveaxis(output, 3, 1).reshape(*query.shape[:-1], value.shape[-1])
    return output if weights is None or not return_weights else (output, weights.reshape(shape))


def default_attention_block_size(heads: int) -> int:
    """Queries and keys in a block: a power of two from 128 to 1024 whose logits, for all heads of the batch, fill 2
    MiB on a CPU, whose caches hold as much, and 256 MiB on an accelerator."""
    budget = 2**21 if jax.default_backend() == "cpu" else 2**28
    size = math.isqrt(budget // (4 * max(heads, 1)))
    return min(max(1 << max(size.bit_length() - 1, 0), 128), 1024)


@jax.jit
def _plain(inputs: Inputs, visibility: Visibility) -> tuple[Array, Array]:
    dtype, wide = inputs.query.dtype, _widened(inputs)
    seen = visibility.seen(Span(0, inputs.query.shape[3]), Span(0, inputs.key.shape[2]))
    seen = seen_with(wide.bias, seen)
    query, key, value = unread(wide.query, wide.key, wide.value, seen)
    weights = softmax(logits_of(compare(query, key), wide.bias, wide.numbers, seen), where=seen)
    return combine(weights, value).astype(dtype), weights.astype(dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _blockwise(inputs: Inputs, visibility: Visibility, block_size: int, derivative: str) -> Array:
    given = inputs if derivative == "vjp" else _widened(inputs)
    return attend_in_blocks(given, visibility, block_size, derivative).astype(inputs.query.dtype)


def _widened(inputs: Inputs) -> Inputs:
    """In the dtype in which softmax is computed: JAX cannot transpose a product of narrow arrays with a wide result."""
    return jax.tree.map(lambda array: array.astype(compute_dtype(array.dtype)), inputs)


def _cudnn(query: Array, key: Array, value: Array, scale: ArrayLike | None, is_causal: bool, options: dict) -> Array:
    unfit = [name for name, option in options.items() if option is not None]
    if unfit:
        raise ValueError(f"implementation='cudnn' takes no option but scale and is_causal, got {', '.join(unfit)}")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"implementation='cudnn' needs float16 or bfloat16, got query of dtype {query.dtype}")
    if value.shape != key.shape:
        raise ValueError(f"implementation='cudnn' needs value of the shape of key, {key.shape}, got {value.shape}")
    if not (scale is None or isinstance(scale, int | float)):
        raise ValueError("implementation='cudnn' needs a Python number as scale, or None")
    return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=is_causal, implementation="cudnn")


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim not in (3, 4) or array.ndim != query.ndim:
            raise ValueError(f"{name} has shape {array.shape}, but needs (batch, length, heads, width), or no batch")
        if array.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}, but needs that of query, {query.dtype}")
    groups, width = key.shape[-2:]
    if width != query.shape[-1] or width == 0 or key.shape[:-3] != query.shape[:-3]:
        raise ValueError(
            f"key has shape {key.shape} and query {query.shape}, but they need the same batch and width, above 0"
        )
    if groups == 0 or query.shape[-2] % groups:
        raise ValueError(f"query has {query.shape[-2]} heads, but needs a multiple of the {groups} of key and value")
    checks.has_shape("value", value, (*key.shape[:-1], value.shape[-1]), "the same batch, length and heads as key")


def _grouped(array: Array, groups: int) -> Array:
    """(*batch, length, heads, width) as (batch, groups, heads of each, length, width)."""
    length, heads, width = array.shape[-3:]
    return jnp.moveaxis(array.reshape(math.prod(array.shape[:-3]), length, groups, heads // groups, width), 1, 3)


def _five_axes(name: str, array: Array, shape: tuple[int, ...], groups: int) -> Array:
    """A bias or mask, broadcasting to `shape` (*batch, heads, queries, keys), with its heads in groups."""
    if array.ndim == len(shape) + 1 and array.shape[0] == 1:
        array = array[0]  # as jax.nn has it for arrays without a batch
    sizes = (1,) * (len(shape) - array.ndim) + array.shape
    if len(sizes) != len(shape) or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}, but needs one that broadcasts to {shape}: heads by lengths")
    heads = (1, 1) if sizes[-3] == 1 else (groups, sizes[-3] // groups)
    return array.reshape(sizes[0] if len(sizes) == 4 else 1, *heads, *sizes[-2:])


def _lengths(name: str, lengths: ArrayLike | None, batch: tuple[int, ...]) -> Array | None:
    if lengths is None:
        return None
    lengths = checks.integer_array(name, lengths)
    checks.has_shape(name, lengths, batch, "one length for each sequence of the batch")
    return lengths.reshape(-1)


def _window(local_window_size: int | tuple[int, int] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """How many keys before and after its own position a query sees; None for all."""
    left = right = None
    if local_window_size is not None:
        both = isinstance(local_window_size, tuple)
        left, right = local_window_size if both else (local_window_size, local_window_size)
        if left < 0 or right < 0:
            raise ValueError(f"local_window_size must not be negative, got {local_window_size}")
    return left, 0 if is_causal else right


def _numbers(query: Array, scale: ArrayLike | None, softcap: ArrayLike | None, temperature: ArrayLike) -> Numbers:
    dtype = compute_dtype(query.dtype)
    least = float(jnp.finfo(dtype).tiny)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        checks.within("softcap", softcap, least, float("inf"))
    if not checks.is_known(temperature, 1.0):
        checks.within("temperature", temperature, least, float("inf"))
    softened = None if checks.is_known(temperature, 1.0) else temperature

    def number(name: str, value: ArrayLike | None) -> Array | None:
        if value is None:
            return None
        array = jnp.asarray(value, dtype)
        checks.has_shape(name, array, (), "one number")
        return array

    return Numbers(number("scale", scale), number("softcap", softcap), number("temperature", softened))
