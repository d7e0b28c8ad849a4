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
# # Attention from softmax
#
# What attention computes, why its logits are divided by √d, what masks, soft caps and temperature do, how a small model
# learns with it, and how it gets by without the array of its weights.

# %%
import keyword

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jsoftmax

np.set_printoptions(precision=3, suppress=True)


# %% [markdown]
# ## A soft dictionary
#
# A query $q$ is compared with keys $k_s$. Softmax turns the products into weights, and the answer is the mean of the
# values $v_s$ with these weights:
#
# $$p_s = \frac{e^{q \cdot k_s / \sqrt d}}{\sum_r e^{q \cdot k_r / \sqrt d}}, \qquad o = \sum_s p_s\, v_s$$


# %%
def attention(query, key, value):
    logits = query @ key.T / np.sqrt(key.shape[-1])
    weights = jsoftmax.softmax(logits)
    return weights @ value, weights


random = np.random.default_rng(0)
query, key, value = (random.normal(size=(length, 4)).astype(np.float32) for length in (2, 3, 3))
output, weights = attention(query, key, value)
print(np.asarray(weights))

ours = jsoftmax.dot_product_attention(query[:, None], key[:, None], value[:, None])  # one head
np.testing.assert_allclose(ours[:, 0], output, rtol=1e-5, atol=1e-6)

# %% [markdown]
# ## Why 1/√d
#
# The product of two vectors of d independent entries of variance 1 has variance d. Without the division, logits grow
# with the width, softmax puts everything on one key, and its gradient, $p_i (\delta_{ij} - p_j)$, is nearly 0. The
# entropy of the weights shows it: log 64 = 4.16 if they are even, 0 if one key has all.


# %%
def entropy(logits):
    labels = jnp.zeros(logits.shape[:-1], int)
    return float(jsoftmax.softmax_statistics(logits, labels).entropy.mean())


widths = [4, 16, 64, 256, 1024]
raw, scaled = [], []
for width in widths:
    q, k = random.normal(size=(2, 64, width)).astype(np.float32)
    raw.append(entropy(q @ k.T))
    scaled.append(entropy(q @ k.T / np.sqrt(np.float32(width))))

fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
axes[0].plot(widths, raw, "o-", label="q·k")
axes[0].plot(widths, scaled, "o-", label="q·k / √d")
axes[0].set(xscale="log", xlabel="width d", ylabel="entropy of the weights", ylim=(0, 4.3))
axes[0].legend(frameon=False)

logits = q @ k.T / np.sqrt(np.float32(widths[-1]))
temperatures = np.geomspace(0.05, 20, 12).astype(np.float32)
axes[1].plot(temperatures, [entropy(logits / t) for t in temperatures], "o-")
axes[1].set(xscale="log", xlabel="temperature T", ylim=(0, 4.3))
plt.show()
assert raw[-1] < 0.5 < 3 < scaled[-1]

# %% [markdown]
# The right figure has the temperature, which divides the logits once more: small T leaves one key, large T all of them.
#
# ## Masks and soft cap
#
# A masked pair has logit −∞ and so weight 0. In a causal model a token sees itself and those before it, so that it can
# be trained to predict the next. A soft cap, $c \tanh(z / c)$, bounds the logits without a kink, so that no weight can
# be more than $e^{2c}$ times another.

# %%
tokens = random.normal(size=(1, 12, 1, 16)).astype(np.float32) * 2
panels = {
    "everything": {},
    "causal": {"is_causal": True},
    "window of 2": {"is_causal": True, "local_window_size": 2},
    "soft cap 1": {"softcap": 1.0},
}
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
for (name, options), panel in zip(panels.items(), axes, strict=True):
    _, weights = jsoftmax.dot_product_attention(tokens, tokens, tokens, return_weights=True, **options)
    panel.imshow(weights[0, 0], vmin=0, vmax=1, cmap="Blues")
    panel.set(title=name, xlabel="key", xticks=[], yticks=[])
axes[0].set_ylabel("query")
plt.show()
np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
assert (weights.max(axis=-1) / weights.min(axis=-1)).max() < 1.001 * np.exp(2)

# %% [markdown]
# ## A model that learns to spell backwards
#
# The words are Python's own keywords: `lambda` in, `adbmal` out. To know the letter at place t of the answer, the model
# must look at place L − 1 − t of a word of length L. One layer of attention with two heads is enough, and its weights
# show what it does. Padding is masked, by lengths.

# %%
words = sorted({word.lower() for word in keyword.kwlist} | set("abcdefghij"))
LONGEST, WIDTH, HEADS = max(map(len, words)), 32, 2
lengths = np.array([len(word) for word in words], np.int32)


def encode(words):
    """a is 1, z is 26, and 0 is padding."""
    codes = np.zeros((len(words), LONGEST), np.int32)
    for row, word in enumerate(words):
        codes[row, : len(word)] = [ord(letter) - 96 for letter in word.replace("_", "")]
    return codes


inputs, targets = encode(words), encode([word[::-1] for word in words])


def init(seed):
    draw = np.random.default_rng(seed).normal
    shapes = {
        "letters": (27, WIDTH),
        "place": (LONGEST, WIDTH),
        "asked": (LONGEST + 1, LONGEST, WIDTH),  # which place of the answer, of a word of which length
        "to_query": (WIDTH, HEADS, WIDTH // HEADS),
        "to_key": (WIDTH, HEADS, WIDTH // HEADS),
        "to_value": (WIDTH, HEADS, WIDTH // HEADS),
        "kernel": (WIDTH, 27),
    }
    return {name: jnp.asarray(draw(size=shape) * WIDTH**-0.5, jnp.float32) for name, shape in shapes.items()}


def model(params, codes, lengths, **options):
    seen = params["letters"][codes] + params["place"]
    query = jnp.einsum("btd,dnh->btnh", params["asked"][lengths], params["to_query"])
    key = jnp.einsum("btd,dnh->btnh", seen, params["to_key"])
    value = jnp.einsum("btd,dnh->btnh", seen, params["to_value"])
    answer = jsoftmax.dot_product_attention(
        query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, return_weights=True, **options
    )
    return answer[0].reshape(*codes.shape, WIDTH) @ params["kernel"], answer[1]


def loss(params):
    logits, _ = model(params, inputs, lengths)
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, targets, ignore_index=0).sum() / lengths.sum()


optimizer = optax.adam(1e-2)


@jax.jit
def train(params):
    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, optimizer.init(params)), length=600)


(params, _), losses = train(init(0))
logits, weights = model(params, inputs, lengths)
spelled = np.asarray(logits[..., 1:].argmax(axis=-1)) + 1
right = [np.array_equal(row[:n], target[:n]) for row, target, n in zip(spelled, targets, lengths, strict=True)]
print(f"loss {losses[0]:.2f} → {losses[-1]:.4f}; {sum(right)} of {len(words)} words right")
for word in ("lambda", "continue", "yield"):
    row = words.index(word)
    print(word, "→", "".join(chr(96 + code) for code in spelled[row, : len(word)]))
assert sum(right) >= 0.9 * len(words)

# %% [markdown]
# Where it looks. A row is a place of the answer, a column a letter of the word: the weights lie on the other diagonal.
# Padding has weight 0 in every row.

# %%
fig, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained")
for panel, (word, head) in zip(axes, [(w, h) for w in ("lambda", "continue") for h in range(HEADS)], strict=True):
    row, n = words.index(word), len(word)
    panel.imshow(weights[row, head], vmin=0, vmax=1, cmap="Blues")
    panel.set(title=f"{word}, head {head + 1}", xticks=range(n), xticklabels=list(word), yticks=range(n))
    panel.set_yticklabels(list(word[::-1]))
plt.show()
np.testing.assert_array_equal(np.asarray(weights)[words.index("yield"), :, :, 5:], 0)

# %% [markdown]
# ## Attention without the weights
#
# The weights take T² numbers a head. But softmax can be computed in blocks: keep the largest logit so far, the sum of
# the exponentials and the sum of the values, and rescale both when a larger logit turns up.


# %%
def online(q, key, value, block=4):
    largest, total, sums = -np.inf, 0.0, np.zeros(value.shape[-1])
    for start in range(0, len(key), block):
        z = key[start : start + block] @ q / np.sqrt(len(q))
        new = max(largest, z.max())
        old = np.exp(largest - new)
        e = np.exp(z - new)
        total, sums = total * old + e.sum(), sums * old + e @ value[start : start + block]
        largest = new
    return sums / total


q, keys, values = random.normal(size=16), random.normal(size=(30, 16)), random.normal(size=(30, 8))
weights_at_once = np.exp(keys @ q / 4) / np.exp(keys @ q / 4).sum()
np.testing.assert_allclose(online(q, keys, values), weights_at_once @ values, rtol=1e-12)

# %% [markdown]
# The compiler says what both forms need for value and gradients of 8 heads of width 64. Nothing is run here.


# %%
def megabytes(length, implementation):
    shape = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)

    def total(q, k, v):
        return jsoftmax.dot_product_attention(q, k, v, is_causal=True, implementation=implementation).sum()

    program = jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(shape, shape, shape).compile()
    return program.memory_analysis().temp_size_in_bytes / 1e6


sizes = [1024, 4096, 16384]
memory = {name: [megabytes(length, name) for length in sizes] for name in ("plain", "blockwise")}
for name, numbers in memory.items():
    print(f"{name:10}", *(f"{number:10,.0f} MB" for number in numbers))

fig, panel = plt.subplots(figsize=(4.5, 2.8), layout="constrained")
for name, numbers in memory.items():
    panel.plot(sizes, numbers, "o-", label=name)
panel.set(xscale="log", yscale="log", xlabel="length", ylabel="temporary memory, MB")
panel.legend(frameon=False)
plt.show()
assert memory["plain"][2] > 12 * memory["plain"][1]  # quadratic
assert memory["blockwise"][2] < 4.5 * memory["blockwise"][1]  # linear
