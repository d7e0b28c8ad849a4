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
# # Many devices
#
# A vocabulary that is too large for one device is split over several. This notebook splits softmax by hand, lets JAX
# and jsoftmax do the same, looks at what the devices say to each other, and counts what is won.
#
# It runs on any machine: one CPU plays eight devices. That has to be said before JAX starts.

# %%
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import re
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jsoftmax

print(len(jax.devices()), "devices")

# %% [markdown]
# ## One row, eight parts
#
# Each device holds an eighth of the classes, and may say a few numbers. Its largest logit $m_i$, and the sum $s_i$ of
# its other exponentials relative to that, are enough. Together,
#
# $$m = \max_i m_i, \qquad s = \sum_{m_i = m} s_i + \sum_{m_i < m} (1 + s_i)\, e^{m_i - m} + (\#\{m_i = m\} - 1), \qquad
# -\log p_y = (m - z_y) + \log(1 + s).$$
#
# One of the largest logits stays out of the sum, and nothing is subtracted: a row that is sure of its label keeps its
# digits, wherever the label is.

# %%
row = np.zeros(64, np.float32)
row[37] = 20.0  # the label's logit, on the fifth device
parts = row.reshape(8, 8)

largest = parts.max(axis=1)
left_out = np.arange(8) == parts.argmax(axis=1)[:, None]
sums = np.where(left_out, 0, np.exp(parts - largest[:, None])).sum(axis=1)
top = largest.max()
at_top = largest == top
s = sums[at_top].sum() + ((1 + sums) * np.exp(largest - top))[~at_top].sum() + (at_top.sum() - 1)

print("by parts  ", np.log1p(s))
print("one device", jsoftmax.softmax_cross_entropy_with_integer_labels(jnp.array(row), 37))
print("the truth ", np.log1p(63 * np.exp(np.longdouble(-20))))

# %% [markdown]
# ## The same inside `shard_map`
#
# `shard_map` runs a function on every device, each with its part of the arrays. `axis_name` tells the loss over which
# axis of the mesh its classes are split. Labels are numbers of the whole vocabulary.

# %%
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rows, width, classes = 512, 64, 8192
features = jax.random.normal(jax.random.key(0), (rows, width))
kernel = jax.random.normal(jax.random.key(1), (width, classes)) / 8
labels = jax.random.randint(jax.random.key(2), (rows,), 0, classes)

names = np.vectorize(lambda device: device.id)(mesh.devices)
fig, axes = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained", width_ratios=[1, 2, 2])
for ax, title, across, down in zip(
    axes, ["features", "kernel", "logits"], [False, True, True], [True, False, True], strict=True
):
    owner = np.zeros((2 if down else 1, 4 if across else 1))
    for r in range(owner.shape[0]):
        for c in range(owner.shape[1]):
            owner[r, c] = names[r if down else 0, c if across else 0]
            held = names[r if down else slice(None), c if across else slice(None)]
            ax.text(c, r, ", ".join(map(str, np.ravel(held))), ha="center", va="center")
    ax.imshow(owner, cmap="Pastel1", vmin=0, vmax=8, aspect="auto")
    ax.set(title=title, xticks=[], yticks=[])
axes[0].set_ylabel("rows")
axes[1].set_xlabel("classes")
axes[2].set_xlabel("classes")
plt.show()

# %% [markdown]
# The numbers say which devices hold a part. Features are split by rows, the kernel by classes; logits come out split
# both ways, and never leave their device.


# %%
def loss(features, kernel, labels):
    return jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, reduction="sum", label_smoothing=0.1) / rows


def local_loss(features, kernel, labels, axis_name):
    total = jsoftmax.linear_softmax_cross_entropy(
        features, kernel, labels, reduction="sum", label_smoothing=0.1, axis_name=axis_name
    )
    return jax.lax.psum(total, "data") / rows


specs = (P("data"), P(None, "model"), P("data"))
split_loss = jax.shard_map(partial(local_loss, axis_name="model"), mesh=mesh, in_specs=specs, out_specs=P())

value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(features, kernel, labels)
split_value, split_gradients = jax.jit(jax.value_and_grad(split_loss, argnums=(0, 1)))(features, kernel, labels)
print("one device   ", value)
print("eight devices", split_value)
for name, one, eight in zip(["features", "kernel"], gradients, split_gradients, strict=True):
    print(f"gradient of {name}: largest difference {jnp.max(jnp.abs(one - eight)):.1e} of {jnp.max(jnp.abs(one)):.1e}")

# %% [markdown]
# ## Or leave it to `jit`
#
# The plain function takes split arrays as well. Nothing in it changes: XLA sees how its arguments are split.

# %%
arrays = (features, kernel, labels)
placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
by_jit, (_, kernel_gradient) = step(*placed)
print(by_jit, kernel_gradient.sharding.spec)

# %% [markdown]
# ## What do they say to each other?
#
# The compiled program lists every message. There are only sums over devices (all-reduce): five numbers a row for the
# softmax, two more for the label smoothing, and the two gradients.

# %%
program = jax.jit(jax.value_and_grad(split_loss, argnums=(0, 1))).lower(*placed).compile().as_text()
messages = {}
for result, kind in re.findall(r"= (.+?) (all-\w+(?:-\w+)?|collective-permute|reduce-scatter)(?:-start)?\(", program):
    for shape in re.findall(r"f32\[([\d,]*)\]", result):
        messages[kind, shape or "one number"] = messages.get((kind, shape or "one number"), 0) + 1
for (kind, shape), count in messages.items():
    print(f"{count} × {kind:<11} of {shape}")

# %% [markdown]
# A gathered array of logits would have been 256 × 8192 numbers on each device.
#
# ## What is won
#
# The memory of one device, for the loss and its gradients, as the classes are split over more of them:

# %%
shards = [1, 2, 4, 8]
held, temporary = [], []
for count in shards:
    line = jax.make_mesh((1, count), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(partial(local_loss, axis_name="model"), mesh=line, in_specs=specs, out_specs=P())
    shapes = [
        jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(line, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]
    memory = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    held.append(memory.argument_size_in_bytes / 1e6)
    temporary.append(memory.temp_size_in_bytes / 1e6)

fig, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
ax.plot(shards, temporary, "o-", label="temporary")
ax.plot(shards, held, "s-", label="features, kernel, labels")
ax.plot(shards, temporary[0] / np.array(shards), ":", color="grey", label="1 / devices")
ax.set(xscale="log", yscale="log", xlabel="devices", ylabel="MB on each", xticks=shards, xticklabels=shards)
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# ## A mistake that is easy to make
#
# Label smoothing pulls towards the mean logit *of all classes*. A program that takes the mean over each device's own
# classes smooths towards something else, and the loss depends on where the label happens to live:

# %%
logits = features @ kernel
smoothing = 0.1
exact = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, label_smoothing=smoothing)

log_p = jsoftmax.log_softmax(logits)
own_part = log_p.reshape(rows, 8, -1)[jnp.arange(rows), labels // (classes // 8)]  # of the label's device
careless = -(1 - smoothing) * log_p[jnp.arange(rows), labels] - smoothing * own_part.mean(axis=-1)

split_rows = jax.shard_map(
    partial(jsoftmax.softmax_cross_entropy_with_integer_labels, label_smoothing=smoothing, axis_name=("data", "model")),
    mesh=mesh,
    in_specs=(P(None, ("data", "model")), P()),
    out_specs=P(),
)
print(f"mean over own classes: off by up to {jnp.max(jnp.abs(careless - exact)):.1e}")
print(f"jsoftmax:              off by up to {jnp.max(jnp.abs(split_rows(logits, labels) - exact)):.1e}")

# %% [markdown]
# ## A vocabulary that does not divide
#
# 8190 classes on 8 devices: two columns of padding, masked. What they hold does not matter, not even NaN.

# %%
vocabulary = 8190
padded = kernel.at[:, vocabulary:].set(jnp.nan)
allowed = jnp.arange(classes) < vocabulary
short = labels % vocabulary

line = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
masked = jax.shard_map(
    lambda features, kernel, where, labels: jsoftmax.linear_softmax_cross_entropy(
        features, kernel, labels, where=where, label_smoothing=smoothing, axis_name="model"
    ),
    mesh=line,
    in_specs=(P(), P(None, "model"), P("model"), P()),
    out_specs=P(),
)
print(masked(features, padded, allowed, short))
print(jsoftmax.linear_softmax_cross_entropy(features, kernel[:, :vocabulary], short, label_smoothing=smoothing))

# %% [markdown]
# ## What to take from this
#
# - A softmax over split classes costs a few numbers a row. The logits stay where they are.
# - With `jit`, place the arrays and change nothing; with `shard_map`, add `axis_name`.
# - Memory falls with the number of devices; what is sent besides is each gradient, once.
# - On many machines it is the same program: see the page on scaling out, and `examples/many_processes.py`.
