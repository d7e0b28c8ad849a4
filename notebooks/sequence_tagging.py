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
# # Tagging every character
#
# One label for each element of a sequence: parts of speech, names in a text, or, here, the syntax of Python. The data
# are lines of Python's own standard library, a tag for each *character* is what its `tokenize` module says, and the
# model is a bidirectional LSTM in Haiku. On the way we meet what every tagging task has: sequences of different length,
# and tags that are rare.

# %%
import builtins
import importlib
import io
import keyword
import tokenize
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jsoftmax

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

# %% [markdown]
# ## The data
#
# Nine tags. Some can be read off the character itself; for others the model has to look around: whether `i` begins a
# keyword, a name or prose in a string depends on what stands left *and right* of it.

# %%
TAGS = ["space", "name", "keyword", "builtin", "definition", "operator", "string", "comment", "number"]
COLOURS = ["#FFFFFF", "#444444", "#0072B2", "#56B4E9", "#D55E00", "#999999", "#009E73", "#B8860B", "#CC79A7"]
MODULES = """
    argparse ast calendar configparser csv dataclasses difflib fractions gettext heapq inspect json.decoder locale
    logging mailbox optparse pathlib pdb pickle random shutil statistics tarfile textwrap zipfile
"""


def tag_of(token, before):
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "keyword"
        if before in ("def", "class"):
            return "definition"
        return "builtin" if token.string in vars(builtins) else "name"
    kinds = {tokenize.OP: "operator", tokenize.NUMBER: "number", tokenize.COMMENT: "comment"}
    is_string = tokenize.tok_name[token.type].startswith(("STRING", "FSTRING", "TSTRING"))
    return "string" if is_string else kinds.get(token.type, "space")


def tagged_lines(source):
    """Pairs of a line and the tags of its characters, as numbers."""
    lines = source.splitlines()
    tags = [np.zeros(len(line), np.int32) for line in lines]
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        tag, (first, start), (last, end) = TAGS.index(tag_of(token, before)), token.start, token.end
        for number in range(first, min(last, len(lines)) + 1) if tag else ():
            left, right = start if number == first else 0, end if number == last else None
            tags[number - 1][left:right] = tag
        before = token.string
    return list(zip(lines, tags, strict=True))


def source_of(module):
    return Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")


WIDTH = 80
lines = [pair for module in MODULES.split() for pair in tagged_lines(source_of(module))]
lines = [(line, tags) for line, tags in lines if line.strip() and line.isascii() and len(line) <= WIDTH]
order = np.random.default_rng(0).permutation(len(lines))
print(f"{len(lines)} lines, for example {lines[order[3]][0].strip()!r}")

# %% [markdown]
# ## Padding
#
# Lines have between 1 and 80 characters; arrays are rectangular. So lines are padded, and the padding gets a label that
# is no tag, −100. The loss is told to ignore it: such a row gives loss 0 and gradient exactly 0, whatever its logits
# are. The mean is then over what is left.

# %%
PADDING = -100
characters = np.zeros((len(lines), WIDTH), np.int32)  # 0 is no character
labels = np.full((len(lines), WIDTH), PADDING, np.int32)
for row, (line, tags) in enumerate(lines):
    characters[row, : len(line)] = np.frombuffer(line.encode("ascii"), np.uint8)
    labels[row, : len(line)] = tags
held_out, train = order[:600], order[600:]
counts = np.bincount(labels[train][labels[train] != PADDING], minlength=len(TAGS))
for tag, count in zip(TAGS, counts, strict=True):
    print(f"{tag:10} {count:7} characters, {count / counts.sum():6.1%}")


def mean_loss(logits, labels, class_weights=None):
    losses = jsoftmax.softmax_cross_entropy_with_integer_labels(
        logits, labels, ignore_index=PADDING, class_weights=class_weights
    )
    return losses.sum() / (labels != PADDING).sum()


# %% [markdown]
# Does it do what it says? Fill the padding's logits with NaN, and nothing changes. Masking afterwards, the other usual
# way, agrees as long as no NaN is about: `0 * NaN` is NaN.

# %%
some = labels[held_out[:4]]
logits = jax.random.normal(jax.random.key(0), (4, WIDTH, len(TAGS)))
poisoned = jnp.where((some == PADDING)[..., None], jnp.nan, logits)
value, gradient = jax.value_and_grad(mean_loss)(poisoned, some)
assert jnp.isfinite(value)
assert np.all(np.asarray(gradient)[some == PADDING] == 0)

weights = jnp.asarray(some != PADDING, jnp.float32)
in_range = jnp.where(some == PADDING, 0, some)
masked = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, in_range) * weights
np.testing.assert_allclose(value, masked.sum() / weights.sum(), rtol=1e-6)

# %% [markdown]
# ## The model
#
# An LSTM that reads from the left, one that reads from the right, and a linear layer on both their outputs. The second
# one reads the padding first, where there is nothing to learn.

# %%
HIDDEN, BATCH, STEPS = 48, 32, 300


def network(characters):
    x = hk.Embed(128, 24)(characters).swapaxes(0, 1)  # (time, batch, features)
    forwards, backwards = hk.LSTM(HIDDEN), hk.LSTM(HIDDEN)
    left, _ = hk.dynamic_unroll(forwards, x, forwards.initial_state(x.shape[1]))
    right, _ = hk.dynamic_unroll(backwards, x[::-1], backwards.initial_state(x.shape[1]))
    both = jnp.concatenate([left, right[::-1]], axis=-1)
    return hk.Linear(len(TAGS))(both).swapaxes(0, 1)


model = hk.without_apply_rng(hk.transform(network))
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))


@jax.jit
def train_step(params, state, characters, labels, class_weights):
    def loss(params):
        return mean_loss(model.apply(params, characters), labels, class_weights)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


def fit(class_weights):
    params = model.init(jax.random.key(0), characters[:1])
    state, shuffle, history = optimizer.init(params), np.random.default_rng(1), []
    for _ in range(STEPS):
        rows = shuffle.choice(train, BATCH, replace=False)
        params, state, value = train_step(params, state, characters[rows], labels[rows], class_weights)
        history.append(value)
    return params, np.array(history)


predict = jax.jit(lambda params, characters: model.apply(params, characters).argmax(axis=-1))

# %% [markdown]
# ## Rare tags
#
# Half of all characters are spaces and strings; numbers are one in two hundred. The mean loss hardly notices them.
# `class_weights` multiplies the terms of a class. The weights here are $1 / \sqrt{\text{frequency}}$, which is milder
# than the full inverse, scaled to a mean of 1 over all characters. Two networks are trained, without and with them.

# %%
weights = 1 / np.sqrt(counts / counts.sum())
weights = jnp.asarray(weights / (weights * counts / counts.sum()).sum(), jnp.float32)
plain, plain_history = fit(jnp.ones(len(TAGS)))
weighted, weighted_history = fit(weights)


def scores(params):
    """Recall and F1 of each tag on the held-out lines, and the share of all characters that are right."""
    real = labels[held_out] != PADDING
    truth, guess = labels[held_out][real], np.asarray(predict(params, characters[held_out]))[real]
    hits = np.bincount(truth[truth == guess], minlength=len(TAGS))
    there, said = np.bincount(truth, minlength=len(TAGS)), np.bincount(guess, minlength=len(TAGS))
    return hits / there, 2 * hits / (there + said), (truth == guess).mean()


(recall, f1, accuracy), (weighted_recall, weighted_f1, weighted_accuracy) = scores(plain), scores(weighted)
print(f"{'':10}    recall          F1")
for row in zip(TAGS, recall, weighted_recall, f1, weighted_f1, strict=True):
    print("{:10} {:5.1%} → {:5.1%}  {:5.1%} → {:5.1%}".format(*row))
print(f"all characters {accuracy:.1%} → {weighted_accuracy:.1%}, macro F1 {f1.mean():.1%} → {weighted_f1.mean():.1%}")
assert accuracy > 0.8

fig, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
by_count = np.argsort(counts)
for place, tag in enumerate(by_count):
    axis.plot([100 * recall[tag], 100 * weighted_recall[tag]], [place, place], color=GREY, linewidth=1)
axis.plot(100 * recall[by_count], range(len(TAGS)), "o", color=ORANGE, label="plain")
axis.plot(100 * weighted_recall[by_count], range(len(TAGS)), "o", color=BLUE, label="weighted")
axis.set_yticks(range(len(TAGS)), [f"{TAGS[tag]}, {counts[tag] / counts.sum():.1%}" for tag in by_count])
axis.set(xlabel="% of the tag's characters found (recall)", title="Tags from rare to common")
axis.legend(fontsize=9, loc="upper left")
plt.show()
rare = by_count[:4]
assert weighted_recall[rare].mean() > recall[rare].mean()

# %% [markdown]
# The weights do what they are for: more of the rare tags are found. They don't do it for nothing. What is found more
# often is also claimed more often where it isn't, so that F1, which counts both mistakes, moves far less than recall
# and not always upwards; and names, which are common, pay. Weights express what a mistake costs *you*; they add no
# knowledge. (Sums in parallel differ from run to run, and so do these figures, a little. And lines are held
# out at random, so that similar lines of one file may be on both sides: for numbers to quote, hold out files.)
#
# ## A look at it
#
# Lines that no library has: the colours are what the weighted network says. Read on its own, no line has a context
# beyond its 80 characters.

# %%
SNIPPET = """\
class Kettle(Appliance):
    def boil(self, litres=1.5, *, until=100):
        # water first, please
        for step in range(until):
            self.heat(step / until)  # slowly
        return f"{litres} l of tea" if self.is_hot else None
raise ValueError('no water in the kettle')""".splitlines()


def tag(lines):
    rows = np.zeros((len(lines), WIDTH), np.int32)
    for row, line in enumerate(lines):
        rows[row, : len(line)] = np.frombuffer(line.encode("ascii"), np.uint8)
    return np.asarray(predict(weighted, rows))


fig, axis = plt.subplots(figsize=(10, 3.2), layout="constrained")
for row, (line, tags) in enumerate(zip(SNIPPET, tag(SNIPPET), strict=True)):
    for column, (character, number) in enumerate(zip(line, tags[: len(line)], strict=True)):
        bold = "bold" if TAGS[number] in ("keyword", "definition") else "normal"
        axis.text(column, -row, character, color=COLOURS[number], family="monospace", fontsize=12.5, weight=bold)
for place, (name, colour) in enumerate(zip(TAGS[1:], COLOURS[1:], strict=True)):
    axis.text(8.4 * place, -len(SNIPPET) - 0.6, name, color=colour, fontsize=10, weight="bold")
axis.set(xlim=(-1, 68), ylim=(-len(SNIPPET) - 1, 1))
axis.axis("off")
plt.show()

# %% [markdown]
# It makes mistakes, as one can see without knowing the labels. Here is one line more closely, with the probability of
# each tag at each character. `for` and `format` begin alike and are told apart from the first letter on, since half of
# the network reads from the right. Where colours share a column, it is undecided.

# %%
line = "for item in format(3.14, 'x'):  # for pi"
row = np.zeros((1, WIDTH), np.int32)
row[0, : len(line)] = np.frombuffer(line.encode("ascii"), np.uint8)
probabilities = jsoftmax.softmax(model.apply(weighted, row))[0, : len(line)]
np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-6)

fig, axis = plt.subplots(figsize=(10, 2.6), layout="constrained")
axis.stackplot(np.arange(len(line)), probabilities.T, colors=["#EEEEEE", *COLOURS[1:]], step="mid", linewidth=0)
axis.set_xticks(range(len(line)), list(line), family="monospace", fontsize=11)
axis.set(xlim=(-0.5, len(line) - 0.5), ylim=(0, 1), ylabel="probability")
axis.tick_params(axis="x", length=0)
plt.show()

# %% [markdown]
# ## What to take from it
#
# - Pad with a label that is no class and pass it as `ignore_index`; divide by the number of labels that are left.
# - Ignored rows give a gradient of exactly 0, NaN or not. A mask multiplied in afterwards doesn't.
# - `class_weights` trade precision for recall of rare classes. Decide by F1 of each tag, not by accuracy.
# - `softmax_cross_entropy_with_integer_labels` takes logits of any batch shape: here `(lines, characters, tags)`.
