"""Losses and gradients of TRL and Liger for `test_post_training.py`, written to `peers_post_training.json`.

Run by hand, in an environment with torch 2.15.0 (CPU), trl 1.16.0 and liger-kernel 0.8.5 on Python 3.12:

    python tests/_policies/peers_post_training.py

TRL's losses are methods of trainers. What those call but the loss does not depend on is put in place by mocks; the
model is one that has given log-probabilities. All is in float64.
"""

import collections
import importlib.metadata
import json
import pathlib
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from liger_kernel.chunked_loss.cpo_loss import LigerFusedLinearCPOFunction
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
SEQUENCES, TOKENS, LONGEST = 6, 5, 8
OLD = -torch.rand(SEQUENCES, TOKENS) * 2 - 0.1
POLICY = torch.clamp(OLD + 0.5 * torch.randn(SEQUENCES, TOKENS), max=-0.01)
REFERENCE = OLD + 0.3 * torch.randn(SEQUENCES, TOKENS)
SAMPLER = OLD + 0.4 * torch.randn(SEQUENCES, TOKENS)
MASK = (torch.arange(TOKENS) < torch.tensor([5, 3, 4, 1, 2, 5])[:, None]).double()
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0, 1.5])
CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED = -3 * torch.rand(4, SEQUENCES) - 0.05
DESIRABLE = torch.tensor([True, False, True, True, False, False])
DIVERGENCE = 0.3


def differentiated(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    return {"value": value.item(), "gradients": [gradient.tolist() for gradient in gradients]}


def trl_grpo(loss_type, level="token", low=0.2, high=0.28, beta=0.0, delta=None, correction=False, truncated=False):
    def loss(policy):
        args = SimpleNamespace(
            delta=delta,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            use_bias_correction_kl=correction,
            steps_per_generation=1,
        )
        trainer = MagicMock(
            args=args,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=beta,
            loss_type=loss_type,
            epsilon_low=low,
            epsilon_high=high,
            use_vllm=truncated,
            vllm_importance_sampling_correction=truncated,
            current_gradient_accumulation_steps=1,
            max_completion_length=LONGEST,
            aux_loss_enabled=False,
            _entropy_bonus_enabled=False,
            _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        )
        trainer.accelerator.num_processes = 1
        trainer.accelerator.gather = lambda x: x
        trainer.accelerator.reduce = lambda x, reduction: x
        trainer._get_per_token_logps_and_entropies.return_value = (policy, torch.zeros_like(policy), None)
        nothing = torch.zeros(SEQUENCES, 0)
        inputs = {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": MASK,
            "completion_mask": MASK,
            "advantages": ADVANTAGES,
            "old_per_token_logps": OLD,
            "ref_per_token_logps": REFERENCE,
            "num_items_in_batch": MASK.sum(),
            "importance_sampling_ratio": torch.clamp(torch.exp(OLD - SAMPLER), max=1.2),
        }
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)

    return differentiated(loss, POLICY)


def liger_grpo(loss_type, level="token", low=0.2, high=0.28, beta=0.0):
    def loss(policy):
        value, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            policy,
            MASK,
            ADVANTAGES,
            MASK,
            ref_per_token_logps=REFERENCE,
            old_per_token_logps=OLD,
            epsilon_low=low,
            epsilon_high=high,
            beta=beta,
            loss_type=loss_type,
            max_completion_length=LONGEST,
            importance_sampling_level=level,
        )
        return value

    return differentiated(loss, POLICY)


def trl_cpo(loss_type, beta, gamma=0.0, smoothing=0.0):
    trainer = MagicMock(alpha=0.0, beta=beta, loss_type=loss_type, simpo_gamma=gamma, label_smoothing=smoothing)
    trainer.accelerator.device = "cpu"
    return differentiated(lambda c, r: CPOTrainer.cpo_loss(trainer, c, r)[0].mean(), CHOSEN, REJECTED)


def liger_pairs(function, **options):
    """Liger divides each block of a batch by the number of pairs in all."""
    full = torch.zeros(2 * SEQUENCES, 1)

    def loss(chosen, rejected):
        value = function.preference_loss_fn(chosen, rejected, full, **options)
        return value[0] if isinstance(value, tuple) else value

    return differentiated(loss, CHOSEN, REJECTED)


def trl_orpo(beta):
    """TRL computes in float32 here."""
    trainer = MagicMock(beta=beta)
    trainer.accelerator.device = "cpu"
    return differentiated(
        lambda c, r: -c.mean() - ORPOTrainer.odds_ratio_loss(trainer, c, r)[0].mean(), CHOSEN, REJECTED
    )


def liger_orpo(beta):
    of_odds = liger_pairs(LigerFusedLinearORPOFunction, beta=beta)
    of_likelihood = differentiated(lambda c, r: -c.mean() + 0 * r.sum(), CHOSEN, REJECTED)
    gradients = torch.tensor(of_likelihood["gradients"]) + torch.tensor(of_odds["gradients"])
    return {"value": of_likelihood["value"] + of_odds["value"], "gradients": gradients.tolist()}


def liger_kto(beta, kl):
    def loss(policy):
        return LigerFusedLinearKTOFunction.preference_loss_fn(
            policy, DESIRABLE, torch.zeros(SEQUENCES, 1), ref_log_prob_chunk=REFERENCE_CHOSEN, beta=beta, kl=kl
        )[0]

    return differentiated(loss, CHOSEN)


REFERENCES = {"ref_chosen_logps": REFERENCE_CHOSEN, "ref_rejected_logps": REFERENCE_REJECTED}
CASES = {
    "trl GRPO": trl_grpo("grpo", beta=0.04),
    "trl dual clip": trl_grpo("grpo", delta=1.5),
    "trl GSPO": trl_grpo("grpo", level="sequence", low=0.03, high=0.04),
    "trl DAPO": trl_grpo("dapo"),
    "trl Dr. GRPO": trl_grpo("dr_grpo"),
    "trl CISPO": trl_grpo("cispo", high=1.3),
    "trl SAPO": trl_grpo("sapo"),
    "trl corrected KL": trl_grpo("dapo", beta=0.5, correction=True),
    "trl truncated importance": trl_grpo("dapo", beta=0.5, truncated=True),
    "liger GRPO": liger_grpo("grpo", beta=0.04),
    "liger GSPO": liger_grpo("grpo", level="sequence", low=0.03, high=0.04),
    "liger Dr. GRPO": liger_grpo("dr_grpo"),
    "liger CISPO": liger_grpo("cispo", high=1.3),
    "liger SAPO": liger_grpo("sapo"),
    "trl SimPO": trl_cpo("simpo", 2.0, gamma=0.5, smoothing=0.1),
    "trl CPO": trl_cpo("sigmoid", 0.1),
    "trl ORPO": trl_orpo(0.3),
    "liger SimPO": liger_pairs(LigerFusedLinearSimPOFunction, beta=2.0, gamma=0.5, label_smoothing=0.1),
    "liger CPO": liger_pairs(LigerFusedLinearCPOFunction, beta=0.1),
    "liger ORPO": liger_orpo(0.3),
    "liger DPO": liger_pairs(LigerFusedLinearDPOFunction, beta=0.1, **REFERENCES),
    "liger KTO": liger_kto(0.5, DIVERGENCE),
}
INPUTS = {
    "policy": POLICY,
    "old": OLD,
    "reference": REFERENCE,
    "sampler": SAMPLER,
    "mask": MASK,
    "advantages": ADVANTAGES,
    "chosen": CHOSEN,
    "rejected": REJECTED,
    "reference_chosen": REFERENCE_CHOSEN,
    "reference_rejected": REFERENCE_REJECTED,
    "desirable": DESIRABLE,
}


if __name__ == "__main__":
    result = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "trl", "liger-kernel")},
        "inputs": {name: value.tolist() for name, value in INPUTS.items()},
        "cases": CASES,
    }
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
