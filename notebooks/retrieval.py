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
# # Retrieval
#
# Which function does this sentence describe? Two small networks learn to answer, one that reads docstrings and one that
# reads code, from the functions of Python's own standard library. Their loss is contrast: a docstring has to be nearer
# to its own function than to all others of the batch.

# %%
import ast
import re
import sysconfig
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jsoftmax
from jsoftmax import ranking

# %% [markdown]
# ## Pairs
#
# A query is the first paragraph of a docstring; its item is the function's name, arguments and body, without the
# docstring. Both are cut into words, `read_until` and `readUntil` alike, and a word is a bucket of 8,191. Every eighth
# pair is held out.

# %%
BUCKETS, QUERY_WORDS, ITEM_WORDS = 8192, 24, 64


def words(text):
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text) if len(word) > 1]


def buckets(bag, length):
    """The first different words, as numbers from 1; 0 is no word."""
    numbers = list(dict.fromkeys(zlib.crc32(word.encode()) % (BUCKETS - 1) + 1 for word in bag))[:length]
    return numbers + [0] * (length - len(numbers))


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
            code = " ".join([node.name, *(a.arg for a in node.args.args), *map(ast.unparse, node.body[1:])])
            yield node.name, text.split("\n\n")[0], code


root = Path(sysconfig.get_paths()["stdlib"])
paths = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests", "lib2to3"} & set(p.parts)]
found = [pair for path in paths for pair in functions(path)]
found = [pair for pair in found if len(words(pair[1])) >= 3 and len(words(pair[2])) >= 4]
names, texts, codes = zip(*found, strict=True)
queries = np.array([buckets(words(text), QUERY_WORDS) for text in texts], np.int32)
items = np.array([buckets(words(code), ITEM_WORDS) for code in codes], np.int32)
name_ids = np.unique(names, return_inverse=True)[1].astype(np.int32)
held_out = np.arange(len(names)) % 8 == 0
train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
print(f"{len(train)} pairs to learn from, {len(test)} held out, such as:")
print(f"  {names[test[5]]}: {' '.join(texts[test[5]].split())}")

# %% [markdown]
# ## What has to be beaten
#
# A docstring often has the words of the code in it. So the baseline counts words that both have, rare ones for more
# (TF-IDF): one number a word, no learning but of frequencies. It is strong. `ranking.ranks` says at which place among
# all held-out functions the right one comes.


# %%
def bags(numbers):
    counts = np.zeros((len(numbers), BUCKETS), np.float32)
    counts[np.arange(len(numbers))[:, None], numbers] = 1
    counts[:, 0] = 0
    return counts


seen = sum(np.bincount(numbers[train].ravel(), minlength=BUCKETS) for numbers in (queries, items))
rarity = np.log((2 * len(train) + 1) / (seen + 1)).clip(1e-3).astype(np.float32)


def weighted(numbers):
    vectors = bags(numbers) * rarity
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)


right = jnp.arange(len(test))
ranks = {"words in common": ranking.ranks(weighted(queries[test]) @ weighted(items[test]).T, right)}


def report(name):
    scores = {
        "reciprocal rank": ranking.reciprocal_rank(ranks[name]).mean(),
        "hits@10": ranking.hits(ranks[name], 10).mean(),
        "NDCG@10": ranking.ndcg(ranks[name], 10).mean(),
    }
    print(f"{name:>20}: " + ", ".join(f"{label} {score:.3f}" for label, score in scores.items()))


report("words in common")

# %% [markdown]
# ## Two towers
#
# A tower gives each word a vector and a weight; a text is the weighted sum, brought to length 1. Both towers begin with
# the same random vectors, which makes them a blurred copy of the baseline, and then go their own ways. The temperature
# is learnt too. Functions of one name, of which there are many, are not each other's negatives: `item_ids`.

# %%
WIDTH, BATCH, STEPS = 256, 512, 45


def tower(params, numbers):
    weights = jnp.where(numbers > 0, jnp.exp(params["log_weight"][numbers]), 0)
    vectors = (params["vectors"][numbers] * weights[..., None]).sum(axis=1)
    return vectors / jnp.sqrt((vectors**2).sum(axis=1, keepdims=True) + 1e-6)


def loss(params, queries, items, name_ids):
    return jsoftmax.contrastive_loss(
        tower(params["query"], queries),
        tower(params["item"], items),
        item_ids=name_ids,
        temperature=jnp.exp(params["log_temperature"]),
    )


@jax.jit
def step(params, state, *batch):
    value, gradient = jax.value_and_grad(loss)(params, *batch)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


@jax.jit
def places(params):
    """Of the right functions among all held-out ones: exact, and a block of queries at a time."""
    users, catalogue = tower(params["query"], queries[test]), tower(params["item"], items[test])
    return ranking.linear_ranks(users, catalogue, right, kernel_transposed=True)


vectors = jax.random.normal(jax.random.key(0), (BUCKETS, WIDTH))
half = {"vectors": vectors, "log_weight": jnp.log(rarity)}
params = {"query": half, "item": half, "log_temperature": jnp.log(0.1)}
optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))
state, random, losses = optimizer.init(params), np.random.default_rng(0), []
ranks["towers, untrained"] = places(params)
for _ in range(STEPS):
    at = random.choice(train, BATCH, replace=False)
    params, state, value = step(params, state, queries[at], items[at], name_ids[at])
    losses.append(float(value))
ranks["towers, trained"] = places(params)
for name in ranks:
    report(name)
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, temperature 0.1 to {jnp.exp(params['log_temperature']):.3f}")

# %% [markdown]
# The towers know no word that the baseline does not. What they have learnt is which words to trust, and which of the
# docstring's words stand for which of the code's.

# %%
scores = {name: float(ranking.reciprocal_rank(found).mean()) for name, found in ranks.items()}
assert scores["towers, trained"] > scores["words in common"] + 0.03
assert scores["towers, trained"] > scores["towers, untrained"] + 0.1

shown = np.unique(np.geomspace(1, len(test), 60).astype(int))
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, style in zip(ranks, ("--", ":", "-"), strict=True):
    axes[0].semilogx(shown, [ranking.hits(ranks[name], int(k)).mean() for k in shown], style, label=name)
axes[0].set(xlabel="k", ylabel="hits@k", title="Held-out docstrings whose function is among the first k")
axes[0].legend(frameon=False)
some = test[:: len(test) // 24][:24]
similarity = tower(params["query"], queries[some]) @ tower(params["item"], items[some]).T
image = axes[1].imshow(similarity, cmap="Blues", vmin=0, vmax=1)
axes[1].set(xlabel="function", ylabel="docstring", title="Similarity of 24 held-out pairs")
fig.colorbar(image, ax=axes[1])
plt.show()

# %% [markdown]
# ## Search
#
# Three sentences of our own, and the held-out functions that are nearest.

# %%
catalogue = tower(params["item"], items[test])
for text in ("remove a directory and everything in it", "close the socket", "parse a date from a string"):
    question = tower(params["query"], np.array([buckets(words(text), QUERY_WORDS)], np.int32))
    nearest = jax.lax.top_k((question @ catalogue.T)[0], 4)[1]
    print(f"{text}: {', '.join(names[test[n]] for n in nearest)}")
