"""The CSLA block, the models that hold it, and the initial weights that it implies.

CSLA is constant-scale linear addition. Source: RepOptimizers (Ding et al., 2023), sections 3.2 to 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from gradrep_kernels.branch_scales import Branch, BranchScales, branch_names
from gradrep_kernels.branches.algebra import (
    CentredAverage,
    CentredConv2d,
    MultiBranch,
    add_average,
    add_centred,
    add_diagonal,
    plain_conv,
    rounded,
)
from gradrep_kernels.branches.convert import with_blocks
from gradrep_kernels.branches.presets import Branches, Layout, laid_out_sites
from gradrep_kernels.branches.scales import Scales, match
from gradrep_kernels.branches.sites import Site, Where, branch_scale, has_branch_scales
from gradrep_kernels.messages import first_few
from gradrep_kernels.wrappers import named_root, plain_name

__all__ = ["CSLABlock", "ScaleLayer", "check_draw", "csla_model", "extract_scales", "hyper_search_model"]


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
        self.branch_scales = ("weight",) if trainable else ()  # and this

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        return x * self.weight.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, trainable={isinstance(self.weight, nn.Parameter)}"


class ScaledConv(nn.Module):
    """A further branch of a CSLA block: α ⊙ conv(x).

    The buffer `layout` holds (kernel rows, kernel columns, dilation), so that a state_dict tells them.
    """

    def __init__(self, conv: CentredConv2d, branch: Branch, scale: ScaleLayer):
        super().__init__()
        self.conv, self.scale = conv, scale
        self.dilation = branch.dilation
        layout = torch.tensor([*branch.kernel_size, branch.dilation], dtype=torch.int64, device=conv.weight.device)
        self.register_buffer("layout", layout)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        return self.scale(self.conv(x))

    def branch(self) -> Branch:
        """Return the branch with its scale of now."""
        return Branch(self.scale.weight.detach(), tuple(self.conv.kernel_size), self.dilation)


class CSLABlock(MultiBranch):
    """The linear part of a CSLA block: s ⊙ conv(x) + t ⊙ conv_1x1(x) + id ⊙ x + Σ α_b ⊙ conv_b(x) + bias.

    The norm follows the block (section 3.2, Figure 2). Constant branches c · x and c · AvgPool2d(x) join the sum.

    Args:
        conv:      the convolution it replaces. The block takes over its weight and bias. The bias is outside of s.
        scales:    s, t, id and further α, cast to the weight's dtype. The block has the branches that `scales` has.
        trainable: whether s, t and further α are parameters (Hyper-Search) or buffers (CSLA). id always is a parameter.
        fixed:     names, as of `scales.tensors()`, of those that are buffers in either case.
        one_by_one: how all kernels but the k x k are drawn, from the default generator of the weight's device:
                   'conv2d', as nn.Conv2d draws them, or 'msra' (kaiming_normal_ of fan_in).
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        scales: BranchScales,
        *,
        trainable: bool = False,
        fixed: Container[str] = (),
        one_by_one: str = "conv2d",
    ):
        super().__init__()
        weight = conv.weight

        def layer(scale: Tensor, name: str, **kind: bool) -> ScaleLayer:
            own = scale.to(device=weight.device, dtype=weight.dtype, copy=True)
            kind = kind or {"trainable": trainable and name not in fixed}
            return ScaleLayer(own, **kind).requires_grad_(weight.requires_grad)

        def drawn(kernel_size: tuple[int, int], dilation: int = 1) -> CentredConv2d:
            branch = CentredConv2d(conv, kernel_size, dilation)
            if one_by_one == "msra":
                nn.init.kaiming_normal_(branch.weight)
            return branch

        self.conv = plain_conv(conv, weight)
        self.scale_conv = layer(scales.kxk, "conv")
        self.conv_1x1 = self.scale_1x1 = self.scale_identity = self.others = self.average = self.constants = None
        if scales.one_by_one is not None:
            self.conv_1x1 = drawn((1, 1))
            self.scale_1x1 = layer(scales.one_by_one, "1x1")
        if scales.has_identity:
            searched = torch.ones_like(scales.kxk) if scales.identity is True else scales.identity
            self.scale_identity = layer(searched, "identity", trainable=True, decays=True)
        if scales.others:
            named = zip(branch_names(scales.others), scales.others)
            self.others = nn.ModuleList(
                ScaledConv(drawn(branch.kernel_size, branch.dilation), branch, layer(branch.scale, name))
                for name, branch in named
            )
        if scales.constant_identity or scales.constant_average:
            del self.constants  # a buffer takes its place
            constants = (scales.constant_identity, scales.constant_average)
            self.register_buffer("constants", torch.tensor(constants, dtype=weight.dtype, device=weight.device))
            self.adds_input = scales.constant_identity != 0
            self.average = CentredAverage(conv) if scales.constant_average else None
        self.register_parameter("bias", conv.bias)
        self.train(conv.training)

    def __setstate__(self, state: dict) -> None:
        """Take pickles of before there were further branches."""
        super().__setstate__(state)
        for name in ("others", "average", "constants"):
            if not hasattr(self, name):
                setattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:  # [N, I, H, W] -> [N, O, H', W']
        y = self.scale_conv(self.conv(x))
        if self.conv_1x1 is not None:
            y = y + self.scale_1x1(self.conv_1x1(x))
        if self.scale_identity is not None:
            y = y + self.scale_identity(x)
        for branch in self.others or ():
            y = y + branch(x)
        if self.constants is not None:
            if self.average is not None:
                y = y + self.constants[1] * self.average(x)
            if self.adds_input:
                y = y + self.constants[0] * x
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, 1)
        return y

    @torch.no_grad()
    def merged_kernel(self) -> Tensor:
        """Eq. 4, W = Σ α_b ⊙ W_b (zero-padded) + diag(id) + constants  # [O, I, kh, kw] float64"""
        kernel = _per_output(self.scale_conv.weight) * self.conv.weight.double()
        if self.conv_1x1 is not None:
            add_centred(kernel, _per_output(self.scale_1x1.weight) * self.conv_1x1.weight.double())
        if self.scale_identity is not None:
            add_diagonal(kernel, self.scale_identity.weight.double())
        for branch in self.others or ():
            small = _per_output(branch.scale.weight) * branch.conv.weight.double()
            add_centred(kernel, small, branch.dilation)
        if self.constants is not None:
            identity, average = self.constants.double()
            add_diagonal(kernel, identity)
            add_average(kernel, average)
        return kernel

    def merged(self) -> nn.Conv2d:
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain_conv(self.conv, rounded(self.merged_kernel(), self.conv.weight), bias)


def _per_output(scale: Tensor) -> Tensor:
    return scale.double().view(-1, 1, 1, 1)


Init = str | float | Mapping[str, float] | Callable[[str, nn.Conv2d, int], float]


def hyper_search_model(
    model: nn.Module, init: Init = "depth", *, branches: Branches = "repvgg", where: Where | None = None
) -> nn.Module:
    """Return a new model with CSLA blocks of trainable scales in place of convolutions.

    A block replaces every odd k x k nn.Conv2d (both sides above 1) whose next sibling in registration order is a
    BatchNorm2d, SyncBatchNorm, GroupNorm or InstanceNorm2d of as many features. It has a k x k and a 1 x 1 branch.
    Where the convolution has as many outputs as inputs, stride 1 and 'same' padding, it has an identity branch too.
    Other convolutions are left and logged (logger `gradrep_kernels.csla`, level INFO). Train the model on a small set,
    then `extract_scales` gives the constants (RepOptimizers, section 3.3).

    Where a convolution and its norm are no siblings, the class of a module above both names the norm, by a class
    attribute such as `norms_after = {"cheap_operation.0": "final_bn"}`: {name of the convolution: name of the norm}.

    Args:
        init: 'depth': in module order, i = 0 at a block without identity and +1 at each that has one. Scales behind
            convs start at 1 for i = 0, else at √(2/i) (Appendix B, which section 4.1 misprints).
            A number: all of them start there (YOLOv6: 1.0). {name of the conv: number}, or a function of
            (name, conv, i), for other rules. Identity scales start at 1 in any case.
        branches: which branches a block has. A preset: 'repvgg' (k x k, 1 x 1, identity), 'acb' (k x k, 1 x k, k x 1),
            'repghost' (k x k, identity), 'mobileone:N' (N of k x k, 1 x 1, identity), 'replk:K' (k x k, K x K),
            'unireplk' (k x k and the published dilated ones, for k of 5 to 17), 'qarepvgg' (k x k, and a 1 x 1 of
            scale 1, an identity and an average that are not searched).
            A list of branches: 'kxk', '1x1', '1xk', '5x5', '3x3_d2' (of dilation 2), k, (rows, columns),
            ((rows, columns), dilation), 'identity'. 'kxk' must be among them, and a branch may stand there several
            times. 'KERNEL=VALUE' has a fixed scale. 'identity=VALUE' and 'average=VALUE' have no parameters.
            Or a function of (name, conv) that returns one of these, or None where the convolution stays plain.
            Identities stand where the convolution has a shortcut, averages where in = out channels and padding 'same'.
        where: which convolutions to replace: a name (of a conv, or of a module above), a pattern as of the module
            fnmatch ('*.conv2'), several of them, or a function of (name, conv). A chosen convolution needs no norm
            behind it. The others stay plain and need no scales: give `partial=True` to what takes them. A convolution
            with a side of 1, as MobileOne's pointwise ones, is replaced where its own name is given.

    The first k x k branches take the present weights. The other kernels are drawn as nn.Conv2d draws them, in module
    order, from the default generator, which moves on. `model` itself is not changed. A wrapper (DDP, torch.compile,
    Fabric, AveragedModel) is taken off. Hooks on a replaced conv do not come along.

    It warns where most k x k convolutions stay plain though `where` was not given, and of blocks of other code that are
    multi-branch already: they stay as they are. `coverage` lists every convolution.

    Raises ValueError if no convolution can be replaced, if `where` names one that cannot be or that does not exist, if
    branches have no exact form or do not lie inside the kernel, or if the model holds multi-branch blocks of this
    package already.
    """
    _check_init(init)

    def blocks(model: nn.Module) -> Iterator[tuple[Site, CSLABlock]]:
        laid_out = laid_out_sites(model, branches, where)
        if not laid_out:
            raise ValueError("branches: the function returned None for every convolution")
        starts = _starts(init, laid_out)
        for (site, layout), start in zip(laid_out, starts):
            scales = layout.scales(site.conv.out_channels, start)
            yield site, CSLABlock(site.conv, scales, trainable=True, fixed=layout.fixed)

    return with_blocks(model, blocks)


def _check_init(init: Init) -> None:
    if isinstance(init, Mapping) or callable(init) or init == "depth" or _is_finite(init):
        return
    raise ValueError(
        f"init must be 'depth' or a finite number, got {init!r}; {{name: number}} and a function of (name, conv, i) "
        "serve too"
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _starts(init: Init, laid_out: list[tuple[Site, Layout]]) -> list[float]:
    """Return where the scales behind the convolutions of each block start."""
    depth, depths = 0, []
    for _, layout in laid_out:
        depth = depth + 1 if layout.has_any_identity else 0
        depths.append(depth)
    if isinstance(init, str):
        return [math.sqrt(2 / depth) if depth else 1.0 for depth in depths]
    if isinstance(init, Real):
        return [float(init)] * len(depths)
    names = [site.name for site, _ in laid_out]
    if isinstance(init, Mapping):
        problems = [f"{name}: missing" for name in names if name not in init]
        problems += [f"{name}: no block of that name" for name in init if name not in names]
        if problems:
            raise ValueError(f"init does not fit the model: {first_few(problems)}")
        starts = [init[name] for name in names]
    else:
        starts = [init(site.name, site.conv, depth) for (site, _), depth in zip(laid_out, depths)]
    for name, start in zip(names, starts):
        if not _is_finite(start):
            raise ValueError(f"init of {name} must be a finite number, got {start!r}")
    return [float(start) for start in starts]


def check_draw(one_by_one: str) -> None:
    """Raise ValueError unless `one_by_one` names a way to draw kernels."""
    if one_by_one not in ("conv2d", "msra"):
        raise ValueError(f"one_by_one must be 'conv2d' or 'msra', got {one_by_one!r}")


def csla_model(
    model: nn.Module, scales: Mapping[str, BranchScales], *, one_by_one: str = "conv2d", partial: bool = False
) -> nn.Module:
    """Return a new model with explicit CSLA blocks in place of convolutions.

    Scales behind convs are constant, the identity's is trainable. Training it is the same as training `model`, after
    `reinitialize`, by FusedRepSGD with `grad_mults`. It serves checks and comparisons. Scales are cast to the
    weights' dtype and are buffers. The identity's starts at the searched value, or at 1 where `identity` is True.
    With the same state of the default generator, `csla_model` and `reinitialize` draw the same kernels.
    `hyper_search_model` says which convs are replaced and what is drawn.

    Args:
        one_by_one: how the 1x1 and all further branches are drawn, as `reinitialize` takes it.
        partial: scales may leave out convolutions, which stay plain, and identity branches.

    Raises ValueError, listing the first few mismatches, if scales and model do not fit.
    """
    check_draw(one_by_one)

    def blocks(model: nn.Module) -> Iterator[tuple[Site, CSLABlock]]:
        for site, value in match(model, scales, partial):
            yield site, CSLABlock(site.conv, value, one_by_one=one_by_one)

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
    further = {}
    if isinstance(block, CSLABlock):
        further["others"] = [branch.branch() for branch in block.others or ()]
        if block.constants is not None:
            constant_identity, constant_average = block.constants.tolist()
            further |= {"constant_identity": constant_identity, "constant_average": constant_average}
    return BranchScales(vector("scale_conv"), vector("scale_1x1"), False if identity is None else identity, **further)
