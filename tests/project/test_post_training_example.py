"""The model in examples/post_training.py, in short."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import post_training
import pytest
from flax import nnx

pytestmark = pytest.mark.optimized
ASK, END = post_training.ASK, post_training.END


def test_right_answers():
    asked = jnp.array([[3, 1, 3, 0, 9, ASK], [7, 7, 7, 7, 7, ASK], [5, 4, 3, 2, 1, ASK]])
    answers = post_training.right_answers(asked)
    np.testing.assert_array_equal(answers, [[0, 1, 3, 9, END, END], [7] + [END] * 5, [1, 2, 3, 4, 5, END]])
    counting = post_training.until_end(jnp.array([[0, END, 1, END, 2, 3], [1, 2, 3, 4, 5, 6]]))
    np.testing.assert_array_equal(counting, [[True, True, False, False, False, False], [True] * 6])


@pytest.mark.slow
def test_trainer_has_the_numbers_of_a_sampler_of_its_precision():
    learner = post_training.Learner(post_training.Plan())
    asked = post_training.questions(jax.random.key(1), 16)

    @jax.jit
    def both(parameters):
        model = nnx.merge(learner.graph, parameters)
        answers = post_training.write_answers(model, asked, jax.random.key(2), top_p=0.8)
        return answers, learner.statistics(parameters, asked, answers).log_prob

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        answers, log_prob = both(learner.parameters)
    np.testing.assert_allclose(log_prob, np.where(answers.weights, answers.log_prob, 0), rtol=1e-4, atol=1e-5)
    assert np.all((answers.support == answers.tokens[..., None]).any(-1))
    assert (answers.support == -1).any()


@pytest.mark.slow
def test_reward_rises(tmp_path, monkeypatch, capsys):
    logs = {}
    monkeypatch.setattr(post_training, "print_runs", lambda console, given: logs.update(given))
    figure = tmp_path / "made" / "post_training.png"
    monkeypatch.setattr(sys, "argv", ["post_training.py", "--objective", "grpo", "--steps", "25", "--out", str(figure)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        post_training.main()
    first, last = post_training.tenths(logs["grpo"])
    assert last > first + 0.2
    assert all(0 < log.difference < 0.1 for log in logs["grpo"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure) in capsys.readouterr().out
