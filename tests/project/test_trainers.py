"""The functions of docs/trainers.md that stand in for a trainer's: right in float64, and those that were measured."""

import ast
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from benchmarks import trainers
from jsoftmax.testing import float64

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
SOURCE = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
FUNCTIONS = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.FunctionDef)}
STORED = json.loads(trainers.RESULTS.read_text(encoding="utf-8"))

ROWS, WIDTH, CLASSES, SMOOTHING, Z, CAP = 9, 5, 7, 0.1, 1e-2, 2.0
RANDOM = np.random.default_rng(0)
FEATURES, KERNEL = RANDOM.normal(size=(ROWS, WIDTH)), RANDOM.normal(size=(WIDTH, CLASSES))
LABELS, WEIGHTS = RANDOM.integers(0, CLASSES, ROWS), RANDOM.uniform(0, 2, ROWS) * (np.arange(ROWS) % 3 > 0)
SOFT = RANDOM.dirichlet(np.ones(CLASSES), ROWS)


@pytest.fixture(scope="module")
def adapters():
    namespace = {"jax": jax, "jnp": jnp, "jsoftmax": jsoftmax}
    exec(compile(ast.Module(list(FUNCTIONS.values()), []), "docs/trainers.md", "exec"), namespace)
    return namespace


def of_logits(logits, targets):
    """Cross-entropy and logsumexp of each row, by the textbook."""
    logsumexp = np.log(np.sum(np.exp(logits), axis=-1))
    return np.sum(targets * (logsumexp[:, None] - logits), axis=-1), logsumexp


def test_weighted_sum_without_the_entropy_of_the_smoothed_label(adapters):
    one_hot = np.eye(CLASSES)[LABELS]
    targets = np.where(one_hot, 1 - SMOOTHING, SMOOTHING / (CLASSES - 1))
    losses, _ = of_logits(FEATURES @ KERNEL, targets)
    losses += np.sum(targets * np.log(targets), axis=-1)
    with float64():
        found = adapters["compute_weighted_cross_entropy"](FEATURES, KERNEL, LABELS, jnp.asarray(WEIGHTS), SMOOTHING)
    np.testing.assert_allclose(found, [np.sum(WEIGHTS * losses), np.sum(WEIGHTS)], rtol=1e-12)


@pytest.mark.parametrize("soft", [False, True], ids=["smoothed", "soft"])
def test_loss_with_a_dictionary(adapters, soft):
    """Labels that are no classes mark rows that don't count."""
    live = np.arange(ROWS) % 3 > 0
    labels = np.where(live, LABELS, np.where(np.arange(ROWS) % 2, -1, CLASSES))
    targets = SOFT if soft else (1 - SMOOTHING) * np.eye(CLASSES)[LABELS] + SMOOTHING / CLASSES
    losses, logsumexp = of_logits(FEATURES @ KERNEL, targets)
    options = {"soft_target_labels": SOFT} if soft else {"label_smoothing": SMOOTHING}
    with float64(), jax.numpy_dtype_promotion("standard"):
        loss, found = adapters["cross_entropy"](FEATURES, KERNEL, jnp.asarray(labels), z_loss_scale=Z, **options)
    hits = np.argmax(FEATURES @ KERNEL, axis=-1) == LABELS
    expected = {
        "total_loss": np.mean((losses + Z * logsumexp**2)[live]),
        "z_loss": np.mean(logsumexp[live] ** 2),
        "cross_entropy_loss": np.mean(losses[live]),
        "accuracy": np.mean(hits[live]),
    }
    for name, number in expected.items():
        np.testing.assert_allclose(found[name], number, rtol=1e-7, err_msg=name)  # its shares are in float32
    np.testing.assert_allclose(found["per_target_loss"], np.where(live, losses + Z * logsumexp**2, 0), rtol=1e-12)
    np.testing.assert_array_equal(loss, found["total_loss"])


def test_soft_cap_is_in_the_gradient(adapters):
    name, options = "fused_cross_entropy_loss_and_logsumexp_penalty", {"logsumexp_weight": Z, "logit_soft_cap": CAP}
    capped = CAP * np.tanh(FEATURES @ KERNEL / CAP)
    losses, logsumexp = of_logits(capped, np.eye(CLASSES)[LABELS])
    with float64():
        weights = jnp.asarray(WEIGHTS)

        def loss(kernel):
            return adapters[name](FEATURES, LABELS, kernel, weight=weights, return_argmax=True, **options)

        (found, argmax), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(KERNEL))
    share = WEIGHTS / np.sum(WEIGHTS)
    np.testing.assert_allclose(found, np.sum(share * (losses + Z * logsumexp**2)), rtol=1e-12)
    np.testing.assert_array_equal(argmax, np.where(WEIGHTS > 0, np.argmax(capped, axis=-1), 0))
    p = np.exp(capped - logsumexp[:, None])
    d_capped = share[:, None] * (p - np.eye(CLASSES)[LABELS] + 2 * Z * logsumexp[:, None] * p)
    np.testing.assert_allclose(gradient, FEATURES.T @ (d_capped * (1 - (capped / CAP) ** 2)), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["tunix_loss", "vocab_tiling_nnx_loss", "causal_lm_loss_chunked_lm_head"])
def test_page_shows_what_was_measured(name):
    (measured,) = ast.parse(inspect.getsource(getattr(trainers, name))).body
    assert ast.dump(FUNCTIONS[name]) == ast.dump(measured)


def test_stored_losses_and_gradients_agree():
    assert [each["trainer"] for each in STORED] == sorted(trainers.TRAINERS)
    for each in STORED:
        own, *others = each["programs"]
        assert own["program"] == "own"
        assert others[-1]["program"] == "jsoftmax"
        assert all(trainers.agree(own, row) for row in others)


def test_page_shows_the_stored_results():
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    for each in STORED:
        for row in each["programs"]:
            numbers = [f"{row['loss']:.6f}", f"{row['temp_mb']:.0f} MB", f"{row['ratio']:.2f}"]
            assert [row["program"], *numbers] in [shown[1:2] + shown[2:3] + shown[4:6] for shown in cells]
