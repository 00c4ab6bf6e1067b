"""csla: what is replaced, that the blocks compute what they merge to, and CSLA = GR."""

from __future__ import annotations

import copy
import itertools
import logging
import math

import pytest
import torch
from cases_branches import trained
from cases_csla import (
    EQUIVALENCE_TOLERANCE,
    EQUIVALENCES,
    FORWARD_TOLERANCE,
    GEOMETRIES,
    GEOMETRY,
    Equivalence,
    Geometry,
    random_scales,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import gradrep_kernels as gr
from gradrep_kernels import BranchScales, csla
from gradrep_kernels.branches.csla import CSLABlock

named = pytest.mark.parametrize


def by_name(cases):
    return {"argvalues": cases, "ids": [case.name for case in cases]}


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class Tree(nn.Module):
    """Convs that stand for a block (stem.conv, body.0, body.6.0, last) among those that do not."""

    def __init__(self):
        super().__init__()
        self.stem = Stem()
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8), nn.InstanceNorm2d(8)),
        )
        self.even = nn.Conv2d(8, 8, 2)
        self.even_norm = nn.BatchNorm2d(8)
        self.flat = nn.Conv2d(8, 8, (1, 3))
        self.flat_norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.up_norm = nn.BatchNorm2d(8)
        self.unlike = nn.Conv2d(8, 8, 3)
        self.unlike_norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(8, 4, 3, stride=2)
        self.register_module("none", None)
        self.last_norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.up_norm(self.up(self.flat_norm(self.flat(self.even_norm(self.even(self.body(self.stem(x))))))))
        return self.last_norm(self.last(self.unlike(x))).mean((2, 3))


SITES = ["stem.conv", "body.0", "body.6.0", "last"]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- what is replaced


def test_replaces_the_right_convs_and_logs_the_others(caplog):
    tree = Tree()
    before = state(tree)
    with caplog.at_level(logging.INFO, logger="gradrep_kernels.csla"):
        hs = csla.hyper_search_model(tree)
    blocks = {name: module for name, module in hs.named_modules() if isinstance(module, CSLABlock)}
    assert list(blocks) == SITES
    assert {name for name, block in blocks.items() if block.scale_identity is not None} == {"body.0", "body.6.0"}
    said = {record.getMessage().removeprefix("left as it is: ") for record in caplog.records}
    assert said == {
        "body.2: kernel 1 x 1, needed is odd and above 1 both ways",
        "body.4: a ReLU follows, not a norm",
        "even: kernel 2 x 2, needed is odd and above 1 both ways",
        "flat: kernel 1 x 3, needed is odd and above 1 both ways",
        "unlike: the norm that follows has 4 features, the conv 8 outputs",
    }
    assert_same_state(before, tree.state_dict())
    names = [name for name, _ in tree.named_modules()]
    assert [name for name, _ in hs.named_modules() if not any(name.startswith(f"{site}.") for site in SITES)] == names
    assert hs(torch.randn(2, 3, 12, 12)).shape == (2, 4)


def test_a_class_names_the_norm_that_is_no_sibling():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
            self.act = nn.ReLU()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.act(self.norm(self.inner(x)))

    with pytest.raises(ValueError, match=r"0\.inner\.0: no sibling follows"):
        csla.hyper_search_model(nn.Sequential(Apart()))
    Apart.norms_after = {"inner.0": "norm"}
    model = nn.Sequential(Apart())
    scales = csla.extract_scales(csla.hyper_search_model(model))
    assert list(scales) == ["0.inner.0"]
    model(torch.randn(2, 4, 6, 6))
    with pytest.raises(ValueError, match=r"the norm after 0\.inner\.0 has seen 1 batches"):
        csla.reinitialize(model, scales)
    x = torch.randn(2, 4, 6, 6)
    deployed = csla.merge(model.eval(), fold_norm=True)
    assert isinstance(deployed[0].norm, nn.Identity)
    torch.testing.assert_close(deployed(x), model(x))
    block = gr.models.repvgg_model(model)
    assert isinstance(csla.merge(block)[0].inner[0].bias, nn.Parameter)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.abs())


def test_leaves_shared_computed_and_foreign_weights():
    tied = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    tied[2].weight = tied[0].weight
    twice = nn.Conv2d(4, 4, 3)
    shared_norm = nn.BatchNorm2d(4)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    pruned = prune.random_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)
    for model, reason in [
        (tied, "0: it, its weight or its norm is registered at more than one place"),
        (nn.Sequential(twice, nn.BatchNorm2d(4), twice, nn.BatchNorm2d(4)), "0: it, its weight or its norm"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), shared_norm, nn.Conv2d(4, 4, 3), shared_norm),
            "0: it, its weight or its norm",
        ),
        (nn.Sequential(pruned, nn.BatchNorm2d(4)), "0: its weight is not a parameter (weight norm, pruning)"),
        (nn.Sequential(OwnConv(4, 4, 3), nn.BatchNorm2d(4)), "0: OwnConv may have a forward of its own"),
        (nn.Sequential(normed, nn.BatchNorm2d(4)), "0: ParametrizedConv2d may have"),
        (nn.Sequential(nn.Conv2d(4, 4, 3)), "0: no sibling follows"),
        (nn.Sequential(nn.Linear(4, 4)), "no nn.Conv2d at all"),
    ]:
        with pytest.raises(ValueError, match="model has no odd k x k") as error:
            csla.grad_mults(model, {})
        assert reason in str(error.value)


def test_wrappers_are_taken_off():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert list(csla.extract_scales(csla.hyper_search_model(wrapped))) == ["0"]
        assert list(csla.grad_mults(wrapped, random_scales(model))) == [model[0].weight]


def test_refuses_what_is_no_plain_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        csla.hyper_search_model([model])
    hs = csla.hyper_search_model(model)
    for again in (
        csla.hyper_search_model,
        lambda m: csla.csla_model(m, {}),
        lambda m: csla.grad_mults(m, {}),
        lambda m: csla.reinitialize(m, {}),
    ):
        with pytest.raises(ValueError, match=r"multi-branch blocks already \(0\): csla.merge"):
            again(hs)
    with pytest.raises(ValueError, match="model holds no Hyper-Search or CSLA block"):
        csla.extract_scales(model)


# ---- Hyper-Search


def test_depth_init_by_hand():
    """i counts the convs with a shortcut since the last one without: 0, 1, 2, 0, 0, 1."""
    widths = [3, 6, 6, 6, 4, 5, 5]
    layers = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Conv2d(into, out, 3, padding=1), nn.BatchNorm2d(out)]
    hs = csla.hyper_search_model(nn.Sequential(*layers).double())
    expected = [1, math.sqrt(2), 1, 1, 1, math.sqrt(2)]
    for n, start in enumerate(expected):
        block = hs[2 * n]
        assert isinstance(block.scale_conv.weight, nn.Parameter)
        assert torch.equal(block.scale_conv.weight, torch.full((widths[n + 1],), start, dtype=torch.float64))
        assert torch.equal(block.scale_1x1.weight, block.scale_conv.weight)
        if block.scale_identity is not None:
            assert torch.equal(block.scale_identity.weight, torch.ones(widths[n + 1], dtype=torch.float64))
    all_at = csla.hyper_search_model(nn.Sequential(*layers), init=1)
    assert all(
        bool((scale == 1).all()) for value in csla.extract_scales(all_at).values() for scale in value.tensors().values()
    )


@named("init", ["ones", math.nan, math.inf, True, None, [1.0]])
def test_init_is_checked(init):
    with pytest.raises(ValueError, match="init must be 'depth' or a finite number, got"):
        csla.hyper_search_model(Tree(), init=init)


def test_scales_train_and_do_not_decay():
    hs = csla.hyper_search_model(Tree())
    decays, stays = gr.param_groups(hs, 0.1)
    assert {"stem.conv.scale_conv.weight", "last.scale_1x1.weight", "body.0.bias", "stem.norm.weight"} <= set(
        stays["param_names"]
    )
    assert {"body.0.scale_identity.weight", "body.0.conv_1x1.weight", "body.0.conv.weight"} <= set(
        decays["param_names"]
    )
    before = csla.extract_scales(hs)
    opt = torch.optim.SGD([decays, stays], lr=0.1)
    hs(torch.randn(4, 3, 12, 12)).square().sum().backward()
    opt.step()
    for name, value in csla.extract_scales(hs).items():
        for branch, scale in value.tensors().items():
            assert not torch.equal(scale, before[name].tensors()[branch]), (name, branch)


def test_a_diverged_search_is_named():
    hs = csla.hyper_search_model(Tree())
    with torch.no_grad():
        hs.body[0].scale_1x1.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"cannot be used: body\.0: one_by_one must be finite"):
        csla.extract_scales(hs)


# ---- the block


@named("geometry", **by_name(GEOMETRIES))
def test_block_computes_what_it_merges_to(geometry: Geometry):
    into, out = geometry.channels
    model = nn.Sequential(geometry.conv(), nn.BatchNorm2d(out)).double()
    explicit = csla.csla_model(model, random_scales(model))
    assert (explicit[0].scale_identity is not None) == geometry.shortcut
    x = torch.randn(3, into, 9, 10, dtype=torch.float64)
    for training in (True, False):
        explicit.train(training)
        merged = csla.merge(explicit)
        assert type(merged[0]) is nn.Conv2d
        assert repr(merged[0]) == repr(model[0])
        assert merged.training == merged[0].training == training
        y = explicit(x)
        torch.testing.assert_close(merged(x), y, rtol=0, atol=FORWARD_TOLERANCE)
        assert y.shape == model(x).shape
    folded = csla.merge(explicit, fold_norm=True)
    assert isinstance(folded[1], nn.Identity)
    assert folded[0].bias is not None
    torch.testing.assert_close(folded(x), explicit.eval()(x), rtol=0, atol=FORWARD_TOLERANCE)


def test_block_merges_to_the_formula():
    """Eq. 4 written out for one tap each, with groups: the identity sits at (o, o mod I)."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)).double()
    s, t, identity = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    explicit = csla.csla_model(model, {"0": BranchScales(s, t, identity)})
    merged, kxk, one = csla.merge(explicit)[0].weight, model[0].weight, explicit[0].conv_1x1.weight
    assert merged[3, 0, 0, 2] == s[3] * kxk[3, 0, 0, 2]
    assert merged[3, 0, 1, 1] == s[3] * kxk[3, 0, 1, 1] + t[3] * one[3, 0, 0, 0]
    assert merged[3, 1, 1, 1] == s[3] * kxk[3, 1, 1, 1] + t[3] * one[3, 1, 0, 0] + identity[3]
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    x[:, :, 2, 2] = 0
    only_identity = explicit[0]
    with torch.no_grad():
        only_identity.scale_conv.weight.zero_()
        only_identity.scale_1x1.weight.zero_()
        only_identity.bias.zero_()
    assert torch.equal(only_identity(x), x * identity.view(-1, 1, 1))


def test_unbatched_and_channels_last_input():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)).double()
    block = csla.csla_model(model, random_scales(model))[0]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x[1]), block(x)[1], rtol=0, atol=FORWARD_TOLERANCE)
    torch.testing.assert_close(
        block(x.contiguous(memory_format=torch.channels_last)), block(x), rtol=0, atol=FORWARD_TOLERANCE
    )


def test_memory_format_and_frozen_weights_stay():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    explicit = csla.csla_model(model, random_scales(model))
    assert [name for name, p in explicit[0].named_parameters() if p.requires_grad] == ["bias"]
    merged = csla.merge(explicit)[0]
    assert merged.weight.is_contiguous(memory_format=torch.channels_last)
    assert not merged.weight.requires_grad
    assert merged.bias.requires_grad


# ---- the models


def test_csla_scales_are_constants():
    tree = Tree()
    scales = random_scales(tree)
    explicit = csla.csla_model(tree, scales)
    trained = {name for name, _ in explicit.named_parameters() if "scale_" in name}
    assert trained == {"body.0.scale_identity.weight", "body.6.0.scale_identity.weight"}
    for name, value in csla.extract_scales(explicit).items():
        for branch, scale in scales[name].tensors().items():
            assert torch.equal(value.tensors()[branch], scale.float())
    assert torch.equal(explicit.body[0].conv.weight, tree.body[0].weight)
    assert explicit.body[0].conv.weight is not tree.body[0].weight


def test_nothing_is_shared_with_the_argument():
    tree = Tree()
    hs = csla.hyper_search_model(tree)
    merged = csla.merge(hs)
    pointers = [{t.data_ptr() for t in m.state_dict().values() if t.numel()} for m in (tree, hs, merged)]
    assert not pointers[0] & pointers[1]
    assert not pointers[1] & pointers[2]
    with torch.no_grad():
        before = state(tree), state(hs)
        for p in merged.parameters():
            p.fill_(7)
    assert_same_state(before[0], tree.state_dict())
    assert_same_state(before[1], hs.state_dict())


def test_modes_stay():
    tree = Tree()
    tree.body.eval()
    for make in (csla.hyper_search_model, lambda m: csla.csla_model(m, random_scales(m))):
        explicit = make(tree)
        modes = {name: module.training for name, module in explicit.named_modules()}
        assert all(training == (not name.startswith("body")) for name, training in modes.items())
        for fold_norm in (False, True):
            assert [m.training for m in csla.merge(explicit, fold_norm).modules()] == [
                m.training for m in tree.modules()
            ]


def test_a_block_shares_nothing_with_its_merged_conv():
    block = csla.hyper_search_model(Tree()).last
    merged = block.merged()
    assert torch.equal(merged.bias, block.bias)
    assert merged.bias is not block.bias
    assert merged.weight is not block.conv.weight


def test_merged_model_has_the_parameters_of_the_plain_one():
    tree = Tree().train()
    merged = csla.merge(csla.hyper_search_model(tree))
    assert [(n, p.shape) for n, p in merged.named_parameters()] == [(n, p.shape) for n, p in tree.named_parameters()]
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in tree.named_modules()]
    assert [type(m) for m in merged.modules()] == [type(m) for m in tree.modules()]


def test_explicit_models_survive_state_dict_and_deepcopy():
    tree = Tree().double()
    explicit = csla.csla_model(tree, random_scales(tree))
    other = csla.csla_model(tree, random_scales(tree))
    other.load_state_dict(explicit.state_dict())
    copied = copy.deepcopy(explicit)
    assert [n for n, _ in copied.named_parameters()] == [n for n, _ in explicit.named_parameters()]
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert torch.equal(other.eval()(x), explicit.eval()(x))
    assert torch.equal(copied.eval()(x), explicit(x))


def test_fold_norm_takes_every_plain_pair_and_leaves_the_rest(caplog):
    tree = Tree().double()
    for norm in (tree.even_norm, tree.body[1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    tree.last_norm = nn.BatchNorm2d(4, affine=False).double()
    tree.flat_norm = nn.BatchNorm2d(8, track_running_stats=False).double()
    explicit = csla.hyper_search_model(tree).eval()
    with caplog.at_level(logging.INFO, logger="gradrep_kernels.csla"):
        folded = csla.merge(explicit, fold_norm=True)
    identities = {name for name, module in folded.named_modules() if isinstance(module, nn.Identity)}
    assert identities == {"body.1", "body.3", "even_norm", "last_norm"}
    assert "not folded: stem.conv, followed by GroupNorm" in caplog.text
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(folded(x), explicit(x), rtol=0, atol=FORWARD_TOLERANCE)


def test_random_numbers_move_as_nn_conv2d_moves_them():
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 5, padding=2), nn.BatchNorm2d(6)
    )
    torch.manual_seed(7)
    drawn = [nn.Conv2d(4, 6, 1, groups=2, bias=False).weight, nn.Conv2d(6, 6, 1, bias=False).weight]
    after = torch.rand(1)
    scales = random_scales(model)
    for make in (csla.hyper_search_model, lambda m: csla.csla_model(m, scales)):
        torch.manual_seed(7)
        explicit = make(model)
        assert torch.equal(torch.rand(1), after)
        assert [torch.equal(explicit[n].conv_1x1.weight, w) for n, w in zip((0, 3), drawn)] == [True, True]
    before = torch.get_rng_state()
    csla.merge(explicit, fold_norm=True)
    csla.grad_mults(model, scales)
    csla.extract_scales(explicit)
    assert torch.equal(torch.get_rng_state(), before)


# ---- reinitialize


@named("dtype", [torch.float32, torch.float64])
@named("searched", [True, False])
def test_reinitialize_is_the_merged_csla_model(dtype, searched):
    tree = Tree().to(dtype)
    scales = random_scales(tree, searched=searched)
    torch.manual_seed(3)
    merged = csla.merge(csla.csla_model(tree, scales))
    torch.manual_seed(3)
    assert csla.reinitialize(tree, scales) is None
    assert_same_state(merged.state_dict(), tree.state_dict())


def test_reinitialize_identity_one():
    tree = Tree().double()
    scales = random_scales(tree)
    one, searched = copy.deepcopy(tree), copy.deepcopy(tree)
    for model, identity in ((one, "one"), (searched, "searched")):
        torch.manual_seed(3)
        csla.reinitialize(model, scales, identity=identity)
    difference = searched.body[0].weight - one.body[0].weight
    expected = torch.zeros_like(difference)
    for o in range(8):
        expected[o, o, 1, 1] = scales["body.0"].identity[o] - 1
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-15)
    assert torch.equal(one.stem.conv.weight, searched.stem.conv.weight)
    with pytest.raises(ValueError, match="identity must be 'searched' or 'one', got True"):
        csla.reinitialize(tree, scales, identity=True)


def refused(model, scales, message):
    before, rng = state(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        csla.reinitialize(model, scales)
    assert_same_state(before, model.state_dict())
    assert torch.equal(torch.get_rng_state(), rng)


def test_reinitialize_wants_fresh_norms():
    tree = Tree()
    scales = random_scales(tree)
    trained = copy.deepcopy(tree)
    trained(torch.randn(2, 3, 12, 12))
    refused(
        trained,
        scales,
        "this model is not untrained: the norm after body.0 has seen 1 batches; the norm after last has seen 1 batches",
    )
    moved = copy.deepcopy(tree)
    moved.last_norm.running_var[0] = 2
    refused(moved, scales, "the norm after last has running statistics that moved")
    untouched = copy.deepcopy(tree)
    untouched.eval()(torch.randn(2, 3, 12, 12))
    csla.reinitialize(untouched, scales)
    csla.reinitialize(moved, scales, force=True)
    assert not torch.equal(moved.last.weight, tree.last.weight)


def test_reinitialize_goes_once():
    tree = Tree()
    scales = random_scales(tree)
    csla.reinitialize(tree, scales)
    refused(tree, scales, "stem.conv was re-initialised before; body.0 was")
    refused(copy.deepcopy(tree), scales, "stem.conv was re-initialised before")
    fresh = Tree()
    fresh.load_state_dict(tree.state_dict())
    csla.reinitialize(fresh, scales)  # the mark is not in a state_dict, as documented
    once = state(tree)
    csla.reinitialize(tree, scales, force=True)
    assert not torch.equal(once["last.weight"], tree.last.weight)


def test_reinitialize_changes_nothing_when_the_last_scale_does_not_fit():
    tree = Tree()
    scales = random_scales(tree)
    scales["last"] = BranchScales(torch.ones(5), torch.ones(5))
    refused(tree, scales, "last: scales of 5 channels, last has 4")


# ---- CSLA = GR


def network(geometry: Geometry) -> nn.Module:
    """Two blocks, the second of the case's geometry, and a norm that counts neither."""
    into, out = geometry.channels
    return nn.Sequential(
        nn.Conv2d(3, into, 3, padding=1, bias=False),
        nn.BatchNorm2d(into),
        nn.ReLU(),
        geometry.conv(),
        nn.GroupNorm(2, out),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * out, 5),
    ).double()


def train(model, opt, clip, steps=60):
    return trained(model, opt, clip, steps, images=(6, 3, 8, 8))


@named("case", **by_name(EQUIVALENCES))
def test_csla_equals_grad_mult(case: Equivalence):
    """Explicit branches under torch.optim.SGD, then merged, against the plain network under FusedRepSGD.

    RepOptimizers, Appendix A.
    """
    plain = network(GEOMETRY[case.geometry])
    scales = random_scales(plain, one_by_one=case.one_by_one, searched=case.searched_identity)
    signs = torch.cat(
        [t for value in scales.values() for branch, t in value.tensors().items() if branch != "identity"]
    ).sign()
    assert (signs < 0).double().mean() >= 0.4
    torch.manual_seed(5)
    explicit = csla.csla_model(plain, scales)
    torch.manual_seed(5)
    csla.reinitialize(plain, scales)
    start = plain[3].weight.detach().clone()
    decay = case.sgd.get("weight_decay", 0.0)
    options = {"lr": case.lr, **{key: value for key, value in case.sgd.items() if key != "weight_decay"}}
    max_norm = math.inf if case.max_norm is None else case.max_norm
    sgd = torch.optim.SGD(gr.param_groups(explicit, decay), foreach=False, **options)
    rep = gr.FusedRepSGD(gr.param_groups(plain, decay), grad_mults=csla.grad_mults(plain, scales), **options)
    norms = train(
        explicit, sgd, lambda opt: torch.nn.utils.clip_grad_norm_(explicit.parameters(), max_norm, foreach=False)
    )
    rep_norms = train(plain, rep, lambda opt: opt.clip_grad_norm_(max_norm))
    if case.max_norm is not None:
        assert sum(norm > max_norm for norm in norms) >= 10
    assert norms == pytest.approx(rep_norms, rel=1e-10)
    merged = csla.merge(explicit).state_dict()
    assert float((plain[3].weight.detach() - start).abs().max()) > 0.003  # it has trained
    for name, value in plain.state_dict().items():
        assert float((merged[name] - value).abs().max()) <= EQUIVALENCE_TOLERANCE, name


@named("wrong", ["no_multiplier", "signed", "identity_scale_squared", "no_identity_decay", "plain_clipping"])
def test_the_equivalence_is_not_a_matter_of_course(wrong):
    """Each departure that is easily made is far outside of the tolerance."""
    case = next(case for case in EQUIVALENCES if case.name == "clipped")
    plain = network(GEOMETRY[case.geometry])
    scales = random_scales(plain)
    torch.manual_seed(5)
    explicit = csla.csla_model(plain, scales)
    torch.manual_seed(5)
    csla.reinitialize(plain, scales)
    mults = csla.grad_mults(plain, scales)
    if wrong == "no_multiplier":
        mults = {}
    elif wrong == "signed":
        s = scales["3"].kxk
        mults[plain[3].weight] = gr.GradMult(
            (mults[plain[3].weight].scale * s.sign().view(-1, 1, 1, 1)).clamp(min=0), torch.ones(8)
        )
    elif wrong == "identity_scale_squared":
        mults[plain[3].weight] = gr.GradMult(mults[plain[3].weight].scale, scales["3"].identity.square())
    groups = gr.param_groups(explicit, 0.05)
    if wrong == "no_identity_decay":
        groups = [{"params": [p], "weight_decay": 0.05 if p.dim() > 1 else 0.0} for p in explicit.parameters()]
    sgd = torch.optim.SGD(groups, lr=case.lr, momentum=0.9, foreach=False)
    rep = gr.FusedRepSGD(gr.param_groups(plain, 0.05), lr=case.lr, momentum=0.9, grad_mults=mults)
    train(explicit, sgd, lambda opt: torch.nn.utils.clip_grad_norm_(explicit.parameters(), case.max_norm), steps=20)
    if wrong == "plain_clipping":
        train(plain, rep, lambda opt: torch.nn.utils.clip_grad_norm_(plain.parameters(), case.max_norm), steps=20)
    else:
        train(plain, rep, lambda opt: opt.clip_grad_norm_(case.max_norm), steps=20)
    assert float((csla.merge(explicit)[3].weight - plain[3].weight).detach().abs().max()) > 1e6 * EQUIVALENCE_TOLERANCE
