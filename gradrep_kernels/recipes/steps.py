"""The training step: forward, backward, clipping, optimizer, in the precision and layout that the options say."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradrep_kernels.optim import GradScaler
from gradrep_kernels.optim.rep_optimizer import RepOptimizer
from gradrep_kernels.recipes import interrupts, ranks
from gradrep_kernels.recipes.build import Trainee
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.resolve import Options

__all__ = ["AMP_DTYPES", "COMPILER", "TrainingSteps"]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
COMPILER = "inductor"
_FEW_CHANNELS = 16  # in a vector of AVX-512
_BUFFERS_IN_FORWARD = next(  # torch 2.13 has a new name for it, and warns of the old one.
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


class TrainingSteps:
    """The steps of one training.

    Call it with x [n, C, H, W] and labels [n], on each rank its part of a batch. `trainee.model` stays the plain model:
    what wraps it is used for these forwards alone, so that everything else (accuracies, updates of spatial gradient
    scaling, merging, files) computes in float32 and sees names without prefixes.

    Make it before the states of model and optimizer are loaded: --channels-last and --sync-bn change the model.

    Raises InputError where there is no compiler for --compile, there or in a step, and for a network that torch's code
    for CPUs cannot train in channels_last.
    """

    def __init__(self, trainee: Trainee, options: Options):
        self.trainee, self.options = trainee, options
        self._device = torch.device(options.device).type
        model = trainee.model
        if options.channels_last:
            _check_layout(trainee, options)
            model.to(memory_format=torch.channels_last)
        if options.sync_bn and ranks.count() > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # It keeps the parameters that the optimizer holds.
        self.scaler = GradScaler(self._device) if options.amp == "fp16" else None
        self._model = self._compiled(model) if options.compile else model
        self._forward: nn.Module | None = None

    def begin_epoch(self) -> None:
        """Have the next step wrap the model anew, where several processes train together.

        So a resumed training sums gradients in the order of one that was not stopped: DistributedDataParallel lays them
        out in another order after its first backward. A model whose parts were replaced between epochs is served too.
        """
        if isinstance(self._forward, DistributedDataParallel):
            self._forward = None
            gc.collect()  # It would sum the gradients too for as long as it lives.

    def _wrapped(self) -> nn.Module:
        """What training forwards call. Rank 0's weights and buffers go to all ranks."""
        if ranks.count() == 1:
            return self._model
        ranks.share_buffers(self.trainee.model)
        # No training forward reads the statistics of norms. All get those of rank 0 after an epoch (`share_buffers`).
        return DistributedDataParallel(self._model, **{_BUFFERS_IN_FORWARD: False})

    def __call__(self, x: Tensor, labels: Tensor, images: int | None = None) -> Tensor:
        """Do one step, and return the mean loss of x [n, C, H, W] without its graph.

        Args:
            images: of the whole batch, over all ranks. None: as many as here on each.
        """
        options, optimizer = self.options, self.trainee.optimizer
        if self._forward is None:
            self._forward = self._wrapped()
        optimizer.zero_grad()
        with self._compiler_errors():
            loss = self._add_gradients(x, labels, images)
        if options.clip_norm is not None and not isinstance(optimizer, RepOptimizer):  # that clips in its step
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.trainee.model.parameters(), options.clip_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        return loss

    def _add_gradients(self, x: Tensor, labels: Tensor, images: int | None) -> Tensor:
        """Those of the mean loss over the whole batch, and return the mean loss of x."""
        options = self.options
        if options.channels_last:
            x = x.to(memory_format=torch.channels_last)
        # DistributedDataParallel takes the mean over the ranks, whose parts may differ by one image.
        share = 1.0 if images is None else len(x) * ranks.count() / images
        parts = list(zip(x.tensor_split(options.accumulate), labels.tensor_split(options.accumulate)))
        losses = []
        for n, (part, of_part) in enumerate(parts, 1):
            with self._gradients_stay_here() if n < len(parts) else contextlib.nullcontext():
                with self._autocast():
                    loss = F.cross_entropy(self._forward(part), of_part, label_smoothing=options.label_smoothing)
                weight = len(part) / len(x)
                losses.append(loss.detach() if weight == 1 else loss.detach() * weight)
                if weight * share != 1:
                    loss = loss * (weight * share)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager:
        """They are summed over the ranks once, with those of the last part."""
        wrapper = self._forward
        return wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else contextlib.nullcontext()

    def _autocast(self) -> contextlib.AbstractContextManager:
        amp = self.options.amp
        return contextlib.nullcontext() if amp is None else torch.autocast(self._device, AMP_DTYPES[amp])

    def _compiled(self, model: nn.Module) -> nn.Module:
        with interrupts.held_back():  # It imports Triton's C++ module.
            import torch._dynamo
        # A process keeps code for eight networks of one class, and trains further ones without the compiler.
        torch._dynamo.reset()
        try:
            return torch.compile(model, backend=COMPILER)
        except RuntimeError as reason:  # a Python that it does not know
            raise _no_compiler(reason) from None

    @contextlib.contextmanager
    def _compiler_errors(self) -> Iterator[None]:
        if not self.options.compile:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException

        try:
            yield
        except TorchDynamoException as reason:
            raise _no_compiler(reason) from None


def _check_layout(trainee: Trainee, options: Options) -> None:
    """Raise InputError for a strided 1x1 convolution of few channels in channels_last on a CPU.

    torch's oneDNN writes past the end of its workspace in that convolution's backward, and the process dies there or
    later (https://github.com/uxlfoundation/oneDNN/issues/6035). The first block of a RepVGG for ImageNet has one. Seen
    with torch 2.13.0 on AVX-512 in bfloat16. With AVX2 float32 is concerned too, so every precision is refused.
    """
    if torch.device(options.device).type != "cpu":
        return
    grows = trainee.structure is not None  # A 1x1 may come beside a convolution of any size.
    for name, conv in trainee.model.named_modules():
        few = isinstance(conv, nn.Conv2d) and conv.in_channels // conv.groups < _FEW_CHANNELS
        if few and (conv.kernel_size == (1, 1) or grows) and max(conv.stride) > 1:
            raise InputError(
                "--channels-last on a CPU: torch's oneDNN writes past the end of memory in the backward of a "
                f"strided 1x1 convolution of few channels, as {name} {'may get' if grows else 'is'} (its issue 6035); "
                "leave --channels-last out"
            )


def _no_compiler(reason: Exception) -> InputError:
    said = next((line.strip() for line in str(reason).splitlines() if line.strip()), type(reason).__name__)
    return InputError(f"--compile: torch.compile does not work here ({said}); leave it out")
