"""The spread of kernels, against numpy, and kernels at the steps to deployment, against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.branches.normed import acb_model, repvgg_model
from gradrep_kernels.branches.spread import kernel_histories, kernel_spread, largest_over_std


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (5, 2, 3, 3), (3, 7, 5, 3), (2, 3, 1, 3), (4, 1, 7, 1)])
def test_the_spread_of_a_kernel(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    array = weight.double().numpy()
    row, column = shape[2] // 2, shape[3] // 2
    around = [array[:, :, y, x] for y in range(shape[2]) for x in range(shape[3]) if (y, x) != (row, column)]
    expected = [np.std(array), np.std(array[:, :, row, column]), np.std(np.stack(around))]
    assert kernel_spread(weight) == pytest.approx(expected, rel=1e-12)
    assert largest_over_std(weight) == pytest.approx(np.abs(array).max() / np.std(array), rel=1e-12)


def test_the_spread_by_hand():
    """Two filters: centres 1 and 3, around them 0 and 2."""
    weight = torch.zeros(2, 1, 3, 3)
    weight[1] += 2
    weight[:, :, 1, 1] += 1
    assert kernel_spread(weight) == pytest.approx(((8 * 2 + 10 / 2 - (10 / 9) ** 2 * 9) ** 0.5 / 3, 1.0, 1.0))
    assert largest_over_std(torch.zeros(1, 1, 3, 3)) == 0


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (2, 2, 2, 3), (2, 2, 3, 4), (2, 2, 3), (0, 2, 3, 3)])
def test_a_kernel_without_a_centre_is_refused(shape):
    with pytest.raises(ValueError, match="weight must"):
        kernel_spread(torch.ones(shape))


def network():
    """Its norms have statistics and scales of their own, some of them negative."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)]
    return stirred(nn.Sequential(*layers))


def stirred(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def folded(conv, norm):
    """By the formula, in numpy."""
    factor = norm.weight.detach().double().numpy() / np.sqrt(norm.running_var.double().numpy() + norm.eps)
    return conv.weight.detach().double().numpy() * factor[:, None, None, None]


def test_kernels_of_a_plain_network():
    model = network()
    found = kernel_histories(model, csla.merge(model, fold_norm=True))
    assert list(found) == ["0", "5", "8"]  # The 1 x 1 has no surround.
    for n in (0, 5):
        trained, fused, added = found[str(n)]
        assert torch.equal(trained, model[n].weight)
        np.testing.assert_allclose(fused, folded(model[n], model[n + 1]), rtol=1e-6)
        assert added is None
        assert found[str(n)].deployed is fused
    assert torch.equal(found["8"].deployed, model[8].weight)
    assert found["8"][1:] == (None, None)  # No norm stands behind it.


@pytest.mark.parametrize("make", [repvgg_model, acb_model])
def test_kernels_of_blocks_with_norms(make):
    model = stirred(make(network()))
    deployed = csla.merge(model, fold_norm=True)
    found = kernel_histories(model, deployed)
    for name in ("0", "5"):
        block = model.get_submodule(name)
        trained, fused, added = found[name]
        assert torch.equal(trained, block.convs[0].weight)
        np.testing.assert_allclose(fused, folded(block.convs[0], block.norms[0]), rtol=1e-6)
        assert torch.equal(added, deployed.get_submodule(name).weight)
        assert found[name].deployed is added
    if make is repvgg_model:  # Only the centre gets the other branches.
        corners = torch.tensor([True] * 4 + [False] + [True] * 4).view(3, 3)
        torch.testing.assert_close(found["5"].added[..., corners], found["5"].fused[..., corners])
        assert not torch.allclose(found["5"].added[..., 1, 1], found["5"].fused[..., 1, 1])


def test_kernels_of_blocks_whose_norm_follows():
    """A CSLA block adds first, and the norm behind it is folded into the sum."""
    plain = network()
    model = csla.hyper_search_model(plain)
    deployed = csla.merge(model, fold_norm=True)
    trained, fused, added = kernel_histories(model, deployed)["0"]
    assert torch.equal(trained, plain[0].weight)
    assert fused is None
    assert torch.equal(added, deployed[0].weight)
