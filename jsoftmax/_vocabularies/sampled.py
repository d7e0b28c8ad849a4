"""Cross-entropy against sampled classes."""

from typing import Any, Unpack

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jsoftmax._losses.row_losses import CrossEntropy, MarginOptions, row_losses
from jsoftmax._rows import checks
from jsoftmax._rows.labels import is_class
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._vocabularies.candidate_logits import candidate_logits
from jsoftmax._vocabularies.drawing import Sample, Sampler
from jsoftmax._vocabularies.samplers import log_uniform_sampler

PER_ROW = ("temperature", "z_loss", "margin", "angular_margin")


class SampledLossOptions(MarginOptions, total=False):
    """Options of losses against some of the classes: those of `LogitOptions`, the margins of `LossOptions`, and

    z_loss: λ of the penalty λ·logsumexp², over the classes that were compared.
    ignore_index: rows with this integer label give loss 0 and gradient 0, whatever their features hold.
    """

    z_loss: ArrayLike
    ignore_index: int | None


@in_any_layout("features")
def sampled_softmax_cross_entropy(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    key: Array | Sample,
    *,
    num_sampled: int | None = None,
    bias: ArrayLike | None = None,
    sampler: Sampler | None = None,
    remove_accidental_hits: bool = True,
    subtract_log_q: bool = True,
    correct_label: bool = True,
    num_true: int = 1,
    kernel_transposed: bool = False,
    gathered: bool = False,
    **options: Unpack[SampledLossOptions],
) -> Array:
    r"""Cross-entropy against classes sampled for the whole batch: an estimate of the full loss, to train with.

    .. math:: \mathrm{loss} = \log\Bigl(e^{s_y} + \sum_{j \in S \setminus y} e^{s_j}\Bigr) - s_y, \qquad
        s_j = h w_j + b_j - \log Q_j

    with S the sample and :math:`Q_j` how often class j is expected in it: a class that comes up often counts less. N
    rows of D features take :math:`2 N n D` operations for n samples, three times that with gradients; the number of
    classes does not enter. To evaluate a model, use `linear_softmax_cross_entropy`: it has the exact loss.

    Whether :math:`\log Q_y` is taken off the label too is a choice between two estimates. With `correct_label=True`,
    as TensorFlow has it, the loss asks which of the candidates was the label, and is least at the true
    log-probabilities for any n. With False, the label counts as the one class that is always there, and the sum
    estimates the full softmax's denominator without bias: the loss and its gradient tend to the full ones as n grows,
    and logsumexp (`z_loss`) to the full logsumexp. Both are the full loss if all classes are sampled.

    Args:
        features: float array `(*batch, features)`.
        kernel: float array `(features, classes)`, or with `kernel_transposed` `(classes, features)`, which is faster
            here: a class is then one contiguous row.
        labels: integers `(*batch,)`, or `(*batch, num_true)` if `num_true` is above 1. One that is no class makes its
            row NaN.
        key: a random key, or a `Sample` drawn before by `sampler`.
        num_sampled: n, how many classes to sample; for a key only.
        bias: float array `(classes,)`.
        sampler: None for `log_uniform_sampler`, which wants classes numbered from the most frequent to the rarest.
        remove_accidental_hits: whether a sampled class that is one of the row's labels is left out of that row.
        subtract_log_q: whether logits are corrected by :math:`\log Q` at all.
        correct_label: whether the label's are, too.
        num_true: labels of each row, which share the target evenly; those equal to `ignore_index` take no part.
        kernel_transposed: whether kernel is `(classes, features)`.
        gathered: whether kernel and bias hold only the classes of `touched_classes(labels, sample)`, in that order.
        **options: `temperature`, `softcap`, `margin`, `angular_margin`, `z_loss`, `ignore_index`, `derivative`,
            `implementation`. All that acts on logits acts before the correction. Margins need `num_true=1`.

    Returns:
        The loss of each row `(*batch,)` in nats: float32, or float64 for float64 features.

    Raises:
        TypeError: features or kernel are not floating-point, labels are not integers.
        ValueError: shapes that do not fit, a sampler of another number of classes, or an option out of range.

    Derivatives: with respect to features, kernel, bias, temperature and soft cap; every mode with `derivative="jvp"`.
    The kernel's gradient is an array of its shape; see `touched_classes` for one whose cost does not grow with the
    classes. Memory: the logits `(*batch, num_true + num_sampled)`.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> features, kernel = jnp.ones((6, 4)), jnp.zeros((4, 10_000))
        >>> losses = jsoftmax.sampled_softmax_cross_entropy(
        ...     features, kernel, jnp.arange(6), jax.random.key(0), num_sampled=64, correct_label=False
        ... )
        >>> print(losses.shape, bool(jnp.all((losses > 8) & (losses < 10))))  # about log(10000) = 9.2
        (6,) True

    References:
        Jean et al., *On Using Very Large Target Vocabulary for Neural Machine Translation*, 2015;
        Bengio and Senécal, *Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language
        Model*, 2008; Ma and Collins, *Noise Contrastive Estimation and Negative Sampling for Conditional Models:
        Consistency and Statistical Efficiency*, 2018.
    """
    checks.only_options(options, SampledLossOptions)
    features, kernel = checks.float_array("features", features), checks.float_array("kernel", kernel)
    labels = checks.integer_array("labels", labels)
    if features.ndim == 0 or kernel.ndim != 2:
        raise ValueError(
            f"features has shape {features.shape} and kernel {kernel.shape}, but need (*batch, features) and a matrix"
        )
    if num_true < 1:
        raise ValueError(f"num_true must be at least 1, got {num_true}")
    batch = features.shape[:-1]
    shape = batch if num_true == 1 else (*batch, num_true)
    checks.has_shape("labels", labels, shape, "one class number for each row of features, or num_true of them")
    sampler = _checked_sampler(sampler, kernel.shape[0 if kernel_transposed else 1], gathered)
    sample = _drawn(sampler, key, num_sampled)
    held = labels.size + sample.classes.size if gathered else sampler.classes
    checks.has_kernel_shape(kernel, features.shape[-1], held, kernel_transposed)
    if bias is not None:
        checks.has_shape("bias", checks.float_array("bias", bias), (held,), "one number for each class of the kernel")

    given: Any = options
    for name in PER_ROW:
        if jnp.ndim(given.get(name, 0.0)):
            given[name] = checks.scalar_or_rows(name, given[name], batch).reshape(-1)
    labels, features = labels.reshape(-1, num_true), features.reshape(-1, features.shape[-1])
    counted = jnp.ones(labels.shape, bool)
    ignore_index = options.pop("ignore_index", None)
    if ignore_index is not None:
        counted = labels != ignore_index
        # A NaN in an ignored row would reach the kernel's gradient as 0 · NaN.
        features = jnp.where(jnp.any(counted, axis=1, keepdims=True), features, 0)
    known = is_class(labels, sampler.classes)
    labels = jnp.where(known, labels, -1).astype(jnp.int32)
    own, shared = jnp.maximum(labels, 0), sample.classes
    at = (own, shared)
    if gathered:
        at = jnp.arange(labels.size).reshape(labels.shape), labels.size + jnp.arange(shared.size)
    z = candidate_logits(features, kernel, bias, *at, kernel_transposed, options.get("derivative", "vjp"))
    correction = None
    if subtract_log_q:
        true_q, other_q = (sampler.log_expected_count(classes, sample).astype(z.dtype) for classes in (own, shared))
        true_q = true_q if correct_label else jnp.zeros_like(true_q)
        correction = -jnp.concatenate([true_q, jnp.broadcast_to(other_q, (z.shape[0], other_q.size))], axis=1)
    hits = jnp.zeros((z.shape[0], sample.classes.size), bool)
    if remove_accidental_hits:
        hits = jnp.any((labels[..., None] == sample.classes[None, None]) & counted[..., None], axis=1)
    where = jnp.concatenate([counted, ~hits], axis=1)
    return losses_of_candidates(z, correction, known, counted, where, options).reshape(batch)


def _checked_sampler(sampler: Sampler | None, held: int, gathered: bool) -> Sampler:
    if gathered and sampler is None:
        raise ValueError("gathered=True needs the sampler that made the sample, got sampler=None")
    if held == 0:
        raise ValueError("kernel has no class; a loss needs one")
    sampler = log_uniform_sampler(held) if sampler is None else sampler
    if not gathered and sampler.classes != held:
        raise ValueError(f"sampler has {sampler.classes} classes, but needs {held}, those of the kernel")
    return sampler


def _drawn(sampler: Sampler, key: Array | Sample, num_sampled: int | None) -> Sample:
    if isinstance(key, Sample):
        if num_sampled not in (None, key.classes.size):
            raise ValueError(
                f"num_sampled is {num_sampled}, but the sample given as key has {key.classes.size} classes"
            )
        return key
    if num_sampled is None:
        raise ValueError("num_sampled must be given with a key, got None")
    return sampler.sample(key, num_sampled)


def losses_of_candidates(
    z: Array, correction: Array | None, known: Array, counted: Array, where: Array, options: SampledLossOptions
) -> Array:
    """The labels are the first classes of each row, and share the target."""
    num_true = known.shape[1]
    if num_true == 1:
        labels = jnp.where(known[:, 0], 0, -1)
    else:
        share = counted.astype(z.dtype) / jnp.maximum(jnp.sum(counted, axis=1, keepdims=True, dtype=z.dtype), 1)
        share = jnp.where(jnp.all(known | ~counted, axis=1, keepdims=True), share, jnp.nan)
        labels = jnp.pad(share, ((0, 0), (0, z.shape[1] - num_true)))
    given: Any = {**options, "logit_adjustment": correction}
    return row_losses(CrossEntropy(), z, labels, where=where, active=jnp.any(counted, axis=1), **given)
