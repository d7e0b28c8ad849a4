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
# # Large vocabularies
#
# A small language model is trained twice on the source of Python's own standard library: once with the full softmax
# over all tokens, a block of rows at a time, and once against sampled tokens. What does the shortcut save, and what
# does it cost?

# %%
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jsoftmax

# %% [markdown]
# ## The text
#
# Tokens are words and signs with the space before them. The vocabulary is the 8,192 most frequent ones, in order of
# their frequency: that is what the log-uniform sampler wants. Every tenth file is held out.

# %%
VOCABULARY = 8192
root = Path(sysconfig.get_paths()["stdlib"])
texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(root.glob("*.py"))]
tokens = [re.findall(r" ?\w+| ?[^\w\s]|\n *|\s", text) for text in texts]
train = [token for number, part in enumerate(tokens) if number % 10 for token in part]
held_out = [token for number, part in enumerate(tokens) if number % 10 == 0 for token in part]
names = ["<unk>", *(token for token, _ in Counter(train).most_common(VOCABULARY - 1))]
numbers = {name: number for number, name in enumerate(names)}
train, held_out = (np.array([numbers.get(token, 0) for token in part], np.int32) for part in (train, held_out))
assert len(names) == VOCABULARY

counts = np.bincount(train, minlength=VOCABULARY)
share = counts / counts.sum()
zipf = np.log((np.arange(VOCABULARY) + 2) / (np.arange(VOCABULARY) + 1)) / np.log(VOCABULARY + 1)
fig, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
axes.loglog(np.arange(1, VOCABULARY + 1), share, label="tokens of the text")
axes.loglog(np.arange(1, VOCABULARY + 1), zipf, "--", label="log-uniform sampler")
axes.set(xlabel="rank", ylabel="share")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The estimate
#
# The sampled loss compares the label with n sampled tokens, each corrected by how often it was to be expected. With
# `correct_label=False` its exponentials estimate the full denominator, so that the loss tends to the full one. Here are
# 200 estimates for each n, with random weights.

# %%
sampler = jsoftmax.log_uniform_sampler(VOCABULARY)
features = jax.random.normal(jax.random.key(0), (64, 32))
kernel = jax.random.normal(jax.random.key(1), (VOCABULARY, 32)) * 0.2
labels = jnp.asarray(train[:64])
exact = jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, kernel_transposed=True)


def estimates(count):
    def one(key):
        losses = jsoftmax.sampled_softmax_cross_entropy(
            features, kernel, labels, key, num_sampled=count, kernel_transposed=True, correct_label=False
        )
        return losses.mean()

    return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(2), 200))


sizes = [16, 64, 256, 1024]
errors = np.stack([estimates(count) - exact for count in sizes])
for count, error in zip(sizes, errors, strict=True):
    print(f"n = {count:>4}: off by {error.mean():+.4f} on average, spread {error.std():.4f}")
assert abs(errors[-1].mean()) < abs(errors[0].mean())
assert errors[-1].std() < errors[0].std()

# %% [markdown]
# ## Two runs from one start
#
# The model sees three tokens: the sum of their embeddings, one table for each place, goes through a tanh to a linear
# last layer. Both runs see the same batches. They are judged by the same number, the exact loss on the held-out files.

# %%
WIDTH, CONTEXT, ROWS, STEPS = 48, 3, 512, 150


def examples(text, at):
    return text[at[:, None] + np.arange(CONTEXT)], text[at + CONTEXT]


def hidden(params, tokens):
    return jnp.tanh(sum(params["embedding"][place][tokens[:, place]] for place in range(CONTEXT)))


def full_loss(params, tokens, labels, key):
    return jsoftmax.linear_softmax_cross_entropy(hidden(params, tokens), params["head"], labels, kernel_transposed=True)


def sampled_loss(params, tokens, labels, key):
    return jsoftmax.sampled_softmax_cross_entropy(
        hidden(params, tokens), params["head"], labels, key, num_sampled=256, sampler=sampler, kernel_transposed=True
    ).mean()


optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
judge = jax.jit(full_loss)
test = examples(held_out, np.linspace(0, len(held_out) - CONTEXT - 1, 2048, dtype=int))
curves, seconds = {}, {}
for name, loss in {"full": full_loss, "sampled": sampled_loss}.items():

    @jax.jit
    def step(params, state, tokens, labels, key, loss=loss):
        updates, state = optimizer.update(jax.grad(loss)(params, tokens, labels, key), state)
        return optax.apply_updates(params, updates), state

    random = np.random.default_rng(0)
    embedding = jax.random.normal(jax.random.key(0), (CONTEXT, VOCABULARY, WIDTH)) * 0.1
    params = {"embedding": embedding, "head": jnp.zeros((VOCABULARY, WIDTH))}
    state, curves[name], seconds[name] = optimizer.init(params), [], []
    for number in range(STEPS):
        if number % 25 == 0:
            curves[name].append(float(judge(params, *test, None)))
        batch = examples(train, random.integers(0, len(train) - CONTEXT - 1, ROWS))
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, *batch, jax.random.key(number)))
        seconds[name].append(time.perf_counter() - start)
    curves[name].append(float(judge(params, *test, None)))
    print(f"{name:<8} {curves[name][-1]:.3f} nats a token, {np.median(seconds[name]) * 1e3:.0f} ms a step")

unigram = float(-np.log((counts[test[1]] + 1) / (counts.sum() + VOCABULARY)).mean())
print(f"guessing by frequency: {unigram:.3f} nats")
assert curves["full"][-1] < unigram
assert curves["sampled"][-1] < unigram

# %%
fig, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
for name, curve in curves.items():
    axes.plot(25 * np.arange(len(curve)), curve, "o-", markersize=3, label=name)
axes.axhline(unigram, color="grey", linewidth=0.8, linestyle=":")
axes.set(xlabel="step", ylabel="held-out loss (nats)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# A step of the full loss multiplies with every token's row, one of the sampled loss with 256 and the labels: a
# thirtieth. What is left of the step is the optimizer, which still walks through all parameters; with ten million
# classes one would update the rows that were touched alone, as `touched_classes` shows.
#
# Do not read too much into which curve is lower after so few steps at one learning rate: it shows that the sampled
# gradients are good enough to learn from. At 8,192 tokens the full loss is cheap enough, and has no number of samples
# to choose; the larger the vocabulary, the more steps the sampled loss makes in the same time.
