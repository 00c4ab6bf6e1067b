"""FusedRepSGD and spatial gradient scaling with Accelerate: prepare, accumulate, clip, save and resume.

accelerate launch examples/accelerate_digits.py     # or python; started again, it goes on

DeepSpeed, which flattens weights and steps by itself, is not supported. Shard by FSDP2.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from digits import accuracy, network, training_data
from torch.nn.functional import cross_entropy

import gradrep_kernels as gr


def main(folder: Path, epochs: int, cpu: bool = False) -> None:
    order = DataLoaderConfiguration(use_seedable_sampler=True)  # set_epoch says which order, also in a resumed run
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=order, cpu=cpu)
    scales = gr.csla.load_scales(folder / "scales.pth")
    model = network(seed=1)
    gr.csla.reinitialize(model, scales)
    mults = gr.csla.grad_mults(model, scales)
    optimizer = gr.FusedRepSGD(gr.param_groups(model, 1e-4), lr=0.02, momentum=0.9, grad_mults=mults)
    model, optimizer, loader = accelerator.prepare(model, optimizer, training_data())

    # The prepared ones: names are those of the model inside, and the optimizer inside is found.
    sgs = gr.SpatialGradientScaling(model, optimizer, every=5, warmup=1)
    accelerator.register_for_checkpointing(sgs)
    states = sorted(folder.glob("epoch-*"))
    if states:
        accelerator.load_state(str(states[-1]))

    for epoch in range(len(states), epochs):
        loader.set_epoch(epoch)
        sgs.update_if_due(epoch, loader)
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    # Not accelerator.clip_grad_norm_, whose norm is the plain one.
                    accelerator.unscale_gradients(optimizer)
                    gr.clip_grad_norm_(optimizer, 5.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(str(folder / f"epoch-{epoch:03}"))
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy(model):.1f} %")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default="runs/example", help="of scales and checkpoints")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if not (args.folder / "scales.pth").exists():
        parser.error(f"{args.folder} has no scales.pth: `python examples/own_loop.py {args.folder}` writes one")
    main(args.folder, args.epochs, args.cpu)
