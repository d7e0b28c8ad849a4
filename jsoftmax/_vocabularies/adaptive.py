"""Adaptive softmax: a small head for frequent classes, and clusters of rare ones behind narrow projections.

Which rows need which cluster depends on their labels: `routing.py` brings each cluster its own.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jsoftmax._blocks.projection import Product, project
from jsoftmax._losses.activations import log_softmax
from jsoftmax._losses.row_losses import CrossEntropy, row_losses
from jsoftmax._rows import checks
from jsoftmax._rows.labels import is_class
from jsoftmax._rows.layouts import in_any_layout
from jsoftmax._vocabularies.routing import routed

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AdaptiveSoftmax:
    r"""Softmax over classes from frequent to rare, in which rare classes cost little.

    The head has a logit for each of the most frequent classes and one for each cluster of the others. The classes of a
    cluster share a projection to fewer features:

    .. math:: \log p_y = \begin{cases} \log p^{\mathrm{head}}_y & y < \mathrm{cutoff}_0 \\
        \log p^{\mathrm{head}}_{\mathrm{cluster}(y)} + \log p^{\mathrm{cluster}(y)}_y & \text{else} \end{cases}

    A description only: hashable, and without parameters, which `init` makes and every method takes. The model is that
    of `torch.nn.AdaptiveLogSoftmaxWithLoss`; each kernel here is the transpose of PyTorch's.

    Args:
        features: width of the features.
        classes: how many, numbered from the most frequent to the rarest.
        cutoffs: ascending class numbers at which the clusters begin; the first is the number of frequent classes.
        div_value: cluster i projects to `features // div_value ** (i + 1)` features, at least 1.
        head_bias: whether the logits of the head have a bias.

    Raises:
        ValueError: cutoffs that do not ascend between 1 and classes − 1, or sizes below 1.

    Example:
        >>> import jax, jax.numpy as jnp, jsoftmax
        >>> adaptive = jsoftmax.AdaptiveSoftmax(16, 1000, (50, 200))
        >>> params = adaptive.init(jax.random.key(0))
        >>> features, labels = jnp.ones((3, 16)), jnp.array([0, 100, 999])
        >>> losses = adaptive.cross_entropy(params, features, labels)
        >>> log_p = adaptive.log_prob(params, features)
        >>> print(log_p.shape, bool(jnp.allclose(losses, -log_p[jnp.arange(3), labels], rtol=1e-5)))
        (3, 1000) True

    References:
        Grave et al., *Efficient Softmax Approximation for GPUs*, 2017.
    """

    features: int
    classes: int
    cutoffs: tuple[int, ...]
    div_value: float = 4.0
    head_bias: bool = False

    def __post_init__(self):
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))
        ends = (0, *self.cutoffs, self.classes)
        if not self.cutoffs or any(low >= high for low, high in itertools.pairwise(ends)):
            raise ValueError(f"cutoffs must ascend between 1 and {self.classes} − 1, got {self.cutoffs}")
        if self.features < 1 or self.div_value < 1:
            raise ValueError(
                f"features and div_value must be at least 1, got features={self.features} and "
                f"div_value={self.div_value}"
            )

    @property
    def clusters(self) -> tuple[tuple[int, int, int], ...]:
        """First class, end and width of each cluster."""
        ends = (*self.cutoffs, self.classes)
        widths = [max(int(self.features // self.div_value ** (i + 1)), 1) for i in range(len(self.cutoffs))]
        return tuple(zip(ends[:-1], ends[1:], widths, strict=True))

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
        """Parameters of variance 1/width: `head` (features, head), `bias` (head,) or None, and for each cluster in
        `tails` its `project` (features, width) and `kernel` (width, classes of the cluster)."""

        def kernel(key: Array, rows: int, columns: int) -> Array:
            return jax.random.normal(key, (rows, columns), dtype) * np.sqrt(1 / rows).astype(dtype)

        head = self.cutoffs[0] + len(self.cutoffs)
        first, *keys = jax.random.split(key, 1 + 2 * len(self.cutoffs))
        tails = tuple(
            {"project": kernel(one, self.features, width), "kernel": kernel(other, width, end - start)}
            for one, other, (start, end, width) in zip(keys[::2], keys[1::2], self.clusters, strict=True)
        )
        bias = jnp.zeros(head, dtype) if self.head_bias else None
        return {"head": kernel(first, self.features, head), "bias": bias, "tails": tails}

    @in_any_layout("features")
    def cross_entropy(
        self,
        params: Params,
        features: ArrayLike,
        labels: ArrayLike,
        *,
        ignore_index: int | None = None,
        capacity: int | None = None,
        derivative: str = "vjp",
    ) -> Array:
        """−log p of the labels, exact, with the products of a cluster for its own rows only.

        Args:
            params: from `init`.
            features: float array `(*batch, features)`.
            labels: integers `(*batch,)`. One that is no class makes its row NaN.
            ignore_index: rows with this label give loss 0 and gradient 0, whatever their features hold.
            capacity: rows of a cluster that are computed at a time; None for a 16th of all rows, at least 64. A cluster
                with more rows takes more rounds. Under `vmap`, every round is computed.
            derivative: "vjp" for reverse mode and forward over reverse, "jvp" for every mode.

        Returns:
            The loss of each row `(*batch,)` in nats: float32, or float64 for float64 features.

        Raises:
            TypeError: features are not floating-point, labels are not integers.
            ValueError: shapes that do not fit, or a capacity below 1.
        """
        features, batch = self._rows(params, features)
        labels = checks.integer_array("labels", labels)
        checks.has_shape("labels", labels, batch, "one class number for each row of features")
        labels = labels.reshape(-1)
        active = jnp.ones(labels.shape, bool) if ignore_index is None else labels != ignore_index
        # A NaN in an ignored row would reach a kernel's gradient as 0 · NaN.
        features = jnp.where(active[:, None], features, 0)
        losses = _losses(self, params, features, labels, active, capacity, derivative)
        return losses.reshape(batch)

    @in_any_layout("features")
    def log_prob(self, params: Params, features: ArrayLike) -> Array:
        """Log-probabilities of all classes, `(*batch, classes)` in nats: float32, or float64 for float64 features."""
        features, batch = self._rows(params, features)
        return _log_prob(self, params, features).reshape(*batch, self.classes)

    @in_any_layout("features")
    def predict(self, params: Params, features: ArrayLike, *, capacity: int | None = None) -> Array:
        """The most probable class of each row, int32 `(*batch,)`: `argmax` of `log_prob`, without most of its cost.

        Only rows for which a cluster as a whole is more probable than the best class so far look into that cluster.
        """
        features, batch = self._rows(params, features)
        return _predict(self, params, features, capacity).reshape(batch)

    def _rows(self, params: Params, features: ArrayLike) -> tuple[Array, tuple[int, ...]]:
        features = checks.float_array("features", features)
        if features.ndim == 0 or features.shape[-1] != self.features:
            raise ValueError(f"features has shape {features.shape}, but needs (*batch, {self.features})")
        needs = (self.features, self.cutoffs[0] + len(self.cutoffs))
        checks.has_shape("params['head']", params["head"], needs, "(features, frequent classes and clusters)")
        return features.reshape(-1, self.features), features.shape[:-1]


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _losses(
    adaptive: AdaptiveSoftmax,
    params: Params,
    features: Array,
    labels: Array,
    active: Array,
    capacity: int | None,
    derivative: str,
) -> Array:
    """The loss of each row: that of the head, whose label may be a cluster, and that within the cluster."""
    head_labels = jnp.where(is_class(labels, adaptive.classes), labels, -1)
    for number, (start, end, _) in enumerate(adaptive.clusters):
        head_labels = jnp.where((labels >= start) & (labels < end), adaptive.cutoffs[0] + number, head_labels)
    logits = _head_logits(params, features, derivative)
    losses = row_losses(CrossEntropy(), logits, head_labels, active=active, derivative=derivative)
    for tail, (start, end, _) in zip(params["tails"], adaptive.clusters, strict=True):
        within = active & (labels >= start) & (labels < end)
        rows = {"features": features, "labels": jnp.where(within, labels - start, 0)}
        losses = losses + routed(_TailLosses(derivative), tail, rows, within, capacity, derivative)
    return losses


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(adaptive: AdaptiveSoftmax, params: Params, features: Array) -> Array:
    head = log_softmax(_head_logits(params, features, "jvp"))
    parts = [head[:, : adaptive.cutoffs[0]]]
    for number, tail in enumerate(params["tails"]):
        of_cluster = head[:, adaptive.cutoffs[0] + number, None]
        within = log_softmax(_tail_logits(tail, features, "jvp"))
        parts.append(jnp.broadcast_to(of_cluster, within.shape) + within)
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _predict(adaptive: AdaptiveSoftmax, params: Params, features: Array, capacity: int | None) -> Array:
    head = log_softmax(_head_logits(params, features, "vjp"))
    frequent = head[:, : adaptive.cutoffs[0]]
    best, classes = jnp.max(frequent, axis=1), jnp.argmax(frequent, axis=1).astype(jnp.int32)
    for number, (tail, (start, _, _)) in enumerate(zip(params["tails"], adaptive.clusters, strict=True)):
        of_cluster = head[:, adaptive.cutoffs[0] + number]
        log_p, at = routed(_best, tail, {"features": features}, of_cluster > best, capacity, "vjp")
        better = (of_cluster > best) & (of_cluster + log_p > best)
        best, classes = jnp.where(better, of_cluster + log_p, best), jnp.where(better, start + at, classes)
    return classes


def _head_logits(params: Params, features: Array, derivative: str) -> Array:
    logits = project(features, params["head"], Product(False, derivative))
    bias = params["bias"]
    return logits if bias is None else logits + jnp.broadcast_to(bias.astype(logits.dtype), logits.shape)


def _tail_logits(tail: Params, features: Array, derivative: str) -> Array:
    narrow = project(features, tail["project"], Product(False, derivative)).astype(features.dtype)
    return project(narrow, tail["kernel"], Product(False, derivative))


@dataclasses.dataclass(frozen=True)
class _TailLosses:
    derivative: str

    def __call__(self, tail: Params, rows: Params) -> Array:
        logits = _tail_logits(tail, rows["features"], self.derivative)
        options: Any = {"active": rows["within"], "derivative": self.derivative}
        return row_losses(CrossEntropy(), logits, rows["labels"], **options)


def _best(tail: Params, rows: Params) -> tuple[Array, Array]:
    log_p = log_softmax(_tail_logits(tail, rows["features"], "vjp"))
    return jnp.max(log_p, axis=1), jnp.argmax(log_p, axis=1).astype(jnp.int32)
