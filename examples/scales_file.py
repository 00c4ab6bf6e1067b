"""A scales file, as the authors of RepOptimizers published some, into the network that it was searched for.

python examples/scales_file.py RepOpt-VGG-B1-scales.pth --model repopt_vgg_b1
python examples/scales_file.py     # without one: writes the file of a search that has just begun, for a small network
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import gradrep_kernels as gr


def main(file: Path, kind: str) -> None:
    scales = gr.csla.load_scales(file)  # nothing is unpickled
    model = getattr(gr.models, kind)(num_classes=10)
    print(f"{file.name}: scales of {len(scales)} blocks")
    print(gr.csla.coverage(model, scales))

    gr.csla.reinitialize(model, scales)  # names and channel counts are checked here
    mults = gr.csla.grad_mults(model, scales)
    held = sum(part.nbytes for m in mults.values() for part in (m.scale, m.identity) if part is not None)
    print(f"multipliers: {held:,} bytes; as masks of the weights' size {sum(p.nbytes for p in mults):,}")

    optimizer = gr.FusedRepSGD(gr.param_groups(model, 4e-5), lr=0.1, momentum=0.9, grad_mults=mults)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    for step in range(2):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--model", default="repopt_vgg_small", help="a name in gradrep_kernels.models")
    args = parser.parse_args()
    if args.file is not None:
        main(args.file, args.model)
    else:
        with tempfile.TemporaryDirectory() as folder:
            search = gr.csla.hyper_search_model(getattr(gr.models, args.model)(num_classes=10))
            gr.csla.save_scales(gr.csla.extract_scales(search), Path(folder, "scales.pth"))
            main(Path(folder, "scales.pth"), args.model)
