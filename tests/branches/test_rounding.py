"""Weights rounded to few bits, against torch's fake quantization and hand-counted cases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradrep_kernels import csla
from gradrep_kernels.branches.normed import repvgg_model
from gradrep_kernels.branches.rounding import round_symmetric, rounded_weights


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 3, 3), (7, 1, 1, 5), (4, 6)])
def test_a_tensor_is_rounded_as_torch_rounds_it(bits, shape):
    weight, most = drawn(*shape), 2 ** (bits - 1) - 1
    step = float(weight.abs().max()) / most
    expected = torch.fake_quantize_per_tensor_affine(weight, step, 0, -most, most)
    torch.testing.assert_close(round_symmetric(weight, bits), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_channels_are_rounded_as_torch_rounds_them(bits, axis):
    weight, most = drawn(5, 3, 3, 2) * torch.logspace(-3, 2, 5).view(5, 1, 1, 1), 2 ** (bits - 1) - 1
    steps = weight.abs().amax([n for n in range(4) if n != axis]) / most
    zeros = torch.zeros(len(steps), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, steps, zeros, axis, -most, most)
    torch.testing.assert_close(round_symmetric(weight, bits, axis), expected, rtol=1e-6, atol=0)


def test_three_bits_by_hand():
    """The largest weight is 3 steps of 1. Halves, as -1.5 and 2.5, go to the even step."""
    weight = torch.tensor([-3.0, -1.5, 0.6, 2.5, 0.0, -0.4])
    assert round_symmetric(weight, 3).tolist() == [-3.0, -2.0, 1.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype):
    weight = torch.tensor([[1.0, -0.25], [0.125, 0.5]], dtype=dtype)
    found = round_symmetric(weight, 3)
    assert found.dtype == dtype
    assert found.tolist() == torch.tensor([[1, -1 / 3], [0, 2 / 3]], dtype=dtype).tolist()


def test_weights_that_are_all_0_stay():
    weight = torch.zeros(2, 3, 1, 1)
    weight[1] = 1.0
    assert torch.equal(round_symmetric(weight, 4, 0), weight)
    assert torch.equal(round_symmetric(weight[:1], 4), weight[:1])
    assert round_symmetric(torch.zeros(0, 3), 4).shape == (0, 3)


def network():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    layers += [nn.ConvTranspose2d(4, 5, 2), nn.Conv2d(5, 5, 3, groups=5), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5, 2))


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_of_a_network_are_rounded_and_nothing_else(per_channel):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = rounded_weights(model, 5, per_channel).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        if name in ("0.weight", "3.weight", "6.weight", "9.weight"):
            expected = round_symmetric(tensor, 5, 0 if per_channel else None)
        elif name == "5.weight":  # [inputs, outputs, ...]
            expected = round_symmetric(tensor, 5, 1 if per_channel else None)
        else:
            expected = tensor
        assert torch.equal(found[name], expected), name
    assert not torch.equal(found["0.weight"], before["0.weight"])


def test_a_shared_weight_stays_shared():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = rounded_weights(model, 4)
    assert found[0].weight is found[1].weight
    assert torch.equal(found[0].weight, round_symmetric(model[0].weight, 4))


@pytest.mark.parametrize("bits", [1, 17, 0, -3, 4.0, True, "8"])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 16"):
        rounded_weights(nn.Linear(2, 2), bits)


def test_what_is_not_deployed_is_refused():
    model = network()[:5]
    with pytest.raises(ValueError, match="multi-branch blocks already"):
        rounded_weights(repvgg_model(model), 8)
    rounded_weights(csla.merge(repvgg_model(model)), 8)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="0: its weight is not a parameter"):
        rounded_weights(normed, 8)
