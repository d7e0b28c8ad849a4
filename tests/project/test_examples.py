"""The demo in examples/digits.py."""

import sys

import digits
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import jsoftmax

pytestmark = pytest.mark.optimized


def test_split_is_stratified_and_fixed_by_the_seed():
    data, held_out = digits.load(seed=0)
    assert len(data.labels) + len(held_out.labels) == 1797
    whole = np.bincount(np.concatenate([data.labels, held_out.labels]))
    # Stratified: no class is further than one digit from its quarter.
    assert np.all(np.abs(np.bincount(held_out.labels) - whole / 4) <= 1)
    for part, again in zip((data, held_out), digits.load(seed=0), strict=True):
        np.testing.assert_array_equal(part.images, again.images)
        np.testing.assert_array_equal(part.labels, again.labels)


def test_shift_moves_each_image_by_at_most_one_pixel():
    images = np.zeros((200, 8, 8, 1), np.float32)
    images[:, 4, 4] = 1
    moved = np.asarray(digits.shift(images, jax.random.key(0)))
    _, rows, columns, _ = np.nonzero(moved)
    assert len(rows) == 200
    # 200 draws leave none of 9 places out but with odds of 9 (8/9)^200, 5e-10.
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(i, j) for i in (3, 4, 5) for j in (3, 4, 5)}


def test_demo_learns_to_read_digits(tmp_path, monkeypatch, capsys):
    scores = {}
    monkeypatch.setattr(digits, "print_scores", lambda console, given: scores.update(given))
    figure = tmp_path / "made" / "digits.png"
    monkeypatch.setattr(sys, "argv", ["digits.py", "--out", str(figure)])
    # optax raises a float to the power of its integer step count.
    with jax.numpy_dtype_promotion("standard"):
        digits.main()
    assert scores["held out"].accuracy >= 0.97
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure) in capsys.readouterr().out


@pytest.mark.slow
def test_temperature_scaling_halves_the_error_of_an_overconfident_network():
    """The demo's network learns 150 digits by heart, a fifth with a label at random, and is too sure of others."""
    images, labels = (np.concatenate(parts) for parts in zip(*digits.load(seed=0), strict=True))
    learnt, fitting, judged = slice(0, 150), slice(150, 750), slice(750, None)
    random = np.random.default_rng(0)
    noisy = np.where(random.random(150) < 0.2, random.integers(0, 10, 150), labels[learnt]).astype(np.int32)
    network = digits.Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        optimizer.update(network, nnx.grad(digits.mean_loss)(network, images[learnt], noisy))

    # optax raises a float to the power of its integer step count.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(100):
            step(network, optimizer)
    logits = digits.predict(network, images)
    fit = jsoftmax.fit_temperature(logits[fitting], labels[fitting])
    before = jsoftmax.expected_calibration_error(logits[judged], labels[judged])
    after = jsoftmax.expected_calibration_error(fit.apply(logits[judged]), labels[judged])
    assert fit.temperature > 1.5
    assert before > 2 * after
