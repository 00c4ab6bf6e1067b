"""models.features: stage outputs against the classifier's own, timm's convention, frozen parts, scales files."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases_csla import random_scales
from test_models import on_meta
from timm_alone import importable_timm
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import csla, models

NETWORKS = {
    "repopt_vgg_b1": {},
    "repopt_vgg_small": {"strides": (2, 1, 3)},
    "resnet18": {},
    "resnet50": {"stem": "imagenet", "se": True},
    "vgg13": {"head_width": 8},
    "vgg16_imagenet": {"head_width": 8},
    "preact_resnet34": {},
    "pyramidnet_a48": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_as_feature_info_says(name):
    model = on_meta(getattr(models, name), **NETWORKS[name])
    backbone = models.features(model)
    info = backbone.feature_info
    outputs = backbone(torch.empty(2, 3, 192, 384, device="meta"))
    assert [out.shape[1] for out in outputs] == info.channels()
    assert [(192 // r, 384 // r) for r in info.reduction()] == [tuple(out.shape[2:]) for out in outputs]
    assert all(backbone.get_submodule(name) is not None for name in info.module_name())
    left = model.state_dict().keys() - backbone.state_dict().keys()
    assert {key.split(".")[0] for key in left} <= {"linear", "hidden", "norm"}
    assert "linear.weight" in left


@pytest.mark.parametrize("name", ["repopt_vgg_small", "resnet18", "vgg11", "pyramidnet_a48"])
def test_outputs_are_those_inside_the_classifier(name):
    model = getattr(models, name)().eval()
    seen = {}
    for inner, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, inner=inner: seen.update({inner: output}))
    x = torch.randn(2, 3, 17, 24)
    backbone = models.features(model)
    # In place, VGG's ReLU writes over the norm's output, and is the last module of its stage.
    outputs = backbone(x)
    model(x)
    assert len(outputs) == len(backbone.feature_info.module_name()) > 3 - (name == "repopt_vgg_small")
    for inner, output in zip(backbone.feature_info.module_name(), outputs):
        assert torch.equal(output, seen[inner]), inner


# (ours, its settings, timm's)
SAME_STAGES = [
    ("resnet18", {"stem": "imagenet"}, "resnet18"),
    ("resnet50", {"stem": "imagenet"}, "resnet50"),
    ("vgg16", {}, "vgg16_bn"),
    ("vgg11", {}, "vgg11_bn"),
    ("repopt_vgg_b1", {}, "repvgg_b1"),
]


@pytest.mark.parametrize(("name", "settings", "timms"), SAME_STAGES)
@pytest.mark.parametrize("out_indices", [None, (1, 3), (2, -1)])
def test_the_convention_is_timms(name, settings, timms, out_indices):
    ours = models.features(on_meta(getattr(models, name), **settings), out_indices)
    with importable_timm():
        import timm

        chosen = {} if out_indices is None else {"out_indices": out_indices}
        if name.startswith("vgg") and out_indices is None:
            chosen = {"out_indices": range(6)}  # timm's default is the first five stages
        theirs = on_meta(timm.create_model, timms, features_only=True, **chosen)
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    x = torch.empty(1, 3, 64, 96, device="meta")
    assert [out.shape for out in ours(x)] == [out.shape for out in theirs(x)]


def test_later_stages_are_left_out():
    """Parameters that no output needs would be an error under DistributedDataParallel."""
    for name in ("resnet18", "vgg11", "repopt_vgg_small"):
        backbone = models.features(getattr(models, name)(), (0, 1))
        sum(out.sum() for out in backbone(torch.randn(2, 3, 16, 16))).backward()
        assert all(p.grad is not None for p in backbone.parameters()), name


def test_outputs_come_from_the_largest_to_the_smallest():
    backbone = models.features(models.repopt_vgg_small(strides=(1, 2, 3)), (-1, 0))
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([32, 64], [1, 6])
    assert [out.shape[1:] for out in backbone(torch.randn(1, 3, 12, 18))] == [(32, 12, 18), (64, 2, 3)]


def test_the_model_stays_as_it_was():
    model = models.resnet18(4).eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    scores = model(x)
    backbone = models.features(model).train()
    assert not model.training
    backbone(x)
    assert model(x).shape == (2, 4)
    assert torch.equal(model(x), scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.feature_info is None


@pytest.mark.parametrize("mode", ["hs", "csla", "repvgg"])
def test_multi_branch_forms_are_backbones_too(mode):
    scales = random_scales(models.repopt_vgg_small(num_classes=4)) if mode == "csla" else None
    model = models.repopt_vgg_small(mode, 4, scales=scales).double().eval()
    backbone = models.features(model, (1, 2))
    merged = csla.merge(backbone, fold_norm=True)
    x = torch.randn(2, 3, 12, 8, dtype=torch.float64)
    for a, b in zip(backbone(x), merged(x)):
        torch.testing.assert_close(a, b)
    assert merged.feature_info == backbone.feature_info
    assert [type(m) for m in merged.modules() if isinstance(m, nn.Conv2d)] == [nn.Conv2d] * 6
    assert torch.equal(pickle.loads(pickle.dumps(backbone))(x)[1], backbone(x)[1])


def frozen_by_gradient(backbone):
    backbone.stage0.requires_grad_(False)


def frozen_by_mode(backbone):
    frozen_by_gradient(backbone)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


class FrozenNorm(nn.Module):
    """As torchvision's FrozenBatchNorm2d: buffers alone."""

    def __init__(self, norm):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x):
        weight, bias = self.weight * (self.running_var + 1e-5).rsqrt(), self.bias
        return x * weight.view(1, -1, 1, 1) + (bias - self.running_mean * weight).view(1, -1, 1, 1)


def frozen_by_class(backbone):
    frozen_by_gradient(backbone)
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, FrozenNorm(child))


@pytest.mark.parametrize("freeze", [lambda backbone: None, frozen_by_gradient, frozen_by_mode, frozen_by_class])
def test_a_backbone_trains_with_the_scales_of_the_classifier(freeze, tmp_path):
    """As explicit CSLA blocks do, with norms that learn, that are in eval mode, and that cannot learn."""
    csla.save_scales(random_scales(models.repopt_vgg_small(num_classes=4)), tmp_path / "scales.pth")
    scales = csla.load_scales(tmp_path / "scales.pth")
    plain = models.features(models.repopt_vgg_small(num_classes=4)).double()
    explicit = csla.csla_model(plain, scales)
    plain.load_state_dict(csla.merge(explicit).state_dict())
    inputs = [torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(4)]
    for model in (plain, explicit):
        freeze(model)
    mults = csla.grad_mults(plain, scales)
    options = {"lr": 0.01, "momentum": 0.9}
    target = gr.FusedRepSGD(gr.param_groups(plain, 1e-3), grad_mults=mults, **options)
    oracle = torch.optim.SGD(gr.param_groups(explicit, 1e-3), **options)
    first = copy.deepcopy(plain.state_dict())
    for x in inputs:
        for model, optimizer in ((plain, target), (explicit, oracle)):
            optimizer.zero_grad()
            sum(out.square().mean() for out in model(x)).backward()
            optimizer.step()
    merged = csla.merge(explicit).state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(value, merged[name], atol=1e-10, rtol=0)
        moved = not torch.equal(value, first[name])
        trains = freeze.__name__ == "<lambda>" or not name.startswith("stage0")
        if name.endswith("conv.weight"):
            assert moved == trains
        elif freeze in (frozen_by_mode, frozen_by_class):
            assert not moved, name


@pytest.mark.parametrize("freeze", [frozen_by_gradient, frozen_by_mode, frozen_by_class])
def test_spatial_scaling_of_a_backbone(freeze):
    backbone = models.features(models.repopt_vgg_small(), (1, 2)).train()
    freeze(backbone)
    modes = [module.training for module in backbone.modules()]
    buffers = {name: value.clone() for name, value in backbone.named_buffers()}
    optimizer = gr.FusedRepSGD(gr.param_groups(backbone, 1e-4), lr=0.01, momentum=0.9)
    sgs = gr.SpatialGradientScaling(backbone, optimizer, batches=1)
    sgs.update([torch.rand(4, 3, 16, 16)])
    scaled = {name for name, g in sgs.scalings.items() if not torch.equal(g, torch.ones_like(g))}
    assert scaled == {f"{block}.conv" for block in ("stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage2.2")}
    assert modes == [module.training for module in backbone.modules()]
    assert all(torch.equal(value, buffers[name]) for name, value in backbone.named_buffers())


def test_reinitialize_takes_a_backbone_and_fewer_stages():
    scales = random_scales(models.repopt_vgg_small(num_classes=4))
    classifier, whole = models.repopt_vgg_small(num_classes=4), models.features(models.repopt_vgg_small(num_classes=4))
    whole.load_state_dict(classifier.state_dict(), strict=False)
    for model in (classifier, whole):
        torch.manual_seed(0)
        csla.reinitialize(model, scales)
    assert all(torch.equal(value, classifier.state_dict()[name]) for name, value in whole.state_dict().items())
    part = models.features(models.repopt_vgg_small(), (0, 1))
    with pytest.raises(ValueError, match=r"stage2\.0\.conv: unexpected, the model has no such conv"):
        csla.reinitialize(part, scales)
    csla.reinitialize(part, {name: value for name, value in scales.items() if not name.startswith("stage2")})


@pytest.mark.parametrize("out_indices", [(), (3,), (-4,), (0, 0), (2, -1)])
def test_wrong_indices(out_indices):
    with pytest.raises(ValueError, match="out_indices must be different stages out of 0 to 2, got"):
        models.features(models.repopt_vgg_small(), out_indices)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"networks of gradrep_kernels.models that have stages, got Sequential; timm's"):
        models.features(nn.Sequential())
    with pytest.raises(ValueError, match=r"a backbone already, with out_indices \(0, 2\)"):
        models.features(models.features(models.repopt_vgg_small(), (0, 2)))
