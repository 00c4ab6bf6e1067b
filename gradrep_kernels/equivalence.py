"""The check CSLA = GR on any model: explicit branches and Grad Mults train the same network.

Source: RepOptimizers (Ding et al., 2023), section 3.2 and Appendix A.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial as bound
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.convert import merge
from gradrep_kernels.branches.csla import csla_model, extract_scales, hyper_search_model
from gradrep_kernels.branches.pairs import floating_outputs
from gradrep_kernels.branches.reinitialize import reinitialize
from gradrep_kernels.branches.scales import Scales, branch_scales, grad_mults
from gradrep_kernels.dtensor import is_dtensor
from gradrep_kernels.messages import counted
from gradrep_kernels.optim import FusedRepAdamW, FusedRepSGD, param_groups
from gradrep_kernels.sgs.batches import Forward, call_of, draw
from gradrep_kernels.sgs.passes import generators, random_states
from gradrep_kernels.wrappers import unwrapped

__all__ = ["TOLERANCE", "Equivalence", "check_equivalence"]

TOLERANCE = 1e-10
"""Largest accepted difference. float64 rounds at 1e-16, and 100 steps with batch norms raise that to about 1e-13."""
_SEED = 0  # of scales and targets that the check makes up, so that a second check gives the same figures

_OF_DTYPES = ("dtype", "scalar type", "Input type")  # in torch's messages

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, repr=False)
class Equivalence:
    """What `check_equivalence` found. `str` is one line, and it is true where both trainings agree."""

    steps: int
    outputs: float
    """The largest absolute difference of the outputs, over all steps."""
    weights: float
    """That of all weights and buffers at the end, after the branches are merged."""
    tolerance: float = TOLERANCE
    note: str = ""
    """Why they may differ, where that is known."""

    @property
    def agrees(self) -> bool:
        """Whether both differences are within the tolerance."""
        return self.outputs <= self.tolerance and self.weights <= self.tolerance

    def __bool__(self) -> bool:
        return self.agrees

    def __repr__(self) -> str:
        steps = counted(self.steps, "step")
        return (
            f"CSLA = GR in float64 over {steps}: outputs differ by at most {self.outputs:.1e}, weights by "
            f"{self.weights:.1e} ({'within' if self.agrees else 'NOT within'} {self.tolerance:.0e})"
            + (f". {self.note}" if self.note and not self.agrees else "")
        )


def check_equivalence(
    model: nn.Module,
    scales: Mapping[str, BranchScales] | None,
    batches: Iterable,
    *,
    loss: Loss | None = None,
    forward: Forward | None = None,
    steps: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    partial: bool = False,
    tolerance: float = TOLERANCE,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-4,
    amsgrad: bool = False,
) -> Equivalence:
    """Train copies of a plain model both ways, in float64, and compare them.

        print(gr.csla.check_equivalence(model, scales, train_loader))

    One is `csla_model(model, scales)`, whose branches are real, with torch.optim.SGD. The other is the plain model
    after `reinitialize`, with FusedRepSGD and `grad_mults`. With optimizer="adamw" they have torch.optim.AdamW, and
    FusedRepAdamW with `branch_scales`. Both start from the model's present weights, are in its modes, see the same
    batches and draw the same random numbers (dropout).

    Args:
        scales:       as `grad_mults` takes them. None: the initial ones of a Hyper-Search, each channel's times a
                      factor between 0.5 and 1.5 (from a fixed seed), so that channels differ as after a search.
        batches:      iterable (a DataLoader), begun again where it ends before the steps do. A Tensor goes to model(b),
                      a tuple or list to model(b[0]), a dict to model(**b), in float64 on the device of the model.
        loss:         loss(output, batch) -> Tensor []. None: the mean square distance of the floating-point outputs
                      from random targets, which needs no labels.
        forward:      forward(model, batch) instead of the calls above.
        steps:        how many. Fewer are made where `batches` cannot be begun again, and `.steps` counts them.
        lr, weight_decay: of both optimizers. The weight decay is that of `gr.param_groups`. Scales with constant
                      branches need 0, for those decay with the merged kernel and not as branches.
        momentum:     of SGD alone.
        partial:      scales may leave out convolutions and identity branches.
        tolerance:    for `.agrees`. Where outputs are larger than 1e3 or steps many, rounding alone may exceed 1e-10.
        optimizer:    "sgd" or "adamw".
        betas, eps, amsgrad: of AdamW alone. A bias before a batch norm has no gradient but rounding, 1e-17. AdamW
                      divides that by `eps`: torch's default of 1e-8 lets such biases differ by 4e-10 after 60 steps,
                      while outputs and other weights agree to 1e-14.

    The model, its gradients, modes and buffers, the random states and those of the loader are afterwards as before.
    Hooks on converted convolutions do not come along. A forward that computes a part in float32 differs by about 1e-7.

    Raises:
        TypeError:  no model, a batch of another kind, or a model that does not run in float64.
        ValueError: an optimizer of another name, scales that do not fit, a model that cannot be compared (sharded, no
                    copies, nothing to train, other outputs for the same input), no batch, no floating-point output, a
                    loss that is no scalar or reaches no converted convolution.
        FloatingPointError: the training diverges.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int, 1 or more, got {steps!r}")
    if optimizer not in ("sgd", "adamw"):
        raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
    model = unwrapped(model)
    _check_place(model)
    with _untouched(model, batches), torch.enable_grad():
        target = _double_copy(model)
        exact = _example_scales(target) if scales is None else {name: _double(value) for name, value in scales.items()}
        same_again = random_states(_gpus(model))
        explicit = csla_model(target, exact, partial=partial)
        _call_all(same_again)  # Both draw the same 1x1 kernels.
        reinitialize(target, exact, force=True, partial=partial)
        groups, rep_groups = _trained(explicit, weight_decay), _trained(target, weight_decay)
        plain: torch.optim.Optimizer
        rep: FusedRepSGD | FusedRepAdamW
        converted: Iterable[Tensor]
        if optimizer == "sgd":
            mults = converted = grad_mults(target, exact, partial=partial)
            plain = torch.optim.SGD(groups, lr=lr, momentum=momentum)
            rep = FusedRepSGD(rep_groups, lr=lr, momentum=momentum, grad_mults=mults)
        else:
            branched = converted = branch_scales(target, exact, partial=partial)
            plain = torch.optim.AdamW(groups, lr, betas, eps, amsgrad=amsgrad)
            rep = FusedRepAdamW(rep_groups, lr, betas, eps, amsgrad=amsgrad, branch_scales=branched)
        targets = torch.Generator().manual_seed(_SEED)
        largest, made = 0.0, 0
        for batch in _repeated(batches, steps):
            item = _double_item(batch, forward)
            if made == 0:
                _check_repeatable(target, item, forward)
            state, same_again = targets.get_state(), random_states(_gpus(model))
            expected = _step(explicit, plain, item, batch, forward, loss or bound(_distance, targets))
            targets.set_state(state)
            _call_all(same_again)
            found = _step(target, rep, item, batch, forward, loss or bound(_distance, targets))
            if not all(bool(torch.isfinite(y).all()) for y in expected):
                raise FloatingPointError(f"the outputs are not finite at step {made + 1}; an lr below {lr} may help")
            if made == 0 and not any(w.grad is not None and bool(w.grad.any()) for w in converted):
                raise ValueError("loss: no converted convolution has a gradient, so that there is nothing to compare")
            largest = max([largest, *(_difference(a, b) for a, b in zip(expected, found))])
            made += 1
    if made == 0:
        raise ValueError("batches is empty: the check needs at least one")
    merged = merge(explicit).state_dict()
    tensors = {name: t for name, t in target.state_dict().items() if isinstance(t, Tensor)}
    weights = max(_difference(merged[name], t) for name, t in tensors.items())
    constants = any(value.constant_identity or value.constant_average for value in exact.values())
    note = "Constant branches do not decay as the kernel does: weight_decay=0 compares what is exact"
    return Equivalence(made, largest, weights, tolerance, note if constants and weight_decay else "")


def _check_place(model: nn.Module) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_dtensor(t) for t in tensors):
        raise ValueError("model is sharded (DTensor): check it before it is")
    for kind in sorted({t.device.type for t in tensors} & {"meta", "mps"}):
        raise ValueError(f"model is on {kind}, which cannot compute in float64: check it on the CPU")


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.is_cuda})


def _call_all(restorations: list[Callable[[], None]]) -> None:
    for restore in restorations:
        restore()


@contextmanager
def _untouched(model: nn.Module, batches: object) -> Iterator[None]:
    """Restore the random states afterwards, those of the loader included. Autocast leaves float64 alone."""
    restorations = random_states(_gpus(model)) + [bound(g.set_state, g.get_state()) for g in generators(batches)]
    with ExitStack() as stack:
        for restore in restorations:
            stack.callback(restore)
        yield


def _double_copy(model: nn.Module) -> nn.Module:
    try:
        twin = copy.deepcopy(model)
    except Exception as reason:  # a class may fail in any way to copy itself
        raise ValueError(
            f"model cannot be copied, and the check trains copies: {type(reason).__name__}: {reason}"
        ) from reason
    return twin.double()


def _double(value: BranchScales) -> BranchScales:
    """Scales in float64, so that Σα² is not rounded to float32, as the branches' α·α is not."""
    if not isinstance(value, BranchScales):
        raise TypeError(f"scales must map names to BranchScales, got {type(value).__name__}")
    return value.mapped(Tensor.double)


def _example_scales(model: nn.Module) -> Scales:
    generator = torch.Generator().manual_seed(_SEED)

    def varied(scale: Tensor) -> Tensor:
        factor = 0.5 + torch.rand(scale.shape, generator=generator, dtype=torch.float64)
        return scale.double() * factor.to(scale.device)

    return {name: value.mapped(varied) for name, value in extract_scales(hyper_search_model(model)).items()}


def _trained(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    groups = param_groups(model, weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError("model has no parameter that trains (requires_grad)")
    return groups


def _repeated(batches: Iterable, steps: int) -> Iterator[Any]:
    """Yield up to `steps` batches. An iterable that ends earlier is begun again, unless it gives nothing then."""
    left = steps
    while left:
        before = left
        for batch in batches:
            yield tree_map(_wide, batch)
            left -= 1
            if left == 0:
                return
        if left == before:
            return


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _double_item(batch: Any, forward: Forward | None) -> Any:
    """Return what the model is given of a batch."""
    drawn: list = []
    draw([batch], 1, forward, drawn)
    return drawn[0]


def _called(model: nn.Module, item: Any, forward: Forward | None) -> Any:
    try:
        return call_of(model, forward)(model, item)
    except RuntimeError as reason:
        if isinstance(reason, torch.OutOfMemoryError) or not any(word in str(reason) for word in _OF_DTYPES):
            raise
        raise TypeError(
            f"the model does not run in float64, for its forward makes or casts to another dtype: {reason}"
        ) from reason


def _outputs(value: Any) -> list[Tensor]:
    outputs = floating_outputs(value)
    if not any(t.numel() for t in outputs):
        raise ValueError(f"the model gives no floating-point output to compare, but {type(value).__name__}")
    for t in outputs:
        if t.dtype != torch.float64:
            raise TypeError(f"the model does not run in float64: its forward casts, and gives {t.dtype}")
    return outputs


def _check_repeatable(model: nn.Module, item: Any, forward: Forward | None) -> None:
    """Raise ValueError where two copies give other outputs on the same input, from the same random states."""
    same_again = random_states(_gpus(model))
    outputs = []
    for twin in (copy.deepcopy(model), copy.deepcopy(model)):
        with torch.no_grad():
            outputs.append(_outputs(_called(twin, item, forward)))
        _call_all(same_again)
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        raise ValueError("two copies of the model give outputs of other shapes on the same batch")
    largest = max(_difference(a, b) for a, b in zip(*outputs))
    if not largest <= TOLERANCE:
        raise ValueError(
            f"two copies of the model differ by {largest:.1e} on the same batch and random state: it keeps state "
            "outside of itself, or draws from a generator of its own, so that two trainings cannot be compared"
        )


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, item: Any, batch: Any, forward: Forward | None, loss: Loss
) -> list[Tensor]:
    """Make one step and return the outputs before it."""
    optimizer.zero_grad()
    device = next(model.parameters()).device
    y = _called(model, item, forward)
    value = loss(y, tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch))
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError("loss must return a Tensor of one element that depends on the model's parameters")
    value.backward()
    optimizer.step()
    return [t.detach() for t in _outputs(y)]


def _distance(generator: torch.Generator, output: Any, batch: Any) -> Tensor:
    """The default loss. Targets of zero would not do: behind a norm the mean square does not change."""
    parts = [
        (y - torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)).square().mean()
        for y in _outputs(output)
        if y.requires_grad and y.numel()
    ]
    if not parts:
        raise ValueError("no output of the model depends on its parameters; loss= is where to say what is trained")
    return sum(parts)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference, inf where it is not defined."""
    if a.shape != b.shape:
        return math.inf
    largest = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return math.inf if math.isnan(largest) else largest
