"""The callbacks of Lightning without their base class, of which `lightning` and `pytorch_lightning` have one each."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from gradrep_kernels.optim import clip_grad_norm_
from gradrep_kernels.optim.rep_optimizer import RepOptimizer
from gradrep_kernels.sgs import SpatialGradientScaling
from gradrep_kernels.wrappers import inner_optimizer

__all__ = ["ClipGradNorm", "SpatialGradientScalingCallback", "ValidateAverages"]

logger = logging.getLogger(__name__)


class SpatialGradientScalingCallback:
    """Runs a SpatialGradientScaling controller in a Trainer, and keeps its state in the Trainer's checkpoints.

        trainer = Trainer(callbacks=[SpatialGradientScalingCallback(every=5, warmup=1)])

    The controller is made when training starts, and is the attribute `sgs` from then on. An update runs at the start of
    each training epoch that is due, with batches of the training dataloader. They take the way of the Trainer's own:
    through its precision, its device and the module's batch-transfer hooks. The number `sgs_centre` is logged in each
    epoch. It is G at the centre, averaged over the convolutions: 1 at first, and the larger the less pixels tell of
    their neighbours.

    `fit(ckpt_path=...)` goes on with the scalings of the checkpoint, as a run that was never stopped. All ranks pool
    their batches under DDP and FSDP2. FullyShardedDataParallel (`strategy="fsdp"`) and DeepSpeed flatten weights, which
    cannot be scaled then. In a Trainer the step runs the forward: `every_steps` takes effect from the next step on.

    Put it behind callbacks that unfreeze layers: it updates those that the optimizer holds by then.

    Args:
        optimizer: position among the Trainer's optimizers. It may be left out where there is one.
        forward:   forward(module, batch) for the update. The batch is the one that `training_step` is given. Without
                   it, the module is called with the batch, or with the first part of a tuple or list.
        options:   of SpatialGradientScaling: k, every, warmup, batches, every_steps and so on.

    Raises, when training starts, ValueError for several optimizers without `optimizer`, for several training
    dataloaders (override `loader`), and for a module without a forward of its own.
    """

    def __init__(
        self,
        *,
        optimizer: int | None = None,
        forward: Callable[[Any, Any], object] | None = None,
        **options: Any,
    ):
        inspect.signature(SpatialGradientScaling).bind(None, None, **options)  # a misspelt name is told here
        super().__init__()
        self.sgs: SpatialGradientScaling | None = None
        self._position, self._forward, self._options = optimizer, forward, options
        self._epoch: int | None = None  # the last one whose start was seen
        self._loaded: dict[str, Any] | None = None  # for the controller that is not there yet

    @property
    def state_key(self) -> str:
        """The name of the state in a checkpoint: one for each optimizer."""
        return type(self).__qualname__ if self._position is None else f"{type(self).__qualname__}[{self._position}]"

    def loader(self, trainer: Any) -> Iterable[Any]:
        """Return what batches are drawn from. Override it where the Trainer has several training dataloaders."""
        loader = trainer.train_dataloader
        if isinstance(loader, (list, tuple, Mapping)):
            kind = type(loader).__name__
            raise ValueError(
                f"train_dataloader is a {kind}; override loader(trainer) to return one, or use every_steps"
            )
        if isinstance(loader, DataLoader) and loader.persistent_workers:
            # The Trainer has its iterator for this epoch already, and a loader with such workers has but one.
            loader = copy.copy(loader)
            loader._iterator = None
        return loader

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Not on_fit_start: callbacks that unfreeze layers, and the checkpoint, have changed the optimizer by now.
        options, state = self._options, self.state_dict()
        optimizer = _chosen(trainer.optimizers, self._position)
        if options.get("every_steps") is None:
            self.loader(trainer)
            if self._forward is None and type(pl_module).forward.__qualname__ == "LightningModule.forward":
                raise ValueError(f"{type(pl_module).__name__} has no forward: give it one, or give forward=")
        if self.sgs is not None:
            self.sgs.remove()
        self.sgs = SpatialGradientScaling(pl_module, optimizer, **options)
        if state:
            self.sgs.load_state_dict(state["sgs"])
        self._epoch, self._loaded = None if self._loaded is None else self._loaded["epoch"], None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        if self.sgs is None or epoch == self._epoch:  # resumed within the epoch, whose update is in the checkpoint
            return
        self._epoch = epoch
        loader = self.loader(trainer) if self.sgs.every_steps is None else ()
        with trainer.precision_plugin.forward_context():
            if self.sgs.update_if_due(epoch, loader, self._call(trainer)):
                logger.info("spatial gradient scalings updated at the start of epoch %d", epoch)
        centres = [float(g[g.shape[0] // 2, g.shape[1] // 2]) for g in self.sgs.scalings.values()]
        if centres:
            pl_module.log("sgs_centre", statistics.fmean(centres), sync_dist=True)

    def _call(self, trainer: Any) -> Callable[[Any, Any], object]:
        forward = self._forward or _with_first_part

        def call(module: Any, batch: Any) -> object:
            batch = trainer.precision_plugin.convert_input(batch)
            for holder in (module, getattr(trainer, "datamodule", None)):
                batch = batch if holder is None else holder.on_before_batch_transfer(batch, 0)
            return forward(module, trainer.strategy.batch_to_device(batch))

        return call

    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:
            return self._loaded
        return {} if self.sgs is None else {"epoch": self._epoch, "sgs": self.sgs.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


class ClipGradNorm:
    """Clips by the gradient norm of the CSLA model, √(Σ M ⊙ g²), which keeps CSLA = GR exactly.

        trainer = Trainer(callbacks=[ClipGradNorm(1.0)])

    It takes the place of the Trainer's `gradient_clip_val`, whose norm is the plain one. All optimizers must be ones
    with Grad Mult. Gradients are unscaled and accumulated by then. The norm of the last step, before clipping, is the
    attribute `last_grad_norm`  # []

    Raises ValueError if `gradient_clip_val` or the optimizer's `max_grad_norm` is set too, and under a GradScaler for
    an optimizer with fused=True.
    """

    def __init__(self, max_norm: float):
        super().__init__()
        self.max_norm = float(max_norm)
        self.last_grad_norm: Tensor | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.gradient_clip_val is not None:
            raise ValueError(
                f"gradient_clip_val is {trainer.gradient_clip_val}, which would clip by the plain norm as well; "
                "leave it out, ClipGradNorm clips"
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scales = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scales and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                "fused=True leaves gradients scaled until the step, so they cannot be clipped; leave it out"
            )
        inner = inner_optimizer(optimizer)
        if isinstance(inner, RepOptimizer) and inner.max_grad_norm is not None:
            raise ValueError(f"max_grad_norm is {inner.max_grad_norm}: the step clips, so leave ClipGradNorm out")
        self.last_grad_norm = clip_grad_norm_(inner, self.max_norm)


class ValidateAverages:
    """Has each validation of a fit see the averages of the weights, of all optimizers that have an `ema_decay`.

        trainer = Trainer(callbacks=[ValidateAverages()])

    After it the weights are back. So a `ModelCheckpoint` that follows a metric of averages saves weights as the model's
    own, and averages with the optimizer's state. Norm statistics stay those of the weights.

    Raises ValueError, when training starts, where no optimizer has an `ema_decay`.
    """

    def __init__(self):
        super().__init__()
        self._inside = contextlib.ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not _averaging(trainer):
            raise ValueError("no optimizer of the Trainer keeps averages: give one an ema_decay, such as 0.9998")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in _averaging(trainer):
            self._inside.enter_context(optimizer.swap_ema())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._inside.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._inside.close()


def _averaging(trainer: Any) -> list[RepOptimizer]:
    inner = map(inner_optimizer, trainer.optimizers)
    return [optimizer for optimizer in inner if isinstance(optimizer, RepOptimizer) and optimizer.ema_decay is not None]


def _chosen(optimizers: list[Any], position: int | None) -> Any:
    if position is None and len(optimizers) == 1:
        return optimizers[0]
    if position is None or not 0 <= position < len(optimizers):
        kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(
            f"optimizer must be a position among the {len(optimizers)} of the Trainer ({kinds}), got {position}"
        )
    return optimizers[position]


def _with_first_part(module: Any, batch: Any) -> object:
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
