"""A kind of block that the package does not know is converted, refused and merged like its own."""

from __future__ import annotations

import pytest
import torch
from cases_csla import FORWARD_TOLERANCE
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.branches.algebra import CentredConv2d, MultiBranch, add_centred, fold, plain_conv, rounded
from gradrep_kernels.branches.convert import with_blocks
from gradrep_kernels.branches.sites import conv_sites


class RowAndKernel(MultiBranch):
    """conv(x) + conv_1xk(x), without scales."""

    def __init__(self, site):
        super().__init__()
        self.conv = plain_conv(site.conv, site.conv.weight, site.conv.bias)
        self.row = CentredConv2d(site.conv, (1, site.conv.kernel_size[1]))
        self.train(site.conv.training)

    def forward(self, x):
        return self.conv(x) + self.row(x)

    @torch.no_grad()
    def merged(self):
        kernel = self.conv.weight.double().clone()
        add_centred(kernel, self.row.weight.double())
        bias = nn.Parameter(self.conv.bias.detach().clone())
        return plain_conv(self.conv, rounded(kernel, self.conv.weight), bias)


class NormInside(RowAndKernel):
    """norm(conv(x) + conv_1xk(x))"""

    holds_norm = True

    def __init__(self, site):
        super().__init__(site)
        self.norm = site.norm

    def forward(self, x):
        return self.norm(super().forward(x))

    @torch.no_grad()
    def merged(self):
        conv = super().merged()
        kernel, bias = fold(conv.weight, conv.bias, self.norm)
        return plain_conv(conv, rounded(kernel, conv.weight), nn.Parameter(bias))


@pytest.mark.parametrize("kind", [RowAndKernel, NormInside])
@pytest.mark.parametrize("training", [True, False])
def test_a_new_kind_of_block_is_converted_and_merged(kind, training):
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), nn.BatchNorm2d(4), nn.ReLU()).double()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    nn.init.normal_(model[1].running_mean)
    model.train(training)
    before = [name for name, _ in model.named_modules()], {n: v.clone() for n, v in model.state_dict().items()}
    explicit = with_blocks(model, lambda copy: ((site, kind(site)) for site in conv_sites(copy)))
    assert type(explicit[0]) is kind
    assert isinstance(explicit[1], nn.Identity if kind.holds_norm else nn.BatchNorm2d)
    assert all(module.training == training for module in explicit.modules())
    assert [name for name, _ in model.named_modules()] == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"multi-branch blocks already \(0\): csla.merge"):
        csla.hyper_search_model(explicit)
    merged = csla.merge(explicit)
    assert [type(module) for module in merged] == [nn.Conv2d, type(explicit[1]), nn.ReLU]
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    explicit.eval()
    torch.testing.assert_close(merged.eval()(x), explicit(x), rtol=0, atol=FORWARD_TOLERANCE)
    torch.testing.assert_close(csla.merge(explicit, fold_norm=True)(x), explicit(x), rtol=0, atol=FORWARD_TOLERANCE)
