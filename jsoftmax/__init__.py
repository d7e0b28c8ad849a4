"""Softmax and its losses for JAX: right to the last digits, light in memory, in every derivative mode."""

from jsoftmax import categorical as categorical, ranking as ranking
from jsoftmax._attention.attention import dot_product_attention as dot_product_attention
from jsoftmax._blocks.blockwise import blockwise as blockwise
from jsoftmax._blocks.contrast import (
    ContrastiveOptions as ContrastiveOptions,
    contrastive_loss as contrastive_loss,
    sigmoid_contrastive_loss as sigmoid_contrastive_loss,
)
from jsoftmax._blocks.distillation import (
    linear_distillation_loss as linear_distillation_loss,
    linear_top_k_distillation_loss as linear_top_k_distillation_loss,
)
from jsoftmax._blocks.evaluation import Evaluation as Evaluation, linear_evaluation as linear_evaluation
from jsoftmax._blocks.head import default_block_size as default_block_size
from jsoftmax._blocks.linear import (
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
    linear_softmax_statistics as linear_softmax_statistics,
)
from jsoftmax._blocks.top_k import linear_top_k as linear_top_k
from jsoftmax._calibration.brier_score import brier_score as brier_score
from jsoftmax._calibration.errors import (
    CalibrationOptions as CalibrationOptions,
    adaptive_calibration_error as adaptive_calibration_error,
    classwise_calibration_error as classwise_calibration_error,
    expected_calibration_error as expected_calibration_error,
)
from jsoftmax._calibration.reliability import ReliabilityBins as ReliabilityBins, reliability_bins as reliability_bins
from jsoftmax._calibration.temperature import Calibration as Calibration, fit_temperature as fit_temperature
from jsoftmax._losses.activations import log_softmax as log_softmax, logsumexp as logsumexp, softmax as softmax
from jsoftmax._losses.cross_entropy import (
    poly_loss_cross_entropy as poly_loss_cross_entropy,
    softmax_cross_entropy as softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
    softmax_focal_loss as softmax_focal_loss,
)
from jsoftmax._losses.distillation import (
    DistillationOptions as DistillationOptions,
    distillation_loss as distillation_loss,
    jensen_shannon_divergence as jensen_shannon_divergence,
    top_k_distillation_loss as top_k_distillation_loss,
)
from jsoftmax._losses.distributions import (
    kl_divergence as kl_divergence,
    smooth_labels as smooth_labels,
)
from jsoftmax._losses.long_tails import class_balanced_weights as class_balanced_weights
from jsoftmax._losses.row_losses import LossOptions as LossOptions
from jsoftmax._losses.sigmoid import (
    sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy,
    sigmoid_focal_loss as sigmoid_focal_loss,
)
from jsoftmax._losses.statistics import SoftmaxStatistics as SoftmaxStatistics, softmax_statistics as softmax_statistics
from jsoftmax._policies.group_relative import (
    group_advantages as group_advantages,
    group_relative_policy_loss as group_relative_policy_loss,
)
from jsoftmax._policies.options import PolicyOptions as PolicyOptions, RatioOptions as RatioOptions
from jsoftmax._policies.policy_gradient import (
    clipped_policy_loss as clipped_policy_loss,
    policy_gradient_loss as policy_gradient_loss,
)
from jsoftmax._policies.preferences import (
    preference_loss as preference_loss,
    unpaired_preference_loss as unpaired_preference_loss,
)
from jsoftmax._policies.sequences import sequence_log_prob as sequence_log_prob
from jsoftmax._rows.options import LogitOptions as LogitOptions, SupportOptions as SupportOptions
from jsoftmax._vocabularies.adaptive import AdaptiveSoftmax as AdaptiveSoftmax
from jsoftmax._vocabularies.candidate_logits import touched_classes as touched_classes
from jsoftmax._vocabularies.candidates import candidate_softmax_cross_entropy as candidate_softmax_cross_entropy
from jsoftmax._vocabularies.drawing import Sample as Sample, Sampler as Sampler
from jsoftmax._vocabularies.hierarchical import (
    TopClasses as TopClasses,
    hierarchical_log_softmax as hierarchical_log_softmax,
    hierarchical_softmax_cross_entropy as hierarchical_softmax_cross_entropy,
    hierarchical_top_k as hierarchical_top_k,
)
from jsoftmax._vocabularies.in_batch import in_batch_softmax_cross_entropy as in_batch_softmax_cross_entropy
from jsoftmax._vocabularies.sampled import (
    SampledLossOptions as SampledLossOptions,
    sampled_softmax_cross_entropy as sampled_softmax_cross_entropy,
)
from jsoftmax._vocabularies.samplers import (
    log_uniform_sampler as log_uniform_sampler,
    uniform_sampler as uniform_sampler,
    unigram_sampler as unigram_sampler,
)
from jsoftmax._vocabularies.trees import (
    ClassTree as ClassTree,
    huffman_tree as huffman_tree,
    nested_tree as nested_tree,
    parent_tree as parent_tree,
)

__version__ = "0.1.0"
