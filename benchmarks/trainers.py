"""Trainers from the registry, each with a small model of its own: its loss, and ours in the place of it.

    make test-trainers

makes an environment for each trainer, as they ask for different releases of JAX, and runs this with its name. Losses
and gradients must agree to rounding, and so must the losses of a few steps of training; what each took is kept in
results/trainers.json. The three functions that stand in for a trainer's own are those of docs/trainers.md.
"""

import contextlib
import importlib
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jsoftmax
from benchmarks import harness

RESULTS = harness.RESULTS / "trainers.json"
BATCH, LENGTH, VOCABULARY, WIDTH, LAYERS, HEADS = 8, 128, 32_768, 128, 2, 2
STEPS, TURNS, Z_LOSS, CHUNKS = 3, 5, 1e-4, 4
# A float32 mean of some 1400 rows; gradients, of the largest entry of a parameter.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 3e-6, 3e-5


def batch() -> tuple[jax.Array, jax.Array]:
    """Tokens, and which are no padding: sequences of all lengths down to a third."""
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, VOCABULARY)
    lengths = jnp.linspace(LENGTH / 3, LENGTH, BATCH).astype(int)
    return tokens, jnp.arange(LENGTH) < lengths[:, None]


class Work(NamedTuple):
    """A trainer's model, and functions from it to the loss, the trainer's own first."""

    model: nnx.Module
    losses: dict[str, Callable[[nnx.Module], jax.Array]]
    within: Callable[[], Any] = contextlib.nullcontext


def tunix_loss(model, input_tokens, input_mask, positions, attention_mask, images=None):
    model(input_tokens, positions, None, attention_mask, output_hidden_states=True)  # logits that XLA leaves out
    hidden = nnx.pop(model, nnx.Intermediate)["all_hidden_states"][0]
    embedding, mask = model.embedder.input_embedding[...], input_mask[:, 1:].astype(hidden.dtype)
    return jsoftmax.linear_softmax_cross_entropy(
        hidden[:, :-1], embedding, input_tokens[:, 1:], weights=mask, kernel_transposed=True, skip_rows=True
    )


def tunix() -> Work:
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import peft_trainer, utils

    config = qwen3.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=2 * WIDTH,
        num_heads=HEADS,
        head_dim=WIDTH // HEADS,
        num_kv_heads=HEADS,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=STEPS)
    own = peft_trainer.PeftTrainer(model, optax.sgd(0.0), settings).loss_fn
    tokens, mask = batch()
    inputs = (tokens, mask, utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask))
    return Work(model, {"own": lambda model: own(model, *inputs), "jsoftmax": lambda model: tunix_loss(model, *inputs)})


def vocab_tiling_nnx_loss(model, hidden_states, data, config, is_train):
    def is_of_head(path, _):
        return not {"token_embedder", "decoder_norm", "logits_dense"}.isdisjoint(path)

    graph, head, others = nnx.split(model, is_of_head, ...)
    others = jax.tree.map(lambda _: None, others)  # what the head does not read needs no gradient there

    def loss(head, rows):
        model = nnx.merge(graph, head, others)
        logits = model.logits_from_hidden_states_for_vocab_tiling(rows["hidden"][None], True, "train")[0]
        statistics = jsoftmax.softmax_statistics(logits, rows["label"])
        z = config.z_loss_multiplier * jnp.sum(rows["weight"] * statistics.logsumexp**2)
        return z - jnp.sum(rows["weight"] * statistics.log_prob), z

    active = data["targets_segmentation"].reshape(-1) != 0
    rows = {"hidden": hidden_states.reshape(-1, hidden_states.shape[-1]), "label": data["targets"].reshape(-1)}
    rows["weight"] = active.astype(jnp.float32)
    block_size = -(-active.size // config.num_vocab_tiling)
    return jsoftmax.blockwise(loss, has_aux=True, block_size=block_size)(head, rows, active)


def maxtext() -> Work:
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train
    from maxtext.utils import model_creation_utils
    from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

    settings = f"""run_name=small base_output_directory={tempfile.gettempdir()} hardware=cpu enable_checkpointing=False
        skip_jax_distributed_system=True decoder_block=llama2 attention=dot_product dtype=float32 weight_dtype=float32
        base_num_decoder_layers={LAYERS} base_emb_dim={WIDTH} base_mlp_dim={2 * WIDTH} base_num_query_heads={HEADS}
        base_num_kv_heads={HEADS} head_dim={WIDTH // HEADS} vocab_size={VOCABULARY} max_target_length={LENGTH}
        per_device_batch_size={BATCH} z_loss_multiplier={Z_LOSS} enable_dropout=False"""
    base = [None, os.path.join(MAXTEXT_CONFIGS_DIR, "base.yml"), *settings.split()]
    whole, tiled = (pyconfig.initialize([*base, f"num_vocab_tiling={tiles}"]) for tiles in (1, CHUNKS))
    # With tiles, the model leaves logits out.
    graph, _, rest = nnx.split(model_creation_utils.from_config(whole, rngs=nnx.Rngs(0)), nnx.Param, ...)
    model = model_creation_utils.from_config(tiled, rngs=nnx.Rngs(0))
    tokens, mask = batch()
    positions, segments = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape), mask.astype(jnp.int32)
    data = {"inputs": tokens, "targets": jnp.roll(tokens, -1, axis=1)}
    for name in data.copy():
        data |= {f"{name}_position": positions, f"{name}_segmentation": segments}

    def own(model, config):
        return train.loss_fn(model, config, dict(data), None, None, is_train=True)[0]

    def ours(model):
        with mock.patch.object(train, "vocab_tiling_nnx_loss", vocab_tiling_nnx_loss):
            return own(model, tiled)

    losses = {
        "own": lambda model: own(nnx.merge(graph, nnx.state(model, nnx.Param), rest), whole),
        f"own, {CHUNKS} tiles": lambda model: own(model, tiled),
        "jsoftmax": ours,
    }
    return Work(model, losses, lambda: jax.set_mesh(model.mesh))


def causal_lm_loss_chunked_lm_head(
    hidden_states, labels, lm_head_fn, *, attention_mask=None, config=None, token_chunk_size=None, **unused
):
    hidden_states, labels = hidden_states[:, :-1], labels[:, 1:]
    mask = labels != config.ignore_index if attention_mask is None else attention_mask[:, 1:] != 0
    # The head is a function around the model's traced parameters; here they become arguments.
    head, params = jax.closure_convert(lambda hidden: lm_head_fn(hidden[None, None])[0, 0], hidden_states[0, 0])

    def loss(params, rows):
        logits = jax.vmap(lambda hidden: head(hidden, *params))(rows["hidden"])
        options = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
        losses = jsoftmax.softmax_cross_entropy_with_integer_labels(logits, rows["label"], **options)
        statistics = jsoftmax.softmax_statistics(jax.lax.stop_gradient(logits), rows["label"])
        logged = {"z": statistics.logsumexp**2, "hits": (statistics.argmax == rows["label"]).astype(jnp.float32)}
        return jnp.sum(rows["share"] * losses), {name: jnp.sum(rows["share"] * each) for name, each in logged.items()}

    active, count = mask.reshape(-1), jnp.maximum(jnp.sum(mask), 1)
    rows = {"hidden": hidden_states.reshape(-1, hidden_states.shape[-1]), "label": labels.reshape(-1)}
    rows["share"] = active / count.astype(jnp.float32)
    block_size = labels.shape[0] * (token_chunk_size or config.chunk_token_size)
    value, logged = jsoftmax.blockwise(loss, has_aux=True, block_size=block_size)(params, rows, active)
    return LossMetrics(
        loss=value, z_loss=config.z_loss * logged["z"], weight_sum=jnp.sum(mask), accuracy=logged["hits"]
    )


def easydel() -> Work:
    # Importing any of its models patches six models of PyTorch, which is not there.
    for name in ("dbrx", "glm4v_moe", "llama4", "phimoe", "qwen3_5_moe", "qwen3_next"):
        absent = types.ModuleType(f"modeling_{name}")
        setattr(importlib.import_module(f"transformers.models.{name}"), absent.__name__, absent)
    import easydel as ed
    from easydel.infra import loss_utils

    global LossMetrics
    LossMetrics = loss_utils.LossMetrics
    config = ed.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH,
        attn_dtype=jnp.float32,  # bfloat16 makes a rounding of the loss a thousandth of a gradient
    )
    model = ed.LlamaForCausalLM(config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens, mask = batch()

    def own(model, chunk=None):
        settings = ed.LossConfig(chunk_token_size=chunk, z_loss=Z_LOSS)
        inputs = {"input_ids": tokens, "attention_mask": mask.astype(jnp.int32), "labels": tokens}
        return model.compute_loss(loss_config=settings, **inputs)[1].loss

    chunk = LENGTH // CHUNKS

    def ours(model):
        with mock.patch.object(loss_utils, "causal_lm_loss_chunked_lm_head", causal_lm_loss_chunked_lm_head):
            return own(model, chunk)

    losses = {"own": own, f"own, {CHUNKS} chunks": lambda model: own(model, chunk), "jsoftmax": ours}
    return Work(model, losses, lambda: model.mesh)


TRAINERS = {"tunix": ("google-tunix", tunix), "maxtext": ("maxtext", maxtext), "easydel": ("easydel", easydel)}


def apart(value: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry of its array."""
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)) for a, b in pairs)


def train(program: Callable, params: Any) -> list[float]:
    """The losses of a few steps."""
    optimizer = optax.adamw(1e-3)

    @jax.jit
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    losses, state = [], optimizer.init(params)
    for _ in range(STEPS):
        loss, gradients = program(params)
        params, state = update(params, state, gradients)
        losses.append(float(loss))
    return losses


def measured(name: str) -> dict[str, Any]:
    package, make = TRAINERS[name]
    work = make()
    graph, params, rest = nnx.split(work.model, nnx.Param, ...)
    programs, out, trained = {}, {}, {}
    with work.within():
        for program, loss in work.losses.items():
            gradients = jax.value_and_grad(lambda params, loss=loss: loss(nnx.merge(graph, params, rest)))
            print(f"compiling {name}, {program}", flush=True)
            compiled = jax.jit(gradients).lower(params).compile()
            temp_mb = compiled.memory_analysis().temp_size_in_bytes / 1e6
            run = lambda compiled=compiled: jax.block_until_ready(compiled(params))  # noqa: E731
            programs[program] = harness.Program(run, temp_mb=temp_mb)
            out[program], trained[program] = compiled(params), train(compiled, params)
        shape = f"{BATCH}×{LENGTH}×{WIDTH}×{VOCABULARY}"
        rows = harness.bench.measure(name, shape, "float32", programs, reference="own", repeats=TURNS)
    facts = []
    for row in rows:
        loss, gradients = out[row.program]
        facts.append(
            {
                "program": row.program,
                "loss": float(loss),
                "gradients_apart": apart(gradients, out["own"][1]),
                "trained_apart": apart(np.array(trained[row.program]), np.array(trained["own"])),
                "last_loss": trained[row.program][-1],
                "temp_mb": row.temp_mb,
                "ms": row.median_ms,
                "ratio": row.ratio,
            }
        )
    versions = {each: metadata.version(each) for each in (package, "jax", "flax")}
    share = float(jnp.mean(batch()[1]))
    return {"trainer": name, "shape": shape, "share_of_rows": share, "versions": versions, "programs": facts}


def agree(own: dict[str, Any], row: dict[str, Any]) -> bool:
    losses_apart = max(abs(row["loss"] / own["loss"] - 1), row["trained_apart"])
    return losses_apart < LOSS_TOLERANCE and row["gradients_apart"] < GRADIENT_TOLERANCE


def main() -> int:
    name = sys.argv[1]
    jax.config.update("jax_platforms", "cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    found, failed = measured(name), 0
    for row in found["programs"]:
        ok = agree(found["programs"][0], row)
        failed += not ok
        shown = f"loss {row['loss']:.6f}, gradients apart {row['gradients_apart']:.0e}, temps {row['temp_mb']:.0f} MB"
        print(
            f"{name:<8} {row['program']:<14} {shown}, time {row['ratio']:.2f}{'' if ok else ' DIFFERENT'}", flush=True
        )
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    kept = [each for each in kept if each["trainer"] != name] + [found]
    kept.sort(key=lambda each: each["trainer"])
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
