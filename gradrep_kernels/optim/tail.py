"""The options of the end of a step: clipping, averages of the weights, states in bfloat16. And the count of steps."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradrep_kernels.captures import capturing
from gradrep_kernels.dtensor import local
from gradrep_kernels.ops.reference.multiply import compute_dtype
from gradrep_kernels.optim.update_rule import State

EmaDecay = float | Tensor | Callable[[int], float | Tensor]

AVERAGE = State("ema", dtype=lambda param, grad: compute_dtype(param))
"""The moving average of a parameter, which any optimizer can keep beside the states of its rule."""

STEPS, SEED = "step_count", "rounding_seed"
"""In each parameter group of a checkpoint. Distributed checkpoint drops what is beside states and groups."""

MOST = 2**53
"""Steps and seeds are below it: they go to the ops as float64."""


class TailOptions:
    """What one optimizer was asked for, and how many steps it has taken while that needs to be known.

    Steps are counted on the host. A CUDA graph repeats what the host did at its capture, so from the first capture on
    they are counted on the device: `_replays` has those that the host did not count.
    """

    def __init__(
        self,
        max_grad_norm: float | None = None,
        ema_decay: EmaDecay | None = None,
        state_dtype: torch.dtype | None = None,
    ):
        self.max_grad_norm, self.ema_decay = _checked_norm(max_grad_norm), _checked_option(ema_decay)
        self.state_dtype = state_dtype
        self.version = 0  # counts the changes of options, so that a plan can tell
        self.swapped = False  # whether the weights are the averages now
        self.last_norm: Tensor | None = None
        self.known_norm: Tensor | None = None  # of the gradients that the next step finds, before unscaling
        self.seed, self.steps = 0, 0
        self._replays: Tensor | None = None
        self._counts_on_device = False
        self._asked: float | Tensor | None = None  # the decay that a schedule gave for the step that comes next

    def check(self, differentiable: bool) -> None:
        if differentiable and self.is_used:
            raise ValueError(
                "differentiable=True takes torch's functional step, which has no max_grad_norm, ema_decay or "
                "momentum_dtype: leave these at None"
            )

    def take_over(self, other: TailOptions) -> None:
        """Change the options that may change in a training."""
        self.max_grad_norm, self.ema_decay, self._asked = other.max_grad_norm, other.ema_decay, None
        self.version += 1

    @property
    def averages(self) -> bool:
        return self.ema_decay is not None

    @property
    def is_used(self) -> bool:
        return self.counts or self.max_grad_norm is not None

    @property
    def counts(self) -> bool:
        """Whether steps need a number."""
        return self.ema_decay is not None or self.state_dtype is not None

    def numbers(self, device: torch.device) -> list[float | Tensor]:
        """The numbers of the step that comes next (step_tail.COLUMNS), none where nobody needs them.

        Raises ValueError where ema_decay gives no number in [0, 1].
        """
        if not self.counts:
            return []
        decay, step = self.ema_decay, self.steps + 1
        if callable(decay):
            if self._asked is None:  # a planned step that cannot be taken has asked already
                self._asked = checked_decay(decay(step), f"ema_decay({step})")
            decay = self._asked
        elif isinstance(decay, Tensor):  # it may have been written to
            checked_decay(decay, "ema_decay")
        if device.type != "cpu":
            step = self._counted(device)
        return [0.0 if decay is None else decay, float(self.state_dtype is not None), self.seed, step]

    def _counted(self, device: torch.device) -> int | Tensor:
        """The number of the next step on a GPU: a tensor there once a graph has captured a step."""
        if capturing(device):
            if self._replays is None:
                raise RuntimeError("a CUDA graph captures a step whose number counts: take one step before the capture")
            self._counts_on_device = True
        elif self._replays is None or self._replays.device != device:
            self._replays = torch.full((), float(self.replays()), dtype=torch.float64, device=device)
        return self._replays + (self.steps + 1) if self._counts_on_device else self.steps + 1

    def take_known_norm(self, grad_scale: Tensor | None) -> Tensor | None:
        """The norm of the next step's gradients after unscaling, where somebody has asked for it before the step."""
        norm, self.known_norm = self.known_norm, None
        return None if norm is None else unscaled(norm, grad_scale)

    def took(self, device: torch.device, norm: Tensor | None) -> None:
        """Count a step that has been taken, or that a graph has captured. `norm` is that of its gradients, or None."""
        self._asked = None
        if norm is not None:
            self.last_norm = norm
        if not self.counts:
            return
        if self._counts_on_device and self._replays is not None and self._replays.device == device:
            self._replays.add_(1)
        else:
            self.steps += 1

    def replays(self) -> int:
        return 0 if self._replays is None else int(self._replays)

    def save(self, groups: list[dict[str, Any]]) -> None:
        """Put what checkpoints need into the groups. It waits for the device once a graph has captured a step."""
        for group in groups:
            for key in (STEPS, SEED):
                group.pop(key, None)
            if self.counts:
                group.update({STEPS: self.steps + self.replays(), SEED: self.seed})

    def restore(self, groups: list[dict[str, Any]]) -> None:
        """Take over what `save` put into the groups of a checkpoint. Without it no step has been taken."""
        counted = [group for group in groups if STEPS in group]
        if self._replays is not None:
            self._replays.zero_()
        self.steps, self._asked = max((group[STEPS] for group in counted), default=0), None
        if counted:
            self.seed = counted[0].get(SEED, 0)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        return {
            **state,
            "steps": self.steps + self.replays(),
            "_replays": None,
            "_counts_on_device": False,
            **dict.fromkeys(("last_norm", "known_norm", "_asked")),
            "swapped": False,
        }


def check_counts(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError where the groups of a checkpoint have a step count or a seed that none can be."""
    for group in groups:
        for key in (STEPS, SEED):
            checked_count(group.get(key, 0), f"{key} of a group in the checkpoint")


def checked_count(value: Any, what: str) -> int:
    """Return a number of steps or a seed as it is."""
    if not isinstance(value, int) or not 0 <= value < MOST:
        raise ValueError(f"{what} must be an integer in [0, 2^53), got {value!r}")
    return value


def first_average(param: Tensor) -> Tensor:
    """The average of a parameter at its beginning: its weight."""
    return param.detach().to(compute_dtype(param.dtype), copy=True)


@torch.no_grad()
def average_idle(idle: Sequence[tuple[Tensor, Tensor]], decay: float | Tensor, found_inf: Tensor | None) -> None:
    """e ← e + (1 − decay) (W − e) where there is no gradient, which no step op sees: averages go on as all others do.

    Args:
        idle: weights and their averages
    """
    kinds = [(average.device, average.dtype) for _, average in idle]
    for device, dtype in dict.fromkeys(kinds):
        pairs = [(local(p), local(average)) for (p, average), kind in zip(idle, kinds) if kind == (device, dtype)]
        averages = [average for _, average in pairs]
        moved = torch._foreach_sub([p.to(dtype) for p, _ in pairs], averages)
        rest = 1 - decay
        torch._foreach_mul_(moved, rest.reshape(()).to(device, dtype.to_real()) if isinstance(rest, Tensor) else rest)
        torch._foreach_add_(moved, averages)
        if found_inf is not None:
            skipped = found_inf.to(device) != 0
            moved = [torch.where(skipped, *both) for both in zip(averages, moved)]
        torch._foreach_copy_(averages, moved)
    torch.autograd.graph.increment_version([average for _, average in idle])


def unscaled(norm: Tensor, grad_scale: Tensor | None) -> Tensor:
    """The norm that gradients have once they are divided by `grad_scale`  # []"""
    return norm if grad_scale is None else norm / grad_scale.to(norm.device, norm.dtype)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """min(1, max / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it  # []"""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def as_number(value: Any, what: str) -> float:
    """Return a number, or a tensor of one, as a float. Raises TypeError otherwise: float() would take a string."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    raise TypeError(f"{what} must be a number, got {type(value).__name__}")


def checked_decay(decay: Any, what: str) -> float | Tensor:
    """Return a decay as it is. A number must be in [0, 1]. A tensor on a device is not looked at, for that waits."""
    if isinstance(decay, Tensor):
        if decay.numel() != 1 or not decay.is_floating_point():
            raise ValueError(f"{what} must be one floating-point number, got {decay.dtype} {list(decay.shape)}")
        if decay.device.type != "cpu":
            return decay
    if not 0 <= as_number(decay, what) <= 1:
        raise ValueError(f"{what} must be a number in [0, 1], got {decay}")
    return decay


def _checked_option(decay: EmaDecay | None) -> EmaDecay | None:
    return decay if decay is None or callable(decay) else checked_decay(decay, "ema_decay")


def _checked_norm(max_norm: float | None) -> float | None:
    if max_norm is None:
        return None
    number = as_number(max_norm, "max_grad_norm")
    if not number > 0 or math.isnan(number):
        raise ValueError(f"max_grad_norm must be above 0, got {max_norm}; None turns clipping off")
    return number
