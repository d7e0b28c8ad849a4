"""`python -m benchmarks.catalogue`: losses of sampled negatives, judged by the ranks of all items.

The model and the text of `benchmarks.large_vocabulary`, whose 32,768 tokens are the catalogue here: which one comes
next? All losses take their turns from one start with as many negatives a step, shared by the batch.
"""

import argparse
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jsoftmax
from benchmarks import large_vocabulary as setting
from benchmarks.harness import RESULTS
from jsoftmax import ranking

NEGATIVES = 128


def generalized_binary(head: jax.Array, features: jax.Array, labels: jax.Array, key: jax.Array, t: float) -> jax.Array:
    """gBCE with evenly drawn negatives; t = 0 is plain binary cross-entropy, t = 1 calibrated."""
    drawn = jax.random.randint(key, (NEGATIVES,), 0, setting.VOCABULARY)
    right, wrong = jnp.sum(features * head[labels], axis=1), features @ head[drawn].T
    share = NEGATIVES / (setting.VOCABULARY - 1)
    power = share * (t * (1 - 1 / share) + 1 / share)
    no = jnp.where(
        drawn[None] == labels[:, None], 0, jsoftmax.sigmoid_binary_cross_entropy(wrong, jnp.zeros_like(wrong))
    )
    return jnp.mean(power * jsoftmax.sigmoid_binary_cross_entropy(right, jnp.ones_like(right)) + no.sum(axis=1))


def sampled(sampler: jsoftmax.Sampler) -> Callable:
    def train(head, features, labels, key):
        losses = jsoftmax.sampled_softmax_cross_entropy(
            *(features, head, labels, key), num_sampled=NEGATIVES, sampler=sampler, kernel_transposed=True
        )
        return losses.mean()

    return train


def losses() -> dict[str, Callable]:
    return {
        "full softmax": lambda head, features, labels, key: setting.linear(head, features, labels),
        "sampled softmax, log-uniform": sampled(jsoftmax.log_uniform_sampler(setting.VOCABULARY)),
        "sampled softmax, uniform": sampled(jsoftmax.uniform_sampler(setting.VOCABULARY)),
        "gBCE, t = 0.75": lambda *batch: generalized_binary(*batch, t=0.75),
        "binary cross-entropy": lambda *batch: generalized_binary(*batch, t=0.0),
    }


def judged(head: jax.Array, features: jax.Array, labels: jax.Array) -> jax.Array:
    """Reciprocal rank and NDCG@10 among all items."""
    ranks = ranking.linear_ranks(features, head, labels, kernel_transposed=True)
    return jnp.stack([ranking.reciprocal_rank(ranks).mean(), ranking.ndcg(ranks, 10).mean()])


def run(steps: int, progress: Callable[[str], None]) -> dict:
    corpus = setting.load()
    methods = {name: setting.Method(setting.kernel, loss, judged, 0) for name, loss in losses().items()}
    rows = []
    for name, one in setting.trained(methods, corpus, steps, progress).items():
        reciprocal, ndcg = one.held_out(*setting.held_out_examples(corpus))
        rows.append({"loss": name, "reciprocal_rank": round(float(reciprocal), 3), "ndcg_10": round(float(ndcg), 3)})
    return {"jax": jax.__version__, "steps": steps, "negatives": NEGATIVES, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.catalogue", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    results = run(arguments.steps, setting.show_progress)
    for row in results["rows"]:
        print(f"{row['loss']:<30} reciprocal rank {row['reciprocal_rank']:.3f}, NDCG@10 {row['ndcg_10']:.3f}")
    if not arguments.no_save:
        (RESULTS / "catalogue.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
