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
# # Softmax from first principles
#
# What softmax is, why the formula in the books fails on a computer, how that is cured, and where the gradient ŷ − y
# comes from. Every claim below is checked by the code beside it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jsoftmax
from jsoftmax import plots
from jsoftmax.testing import check_gradients

np.set_printoptions(precision=3, suppress=True)


# %% [markdown]
# ## From numbers to probabilities
#
# A classifier gives each class a number, its *logit*. We want probabilities: positive, summing to one, larger for
# larger logits. The exponential makes numbers positive; dividing by the sum makes them add up.
#
# $$p_j = \frac{e^{z_j}}{\sum_k e^{z_k}}$$


# %%
def textbook_softmax(z):
    return np.exp(z) / np.exp(z).sum()


z = np.array([2.0, 1.0, 0.1], np.float32)
p = textbook_softmax(z)
print("exponentials ", np.exp(z))
print("probabilities", p)

np.testing.assert_allclose(p, [0.659, 0.242, 0.099], atol=5e-4)
np.testing.assert_allclose(jsoftmax.softmax(z), p, rtol=1e-6)

# %% [markdown]
# Some properties, all of which follow from the formula:
#
# - The order stays, and the difference of two logits is the logarithm of the ratio of their probabilities.
# - Adding a constant to all logits changes nothing: it is a factor of numerator and denominator alike.
# - Multiplying all logits does change something: it makes the distribution sharper or flatter.

# %%
assert np.all(np.diff(p) < 0)
np.testing.assert_allclose(np.log(p[0] / p[1]), z[0] - z[1], rtol=1e-6)
np.testing.assert_array_equal(jsoftmax.softmax(z + 4), jsoftmax.softmax((z + 4) - 4))
np.testing.assert_allclose(jsoftmax.softmax(z + 4), p, rtol=2e-6)
print("twice the logits:", np.asarray(jsoftmax.softmax(2 * z)))

# %% [markdown]
# ## Overflow and underflow
#
# In float32, $e^{89}$ is infinite and $e^{-104}$ is zero. Logits of that size are nothing unusual.

# %%
large = np.array([1000.0, 999.0, 998.1], np.float32)
with np.errstate(over="ignore", invalid="ignore"):
    print("e^z        ", np.exp(large))
    print("the formula", textbook_softmax(large))
    print("at −1000   ", textbook_softmax(-large))

# %% [markdown]
# The cure uses the property above: take the largest logit $m$ off them all. The largest exponential is then $e^0 =
# 1$, none overflows, and the sum is at least 1.

# %%
shifted = large - large.max()
print(textbook_softmax(shifted))
np.testing.assert_allclose(jsoftmax.softmax(large), textbook_softmax(shifted.astype(np.float64)), rtol=1e-6)


# %% [markdown]
# ## Log-sum-exp
#
# The logarithm of the denominator has a name, logsumexp. It is a smooth version of the maximum: at least $m$, and
# at most $m + \log K$. The same shift cures it:
#
# $$\log \sum_j e^{z_j} = m + \log \sum_j e^{z_j - m}$$


# %%
def shifted_logsumexp(z):
    m = z.max()
    return m + np.log(np.exp(z - m).sum())


print(shifted_logsumexp(large), float(jsoftmax.logsumexp(large)))
assert large.max() <= jsoftmax.logsumexp(large) <= large.max() + np.log(3)
np.testing.assert_allclose(jsoftmax.logsumexp(large), shifted_logsumexp(large), rtol=1e-6)

# %% [markdown]
# ## Two classes: the sigmoid
#
# With two classes only the difference of the logits matters. Set one of them to 0:
#
# $$p_1 = \frac{e^x}{e^x + e^0} = \frac{1}{1 + e^{-x}} = \sigma(x)$$

# %%
x = jnp.linspace(-8, 8, 101)
pairs = jnp.stack([x, jnp.zeros_like(x)], axis=-1)
np.testing.assert_allclose(jsoftmax.softmax(pairs)[:, 0], jax.nn.sigmoid(x), rtol=1e-6)

plots.softmax_against_sigmoid()
plt.show()

# %% [markdown]
# ## Softmax among the activations
#
# Softmax is often listed beside other activations, but it is of another kind. Sigmoid, tanh, ReLU and GELU look at one
# number at a time. Softmax looks at a row: each output depends on all inputs, and its derivative is a matrix.
#
# | | output | for one number $x$ | its derivative | used for |
# |---|---|---|---|---|
# | sigmoid | (0, 1) | $1 / (1 + e^{-x})$ | $\sigma (1 - \sigma)$ | yes or no; gates |
# | tanh | (−1, 1) | $2\,\sigma(2x) - 1$ | $1 - \tanh^2 x$ | bounded states; soft caps |
# | ReLU | [0, ∞) | $\max(x, 0)$ | 0 or 1 | hidden layers |
# | GELU | [−0.17, ∞) | $x\,\Phi(x)$ | $\Phi(x) + x\,\varphi(x)$ | hidden layers of transformers |
# | softmax | positive, sum 1 | a row: $e^{x_j} / \sum_k e^{x_k}$ | $p_i (\delta_{ij} - p_j)$ | one of K; attention |
#
# ($\Phi$ and $\varphi$ are the normal distribution and its density.) Sigmoid and tanh are softmax over two classes, up
# to scale. Hidden layers want ReLU or GELU, whose slope does not fade as $x$ grows; an output that is to be a
# probability wants sigmoid or softmax.


# %%
def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


curve = jnp.linspace(-4, 4, 201)
activations = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "ReLU": jax.nn.relu, "GELU": exact_gelu}
fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for name, activation in activations.items():
    axes[0].plot(curve, activation(curve), label=name)
    axes[1].plot(curve, jax.vmap(jax.grad(activation))(curve), label=name)
beside = jnp.stack([curve, jnp.zeros_like(curve), jnp.ones_like(curve)], axis=-1)
axes[0].plot(curve, jsoftmax.softmax(beside)[:, 0], "k--", label="softmax([x, 0, 1]), first")
axes[1].plot(curve, jax.vmap(jax.jacobian(jsoftmax.softmax))(beside)[:, 0, 0], "k--")
axes[0].set(title="activation", xlabel="x", ylim=(-1.1, 2.1))
axes[1].set(title="its derivative", xlabel="x")
axes[0].legend(frameon=False, fontsize=8)
plt.show()

np.testing.assert_allclose(jnp.tanh(curve), 2 * jax.nn.sigmoid(2 * curve) - 1, atol=1e-6)
first = jsoftmax.softmax(beside)[:, 0]
np.testing.assert_allclose(jax.vmap(jax.jacobian(jsoftmax.softmax))(beside)[:, 0, 0], first * (1 - first), atol=1e-6)

# %% [markdown]
# ## Cross-entropy and its gradient
#
# The loss of a row is minus the logarithm of the probability of its label $y$. It is the surprise at the right
# answer.
#
# $$\ell = -\log p_y$$
#
# Its derivative is the shortest formula in the subject. With $\partial p_i / \partial z_j = p_i (\delta_{ij} -
# p_j)$ and the chain rule,
#
# $$\frac{\partial \ell}{\partial z_j} = -\frac{1}{p_y}\, p_y (\delta_{yj} - p_j) = p_j - \delta_{yj}$$
#
# or **ŷ − y**: the prediction minus the one-hot label.

# %%
loss = jsoftmax.softmax_cross_entropy_with_integer_labels
value, gradient = jax.value_and_grad(loss)(jnp.asarray(z), 0)
print(f"loss {value:.3f}, gradient", np.asarray(gradient))
np.testing.assert_allclose(value, -np.log(0.659), atol=5e-4)
np.testing.assert_allclose(gradient, p - np.array([1, 0, 0]), atol=1e-7)

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
plots.probability_bars(z, 0, axes=left)
plots.gradient_bars(z, 0, axes=right)
plt.show()

# %% [markdown]
# A single example proves little. `check_gradients` compares the gradient of a loss with three answers that do not
# depend on each other: ŷ − y in extended precision, JAX's own differentiation of the textbook formula in float64,
# and finite differences of the loss. Errors are in *ulps*, units in the last place of float32.

# %%
random = np.random.default_rng(0)
rows = jnp.asarray(random.normal(size=(8, 10)) * 4, jnp.float32)
labels = jnp.asarray(random.integers(0, 10, size=8), jnp.int32)
report = check_gradients(loss, rows, labels)
print(report)
assert report.ok
assert len(report.comparisons) == 3


# %% [markdown]
# The check can fail. A loss with a small mistake in it is found:


# %%
def wrong_loss(logits, labels):
    return loss(logits, labels) + 1e-4 * logits[..., 0]


found = check_gradients(wrong_loss, rows, labels)
print(found)
assert not found.ok

# %% [markdown]
# ## Temperature
#
# Dividing the logits by a temperature $T$ makes the distribution flatter ($T > 1$) or sharper ($T < 1$). In the
# limit of 0, the largest logit takes all; in that of infinity, all classes are alike.

# %%
for temperature in (0.0, 0.5, 1.0, 2.0, 100.0):
    print(f"T = {temperature:<5g}", np.asarray(jsoftmax.softmax(z, temperature=temperature)))
np.testing.assert_array_equal(jsoftmax.softmax(z, temperature=0.0), [1, 0, 0])
np.testing.assert_allclose(jsoftmax.softmax(z, temperature=2.0), jsoftmax.softmax(z / 2), rtol=1e-6)

plots.temperature_sweep(z, (0.0, 0.5, 1.0, 2.0, 100.0))
plt.show()

# %% [markdown]
# ## Label smoothing
#
# The loss of a row falls for as long as its label's logit grows: cross-entropy is never content. Label smoothing
# moves a share ε of the target to all classes evenly. Then there is a best lead, at which the label has the
# probability $1 - ε + ε/K$: with $K$ classes, $\log \frac{1 - ε + ε/K}{ε/K}$ above the others.

# %%
classes, share = 10, 0.1
lead = jnp.linspace(-1, 12, 261)
logits = jnp.zeros((261, classes)).at[:, 0].set(lead)
zeros = jnp.zeros(261, jnp.int32)
plain, smoothed = loss(logits, zeros), loss(logits, zeros, label_smoothing=share)
best = np.log((1 - share + share / classes) / (share / classes))
print(f"best lead {best:.2f}, found at {lead[jnp.argmin(smoothed)]:.2f}")
assert np.all(np.diff(plain) < 0)
assert abs(lead[jnp.argmin(smoothed)] - best) <= 0.05

fig, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
axes.plot(lead, plain, label="ε = 0")
axes.plot(lead, smoothed, "--", label=f"ε = {share}")
axes.axvline(best, color="grey", linewidth=0.8)
axes.set(xlabel="lead of the label's logit", ylabel="loss (nats)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Confidence
#
# One trap is left. Let the label be $g$ ahead of two other classes. Its loss is $\log(1 + 2 e^{-g})$, which is
# small but not zero. Both forms below are safe from overflow. The usual one computes logsumexp and subtracts the
# label's logit:


# %%
def usual_loss(logits, label):
    m = jax.lax.stop_gradient(logits.max())
    return m + jnp.log(jnp.exp(logits - m).sum()) - logits[label]


gaps = np.arange(0, 84, dtype=np.float32)
confident = np.stack([gaps, np.zeros_like(gaps), np.zeros_like(gaps)], axis=-1)


def at_label_0(function):
    return jax.jit(jax.vmap(jax.value_and_grad(lambda row: function(row, 0))))(confident)


usual, usual_gradient = map(np.asarray, at_label_0(usual_loss))
ours, our_gradient = map(np.asarray, at_label_0(loss))
exact = np.log1p(2 * np.exp(-gaps.astype(np.longdouble)))
print(f"the usual loss is exactly 0 from a gap of {gaps[usual == 0][0]:g} on")
print(f"its gradient at the label from {gaps[usual_gradient[:, 0] == 0][0]:g} on")

# %% [markdown]
# The usual form adds $2 e^{-g}$ to 1. Once that is less than half the distance from 1 to the next float32 number,
# the sum is 1 and its logarithm 0. The row then teaches the model nothing at its label any more, and its gradients
# no longer sum to zero. Leaving the largest logit out of the sum avoids the addition:
#
# $$\ell = (m - z_y) + \mathrm{log1p}\Bigl(\sum_{j \ne \arg\max} e^{z_j - m}\Bigr)$$

# %%
assert np.all(usual[gaps >= 18] == 0)
assert np.all(usual_gradient[gaps >= 18, 0] == 0)
np.testing.assert_allclose(ours, exact.astype(np.float64), rtol=1e-6)
others = 2 * np.exp(-gaps.astype(np.longdouble))
np.testing.assert_allclose(our_gradient[:, 0], (-others / (1 + others)).astype(np.float64), rtol=1e-6)

fig, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.semilogy(gaps, exact.astype(np.float64), color="lightgrey", linewidth=6, label="exact")
axes.semilogy(gaps, ours, label="jsoftmax")
axes.semilogy(gaps[usual > 0], usual[usual > 0], "o-", markersize=3, label="usual form, float32")
axes.axvline(gaps[usual == 0][0], color="grey", linewidth=0.8, linestyle=":")
axes.annotate("exactly 0 from here on", (gaps[usual == 0][0] + 1, 1e-12), fontsize=9)
axes.set(xlabel="gap: the label's lead over the other logits", ylabel="loss (nats)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# The difference is not for show. Late in training most rows are confident, and their losses and gradients are what
# is left to learn from, to weigh examples by, or to report. jsoftmax keeps them right down to the smallest normal
# numbers of float32, about $10^{-38}$.

# %% [markdown]
# ## Five exercises
#
# Think first; each answer is checked in the cell below it.
#
# **1.** A model of 50,257 classes has just been initialized. What loss do you expect, in nats? And what does a loss of
# twice as much tell you?

# %%
# All logits are about equal, so p = 1/K for each class and the loss is log K. A larger loss on a fresh model means that
# it is sure of something, and wrong: the initial logits are too large.
np.testing.assert_allclose(loss(jnp.zeros(50_257), 7), np.log(50_257), rtol=1e-6)
print(f"log 50257 = {np.log(50_257):.2f} nats")
too_large = 5 * random.normal(size=(64, 50_257)).astype(np.float32)
print(f"logits of standard deviation 5: {loss(too_large, jnp.arange(64)).mean():.2f} nats")

# %% [markdown]
# **2.** Somebody applied softmax twice: the network ends in a softmax, and the loss takes its output for logits. With
# ten classes, how small can the loss become?

# %%
# The "logits" lie between 0 and 1. At best the label's is 1 and all others are 0, so the loss is log(1 + 9/e) = 1.46,
# not much below the 2.30 of a guess. Such a model trains, slowly, and nothing raises an error.
np.testing.assert_allclose(loss(jax.nn.one_hot(3, 10), 3), np.log(1 + 9 / np.e), rtol=1e-6)
print(f"{np.log(1 + 9 / np.e):.2f} nats")

# %% [markdown]
# **3.** Which labels, given as probabilities, make the gradient of cross-entropy 0 at the logits (2, 1, 0.1)? What is
# the loss there?

# %%
# ŷ − y = 0 where the label is the prediction. The loss is then the entropy of the prediction: cross-entropy of p with
# p.
target = jsoftmax.softmax(jnp.asarray(z))
value, gradient = jax.value_and_grad(jsoftmax.softmax_cross_entropy)(jnp.asarray(z), target)
np.testing.assert_allclose(gradient, 0, atol=1e-7)
np.testing.assert_allclose(value, -(target * jnp.log(target)).sum(), rtol=1e-6)
print(f"{value:.3f} nats")

# %% [markdown]
# **4.** A class is never right and must not be predicted. You may set its logit to −∞, or take it out of the row. Is
# there a difference for the other probabilities? And what if you set its *probability* to 0 after softmax?

# %%
# The first two are the same: e^(−∞) adds nothing to the sum. In the third the rest sums to less than 1. Dividing by
# that sum repairs it: softmax over some classes is the whole softmax, renormalized.
with_minus_infinity = jsoftmax.softmax(jnp.array([2.0, -jnp.inf, 0.1]))
np.testing.assert_allclose(with_minus_infinity[jnp.array([0, 2])], jsoftmax.softmax(jnp.array([2.0, 0.1])), rtol=1e-6)
set_to_zero = jsoftmax.softmax(jnp.array([2.0, 1.0, 0.1])).at[1].set(0)
print(f"sums: {with_minus_infinity.sum():.3f} and {set_to_zero.sum():.3f}")
np.testing.assert_allclose(set_to_zero / set_to_zero.sum(), with_minus_infinity, rtol=1e-6)

# %% [markdown]
# **5.** At which gap, in float64, does the sum in the usual form become exactly 1, so that the loss and its gradient at
# the label are 0? (In float32 it was about 17: find the rule first.)

# %%
# Where the others' sum, here 2e^(−g), is at most half the distance from 1 to the next number, 2^-53 for float64: at
# g = log 2 + 53 log 2 = 37.4.
bits = {np.float32: 24, np.float64: 53}
for dtype, count in bits.items():
    g = np.linspace(0, 60, 6001)
    added = (1 + 2 * np.exp(-g).astype(dtype)).astype(dtype)
    print(f"{np.dtype(dtype).name}: from {g[added == 1][0]:.1f} on, rule {(count + 1) * np.log(2):.1f}")
    assert abs(g[added == 1][0] - (count + 1) * np.log(2)) < 0.1
