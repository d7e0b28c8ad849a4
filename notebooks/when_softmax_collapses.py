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
# # When softmax collapses
#
# A network that fits its training data grows ever surer of it. At a margin of about 17 nats, the cross-entropy that
# most libraries compute in float32 becomes exactly 0. So does its gradient at every label. The network has not finished
# learning; its arithmetic has. Prieto et al. (2025) named this *softmax collapse* and showed that, without
# regularization, it keeps networks from *grokking*: from generalizing long after they fit. Here it is, in small.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jsoftmax
from jsoftmax.testing import float64

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})

usual_loss = optax.softmax_cross_entropy_with_integer_labels
our_loss = jsoftmax.softmax_cross_entropy_with_integer_labels

# %% [markdown]
# ## One row
#
# A label that is $g$ ahead of one other class has the loss $\log(1 + e^{-g})$. In float32, the next number above 1 is
# $1.2 \cdot 10^{-7}$ away. Once $e^{-g}$ is less than half of that, $1 + e^{-g}$ *is* 1. (The loss may be 0 a little
# earlier, since the largest logit is added to the logarithm and the label's taken off again, which rounds twice more.)

# %%
for gap in (5.0, 10.0, 15.0, 17.0, 20.0):
    row, label = jnp.array([gap, 0.0]), jnp.array(0)
    usual, usual_gradient = jax.value_and_grad(usual_loss)(row, label)
    ours, our_gradient = jax.value_and_grad(our_loss)(row, label)
    print(
        f"gap {gap:2.0f}   loss: usual {usual:.3e}, ours {ours:.3e}"
        f"   gradient at the label: usual {usual_gradient[0]: .2e}, ours {our_gradient[0]: .2e}"
    )
assert usual == 0
assert usual_gradient[0] == 0
np.testing.assert_allclose(ours, np.log1p(np.exp(-20.0)), rtol=1e-6)

# %% [markdown]
# Note what does *not* become 0: the gradient at the other classes, $p_j = e^{-g}$. So the row still pushes the others
# down, but nothing pushes its label up. The entries no longer sum to 0, and the push has lost its direction.
#
# ## Is that rare?
#
# Train a small network on scikit-learn's handwritten digits, with Adam, as one does. After each epoch, count the
# training rows whose label gets a gradient of exactly 0 from the usual loss.


# %%
def predict(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def start(inputs, hidden, classes, dtype=jnp.float32):
    random = np.random.default_rng(0)
    first, second = random.normal(size=(inputs, hidden)), random.normal(size=(hidden, classes))
    return {
        "first": jnp.asarray(first / np.sqrt(inputs), dtype),
        "second": jnp.asarray(second / np.sqrt(hidden), dtype),
    }


def at_labels(values, labels):
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def silent(loss, logits, labels):
    """The share of rows whose label gets a gradient of exactly 0."""
    gradient = jax.grad(lambda z: loss(z, labels).sum())(logits)
    return (at_labels(gradient, labels) == 0).mean()


images, digits = load_digits(return_X_y=True)
images, digits = jnp.asarray(images / 16, jnp.float32), jnp.asarray(digits)
optimizer = optax.adam(3e-3)


@jax.jit
def epoch(carry, rows):
    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(lambda p: our_loss(predict(p, images[batch]), digits[batch]).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, carry, rows)
    logits = predict(carry[0], images)
    return carry, (silent(usual_loss, logits, digits), silent(our_loss, logits, digits))


params = start(64, 128, 10)
carry, order, shares = (params, optimizer.init(params)), np.random.default_rng(1), []
for _ in range(100):
    carry, share = epoch(carry, jnp.asarray(order.permutation(1797)[:1792].reshape(56, 32)))
    shares.append([float(each) for each in share])
shares = np.array(shares)

fig, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.fill_between(range(1, 101), 100 * shares[:, 0], color=ORANGE, alpha=0.8, linewidth=0, label="usual loss")
axis.plot(range(1, 101), 100 * shares[:, 1], color=BLUE, linewidth=2, label="jsoftmax")
axis.set(xlabel="epoch", ylabel="% of rows", title="Digits whose label gets a gradient of exactly 0", ylim=(-1, 45))
axis.legend(loc="upper left")
plt.show()
print(f"after 100 epochs: {shares[-1, 0]:.0%} of the rows with the usual loss, {shares[-1, 1]:.0%} with ours")
assert shares[-1, 0] > 0.2
assert np.all(shares[:, 1] == 0)

# %% [markdown]
# Not rare at all. For such a classifier it does little harm: these digits have been learnt. It does harm where
# something is still to be learnt from rows that are fitted already.
#
# ## Arithmetic modulo 29
#
# Such a task is addition modulo a prime, $a + b \bmod 29$, from 80 % of all pairs. A network learns these pairs by
# heart first. If training goes on, weights and margins grow, the arithmetic between the pairs begins to count, and
# accuracy on the other 20 % begins to rise. Three runs from the same start, on all pairs at once:
#
# - the usual loss in float32,
# - jsoftmax in float32,
# - the usual loss in float64.
#
# The steps have a fixed length, in the direction of the gradient. Plain gradient descent would take $10^{7}$ times as
# long for each 17 nats of margin, since its steps shrink with the gradient; Adam, too, looks at the gradient's
# direction more than at its size.

# %%
P, STEPS, LENGTH = 29, 2000, 0.1
a, b = np.divmod(np.arange(P * P), P)
pairs, sums = np.concatenate([np.eye(P)[a], np.eye(P)[b]], axis=1), (a + b) % P
order = np.random.default_rng(0).permutation(P * P)
train, test = order[: int(0.8 * P * P)], order[int(0.8 * P * P) :]


def normalized(gradient):
    """The direction and the length of a gradient. Scaled by its largest entry first: squares of 1e-20 underflow."""
    largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda leaf: jnp.abs(leaf).max(), gradient))
    scale = jnp.where(largest > 0, largest, 1)
    gradient = jax.tree.map(lambda leaf: leaf / scale, gradient)
    length = jnp.maximum(jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient))), 1)
    return jax.tree.map(lambda leaf: leaf / length, gradient), largest * length


def run(loss, dtype):
    x, y = jnp.asarray(pairs[train], dtype), jnp.asarray(sums[train])
    held_out, answers = jnp.asarray(pairs[test], dtype), jnp.asarray(sums[test])

    def step(params, _):
        def mean_loss(params):
            return loss(predict(params, x), y).mean()

        value, gradient = jax.value_and_grad(mean_loss)(params)
        direction, length = normalized(gradient)
        logits = predict(params, x)
        others = jnp.where(jnp.arange(P) == y[:, None], -jnp.inf, logits).max(axis=-1)
        record = {
            "loss as computed": value,
            "true loss": our_loss(logits, y).mean(),
            "gradient": length,
            "margin": (at_labels(logits, y) - others).min(),
            "accuracy": (predict(params, held_out).argmax(axis=-1) == answers).mean(),
            "silent": silent(loss, logits, y),
        }
        return jax.tree.map(lambda p, d: p - LENGTH * d, params, direction), record

    _, records = jax.jit(lambda params: jax.lax.scan(step, params, length=STEPS))(start(2 * P, 200, P, dtype))
    return jax.tree.map(np.asarray, records)


runs = {"usual, float32": run(usual_loss, jnp.float32), "jsoftmax, float32": run(our_loss, jnp.float32)}
with float64():
    runs["usual, float64"] = run(usual_loss, jnp.float64)

# %%
styles = {
    "usual, float64": {"color": GREEN, "linewidth": 5, "alpha": 0.45},
    "usual, float32": {"color": ORANGE, "linewidth": 1.8},
    "jsoftmax, float32": {"color": BLUE, "linewidth": 1.8},
}
fig, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, layout="constrained")
for name, style in styles.items():
    records, steps = runs[name], np.arange(1, STEPS + 1)
    computed = np.where(records["loss as computed"] > 0, records["loss as computed"], np.nan)
    axes[0, 0].plot(steps, computed, label=name, **style)
    axes[0, 1].plot(steps, np.where(records["gradient"] > 0, records["gradient"], np.nan), **style)
    axes[1, 0].plot(steps, np.maximum(records["margin"], 0.1), **style)
    axes[1, 1].plot(steps, 100 * records["accuracy"], **style)
axes[0, 0].set(yscale="log", ylabel="nats", title="Mean loss, as computed (0 is not drawn)", ylim=(1e-38, 10))
axes[0, 1].set(yscale="log", title="Length of the gradient", ylim=(1e-38, 10))
axes[1, 0].set(yscale="log", ylabel="nats", xlabel="step", title="Smallest margin of a training pair")
axes[1, 1].set(ylabel="%", xlabel="step", title="Accuracy on the pairs held out")
axes[1, 0].axhline(np.log(2.0**24), color=GREY, linewidth=0.8, linestyle=":")
axes[1, 0].text(STEPS * 0.02, np.log(2.0**24) * 1.1, "24 bits", fontsize=8, color="#555555")
axes[1, 0].axhline(np.log(2.0**53), color=GREY, linewidth=0.8, linestyle=":")
axes[1, 0].text(STEPS * 0.02, np.log(2.0**53) * 1.1, "53 bits", fontsize=8, color="#555555")
axes[0, 0].legend(fontsize=8, loc="lower left")
plt.show()

for name, records in runs.items():
    print(
        f"{name:18} margin {records['margin'][-1]:5.1f}, labels without gradient {records['silent'][-1]:4.0%}, "
        f"held-out accuracy {records['accuracy'][-100:].mean():.1%}"
    )

collapsed, alive, wide = runs.values()
assert collapsed["margin"].max() < 20
assert np.any(collapsed["loss as computed"] == 0)
assert alive["margin"][-1] > 60
assert np.all(alive["silent"] == 0)
assert wide["margin"].max() < 45
assert alive["accuracy"][-100:].mean() > collapsed["accuracy"][-100:].mean() + 0.1

# %% [markdown]
# The three runs are one and the same until float32's usual loss runs out of bits. Then:
#
# - **The loss is 0, the gradient is not.** What remains of the gradient is the part at the wrong classes and rounding
#   noise, about $10^{-7}$ in size. The steps go on, in directions that no longer raise the margin.
# - **float64 buys time, not a cure.** Its 53 bits last to a margin of 37, and then the same happens.
# - **With nothing cancelled, float32 is enough.** The loss falls through $10^{-30}$, and margin and accuracy rise all
#   the way, until the gradient of the weights comes near $10^{-38}$, the smallest normal number of float32.
#
# With the seeds 1 and 2 in place of 0, for start and split, the last accuracies are 16 and 23 % (usual), 53 and 58 %
# (jsoftmax), 46 and 48 % (float64).
#
# What the usual loss reports is not even a sign of trouble, since a loss of 0 looks like success. Here is the true
# loss of the collapsed network beside what its own loss said:

# %%
said, true = collapsed["loss as computed"], collapsed["true loss"]
zero = said == 0
fig, axis = plt.subplots(figsize=(7, 3), layout="constrained")
axis.semilogy(true, color=BLUE, linewidth=2, label="true loss of this network (by jsoftmax)")
axis.semilogy(np.where(zero, np.nan, said), ".", markersize=3, color=ORANGE, label="as computed")
axis.fill_between(range(STEPS), 1e-11, 1e-10, where=zero, color=ORANGE, alpha=0.5, linewidth=0, label="computed as 0")
axis.set(xlabel="step", ylabel="mean loss (nats)", title="The usual loss in float32", ylim=(1e-11, 10))
axis.legend(fontsize=8, loc="upper right")
plt.show()
print(f"computed as exactly 0 in {zero.mean():.0%} of the steps")
assert true.min() > 1e-9

# %% [markdown]
# ## What to take from it
#
# - In float32 the usual cross-entropy has no gradient at labels that lead by more than 17 nats. Ordinary classifiers
#   have such rows after a few dozen epochs.
# - It matters where training goes on beyond the fit: grokking, margins, hard examples among many easy ones, and
#   wherever small losses are compared or ranked.
# - Weight decay, label smoothing and z-loss hold margins down, and so hide the effect. They change what is learnt,
#   too; an exact loss leaves that choice to you.
#
# **Reference.** L. Prieto, M. Barsbey, P. A. M. Mediano and T. Birdal, *Grokking at the Edge of Numerical Stability*,
# ICLR 2025. They cure the collapse with another function in place of softmax (StableMax). Here, softmax itself stays
# and is computed without the cancellation; [the mathematics page](mathematics.md) says how.
