"""The CSLA block, the models that hold it, and the initial weights that it implies.

CSLA is constant-scale linear addition. Source: RepOptimizers (Ding et al., 2023), sections 3.2 to 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from gradrep_kernels.branch_scales import BranchScales
from gradrep_kernels.branches.algebra import (
    CentredConv2d,
    MultiBranch,
    add_centred,
    add_diagonal,
    has_shortcut,
    plain_conv,
    rounded,
)
from gradrep_kernels.branches.convert import with_blocks
from gradrep_kernels.branches.scales import Scales, match
from gradrep_kernels.branches.sites import (
    Site,
    Where,
    branch_scale,
    conv_sites,
    has_branch_scales,
)
from gradrep_kernels.grad_mult import expect_grad_mult
from gradrep_kernels.messages import first_few, warn_outside
from gradrep_kernels.wrappers import named_root, plain_name

__all__ = ["CSLABlock", "ScaleLayer", "csla_model", "extract_scales", "hyper_search_model", "reinitialize"]

# Deepcopies and pickles of a conv carry this attribute, so models that were saved earlier have it under this name.
_REINITIALIZED = "_csla_reinitialized"


class ScaleLayer(nn.Module):
    """Multiply each channel by its branch scale: y = α ⊙ x.

    α is a parameter if `trainable`, else a buffer, so that no optimizer moves it.
    """

    def __init__(self, scale: Tensor, *, trainable: bool, decays: bool = False):
        super().__init__()
        if trainable:
            self.weight = nn.Parameter(scale)
        else:
            self.register_buffer("weight", scale)
        self.decayed_vectors = ("weight",) if decays else ()  # read by gr.param_groups

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return x * self.weight.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, trainable={isinstance(self.weight, nn.Parameter)}"


class CSLABlock(MultiBranch):
    """The linear part of a CSLA block: s ⊙ conv(x) + t ⊙ conv_1x1(x) + id ⊙ x + bias.

    The norm follows the block (section 3.2, Figure 2).

    Args:
        conv:      the convolution it replaces. The block takes over its weight and bias. The bias is outside of s.
        scales:    s, t and id, cast to the weight's dtype. The block has the branches that `scales` has.
        trainable: whether s and t are parameters (Hyper-Search) or buffers (CSLA). id always is a parameter.

    The 1x1 kernel is drawn as nn.Conv2d draws it, from the default generator of the weight's device.
    """

    def __init__(self, conv: nn.Conv2d, scales: BranchScales, *, trainable: bool = False):
        super().__init__()
        weight = conv.weight

        def layer(scale: Tensor, **kind: bool) -> ScaleLayer:
            own = scale.to(device=weight.device, dtype=weight.dtype, copy=True)
            return ScaleLayer(own, **kind).requires_grad_(weight.requires_grad)

        self.conv = plain_conv(conv, weight)
        self.scale_conv = layer(scales.kxk, trainable=trainable)
        self.conv_1x1 = self.scale_1x1 = self.scale_identity = None
        if scales.one_by_one is not None:
            self.conv_1x1 = CentredConv2d(conv, (1, 1))
            self.scale_1x1 = layer(scales.one_by_one, trainable=trainable)
        if scales.has_identity:
            searched = torch.ones_like(scales.kxk) if scales.identity is True else scales.identity
            self.scale_identity = layer(searched, trainable=True, decays=True)
        self.register_parameter("bias", conv.bias)
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        y = self.scale_conv(self.conv(x))
        if self.conv_1x1 is not None:
            y = y + self.scale_1x1(self.conv_1x1(x))
        if self.scale_identity is not None:
            y = y + self.scale_identity(x)
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, 1)
        return y

    @torch.no_grad()
    def merged_kernel(self) -> Tensor:
        """Eq. 4, W = s ⊙ W_kxk + t ⊙ W_1x1 (zero-padded) + diag(id)  # [O, I, kh, kw] float64"""
        kernel = _per_output(self.scale_conv.weight) * self.conv.weight.double()
        if self.conv_1x1 is not None:
            add_centred(kernel, _per_output(self.scale_1x1.weight) * self.conv_1x1.weight.double())
        if self.scale_identity is not None:
            add_diagonal(kernel, self.scale_identity.weight.double())
        return kernel

    def merged(self) -> nn.Conv2d:
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain_conv(self.conv, rounded(self.merged_kernel(), self.conv.weight), bias)


def _per_output(scale: Tensor) -> Tensor:
    return scale.double().view(-1, 1, 1, 1)


def hyper_search_model(model: nn.Module, init: str | float = "depth", *, where: Where | None = None) -> nn.Module:
    """Return a new model with CSLA blocks of trainable scales in place of convolutions.

    A block replaces every odd k x k nn.Conv2d (both sides above 1) whose next sibling in registration order is a
    BatchNorm2d, SyncBatchNorm, GroupNorm or InstanceNorm2d of as many features. It has a k x k and a 1 x 1 branch.
    Where the convolution has as many outputs as inputs, stride 1 and 'same' padding, it has an identity branch too.
    Other convolutions are left and logged (logger `gradrep_kernels.csla`, level INFO). Train the model on a small set,
    then `extract_scales` gives the constants (RepOptimizers, section 3.3).

    Args:
        init: 'depth': in module order, i = 0 at a conv without shortcut and +1 at each that has one. Scales behind
            convs start at 1 for i = 0, else at √(2/i) (Appendix B, which section 4.1 misprints).
            A number: all of them start there (YOLOv6: 1.0). Identity scales start at 1 either way.
        where: which convolutions to replace: a name (of a conv, or of a module above), a pattern as of the module
            fnmatch ('*.conv2'), several of them, or a function of (name, conv). A chosen convolution needs no norm
            behind it. The others stay plain and need no scales: give `partial=True` to what takes them.

    The k x k branches take the present weights. The 1x1 kernels are drawn as nn.Conv2d draws them, in module order,
    from the default generator, which moves on. `model` itself is not changed. A wrapper (DDP, torch.compile, Fabric,
    AveragedModel) is taken off. Hooks on a replaced conv do not come along.

    It warns where most k x k convolutions stay plain though `where` was not given, and of blocks of other code that are
    multi-branch already: they stay as they are. `coverage` lists every convolution.

    Raises ValueError if no convolution can be replaced, if `where` names one that cannot be or that does not exist, or
    if the model holds multi-branch blocks of this package already.
    """
    if init != "depth" and (isinstance(init, bool) or not isinstance(init, Real) or not math.isfinite(init)):
        raise ValueError(f"init must be 'depth' or a finite number, got {init!r}")

    def blocks(model: nn.Module) -> Iterator[tuple[Site, CSLABlock]]:
        depth = 0
        for site in conv_sites(model, where):
            shortcut = has_shortcut(site.conv)
            depth = depth + 1 if shortcut else 0
            start = init if init != "depth" else math.sqrt(2 / depth) if depth else 1.0
            scale = torch.full((site.conv.out_channels,), float(start), dtype=torch.float64, device="cpu")
            yield site, CSLABlock(site.conv, BranchScales(scale, scale, shortcut), trainable=True)

    return with_blocks(model, blocks)


def csla_model(model: nn.Module, scales: Mapping[str, BranchScales], *, partial: bool = False) -> nn.Module:
    """Return a new model with explicit CSLA blocks in place of convolutions.

    Scales behind convs are constant, the identity's is trainable. Training it is the same as training `model`, after
    `reinitialize`, by FusedRepSGD with `grad_mults`. It serves checks and comparisons. Scales are cast to the
    weights' dtype and are buffers. The identity's starts at the searched value, or at 1 where `identity` is True.
    With the same state of the default generator, `csla_model` and `reinitialize` draw the same 1x1 kernels.
    `hyper_search_model` says which convs are replaced and what is drawn.

    Args:
        partial: scales may leave out convolutions, which stay plain, and identity branches.

    Raises ValueError, listing the first few mismatches, if scales and model do not fit.
    """

    def blocks(model: nn.Module) -> Iterator[tuple[Site, CSLABlock]]:
        for site, value in match(model, scales, partial):
            yield site, CSLABlock(site.conv, value)

    return with_blocks(model, blocks)


def extract_scales(model: nn.Module) -> Scales:
    """Copy the branch scales of a Hyper-Search or CSLA model.

    Their names are those of the convolutions that the blocks replaced. Blocks of other code are read by their
    attributes `scale_conv`, `scale_1x1` and `scale_identity`, as YOLOv6 and the published code have them. Their names
    are those of the blocks. Names are free of what wrappers add to them, averages of a model (AveragedModel) included.

    Raises ValueError if there is no such block, or if a scale cannot be used: NaN or inf (the search diverged), no
    number per channel, or a bias behind it.
    """
    scales: Scales = {}
    problems = []
    for name, module in named_root(model).named_modules():
        if has_branch_scales(module):
            name = plain_name(name)
            try:
                scales[name] = _scales_of(module)
            except (TypeError, ValueError) as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise ValueError(f"the model's scales cannot be used: {first_few(problems)}")
    if not scales:
        raise ValueError("model holds no Hyper-Search or CSLA block")
    return scales


def _scales_of(block: nn.Module) -> BranchScales:
    """Read the branch scales of now. The identity's has trained on in a CSLA model too."""

    def vector(attribute: str) -> Tensor | None:
        layer = branch_scale(block, attribute)
        if layer is None:
            return None
        weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
        if not isinstance(weight, Tensor) or weight.numel() != max(weight.shape, default=1):
            raise ValueError(f"{attribute} has no weight of one number per channel")
        if isinstance(bias, Tensor) and bool((bias != 0).any()):
            raise ValueError(f"{attribute} has a bias, which is no part of a CSLA block")
        return weight.detach().reshape(-1)

    identity = vector("scale_identity")
    return BranchScales(vector("scale_conv"), vector("scale_1x1"), False if identity is None else identity)


@torch.no_grad()
def reinitialize(
    model: nn.Module,
    scales: Mapping[str, BranchScales],
    *,
    identity: str = "searched",
    force: bool = False,
    partial: bool = False,
) -> None:
    """Set each kernel, in place, to the one that its CSLA block starts with.

    RepOptimizers, Eq. 4: W ← Σ α_b ⊙ W_b + diag(id). The k x k branch is the conv's present weight. The 1x1 is drawn
    as nn.Conv2d draws it, from the default generator (the published code's choice, the paper says MSRA). Sums are
    formed in float64 and rounded once.

    Args:
        identity: 'searched': id is the searched identity scale, as in the published code, or 1 where none was searched.
                  'one': id is 1, as in the paper.
        force:    go ahead although the model has been trained or re-initialised.
        partial:  scales may leave out convolutions, whose kernels stay, and identity branches.

    A run that resumes from a checkpoint leaves `reinitialize` out, and so does fine-tuning: the weights are there, and
    `grad_mults` is all they need. An optimizer of this package warns at its first step where it has weights that were
    re-initialised and a Grad Mult for none of them. `grad_mults={}` says that this is meant.

    Raises ValueError, and changes nothing, if scales and model do not fit, if the model was re-initialised before, or
    if a norm is not fresh: it has seen batches, its running statistics moved, or, without statistics, its weight or
    bias differs between channels. That the model was re-initialised is known by a mark on the conv modules, which
    deepcopy and pickle keep and a state_dict does not. A norm with neither statistics nor weight shows nothing, of
    which a warning tells.
    """
    if identity not in ("searched", "one"):
        raise ValueError(f"identity must be 'searched' or 'one', got {identity!r}")
    pairs = match(model, scales, partial)
    if not force:
        problems = [problem for site, _ in pairs if (problem := _why_not_fresh(site))]
        if problems:
            raise ValueError(
                "resuming? leave reinitialize out, for the checkpoint has the weights that it would make. "
                "Fine-tuning? A trained network keeps its weights, and needs grad_mults alone. "
                f"reinitialize begins a training, and this model is not untrained: {first_few(problems)}"
            )
        _warn_of_unknown([site for site, _ in pairs])
    for site, value in pairs:
        if identity == "one" and value.has_identity:
            value = BranchScales(value.kxk, value.one_by_one, True)
        site.conv.weight.copy_(CSLABlock(site.conv, value).merged_kernel())
        setattr(site.conv, _REINITIALIZED, True)
        expect_grad_mult(site.conv.weight)


def _why_not_fresh(site: Site) -> str | None:
    if getattr(site.conv, _REINITIALIZED, False):
        return f"{site.name} was re-initialised before"
    batches = getattr(site.norm, "num_batches_tracked", None)
    if batches is not None and batches != 0:
        return f"the norm after {site.name} has seen {int(batches)} batches"
    mean, var = getattr(site.norm, "running_mean", None), getattr(site.norm, "running_var", None)
    if mean is not None:
        moved = bool((mean != 0).any() or (var != 1).any())
        return f"the norm after {site.name} has running statistics that moved" if moved else None
    # Initial values are one number for all channels: 1 and 0, or a weight of 0 at the end of a residual branch.
    for what in ("weight", "bias"):
        value = getattr(site.norm, what, None)
        if value is not None and bool((value != value[0]).any()):
            return f"the norm after {site.name} has a {what} that differs between channels, as after a training"
    return None


def _warn_of_unknown(sites: list[Site]) -> None:
    """Warn of convolutions that nothing tells to be fresh: no norm with statistics, or with a weight that trains."""

    def shows(norm: nn.Module | None) -> bool:
        if getattr(norm, "running_mean", None) is not None:
            return True
        weight = getattr(norm, "weight", None)
        return weight is not None and weight.requires_grad

    silent = [site.name for site in sites if not shows(site.norm)]
    if silent:
        warn_outside(
            "reinitialize cannot tell whether these convolutions are untrained, for no norm with statistics or a "
            f"weight that trains follows them: {first_few(silent)}. If they are, force=True says so"
        )
