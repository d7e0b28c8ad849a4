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
# # Calibration
#
# A model that says "90 %" should be right nine times out of ten. Networks that are trained for long on little data say
# 99 % instead. Here we make such a network on purpose, measure how far off it is, and mend it with a single number.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jsoftmax
from jsoftmax import plots

# %% [markdown]
# ## An overconfident network
#
# The data are scikit-learn's handwritten digits, of 8 by 8 pixels. The network gets 200 of them, a tenth with a wrong
# label, and 200 steps to learn them by heart. 600 more are for fitting the calibration, the rest for judging it.

# %%
images, digits = load_digits(return_X_y=True)
random = np.random.default_rng(0)
order = random.permutation(len(digits))
images, digits = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(digits[order], jnp.int32)
train, fitting, test = slice(0, 200), slice(200, 800), slice(800, None)

wrong = random.random(200) < 0.1
noisy = jnp.where(wrong, random.integers(0, 10, size=200), digits[train]).astype(jnp.int32)
model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(128, 10, rngs=nnx.Rngs(1)))
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    def loss(model):
        return jsoftmax.softmax_cross_entropy_with_integer_labels(model(images[train]), noisy).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


losses = [float(step(model, optimizer)) for _ in range(200)]
print(f"training loss: {losses[0]:.2f} at first, {losses[-1]:.1e} at last")
assert losses[-1] < 1e-2

# %% [markdown]
# ## How far off is it?
#
# Confidence is the largest probability of a row. The *reliability diagram* puts rows into bins by confidence, and draws
# for each bin how many of its rows are right. On the diagonal, the two agree; below it, the model is too sure. The area
# of a dot is its share of the rows.

# %%
held_out, labels = model(images[test]), digits[test]
accuracy = float(jnp.mean(jnp.argmax(held_out, axis=-1) == labels))
confidence = float(jnp.mean(jnp.max(jsoftmax.softmax(held_out), axis=-1)))
error = float(jsoftmax.expected_calibration_error(held_out, labels))
print(f"right {accuracy:.1%}, sure {confidence:.1%}, expected calibration error {error:.3f}")
assert confidence > accuracy + 0.02

plots.reliability_diagram(held_out, labels, bins=10)
plt.show()

# %% [markdown]
# ## One temperature
#
# Dividing all logits by a temperature T > 1 makes every row less sure, and changes no prediction. `fit_temperature`
# finds the T at which the labels of rows held out for it are most likely. In 1/T the loss is convex: there is one
# minimum.

# %%
fitted, fitted_labels = model(images[fitting]), digits[fitting]
fit = jsoftmax.fit_temperature(fitted, fitted_labels)
print(f"T = {fit.temperature:.2f}; mean loss {fit.loss_before:.3f} before, {fit.loss_after:.3f} after, on its own rows")

temperatures = jnp.geomspace(0.5, 20, 100)


def mean_loss(temperature):
    losses = jsoftmax.softmax_cross_entropy_with_integer_labels(fitted, fitted_labels, temperature=temperature)
    return losses.mean()


curve = jax.vmap(mean_loss)(temperatures)
assert fit.loss_after <= curve.min()
fig, axes = plt.subplots(figsize=(5, 2.8), layout="constrained")
axes.semilogx(temperatures, curve, color=plots.BLUE)
axes.plot(fit.temperature, fit.loss_after, "o", color=plots.ORANGE, label="fitted")
axes.set(xlabel="temperature", ylabel="mean loss (nats)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# On the rows that nobody has seen:

# %%
calibrated = fit.apply(held_out)
assert jnp.all(jnp.argmax(calibrated, axis=-1) == jnp.argmax(held_out, axis=-1))
axes = plots.reliability_diagram(held_out, labels, bins=10, name="before")
plots.reliability_diagram(calibrated, labels, bins=10, name="after", axes=axes)
plt.show()

# %% [markdown]
# ## More numbers to fit
#
# Vector scaling gives each class a temperature and a bias of its own; bias correction gives all classes one temperature
# and each a bias. More numbers fit their own rows better, always. Whether they do better on others depends on how many
# rows there are.

# %%
names = ("temperature", "bias_corrected", "vector")
fits = {name: jsoftmax.fit_temperature(fitted, fitted_labels, scaling=name) for name in names}
assert fits["vector"].loss_after <= fits["bias_corrected"].loss_after <= fits["temperature"].loss_after
rows = {"none": held_out, **{name: found.apply(held_out) for name, found in fits.items()}}

print(f"{'scaling':<16}{'loss':>8}{'Brier':>8}{'expected':>10}{'adaptive':>10}{'classwise':>11}")
for name, z in rows.items():
    scores = (
        jsoftmax.softmax_cross_entropy_with_integer_labels(z, labels).mean(),
        jsoftmax.brier_score(z, labels).mean(),
        jsoftmax.expected_calibration_error(z, labels),
        jsoftmax.adaptive_calibration_error(z, labels),
        jsoftmax.classwise_calibration_error(z, labels),
    )
    print("{:<16}{:>8.3f}{:>8.3f}{:>10.3f}{:>10.3f}{:>11.4f}".format(name, *scores))
    if name != "none":
        assert scores[0] < jsoftmax.softmax_cross_entropy_with_integer_labels(held_out, labels).mean()
        assert scores[2] < error

# %% [markdown]
# ## Gradients through the fit
#
# The fitted temperature is a function of the logits it was fitted to, and a differentiable one: at the minimum the
# slope of the loss vanishes, and the implicit function theorem says how the minimum moves. Which rows pull T up? Those
# of which the model is sure and wrong.

# %%
gradient = jax.jit(jax.grad(lambda z: jsoftmax.fit_temperature(z, fitted_labels).temperature))(fitted)
right = jnp.argmax(fitted, axis=-1) == fitted_labels
# What a row's size does to T: the derivative along its own logits.
pull = jnp.sum(gradient * fitted, axis=-1)
print(f"mean pull on T of right rows {pull[right].mean():+.5f}, of wrong rows {pull[~right].mean():+.5f}")
assert pull[~right].mean() > pull[right].mean()
# All together: T of 2z is twice T of z.
np.testing.assert_allclose(pull.sum(), fit.temperature, rtol=1e-3)

sure = jnp.max(jsoftmax.softmax(fitted), axis=-1)
fig, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(sure[right], pull[right], "o", markersize=3, color=plots.BLUE, label="right")
axes.plot(sure[~right], pull[~right], "s", markersize=4, color=plots.ORANGE, label="wrong")
axes.axhline(0, color=plots.GREY, linewidth=0.8)
axes.set(xlabel="confidence before", ylabel="pull on T")
axes.legend(frameon=False)
plt.show()
