"""How much of a block's output its identity path brings, block by block.

Source: RepOptimizers (Ding et al., 2023), Appendix B and Figure 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from gradrep_kernels.branches.csla import CSLABlock
from gradrep_kernels.branches.normed import NormedBranches
from gradrep_kernels.branches.pairs import Example, call, copy_without_hooks
from gradrep_kernels.messages import first_few
from gradrep_kernels.wrappers import plain_name, unwrapped

__all__ = ["identity_variance_ratio"]


def identity_variance_ratio(model: nn.Module, example: Example) -> dict[str, float]:
    """Return Var(identity path) / Var(sum of all paths) for each block that has an identity path, by name.

    - Blocks of Hyper-Search and CSLA models, their constants included: Var(id ⊙ x + c ⊙ x) / Var(output).
    - Blocks with a norm in each branch, as RepVGG's: Var(BN(x)) / Var(output).
    - Residual blocks of this package's ResNet and PreAct-ResNet whose shortcut is the identity:
      Var(x) / Var(x + residual branch). Classes of other code say so by an attribute `residual`, the name of the child
      whose output is added to the block's input, and a child `shortcut` that is None or nn.Identity.

    Args:
        example: an input: a Tensor, a tuple of positional or a dict of keyword arguments. The model should see a batch
            of its data. Norms in train mode take their statistics from it.

    A variance is that of each channel over batch and pixels, summed over channels, in float64. The paper does not say
    whether its variances are of channels or of whole maps. Those of channels leave out the means, which the norm behind
    the block takes away. Modules are in the mode in which they are. The first call of a block counts.

    `model` and the random state are as before: a copy runs, without hooks.

    Raises ValueError if the model has no such block, if none was called, or if the sum of one does not vary or is not
    finite.
    """
    copied = copy_without_hooks(unwrapped(model))
    blocks = {plain_name(name): m for name, m in copied.named_modules() if _identity_of(m) is not None}
    if not blocks:
        raise ValueError("the model has no block with an identity path: none of branches, no residual block")
    recorders = {name: _Recorder(block) for name, block in blocks.items()}
    call(copied, example)
    ratios = {name: recorder.ratio for name, recorder in recorders.items() if recorder.ratio is not None}
    if not ratios:
        raise ValueError(f"the forward calls none of the blocks with an identity path: {first_few([*blocks])}")
    useless = [name for name, ratio in ratios.items() if not math.isfinite(ratio)]
    if useless:
        raise ValueError(f"the output does not vary over the example, or is not finite: {first_few(useless)}")
    return ratios


def _identity_of(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the identity path of a block, as a function of its input, or None where it has none."""
    if isinstance(block, CSLABlock):
        scale, adds = block.scale_identity, block.constants is not None and block.adds_input
        if scale is None and not adds:
            return None
        return lambda x: (0 if scale is None else scale(x)) + (block.constants[0] * x if adds else 0)
    if isinstance(block, NormedBranches):
        # A norm in train mode moves its statistics once more, those of the copy.
        return block.norm_identity
    if isinstance(getattr(type(block), "residual", None), str):
        shortcut = getattr(block, "shortcut", None)
        return (lambda x: x) if shortcut is None or type(shortcut) is nn.Identity else None
    return None


class _Recorder:
    """Hooks on one block that keep the ratio of its first call. None: it was not called."""

    def __init__(self, block: nn.Module):
        self.ratio: float | None = None
        self._identity = _identity_of(block)
        self._input: Tensor | None = None
        block.register_forward_pre_hook(self._takes)
        residual = getattr(type(block), "residual", None)
        self._is_residual = isinstance(residual, str)
        summed = block.get_submodule(residual) if self._is_residual else block
        summed.register_forward_hook(self._makes)

    def _takes(self, block: nn.Module, args: tuple) -> None:
        if self.ratio is None:
            self._input = args[0].detach().clone()  # what follows may write into it

    def _makes(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.ratio is None:
            identity = self._identity(self._input)
            total = output + identity if self._is_residual else output
            self.ratio = float(_variance(identity) / _variance(total))
            self._input = None


def _variance(x: Tensor) -> Tensor:  # [N, C, H, W] -> []
    return x.double().var((0, 2, 3), correction=0).sum()
