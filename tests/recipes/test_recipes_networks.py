"""Networks of the commands: names, settings, timm's, and the networks of the SGS paper's Table 4."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from timm_alone import importable_timm
from torch import nn
from torch.nn import functional as F

import gradrep_kernels as gr
from gradrep_kernels.recipes import networks
from gradrep_kernels.recipes.build import build, plain_model
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.networks import MODELS, check_model, check_settings, has_setting, make_network
from gradrep_kernels.recipes.options.resolve import OPTIONS, resolve
from gradrep_kernels.recipes.table import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")

# SGS, Table 4: the name of the paper, --model and the options beside it. docs/howto/backbones.md shows the table.
TABLE_4 = {
    "VGG-11": ("vgg11", {}),
    "VGG-13": ("vgg13", {}),
    "VGG-16": ("vgg16", {"head_width": 16}),
    "VGG-19": ("vgg19", {}),
    "ResNet-18": ("resnet18", {}),
    "ResNet-34": ("resnet34", {}),
    "ResNet-50": ("resnet50", {}),
    "ShuffleNet": ("shufflenet", {}),
    "MobileNetV2": ("mobilenet_v2", {}),
    "SeResNet-18": ("resnet18", {"se": True}),
    "SeResNet-34": ("resnet34", {"se": True}),
    "PreActResNet-18": ("preact_resnet18", {}),
    "PreActResNet-34": ("preact_resnet34", {}),
    "PyramidNet (48)": ("pyramidnet_a48", {}),
    "PyramidNet (84)": ("pyramidnet_a84", {}),
    "PyramidNet (270)": ("pyramidnet_a270", {}),
    "Xception": ("xception", {}),
}


@pytest.fixture(scope="module")
def timm():
    with importable_timm():
        import timm

        yield timm


def one_step(model, side, channels=3):
    """Train a step, and return the weights that moved."""
    optimizer = gr.FusedRepSGD(gr.param_groups(model, 5e-4), lr=0.1, momentum=0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = F.cross_entropy(model.train()(torch.randn(2, channels, side, side)), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    assert bool(loss.isfinite())
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("paper", TABLE_4)
def test_networks_of_table_4_train(paper):
    name, settings = TABLE_4[paper]
    assert check_model("--model", name) == name
    model = make_network(name, num_classes=3, in_channels=3, **settings)
    moved = one_step(model, 8)
    convs = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert moved >= convs


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("repopt_vgg")])
def test_every_name_makes_a_network_of_these_shapes(name):
    with torch.device("meta"):
        model = make_network(check_model("--model", name), num_classes=7, in_channels=1, stem="imagenet")
        assert model(torch.empty(2, 1, 64, 64)).shape == (2, 7)


# ---- names


@pytest.mark.parametrize(("short", "name"), [("small", "repopt_vgg_small"), ("deep", "repopt_vgg_deep")])
def test_short_names(short, name):
    assert check_model("--model", short) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet19", "--model must be one of small, .*, or timm:NAME, got 'resnet19'; near it are .*resnet18"),
        ("?", r"--model must be one of small, .*, xception, or timm:NAME, got '\?'$"),
        ("features", "--model must be one of"),
        ("repvgg_model", "--model must be one of"),
        ("", "--model must be one of"),
    ],
)
def test_names_that_are_none(text, message):
    with pytest.raises(InputError, match=message):
        check_model("--model", text)


def test_timm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (
        lambda: check_model("--model", "timm:resnet18"),
        lambda: make_network("timm:resnet18", num_classes=2, in_channels=3),
    ):
        with pytest.raises(InputError, match="--model timm:resnet18 needs timm: pip install timm"):
            call()


def test_names_that_timm_does_not_have(timm):
    assert check_model("--model", "timm:resnet18") == "timm:resnet18"
    with pytest.raises(InputError, match=r"--model: timm .* has no model 'resnet19'; near it are timm:resnet1"):
        check_model("--model", "timm:resnet19")
    with pytest.raises(InputError, match=r"has no model ''$"):
        check_model("--model", "timm:")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "repvgg_a0"])
def test_networks_of_timm_train(timm, name):
    model = make_network(f"timm:{name}", num_classes=3, in_channels=1)
    assert model.num_classes == 3
    assert one_step(model, 32, channels=1)


# ---- settings

NO_HEAD = {"head_width": (), "dropout": 0.0, "width": 1 / 64}
"""An empty tuple and 0 are settings, None and False are not."""


def test_settings_reach_the_network():
    model = make_network("repopt_vgg_small", num_classes=3, in_channels=1, strides=(1, 1, 2), se=True)
    assert [block.conv.stride for block in (model.stage0, model.stage1[0], model.stage2[0])] == [(1, 1), (1, 1), (2, 2)]
    assert model.stage0.post_se.down.weight.shape == (8, 32, 1, 1)
    assert make_network("vgg16", num_classes=3, in_channels=1, head_width=9).linear.in_features == 9
    model = make_network("vgg16_imagenet", num_classes=3, in_channels=1, head_width=(9, 8), width=1 / 64)
    assert [layer.weight.shape for layer in model.hidden[::3]] == [(9, 7 * 7 * 8), (8, 9)]
    assert model.hidden[2].p == 0.5
    assert make_network("vgg11", num_classes=3, in_channels=1, head_width=(9,), dropout=0.25).hidden[2].p == 0.25
    assert isinstance(make_network("vgg16_imagenet", num_classes=3, in_channels=1, **NO_HEAD).hidden, nn.Identity)
    for stem, stride in ((None, 1), ("cifar", 1), ("imagenet", 2)):
        model = make_network("resnet50", num_classes=3, in_channels=1, stem=stem)
        assert model.conv1.stride == (stride, stride)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vgg11", {"strides": (1, 2, 2)}, "--strides is for the models small, deep, .*; vgg11 has no such setting"),
        ("vgg11", {"se": True}, "--se is for the models .*, resnet50; vgg11 has no such setting"),
        ("resnet18", {"head_width": 8}, "--head-width is for the models vgg11, .*; resnet18 has no such setting"),
        ("timm:resnet18", {"se": True}, "--se is for the models .*; timm:resnet18 has no such setting"),
        ("repopt_vgg_small", {"strides": (1, 2)}, r"--strides must be 3 whole numbers of at least 1, .*, got \(1, 2\)"),
        ("vgg11", {"head_width": 0}, "--head-width must be at least 1"),
        ("vgg11", {"head_width": (8, 0)}, r"--head-width must be at least 1, or None, got \(8, 0\)"),
        ("vgg16_imagenet", {"head_width": ()}, "--dropout must be 0 without --head-width, got 0.5"),
        ("vgg11", {"width": -0.5}, "--width must be a number above 0, got -0.5"),
        ("vgg11", {"dropout": 1.0, "head_width": 4}, r"--dropout must be in \[0, 1\), got 1.0"),
        ("vgg11", {"dropout": 0.5}, "--dropout must be 0 without --head-width, got 0.5"),
        (
            "repopt_vgg_deep",
            {"width": 0.5},
            "--width is for the models repopt_ghostnet, vgg11, .*, vgg19; repopt_vgg_deep has no such",
        ),
        ("repopt_vgg_deep", {"dropout": 0.0}, "--dropout is for the models .*, vgg11, .*; repopt_vgg_deep has no such"),
    ],
)
def test_settings_that_a_model_does_not_take(name, settings, message):
    with pytest.raises(InputError, match=message):
        check_settings(name, **settings)
    with pytest.raises(InputError, match=message):
        make_network(name, num_classes=2, in_channels=3, **settings)


def test_checks_draw_nothing():
    state = torch.get_rng_state()
    check_settings("repopt_vgg_small", strides=(1, 2, 2), se=True)
    check_settings("vgg16", head_width=512)
    check_settings("vgg16")
    assert torch.equal(state, torch.get_rng_state())


def test_each_setting_is_an_option():
    assert all(name in OPTIONS for name in networks.SETTINGS)
    assert [name for name in networks.SETTINGS if has_setting("repopt_vgg_b1", name)] == ["strides", "se"]


# ---- the options of a job


def test_a_job_has_the_network_of_its_options(source, data):
    given = {"data": source, "model": "small", "strides": ("1", "1", "2"), "se": True, "recipe": ("repopt",)}
    options = resolve(given)
    model = plain_model(options, data, 0)
    assert model.stage1[0].conv.stride == (1, 1)
    assert model.stage0.post_se.down.weight is not None
    with pytest.raises(InputError, match="--strides must be 3 whole numbers of at least 1"):
        resolve({**given, "strides": ("1", "2")})
    with pytest.raises(InputError, match="--se is for the models"):
        resolve({**given, "model": "vgg11", "strides": None})


@pytest.mark.parametrize(("side", "stride"), [(32, 1), (63, 1), (64, 2)])
def test_large_images_have_the_stem_for_them(source, data, side, stride):
    options = resolve({"data": source, "model": "resnet18", "recipe": ("sgd",)})
    model = plain_model(options, dataclasses.replace(data, side=side), 0)
    assert model.conv1.stride == (stride, stride)


def test_a_presets_setting_goes_where_the_model_has_none(source):
    """sgs-cifar-600 has VGG-16 with a hidden layer."""
    given = {"data": source, "preset": "sgs-cifar-600", "recipe": ("sgd",)}
    assert resolve(given).head_width == (512,)
    assert resolve({**given, "head_width": ("none",)}).head_width == ()
    assert resolve({**given, "model": "vgg19"}).head_width == (512,)
    assert resolve({**given, "model": "resnet18"}).head_width is None
    for wrong, needed in (({"width": 1e9}, "at most 100"), ({"head_width": 2**70}, "at most 1048576")):
        with pytest.raises(InputError, match=needed):
            resolve({**given, **wrong})
    # One without hidden layers does not take their dropout.
    assert resolve({**given, "preset": "sgs-cifar-200", "model": "repopt_ghostnet"}).dropout is None
    with pytest.raises(InputError, match="--head-width is for the models"):
        resolve({**given, "model": "resnet18", "head_width": 8})


def test_a_network_of_timm_is_trained_by_the_rows(timm, source, data):
    options = resolve({"data": source, "model": "timm:mobilenetv2_035", "recipe": ("repopt",)})
    assert options.model == "timm:mobilenetv2_035"
    scales = gr.csla.extract_scales(gr.csla.hyper_search_model(plain_model(options, data, 0)))
    trainee = build(RECIPES["repopt"], options, data, scales, 0, 0.1)
    assert trainee.model.get_classifier().out_features == len(data.classes)
    assert sum(trainee.optimizer.grad_mult(p) is not None for p in trainee.model.parameters()) == len(scales) > 0
