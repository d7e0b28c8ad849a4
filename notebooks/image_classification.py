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
# # Reading digits
#
# A small network in Flax NNX learns scikit-learn's handwritten digits. Then we look at what it does: which
# digits it takes for which, and the images that it finds hardest, with its probabilities beside them. At the end, three
# losses compete over several seeds.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jsoftmax

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

images, digits = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)  # from 0 to 1
digits = digits.astype(np.int32)
train_images, test_images, train_digits, test_digits = train_test_split(
    images, digits, test_size=0.5, stratify=digits, random_state=0
)
print(train_images.shape, test_images.shape)

# %% [markdown]
# ## The network
#
# Three linear layers: 64 pixels in, ten *logits* out. There is no softmax at the end, since the loss takes logits. That
# is the first rule of this trade: **never feed probabilities to a loss that wants logits**, and never take the
# logarithm of a softmax by hand.


# %%
class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        features = nnx.relu(self.first(images))
        return self.head(nnx.relu(self.second(features)))


# %% [markdown]
# ## Training
#
# The loss of a batch is the mean of the losses of its rows. `nnx.value_and_grad` differentiates it, Adam takes the
# step, and `jax.lax.scan` runs all batches of an epoch in one call.

# %%
BATCH, EPOCHS = 32, 12
cross_entropy = jsoftmax.softmax_cross_entropy_with_integer_labels
optimizer = optax.adamw(2e-3)


def epoch_of(loss):
    """One pass over the training digits with `loss`, compiled."""

    @jax.jit
    def epoch(graph, carry, order):
        def step(carry, rows):
            def mean_loss(params):
                return loss(nnx.merge(graph, params)(images[rows]), labels[rows]).mean()

            params, state = carry
            value, gradient = jax.value_and_grad(mean_loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, carry, order)

    images, labels = jnp.asarray(train_images), jnp.asarray(train_digits)
    return epoch


def train(epoch, seed):
    graph, params = nnx.split(Network(nnx.Rngs(seed)))
    carry, history, shuffle = (params, optimizer.init(params)), [], np.random.default_rng(seed)
    whole = len(train_digits) // BATCH * BATCH
    for _ in range(EPOCHS):
        order = shuffle.permutation(len(train_digits))[:whole].reshape(-1, BATCH)
        carry, losses = epoch(graph, carry, order)
        history += [float(value) for value in losses]
    return nnx.merge(graph, carry[0]), history


@nnx.jit
def predict(network, images):
    return network(images)


epoch = epoch_of(cross_entropy)
network, history = train(epoch, seed=0)
logits = predict(network, test_images)
probabilities = np.asarray(jsoftmax.softmax(logits))
guesses = probabilities.argmax(axis=-1)
accuracy = (guesses == test_digits).mean()
print(f"{accuracy:.1%} of {len(test_digits)} held-out digits are right")
assert accuracy > 0.95

fig, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
axis.semilogy(np.arange(len(history)) * BATCH / len(train_digits), history, color=GREY, linewidth=0.8, label="batches")
smooth = np.convolve(np.log(history), np.ones(28) / 28, mode="valid")
axis.semilogy(np.arange(14, 14 + len(smooth)) * BATCH / len(train_digits), np.exp(smooth), color=BLUE, label="trend")
axis.axhline(np.log(10), color=ORANGE, linewidth=1, linestyle=":")
axis.text(EPOCHS * 0.8, np.log(10) * 0.55, "a guess: log 10", color=ORANGE, fontsize=9)
axis.set(xlabel="epoch", ylabel="loss (nats)")
axis.legend(fontsize=9, loc="lower left")
plt.show()

# %% [markdown]
# A fresh network knows nothing. Its loss starts near $\log 10 = 2.3$, that of a guess; if yours does not, look for a
# mistake before you train.
#
# ## What it takes for what

# %%
confusion = np.zeros((10, 10), int)
np.add.at(confusion, (test_digits, guesses), 1)
assert confusion.sum() == len(test_digits)
wrong = confusion - np.diag(np.diag(confusion))

fig, axis = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
axis.imshow(np.where(np.eye(10, dtype=bool), np.nan, wrong), cmap="Oranges", vmin=0, vmax=1.5 * wrong.max())
for label in range(10):
    for guess in range(10):
        count = confusion[label, guess]
        if count:
            right = label == guess
            axis.text(guess, label, count, ha="center", va="center", color=BLUE if right else "black", fontsize=9)
axis.set(xticks=range(10), yticks=range(10), xlabel="the network's answer", ylabel="the digit")
axis.set_title("Held-out digits: right in blue, wrong in orange", fontsize=11)
axis.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# ## The hardest images
#
# The loss of a row is its surprise, $-\log p_y$: 0.7 nats is a coin that fell the wrong way, 4.6 a chance of one in a
# hundred. Sorting by it finds mistakes, bad handwriting, and wrong labels. It is the most useful listing of a data set
# there is, and it costs a line.

# %%
surprise = np.asarray(cross_entropy(logits, jnp.asarray(test_digits)))
hardest = np.argsort(surprise)[::-1][:8]

fig, axes = plt.subplots(4, 4, figsize=(10, 6.4), layout="constrained", height_ratios=[1.3, 1, 1.3, 1])
for place, row in enumerate(hardest):
    picture, bars = axes[2 * (place // 4) : 2 * (place // 4) + 2, place % 4]
    picture.imshow(test_images[row].reshape(8, 8), cmap="gray_r")
    picture.set(xticks=[], yticks=[])
    picture.spines[:].set_visible(False)
    picture.set_title(f"a {test_digits[row]}: {surprise[row]:.1f} nats", fontsize=10)
    colours = [GREY] * 10
    colours[guesses[row]], colours[test_digits[row]] = ORANGE, BLUE
    bars.bar(range(10), probabilities[row], color=colours)
    bars.set(ylim=(0, 1), xticks=range(10), yticks=[0, 1])
    bars.tick_params(labelsize=7)
fig.suptitle("The hardest held-out digits: probability of the label in blue, of the answer in orange", fontsize=11)
plt.show()

# %% [markdown]
# ## Three losses, four seeds
#
# Is another loss better? Label smoothing asks for less certainty; focal loss gives rows that are nearly right less
# weight. One run says little, since seeds differ by as much as losses do. So each loss trains four networks.


# %%
def smoothed(logits, labels):
    return cross_entropy(logits, labels, label_smoothing=0.1)


losses = {"cross-entropy": cross_entropy, "smoothing 0.1": smoothed, "focal, γ = 2": jsoftmax.softmax_focal_loss}
SEEDS = range(4)
print("      accuracy (%)     log loss       sure when wrong (%)")
table = {}
for name, loss in losses.items():
    epoch, rows = epoch_of(loss), []
    for seed in SEEDS:
        out = predict(train(epoch, seed)[0], test_images)
        p = np.asarray(jsoftmax.softmax(out))
        right = p.argmax(axis=-1) == test_digits
        nats = float(cross_entropy(out, jnp.asarray(test_digits)).mean())
        rows.append((100 * right.mean(), nats, 100 * p.max(axis=-1)[~right].mean()))
    table[name] = np.array(rows)
    for column, digits_shown in enumerate((1, 3, 0)):
        values = table[name][:, column]
        print(f"{values.mean():12.{digits_shown}f} ± {values.std():.{digits_shown}f}", end="")
    print(f"   {name}")

fig, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
titles = ("accuracy (%)", "log loss (nats)", "mean probability of wrong answers (%)")
for axis, column, title in zip(axes, range(3), titles, strict=True):
    for place, (rows, colour) in enumerate(zip(table.values(), (BLUE, GREEN, ORANGE), strict=True)):
        axis.plot(rows[:, column], np.full(len(SEEDS), place), "o", color=colour, alpha=0.7)
        axis.plot(rows[:, column].mean(), place, "|", color=colour, markersize=22, markeredgewidth=2)
    axis.set(yticks=range(3), yticklabels=list(table) if column == 0 else [], ylim=(2.5, -0.5))
    axis.set_title(title, fontsize=10)
plt.show()

means = {name: rows.mean(axis=0) for name, rows in table.items()}
assert min(mean[0] for mean in means.values()) > 94
assert means["smoothing 0.1"][2] < means["focal, γ = 2"][2] < means["cross-entropy"][2]

# %% [markdown]
# Each dot is one network, each bar a mean. The losses trade one good for another:
#
# - Cross-entropy has the best log loss. No wonder: that is what it minimizes. When it is wrong, it is sure of it.
# - Label smoothing costs log loss, since it is told not to be sure even where it is right. Here it gains about a point
#   of accuracy, and its mistakes can be told by their low probabilities.
# - Focal loss lies between the two in how sure it is. It was made for a thousand easy rows beside each hard one; ten
#   balanced classes give it nothing to do, and its accuracy is that of cross-entropy.
#
# All three are one call with other options, so that trying them on *your* data costs less than arguing about them.
#
# ## What to take from it
#
# - Logits into the loss, and `softmax` only to look at probabilities.
# - The loss of a fresh network is $\log K$.
# - Sort by loss to see what is hard.
# - Compare losses over seeds, by several measures, or don't compare them.
