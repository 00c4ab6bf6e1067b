"""YOLOv6's RepOpt training with FusedRepSGD in the place of its RepVGGOptimizer, and three steps of both compared.

python examples/yolov6.py CHECKOUT                                              # of meituan/YOLOv6
python examples/yolov6.py CHECKOUT --scales runs/train/yolov6n_hs/weights/last_ckpt.pt --model yolov6n
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import gradrep_kernels as gr


def scales_of(file: Path) -> gr.csla.Scales:
    """Of a scales file, or of a checkpoint of the Hyper-Search."""
    try:
        return gr.csla.load_scales(file)
    except ValueError:
        # YOLOv6 pickles its model. Reading that runs code: only from files that you trust.
        return gr.csla.extract_scales(torch.load(file, map_location="cpu", weights_only=False)["model"].float())


def main(checkout: Path, kind: str, file: Path | None) -> float:
    sys.path.insert(0, str(checkout))
    from yolov6.models.yolo import build_model
    from yolov6.utils.config import Config
    from yolov6.utils.RepOptimizer import RepVGGOptimizer, extract_blocks_into_list, get_optimizer_param

    def model_of(what: str) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = build_model(Config.fromfile(str(checkout / f"configs/repopt/{kind}_{what}.py")), 80, "cpu")
        return model.train()

    if file is not None:
        scales = scales_of(file)
    else:  # the checkpoint of a search that has just begun
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"model": model_of("hs")}, Path(folder, "last_ckpt.pt"))
            scales = scales_of(Path(folder, "last_ckpt.pt"))
    cfg = SimpleNamespace(solver=SimpleNamespace(lr0=0.01, momentum=0.937, weight_decay=5e-4))
    args = SimpleNamespace(batch_size=64)

    # These lines replace RepVGGOptimizer(model, scales, args, cfg, reinit=True) of yolov6/core/engine.py. The search
    # was of the RepVGG blocks alone: the convolutions of heads and downsampling have no scales, hence `partial`.
    model = model_of("opt")
    gr.csla.reinitialize(model, scales, partial=True)
    mults = gr.csla.grad_mults(model, scales, partial=True)
    groups = get_optimizer_param(args, cfg, model)
    solver = cfg.solver
    ours = gr.FusedRepSGD(groups, lr=solver.lr0, momentum=solver.momentum, nesterov=True, grad_mults=mults)
    print(str(gr.csla.coverage(model, scales)).splitlines()[0])

    # Theirs, on a twin. It takes the scales of each block as a tuple, in the order of the blocks.
    twin = model_of("opt")
    twin.load_state_dict(model.state_dict())
    blocks: list[nn.Module] = []
    extract_blocks_into_list(twin, blocks)
    names = {module: name for name, module in twin.named_modules()}
    found = [scales[names[block]] for block in blocks]
    tuples = [tuple(s for s in (b.identity, b.one_by_one, b.kxk) if isinstance(s, Tensor)) for b in found]
    theirs = RepVGGOptimizer(twin, tuples, args, cfg, reinit=False, cpu_mode=True)

    worst = 0.0
    for step in range(3):
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        outputs = [x for x in torch.utils._pytree.tree_leaves(model(images)) if isinstance(x, Tensor)]
        ours.zero_grad()
        torch.stack([x.square().mean() for x in outputs if x.requires_grad]).sum().backward()
        for p, q in zip(model.parameters(), twin.parameters()):
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        theirs.step()
        pairs = zip(model.parameters(), twin.parameters())
        worst = max((p - q).detach().abs().max().item() for p, q in pairs)
        print(f"step {step}: the weights differ from those of RepVGGOptimizer by {worst:.1e} at most")
    held = sum(part.nbytes for m in mults.values() for part in (m.scale, m.identity) if part is not None)
    print(f"multipliers: {held:,} bytes; RepVGGOptimizer's masks {sum(p.nbytes for p in mults):,}")
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--model", default="yolov6n", help="a name in configs/repopt, without _hs.py and _opt.py")
    parser.add_argument("--scales", type=Path, help="a scales file, or a checkpoint of the Hyper-Search")
    args = parser.parse_args()
    main(args.checkout, args.model, args.scales)
