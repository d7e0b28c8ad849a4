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
# # Temperature and label smoothing
#
# Two knobs on the same softmax. *Temperature* acts before it, on the logits, and sets how undecided the probabilities
# are. *Label smoothing* acts after it, on the target, and sets how sure the model is asked to be. For both there are
# closed forms to check the code against.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import jsoftmax

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 80})
np.set_printoptions(precision=3, suppress=True)

cross_entropy = jsoftmax.softmax_cross_entropy_with_integer_labels


def entropy(logits, temperature=1.0):
    """−Σ p log p of each row, in nats: one of the row statistics."""
    labels = jnp.zeros(logits.shape[:-1], jnp.int32)  # the entropy doesn't depend on them
    return jsoftmax.softmax_statistics(logits, labels, temperature=temperature).entropy


# %% [markdown]
# ## Temperature: from the winner to everybody
#
# $p = \mathrm{softmax}(z / T)$. Below is one row of eight logits for temperatures from 0.03 to 100. Each column of the
# picture is a distribution.

# %%
z = jnp.array([3.0, 2.6, 1.5, 0.8, 0.0, -0.7, -1.5, -2.5])
temperatures = jnp.logspace(-1.5, 2, 300)
p = jax.vmap(lambda t: jsoftmax.softmax(z, temperature=t))(temperatures)
h = jax.vmap(lambda t: entropy(z, t))(temperatures)

fig, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained", height_ratios=[1.2, 1])
axes[0].stackplot(temperatures, p.T, colors=plt.get_cmap("viridis")(np.linspace(0.95, 0.1, 8)), linewidth=0)
for log_t, text in ((-1.3, "the winner\ntakes all"), (-0.1, "softmax, T = 1"), (1.35, "everybody\nhas 1/8")):
    axes[0].text(10**log_t, 0.42, text, ha="center", fontsize=9, bbox={"facecolor": "white", "alpha": 0.7, "lw": 0})
axes[0].set(xscale="log", ylabel="probabilities, stacked", ylim=(0, 1))
axes[1].plot(temperatures, h, color=BLUE, linewidth=2)
axes[1].axhline(np.log(8), color=GREY, linewidth=0.8, linestyle=":")
axes[1].text(0.04, np.log(8) - 0.16, "log 8", fontsize=9)
axes[1].axvline(1, color=GREY, linewidth=0.8)
axes[1].set(xlabel="temperature T", ylabel="entropy (nats)", xlim=(temperatures[0], temperatures[-1]))
plt.show()

# %% [markdown]
# The entropy never falls as $T$ rises, and there is a formula for how fast it rises: with $p = \mathrm{softmax}(z/T)$,
#
# $$\frac{dH}{dT} = \frac{\mathrm{Var}_p(z)}{T^3} \ge 0$$
#
# It follows from $\partial H / \partial z_j = -p_j (\log p_j + H)$ and the chain rule. JAX knows it without being told,
# because temperature is differentiable here:

# %%
slope = jax.vmap(jax.grad(lambda t: entropy(z, t)))(temperatures)
variance = (p * (z - (p * z).sum(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
np.testing.assert_allclose(slope, variance / temperatures**3, rtol=2e-3, atol=1e-6)
assert np.all(np.diff(h) >= -1e-6)

# %% [markdown]
# ### The two limits
#
# As $T \to \infty$ all logits become alike: $p \to 1/K$ and $H \to \log K$. As $T \to 0$ the largest logit takes all.
# If several are largest, they share: that is the limit of the formula, and it is what `temperature=0` returns,
# without a division by 0.

# %%
tied = jnp.array([3.0, 3.0, 1.0, 0.0])
for t in (0.0, 0.1, 1.0, 1e6):
    print(f"T = {t:<9g} p = {np.asarray(jsoftmax.softmax(tied, temperature=t))}   H = {entropy(tied, t):.3f}")
np.testing.assert_array_equal(jsoftmax.softmax(tied, temperature=0.0), [0.5, 0.5, 0, 0])
np.testing.assert_allclose(entropy(tied, 0.1), np.log(2), rtol=1e-6)
np.testing.assert_allclose(entropy(tied, 1e6), np.log(4), rtol=1e-6)

# %% [markdown]
# ### One temperature for each row: a knob for the entropy
#
# `temperature` may be one number a row. Since the entropy rises with $T$, each row has exactly one temperature at
# which it has the entropy that you ask for, and halving an interval finds it. So very different rows can be made
# equally undecided: that is how t-SNE chooses the width of its neighbourhoods (as *perplexity*, $e^H$).


# %%
def temperature_of(logits, target):
    """The temperature at which each row has the entropy `target`."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        too_sure = entropy(logits, jnp.exp(middle)) < target
        return jnp.where(too_sure, middle, low), jnp.where(too_sure, high, middle)

    low = jnp.full(logits.shape[:-1], -10.0)
    return jnp.exp(jax.lax.fori_loop(0, 40, halve, (low, -low))[0])


random = np.random.default_rng(0)
spreads = np.array([0.3, 1.0, 3.0, 10.0])
rows = jnp.asarray(np.sort(random.normal(size=(4, 12)))[:, ::-1] * spreads[:, None], jnp.float32)
each = jax.jit(temperature_of)(rows, jnp.log(4.0))
even = jsoftmax.softmax(rows, temperature=each)
np.testing.assert_allclose(entropy(rows, each), np.log(4), rtol=1e-4)

fig, axes = plt.subplots(2, 4, figsize=(10, 3.6), sharex=True, sharey=True, layout="constrained")
for column, (before, after) in enumerate(zip(jsoftmax.softmax(rows), even, strict=True)):
    axes[0, column].bar(range(12), before, color=GREY)
    axes[1, column].bar(range(12), after, color=BLUE)
    axes[0, column].set_title(f"logits spread by {spreads[column]:g}", fontsize=10)
    axes[1, column].set_xlabel(f"T = {each[column]:.2f}")
axes[0, 0].set_ylabel("T = 1")
axes[1, 0].set_ylabel("perplexity 4")
plt.show()

# %% [markdown]
# ### A temperature that is learnt
#
# A classifier that was trained to the end on few examples is surer than it should be. One temperature, fitted on
# examples that it hasn't seen, repairs its probabilities and changes none of its answers (Guo et al., 2017). The loss
# is differentiable in `temperature`, so that gradient descent finds it. It is learnt as its logarithm, which keeps it
# positive.

# %%
images, digits = load_digits(return_X_y=True)
classifier = LogisticRegression(C=100.0, max_iter=3000).fit(images[:200] / 16, digits[:200])
logits = jnp.asarray(classifier.decision_function(images[200:] / 16), jnp.float32)
answers = jnp.asarray(digits[200:])
fit, test = slice(0, 800), slice(800, None)


def loss_at(log_t, part):
    return cross_entropy(logits[part], answers[part], temperature=jnp.exp(log_t)).mean()


optimizer = optax.adam(0.1)


@jax.jit
def learn(carry, _):
    log_t, state = carry
    loss, slope = jax.value_and_grad(loss_at)(log_t, fit)
    updates, state = optimizer.update(slope, state)
    return (optax.apply_updates(log_t, updates), state), (log_t, loss)


start = jnp.zeros(())
(log_t, _), (path, path_losses) = jax.lax.scan(learn, (start, optimizer.init(start)), length=60)
grid = jnp.linspace(-0.7, 2.5, 200)
curves = {name: jax.vmap(lambda x, part=part: loss_at(x, part))(grid) for name, part in (("fit", fit), ("test", test))}
print(f"learnt temperature {jnp.exp(log_t):.2f}: held-out loss {loss_at(0.0, test):.3f} → {loss_at(log_t, test):.3f}")
assert abs(log_t - grid[curves["fit"].argmin()]) < 0.05
assert loss_at(log_t, test) < loss_at(0.0, test)

fig, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.plot(jnp.exp(grid), curves["fit"], color=GREY, label="examples to fit it")
axis.plot(jnp.exp(grid), curves["test"], color=BLUE, label="other examples")
axis.plot(jnp.exp(path), path_losses, "o-", markersize=3, color=ORANGE, label="gradient descent from T = 1")
axis.set(xscale="log", xlabel="temperature", ylabel="mean loss (nats)")
axis.legend(fontsize=9)
plt.show()

# %% [markdown]
# ## Label smoothing: never ask for certainty
#
# Without smoothing the target is 1 for the label and 0 for all else, and no finite logits reach that: the loss always
# has something to gain from a larger lead. Smoothing moves a share ε of the target to other classes. There are two
# conventions, and papers rarely say which:
#
# | `smoothing=` | target of the label | target of each other class |
# |---|---|---|
# | `"uniform"` (the default; optax, PyTorch) | $1 - ε + ε/K$ | $ε / K$ |
# | `"others"` | $1 - ε$ | $ε / (K - 1)$ |
#
# **Where does the optimum end up?** The loss is the cross-entropy of the target $t$ with $p$, and its gradient is
# $p - t$. So the optimum is $p = t$: finite, at last. The label's logit then leads the others by
# $\log (t_y / t_j)$:
#
# $$\text{uniform:}\quad \log \frac{1 - ε + ε/K}{ε/K} = \log\Bigl(\frac{(1 - ε) K}{ε} + 1\Bigr)
# \qquad \text{others:}\quad \log \frac{(1 - ε)(K - 1)}{ε}$$
#
# For every ε and both conventions at once, `vmap` runs gradient descent on the logits from zero:


# %%
K = 10
shares = jnp.array([0.01, 0.03, 0.1, 0.3, 0.6])


def descend(share, smoothing):
    """The lead of the label over the other classes, in 1,000 steps of gradient descent on the logits."""

    def step(z, _):
        z = z - 2 * jax.grad(lambda z: cross_entropy(z, 0, label_smoothing=share, smoothing=smoothing))(z)
        return z, z[0] - z[1:].max()

    return jax.lax.scan(step, jnp.zeros(K), length=1000)[1]


closed_forms = {
    "uniform": jnp.log((1 - shares) * K / shares + 1),
    "others": jnp.log((1 - shares) * (K - 1) / shares),
}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(shares)))
for axis, (smoothing, leads) in zip(axes, closed_forms.items(), strict=True):
    paths = jax.jit(jax.vmap(lambda share, s=smoothing: descend(share, s)))(shares)
    for share, path, lead, colour in zip(shares, paths, leads, colours, strict=True):
        axis.plot(range(1, 1001), path, color=colour, label=f"ε = {share:g}")
        axis.plot(1000, lead, "o", color=colour, markersize=8, fillstyle="none", clip_on=False)
    axis.set(xscale="log", xlabel="step", title=f'smoothing="{smoothing}"')
    np.testing.assert_allclose(paths[:, -1], leads, rtol=2e-3)
    print(f"{smoothing:8} closed form {np.asarray(leads)}, found {np.asarray(paths[:, -1])}")
axes[0].set_ylabel("lead of the label's logit")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# The circles are the closed forms. With a share of 0.1 and ten classes, the usual convention asks for a probability of
# 0.91 at the label, a lead of 4.5; the other asks for 0.90, a lead of 4.4. The conventions are one family: ε of the
# first is $ε (K - 1) / K$ of the second.
#
# The smallest loss is not 0, by the way, but the entropy of the target. Don't compare losses across different ε.

# %%
row = jnp.asarray(random.normal(size=K), jnp.float32)
np.testing.assert_allclose(
    cross_entropy(row, 3, label_smoothing=0.1),
    cross_entropy(row, 3, label_smoothing=0.1 * (K - 1) / K, smoothing="others"),
    rtol=1e-6,
)
at_optimum = jnp.zeros(K).at[0].set(closed_forms["uniform"][2])
target = jsoftmax.smooth_labels(jax.nn.one_hot(0, K), 0.1)
np.testing.assert_allclose(
    cross_entropy(at_optimum, 0, label_smoothing=0.1), -(target * jnp.log(target)).sum(), rtol=1e-6
)
np.testing.assert_allclose(jsoftmax.softmax(at_optimum), target, rtol=1e-5)

# %% [markdown]
# ## Both at once
#
# Both options may be traced numbers, so that one program with two nested `vmap`s computes a whole map: the held-out
# loss of the classifier above for 60 temperatures and 50 smoothings.

# %%
some_temperatures, some_shares = jnp.logspace(-0.5, 1.2, 60), jnp.linspace(0, 0.5, 50)


def mean_loss(temperature, share):
    return cross_entropy(logits[test], answers[test], temperature=temperature, label_smoothing=share).mean()


over_temperatures = jax.vmap(mean_loss, (0, None))
losses = jax.jit(jax.vmap(over_temperatures, (None, 0)))(some_temperatures, some_shares)
assert losses.shape == (50, 60)
np.testing.assert_allclose(losses[7, 20], mean_loss(some_temperatures[20], some_shares[7]), rtol=1e-5)
best = some_temperatures[losses.argmin(axis=1)]

fig, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
levels = np.linspace(float(losses.min()), 2.4, 14)
filled = axis.contourf(some_temperatures, some_shares, losses, levels=levels, cmap="viridis_r", extend="max")
axis.plot(best, some_shares, color="white", linewidth=2, label="best temperature for each ε")
axis.set(xscale="log", xlabel="temperature", ylabel="label smoothing ε", title="Held-out loss (nats)")
axis.legend(labelcolor="white", loc="upper left")
fig.colorbar(filled, ax=axis)
plt.show()
assert np.all(np.diff(best) >= 0)

# %% [markdown]
# The white line shows how the two knobs are related: the more smoothing is asked for, the higher the temperature that
# answers best. Smoothing during training and temperature after it both take back overconfidence; using both needs a
# reason.
#
# ## What to take from it
#
# - Temperature sets the entropy, from that of the ties at 0 to $\log K$ at infinity, never the order of classes.
# - It may be a number, one number a row, or a parameter to learn.
# - Label smoothing gives the logits a finite place to go: a lead of $\log((1 - ε) K / ε + 1)$, or
#   $\log((1 - ε)(K - 1) / ε)$ by the other convention.
# - Both are traced like any other argument: `vmap`, `grad` and `jit` apply.
