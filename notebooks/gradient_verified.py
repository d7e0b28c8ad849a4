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
# # The gradient ŷ − y, verified
#
# The gradient of cross-entropy is the prediction minus the label, ŷ − y. Here it is derived, and then found again in
# four other ways: by automatic differentiation, by finite differences, by a derivative rule that you write yourself,
# and by `jsoftmax.testing.check_gradients`. The ways don't agree to the last digit, and where they part is the
# interesting bit.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jsoftmax
from jsoftmax.testing import check_gradients, float64

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
np.set_printoptions(precision=4, suppress=True)

# %% [markdown]
# ## 1. By hand
#
# With $S = \sum_n e^{z_n}$ and $p_i = e^{z_i} / S$, the loss of a row whose label is $y$ is
#
# $$\ell = -\log p_y = \log S - z_y$$
#
# Differentiate the two terms. The first gives $\frac{1}{S} \frac{\partial S}{\partial z_j} = \frac{e^{z_j}}{S} = p_j$.
# The second is 1 if $j$ is the label and 0 if it is not; that is what Kronecker's $\delta_{jy}$ says, and also what
# the one-hot label $y_j$ says. Together:
#
# $$\frac{\partial \ell}{\partial z_j} = p_j - \delta_{jy} \qquad\text{or}\qquad \nabla \ell = \hat y - y$$
#
# Read it as a push. Every class is pushed down by the probability that it has, and the label is pushed up by 1. The
# pushes sum to 0. When the prediction is the label, they stop.

# %%
z, label = jnp.array([2.0, 1.0, 0.1]), 0
p = jsoftmax.softmax(z)
by_hand = p - jax.nn.one_hot(label, 3)
print("ŷ     ", np.asarray(p))
print("y     ", np.asarray(jax.nn.one_hot(label, 3)))
print("ŷ − y ", np.asarray(by_hand))
np.testing.assert_allclose(by_hand, [-0.3410, 0.2424, 0.0986], atol=5e-5)
np.testing.assert_allclose(by_hand.sum(), 0, atol=1e-7)


# %% [markdown]
# ## 2. By automatic differentiation
#
# JAX needs nothing but the formula. It applies the chain rule to each operation of the program, so that the result is
# the derivative of *what was written*, rounding and all. On an ordinary row that is as good as ours.


# %%
def textbook(z, label):
    return -jnp.log(jnp.exp(z) / jnp.exp(z).sum())[label]


def ours(z, label):
    return jsoftmax.softmax_cross_entropy_with_integer_labels(z, label)


print("textbook", np.asarray(jax.grad(textbook)(z, label)))
print("jsoftmax", np.asarray(jax.grad(ours)(z, label)))
np.testing.assert_allclose(jax.grad(textbook)(z, label), by_hand, rtol=1e-5)
np.testing.assert_allclose(jax.grad(ours)(z, label), by_hand, rtol=1e-6)


# %% [markdown]
# ## 3. By finite differences
#
# The oldest check of a derivative: move one logit by a small step $h$ and see what the loss does.
#
# $$\frac{\ell(z + h) - \ell(z)}{h} \quad\text{(one-sided)} \qquad
# \frac{\ell(z + h) - \ell(z - h)}{2h} \quad\text{(central)}$$
#
# It seems that a smaller step is always better. It is not. The formulas neglect higher derivatives, by an amount that
# grows with $h$ (one-sided) or $h^2$ (central). And the losses are rounded, each by about the unit roundoff $u$, which
# the division by $h$ turns into $u / h$. The best step balances the two: $h \approx \sqrt u$ on one side,
# $h \approx \sqrt[3]{u}$ in the middle.


# %%
def differences(dtype):
    """The error of both formulas for each step, against ŷ − y in float64."""
    at = np.array([2.0, 1.0, 0.1], dtype)
    exact = np.exp(at[0].astype(np.float64)) / np.exp(at.astype(np.float64)).sum() - 1
    steps = np.logspace(-15, 0, 400).astype(dtype)
    up = jax.vmap(lambda h: ours(jnp.asarray(at).at[0].add(h), 0))(steps)
    down = jax.vmap(lambda h: ours(jnp.asarray(at).at[0].add(-h), 0))(steps)
    up, down = np.asarray(up), np.asarray(down)
    one_sided = (up - np.asarray(ours(jnp.asarray(at), 0))) / steps
    central = (up - down) / (2 * steps)
    return steps, np.abs(one_sided - exact), np.abs(central - exact)


fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
best = {}
for axis, dtype in zip(axes, (np.float32, np.float64), strict=True):
    with float64():
        steps, one_sided, central = differences(dtype)
    u = np.finfo(dtype).eps / 2
    axis.loglog(steps, one_sided, ".", markersize=3, color=ORANGE, label="one-sided")
    axis.loglog(steps, central, ".", markersize=3, color=BLUE, label="central")
    axis.loglog(steps, u / steps, color=GREY, linewidth=1, label="u / h: rounding")
    axis.axhline(u, color=GREEN, linewidth=1.5, linestyle="--", label="u: what a formula can reach")
    axis.set(title=f"{np.dtype(dtype).name}, u = {u:.0e}", xlabel="step h", ylim=(1e-17, 10))
    best[dtype] = np.median(central[(steps > u ** (1 / 3) / 2) & (steps < u ** (1 / 3) * 2)])
axes[0].set_ylabel("error of the derivative")
axes[0].legend(fontsize=8, loc="lower left")
plt.show()
print(f"central differences near their best step: {best[np.float32]:.0e} in float32, {best[np.float64]:.0e} in float64")
assert 1e-6 < best[np.float32] < 1e-3
assert best[np.float64] < 1e-9

# %% [markdown]
# The V is the whole story of finite differences. In float32 they are good to five digits at best: enough to find a
# wrong sign, useless for telling $10^{-7}$ from 0. Hence, use them in float64, with a step that suits the formula,
# and against a gradient that is not small.

# %% [markdown]
# ## 4. By a rule of your own
#
# `jax.custom_vjp` replaces automatic differentiation by a rule that you write. It takes three parts:
#
# 1. the function itself;
# 2. a *forward* half, which also returns what the backward half will want to know (the *residuals*);
# 3. a *backward* half, which gets the residuals and the derivative $g$ of the final result with respect to the loss,
#    and returns its derivative with respect to each argument: $g\,(\hat y - y)$.


# %%
def usual(z, label):
    m = jax.lax.stop_gradient(z.max())  # taken out, so that no exponential overflows
    return m + jnp.log(jnp.exp(z - m).sum()) - z[label]


my_loss = jax.custom_vjp(usual)


def my_loss_fwd(z, label):
    return usual(z, label), (z, label)  # keep the logits, not the probabilities: they are there already


def my_loss_bwd(residuals, g):
    z, label = residuals
    p = jnp.exp(z - z.max())
    p = p / p.sum()
    return g * (p - jax.nn.one_hot(label, z.size)), None  # a label has no derivative


my_loss.defvjp(my_loss_fwd, my_loss_bwd)

print("my rule ", np.asarray(jax.grad(my_loss)(z, label)))
print("jsoftmax", np.asarray(jax.grad(ours)(z, label)))
np.testing.assert_allclose(jax.grad(my_loss)(z, label), jax.grad(ours)(z, label), rtol=1e-6)

# %% [markdown]
# It works under `jit`, `vmap` and `grad` like any function of JAX. Here it is on a batch, with another function behind
# it, so that $g$ is not 1:

# %%
random = np.random.default_rng(0)
rows = jnp.asarray(random.normal(size=(8, 10)) * 4, jnp.float32)
labels = jnp.asarray(random.integers(0, 10, size=8), jnp.int32)


def squared(loss):
    return jax.jit(jax.grad(lambda rows: (jax.vmap(loss)(rows, labels) ** 2).mean()))


np.testing.assert_allclose(squared(my_loss)(rows), squared(ours)(rows), rtol=2e-5, atol=1e-6)

# %% [markdown]
# ### Where it breaks
#
# Now let the model become sure of the label: $z = (g, 0.1, -0.3)$ with a growing $g$. The gradient at the label is
# $p_0 - 1$, minus the probability of the other two: small, never 0. Our rule computes $p_0$, which is nearly 1, and
# takes 1 away. What is left is the rounding error of $p_0$.
#
# The cure costs one line. Don't subtract; add up the probabilities of the *others*:
#
# $$\hat y_y - 1 = -\sum_{j \ne y} p_j$$


# %%
my_better_loss = jax.custom_vjp(usual)


def my_better_loss_bwd(residuals, g):
    z, label = residuals
    e = jnp.exp(z - z.max())
    others = jnp.where(jnp.arange(z.size) == label, 0, e)
    return g * (others.at[label].set(-others.sum())) / e.sum(), None


my_better_loss.defvjp(my_loss_fwd, my_better_loss_bwd)

gaps = np.linspace(0, 80, 321, dtype=np.float32)
confident = np.stack([gaps, 0 * gaps + 0.1, 0 * gaps - 0.3], axis=-1)
wide = confident.astype(np.longdouble)
rest = np.exp(wide[:, 1] - wide[:, 0]) + np.exp(wide[:, 2] - wide[:, 0])
exact = -rest / (1 + rest)

fig, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
styles = {
    "autodiff of the usual form": (usual, ".", GREY),
    "my rule, p − 1": (my_loss, ".", ORANGE),
    "my rule, sum of the others": (my_better_loss, "-", GREEN),
    "jsoftmax": (ours, "-", BLUE),
}
errors = {}
for name, (loss, style, colour) in styles.items():
    got = jax.vmap(jax.grad(loss), (0, None))(confident, 0)[:, 0]
    errors[name] = np.abs((np.asarray(got) - exact) / exact).astype(np.float64)
    size = 9 if loss is usual else 4
    axis.semilogy(gaps, np.maximum(errors[name], 1e-9), style, markersize=size, color=colour, label=name)
axis.annotate("100 % wrong: the gradient is exactly 0", (30, 1.8), fontsize=9)
axis.set(xlabel="g, the label's logit", ylabel="relative error at the label", ylim=(3e-10, 20))
axis.legend(fontsize=8, loc="center right")
plt.show()
assert np.all(errors["my rule, p − 1"][gaps > 19] == 1)
assert errors["jsoftmax"].max() < 5e-7

# %% [markdown]
# Both uses of $p - 1$ lose a digit for each 2.3 of the gap, until nothing is left at 17. From there on they are exactly
# zero. The sum of the others keeps them all. It still loses a little as the gap grows, since $z_j - m$ is rounded
# before the exponential. The library puts that rounding error back, so that its line stays flat:
# [mathematics](mathematics.md) has the rest.

# %% [markdown]
# ## 5. By a tool
#
# `check_gradients` does all of the above for any loss: ŷ − y in extended precision, autodiff of a textbook formula in
# float64, and finite differences in float64. Errors are in *ulps*, units in the last place; whatever an answer can't
# know itself is taken off first.

# %%
report = check_gradients(ours, rows, labels)
print(report)
assert report.ok

# %% [markdown]
# It finds the weakness of our first rule as soon as there is a confident row, and accepts the second. (Its finite
# differences evaluate a loss in float64, where the usual form still has digits at such a gap.)

# %%
with_confident = rows.at[0].set(0.0).at[0, labels[0]].set(16.0)
first = check_gradients(jax.vmap(my_loss), with_confident, labels)
second = check_gradients(jax.vmap(my_better_loss), with_confident, labels, max_ulps=16)
print(f"p − 1              {'ok' if first.ok else 'wrong'}, {first.worst_ulps:.3g} ulp")
print(f"sum of the others  {'ok' if second.ok else 'wrong'}, {second.worst_ulps:.3g} ulp")
print(f"jsoftmax           {check_gradients(ours, with_confident, labels).worst_ulps:.3g} ulp")
assert not first.ok
assert second.ok

# %% [markdown]
# ## 6. The second derivative
#
# Differentiate ŷ − y once more. The label is a constant and drops out; what is left is the derivative of softmax:
#
# $$\frac{\partial^2 \ell}{\partial z_i \partial z_j} = p_i (\delta_{ij} - p_j)
# \qquad\text{or}\qquad \nabla^2 \ell = \mathrm{diag}(p) - p\,p^{\mathsf T}$$

# %%
row = jnp.asarray([2.0, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -2.0])
p = jsoftmax.softmax(row)
closed_form = jnp.diag(p) - jnp.outer(p, p)
by_jax = jax.hessian(ours)(row, 0)
np.testing.assert_allclose(by_jax, closed_form, atol=1e-7)
np.testing.assert_allclose(jax.hessian(ours)(row, 5), by_jax, atol=1e-7)  # another label, the same curvature

eigenvalues = np.linalg.eigvalsh(np.asarray(by_jax, np.float64))
print("eigenvalues", eigenvalues)
assert eigenvalues.min() > -1e-6
np.testing.assert_allclose(by_jax.sum(axis=1), 0, atol=1e-7)

fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", width_ratios=[1, 1, 1.1])
bound = float(jnp.abs(closed_form).max())
for axis, matrix, title in ((axes[0], closed_form, "diag(p) − p pᵀ"), (axes[1], by_jax, "jax.hessian of the loss")):
    picture = axis.imshow(matrix, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axis.set(title=title, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
fig.colorbar(picture, ax=axes[:2], shrink=0.8)
axes[2].bar(range(8), eigenvalues[::-1], color=BLUE)
axes[2].set(title="eigenvalues", xlabel="none is negative, one is 0")
plt.show()

# %% [markdown]
# What to read from the picture: the Hessian is largest where the model is undecided, each row sums to 0 (moving all
# logits together changes nothing: the eigenvalue 0), and no direction bends downwards. **Cross-entropy is convex in
# the logits.** For any direction $v$, $v^{\mathsf T} \nabla^2 \ell\, v$ is the variance of $v$ under $p$.
#
# A product of the Hessian with a direction needs no matrix: it is the forward derivative of the gradient.

# %%
direction = jnp.asarray(random.normal(size=8), jnp.float32)
_, product = jax.jvp(lambda z: jax.grad(ours)(z, 0), (row,), (direction,))
np.testing.assert_allclose(product, closed_form @ direction, atol=1e-6)
variance = (p * direction**2).sum() - (p * direction).sum() ** 2
np.testing.assert_allclose(direction @ product, variance, rtol=1e-5)

# %% [markdown]
# And on a confident row the usual second derivative vanishes along with the first, while ours keeps its digits:

# %%
sure = jnp.array([30.0, 0.0, 0.0])
truth = 2 * np.exp(-30.0)
usual_curvature, our_curvature = jax.hessian(usual)(sure, 0)[0, 0], jax.hessian(ours)(sure, 0)[0, 0]
print(f"exact {truth:.4e}, usual {usual_curvature:g}, jsoftmax {our_curvature:.4e}")
np.testing.assert_allclose(our_curvature, truth, rtol=1e-6)
assert usual_curvature == 0

# %% [markdown]
# ## What to take from it
#
# - The gradient is **ŷ − y**, the Hessian **diag(p) − p pᵀ**. Both take two lines.
# - Finite differences are limited by rounding, to about $u^{2/3}$. Use them in float64, for gradients that aren't
#   small.
# - Autodiff is exact about the program, not about the mathematics. Where a formula cancels, so does its derivative.
# - If you write your own rule, don't compute $p - 1$. Sum the others.
