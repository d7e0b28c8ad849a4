"""`python -m jsoftmax verify`: the gradients of every loss, on every device that JAX sees."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jsoftmax
from jsoftmax import reference
from jsoftmax.testing import Loss, compare_gradient, float64, gradient_answers, gradient_of

DTYPES = ("float32", "bfloat16", "float16", "float64")
# A rule in reverse, the rule for every mode in reverse and forwards.
MODES = (("vjp", "reverse"), ("jvp", "reverse"), ("jvp", "forward"))
HALF_A_PLACE = 0.51  # computed in float32 and rounded once


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss beside its textbook formula (None: cross-entropy, whose gradient is ŷ − y) and the error allowed to it."""

    name: str
    loss: Callable
    textbook: Loss | None = None
    max_ulps: float = 8.0
    labels: str = "integer"
    relative_to: str = "entry"
    has_rule: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    device: str
    loss: str
    dtype: str
    derivative: str
    mode: str
    worst_ulps: float
    max_ulps: float
    ok: bool


def cases() -> list[Case]:
    integer = jsoftmax.softmax_cross_entropy_with_integer_labels

    def tempered(logits, labels):
        return reference.cross_entropy(logits / 2, labels)

    def capped(logits, labels):
        return reference.cross_entropy(30 * jnp.tanh(logits / 30), labels)

    def penalized(logits, labels):
        return reference.cross_entropy(logits, labels) + 1e-2 * reference.logsumexp(logits) ** 2

    row = {"relative_to": "row", "max_ulps": 16.0}
    return [
        Case("cross-entropy, integer labels", integer),
        Case("cross-entropy, dense labels", jsoftmax.softmax_cross_entropy, labels="dense", **row),
        Case(
            "label smoothing 0.1",
            functools.partial(integer, label_smoothing=0.1),
            functools.partial(reference.smoothed_cross_entropy, label_smoothing=0.1),
            **row,
        ),
        Case("temperature 2", functools.partial(integer, temperature=2.0), tempered, **row),
        # A cap rounds the logits, to half a place of 30 at best: 32 places of a probability.
        Case("soft cap 30", functools.partial(integer, softcap=30.0), capped, max_ulps=64.0, relative_to="row"),
        Case("z-loss 0.01", functools.partial(integer, z_loss=1e-2), penalized, **row),
        Case("focal, γ = 2", jsoftmax.softmax_focal_loss, reference.focal_loss, **row),
        Case("poly, ε = 2", jsoftmax.poly_loss_cross_entropy, reference.poly_loss, **row),
        Case(
            "sigmoid cross-entropy",
            jsoftmax.sigmoid_binary_cross_entropy,
            reference.sigmoid_cross_entropy,
            labels="binary",
            has_rule=False,
            **row,
        ),
        Case(
            "sigmoid focal, γ = 2",
            jsoftmax.sigmoid_focal_loss,
            reference.sigmoid_focal_loss,
            labels="binary",
            has_rule=False,
            **row,
        ),
    ]


def verify(platforms: Collection[str] = ()) -> Iterator[Result]:
    """Each loss, dtype and derivative mode, on one device of each kind, of the platforms named or of all."""
    platforms = platforms or {device.platform for device in jax.devices()} | {"cpu"}
    devices = [device for platform in sorted(platforms) for device in jax.local_devices(backend=platform)]
    for device in {device.device_kind: device for device in devices}.values():
        # TPUs have no float64.
        for dtype in (dtype for dtype in DTYPES if not (dtype == "float64" and device.platform == "tpu")):
            for case in cases():
                with float64() if dtype == "float64" else contextlib.nullcontext():
                    yield from _verify_case(device, case, dtype)


def _verify_case(device: Any, case: Case, dtype: str) -> Iterator[Result]:
    logits, labels = (jax.device_put(array, device) for array in _data(case.labels, dtype))
    answers = gradient_answers(case.loss, logits, labels, case.textbook)
    for derivative, mode in MODES if case.has_rule else ((None, "reverse"), (None, "forward")):
        loss = functools.partial(case.loss, derivative=derivative) if derivative else case.loss
        gradient = gradient_of(loss, logits, labels, mode)
        allowed = _allowed(case, gradient.dtype)
        report = compare_gradient(gradient, answers, max_ulps=allowed, relative_to=case.relative_to)
        name = f"{device.platform} ({device.device_kind})"
        yield Result(name, case.name, dtype, derivative or "autodiff", mode, report.worst_ulps, allowed, report.ok)


def _allowed(case: Case, dtype: np.dtype) -> float:
    """In 16 bits a gradient is rounded once, from float32. (Forward mode answers in the loss's dtype, float32.)"""
    return HALF_A_PLACE if jnp.finfo(dtype).bits == 16 else case.max_ulps


def _data(kind: str, dtype: str):
    """Rows of 40 classes, from undecided to a label 10 above all others together, offset up to ±20."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 40)) * random.uniform(0.5, 3, size=(6, 1))
    numbers = random.integers(0, 40, size=6)
    if kind == "binary":
        return jnp.asarray(logits * 3, dtype), jnp.asarray(random.integers(0, 2, size=logits.shape), dtype)
    logits[np.arange(6), numbers] = np.log(np.exp(logits).sum(axis=-1)) + np.linspace(-4, 10, 6)
    logits += random.uniform(-20, 20, size=(6, 1))
    if kind == "dense":
        target = random.dirichlet(np.ones(40), size=6)
        return jnp.asarray(logits, dtype), jnp.asarray(target, dtype)
    return jnp.asarray(logits, dtype), jnp.asarray(numbers)


def main(as_json: bool) -> int:
    """Print what `verify` finds, as it finds it; 0 if all is right."""
    results = []
    header = f"{'loss':<32}{'dtype':<10}{'rule':<10}{'mode':<9}{'worst ulp':>10}{'allowed':>9}  verdict"
    for result in verify():
        if not as_json:
            if not results or results[-1].device != result.device:
                print(f"\n{result.device}, JAX {jax.__version__}\n\n{header}\n{'-' * len(header)}")
            verdict = "ok" if result.ok else "WRONG"
            columns = f"{result.loss:<32}{result.dtype:<10}{result.derivative:<10}{result.mode:<9}"
            print(f"{columns}{result.worst_ulps:>10.2f}{result.max_ulps:>9g}  {verdict}", flush=True)
        results.append(result)
    wrong = sum(not result.ok for result in results)
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    else:
        print(f"\n{len(results) - wrong} of {len(results)} gradients are right." if wrong else "")
        print(
            f"{wrong} WRONG" if wrong else f"All {len(results)} gradients agree with ŷ − y, autodiff and differences."
        )
    return 1 if wrong else 0
