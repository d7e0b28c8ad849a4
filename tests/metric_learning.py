"""Makes metric_learning.json: losses and gradients of PyTorch peers in float64, for tests of margins and contrast.

Run by hand, in an environment of its own: python tests/metric_learning.py. The numbers beside it come
from torch 2.15.0 and pytorch-metric-learning 2.9.0 on Python 3.12. The losses of CLIP and SigLIP are the formulas of
their papers (Radford et al. 2021, figure 3; Zhai et al. 2023, algorithm 1) on torch's own functions.
"""

import json
from pathlib import Path

import numpy as np

ROWS, WIDTH, CLASSES = 6, 3, 5
LABELS = [0, 1, 1, 2, 4, 3]
QUERIES = np.sin(0.5 + np.arange(ROWS * WIDTH)).reshape(ROWS, WIDTH)
ITEMS = np.cos(1.3 * np.arange(ROWS * WIDTH)).reshape(ROWS, WIDTH)
KERNEL = np.sin(1.7 * np.arange(WIDTH * CLASSES)).reshape(WIDTH, CLASSES)
# One label nearly opposite, whose angle and margin are beyond π.
FEATURES = np.concatenate([QUERIES[:5], -KERNEL[:, 3:4].T + 0.05])


def peers():
    import torch
    from pytorch_metric_learning import losses

    functional = torch.nn.functional
    labels = torch.tensor(LABELS)

    def result(loss, *arrays):
        value = loss(*arrays)
        gradients = torch.autograd.grad(value, arrays)
        return {"value": value.item(), "gradients": [gradient.tolist() for gradient in gradients]}

    def of_kernel(loss):
        loss.W = torch.nn.Parameter(torch.tensor(KERNEL))
        features = torch.tensor(FEATURES, requires_grad=True)
        value = loss(features, labels)
        gradients = torch.autograd.grad(value, (features, loss.W))
        return {"value": value.item(), "gradients": [gradient.tolist() for gradient in gradients]}

    def unit(array):
        return functional.normalize(array, dim=1)

    def clip(queries, items):
        logits = unit(queries) @ unit(items).T / 0.2
        own = torch.arange(ROWS)
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2

    def siglip(queries, items):
        logits = unit(queries) @ unit(items).T * 10 - 2
        sign = 2 * torch.eye(ROWS, dtype=torch.float64) - 1
        return -functional.logsigmoid(sign * logits).sum() / ROWS

    def views(loss, both_labels):
        return lambda queries, items: loss(torch.cat([queries, items]), both_labels)

    both = torch.cat([labels, labels])
    pairs = torch.cat([torch.arange(ROWS)] * 2)
    towers = tuple(torch.tensor(array, requires_grad=True) for array in (QUERIES, ITEMS))
    return {
        "cosface": of_kernel(losses.CosFaceLoss(CLASSES, WIDTH, margin=0.35, scale=16)),
        "arcface": of_kernel(losses.ArcFaceLoss(CLASSES, WIDTH, margin=float(np.degrees(0.5)), scale=16)),
        "clip": result(clip, *towers),
        "siglip": result(siglip, *towers),
        "supcon": result(views(losses.SupConLoss(temperature=0.2), both), *towers),
        "ntxent": result(views(losses.NTXentLoss(temperature=0.2), pairs), *towers),
    }


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(peers()) + "\n", encoding="utf-8")
