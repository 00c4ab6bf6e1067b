"""A training loop of one's own whose step clips, averages the weights and keeps momentum in half the bytes.

python examples/ema.py     # five epochs on digits, the accuracy of the weights and of their averages after each
"""

from __future__ import annotations

import argparse
import math

import torch
from digits import accuracy, network, training_data
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

import gradrep_kernels as gr


def decay(step: int) -> float:
    """The ramp of YOLO's averages: low at first, so that the first weights are soon forgotten."""
    return 0.98 * (1 - math.exp(-step / 20))


def averaged_accuracy(model: nn.Module, optimizer: gr.FusedRepSGD) -> float:
    """Of the averages, with norm statistics of their own. Model and optimizer are afterwards as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with optimizer.swap_ema():
            update_bn(training_data(), model)
            return accuracy(model)
    finally:
        model.load_state_dict(buffers, strict=False)


def train(epochs: int) -> nn.Module:
    model = network(seed=1)
    optimizer = gr.FusedRepSGD(
        gr.param_groups(model, 1e-4),
        lr=0.1,
        momentum=0.9,
        max_grad_norm=2.0,
        ema_decay=decay,
        momentum_dtype=torch.bfloat16,
    )
    for epoch in range(epochs):
        for images, labels in training_data(seed=epoch):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        weights, averages = accuracy(model), averaged_accuracy(model, optimizer)
        print(f"epoch {epoch}: norm {optimizer.last_grad_norm:.2f}, weights {weights:.1f} %, averages {averages:.1f} %")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    train(parser.parse_args().epochs)
