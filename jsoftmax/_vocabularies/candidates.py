"""Cross-entropy against candidates that each row brings along."""

from typing import Any, Unpack

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jsoftmax._rows import checks
from jsoftmax._rows.labels import is_class
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._vocabularies.candidate_logits import own_logits
from jsoftmax._vocabularies.sampled import PER_ROW, SampledLossOptions, losses_of_candidates


@in_any_layout("features")
def candidate_softmax_cross_entropy(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    candidates: ArrayLike,
    *,
    log_q: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    kernel_transposed: bool = False,
    **options: Unpack[SampledLossOptions],
) -> Array:
    r"""Cross-entropy of each row's label against the classes that the row itself names: hard or sampled negatives.

    .. math:: \mathrm{loss} = \log\Bigl(e^{s_y} + \sum_{j \in C \setminus y} e^{s_j - \log Q_j}\Bigr) - s_y, \qquad
        s_j = h w_j + b_j

    Where all rows may share their negatives, `sampled_softmax_cross_entropy` is faster: its logits are one product.
    Here each row reads its own k classes of the kernel.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, or with `kernel_transposed` `(classes, features)`, which is faster.
        labels: integers `(*batch,)`. One that is no class makes its row NaN.
        candidates: integers `(*batch, k)`, the classes to compare with. What is no class, such as −1, takes no part,
            nor does the row's label again. A class that comes twice counts twice, as with replacement.
        log_q: `(*batch, k)`, where the candidates come from a sampler: the logarithm of how often each is expected
            among the k. The sum then estimates the full softmax's denominator without bias, as with
            `correct_label=False` of `sampled_softmax_cross_entropy`. Not differentiated. None for hard negatives.
        bias: float array `(classes,)`.
        kernel_transposed: whether kernel is `(classes, features)`.
        **options: `temperature`, `softcap`, `margin`, `angular_margin`, `z_loss`, `ignore_index`, `derivative`,
            `implementation`. All that acts on logits acts before the correction.

    Returns:
        The loss of each row `(*batch,)` in nats: float32, or float64 for float64 features.

    Raises:
        TypeError: features or kernel are not floating-point, labels or candidates not integers.
        ValueError: shapes that do not fit, or an option out of range.

    Derivatives: with respect to features, kernel, bias, temperature, soft cap and margins; every mode with
    `derivative="jvp"`. The kernel's gradient is an array of its shape. Memory: the candidates' rows of the kernel,
    `(*batch, k, features)`.

    Example:
        >>> import jax.numpy as jnp, jsoftmax
        >>> jnp.set_printoptions(precision=4)
        >>> features, kernel, labels = jnp.eye(2, 3), jnp.eye(3, 9), jnp.array([0, 1])
        >>> print(jsoftmax.candidate_softmax_cross_entropy(features, kernel, labels, jnp.array([[4, 5], [0, -1]])))
        [0.5514 0.3133]

    References:
        Karpukhin et al., *Dense Passage Retrieval for Open-Domain Question Answering*, 2020 (hard negatives); Bengio
        and Senécal, *Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model*,
        2008.
    """
    checks.only_options(options, SampledLossOptions)
    features, kernel = checks.float_array("features", features), checks.float_array("kernel", kernel)
    labels, candidates = checks.integer_array("labels", labels), checks.integer_array("candidates", candidates)
    if features.ndim == 0 or kernel.ndim != 2:
        raise ValueError(
            f"features has shape {features.shape} and kernel {kernel.shape}, but need (*batch, features) and a matrix"
        )
    batch, classes = features.shape[:-1], kernel.shape[0 if kernel_transposed else 1]
    checks.has_kernel_shape(kernel, features.shape[-1], classes, kernel_transposed)
    checks.has_shape("labels", labels, batch, "one class number for each row of features")
    if candidates.ndim != len(batch) + 1 or candidates.shape[:-1] != batch:
        raise ValueError(
            f"candidates has shape {candidates.shape}, but needs {(*batch, 'k')}: class numbers for each row"
        )
    if classes == 0:
        raise ValueError("kernel has no class; a loss needs one")
    if bias is not None:
        checks.has_shape("bias", checks.float_array("bias", bias), (classes,), "one number for each class")
    count = candidates.shape[-1]
    given: Any = options
    for name in PER_ROW:
        if jnp.ndim(given.get(name, 0.0)):
            given[name] = checks.scalar_or_rows(name, given[name], batch).reshape(-1)
    labels, candidates = labels.reshape(-1, 1), candidates.reshape(-1, count)
    features = features.reshape(-1, features.shape[-1])
    ignore_index = options.pop("ignore_index", None)
    counted = jnp.ones(labels.shape, bool) if ignore_index is None else labels != ignore_index
    features = jnp.where(counted, features, 0)
    known, compared = is_class(labels, classes), is_class(candidates, classes)
    own = jnp.where(known, labels, -1).astype(jnp.int32)
    others = jnp.where(compared, candidates, -1).astype(jnp.int32)
    at = jnp.maximum(jnp.concatenate([own, others], axis=1), 0)
    z = own_logits(features, kernel, bias, at, kernel_transposed)
    correction = None
    if log_q is not None:
        log_q = checks.float_array("log_q", log_q)
        checks.has_shape("log_q", log_q, (*batch, count), "one number for each candidate")
        log_q = lax.stop_gradient(log_q).astype(z.dtype).reshape(-1, count)
        correction = jnp.pad(jnp.where(compared, -log_q, 0), ((0, 0), (1, 0)))
    where = jnp.concatenate([counted, compared & (others != own)], axis=1)
    return losses_of_candidates(z, correction, known, counted, where, options).reshape(batch)
