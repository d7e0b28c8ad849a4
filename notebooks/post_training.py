# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Post-training
#
# A model that half knows a task can learn the rest from its own answers, if a program can tell which of them are right.
# This is how language models are taught to reason. Here the model is so small that all of it takes seconds, and every
# part of the recipe is there: a sampler, rewards, groups of answers, a ratio that is held near 1, and log-probabilities
# of the distribution that was drawn from.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jsoftmax
from jsoftmax import categorical

# %% [markdown]
# ## The task
#
# Five digits are given, and the answer is those that occur, in order, each once, and then an end. An answer has two to
# six tokens, of eleven kinds: the digits and `END`.

# %%
DIGITS, END = 5, 10
LONGEST, CLASSES = DIGITS + 1, END + 1


def ask(key, count):
    """Which digits occur, (count, 10); the order in which they are given does not matter."""
    return jnp.any(jax.nn.one_hot(jax.random.randint(key, (count, DIGITS), 0, 10), 10, dtype=bool), axis=-2)


def right(occurs):
    return jnp.sort(jnp.where(occurs, jnp.arange(10), END), axis=-1)[..., :LONGEST]


def until_end(tokens):
    ends = (tokens == END).astype(int)
    return jnp.cumsum(ends, axis=-1) - ends == 0


def show(tokens):
    return " ".join(
        "end" if token == END else str(token) for token in np.asarray(tokens)[np.asarray(until_end(tokens))]
    )


some = ask(jax.random.key(1), 3)
for occurs, answer in zip(some, right(some), strict=True):
    print(np.flatnonzero(occurs), "→", show(answer))

# %% [markdown]
# ## The policy
#
# A network of two layers sees which digits occur and which token it wrote last, and gives the logits of the next one.
# First it learns from right answers, but for 60 steps only.

# %%
WIDTH = 64


def init(key):
    first, second = jax.random.split(key)
    return {
        "in": jax.random.normal(first, (10 + CLASSES, WIDTH)) / 4,
        "bias": jnp.zeros(WIDTH),
        "out": jax.random.normal(second, (WIDTH, CLASSES)) / WIDTH**0.5,
    }


def logits_of(params, occurs, last):
    seen = jnp.concatenate([occurs, jax.nn.one_hot(last, CLASSES)], axis=-1)
    return jax.nn.gelu(seen @ params["in"] + params["bias"]) @ params["out"]


def logits_of_answers(params, occurs, tokens):
    """(..., LONGEST, CLASSES); before the first token, the last one was END."""
    last = jnp.concatenate([jnp.full_like(tokens[..., :1], END), tokens[..., :-1]], axis=-1)
    return logits_of(params, jnp.broadcast_to(occurs[..., None, :], (*last.shape, 10)), last)


@jax.jit
def imitate(params, key):
    optimizer = optax.adam(3e-3)

    def step(carry, key):
        params, moments = carry
        occurs = ask(key, 256)
        tokens = right(occurs)

        def loss(params):
            logits = logits_of_answers(params, occurs, tokens)
            losses = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, tokens)
            return jnp.mean(losses, where=until_end(tokens))

        updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, 60))
    return params


start = imitate(init(jax.random.key(0)), jax.random.key(1))

# %% [markdown]
# ## Answers and rewards
#
# The sampler draws from the nucleus, the likeliest classes that have 95 % of the probability together. It keeps what it
# drew, which classes could have been drawn, and the log-probability *among those*. An answer's reward is 1 if it is
# right, and `group_advantages` compares it with the other answers to the same question.

# %%
TOP_P = 0.95


def write(params, occurs, key):
    def step(last, key):
        logits = logits_of(params, occurs, last)
        kept = categorical.filter_classes(logits, top_p=TOP_P)
        drawn = categorical.sample(key, logits, where=kept)
        return drawn, (drawn, categorical.log_prob(logits, drawn, where=kept), kept)

    first = jnp.full(occurs.shape[:-1], END)
    _, answers = jax.lax.scan(step, first, jax.random.split(key, LONGEST))
    tokens, log_prob, kept = (jnp.moveaxis(x, 0, occurs.ndim - 1) for x in answers)
    return {"tokens": tokens, "log_prob": log_prob, "kept": kept, "weights": until_end(tokens)}


def rewards_of(occurs, answers):
    return jnp.all(answers["tokens"] == right(occurs), axis=-1, where=answers["weights"]).astype(jnp.float32)


QUESTIONS, ANSWERS = 32, 8
occurs = jnp.repeat(ask(jax.random.key(2), QUESTIONS)[:, None], ANSWERS, axis=1)
answers = jax.jit(write)(start, occurs, jax.random.key(3))
rewards = rewards_of(occurs, answers)
question = int(jnp.argmin(jnp.abs(rewards.mean(-1) - 0.4)))
print("digits", np.flatnonzero(occurs[question, 0]))
for tokens, reward, advantage in zip(
    answers["tokens"][question], rewards[question], jsoftmax.group_advantages(rewards)[question], strict=True
):
    print(f"  {show(tokens):16} reward {reward:.0f}, advantage {advantage:+.2f}")
print(f"right answers, before: {rewards.mean():.2f}")

# %% [markdown]
# ## Four objectives
#
# The first step on these answers is plain policy gradient. After it, the policy is no longer the one that wrote them,
# and the ratio r = π / π_old makes up for that where it can be trusted. The methods differ in how they stop trusting
# it. The slope with respect to log π is what moves the policy:

# %%
ratio = jnp.linspace(0.05, 3.0, 300)
OBJECTIVES = {
    "GRPO": {"clip": 0.2},
    "GSPO": {"importance": "sequence", "clip": 0.05},
    "CISPO": {"objective": "cispo"},
    "SAPO": {"objective": "sapo"},
}
fig, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for advantage, axes in zip((1.0, -1.0), panels, strict=True):
    for name in ("GRPO", "CISPO", "SAPO"):

        def total(log_prob, advantage=advantage, options=OBJECTIVES[name]):
            advantages = jnp.full_like(log_prob, advantage)
            return -jsoftmax.clipped_policy_loss(
                log_prob, jnp.zeros_like(log_prob), advantages, reduction="sum", **options
            )

        axes.plot(ratio, jax.grad(total)(jnp.log(ratio)), label=name)
    axes.set(xlabel="ratio r", title=f"advantage {advantage:+.0f}")
panels[0].set(ylabel="slope along log π")
panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# PPO's clip, which GRPO shares, stops at once: nothing beyond the bound on the side where the action gains, everything
# on the other. CISPO bounds the factor, at 5, but never drops a token. SAPO fades out, on both sides. GSPO is not in
# the figure, since it clips as GRPO does, but the mean ratio of a whole answer.
#
# ## Learning
#
# Each round writes eight answers to each of 32 questions, and takes two steps on them. The whole round is one compiled
# program, whatever the objective; `where=kept` makes the trainer's log-probabilities those of the distribution that was
# drawn from.


# %%
@functools.partial(jax.jit, static_argnames=("name", "filtered"))
def learn(params, key, name, filtered=True):
    optimizer = optax.adam(optax.linear_schedule(2e-3, 0.0, 2 * ROUNDS))

    def round_of(carry, key):
        params, moments = carry
        key_ask, key_write = jax.random.split(key)
        occurs = jnp.repeat(ask(key_ask, QUESTIONS)[:, None], ANSWERS, axis=1)
        answers = write(params, occurs, key_write)
        rewards = rewards_of(occurs, answers)

        def policy_of(params):
            logits = logits_of_answers(params, occurs, answers["tokens"])
            where = answers["kept"] if filtered else None
            return jsoftmax.softmax_statistics(logits, answers["tokens"], where=where).log_prob

        old = policy_of(params)

        def loss(params):
            return jsoftmax.group_relative_policy_loss(
                policy_of(params), old, rewards, weights=answers["weights"], **OBJECTIVES[name]
            )

        def step(_, carry):
            params, moments = carry
            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            return optax.apply_updates(params, updates), moments

        difference = jnp.mean(jnp.abs(old - answers["log_prob"]), where=answers["weights"])
        return jax.lax.fori_loop(0, 2, step, (params, moments)), (rewards.mean(), difference)

    (params, _), logs = jax.lax.scan(round_of, (params, optimizer.init(params)), jax.random.split(key, ROUNDS))
    return params, *logs


ROUNDS = 150
runs = {name: learn(start, jax.random.key(4), name) for name in OBJECTIVES}
for name, (_, reward, difference) in runs.items():
    print(
        f"{name:6} right answers: {reward[:15].mean():.2f} in the first tenth, {reward[-15:].mean():.2f} in the last; "
        f"|Δ log p| at most {difference.max():.0e}"
    )
    assert reward[-15:].mean() > reward[:15].mean() + 0.1

# %% [markdown]
# Where trainer and sampler are one program in one precision, as here, their log-probabilities agree to rounding. If the
# trainer takes log-probabilities among all classes instead, it is off by as much as the nucleus leaves out, another
# amount for each token:

# %%
_, reward, difference = learn(start, jax.random.key(4), "GRPO", filtered=False)
fig, (left, right_panel) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
smooth = np.ones(10) / 10
for name, run in runs.items():
    left.plot(np.convolve(run[1], smooth, mode="valid"), label=name)
left.set(xlabel="round", ylabel="share of right answers, mean of ten", ylim=(0, 1.02))
left.legend(frameon=False)
right_panel.semilogy(difference, label="among all classes")
right_panel.semilogy(np.maximum(runs["GRPO"][2], 1e-9), label="among those that could be drawn")
right_panel.set(xlabel="round", ylabel="mean |Δ log p| (nats)")
right_panel.legend(frameon=False)
plt.show()

# %% [markdown]
# In large systems the sampler is another program, in lower precision, and the difference is never 0. `sampler_policy`
# takes the sampler's own log-probabilities and weighs each token by min(π_old / π_sampler, C).
#
# ## Packed rows
#
# The answers here fill half of their rows on average; the rest is padding. Trainers put answers one after the other in
# one row, and `segment_ids` tells which token is of which. The loss is the same.

# %%
old = answers["log_prob"][question]
policy = old + 0.1 * jax.random.normal(jax.random.key(5), old.shape)
padded = jsoftmax.group_relative_policy_loss(policy, old, rewards[question], weights=answers["weights"][question])

counts = np.asarray(answers["weights"][question])
ids = np.repeat(np.arange(ANSWERS), counts.sum(-1))
packed = jsoftmax.group_relative_policy_loss(policy[counts], old[counts], rewards[question], segment_ids=ids)
print(f"{counts.size} places padded, loss {padded:.6f}; {ids.size} packed, loss {packed:.6f}")
assert abs(padded - packed) < 1e-5

# %% [markdown]
# The page on post-training lists all objectives and the calls that make them; `examples/post_training.py` trains a
# transformer, with features and a kernel in place of logits, and a sampler in bfloat16.
