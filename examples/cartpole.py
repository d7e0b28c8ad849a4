"""Train a softmax policy to balance a pole with REINFORCE, and see what its temperature does.

    python examples/cartpole.py --out out/cartpole.png

The agent learns on the equations of CartPole in JAX, many carts at once, and is judged by gymnasium's own CartPole-v1.
Its network has a logit more than CartPole has actions: doing nothing is not allowed, and a mask says so.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gymnasium.vector import VectorEnv
from jax import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jsoftmax
from jsoftmax import categorical, plots

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
MOST_STEPS = 500
ACTIONS = ("left", "right", "nothing")
ALLOWED = np.array([True, True, False])

HIDDEN = 32
CARTS = 64
UPDATES = 150
LEARNING_RATE = 1e-2
DISCOUNT = 0.99
ENTROPY_BONUS = 0.01

EPISODES = 100
TEMPERATURES = (0.0, 0.5, 1.0, 2.0, 5.0, 20.0)


class Policy(NamedTuple):
    hidden: Array  # (4, HIDDEN)
    head: Array  # (HIDDEN, actions)


class Outcome(NamedTuple):
    returns: np.ndarray  # one for each episode
    entropy: float  # of the policy, in nats, on average over the states that it came to
    counts: np.ndarray  # how often each action was chosen


def move(state: Array, action: Array) -> tuple[Array, Array]:
    """A fiftieth of a second: the next position, speed, angle and angular speed, and whether the pole fell."""
    _, speed, angle, turn = state
    force = jnp.where(action == 1, FORCE, -FORCE)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (force + POLE * HALF_LENGTH * turn**2 * sin) / (CART + POLE)
    spin = (GRAVITY * sin - cos * push) / (HALF_LENGTH * (4 / 3 - POLE * cos**2 / (CART + POLE)))
    shove = push - POLE * HALF_LENGTH * spin * cos / (CART + POLE)
    state = state + SECONDS * jnp.stack([speed, shove, turn, spin])
    return state, (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > np.deg2rad(12))


def new_policy(key: Array) -> Policy:
    # The head is 0, so that the untrained policy likes all actions alike. There is no bias: CartPole is symmetric.
    return Policy(jax.nn.initializers.orthogonal(2**0.5)(key, (4, HIDDEN)), jnp.zeros((HIDDEN, len(ACTIONS))))


def logits_of(policy: Policy, states: Array) -> Array:
    return jnp.tanh(states @ policy.hidden) @ policy.head


def play(policy: Policy, key: Array) -> tuple[Array, Array, Array]:
    """States, actions and whether the pole still stood, each (MOST_STEPS, CARTS, ...), of one episode for each cart."""
    key_start, key_play = jax.random.split(key)
    states = jax.random.uniform(key_start, (CARTS, 4), minval=-0.05, maxval=0.05)

    def step(carry, key):
        states, standing = carry
        actions = categorical.sample(key, logits_of(policy, states), where=ALLOWED)
        moved, fell = jax.vmap(move)(states, actions)
        # A cart whose episode is over stays where it is.
        return (jnp.where(standing[:, None], moved, states), standing & ~fell), (states, actions, standing)

    return jax.lax.scan(step, (states, jnp.ones(CARTS, bool)), jax.random.split(key_play, MOST_STEPS))[1]


def advantages_of(standing: Array) -> Array:
    """The discounted rewards from each step on, less their mean over the carts that then still stood."""

    def back(later, rewards):
        later = rewards + DISCOUNT * later
        return later, later

    rewards = standing.astype(jnp.float32)
    returns = jax.lax.scan(back, jnp.zeros(CARTS), rewards, reverse=True)[1]
    baseline = returns.sum(axis=1, keepdims=True) / jnp.maximum(rewards.sum(axis=1, keepdims=True), 1)
    advantages = rewards * (returns - baseline)
    return advantages / (jnp.sqrt(jnp.sum(advantages**2) / rewards.sum()) + 1e-3)


def loss(policy: Policy, states: Array, actions: Array, standing: Array) -> Array:
    statistics = jsoftmax.softmax_statistics(logits_of(policy, states), actions, where=ALLOWED)
    return jsoftmax.policy_gradient_loss(
        statistics, advantages_of(standing), entropy_bonus=ENTROPY_BONUS, weights=standing
    )


def train(*, seed: int, on_update=lambda: None) -> tuple[Policy, list[float]]:
    """The policy, and the mean return of each update's episodes."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, UPDATES))

    @jax.jit
    def improve(policy, moments, key):
        states, actions, standing = play(policy, key)
        gradients = jax.grad(loss)(policy, states, actions, standing)
        updates, moments = optimizer.update(gradients, moments, policy)
        return optax.apply_updates(policy, updates), moments, standing.sum() / CARTS

    key_policy, *keys = jax.random.split(jax.random.key(seed), UPDATES + 1)
    policy = new_policy(key_policy)
    moments = optimizer.init(policy)
    returns = []
    for key in keys:
        policy, moments, mean = improve(policy, moments, key)
        returns.append(float(mean))
        on_update()
    return policy, returns


@jax.jit
def act(policy: Policy, states: Array, temperature: Array, key: Array) -> tuple[Array, Array]:
    """An action for each state, and the entropy that it was drawn with."""
    options = {"where": ALLOWED, "temperature": temperature}
    logits = logits_of(policy, states)
    return categorical.sample(key, logits, **options), categorical.entropy(logits, **options)


def evaluate(policy: Policy, environment: VectorEnv, temperature: float, *, seed: int) -> Outcome:
    """One episode in each of the environments; those that are over are waited for."""
    states, _ = environment.reset(seed=seed)
    standing = np.ones(environment.num_envs, bool)
    returns, entropy, counts = np.zeros(len(standing)), 0.0, np.zeros(len(ACTIONS), int)
    keys = jax.random.split(jax.random.key(seed), MOST_STEPS)
    for key in keys:
        actions, entropies = map(np.asarray, act(policy, states, jnp.float32(temperature), key))
        entropy += entropies[standing].sum()
        counts += np.bincount(actions[standing], minlength=len(ACTIONS))
        states, rewards, terminated, truncated, _ = environment.step(actions)
        returns += standing * rewards
        standing &= ~(terminated | truncated)
        if not standing.any():
            break
    return Outcome(returns, float(entropy / counts.sum()), counts)


def sweep(policy: Policy, *, seed: int, on_outcome=lambda: None) -> dict[float, Outcome]:
    """At each temperature, the same episodes of CartPole-v1."""
    environment = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="sync")
    outcomes = {}
    for temperature in TEMPERATURES:
        outcomes[temperature] = evaluate(policy, environment, temperature, seed=seed)
        on_outcome()
    environment.close()
    return outcomes


def draw(training: Sequence[float], outcomes: dict[float, Outcome], path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), dpi=120, layout="constrained")
    curve, returns, entropy = figure.subplots(1, 3)
    curve.plot(range(1, len(training) + 1), training, color=plots.BLUE)
    curve.set(xlabel="update", ylabel="mean return", ylim=(0, 1.04 * MOST_STEPS))
    curve.set_title("While training, temperature 1", fontsize=12, loc="left")
    returns.plot(TEMPERATURES, [outcome.returns.mean() for outcome in outcomes.values()], "o-", color=plots.BLUE)
    returns.set(ylabel="mean return", ylim=(0, 1.04 * MOST_STEPS))
    returns.set_title(f"{EPISODES} episodes of CartPole-v1", fontsize=12, loc="left")
    entropy.plot(TEMPERATURES, [outcome.entropy for outcome in outcomes.values()], "s-", color=plots.ORANGE)
    entropy.axhline(np.log(ALLOWED.sum()), color=plots.GREY, linestyle=":", label="two actions alike: log 2")
    entropy.set(ylabel="mean entropy (nats)", ylim=(-0.02, 0.75))
    entropy.set_title("The policy's entropy in them", fontsize=12, loc="left")
    entropy.legend(frameon=False, loc="lower right")
    for axes in (returns, entropy):
        axes.set_xscale("symlog", linthresh=0.5)
        axes.set_xticks(TEMPERATURES, [f"{temperature:g}" for temperature in TEMPERATURES])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="temperature", xlim=(-0.1, 26))
    for axes in (curve, returns, entropy):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def print_outcomes(console: Console, outcomes: dict[float, Outcome]) -> None:
    table = Table()
    for heading in ("temperature", "mean return", "worst", "entropy", *ACTIONS):
        table.add_column(heading, justify="right")
    for temperature, (returns, entropy, counts) in outcomes.items():
        numbers = (f"{temperature:g}", f"{returns.mean():.1f}", f"{returns.min():.0f}", f"{entropy:.3f}")
        table.add_row(*numbers, *(f"{count:,}" for count in counts))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a softmax policy on CartPole and sweep its temperature.")
    parser.add_argument("--seed", type=int, default=0, help="fixes the network, the draws and the episodes (default 0)")
    parser.add_argument("--out", type=Path, default=Path("out/cartpole.png"), help="where the figure goes")
    arguments = parser.parse_args()
    console = Console()
    start = time.perf_counter()
    with Progress(console=console) as progress:
        training = progress.add_task(f"Training on {CARTS} carts", total=UPDATES)
        policy, returns = train(seed=arguments.seed, on_update=functools.partial(progress.advance, training))
        sweeping = progress.add_task("Temperatures", total=len(TEMPERATURES))
        outcomes = sweep(policy, seed=arguments.seed, on_outcome=functools.partial(progress.advance, sweeping))
    print_outcomes(console, outcomes)
    draw(returns, outcomes, arguments.out)
    print(f"Done in {time.perf_counter() - start:.0f} s. The figure is in {arguments.out}")


if __name__ == "__main__":
    main()
