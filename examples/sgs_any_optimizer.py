"""Spatial gradient scaling (SGS) with optimizers of torch: two lines in the loop.

python examples/sgs_any_optimizer.py
"""

from __future__ import annotations

import torch
from digits import accuracy, network, training_data
from torch import nn
from torch.nn.functional import cross_entropy

import gradrep_kernels as gr


def train(model: nn.Module, optimizer: torch.optim.Optimizer, apply_to: str = "gradient") -> gr.SpatialGradientScaling:
    sgs = gr.SpatialGradientScaling(model, optimizer, every=1, warmup=1, apply_to=apply_to)
    for epoch in range(3):
        loader = training_data(seed=epoch)
        sgs.update_if_due(epoch, loader)  # before the epoch: learns G from two batches, where an update is due
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    return sgs


if __name__ == "__main__":
    model = network()
    sgs = train(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4))
    print(f"SGD with SGS: test accuracy {accuracy(model):.1f} %")
    print("G of the first convolution, by which each tap's gradient is multiplied:")
    print(sgs.scalings["0"])

    # AdamW divides a gradient by its own size, so that a constant factor cancels. Scale its step instead.
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), apply_to="update")
    print(f"AdamW with SGS: test accuracy {accuracy(model):.1f} %")

    # With FusedRepSGD the scaling is part of the step, and costs nothing.
    model = network()
    train(model, gr.FusedRepSGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4))
    print(f"FusedRepSGD with SGS: test accuracy {accuracy(model):.1f} %")
