"""Post-train a small transformer by rewards that a program gives to its own answers.

    python examples/post_training.py --objective cispo

The task: five digits are given, and the model is to write those that occur, in order, each once. First it learns from
right answers, briefly; then from answers of its own, each of which is right, a reward of 1, or not, 0.

As in large systems, the sampler is another program than the trainer: it works in bfloat16 and leaves out the tail of
the distribution (top-p). It hands on what it drew, from which classes, and with which log-probabilities. The trainer
takes log-probabilities over the same classes, from features and the head's kernel, and makes up for what is left of the
difference by `sampler_policy`.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from language_model import LanguageModel, Settings
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

import jsoftmax
from jsoftmax import categorical

DIGITS = 5  # of a question
ANSWER = DIGITS + 1  # tokens of the longest answer, its end included
ASK, END = 10, 11  # after the ten digits
MODEL = Settings(vocabulary=12, width=64, layers=1, heads=4, context=DIGITS + ANSWER)
OBJECTIVES = {
    "grpo": {},
    "dapo": {"average": "token", "clip": (0.2, 0.28)},
    "dr_grpo": {"scale": False, "average": "token"},
    "gspo": {"importance": "sequence", "clip": (0.03, 0.04)},
    "cispo": {"objective": "cispo", "average": "token"},
    "sapo": {"objective": "sapo"},
    "rloo": {"scale": False, "baseline": "leave_one_out"},
}


class Plan(NamedTuple):
    objective: str = "grpo"
    supervised_steps: int = 30
    steps: int = 100
    questions: int = 32
    answers: int = 8
    passes: int = 2  # over the same answers
    top_p: float = 0.98
    learning_rate: float = 1e-3
    seed: int = 0


class Answers(NamedTuple):
    """What the sampler hands on, (..., ANSWER) each."""

    tokens: jax.Array
    log_prob: jax.Array
    support: jax.Array  # (..., ANSWER, classes): the classes that could be drawn, −1 for the others
    weights: jax.Array  # False after the end


class Log(NamedTuple):
    reward: jax.Array
    difference: jax.Array  # between log-probabilities of trainer and sampler, the mean of its size
    length: jax.Array


def questions(key: jax.Array, count: int) -> jax.Array:
    digits = jax.random.randint(key, (count, DIGITS), 0, 10)
    return jnp.concatenate([digits, jnp.full((count, 1), ASK)], axis=-1)


def right_answers(asked: jax.Array) -> jax.Array:
    """The digits that occur, in order, and END up to the full length."""
    occurs = jnp.any(jax.nn.one_hot(asked[..., :DIGITS], 10, dtype=bool), axis=-2)
    return jnp.sort(jnp.where(occurs, jnp.arange(10), END), axis=-1)[..., :ANSWER]


def until_end(tokens: jax.Array) -> jax.Array:
    """Which tokens count: all up to the first END."""
    ends = (tokens == END).astype(jnp.int32)
    return jnp.cumsum(ends, axis=-1) - ends == 0


def features_of_answers(model: LanguageModel, asked: jax.Array, tokens: jax.Array) -> jax.Array:
    """(..., ANSWER, width): those that each token of the answers is predicted from."""
    return model(jnp.concatenate([asked, tokens[..., :-1]], axis=-1))[..., DIGITS:, :]


def write_answers(model: LanguageModel, asked: jax.Array, key: jax.Array, top_p: float) -> Answers:
    """One token after the other, each from the nucleus of the model's distribution."""
    rows = asked.shape[0]

    def step(tokens: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        place, key = now
        logits = features_of_answers(model, asked, tokens)[:, place] @ model.head.kernel[...]
        kept = categorical.filter_classes(logits, top_p=top_p)
        drawn = categorical.sample(key, logits, where=kept)
        log_prob = categorical.log_prob(logits, drawn, where=kept)
        support = jnp.where(kept, jnp.arange(MODEL.vocabulary), -1)
        return tokens.at[:, place].set(drawn), (log_prob, support)

    places = (jnp.arange(ANSWER), jax.random.split(key, ANSWER))
    tokens, (log_prob, support) = jax.lax.scan(step, jnp.full((rows, ANSWER), END), places)
    return Answers(tokens, log_prob.T, jnp.moveaxis(support, 0, 1), until_end(tokens))


class Learner:
    """The model, its optimizer, and the two kinds of steps it learns by."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.graph, self.parameters = nnx.split(LanguageModel(MODEL, nnx.Rngs(plan.seed)))
        rate = optax.linear_schedule(plan.learning_rate, 0.0, plan.supervised_steps + plan.passes * plan.steps)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
        self.state = (self.parameters, self.optimizer.init(self.parameters))
        self.supervised = jax.jit(self.supervised_step, donate_argnums=0)
        self.reinforced = jax.jit(self.reinforced_step, donate_argnums=0)

    def descend(self, state: tuple, loss: Callable) -> tuple:
        parameters, moments = state
        gradients = jax.grad(loss)(parameters)
        updates, moments = self.optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    def supervised_step(self, state: tuple, key: jax.Array) -> tuple:
        asked = questions(key, self.plan.questions * self.plan.answers)
        answers = right_answers(asked)

        def loss(parameters):
            model = nnx.merge(self.graph, parameters)
            features, weights = features_of_answers(model, asked, answers), until_end(answers).astype(jnp.float32)
            return jsoftmax.linear_softmax_cross_entropy(features, model.head.kernel[...], answers, weights=weights)

        return self.descend(state, loss)

    def statistics(self, parameters, asked: jax.Array, answers: Answers) -> jsoftmax.SoftmaxStatistics:
        model = nnx.merge(self.graph, parameters)
        return jsoftmax.linear_softmax_statistics(
            features_of_answers(model, asked, answers.tokens),
            model.head.kernel[...],
            answers.tokens,
            support=answers.support,
            active=answers.weights,
        )

    def reinforced_step(self, state: tuple, key: jax.Array) -> tuple[tuple, Log]:
        plan = self.plan
        key_questions, key_answers = jax.random.split(key)
        asked = jnp.repeat(questions(key_questions, plan.questions), plan.answers, axis=0)
        sampler = nnx.merge(self.graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state[0]))
        answers = write_answers(sampler, asked, key_answers, plan.top_p)
        rewards = jnp.all(answers.tokens == right_answers(asked), axis=-1, where=answers.weights).astype(jnp.float32)
        old = self.statistics(state[0], asked, answers).log_prob
        options = dict(OBJECTIVES[plan.objective])
        if plan.objective == "dr_grpo":
            options["denominator"] = old.size

        def grouped(x: jax.Array) -> jax.Array:
            return x.reshape(plan.questions, plan.answers, *x.shape[1:])

        def loss(parameters):
            return jsoftmax.group_relative_policy_loss(
                grouped(self.statistics(parameters, asked, answers).log_prob),
                grouped(old),
                grouped(rewards),
                weights=grouped(answers.weights),
                sampler_policy=grouped(answers.log_prob),
                **options,
            )

        state = jax.lax.fori_loop(0, plan.passes, lambda _, state: self.descend(state, loss), state)
        difference = jnp.mean(jnp.abs(old - answers.log_prob), where=answers.weights & jnp.isfinite(old))
        return state, Log(rewards.mean(), difference, answers.weights.sum(-1).mean())


def train(plan: Plan, on_step: Callable = lambda: None) -> list[Log]:
    learner, key = Learner(plan), jax.random.key(plan.seed)
    state, logs = learner.state, []
    for step in range(plan.supervised_steps):
        state = learner.supervised(state, jax.random.fold_in(key, step))
        on_step()
    for step in range(plan.steps):
        state, log = learner.reinforced(state, jax.random.fold_in(key, plan.supervised_steps + step))
        logs.append(log)
        on_step()
    return [Log(*map(float, log)) for log in logs]


def tenths(logs: list[Log]) -> tuple[float, float]:
    """Mean rewards of the first and of the last tenth of the steps."""
    count, rewards = max(1, len(logs) // 10), [log.reward for log in logs]
    return float(np.mean(rewards[:count])), float(np.mean(rewards[-count:]))


def draw(logs: dict[str, list[Log]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    reward, difference = figure.subplots(1, 2)
    for name, of_run in logs.items():
        steps = np.arange(1, len(of_run) + 1)
        reward.plot(steps, [log.reward for log in of_run], label=name)
        difference.plot(steps, [log.difference for log in of_run], label=name)
    reward.set(xlabel="step", ylim=(0, 1.02))
    reward.set_title("Share of right answers", fontsize=12, loc="left")
    reward.legend(frameon=False, loc="lower right")
    difference.set(xlabel="step", ylabel="nats", yscale="log")
    difference.set_title("Between trainer and sampler, mean |Δ log p|", fontsize=12, loc="left")
    for axes in (reward, difference):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def print_runs(console: Console, logs: dict[str, list[Log]]) -> None:
    table = Table("", *(Column(name, justify="right") for name in logs))
    rows = {
        "reward, first tenth of the steps": lambda of_run: f"{tenths(of_run)[0]:.3f}",
        "reward, last tenth": lambda of_run: f"{tenths(of_run)[1]:.3f}",
        "trainer and sampler apart, first step (nats)": lambda of_run: f"{of_run[0].difference:.1e}",
        "trainer and sampler apart, last step": lambda of_run: f"{of_run[-1].difference:.1e}",
        "tokens of an answer, last step": lambda of_run: f"{of_run[-1].length:.2f}",
    }
    for name, show in rows.items():
        table.add_row(name, *(show(of_run) for of_run in logs.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    both, known = ["grpo", "cispo"], ", ".join(OBJECTIVES)
    parser.add_argument("--objective", choices=OBJECTIVES, help=f"{known} (default: {' and '.join(both)})")
    parser.add_argument("--out", type=Path, default=Path("out/post_training.png"), help="where the figure goes")
    for name, default in Plan._field_defaults.items():
        if name != "objective":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"({default})")
    arguments = vars(parser.parse_args())
    console, start, out, objective = Console(), time.perf_counter(), arguments.pop("out"), arguments.pop("objective")
    logs = {}
    with Progress(console=console) as progress:
        for name in [objective] if objective else both:
            plan = Plan(objective=name, **arguments)
            task = progress.add_task(f"Training: {name}", total=plan.supervised_steps + plan.steps)
            logs[name] = train(plan, functools.partial(progress.advance, task))
    print_runs(console, logs)
    draw(logs, out)
    print(f"Done in {time.perf_counter() - start:.0f} s. The figure is in {out}")


if __name__ == "__main__":
    main()
