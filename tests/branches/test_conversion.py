"""Partial conversion: chosen convolutions, partial scales, blocks of other code, wrappers, and the report."""

from __future__ import annotations

import argparse
import re

import pytest
import torch
from cases_csla import random_scales
from foreign_blocks import Foreign, Plain
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import gradrep_kernels as gr
from gradrep_kernels import BranchScales, csla


class Dense(nn.Module):
    """Norm first, as in DenseNet: no norm follows the 3 x 3 convolutions, but for the stem's."""

    def __init__(self, layers: int = 3):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.layers = nn.ModuleList()
        for n in range(layers):
            layer = nn.Module()
            layer.norm1, layer.conv1 = nn.BatchNorm2d(8 + 4 * n), nn.Conv2d(8 + 4 * n, 8, 1, bias=False)
            layer.norm2, layer.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)
            self.layers.append(layer)
        self.head = nn.Linear(8 + 4 * layers, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            new = layer.conv2(F.relu(layer.norm2(layer.conv1(F.relu(layer.norm1(x))))))
            x = torch.cat((x, new), 1)
        return self.head(x.mean((2, 3)))


STEM, CONV2 = ["stem.0"], [f"layers.{n}.conv2" for n in range(3)]


# ---- where


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("stem", STEM),
        ("stem.0", STEM),
        (["stem", "layers.1"], [*STEM, "layers.1.conv2"]),
        ("*.conv2", CONV2),
        (("layers.[02].*",), [CONV2[0], CONV2[2]]),
        ("*", STEM + CONV2),
        (lambda name, conv: conv.out_channels == 4, CONV2),
        (iter(["layers"]), CONV2),
    ],
)
def test_where_chooses(where, expected, no_warnings):
    model = Dense()
    search = csla.hyper_search_model(model, where=where)
    scales = csla.extract_scales(search)
    assert list(scales) == expected
    assert search(torch.randn(2, 3, 6, 6)).shape == (2, 5)
    explicit = csla.csla_model(model, scales, partial=True)
    assert list(csla.extract_scales(explicit)) == expected
    assert len(csla.grad_mults(model, scales, partial=True)) == len(expected)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("stam", ValueError, "where: the model has no convolution of that name, or below it: stam"),
        (["stem", "layers.7", "x*"], ValueError, "or below it: layers.7; x*"),
        ("head", ValueError, "or below it: head"),
        ("*.conv1", ValueError, "model has no odd k x k nn.Conv2d that `where` chooses (stem.0: not chosen by `where`"),
        (lambda name, conv: False, ValueError, "model has no odd k x k nn.Conv2d that `where` chooses"),
        (3, TypeError, "where must be names, patterns or a function of (name, conv), got 3"),
        ([Dense], TypeError, "where must be names, patterns or a function"),
        (nn.Identity(), TypeError, "where must be names, patterns or a function"),
    ],
)
def test_where_is_checked(where, error, message):
    with pytest.raises(error, match=re.escape(message)):
        csla.hyper_search_model(Dense(), where=where)


def test_chosen_convolutions_train_as_their_blocks(no_warnings):
    """No norm follows them, and CSLA = GR all the same. What is not chosen trains as it did."""
    model = Dense().double()
    scales = {name: value for name, value in random_scales(Dense(0), dtype=torch.float64).items()}
    g = torch.Generator().manual_seed(3)
    for name in CONV2[::2]:
        s, t = (torch.randn(4, generator=g, dtype=torch.float64) for _ in range(2))
        scales[name] = BranchScales(s, t)
    torch.manual_seed(8)
    explicit = csla.csla_model(model, scales, partial=True)
    torch.manual_seed(8)
    csla.reinitialize(model, scales, partial=True, force=True)
    options = {"lr": 0.05, "momentum": 0.9}
    sgd = torch.optim.SGD(gr.param_groups(explicit, 1e-2), **options, foreach=False)
    ours = gr.FusedRepSGD(
        gr.param_groups(model, 1e-2), **options, grad_mults=csla.grad_mults(model, scales, partial=True)
    )
    for _ in range(20):
        x = torch.randn(4, 3, 6, 6, generator=g, dtype=torch.float64)
        for m, opt in ((explicit, sgd), (model, ours)):
            opt.zero_grad()
            m(x).square().mean().backward()
            opt.step()
    merged = csla.merge(explicit)
    for (name, p), q in zip(model.named_parameters(), merged.parameters()):
        assert float((p - q).detach().abs().max()) < 1e-12, name


# ---- partial scales


def test_partial_scales_are_asked_for(no_warnings):
    model = gr.models.repopt_vgg_small(num_classes=10)
    scales = random_scales(model)
    some = {name: scales[name] for name in ("stage0.conv", "stage2.1.conv")}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for use in (csla.grad_mults, csla.csla_model, csla.reinitialize):
        with pytest.raises(
            ValueError, match=r"stage1\.0\.conv: missing; .*\(partial=True accepts scales that leave out"
        ):
            use(model, some)
        with pytest.raises(ValueError, match="scales are empty"):
            use(model, {}, partial=True)
        with pytest.raises(ValueError, match=r"1 mismatches: stage9: unexpected, the model has no such conv$"):
            use(model, {**some, "stage9": some["stage0.conv"]}, partial=True)
        with pytest.raises(ValueError, match=r"stage1\.0\.conv: scales of 64 channels, stage1\.0\.conv has 32$"):
            use(model, {**some, "stage1.0.conv": scales["stage2.0.conv"]}, partial=True)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert list(csla.grad_mults(model, some, partial=True)) == [model.stage0.conv.weight, model.stage2[1].conv.weight]
    csla.reinitialize(model, some, partial=True)
    moved = [name for name, p in model.named_parameters() if not torch.equal(before[name], p)]
    assert moved == ["stage0.conv.weight", "stage2.1.conv.weight"]
    csla.reinitialize(model, {"stage1.1": scales["stage1.1.conv"]}, partial=True)  # the others: another time


def test_a_convolution_that_cannot_have_scales_says_why():
    s = BranchScales(torch.ones(8))
    model = Dense()
    model.layers[0].conv1 = nn.Conv2d(8, 8, 2)
    with pytest.raises(ValueError, match=r"layers\.0\.conv1: unexpected, its conv cannot have any: kernel 2 x 2"):
        csla.grad_mults(model, {"stem.0": s, "layers.0.conv1": s})


def test_a_shortcut_that_was_not_searched_is_left_out_when_asked_for():
    """Scales of a strided network for its dilated form, in which one more conv has a shortcut."""

    def network(stride):
        return nn.Sequential(
            nn.Conv2d(3, 6, 5, padding=2), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, stride, 1), nn.BatchNorm2d(6)
        )

    scales = csla.extract_scales(csla.hyper_search_model(network(2), init=0.8))
    dilated = network(1)
    with pytest.raises(ValueError, match=r"2: no identity scale, but 2 has one \(partial=True accepts"):
        csla.grad_mults(dilated, scales)
    mult = csla.grad_mults(dilated, scales, partial=True)[dilated[2].weight].dense((6, 6, 3, 3))
    assert float(mult[0, 0, 1, 1]) == pytest.approx(2 * 0.8**2)
    assert float(mult[0, 0, 0, 1]) == pytest.approx(0.8**2)
    block = csla.csla_model(dilated, scales, partial=True)[2]
    assert block.scale_identity is None


# ---- a warning where most stays plain, and the report


def test_most_convolutions_staying_plain_is_said_aloud(no_warnings):
    model = Dense()
    message = (
        r"^3 of 4 k x k convolutions stay plain \(layers\.0\.conv2: no sibling follows; .*`where` .*coverage\(model\)"
    )
    with pytest.warns(UserWarning, match=message) as heard:
        search = csla.hyper_search_model(model)
    assert heard[0].filename == __file__
    scales = csla.extract_scales(search)
    with pytest.warns(UserWarning, match="3 of 4 k x k convolutions stay plain"):
        csla.grad_mults(model, scales)
    csla.grad_mults(model, scales, partial=True)
    csla.hyper_search_model(Dense(1))  # one of two: not most
    report = str(csla.coverage(model)).splitlines()
    assert report[0] == "1 of 4 k x k convolutions would get branches"
    assert [" ".join(line.split()) for line in report[1:3]] == [
        "stem.0 3 x 3 3 x 3, 1 x 1",
        "layers.0.conv1 1 x 1 plain: kernel 1 x 1, needed is odd and above 1 both ways",
    ]
    assert len(report) == 1 + 7


def test_coverage_of_each_kind_of_model(no_warnings):
    plain = gr.models.repopt_vgg_small(num_classes=10)
    found = csla.coverage(plain)
    assert found.counts == (6, 6)
    assert found.left == {}
    assert repr(found) == str(found)
    assert found.converted["stage1.1.conv"] == "3 x 3, 1 x 1, identity"
    search = csla.hyper_search_model(plain, where="stage2")
    found = csla.coverage(search)
    assert found.counts == (3, 6)
    assert found.converted == {
        f"stage2.{n}.conv": "a CSLABlock of 3 x 3, 1 x 1" + ", identity" * (n > 0) for n in range(3)
    }
    assert list(found.left) == ["stage0.conv", "stage1.0.conv", "stage1.1.conv"]
    found = csla.coverage(plain, csla.extract_scales(search))
    assert found.counts == (3, 6)
    assert found.converted["stage2.1.conv"] == "scales of k x k, 1 x 1, identity"
    assert found.left["stage0.conv"] == "no scales"
    assert csla.coverage(plain, where="*.0.conv").counts == (2, 6)
    assert csla.coverage(csla.merge(search)).counts == (6, 6)
    assert csla.coverage(nn.Linear(2, 2)).counts == (0, 0)
    assert csla.coverage(torch.compile(plain)).converted == csla.coverage(plain).converted
    with pytest.raises(ValueError, match="unexpected, the model has no such conv"):
        csla.coverage(plain, {"nowhere": BranchScales(torch.ones(2))})


# ---- blocks of other code


class RepBlock(nn.Module):
    """A block that can be merged for deployment, as RepVGG's and MobileOne's can."""

    def __init__(self, channels):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.pointwise = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        return self.dense(x) if self.pointwise is None else self.dense(x) + self.pointwise(x)

    def reparameterize(self):
        self.pointwise = None


@pytest.mark.parametrize("shape", [(-1,), (1, -1, 1, 1)], ids=["vector", "broadcast"])
def test_scales_of_other_blocks_are_read_by_their_attributes(shape, tmp_path, no_warnings):
    def blocks(kind, **layer):
        return nn.Sequential(kind(3, 6, 2, **layer), nn.ModuleDict({"body": kind(6, 6, **layer)})["body"])

    search = blocks(Foreign, shape=shape)
    scales = csla.extract_scales(search)
    assert list(scales) == ["0", "1"]
    assert scales["0"].identity is False
    assert torch.equal(scales["1"].identity, torch.full((6,), 0.25))
    assert torch.equal(scales["1"].kxk, torch.full((6,), -1.5))
    model = blocks(Plain)
    mults = csla.grad_mults(model, scales)
    assert list(mults) == [model[0].conv.weight, model[1].conv.weight]
    expected = torch.full((6, 6, 3, 3), 2.25)
    expected[:, :, 1, 1] += 0.25
    expected[range(6), range(6), 1, 1] += 1
    assert torch.equal(mults[model[1].conv.weight].dense((6, 6, 3, 3)), expected)
    assert str(csla.coverage(search)).splitlines()[0] == "2 of 2 k x k convolutions have branches"
    if shape == (-1,):
        torch.save(search.state_dict(), tmp_path / "search.pth")
        assert list(csla.load_scales(tmp_path / "search.pth")) == ["0", "1"]
    with pytest.raises(ValueError, match=r"0\.conv: part of 0, a Foreign that is multi-branch already"):
        csla.hyper_search_model(search)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: setattr(b.scale_conv, "bias", nn.Parameter(torch.ones(6))), "scale_conv has a bias, which is no"),
        (lambda b: setattr(b.scale_1x1, "weight", nn.Parameter(torch.ones(2, 3))), "scale_1x1 has no weight of one"),
        (lambda b: setattr(b.scale_1x1, "weight", nn.Parameter(torch.ones(5))), "one_by_one has 5 channels, kxk has 6"),
        (lambda b: b.scale_identity.weight.data.fill_(torch.nan), "identity must be finite"),
        (lambda b: setattr(b, "scale_1x1", nn.Identity()), "scale_1x1 has no weight of one number per channel"),
    ],
)
def test_scales_of_other_blocks_that_cannot_be_used(spoil, message):
    block = Foreign(6, 6, bias=0.0)  # a bias of zeros is none
    assert list(csla.extract_scales(nn.Sequential(block))) == ["0"]
    spoil(block)
    with pytest.raises(ValueError, match=f"the model's scales cannot be used: 0: {message}"):
        csla.extract_scales(nn.Sequential(block))


def test_blocks_that_are_multi_branch_already_are_named(no_warnings):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), RepBlock(8), RepBlock(8))
    with pytest.warns(UserWarning, match=r"2 blocks are multi-branch already and stay so \(2, a RepBlock; 3, a RepB"):
        search = csla.hyper_search_model(model)
    assert list(csla.extract_scales(search)) == ["0"]
    found = csla.coverage(model, where=["0", "2"])
    assert found.left["2.dense.0"] == "part of 2, a RepBlock that is multi-branch already"
    with pytest.raises(ValueError, match=r"model has no odd .*; 2\.dense\.0: part of 2, a RepBlock"):
        csla.hyper_search_model(model, where="2.*")
    with pytest.raises(ValueError, match=r"where: 2\.dense\.0 cannot be converted: part of 2"):
        csla.hyper_search_model(model, where="2.dense.0")
    for block in model[2:]:
        block.reparameterize()
    assert len(csla.extract_scales(csla.hyper_search_model(model))) == 3


class Vae(nn.Module):
    """Not multi-branch, although it has a method of that name; nor is a convolution a branch scale."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1))
        self.scale_conv = nn.Conv2d(8, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def reparameterize(self, mean, spread):
        return mean + spread * torch.randn_like(spread)

    @property
    def fuse(self):
        raise RuntimeError("asked for a property")

    def forward(self, x):
        return self.norm(self.scale_conv(self.encode(x)))


def test_names_of_methods_and_attributes_alone_make_no_block(no_warnings):
    assert list(csla.extract_scales(csla.hyper_search_model(Vae()))) == ["encode.0", "scale_conv"]
    assert csla.coverage(Vae()).counts == (2, 3)


class Delegating(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


def test_a_wrapper_that_passes_attributes_on_is_no_second_block():
    search = nn.Sequential(Delegating(Foreign(6, 6)))
    assert list(csla.extract_scales(search)) == ["0.inner"]
    assert csla.coverage(search).counts == (1, 1)


# ---- wrappers, and checkpoints of the search


class AverageOf(nn.Module):
    """As timm's averages: the model is the attribute `module`."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, x):
        return self.module(x)


def compiled_blocks(model):
    model[0] = torch.compile(model[0])
    return model


WRAPPERS = [nn.DataParallel, AveragedModel, AverageOf, torch.compile, compiled_blocks]
WRAPPERS += [lambda m: torch.compile(AveragedModel(nn.DataParallel(m)))]
WRAPPER_IDS = ["data parallel", "averaged", "another average", "compiled", "compiled blocks", "all"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 5, padding=2), nn.BatchNorm2d(4)),
    )


@pytest.mark.parametrize("wrap", WRAPPERS, ids=WRAPPER_IDS)
def test_names_are_those_of_the_model_inside(wrap, tmp_path, no_warnings):
    names = ["0.0", "1.0"]
    search = wrap(csla.hyper_search_model(network()))
    scales = csla.extract_scales(search)
    assert list(scales) == names
    torch.save({"epoch": 3, "model": search.state_dict()}, tmp_path / "search.pth")
    assert list(csla.load_scales(tmp_path / "search.pth")) == names
    assert list(csla.coverage(search).converted) == names
    model = wrap(network())
    assert len(csla.grad_mults(model, scales)) == 2
    assert list(csla.extract_scales(csla.csla_model(model, scales))) == names
    csla.reinitialize(model, scales)
    assert list(csla.coverage(model).converted) == names
    assert csla.merge(search)(torch.randn(1, 3, 6, 6)).shape == (1, 4, 6, 6)


@pytest.mark.parametrize("form", ["bare", "model", "state_dict"])
def test_scales_out_of_a_checkpoint_of_the_search(form, tmp_path):
    search = csla.hyper_search_model(network(), init=0.6)
    state = search.state_dict()
    torch.save(state if form == "bare" else {form: state, "optimizer": {"state": {}}, "lr": 0.1}, tmp_path / "s.pth")
    loaded, expected = csla.load_scales(tmp_path / "s.pth"), csla.extract_scales(search)
    assert list(loaded) == list(expected)
    assert all(
        torch.equal(a.kxk, b.kxk) and a.has_identity == b.has_identity
        for a, b in zip(loaded.values(), expected.values())
    )


def test_scales_are_found_where_a_checkpoint_has_them(tmp_path):
    state = csla.hyper_search_model(network()).state_dict()
    torch.save({"model": {"weight": torch.ones(2)}, "state_dict": state}, tmp_path / "s.pth")
    assert list(csla.load_scales(tmp_path / "s.pth")) == ["0.0", "1.0"]
    torch.save({**state, "model": {"weight": torch.ones(2)}}, tmp_path / "s.pth")
    assert list(csla.load_scales(tmp_path / "s.pth")) == ["0.0", "1.0"]
    torch.save(nn.Sequential(Foreign(6, 6, bias=1.0)).state_dict(), tmp_path / "s.pth")
    with pytest.raises(ValueError, match=r"0\.scale_conv\.bias is not 0: a bias behind a scale is no part"):
        csla.load_scales(tmp_path / "s.pth")


def test_a_module_that_is_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": network()[0], "other": nn.ModuleDict({"module": network()[1]})})
    assert list(csla.coverage(model).converted) == ["module.0", "other.module.0"]
    assert list(csla.extract_scales(csla.hyper_search_model(model, where="module"))) == ["module.0"]
    assert gr.param_groups(model, 0.1)[0]["param_names"] == ["module.0.weight", "other.module.0.weight"]


def test_a_checkpoint_that_holds_a_model_says_how_to_read_it_where_it_is_trusted(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": csla.hyper_search_model(network()), "options": argparse.Namespace(lr=1)}, path)
    with pytest.raises(ValueError, match="code is never unpickled") as error:
        csla.load_scales(path)
    (recipe,) = re.findall(r"csla\.save_scales\(.*\)$", str(error.value))
    new = tmp_path / "scales.pth"
    exec(recipe, {"csla": csla, "torch": torch, "path": path, "new": new})
    assert list(csla.load_scales(new)) == ["0.0", "1.0"]


# ---- quantization-aware training


def prepared(model, fuse):
    import torch.ao.quantization as tq

    model.train()
    model.qconfig = tq.get_default_qat_qconfig("fbgemm")
    if fuse:
        model = tq.fuse_modules_qat(model, [[f"{n}.0", f"{n}.1", f"{n}.2"][: len(model[n])] for n in (0, 1)])
    return tq.prepare_qat(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "alone"])
def test_grad_mults_of_a_model_that_was_prepared_for_quantization(fuse):
    model = network()
    scales = random_scales(model, dtype=torch.float32)
    csla.reinitialize(model, scales)
    expected = [m.dense(p.shape) for p, m in csla.grad_mults(model, scales).items()]
    ready = prepared(model, fuse)
    mults = csla.grad_mults(ready, scales)
    assert all(torch.equal(m.dense(p.shape), e) for (p, m), e in zip(mults.items(), expected))
    assert csla.coverage(ready, scales).counts == (2, 2)
    masks = {n: mults[p].dense(p.shape) for n, p in ready.named_parameters() if p in mults}
    twin = prepared(network(), fuse)
    twin.load_state_dict(ready.state_dict())
    ours = gr.FusedRepSGD(ready.parameters(), lr=0.05, momentum=0.9, grad_mults=mults)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, foreach=False)
    for step in range(4):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        for m, opt in ((ready, ours), (twin, sgd)):
            opt.zero_grad()
            m(x).square().mean().backward()
        for n, p in twin.named_parameters():
            if n in masks:
                p.grad.mul_(masks[n])
        ours.step()
        sgd.step()
    for p, q in zip(ready.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="it is fake-quantized; convert the model before prepare_qat"):
        csla.hyper_search_model(ready)


@pytest.mark.filterwarnings("ignore")
def test_grad_mults_of_a_graph_that_was_prepared_for_quantization():
    """Its observers are registered between the convolutions, some of them twice."""
    import torch.ao.quantization as tq
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    torch.manual_seed(6)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers)
    scales = random_scales(model, dtype=torch.float32)
    expected = [m.dense(p.shape) for p, m in csla.grad_mults(model, scales).items()]
    x = torch.randn(1, 3, 6, 6)
    ready = prepare_qat_fx(model.train(), tq.get_default_qat_qconfig_mapping("fbgemm"), (x,))
    found = [m.dense(p.shape) for p, m in csla.grad_mults(ready, scales).items()]
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


# ---- which models are fresh

NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda c: nn.GroupNorm(2, c),
    "instance": lambda c: nn.InstanceNorm2d(c, affine=True),
    "instance, with statistics": lambda c: nn.InstanceNorm2d(c, track_running_stats=True),
    "batch without statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_trained_model_is_not_reinitialized_whatever_its_norms(norm, no_warnings):
    def fresh():
        torch.manual_seed(4)
        layers = [nn.Conv2d(3, 6, 3), NORMS[norm](6), nn.ReLU(), nn.Conv2d(6, 4, 3), NORMS[norm](4), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(4 * 4 * 4, 3))

    model = fresh()
    scales = random_scales(model)
    csla.reinitialize(model, scales)
    opt = gr.FusedRepSGD(model.parameters(), lr=0.05, grad_mults=csla.grad_mults(model, scales))
    for step in range(3):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        opt.step()
    loaded = fresh()
    loaded.load_state_dict(model.state_dict())  # loses the mark
    before = loaded[0].weight.detach().clone()
    message = r"^resuming\? leave reinitialize out.* needs grad_mults alone\. .*: the norm after 0"
    with pytest.raises(ValueError, match=message) as refusal:
        csla.reinitialize(loaded, scales)
    assert "force" not in str(refusal.value)
    assert torch.equal(loaded[0].weight, before)
    csla.reinitialize(loaded, scales, force=True)
    assert not torch.equal(loaded[0].weight, before)


def test_norms_that_start_with_other_numbers_are_fresh(no_warnings):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)  # the end of a residual branch
    nn.init.normal_(model[3].weight, 1.0, 0.02)  # has statistics, which are fresh
    csla.reinitialize(model, random_scales(model))


def test_where_nothing_tells_whether_a_model_is_fresh_a_warning_does(no_warnings):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"cannot tell whether these .* untrained.*: 0\. If they are") as heard:
        csla.reinitialize(model, random_scales(model))
    assert heard[0].filename == __file__
    frozen = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6).requires_grad_(False))
    with pytest.warns(UserWarning, match="cannot tell whether these convolutions are untrained"):
        csla.reinitialize(frozen, random_scales(frozen))
    csla.reinitialize(model, random_scales(model), force=True)
