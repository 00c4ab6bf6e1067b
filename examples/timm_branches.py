"""MobileOne, RepVGG, RepViT and FastViT of timm in their plain form, trained as if it had their branches.

python examples/timm_branches.py [MODEL ...]

timm's own blocks have a norm in every branch. Here one convolution and one norm stand in the place of a block, and a
Hyper-Search, which has the block's branches, finds a constant scale for each. The scales then change the gradients of
the plain network alone.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence

import timm
import torch
from timm.layers import ConvNormAct
from timm.models.repvit import RepVggDw
from torch import nn
from torch.nn.functional import cross_entropy

import gradrep_kernels as gr

MODELS = ("mobileone_s0", "repvgg_a0", "repvit_m1", "fastvit_t8")
REST = ("act", "attn", "se")  # children of timm's blocks that stand behind their branches


def plain_form(model: nn.Module, above: str = "") -> dict[str, list]:
    """Make a model plain, in place, and return the branches that each of its convolutions stands for, by name."""
    branches: dict[str, list] = {}
    for name, block in list(model.named_children()):
        convs = [module.conv for module in block.modules() if isinstance(module, ConvNormAct)]
        if isinstance(block, RepVggDw):  # norm(conv(x)) + conv_1x1(x) + x
            setattr(model, name, block.conv)
            branches[f"{above}{name}.c"] = ["kxk", "1x1" if block.legacy else "1x1=1", "identity=1"]
        elif convs and getattr(block, "reparam_conv", block) is None:  # a block of branches that is not merged yet
            for branch in [child for child, _ in block.named_children() if child not in REST]:
                delattr(block, branch)
            largest = max(convs, key=lambda conv: conv.kernel_size)
            block.reparam_conv = nn.Sequential(largest, nn.BatchNorm2d(largest.out_channels))
            branches[f"{above}{name}.reparam_conv.0"] = [*(conv.kernel_size for conv in convs), "identity"]
        else:
            branches |= plain_form(block, f"{above}{name}.")
    return branches


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[tuple], epochs: int = 2) -> float:
    """Train, and return the seconds of the fastest step."""
    seconds = []
    for images, labels in [batch for _ in range(epochs) for batch in batches]:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = cross_entropy(model.train()(images), labels)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    print(f"  {type(optimizer).__name__}: loss {loss.item():.3f}")
    return min(seconds)


def row(form: str, model: nn.Module, seconds: float) -> str:
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return f"| {form} | {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M | {convs} | {seconds:.3f} |"


def main(name: str, batches: Sequence[tuple]) -> None:
    print(name)
    original = timm.create_model(name, num_classes=10)
    model = copy.deepcopy(original)
    branches = plain_form(model)
    # `where`: by their names 1 x 1 convolutions get branches too.
    search = gr.csla.hyper_search_model(model, where=list(branches), branches=lambda name, conv: branches[name])
    coverage = gr.csla.coverage(search)
    print(*(f"  {line}" for line in str(coverage).splitlines()[:4]), sep="\n")

    of_original = train(original, torch.optim.SGD(original.parameters(), lr=0.01, momentum=0.9), batches)
    of_search = train(search, torch.optim.SGD(gr.param_groups(search, 4e-5), lr=0.01, momentum=0.9), batches)
    scales = gr.csla.extract_scales(search)

    # `partial`: FastViT and others have further k x k convolutions, which timm trains without branches too.
    gr.csla.reinitialize(model, scales, partial=True)
    adam = copy.deepcopy(model)
    mults = gr.csla.grad_mults(model, scales, partial=True)
    sgd = gr.FusedRepSGD(gr.param_groups(model, 4e-5), lr=0.01, momentum=0.9, grad_mults=mults)
    of_ours = train(model, sgd, batches)
    by_branch = gr.csla.branch_scales(adam, scales, partial=True)
    train(adam, gr.FusedRepAdamW(gr.param_groups(adam, 0.05), lr=1e-3, branch_scales=by_branch), batches)

    print("  | in training | parameters | convolutions | s a step |\n  |---|---|---|---|")
    print("  " + row("timm's blocks", original, of_original))
    print("  " + row("branches with scales", search, of_search))
    print("  " + row("plain, FusedRepSGD", model, of_ours))
    deployed = gr.csla.merge(model, fold_norm=True, example=batches[0][0])
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in m.modules()) for m in (model, deployed)]
    print(f"  deployed: {norms[0] - norms[1]} of {norms[0]} norms are folded into their convolutions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="default: all of %(default)s")
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    for name in parser.parse_args().models:
        main(name, [(images[:8], labels[:8]), (images[8:], labels[8:])])
