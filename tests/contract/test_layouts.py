"""Every public function in every layout gives what one device gives.

A table of functions and one of layouts; each pair is a cell, in which the results and their gradients are compared.
The short form traces most of its cells, which finds what raises, and
compares values in some; with JSOFTMAX_LAYOUTS=all in the environment, every cell is compared by values.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from scipy.special import softmax

import jsoftmax
from jsoftmax import categorical, ranking

ROWS, CLASSES, FEATURES = 8, 12, 4
# What a dimension holds (rows, one thing for each device's rows, classes, neither), and the axis that may split it.
AXES = {"n": "data", "p": "data", "v": "model", ".": None}


def normal(number, *shape):
    return np.random.default_rng(number).normal(size=shape).astype(np.float32)


def spread(low, high, size):
    return np.linspace(low, high, size, dtype=np.float32)


LABELS = np.array([0, 11, 5, 6, 3, 3, 8, 1])
TREE = jsoftmax.huffman_tree(np.arange(CLASSES) + 1.0)
ADAPTIVE = jsoftmax.AdaptiveSoftmax(FEATURES, CLASSES, (3, 7))
SAMPLER = jsoftmax.log_uniform_sampler(CLASSES)

# Each array, and what its dimensions hold: rows, classes or neither.
_ARRAYS: dict[str, tuple[str, Any]] = {
    "logits": ("nv", 2 * normal(0, ROWS, CLASSES)),
    "others": ("nv", 2 * normal(1, ROWS, CLASSES)),
    "targets": ("nv", softmax(normal(2, ROWS, CLASSES), axis=-1)),
    "labels": ("n", LABELS),
    "where": ("nv", (normal(3, ROWS, CLASSES) > -1) | (np.arange(CLASSES) == LABELS[:, None])),
    "features": ("n.", normal(4, ROWS, FEATURES)),
    "items": ("n.", normal(5, ROWS, FEATURES)),
    "kernel": (".v", normal(6, FEATURES, CLASSES)),
    "bias": ("v", normal(7, CLASSES)),
    "decisions": ("..", normal(8, FEATURES, CLASSES - 1)),
    "weights": ("n", spread(0.5, 1.5, ROWS) * (np.arange(ROWS) != 2)),
    "temperature": ("n", spread(0.5, 2.0, ROWS)),
    "label_smoothing": ("n", spread(0.0, 0.3, ROWS)),
    "z_loss": ("", jnp.float32(0.01)),
    "softcap": ("", jnp.float32(5.0)),
    "class_weights": ("v", spread(0.5, 2.0, CLASSES)),
    "class_mask": ("v", np.arange(CLASSES) != 9),
    "ids": ("n.", np.array([[0, 1, 2], [3, 4, 5], [9, 2, 1], [7, 8, 0]] * 2)),
    "log_probs": ("n.", np.full((ROWS, 3), -math.log(4), np.float32)),
    "tokens": ("n..", -np.abs(normal(9, ROWS, 2, 3))),
    "old_tokens": ("n..", -np.abs(normal(10, ROWS, 2, 3))),
    "rewards": ("n.", normal(11, ROWS, 2)),
    "packed": ("n.", -np.abs(normal(9, ROWS, 6))),
    "old_packed": ("n.", -np.abs(normal(10, ROWS, 6))),
    "segment_ids": ("n.", np.array([[0, 0, 0, 1, 1, 1], [1, 0, 1, 1, 2, -1]] * 4)),
    "desirable": ("n", np.arange(ROWS) % 3 == 0),
    "query": ("n...", normal(12, ROWS, 5, 2, 3)),
    "keys": ("n...", normal(13, ROWS, 5, 1, 3)),
    "values": ("n...", normal(14, ROWS, 5, 1, 3)),
    "key": ("", jax.random.key(15)),
    "part_keys": ("p", jax.random.split(jax.random.key(18), 2)),  # one for each part of the rows
    "adaptive": ("", ADAPTIVE.init(jax.random.key(16))),
    "tree": ("", TREE),
    "table": ("..", normal(17, FEATURES, CLASSES)),  # a kernel that no layout splits
    "other_table": ("..", normal(19, FEATURES, CLASSES)),
}
ARRAYS = {name: (dimensions, jax.tree.map(jnp.asarray, array)) for name, (dimensions, array) in _ARRAYS.items()}
OPTIONS = ("temperature", "softcap", "label_smoothing", "z_loss", "class_weights")
LOGIT_OPTIONS = ("temperature", "softcap")


@dataclasses.dataclass(frozen=True)
class Case:
    """`call(arrays, **split)`; each result has dimensions as `out` says. `split` is an axis_name or nothing."""

    call: Callable
    takes: str
    out: str = "n"
    splits_classes: bool = False
    differentiable: bool = True
    tolerance: float = 1e-5

    @property
    def names(self):
        return self.takes.split()


def chosen(p, names=OPTIONS, **more):
    return {name: p[name] for name in names} | more


def on_logits(function, *arguments, **options):
    """A loss by default, and with everything that it takes."""
    plain = " ".join(("logits", *arguments))

    def by_default(p, **split):
        return function(*(p[name] for name in plain.split()), **options, **split)

    def with_options(p, **split):
        return function(*(p[name] for name in plain.split()), where=p["where"], **chosen(p), **options, **split)

    def every_mode(p, **split):
        return function(*(p[name] for name in plain.split()), derivative="jvp", **chosen(p), **options, **split)

    name = function.__name__
    return {
        name: Case(by_default, plain, "n", True),
        f"{name}, options": Case(with_options, f"{plain} where {' '.join(OPTIONS)}", "n", True),
        f"{name}, jvp": Case(every_mode, f"{plain} {' '.join(OPTIONS)}", "n", True),
    }


def masked(p, **split):
    loss, smoothed = jsoftmax.softmax_cross_entropy_with_integer_labels, p["label_smoothing"]
    return loss(
        p["logits"],
        p["labels"],
        where=p["where"],
        label_smoothing=smoothed,
        smoothing="others",
        ignore_index=3,
        **split,
    )


def activation(function, out):
    def with_options(p, **split):
        return function(p["logits"], where=p["where"], temperature=p["temperature"], **split)

    return {
        function.__name__: Case(lambda p, **split: function(p["logits"], **split), "logits", out, True),
        f"{function.__name__}, options": Case(with_options, "logits where temperature", out, True),
    }


def with_margins(p, **split):
    options = {"margin": p["label_smoothing"], "angular_margin": 0.3, "logit_adjustment": p["class_weights"]}
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels
    linear = jsoftmax.linear_softmax_cross_entropy(
        *(p["features"] / 8, p["kernel"], p["labels"]), **dict(reduction="none", block_size=3, **options, **split)
    )
    return linear + loss(p["logits"] / 8, p["labels"], where=p["where"], **options, **split)


def pairs_of(loss, reduction, **options):
    def call(p):
        given = {"reduction": reduction, "block_size": 3, "temperature": p["z_loss"] * 50} | options
        return loss(p["features"], p["items"], item_ids=p["labels"], weights=p["weights"], **given)

    return Case(call, "features items labels weights z_loss", "n" if reduction == "none" else "")


def to_itself(p):
    return jsoftmax.contrastive_loss(p["features"], labels=p["labels"] // 6, block_size=3)


def linear(reduction):
    def call(p, options=(), **more):
        given = chosen(p, options)
        arguments = (p["features"], p["kernel"], p["labels"])
        return jsoftmax.linear_softmax_cross_entropy(*arguments, reduction=reduction, block_size=3, **given, **more)

    def weighted(p, **split):
        return call(p, ("weights", "bias"), ignore_index=3, where=p["class_mask"], **split)

    def with_options(p, **split):
        return call(p, ("weights", "bias", *OPTIONS), **split)

    def in_every_mode(p, **split):
        return call(p, ("weights",), derivative="jvp", **split)

    out, name = "n" if reduction == "none" else "", f"linear_softmax_cross_entropy, {reduction}"
    takes = "features kernel labels"
    return {
        name: Case(call, takes, out, True),
        f"{name}, weights": Case(weighted, f"{takes} weights bias class_mask", out, True),
        f"{name}, options": Case(with_options, f"{takes} weights bias {' '.join(OPTIONS)}", out, True),
        f"{name}, jvp": Case(
            lambda p, **s: call(p, ("weights",), derivative="jvp", **s), f"{takes} weights", out, True
        ),
    }


def linear_by_default(p, **split):
    return jsoftmax.linear_softmax_cross_entropy(p["features"], p["kernel"], p["labels"], **split)


def skipping(p, **split):
    """Rows of weight 0 are left out of the products, and statistics come beside the loss."""
    loss, statistics = jsoftmax.linear_softmax_cross_entropy(
        p["features"],
        p["kernel"],
        p["labels"],
        weights=p["weights"],
        skip_rows=True,
        return_statistics=True,
        block_size=3,
        **split,
    )
    active = jsoftmax.linear_softmax_statistics(
        p["features"], p["kernel"], p["labels"], active=p["weights"] != 0, block_size=3, **split
    )
    return loss + statistics.entropy.sum() + active.log_prob.sum()


def built_inside(p, **split):
    """Nothing of what has one entry a row comes from outside but the features."""
    rows = p["features"].shape[0]
    options = {"weights": jnp.ones(rows), "temperature": jnp.full(rows, 2.0), "z_loss": jnp.float32(0.1)}
    options["label_smoothing"] = jnp.full(rows, 0.1)
    labels = jnp.arange(rows)
    total = jsoftmax.linear_softmax_cross_entropy(p["features"], p["kernel"], labels, block_size=3, **options, **split)
    statistics = jsoftmax.linear_softmax_statistics(p["features"], p["kernel"], labels, block_size=3, **split)
    return total + statistics.entropy.sum()


def losses_built_inside(p, **split):
    rows = p["logits"].shape[0]
    options = {"temperature": jnp.full(rows, 2.0), "softcap": jnp.float32(9.0), "label_smoothing": jnp.full(rows, 0.1)}
    loss = jsoftmax.softmax_cross_entropy_with_integer_labels
    return loss(p["logits"], jnp.arange(rows), class_weights=jnp.ones(p["logits"].shape[1]), **options, **split)


def row_loss(params, rows):
    logits = rows["features"] @ params["table"]
    return jsoftmax.softmax_cross_entropy_with_integer_labels(logits, rows["labels"]) * rows["weights"]


def in_blocks(loss, weights="given", derivative="vjp"):
    function = jsoftmax.blockwise(loss, block_size=3, derivative=derivative)

    def call(p):
        weights_of = p["weights"] if weights == "given" else jnp.ones(p["labels"].shape)
        rows = {"features": p["features"], "labels": p["labels"], "weights": weights_of}
        return function({"table": p["table"]}, rows)

    return call


def sampled(p, **more):
    arguments = (p["features"], p["table"], p["labels"], p["part_keys"][0])
    return jsoftmax.sampled_softmax_cross_entropy(*arguments, num_sampled=5, **more)


def draws(p):
    sample = SAMPLER.sample(p["key"], 5)
    touched = jsoftmax.touched_classes(p["labels"], sample)
    return SAMPLER.log_expected_count(p["labels"], sample), jnp.sum(touched) + jnp.sum(sample.others) * jnp.ones_like(
        p["labels"]
    )


def attention(**options):
    def call(p):
        return jsoftmax.dot_product_attention(p["query"], p["keys"], p["values"], **options)

    return Case(call, "query keys values", "n...")


def policy(function, *arguments, **options):
    def call(p):
        return function(*(p[name] for name in arguments), **options)

    return call


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def statistics_of(p, **more):
    return jsoftmax.softmax_statistics(p["logits"], p["labels"], **more)


def linear_statistics(p, **more):
    return jsoftmax.linear_softmax_statistics(p["features"], p["kernel"], p["labels"], block_size=3, **more)


def evaluated(p, **more):
    arrays = (p[name] for name in ("features", "kernel", "labels"))
    found = jsoftmax.linear_evaluation(*arrays, weights=p["weights"], block_size=3, **more)
    return found, found.loss


def drawn_from(statistics, names):
    """Statistics of filtered distributions; where a label was left out, its log-probability is −∞ and moves nothing."""

    def call(p, **split):
        options = chosen(p, names, top_k=7, top_p=0.9, min_p=0.02)
        found = [statistics(p, **options, **split), statistics(p, support=p["ids"], **split)]
        return [s._replace(log_prob=jnp.maximum(s.log_prob, -99)) for s in found]

    return call


def two_heads(p, **more):
    heads = (p[name] for name in ("features", "table", "items", "other_table"))
    return jsoftmax.linear_distillation_loss(*heads, block_size=3, **more)


def calibration(p):
    fit = jsoftmax.fit_temperature(p["logits"], p["labels"], weights=p["weights"])
    return fit.temperature, fit.apply(p["logits"]).sum()


def bins(function, out="", **options):
    return Case(lambda p: function(p["logits"], p["labels"], weights=p["weights"], bins=3, **options), BIN_INPUTS, out)


BIN_INPUTS = "logits labels weights"
KEYED = {"differentiable": False}
CASES: dict[str, Case] = {
    **activation(jsoftmax.softmax, "nv"),
    **activation(jsoftmax.log_softmax, "nv"),
    **activation(jsoftmax.logsumexp, "n"),
    **on_logits(jsoftmax.softmax_cross_entropy_with_integer_labels, "labels"),
    **on_logits(jsoftmax.softmax_cross_entropy, "targets"),
    "cross_entropy, masks": Case(masked, "logits labels where label_smoothing", "n", True),
    **on_logits(jsoftmax.softmax_focal_loss, "labels"),
    "softmax_focal_loss, dense": Case(
        lambda p, **s: jsoftmax.softmax_focal_loss(p["logits"], p["targets"], **s), "logits targets", "n", True
    ),
    **on_logits(jsoftmax.poly_loss_cross_entropy, "targets"),
    "losses, built inside": Case(losses_built_inside, "logits", "n", True),
    "softmax_statistics": Case(statistics_of, "logits labels", "n", True),
    "softmax_statistics, jvp": Case(
        lambda p, **s: statistics_of(p, derivative="jvp", **chosen(p, LOGIT_OPTIONS), **s),
        "logits labels temperature softcap",
        "n",
        True,
    ),
    "softmax_statistics, support": Case(
        drawn_from(statistics_of, LOGIT_OPTIONS), "logits labels temperature softcap ids", "n", True
    ),
    "sigmoid_binary_cross_entropy": Case(
        lambda p: jsoftmax.sigmoid_binary_cross_entropy(p["logits"], p["targets"]), "logits targets", "nv"
    ),
    "sigmoid_focal_loss": Case(
        lambda p: jsoftmax.sigmoid_focal_loss(p["logits"], p["targets"], alpha=p["z_loss"]),
        "logits targets z_loss",
        "nv",
    ),
    "kl_divergence": Case(
        lambda p, **s: jsoftmax.kl_divergence(p["others"], p["targets"], **s), "others targets", "n", True
    ),
    "smooth_labels": Case(
        lambda p, **s: jsoftmax.smooth_labels(p["targets"], p["z_loss"], **s), "targets z_loss", "nv", True
    ),
    "cross_entropy, margins": Case(
        with_margins, "logits labels where features kernel label_smoothing class_weights", "n", True
    ),
    "class_balanced_weights": Case(lambda p: jsoftmax.class_balanced_weights(p["labels"]), "labels", **KEYED),
    "contrastive_loss": Case(lambda p: jsoftmax.contrastive_loss(p["features"], p["items"]), "features items", ""),
    "contrastive_loss, options": pairs_of(jsoftmax.contrastive_loss, "none", label_smoothing=0.1, z_loss=0.01),
    "contrastive_loss, jvp": pairs_of(jsoftmax.contrastive_loss, "mean", derivative="jvp"),
    "contrastive_loss, to itself": Case(to_itself, "features labels", ""),
    "sigmoid_contrastive_loss": pairs_of(jsoftmax.sigmoid_contrastive_loss, "mean", bias=-1.0),
    "ranking.ranks": Case(
        lambda p, **s: ranking.ranks(p["logits"], p["labels"], where=p["where"], exclude=p["ids"], **s),
        "logits labels where ids",
        "n",
        True,
        False,
    ),
    "ranking.linear_ranks": Case(
        lambda p, **s: ranking.linear_ranks(p["features"], p["kernel"], p["labels"], block_size=3, **s),
        "features kernel labels",
        "n",
        True,
        False,
    ),
    "ranking.hits": Case(lambda p: ranking.hits(p["temperature"], 1), "temperature", **KEYED),
    "ranking.reciprocal_rank": Case(lambda p: ranking.reciprocal_rank(p["temperature"]), "temperature", **KEYED),
    "ranking.ndcg": Case(lambda p: ranking.ndcg(p["temperature"], 1), "temperature", **KEYED),
    **linear("mean"),
    **linear("sum"),
    **linear("none"),
    "linear_softmax_cross_entropy": Case(linear_by_default, "features kernel labels", "", True),
    "linear_softmax_cross_entropy, skip_rows": Case(skipping, "features kernel labels weights", "", True),
    "linear, built inside": Case(built_inside, "features kernel", "", True),
    "linear_softmax_statistics": Case(linear_statistics, "features kernel labels", "n", True),
    "linear_evaluation": Case(evaluated, "features kernel labels weights", "", True),
    "linear_softmax_statistics, jvp": Case(
        lambda p, **s: linear_statistics(p, derivative="jvp", **chosen(p, LOGIT_OPTIONS), **s),
        "features kernel labels temperature softcap",
        "n",
        True,
    ),
    "linear_softmax_statistics, support": Case(
        drawn_from(linear_statistics, ("temperature",)), "features kernel labels temperature ids", "n", True
    ),
    "blockwise, rows": Case(in_blocks(row_loss), "features table labels weights"),
    "blockwise, sum": Case(in_blocks(lambda p, r: row_loss(p, r).sum()), "features table labels weights", ""),
    "blockwise, built inside": Case(in_blocks(lambda p, r: row_loss(p, r).sum(), ""), "features table labels", ""),
    "blockwise, jvp": Case(in_blocks(row_loss, derivative="jvp"), "features table labels weights"),
    "distillation_loss": Case(
        lambda p: jsoftmax.distillation_loss(p["logits"], p["others"], p["labels"], temperature=p["temperature"]),
        "logits others labels temperature",
    ),
    "top_k_distillation_loss": Case(
        lambda p: jsoftmax.top_k_distillation_loss(p["logits"], p["log_probs"], p["ids"]), "logits log_probs ids"
    ),
    "distillation_loss, mixture": Case(
        lambda p: jsoftmax.distillation_loss(p["logits"], p["others"], divergence="jensen_shannon"), "logits others"
    ),
    "linear_distillation_loss": Case(two_heads, "features table items other_table", ""),
    "linear_distillation_loss, options": Case(
        lambda p: two_heads(
            p,
            weights=p["weights"],
            labels=p["labels"],
            temperature=p["temperature"],
            divergence="reverse",
            reduction="none",
        ),
        "features table items other_table weights labels temperature",
    ),
    "linear_top_k_distillation_loss": Case(
        lambda p: jsoftmax.linear_top_k_distillation_loss(
            p["features"], p["table"], p["log_probs"], p["ids"], weights=p["weights"], reduction="sum", block_size=3
        ),
        "features table log_probs ids weights",
        "",
    ),
    "linear_top_k": Case(
        lambda p, **s: jsoftmax.linear_top_k(p["features"], p["kernel"], 7, block_size=3, **s)[0],
        "features kernel",
        "n.",
        True,
        **KEYED,
    ),
    "jensen_shannon_divergence": Case(
        lambda p: jsoftmax.jensen_shannon_divergence(p["logits"], p["others"], temperature=p["temperature"]),
        "logits others temperature",
    ),
    "brier_score": Case(lambda p: jsoftmax.brier_score(p["logits"], p["labels"]), "logits labels"),
    "fit_temperature": Case(calibration, "logits labels weights", "", tolerance=1e-3),
    "reliability_bins": bins(lambda *a, **o: flat(jsoftmax.reliability_bins(*a, **o)), out="."),
    "expected_calibration_error": bins(jsoftmax.expected_calibration_error),
    "adaptive_calibration_error": bins(jsoftmax.adaptive_calibration_error),
    "classwise_calibration_error": bins(jsoftmax.classwise_calibration_error),
    "categorical.log_prob": Case(
        lambda p: categorical.log_prob(p["logits"], p["labels"], temperature=p["temperature"]),
        "logits labels temperature",
    ),
    "categorical.entropy": Case(lambda p: categorical.entropy(p["logits"]), "logits"),
    "categorical.kl_divergence": Case(lambda p: categorical.kl_divergence(p["logits"], p["others"]), "logits others"),
    "categorical.filter_classes": Case(
        lambda p: categorical.filter_classes(p["logits"], top_k=5, top_p=0.9), "logits", "nv", **KEYED
    ),
    "categorical.sample": Case(
        lambda p: categorical.sample(p["part_keys"][0], p["logits"], top_k=5, top_p=0.9, min_p=0.01),
        "logits part_keys",
        **KEYED,
    ),
    "categorical.sample_without_replacement": Case(
        lambda p: categorical.sample_without_replacement(p["key"], p["logits"], 3), "logits key", "n.", **KEYED
    ),
    "policy_gradient_loss": Case(
        policy(jsoftmax.policy_gradient_loss, "tokens", "old_tokens"), "tokens old_tokens", ""
    ),
    "clipped_policy_loss": Case(
        policy(jsoftmax.clipped_policy_loss, "tokens", "old_tokens", "tokens", reduction="none"),
        "tokens old_tokens",
        "n..",
    ),
    "group_advantages": Case(policy(jsoftmax.group_advantages, "rewards"), "rewards", "n."),
    "group_relative_policy_loss": Case(
        policy(jsoftmax.group_relative_policy_loss, "tokens", "old_tokens", "rewards"), "tokens old_tokens rewards", ""
    ),
    "group_relative_policy_loss, packed": Case(
        lambda p: jsoftmax.group_relative_policy_loss(
            p["packed"],
            p["old_packed"],
            p["rewards"],
            segment_ids=p["segment_ids"],
            importance="sequence",
            reference_policy=p["old_packed"],
            kl_penalty=p["z_loss"],
            sampler_policy=p["old_packed"],
            denominator=8.0,
        ),
        "packed old_packed rewards segment_ids z_loss",
        "",
    ),
    "sequence_log_prob": Case(policy(jsoftmax.sequence_log_prob, "tokens"), "tokens", "n."),
    "sequence_log_prob, packed": Case(
        lambda p: jsoftmax.sequence_log_prob(p["packed"], segment_ids=p["segment_ids"], num_segments=2, average=True),
        "packed segment_ids",
        "n.",
    ),
    "preference_loss": Case(
        policy(jsoftmax.preference_loss, "weights", "temperature", "label_smoothing", "temperature"),
        "weights temperature label_smoothing",
        "",
    ),
    "unpaired_preference_loss": Case(
        policy(
            jsoftmax.unpaired_preference_loss, "weights", "temperature", "desirable", baseline=0.5, reduction="none"
        ),
        "weights temperature desirable",
    ),
    "dot_product_attention": attention(),
    "dot_product_attention, causal": attention(is_causal=True, local_window_size=2),
    "dot_product_attention, blockwise": attention(implementation="blockwise", block_size=2, is_causal=True),
    "dot_product_attention, blockwise, jvp": attention(
        implementation="blockwise", block_size=2, is_causal=True, derivative="jvp"
    ),
    "sampled_softmax_cross_entropy": Case(sampled, "features table labels part_keys"),
    "sampled_softmax_cross_entropy, options": Case(
        lambda p: sampled(p, **chosen(p, (*LOGIT_OPTIONS, "z_loss")), derivative="jvp"),
        "features table labels part_keys temperature softcap z_loss",
    ),
    "Sampler": Case(draws, "labels key", "n", **KEYED),
    "candidate_softmax_cross_entropy": Case(
        lambda p: jsoftmax.candidate_softmax_cross_entropy(
            *(p["features"], p["table"], p["labels"], p["ids"]), log_q=p["log_probs"], temperature=p["temperature"]
        ),
        "features table labels ids log_probs temperature",
    ),
    "in_batch_softmax_cross_entropy": Case(
        lambda p: jsoftmax.in_batch_softmax_cross_entropy(p["features"], p["items"], temperature=p["temperature"]),
        "features items temperature",
    ),
    "AdaptiveSoftmax.cross_entropy": Case(
        lambda p: ADAPTIVE.cross_entropy(p["adaptive"], p["features"], p["labels"], capacity=2),
        "adaptive features labels",
    ),
    "AdaptiveSoftmax.cross_entropy, jvp": Case(
        lambda p: ADAPTIVE.cross_entropy(p["adaptive"], p["features"], p["labels"], derivative="jvp"),
        "adaptive features labels",
    ),
    "AdaptiveSoftmax.log_prob": Case(
        lambda p: ADAPTIVE.log_prob(p["adaptive"], p["features"]), "adaptive features", "n."
    ),
    "AdaptiveSoftmax.predict": Case(
        lambda p: ADAPTIVE.predict(p["adaptive"], p["features"], capacity=2), "adaptive features", **KEYED
    ),
    "hierarchical_softmax_cross_entropy": Case(
        lambda p: jsoftmax.hierarchical_softmax_cross_entropy(p["features"], p["decisions"], p["labels"], p["tree"]),
        "features decisions labels tree",
    ),
    "hierarchical_log_softmax": Case(
        lambda p: jsoftmax.hierarchical_log_softmax(p["features"], p["decisions"], p["tree"]),
        "features decisions tree",
        "n.",
    ),
    "hierarchical_top_k": Case(
        lambda p: jsoftmax.hierarchical_top_k(p["features"], p["decisions"], p["tree"], 2).log_prob,
        "features decisions tree",
        "n.",
        **KEYED,
    ),
}


def is_float(tree):
    return all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(tree))


def inputs(case):
    """The arrays that can be differentiated, and the others."""
    given = {name: ARRAYS[name][1] for name in case.names}
    floats = {name: array for name, array in given.items() if is_float(array) and case.differentiable}
    return floats, {name: array for name, array in given.items() if name not in floats}


def total(case, results, axis_name):
    """A sum in which no two entries count alike; the class axis is this device's part of it."""
    parts = []
    for leaf in jax.tree.leaves(results):
        weights = jnp.ones(())
        for number, (kind, size) in enumerate(zip(case.out, leaf.shape, strict=True)):
            first = jax.lax.axis_index(axis_name) * size if kind == "v" and axis_name else 0
            along = jnp.cos(1 + number + first + jnp.arange(size)).astype(jnp.float32)
            weights = weights[..., None] * jnp.expand_dims(along, range(number))
        part = jnp.sum(leaf.astype(jnp.float32) * weights)
        parts.append(jax.lax.psum(part, axis_name) if "v" in case.out and axis_name else part)
    return functools.reduce(jnp.add, parts)


def evaluation(case, axis_name=None):
    """(floats, rest) to the total and the results."""
    split = {"axis_name": axis_name} if axis_name else {}

    def evaluate(floats, rest):
        results = case.call({**floats, **rest}, **split)
        return (total(case, results, axis_name) if case.differentiable else jnp.zeros(())), results

    return evaluate


def with_gradients(case, evaluate):
    """(floats, rest) to the results and the gradients of the total."""

    def both(floats, rest):
        if not case.differentiable:
            return evaluate(floats, rest)[1], {}
        (_, results), gradients = jax.value_and_grad(evaluate, has_aux=True)(floats, rest)
        return results, gradients

    return both


MESH_SHAPE = (2, 2)


def mesh_of(kind):
    return jax.make_mesh(MESH_SHAPE, (AXES["n"], AXES["v"]), axis_types=(kind,) * 2)


def spec_of(dims, splits):
    return P(*(AXES[kind] if kind in splits else None for kind in dims))


def specs(names, splits):
    return {name: spec_of(ARRAYS[name][0], splits) for name in names}  # of all leaves, where it is a tree


def gradients_of(name):
    return with_gradients(CASES[name], evaluation(CASES[name]))


@functools.cache
def reference(name):
    return jax.jit(gradients_of(name))


@functools.cache
def expected(name, parts=1, factor=1.0):
    """Results and gradients on one device, of each part of the rows alone."""
    case, found = CASES[name], []
    for number in range(parts):
        floats, rest = ({n: part_of(n, a, number, parts) for n, a in given.items()} for given in inputs(case))
        found.append(reference(name)(jax.tree.map(lambda leaf: factor * leaf, floats), rest))
    if parts == 1:
        return found[0]
    join = jnp.concatenate if "n" in case.out else jnp.stack
    results = jax.tree.map(lambda *leaves: join(leaves), *(results for results, _ in found))

    def joined(name, *gradients):
        together = jnp.concatenate if "n" in ARRAYS[name][0] else sum
        return jax.tree.map(lambda *leaves: together(leaves), *gradients)

    return results, {name: joined(name, *(gradients[name] for _, gradients in found)) for name in found[0][1]}


def part_of(name, array, number, parts):
    if ARRAYS[name][0][:1] not in ("n", "p"):
        return array
    size = array.shape[0] // parts
    return array[number * size : (number + 1) * size]


# Layouts: the name of a function to a program, its arguments, and what it has to give.


def by_vmap(name):
    return lambda two, rest: jax.vmap(gradients_of(name), in_axes=(0, None), axis_size=2)(two, rest), *two_at_once(name)


def by_scan(name):
    def program(two, rest):
        return jax.lax.scan(lambda carry, one: (carry, gradients_of(name)(one, rest)), None, two, length=2)[1]

    return program, *two_at_once(name)


def two_at_once(name):
    """Two sets of floats, and the results of both."""
    floats, rest = inputs(CASES[name])
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), floats)

    def wanted():
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), expected(name), expected(name, factor=0.9))

    return (two, rest), wanted


def by_remat(name):
    case = CASES[name]
    return with_gradients(case, jax.checkpoint(evaluation(case))), inputs(case), functools.partial(expected, name)


def by_export(name):
    leaves, tree = jax.tree.flatten(inputs(CASES[name]))

    def program(*leaves):
        return jax.tree.leaves(gradients_of(name)(*tree.unflatten(leaves)))

    exported = jax.export.export(jax.jit(program))(*leaves)
    again = jax.export.deserialize(exported.serialize())
    return again.call, leaves, functools.partial(expected, name)


def by_jit(kind, splits, set_mesh, name):
    """Arrays that are split, on a mesh that is set or is only in their types."""
    mesh = mesh_of(kind)
    placed = [
        {n: jax.device_put(array, NamedSharding(mesh, spec_of(ARRAYS[n][0], splits))) for n, array in given.items()}
        for given in inputs(CASES[name])
    ]
    return gradients_of(name), placed, functools.partial(expected, name)


def by_shard_map(splits, check_vma, inside, name):
    program = mapped(CASES[name], splits, check_vma, inside)
    return program, inputs(CASES[name]), functools.partial(expected, name, 2 if "n" in splits else 1)


def mapped(case, splits, check_vma, inside):
    """By `shard_map`, with gradients taken inside it or outside."""
    mesh, shards = mesh_of(AxisType.Auto), MESH_SHAPE[1]
    axis_name = AXES["v"] if "v" in splits else None
    evaluate, names = evaluation(case, axis_name), [set(part) for part in inputs(case)]
    in_specs = tuple(specs(part, splits) for part in names)
    rows = "n" in splits
    # What a device makes of its rows alone, such as a mean, gets an axis for the devices.
    new_axis = rows and "n" not in case.out
    out_spec = spec_of(("n" if new_axis else "") + case.out, splits)

    def stretched(results):
        return jax.tree.map(lambda leaf: leaf[None], results) if new_axis else results

    def local(floats, rest):
        value, results = evaluate(floats, rest)
        return value[None], stretched(results)

    def local_gradients(floats, rest):
        results, gradients = with_gradients(case, evaluate)(floats, rest)
        if not check_vma:
            gradients = {name: summed(name, gradient) for name, gradient in gradients.items()}
        return stretched(results), gradients

    def summed(name, gradient):
        """Parts, one on each device, of which each sum over shards of classes has been counted by all of them."""
        dims = ARRAYS[name][0]
        axes = tuple(AXES[kind] for kind in "nv" if kind in splits and kind not in dims)
        gradient = jax.lax.psum(gradient, axes) if axes else gradient
        return jax.tree.map(lambda leaf: leaf / shards, gradient) if axis_name else gradient

    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, check_vma=check_vma)
    if inside:
        return shard(local_gradients, out_specs=(out_spec, in_specs[0]))

    def outside(floats, rest):
        values, results = shard(local, out_specs=(P(AXES["n"] if rows else None), out_spec))(floats, rest)
        return jnp.sum(values), results

    return with_gradients(case, outside)


MESHES = list(itertools.product((AxisType.Auto, AxisType.Explicit), ("n", "v", "nv"), (True, False)))
SHARDS = list(itertools.product(("np", "v", "npv"), (True, False), (True, False)))
LAYOUTS = {"vmap": by_vmap, "scan": by_scan, "remat": by_remat, "export": by_export}
LAYOUTS |= {
    f"jit {kind} {split} set_mesh={on}": functools.partial(by_jit, kind, split, on) for kind, split, on in MESHES
}
LAYOUTS |= {
    f"shard_map {split} check_vma={vma} inside={inside}": functools.partial(by_shard_map, split, vma, inside)
    for split, vma, inside in SHARDS
}


def layouts_of(name):
    """Those that a function has: classes are split by `axis_name` alone inside `shard_map`."""
    return [layout for layout in LAYOUTS if CASES[name].splits_classes or not re.match("shard_map .*v ", layout)]


def cells(number, name):
    """The layouts of a function, and whether values are compared there or types alone.

    The short form deals: each function meets one on a mesh of type Explicit, where types tell the most, and few of
    all; every third one by values in one more: where its classes are split by hand, if they can be. The long form has
    all by values.
    """
    layouts = layouts_of(name)
    if os.environ.get("JSOFTMAX_LAYOUTS") == "all":
        return [(layout, True) for layout in layouts]
    by_hand = [layout for layout in layouts if re.match("shard_map .*v ", layout)]
    dealt = by_hand or layouts
    by_value = {dealt[number * 5 % len(dealt)]} if number % 3 == 1 else set()
    typed = [layout for layout in layouts if "Explicit nv" in layout]
    met = by_value | {typed[number % 2]} | {layout for n, layout in enumerate(layouts) if (n + number) % 16 == 0}
    return [(layout, layout in by_value) for layout in layouts if layout in met]


def run_cell(name, layout, by_value):
    program, arguments, wanted = LAYOUTS[layout](name)
    mesh = next((mesh_of(kind) for kind, _, on in MESHES if on and layout.startswith(f"jit {kind}")), None)
    with jax.set_mesh(mesh) if mesh and layout.endswith("True") else contextlib.nullcontext():
        # Flat, because JAX puts objects of its own into the trees of a program that is only traced.
        leaves, tree = jax.tree.flatten(arguments)
        traced = jax.jit(lambda *leaves: program(*tree.unflatten(leaves))).trace(*leaves)
        if not by_value:
            return
        actual = traced.lower().compile()(*leaves)
    tolerance = CASES[name].tolerance
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted()), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=tolerance, atol=tolerance)


def faults(name, some_cells):
    found = []
    for layout, by_value in some_cells:
        try:
            run_cell(name, layout, by_value)
        except Exception as error:  # so that one run shows every cell that fails
            found.append(f"{name}, {layout}: {type(error).__name__}: {str(error).strip()[:300]}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(name):
    found = faults(name, cells(list(CASES).index(name), name))
    assert not found, "\n".join(found)


def test_every_public_function_is_in_the_table():
    """But for what takes no arrays, and what makes descriptions of known values."""
    elsewhere = {"categorical", "default_block_size", "huffman_tree", "nested_tree", "parent_tree", "uniform_sampler"}
    elsewhere |= {"log_uniform_sampler", "unigram_sampler", "touched_classes"}  # the last with "Sampler"
    public = {n for n in dir(jsoftmax) if not n.startswith("_") and callable(getattr(jsoftmax, n)) and n[0].islower()}
    for module in (categorical, ranking):
        names = {n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))}
        public |= {f"{module.__name__.removeprefix('jsoftmax.')}.{n}" for n in names}
    assert public - elsewhere - {name.split(",")[0] for name in CASES} == set()


def test_size_of_the_table(capsys):
    whole = sum(len(layouts_of(name)) for name in CASES)
    dealt = [by_value for number, name in enumerate(CASES) for _, by_value in cells(number, name)]
    with capsys.disabled():
        print(f"\n{len(CASES)} functions, {whole} cells; here {len(dealt)}, {sum(dealt)} of them by values")
    assert whole > 1600
    assert {layout for number, name in enumerate(CASES) for layout, _ in cells(number, name)} == set(LAYOUTS)


def test_results_are_split_as_the_rows_they_belong_to():
    """These are a result's first axes, or its last ones behind those of draws."""
    logits = jax.device_put(normal(21, 8, 3, CLASSES), NamedSharding(mesh_of(AxisType.Explicit), P("data")))
    results = {
        "softmax": (jsoftmax.softmax(logits), P("data", None, None)),
        "entropy": (categorical.entropy(logits), P("data", None)),
        "draws": (categorical.sample(jax.random.key(0), logits, sample_shape=(5,)), P(None, "data", None)),
    }
    assert {name: jax.typeof(result).sharding.spec for name, (result, _) in results.items()} == {
        name: spec for name, (_, spec) in results.items()
    }


def test_gradient_of_class_weights_where_rows_are_split_unevenly():
    """Of 25 rows on 2 devices, XLA pads one; a scatter would count it at class 0."""
    logits, labels, weights = normal(20, 26, CLASSES), jnp.arange(26) % CLASSES, ARRAYS["class_weights"][1]

    def total(weights, logits, labels):
        loss = jsoftmax.softmax_cross_entropy_with_integer_labels
        return loss(logits[1:], labels[1:], class_weights=weights).sum()

    rows = NamedSharding(mesh_of(AxisType.Auto), P("data"))
    slope = jax.jit(jax.grad(total))
    split = slope(weights, jax.device_put(logits, rows), jax.device_put(labels, rows))
    np.testing.assert_allclose(split, slope(weights, logits, labels), rtol=1e-5)


EAGER = [
    "blockwise, sum",
    "AdaptiveSoftmax.cross_entropy",
    "AdaptiveSoftmax.predict",
    "hierarchical_log_softmax",
    "hierarchical_top_k",
]


@pytest.mark.parametrize("name", EAGER)
def test_eager_calls_compile_once(name, caplog):
    call = gradients_of(name)
    call(*inputs(CASES[name]))
    with jax.log_compiles(), warnings.catch_warnings():
        call(*inputs(CASES[name]))
    assert [record.message for record in caplog.records if "Compiling" in record.message] == []
