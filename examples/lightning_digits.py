"""FusedRepSGD and spatial gradient scaling in Lightning, with two callbacks. Checkpoints hold everything.

python examples/lightning_digits.py runs/lightning                              # search, then training
python examples/lightning_digits.py runs/lightning --resume CKPT --epochs 6     # goes on from a checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from digits import accuracy, network, training_data
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import gradrep_kernels as gr
from gradrep_kernels.integrations.lightning import ClipGradNorm, SpatialGradientScalingCallback


class Digits(L.LightningModule):
    def __init__(self, net: nn.Module, scales: gr.csla.Scales | None = None):
        super().__init__()
        self.net, self.scales = net, scales

    def forward(self, images: Tensor) -> Tensor:  # the SGS callback calls it
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("test_accuracy", accuracy(self.net), prog_bar=True)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # Lightning tells this sampler the epoch, from which it draws the order: a resumed run has the same batches.
        dataset = training_data().dataset
        order: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(dataset, num_replicas=1, rank=0)
        return DataLoader(dataset, 32, sampler=order, drop_last=True)

    def configure_optimizers(self) -> Any:
        groups = gr.param_groups(self.net, 1e-4)
        if self.scales is None:  # the Hyper-Search
            return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        mults = gr.csla.grad_mults(self.net, self.scales)
        optimizer = gr.FusedRepSGD(groups, lr=0.02, momentum=0.9, grad_mults=mults)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def fit(module: Digits, epochs: int, callbacks: list[L.Callback], resume: Path | None = None) -> L.Trainer:
    trainer = L.Trainer(  # no gradient_clip_val: that norm is the plain one, ClipGradNorm has the right one
        max_epochs=epochs,
        callbacks=callbacks,
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=resume)
    return trainer


def main(folder: Path, epochs: int, resume: Path | None) -> Digits:
    scales_file = folder / "scales.pth"
    if not scales_file.exists():
        search = Digits(gr.csla.hyper_search_model(network()))
        fit(search, 2, [])
        gr.csla.save_scales(gr.csla.extract_scales(search.net), scales_file)
    scales = gr.csla.load_scales(scales_file)

    net = network(seed=1)
    gr.csla.reinitialize(net, scales)  # a resumed run overwrites these weights
    module = Digits(net, scales)
    keep = ModelCheckpoint(folder / "checkpoints", "{epoch}", save_top_k=-1)
    callbacks = [SpatialGradientScalingCallback(every=5, warmup=1), ClipGradNorm(5.0), keep]
    trainer = fit(module, epochs, callbacks, resume)
    metrics = {name: round(float(value), 3) for name, value in trainer.callback_metrics.items()}
    print(f"after {trainer.current_epoch} epochs: {metrics}")
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?", default="runs/example", help="of scales and checkpoints")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--resume", type=Path, help="a checkpoint")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    main(args.folder, args.epochs, args.resume)
