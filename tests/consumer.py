"""A program that uses the library as installed: `make check-package` runs it and has pyright check it strictly.

Each kind of public call is here once, with its result annotated by what the documentation says it is.
"""

import jax
from jax import Array

import jsoftmax
from jsoftmax import categorical, ranking, testing

key = jax.random.key(0)
logits = jax.random.normal(key, (4, 6))
labels, one_hot = jax.random.randint(key, (4,), 0, 6), jax.random.bernoulli(key, 0.2, (4, 6)).astype("float32")
features, kernel = logits[:, :3], jax.random.normal(key, (3, 6))

# Activations and statistics.
probabilities: Array = jsoftmax.softmax(logits, axis=-1, where=logits > -9, temperature=2.0)
log_probs: Array = jsoftmax.log_softmax(logits)
total: Array = jsoftmax.logsumexp(logits)
statistics: jsoftmax.SoftmaxStatistics = jsoftmax.softmax_statistics(logits, labels)
entropy: Array = statistics.entropy

# Losses on logits, with options written out and handed on.
losses: Array = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels)
options: jsoftmax.LossOptions = {"label_smoothing": 0.1, "z_loss": 1e-4, "ignore_index": -1}
losses += jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, axis=-1, **options)
losses += jsoftmax.softmax_cross_entropy(logits, one_hot, temperature=2.0, derivative="jvp")
losses += jsoftmax.softmax_focal_loss(logits, labels, gamma=2.0)
losses += jsoftmax.distillation_loss(logits, logits[::-1], divergence="reverse")
losses += jsoftmax.kl_divergence(log_probs, probabilities)
losses += jsoftmax.poly_loss_cross_entropy(logits, one_hot, epsilon=1.0)
losses += jsoftmax.jensen_shannon_divergence(logits, logits[::-1], weight=0.3)
losses += jsoftmax.brier_score(logits, labels)
smooth: Array = jsoftmax.smooth_labels(one_hot, 0.1)
elementwise: Array = jsoftmax.sigmoid_focal_loss(logits, one_hot) + jsoftmax.sigmoid_binary_cross_entropy(
    logits, one_hot
)
logit_options: jsoftmax.LogitOptions = {"temperature": 2.0, "softcap": 30.0}
support_options: jsoftmax.SupportOptions = {"top_k": 3, "top_p": 0.9}
losses += jsoftmax.softmax_statistics(logits, labels, **support_options).entropy
distillation_options: jsoftmax.DistillationOptions = {"temperature": 2.0, "divergence": "jensen_shannon"}
losses += jsoftmax.distillation_loss(logits, logits[::-1], **distillation_options)
weights: Array = jsoftmax.class_balanced_weights(labels + 1)


def mean_loss(logits: Array) -> Array:
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels, temperature=2.0).mean()


# JAX's own types leave open what they give.
gradient: Array = jax.jit(jax.grad(mean_loss))(logits)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

# From features and kernel, a block of rows at a time.
mean: Array = jsoftmax.linear_softmax_cross_entropy(features, kernel, labels)
mean, rows = jsoftmax.linear_softmax_cross_entropy(features, kernel, labels, return_statistics=True, skip_rows=True)
entropy = rows.entropy
evaluation: jsoftmax.Evaluation = jsoftmax.linear_evaluation(features, kernel, labels)
teacher: Array = jsoftmax.linear_distillation_loss(features, kernel, features, kernel)
stored: tuple[Array, Array] = jsoftmax.linear_top_k(features, kernel, 2, **logit_options)
losses += jsoftmax.top_k_distillation_loss(logits, *stored)
teacher += jsoftmax.linear_top_k_distillation_loss(features, kernel, *stored, block_size=2)
losses += jsoftmax.linear_softmax_statistics(features, kernel, labels, active=labels > 0).log_prob
contrastive_options: jsoftmax.ContrastiveOptions = {"temperature": 0.5}
pairs: Array = jsoftmax.contrastive_loss(features, features, **contrastive_options)
pairs += jsoftmax.sigmoid_contrastive_loss(features, features, bias=-1.0)
size: int = jsoftmax.default_block_size(6, features.dtype)


def block_loss(params: dict[str, Array], rows: dict[str, Array]) -> Array:
    return jsoftmax.softmax_cross_entropy_with_integer_labels(rows["features"] @ params["kernel"], rows["labels"])


blockwise = jsoftmax.blockwise(block_loss, block_size=2)
losses += blockwise({"kernel": kernel}, {"features": features, "labels": labels})

# Large vocabularies.
sampler: jsoftmax.Sampler = jsoftmax.log_uniform_sampler(6)
sampled: Array = jsoftmax.sampled_softmax_cross_entropy(features, kernel, labels, key, num_sampled=2, sampler=sampler)
sampled_options: jsoftmax.SampledLossOptions = {"ignore_index": -1}
samplers = (jsoftmax.uniform_sampler(6), jsoftmax.unigram_sampler(labels + 1.0))
sample: jsoftmax.Sample = jsoftmax.uniform_sampler(6).sample(key, 2)
touched: Array = jsoftmax.touched_classes(labels, sample)
sampled += jsoftmax.in_batch_softmax_cross_entropy(features, features, **sampled_options)
sampled += jsoftmax.candidate_softmax_cross_entropy(features, kernel, labels, touched[:3] + 0 * labels[:, None])
tree: jsoftmax.ClassTree = jsoftmax.huffman_tree([5, 3, 2, 2, 1, 1])
losses += jsoftmax.hierarchical_softmax_cross_entropy(features, kernel[:, :5], labels, tree)
top: jsoftmax.TopClasses = jsoftmax.hierarchical_top_k(features, kernel[:, :5], tree, 2)
every: Array = jsoftmax.hierarchical_log_softmax(features, kernel[:, :3], jsoftmax.nested_tree([[0, 1], [2, 3]]))
every += jsoftmax.hierarchical_log_softmax(features, kernel[:, :3], jsoftmax.parent_tree([4, 4, 5, 5, 6, 6, -1], 4))
adaptive = jsoftmax.AdaptiveSoftmax(3, 6, (2,))
losses += adaptive.cross_entropy(adaptive.init(key), features, labels)

# Policies, attention, calibration, ranks, tools.
actions: Array = categorical.sample(key, logits, top_p=0.9)
policy: Array = categorical.log_prob(logits, actions)
policy_options: jsoftmax.PolicyOptions = {"reduction": "sum"}
ratio_options: jsoftmax.RatioOptions = {"clip": 0.2}
mean += jsoftmax.policy_gradient_loss(policy, entropy, **policy_options)
mean += jsoftmax.clipped_policy_loss(policy, policy, jsoftmax.group_advantages(entropy), **ratio_options)
mean += jsoftmax.group_relative_policy_loss(log_probs[None], log_probs[None], entropy[None])
mean += jsoftmax.preference_loss(policy, policy - 1, policy, policy, beta=0.2)
mean += jsoftmax.unpaired_preference_loss(policy, policy, labels > 2)
sequences: Array = jsoftmax.sequence_log_prob(log_probs, average=True)
attended: Array | tuple[Array, Array] = jsoftmax.dot_product_attention(
    *(jax.random.normal(key, (1, 3, 2, 4)),) * 3, is_causal=True
)
calibration: jsoftmax.Calibration = jsoftmax.fit_temperature(logits, labels)
calibrated: Array = calibration.apply(logits)
bins: jsoftmax.ReliabilityBins = jsoftmax.reliability_bins(logits, labels)
calibration_options: jsoftmax.CalibrationOptions = {"bins": 3}
error: Array = jsoftmax.expected_calibration_error(logits, labels, **calibration_options)
error += jsoftmax.adaptive_calibration_error(logits, labels)
error += jsoftmax.classwise_calibration_error(logits, labels)
ranks: Array = ranking.ranks(logits, labels)
report: testing.GradientReport = testing.check_gradients(jsoftmax.softmax_focal_loss, logits, labels)

print(f"{float(losses.sum() + mean + teacher + pairs + sampled.sum()):.6g}")
