"""The whole method in a training loop of one's own: search, scales, training with AMP, clipping and EMA, and resuming.

python examples/own_loop.py     # when it is started again, it goes on where it was
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from digits import accuracy, network, training_data
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradrep_kernels as gr

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16 if DEVICE.type == "cuda" else torch.bfloat16
scaler = torch.amp.GradScaler(DEVICE.type, enabled=DEVICE.type == "cuda")  # bfloat16 needs none


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, HALF):
        return cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))


def search() -> gr.csla.Scales:
    """Hyper-Search: train blocks of branches with a scale each, on a small data set, and keep the scales."""
    model = gr.csla.hyper_search_model(network()).to(DEVICE)
    optimizer = torch.optim.SGD(gr.param_groups(model, 1e-4), lr=0.1, momentum=0.9)
    for _ in range(2):
        for images, labels in training_data():
            optimizer.zero_grad()
            scaler.scale(loss_of(model, images, labels)).backward()
            scaler.step(optimizer)
            scaler.update()
    return gr.csla.extract_scales(model)


def train(folder: Path, epochs: int) -> nn.Module:
    scales_file, checkpoint = folder / "scales.pth", folder / "checkpoint.pth"
    if not scales_file.exists():
        gr.csla.save_scales(search(), scales_file)
    scales = gr.csla.load_scales(scales_file)

    model = network(seed=1).to(DEVICE)
    if not checkpoint.exists():
        gr.csla.reinitialize(model, scales)  # the kernels that the blocks of branches would start with
    mults = gr.csla.grad_mults(model, scales)
    optimizer = gr.FusedRepSGD(gr.param_groups(model, 1e-4), lr=0.02, momentum=0.9, grad_mults=mults)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    sgs = gr.SpatialGradientScaling(model, optimizer, every=5, warmup=1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)

    # Everything with a state of its own. Without that of `sgs` a resumed run trains unscaled until its next update.
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "sgs": sgs, "schedule": schedule, "ema": ema}
    parts["scaler"] = scaler
    begin = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
        begin = saved.pop("epochs")
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    for epoch in range(begin, epochs):
        loader = training_data(seed=epoch)
        sgs.update_if_due(epoch, loader)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = loss_of(model, images, labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(5.0)  # not torch's: this norm is that of the network with branches
            scaler.step(optimizer)
            scaler.update()
            ema.update_parameters(model)
        schedule.step()
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"epochs": epoch + 1}, checkpoint)
        print(
            f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy(model):.1f} %, EMA {accuracy(ema):.1f} %"
        )
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default="runs/example", help="of scales and checkpoints")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    train(args.folder, args.epochs)
