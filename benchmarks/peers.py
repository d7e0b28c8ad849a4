"""Peers that may be missing; their column is then left out. optax and `jax.nn` are always there."""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.harness import Program

OPTIONAL = {"torch": "PyTorch", "tokamax": "tokamax", "jax_cce": "jax-cce"}


def absent() -> list[str]:
    return [name for module, name in OPTIONAL.items() if importlib.util.find_spec(module) is None]


def linear_losses() -> dict[str, Callable]:
    """Linear cross-entropy of (features, kernel, labels), from the packages that are installed."""
    found = {}
    if importlib.util.find_spec("tokamax"):
        tokamax = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
        found["tokamax"] = lambda x, kernel, labels: tokamax(x, labels, kernel, reduction="mean")
    if importlib.util.find_spec("jax_cce"):
        jax_cce = importlib.import_module("jax_cce").linear_cross_entropy
        found["jax-cce"] = lambda x, kernel, labels: jax_cce(x, kernel.T, labels)
    return found


def torch_cross_entropy(logits: jax.Array, labels: jax.Array, gradient: bool) -> Mapping[str, Program]:
    """PyTorch's cross-entropy, eager and compiled, on the same device as JAX; nothing without PyTorch."""
    if not importlib.util.find_spec("torch"):
        return {}
    # Threads that wait busily for PyTorch's next call would take the processors from JAX's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch = importlib.import_module("torch")
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    z = torch.from_numpy(np.asarray(logits, np.float32)).to(device, getattr(torch, str(logits.dtype)))
    y = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
    z.requires_grad_(gradient)
    functions = {"PyTorch": torch.nn.functional.cross_entropy}
    functions["PyTorch compiled"] = torch.compile(functions["PyTorch"])
    return {name: _torch_program(torch, function, z, y) for name, function in functions.items()}


def _torch_program(torch: Any, function: Callable, z: Any, y: Any) -> Program:
    def run() -> Any:
        loss = function(z, y)
        if z.requires_grad:
            z.grad = None
            loss.backward()
        if z.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()

    start = time.perf_counter()
    run()
    return Program(run, compile_ms=1e3 * (time.perf_counter() - start))
