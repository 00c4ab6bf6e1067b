"""Scales files, their names, and the Grad Mults and initial weights that follow from them."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import re

import numpy as np
import pytest
import torch
from cases_csla import official, random_scales
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import BranchScales, csla

PUBLISHED = {
    "b1": ("RepOpt-VGG-B1-scales.pth", gr.models.repopt_vgg_b1),
    "b2": ("RepOpt-VGG-B2-scales.pth", gr.models.repopt_vgg_b2),
    "l1": ("RepOpt-VGG-L1-scales.pth", gr.models.repopt_vgg_l1),
    "l2": ("RepOpt-VGG-L2-scales.pth", gr.models.repopt_vgg_l2),
}
GHOST = "RepOptGhostNet_0_5x_scales.pth"


def small():
    return gr.models.repopt_vgg_small(num_classes=10)


def published_form(scales, *, conv_first=False, prefix=""):
    """Write the flat dict of the authors' code: block names, 1x1 first (B1, B2) or conv first (L1, L2)."""
    flat = {}
    for name, value in scales.items():
        tensors = value.tensors()
        for branch in ("conv", "1x1", "identity") if conv_first else ("1x1", "conv", "identity"):
            if branch in tensors:
                flat[f"{prefix}{name.removesuffix('.conv')}.scale_{branch}.weight"] = tensors[branch]
    return flat


def assert_same_scales(a, b):
    assert list(a) == list(b)
    for name in a:
        assert list(a[name].tensors()) == list(b[name].tensors()), name
        assert a[name].has_identity == b[name].has_identity, name
        for x, y in zip(a[name].tensors().values(), b[name].tensors().values()):
            assert x.dtype == y.dtype, name
            assert torch.equal(x, y), name


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("one_by_one", "searched"), [(True, True), (True, False), (False, True), (False, False)])
def test_round_trip(tmp_path, dtype, one_by_one, searched):
    scales = random_scales(small(), one_by_one=one_by_one, searched=searched, dtype=dtype)
    csla.save_scales(scales, tmp_path / "scales.pth")
    back = csla.load_scales(tmp_path / "scales.pth")
    assert_same_scales(scales, back)
    assert back["stage1.1.conv"].identity is True or searched
    flat = torch.load(tmp_path / "scales.pth", weights_only=True)
    assert set(list(flat)[:1]) == {"stage0.conv.scale_conv.weight"}
    assert all(isinstance(t, torch.Tensor) and t.dim() == 1 and t.dtype == dtype for t in flat.values())
    assert os.listdir(tmp_path) == ["scales.pth"]


def test_search_to_file_to_model(tmp_path):
    hs = csla.hyper_search_model(small())
    scales = csla.extract_scales(hs)
    csla.save_scales(scales, str(tmp_path / "scales.pth"))
    explicit = gr.models.repopt_vgg_small("csla", 10, scales=tmp_path / "scales.pth")
    assert_same_scales(csla.extract_scales(explicit), scales)
    assert list(scales) == [
        "stage0.conv",
        "stage1.0.conv",
        "stage1.1.conv",
        "stage2.0.conv",
        "stage2.1.conv",
        "stage2.2.conv",
    ]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scales.pth"
    scales = random_scales(small())
    csla.save_scales(scales, path)
    whole = path.read_bytes()

    def dies(_, where):
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        csla.save_scales(random_scales(small()), path)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["scales.pth"]


@pytest.mark.parametrize(("conv_first", "prefix"), list(itertools.product([False, True], ["", "module."])))
def test_published_naming(tmp_path, conv_first, prefix):
    scales = random_scales(small())
    torch.save(published_form(scales, conv_first=conv_first, prefix=prefix), tmp_path / "scales.pth")
    loaded = csla.load_scales(tmp_path / "scales.pth")
    assert_same_scales(loaded, {name.removesuffix(".conv"): value for name, value in scales.items()})
    model = small()
    by_block, by_conv = csla.grad_mults(model, loaded), csla.grad_mults(model, scales)
    assert list(by_block) == list(by_conv) == [p for n, p in model.named_parameters() if n.endswith("conv.weight")]
    assert all(by_block[p].same(by_conv[p], p.shape) for p in by_conv)


def test_ghost_naming(tmp_path):
    s, identity = torch.randn(4), torch.randn(4)
    torch.save(
        {"blocks.0.0.ghost1.fusion_scale.weight": identity, "blocks.0.0.ghost1.cheap_operation.1.weight": s},
        tmp_path / "ghost.pth",
    )
    ((name, value),) = csla.load_scales(tmp_path / "ghost.pth").items()
    assert name == "blocks.0.0.ghost1"
    assert value.one_by_one is None
    assert torch.equal(value.kxk, s)
    assert torch.equal(value.identity, identity)


def file_with(tmp_path, content):
    path = tmp_path / "scales.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


class Code:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


ONES = torch.ones(3)
NOT_SCALES = {
    "text": (
        b"not a file of torch",
        "is not a scales file: it is not torch's, or holds more than tensors; code is never unpickled",
    ),
    "empty_file": (b"", "is not a scales file"),
    "list": ([ONES], "it holds a list, needed is a flat dict of tensors"),
    "code": ({"a.scale_conv.weight": Code()}, "holds more than tensors; code is never unpickled"),
    "empty": ({}, "it is empty"),
    "checkpoint_without": (
        {"model": {"a.conv.weight": ONES}, "epoch": 3},
        "unknown key 'a.conv.weight'",
    ),
    "ghost_without_scales": (
        {f"blocks.0.{n}.weight": ONES for n in ("cheap_operation.0", "cheap_operation.1")},
        "unknown key 'blocks.0.cheap_operation.0.weight'; unknown key 'blocks.0.cheap_operation.1.weight'",
    ),
    "state_dict": (
        {f"{n}.{k}": ONES for n in ("a", "b") for k in ("conv.weight", "bn.weight", "bn.bias")},
        "unknown key 'a.conv.weight'; unknown key 'a.bn.weight'; unknown key 'a.bn.bias'; "
        "unknown key 'b.conv.weight'; and 2 more",
    ),
    "no_name": ({"scale_conv.weight": ONES}, "unknown key 'scale_conv.weight'"),
    "number_key": ({3: ONES}, "unknown key 3"),
    "number": ({"a.scale_conv.weight": 1.0}, "a.scale_conv.weight is a float, not a tensor"),
    "twice": (
        {"a.scale_conv.weight": ONES, "module.a.scale_conv.weight": ONES},
        "module.a.scale_conv.weight is the second conv scale of a",
    ),
    "two_schemes": (
        {"a.scale_identity.weight": ONES, "a.scale_conv.weight": ONES, "a.fusion_scale.weight": ONES},
        "is the second identity scale of a",
    ),
    "no_conv": ({"a.scale_1x1.weight": ONES}, "a has no scale_conv"),
    "nan": ({"a.scale_conv.weight": ONES * math.nan}, "a: kxk must be finite, got NaN or inf"),
    "inf": ({"a.scale_conv.weight": ONES, "a.scale_identity.weight": ONES * math.inf}, "a: identity must be finite"),
    "channels": (
        {"a.scale_conv.weight": ONES, "a.scale_1x1.weight": torch.ones(4)},
        "a: one_by_one has 4 channels, kxk has 3",
    ),
    "matrix": ({"a.scale_conv.weight": torch.ones(3, 1, 1, 1)}, r"a: kxk must have shape [O], got [3, 1, 1, 1]"),
}


@pytest.mark.parametrize("case", NOT_SCALES)
def test_wrong_files(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, message = NOT_SCALES[case]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        csla.load_scales(file_with(tmp_path, content))
    assert "scales.pth" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_missing_file(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no scales file at {path}"):
            csla.load_scales(path)
    with pytest.raises(FileNotFoundError, match="no scales file at"):
        gr.models.repopt_vgg_small("csla", scales=str(tmp_path / "no.pth"))


@pytest.mark.parametrize("scales", [None, "scales.pth", [1], {"a": torch.ones(3)}, {1: BranchScales(ONES)}])
def test_wrong_types(tmp_path, scales):
    for use in (
        lambda: csla.grad_mults(small(), scales),
        lambda: csla.csla_model(small(), scales),
        lambda: csla.save_scales(scales, tmp_path / "s.pth"),
    ):
        with pytest.raises(TypeError, match="scales must map names to BranchScales, got"):
            use()
    assert os.listdir(tmp_path) == []


# ---- names meet a model


def changed(changes):
    """Scales that fit the small model, but for these names (None: without it)."""
    scales = {**random_scales(small()), **changes}
    return {name: value for name, value in scales.items() if value is not None}


ONES32 = torch.ones(32)
BOTH, PLAIN, SHORT = BranchScales(ONES32, ONES32), BranchScales(ONES32), BranchScales(ONES32, None, True)
MISFITS = {  # what differs from right scales, and what the error says
    "missing": (
        {"stage1.0.conv": None, "stage2.0.conv": None},
        "2 mismatches: stage1.0.conv: missing; stage2.0.conv: missing",
    ),
    "unexpected": ({"stage3.0": PLAIN}, "1 mismatches: stage3.0: unexpected, the model has no such conv"),
    "several_convs": ({"stage2": PLAIN}, "stage2: holds 3 convs, one is needed"),
    "twice": ({"stage1.0": BOTH}, "stage1.0: stage1.0.conv has scales under another name already"),
    "channels": ({"stage2.0.conv": BOTH}, "stage2.0.conv: scales of 32 channels, stage2.0.conv has 64"),
    "identity_extra": ({"stage1.0.conv": SHORT}, "stage1.0.conv: an identity scale, but stage1.0.conv has no shortcut"),
    "identity_lacks": ({"stage1.1.conv": BOTH}, "stage1.1.conv: no identity scale, but stage1.1.conv has one"),
    "many": (
        {f"{old}.conv": None for old in ("stage0", "stage1.0", "stage1.1", "stage2.0", "stage2.1", "stage2.2")},
        "6 mismatches: stage0.conv: missing; stage1.0.conv: missing; stage1.1.conv: missing; "
        "stage2.0.conv: missing; and 2 more",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits(case):
    changes, message = MISFITS[case]
    scales = changed(changes)
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for use in (csla.grad_mults, csla.csla_model, csla.reinitialize):
        with pytest.raises(ValueError, match="the scales do not fit the model, ") as error:
            use(model, scales)
        assert message in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=re.escape(message)):
        gr.models.repopt_vgg_small("csla", scales=scales)


def test_grad_mults_by_hand():
    model = nn.Sequential(nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=2), nn.BatchNorm2d(4))
    s, t = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 1.0, -1.0, 0.0])
    ((param, mult),) = csla.grad_mults(model, {"0": BranchScales(s, t, torch.full((4,), 9.0))}).items()
    assert param is model[0].weight
    expected = (s**2).reshape(4, 1, 1, 1).repeat(1, 2, 3, 5)
    expected[:, :, 1, 2] += (t**2)[:, None]
    for o in range(4):
        expected[o, o % 2, 1, 2] += 1
    assert torch.equal(mult.dense(param.shape), expected)
    assert mult.nbytes == 4 * (4 * 15 + 4)
    assert gr.FusedRepSGD(model.parameters(), grad_mults={param: mult}).grad_mult(param) is mult


# ---- against the float64 formulas


def within_one_ulp(value, exact):
    """value float32, exact float64, both numpy"""
    return bool(
        (
            np.abs(value.astype(np.float64) - exact) <= np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        ).all()
    )


def formulas(scales, kxk, one):
    """Grad Mult (Eq. 3) and initial kernel (Eq. 4) of a dense conv, in float64 numpy."""
    s, t = (x.numpy().astype(np.float64)[:, None] for x in (scales.kxk, scales.one_by_one))
    kernel = kxk.numpy().astype(np.float64) * s[:, :, None, None]
    mult = np.broadcast_to((s * s)[:, :, None, None], kernel.shape).copy()
    kernel[:, :, 1, 1] += one.numpy().astype(np.float64)[:, :, 0, 0] * t
    mult[:, :, 1, 1] += t * t
    if scales.has_identity:
        inputs = kernel.shape[1]
        for o in range(kernel.shape[0]):
            kernel[o, o % inputs, 1, 1] += float(scales.identity[o])
            mult[o, o % inputs, 1, 1] += 1
    return mult, kernel


def assert_follows_formulas(model, scales):
    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [name.removesuffix(".conv") for name, _ in convs] == [name.removesuffix(".conv") for name in scales]
    mults = csla.grad_mults(model, scales)
    present = [conv.weight.detach().clone() for _, conv in convs]
    torch.manual_seed(1)
    csla.reinitialize(model, scales)
    torch.manual_seed(1)
    for (name, conv), value, kxk in zip(convs, scales.values(), present):
        one = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=False).weight.detach()
        mult, kernel = formulas(value, kxk, one)
        assert within_one_ulp(mults[conv.weight].dense(conv.weight.shape).numpy(), mult), name
        assert within_one_ulp(conv.weight.detach().numpy(), kernel), name


def test_small_model_follows_the_formulas():
    assert_follows_formulas(small(), random_scales(small(), dtype=torch.float32))


def test_published_b1_follows_the_formulas():
    scales = csla.load_scales(official(PUBLISHED["b1"][0]))  # before 52 M weights are drawn
    assert_follows_formulas(gr.models.repopt_vgg_b1(), scales)


def thin(model):
    """Give `model` groups of at most 8 inputs, and with them a hundredth of the weights.

    Names, channels and shortcuts stay.
    """
    for block in [m for m in model.modules() if hasattr(m, "conv")]:
        conv = block.conv
        groups = max(
            g
            for g in range(1, conv.in_channels + 1)
            if conv.in_channels % g == conv.out_channels % g == 0 and (conv.in_channels // g >= 8 or g == 1)
        )
        block.conv = nn.Conv2d(
            conv.in_channels, conv.out_channels, 3, conv.stride, padding=1, groups=groups, bias=False, device="meta"
        )
    return model.to_empty(device="cpu")


@functools.cache
def on_meta(name):
    """The published network without data, built once for the tests that only read its shapes."""
    with torch.device("meta"):
        return PUBLISHED[name][1]()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_meet_their_models(name):
    scales = csla.load_scales(official(PUBLISHED[name][0]))
    model = on_meta(name)
    mults = csla.grad_mults(model, scales)
    assert len(mults) == len(scales) == sum(1 for n, _ in model.named_parameters() if n.endswith("conv.weight"))
    assert {value.kxk.dtype for value in scales.values()} == {torch.float32}
    assert 0.001 < float((torch.cat([value.kxk for value in scales.values()]) < 0).double().mean()) < 0.06
    if name in ("b1", "b2"):
        assert sum(mult.nbytes for mult in mults.values()) < 1_000_000  # a dense multiplier per weight: 199 MB and more
    other = {"b1": "l1", "l1": "b1", "b2": "l2", "l2": "b2"}[name]
    with pytest.raises(ValueError, match="the scales do not fit the model, "):
        csla.grad_mults(on_meta(other), scales)


@pytest.mark.parametrize("name", ["b2", "l1", "l2"])
def test_published_scales_follow_the_formulas(name):
    scales = csla.load_scales(official(PUBLISHED[name][0]))
    model = thin(copy.deepcopy(on_meta(name)))
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_follows_formulas(model, scales)


def test_published_ghost_multipliers_need_the_file_alone():
    scales = csla.load_scales(official(GHOST))
    assert len(scales) == 32
    for name, value in scales.items():
        assert name.startswith("blocks.")
        assert value.one_by_one is None
        assert isinstance(value.identity, torch.Tensor)
        for k in (3, 5):
            mult = value.grad_mult(k).dense((value.channels, 1, k, k)).numpy()
            exact = np.broadcast_to((value.kxk.numpy().astype(np.float64) ** 2)[:, None, None, None], mult.shape).copy()
            exact[:, 0, k // 2, k // 2] += 1
            assert within_one_ulp(mult, exact), name
