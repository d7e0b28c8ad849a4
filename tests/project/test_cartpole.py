"""The agent in examples/cartpole.py, judged by gymnasium's own CartPole-v1."""

import cartpole
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def trained():
    # optax raises a float to the power of its integer step count.
    with jax.numpy_dtype_promotion("standard"):
        return cartpole.train(seed=0)


@pytest.fixture(scope="module")
def outcomes(trained):
    return cartpole.sweep(trained[0], seed=0)


def test_equations_are_those_of_gymnasium():
    environment = gymnasium.make("CartPole-v1")
    move = jax.jit(cartpole.move)
    actions = np.random.default_rng(0).integers(2, size=500)
    ends = 0
    state, _ = environment.reset(seed=0)
    ours = jnp.asarray(state)
    for action in actions:
        ours, fell = move(ours, action)
        state, _, terminated, _, _ = environment.step(action)
        # An episode of random actions has some twenty steps; ours are in float32, gymnasium's in float64.
        np.testing.assert_allclose(ours, state, rtol=1e-4, atol=1e-5)
        assert fell == terminated
        if terminated:
            ends += 1
            state, _ = environment.reset()
            ours = jnp.asarray(state)
    assert ends >= 10


@pytest.mark.parametrize("state", [(2.39, 0.4, 0, 0), (2.39, 0.6, 0, 0), (0, 0, 0.2, 0.4), (0, 0, 0.2, 0.6)])
@pytest.mark.parametrize("sign", [1, -1])
def test_cart_and_pole_fall_where_gymnasium_says(state, sign):
    environment = gymnasium.make("CartPole-v1")
    environment.reset(seed=0)
    environment.unwrapped.state = sign * np.array(state, float)
    ours, fell = cartpole.move(sign * jnp.array(state, jnp.float32), 0)
    theirs, _, terminated, _, _ = environment.step(0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert fell == terminated


def test_advantages_are_returns_less_their_mean_over_the_standing(monkeypatch):
    monkeypatch.setattr(cartpole, "CARTS", 2)
    standing = np.array([[True, True], [True, True], [True, False]])
    # The carts' discounted returns are 1 + d + d² and 1 + d, then 1 + d and 1, then 1; the mean of each step is taken.
    d = cartpole.DISCOUNT
    expected = np.array([[d**2 / 2, -(d**2) / 2], [d / 2, -d / 2], [0, 0]])
    expected /= np.sqrt(np.sum(expected**2) / 5) + 1e-3
    np.testing.assert_allclose(cartpole.advantages_of(standing), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_agent_solves_cartpole(outcomes):
    for temperature in (0.0, 1.0):
        assert outcomes[temperature].returns.shape == (100,)
        assert outcomes[temperature].returns.mean() >= 475


@pytest.mark.slow
def test_masked_action_is_never_chosen(trained, outcomes):
    assert all(outcome.counts[2] == 0 for outcome in outcomes.values())
    # Each reward was one action that was allowed.
    assert all(outcome.counts[:2].sum() == outcome.returns.sum() for outcome in outcomes.values())
    # Nothing teaches its logit, not even the entropy bonus.
    assert np.all(trained[0].head[:, 2] == 0)
    assert np.any(trained[0].head[:, :2] != 0)


@pytest.mark.slow
def test_temperature_raises_entropy_and_costs_return(outcomes):
    entropy = [outcomes[temperature].entropy for temperature in cartpole.TEMPERATURES]
    assert entropy[0] == 0
    assert np.all(np.diff(entropy) > 0)
    assert np.log(2) - 0.02 < entropy[-1] <= np.log(2)
    # Random actions balance the pole for some twenty steps.
    assert outcomes[20.0].returns.mean() < 50


@pytest.mark.slow
def test_figure_is_drawn(trained, outcomes, tmp_path):
    path = tmp_path / "made" / "cartpole.png"
    cartpole.draw(trained[1], outcomes, path)
    assert path.read_bytes().startswith(b"\x89PNG")
