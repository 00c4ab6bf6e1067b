"""models: sizes, names, modes, and the multi-branch baselines against what they merge to."""

from __future__ import annotations

import functools

import pytest
import torch
from cases_csla import FORWARD_TOLERANCE, GEOMETRIES, Geometry, random_scales, randomise_norms
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels import csla, models
from gradrep_kernels.branches.normed import NormedBranches, normed_model

# RepOptimizers, Table 1: millions of parameters of the target form with 1000 classes.
MILLIONS = {"b1": 51.84, "b2": 80.33, "l1": 76.04, "l2": 118.13}
# (3x3 layers of stages 1 to 4, widths)
SHAPES = {
    "b1": ((4, 6, 16, 1), (128, 256, 512, 2048)),
    "b2": ((4, 6, 16, 1), (160, 320, 640, 2560)),
    "l1": ((8, 14, 24, 1), (128, 256, 512, 2048)),
    "l2": ((8, 14, 24, 1), (160, 320, 640, 2560)),
}
# Counted by hand: Σ 9·I·O of the 3x3s (+ 1x1 shortcuts), 2·O per norm, 513 per class (10).
CIFAR = {
    "vgg11": (9_228_362, 8),
    "vgg13": (9_413_066, 10),
    "vgg16": (14_724_042, 13),
    "vgg19": (20_035_018, 16),
    "resnet18": (11_173_962, 17),
}


def on_meta(make, *args, **kwargs):
    with torch.device("meta"):
        return make(*args, **kwargs)


@functools.cache
def target(name):
    """A RepOpt-VGG without data, built once for the tests that only read its shapes."""
    return on_meta(getattr(models, f"repopt_vgg_{name}"))


def size(model):
    return sum(p.numel() for p in model.parameters())


# ---- RepOpt-VGG


@pytest.mark.parametrize("name", MILLIONS)
def test_repopt_vgg_sizes_names_and_strides(name):
    model = target(name)
    assert round(size(model) / 1e6, 2) == MILLIONS[name]
    counts, widths = SHAPES[name]
    blocks = ["stage0"] + [f"stage{stage}.{n}" for stage, count in enumerate(counts, 1) for n in range(count)]
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert list(convs) == [f"{block}.conv" for block in blocks]
    out = [64] + [width for count, width in zip(counts, widths) for _ in range(count)]
    assert [c.out_channels for c in convs.values()] == out
    assert [c.in_channels for c in convs.values()] == [3, *out[:-1]]
    assert [c.stride for c in convs.values()] == [
        (2, 2) if block == "stage0" or block.endswith(".0") else (1, 1) for block in blocks
    ]
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) and c.bias is None for c in convs.values())
    assert all(isinstance(model.get_submodule(f"{block}.bn"), nn.BatchNorm2d) for block in blocks)
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("name", MILLIONS)
def test_repopt_vgg_modes_have_the_branches(name):
    make = getattr(models, f"repopt_vgg_{name}")
    counts, widths = SHAPES[name]
    hs, repvgg = (on_meta(make, mode) for mode in ("hs", "repvgg"))
    out = [64] + [width for count, width in zip(counts, widths) for _ in range(count)]
    one = sum(a * b for a, b in zip([3, *out], out))
    identity = sum(width * (count - 1) for count, width in zip(counts, widths))
    assert size(hs) - size(target(name)) == one + 2 * sum(out) + identity
    assert size(repvgg) - size(target(name)) == one + 2 * sum(out) + 2 * identity
    scales = csla.extract_scales(models.repopt_vgg_small("hs", 10))
    with pytest.raises(ValueError, match="the scales do not fit the model"):
        on_meta(make, "csla", scales=scales)


@pytest.mark.parametrize("mode", ["target", "hs", "csla", "repvgg"])
@pytest.mark.parametrize("se", [False, True])
def test_small_trains_and_merges_in_every_mode(mode, se):
    scales = random_scales(models.repopt_vgg_small(num_classes=10)) if mode == "csla" else None
    model = models.repopt_vgg_small(mode, 10, se, scales, in_channels=1).double()
    assert size(models.repopt_vgg_small(num_classes=10)) < 150_000
    x, y = torch.randn(4, 1, 16, 16, dtype=torch.float64), torch.arange(4)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        opt.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        opt.step()
    assert float(losses[-1].detach()) < float(losses[0].detach())
    model.eval()
    deployed = csla.merge(model, fold_norm=True)
    torch.testing.assert_close(deployed(x), model(x), rtol=0, atol=FORWARD_TOLERANCE)
    plain = models.repopt_vgg_small(num_classes=10, se=se, in_channels=1)
    assert size(deployed) == size(plain) - sum(m.num_features for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    names = [n for n, _ in plain.named_modules()]
    assert [n for n, _ in deployed.named_modules()] == names


def test_squeeze_excite_by_hand():
    model = models.repopt_vgg_small(se=True)
    assert {n for n, m in model.stage2[1].named_modules() if isinstance(m, nn.Conv2d)} == {
        "conv",
        "post_se.down",
        "post_se.up",
    }
    se = model.stage2[1].post_se
    assert se.down.weight.shape == (16, 64, 1, 1)
    assert se.up.bias.shape == (64,)
    x = torch.randn(2, 64, 3, 5)
    mean = x.mean((2, 3))
    gate = torch.sigmoid(
        F.linear(F.relu(F.linear(mean, se.down.weight[..., 0, 0], se.down.bias)), se.up.weight[..., 0, 0], se.up.bias)
    )
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])
    block = model.stage2[1]
    torch.testing.assert_close(block(x), se(F.relu(block.bn(block.conv(x)))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "deploy"}, "mode must be 'target', 'hs', 'csla' or 'repvgg', got 'deploy'"),
        ({"mode": "csla"}, "mode='csla' needs scales"),
        ({"scales": {}}, "scales are for mode='csla', got mode='target'"),
        ({"mode": "hs", "scales": "a.pth"}, "scales are for mode='csla', got mode='hs'"),
    ],
)
def test_wrong_modes(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.repopt_vgg_small(**arguments)


# ---- CIFAR networks


# Counted by hand, as CIFAR: of VGG-11 at a quarter, 9·64,048 in 3x3s, 1,376 in norms; layers of 4096, 4096 and 100.
VGG_SETTINGS = {
    "quarter": ({"width": 0.25}, 9 * 64_048 + 1_376 + 1_290),
    "one hidden layer": ({"head_width": 7}, 9_223_232 + 513 * 7 + 80),
    "the head of SGS": (
        {"head_width": (4096, 4096), "dropout": 0.5, "num_classes": 100},
        9_223_232 + 513 * 4096 + 4097 * 4096 + 4097 * 100,
    ),
    "a thousandth": ({"width": 0.001}, 9 * 10 + 16 + 20),
}


@pytest.mark.parametrize("case", VGG_SETTINGS)
def test_settings_of_vgg(case):
    settings, parameters = VGG_SETTINGS[case]
    model = on_meta(models.vgg11, **settings)
    assert size(model) == parameters
    backbone = models.features(model)
    outputs = backbone(torch.empty(2, 3, 32, 32, device="meta"))
    assert [out.shape[1] for out in outputs] == backbone.feature_info.channels()
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape[1] == settings.get("num_classes", 10)


def test_hidden_layers_of_vgg_drop_out_in_training_alone():
    model = models.vgg11(width=1 / 64, head_width=(64, 32), dropout=0.5)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
        model.hidden.train()
        features = model.hidden(torch.ones(1, 8))
    assert 4 < (features == 0).sum() < 32  # of 32, of which the ReLU and dropout take half each


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_networks(name):
    model = on_meta(getattr(models, name))
    parameters, convs = CIFAR[name]
    assert size(model) == parameters
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]) == convs
    for pixels in (32, 16):
        assert model(torch.empty(2, 3, pixels, pixels, device="meta")).shape == (2, 10)
    assert on_meta(getattr(models, name), num_classes=7, in_channels=1)(
        torch.empty(2, 1, 32, 32, device="meta")
    ).shape == (2, 7)
    hs = csla.hyper_search_model(model)
    assert len(csla.merge(hs).state_dict()) == len(model.state_dict())
    assert sum(1 for n, _ in hs.named_parameters() if n.endswith("scale_conv.weight")) == convs


def test_resnet_block_by_hand():
    block = models.resnet18().layer2[0].eval()
    x = torch.randn(2, 64, 6, 6)
    y = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    y = block.bn2(F.conv2d(y, block.conv2.weight, padding=1)) + block.shortcut[1](
        F.conv2d(x, block.shortcut[0].weight, stride=2)
    )
    torch.testing.assert_close(block(x), F.relu(y))


# ---- baselines


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=[g.name for g in GEOMETRIES])
@pytest.mark.parametrize("make", [models.repvgg_model, models.acb_model])
def test_branches_compute_what_they_merge_to(make, geometry: Geometry):
    into, out = geometry.channels
    plain = nn.Sequential(geometry.conv(), nn.BatchNorm2d(out)).double().eval()
    model = make(plain)
    assert not any(m.training for m in model.modules())
    assert (model[0].norm_identity is not None) == (geometry.shortcut and make is models.repvgg_model)
    randomise_norms(model)
    x = torch.randn(2, into, 9, 10, dtype=torch.float64)
    merged = csla.merge(model)
    assert type(merged[0]) is nn.Conv2d
    assert merged[0].kernel_size == plain[0].kernel_size
    assert merged[0].bias is not None
    torch.testing.assert_close(merged(x), model(x), rtol=0, atol=FORWARD_TOLERANCE)
    assert model(x).shape == plain(x).shape


def test_repvgg_by_hand():
    """RepVGG, Figure 2: BN(3x3) + BN(1x1) + BN(x), in train mode too."""
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-3))
    names = [n for n, _ in plain.named_modules()]
    model = models.repvgg_model(plain)
    block = model[0]
    assert isinstance(block, NormedBranches)
    assert [n for n, _ in plain.named_modules()] == names
    x = torch.randn(3, 4, 5, 5)

    def normalised(y):
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-3).sqrt()

    expected = (
        normalised(F.conv2d(x, plain[0].weight, padding=1))
        + normalised(F.conv2d(x, block.convs[1].weight))
        + normalised(x)
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert plain[1].num_batches_tracked == 0


def test_acb_has_its_kernels():
    model = models.acb_model(nn.Sequential(nn.Conv2d(4, 6, (3, 5), padding=(1, 2)), nn.BatchNorm2d(6)))
    assert [conv.kernel_size for conv in model[0].convs] == [(3, 5), (1, 5), (3, 1)]


@pytest.mark.parametrize(
    "branches", ["repvgg", "acb", "repghost", "mobileone:3", "replk:3", "unireplk", ["kxk", "3x3_d2"]]
)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2}, {"dilation": 2, "padding": 6, "groups": 4}])
def test_any_preset_has_a_form_with_a_norm_in_each_branch(branches, options):
    plain = nn.Sequential(nn.Conv2d(4, 4, 7, **{"padding": 3, **options}), nn.BatchNorm2d(4)).double().eval()
    model = normed_model(plain, branches=branches)
    search = csla.hyper_search_model(plain, branches=branches)
    sizes = [(conv.kernel_size, conv.dilation) for conv in model[0].convs]
    expected = [(m.kernel_size, m.dilation) for m in search[0].modules() if isinstance(m, nn.Conv2d)]
    assert sizes == expected
    assert (model[0].norm_identity is None) == (search[0].scale_identity is None)
    randomise_norms(model)
    x = torch.randn(2, 4, 15, 16, dtype=torch.float64)
    torch.testing.assert_close(csla.merge(model)(x), model(x), rtol=0, atol=FORWARD_TOLERANCE)


def test_branches_of_a_fixed_value_have_no_norm():
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    for branches in ("qarepvgg", ["kxk", "1x1=1"], ["kxk", "identity=1"]):
        with pytest.raises(ValueError, match="branches of 0: those of a fixed value have no form with a norm in each"):
            normed_model(plain, branches=branches)


def test_branches_need_batch_norms():
    with pytest.raises(
        ValueError, match="need a BatchNorm2d with running statistics after each conv, got 0: GroupNorm"
    ):
        models.repvgg_model(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)))
    with pytest.raises(ValueError, match="multi-branch blocks already"):
        models.acb_model(models.repopt_vgg_small("repvgg"))


def test_small_target_takes_grad_mult_and_sgs_names():
    """The names that a scales file, a checkpoint and a log share."""
    model = models.repopt_vgg_small(num_classes=10)
    scales = csla.extract_scales(models.repopt_vgg_small("hs", 10))
    mults = csla.grad_mults(model, scales)
    opt = gr.FusedRepSGD(gr.param_groups(model, 1e-4), lr=0.1, momentum=0.9, grad_mults=mults)
    assert all(opt.grad_mult(p) is mult for p, mult in mults.items())
    assert [name for name, p in model.named_parameters() if p in mults] == [f"{name}.weight" for name in scales]
