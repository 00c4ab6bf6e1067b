"""A model of timm, with the optimizer from timm's registry and clipping in timm's way.

python examples/timm_model.py [MODEL]
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.utils import NativeScaler
from torch.nn.functional import cross_entropy

import gradrep_kernels as gr

# From here on timm knows it by name, as `--opt fusedrepsgd` of its train.py too.
default_registry.register(
    OptimInfo("fusedrepsgd", gr.FusedRepSGD, has_momentum=True, has_eps=False, defaults={"nesterov": True})
)


def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    gr.clip_grad_norm_(optimizer, 5.0)


def main(name: str, size: int = 64) -> torch.optim.Optimizer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(name, num_classes=10).to(device)
    print(str(gr.csla.coverage(model)).splitlines()[0])

    # The scales of a search would come from csla.load_scales(file). Those of a search that has not begun serve here.
    scales = gr.csla.extract_scales(gr.csla.hyper_search_model(model))
    gr.csla.reinitialize(model, scales)
    optimizer = create_optimizer_v2(
        model, "fusedrepsgd", lr=0.05, weight_decay=4e-5, momentum=0.9, grad_mults=gr.csla.grad_mults(model, scales)
    )
    # The `clip_grad` of NativeScaler, train.py's --clip-grad, is the plain norm: leave it out. This hook clips the
    # gradients, unscaled, before each step. In a loop of your own, call optimizer.clip_grad_norm_ there.
    optimizer.register_step_pre_hook(clip)

    sgs = gr.SpatialGradientScaling(model, optimizer, every=1, warmup=1)
    scaler = NativeScaler(device.type)
    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(16, device=device) % 10
    batches = [(images[:8], labels[:8]), (images[8:], labels[8:])]
    for epoch in range(3):
        sgs.update_if_due(epoch, batches)
        for x, y in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            scaler(loss, optimizer)
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    return optimizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="resnet10t")
    main(parser.parse_args().model)
