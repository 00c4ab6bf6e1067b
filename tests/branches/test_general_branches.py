"""Blocks of any branches: what they compute, that they train as one convolution, and what has no such form."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from cases_branches import BLOCKS, STRANGERS, Block, Stranger, rep_sgd, searched, trained
from cases_csla import EQUIVALENCE_TOLERANCE, FORWARD_TOLERANCE
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import Branch, BranchScales, csla

named = pytest.mark.parametrize
of_blocks = named("case", BLOCKS, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in BLOCKS}


def double(n, seed=0):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the scales and their Grad Mult


def test_a_branch_reaches_its_taps():
    """Drawn by hand."""
    drawn = {
        ((3, 3), 1): ".......\n.......\n..xxx..\n..xxx..\n..xxx..\n.......\n.......",
        ((3, 3), 2): ".......\n.x.x.x.\n.......\n.x.x.x.\n.......\n.x.x.x.\n.......",
        ((3, 3), 3): "x..x..x\n.......\n.......\nx..x..x\n.......\n.......\nx..x..x",
        ((1, 7), 1): ".......\n.......\n.......\nxxxxxxx\n.......\n.......\n.......",
        ((5, 1), 1): ".......\n...x...\n...x...\n...x...\n...x...\n...x...\n.......",
        ((1, 1), 4): ".......\n.......\n.......\n...x...\n.......\n.......\n.......",
    }
    for (size, dilation), picture in drawn.items():
        mask = Branch(torch.ones(2), size, dilation).mask(7)
        assert mask.dtype == torch.bool
        assert "\n".join("".join(".x"[tap] for tap in row) for row in mask.int().tolist()) == picture
    assert Branch(torch.ones(2), (1, 3)).mask((3, 5)).tolist() == [
        [False] * 5,
        [False, True, True, True, False],
        [False] * 5,
    ]


def test_grad_mult_is_the_sum_of_squares_over_the_taps():
    s, t, a, b = (double(3, seed) for seed in range(4))
    value = BranchScales(
        s, t, True, others=[Branch(a, 3, 2), Branch(b, (1, 5))], constant_identity=9, constant_average=9
    )
    mult = value.grad_mult(5)
    expected = torch.zeros(3, 1, 5, 5, dtype=torch.float64)
    for o in range(3):
        for y in range(5):
            for x in range(5):
                total = s[o] ** 2
                total += t[o] ** 2 * ((y, x) == (2, 2))
                total += a[o] ** 2 * (y % 2 == 0 and x % 2 == 0)
                total += b[o] ** 2 * (y == 2)
                expected[o, 0, y, x] = total
    torch.testing.assert_close(mult.scale, expected, rtol=1e-15, atol=0)
    assert mult.identity.tolist() == [1, 1, 1]
    pairs = value.branches(5)
    assert [scale for scale, _ in pairs] == [value.kxk, value.one_by_one, *(b.scale for b in value.others)]
    assert [int(mask.sum()) for _, mask in pairs] == [25, 1, 9, 5]
    assert all(scale.shape == (3,) and mask.shape == (5, 5) and mask.dtype == torch.bool for scale, mask in pairs)


def test_sums_are_rounded_once():
    scales = [double(64, seed).float() for seed in range(4)]
    value = BranchScales(scales[0], others=[Branch(scale, 3) for scale in scales[1:]])
    mult = value.grad_mult(3)
    exact = sum(scale.double().square() for scale in scales)
    assert torch.equal(mult.scale[:, 0, 0, 0], exact.float())
    assert not torch.equal(sum(scale.square() for scale in scales), exact.float())  # in float32 some round otherwise
    assert BranchScales(scales[0], others=[Branch(scales[1].double(), 3)]).grad_mult(3).dtype == torch.float64


def test_names_of_branches():
    ones = torch.ones(2)
    others = [
        Branch(n * ones, *kernel) for n, kernel in enumerate([(3,), (5, 1), (3, 2), (1,), (3,), ((1, 3),), (3, 2)])
    ]
    value = BranchScales(ones, ones, others=others)
    names = ["conv", "1x1", "3x3", "5x5", "3x3_d2", "1x1.2", "3x3.2", "1x3", "3x3_d2.2"]
    assert list(value.tensors()) == names
    assert [float(t[0]) for t in value.tensors().values()][2:] == list(range(7))
    doubled = value.mapped(lambda t: 2 * t)
    assert [float(t[0]) for t in doubled.tensors().values()] == [2, 2, *range(0, 14, 2)]
    assert repr(BranchScales(ones, others=[Branch(2 * ones, 3, 2)], constant_average=0.5)) == (
        "BranchScales([2]: kxk 1 (1), 3x3_d2 2 (2), constant_average 0.5)"
    )
    assert repr(others[2]) == "Branch(3x3_d2, 2 (2))"


def test_scales_survive_copies_and_pickles(tmp_path):
    value = BranchScales(double(2), others=[Branch(double(2), 3, 2)], constant_identity=0.5)
    torch.save(value, tmp_path / "scales.pt")
    for twin in (
        copy.deepcopy(value),
        pickle.loads(pickle.dumps(value)),
        torch.load(tmp_path / "scales.pt", weights_only=False),
    ):
        assert list(twin.tensors()) == ["conv", "3x3_d2"]
        assert all(torch.equal(a, b) for a, b in zip(twin.tensors().values(), value.tensors().values()))
        assert (twin.constant_identity, twin.constant_average) == (0.5, 0.0)
        assert torch.equal(twin.grad_mult(5).scale, value.grad_mult(5).scale)
    assert set(BranchScales(double(2)).__getstate__()[1]) == {"identity", "kxk", "one_by_one"}  # as versions before it


ONES = torch.ones(3)
WRONG = {
    "scale": (lambda: Branch(1.0, 3), TypeError, "scale must be a Tensor, got float"),
    "nan": (lambda: Branch(ONES * math.nan, 3), ValueError, "scale must be finite"),
    "matrix": (lambda: Branch(torch.ones(3, 1), 3), ValueError, "scale must have shape [O], got [3, 1]"),
    "even": (lambda: Branch(ONES, (3, 2)), ValueError, "kernel_size must be odd, got 3 x 2"),
    "three_sides": (
        lambda: Branch(ONES, (3, 3, 3)),
        ValueError,
        "kernel_size must be a number or (rows, columns), got",
    ),
    "text": (lambda: Branch(ONES, "3"), ValueError, "kernel_size must be a number or (rows, columns), got '3'"),
    "dilation": (lambda: Branch(ONES, 3, 0), ValueError, "dilation must be an int, 1 or more, got 0"),
    "dilation_pair": (lambda: Branch(ONES, 3, (1, 2)), ValueError, "dilation must be an int, 1 or more, got (1, 2)"),
    "others": (lambda: BranchScales(ONES, others=[ONES]), TypeError, "others[0] must be a Branch, got Tensor"),
    "one_other": (lambda: BranchScales(ONES, others=Branch(ONES, 3)).others[1], IndexError, "index out of range"),
    "channels": (
        lambda: BranchScales(ONES, others=[Branch(torch.ones(4), 3)]),
        ValueError,
        "others[0] has 4 channels, kxk has 3",
    ),
    "constant": (
        lambda: BranchScales(ONES, constant_identity=math.inf),
        ValueError,
        "constant_identity must be a finite",
    ),
    "constant_bool": (
        lambda: BranchScales(ONES, constant_average=True),
        ValueError,
        "constant_average must be a finite",
    ),
    "outside": (
        lambda: BranchScales(ONES, others=[Branch(ONES, 3), Branch(ONES, 5, 2)]).grad_mult(7),
        ValueError,
        "others: 5x5_d2: a branch of 5 x 5 of dilation 2 reaches 9 x 9 taps, more than the 7 x 7 kernel has",
    ),
    "outside_rows": (
        lambda: BranchScales(ONES, others=[Branch(ONES, (5, 1))]).branches((3, 5)),
        ValueError,
        "a branch of 5 x 1 reaches 5 x 1 taps, more than the 3 x 5 kernel has",
    ),
}


@named("case", WRONG)
def test_wrong_scales(case):
    make, error, message = WRONG[case]
    with pytest.raises(error, match=re.escape(message)):
        make()


# ---- blocks


@of_blocks
def test_block_computes_what_it_merges_to(case: Block):
    plain = case.plain()
    scales = searched(plain, case.branches)
    explicit = csla.csla_model(plain, scales)
    merged = csla.merge(explicit)
    assert repr(merged[3]) == repr(plain[3])
    x = torch.randn(2, case.channels[0], 14, 15, dtype=torch.float64)
    y = explicit[3](x)
    assert y.shape == plain[3](x).shape
    torch.testing.assert_close(merged[3](x), y, rtol=0, atol=FORWARD_TOLERANCE)
    torch.testing.assert_close(explicit[3](x[1]), y[1], rtol=0, atol=FORWARD_TOLERANCE)  # without a batch


@of_blocks
def test_branches_train_as_one_convolution(case: Block):
    """Explicit branches under torch.optim.SGD, then merged, against the plain convolution under FusedRepSGD."""
    plain = case.plain()
    scales = searched(plain, case.branches)
    if case.identity == "one":
        scales = {name: BranchScales(v.kxk, v.one_by_one, True, others=v.others) for name, v in scales.items()}
    torch.manual_seed(5)
    explicit = csla.csla_model(plain, scales, one_by_one=case.draw)
    torch.manual_seed(5)
    if case.identity == "one":  # as it would start of searched ones
        scales = {name: BranchScales(v.kxk, v.one_by_one, v.kxk, others=v.others) for name, v in scales.items()}
    csla.reinitialize(plain, scales, one_by_one=case.draw, identity=case.identity, force=True)
    start = plain[3].weight.detach().clone()
    decay = case.sgd.get("weight_decay", 0.0)
    options = {"lr": 0.02, **{key: value for key, value in case.sgd.items() if key != "weight_decay"}}
    max_norm = math.inf if case.max_norm is None else case.max_norm
    sgd = torch.optim.SGD(gr.param_groups(explicit, decay), foreach=False, **options)
    norms = trained(explicit, sgd, lambda _: nn.utils.clip_grad_norm_(explicit.parameters(), max_norm, foreach=False))
    rep_norms = trained(plain, rep_sgd(plain, scales, decay, **options), lambda opt: opt.clip_grad_norm_(max_norm))
    assert case.max_norm is None or sum(norm > max_norm for norm in norms) >= 10
    assert norms == pytest.approx(rep_norms, rel=1e-10)
    assert float((plain[3].weight.detach() - start).abs().max()) > 0.003  # it has trained
    merged = csla.merge(explicit).state_dict()
    for name, value in plain.state_dict().items():
        assert float((merged[name] - value).abs().max()) <= EQUIVALENCE_TOLERANCE, name


@of_blocks
def test_search_extract_and_rebuild(case: Block):
    """A Hyper-Search trains its scales, but for the fixed ones, and gives back the branches that were asked for."""
    plain = case.plain()
    search = csla.hyper_search_model(plain, branches=case.branches)
    before = csla.extract_scales(search)["3"]
    trained(search, torch.optim.SGD(gr.param_groups(search, 0.1), lr=0.1), lambda _: 0.0, steps=2)
    after = csla.extract_scales(search)["3"]
    assert list(after.tensors()) == list(before.tensors())
    fixed = {"qarepvgg": {"1x1"}, "repvit": {"1x1"}, "words": {"5x5.2"}}.get(case.name.split("_")[0], set())
    still = {name for name, t in after.tensors().items() if torch.equal(t, before.tensors()[name])}
    assert still == fixed
    assert search[3].scale_conv.weight.dtype == torch.float64
    twin = csla.hyper_search_model(plain, branches=case.branches)
    twin.load_state_dict(search.state_dict())
    x = torch.randn(2, 3, 14, 15, dtype=torch.float64)
    assert torch.equal(twin.eval()(x), search.eval()(x))
    copied = pickle.loads(pickle.dumps(search[3]))
    y = x[:, :1].expand(-1, case.channels[0], -1, -1)
    assert torch.equal(copied(y), search[3](y))


# ---- blocks that this package did not write


@named("block", STRANGERS)
def test_a_block_written_elsewhere_trains_as_one_convolution(block):
    preset, k, groups, sizes, rule = STRANGERS[block]
    plain = Block(block, preset, "", k, conv={"padding": k // 2, "groups": groups, "bias": False}).plain()
    scales = searched(plain, preset)
    if block == "qarepvgg":
        v = scales["3"]
        scales = {"3": BranchScales(v.kxk, torch.ones(8), constant_identity=1, constant_average=1)}
    value = scales["3"]
    torch.manual_seed(5)
    drawn = [nn.Conv2d(8, 8, size, groups=groups, bias=False, dtype=torch.float64).weight for size in sizes]
    own = [t for name, t in value.tensors().items() if name != "identity"]
    explicit = copy.deepcopy(plain)
    identity = value.identity if value.has_identity else None
    explicit[3] = Stranger([plain[3].weight, *drawn], own, rule, identity)
    torch.manual_seed(5)
    csla.reinitialize(plain, scales)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(plain[3](x), explicit[3](x), rtol=0, atol=FORWARD_TOLERANCE)
    decay = 0.0 if block == "qarepvgg" else 0.05  # constant branches do not decay, the merged kernel does
    decays = [p for p in explicit.parameters() if p.dim() > 1 or p is explicit[3].identity]
    rest = [p for p in explicit.parameters() if not any(p is d for d in decays)]
    groups_of = [{"params": decays, "weight_decay": decay}, {"params": rest}]
    sgd = torch.optim.SGD(groups_of, lr=0.02, momentum=0.9, nesterov=True, foreach=False)
    norms = trained(explicit, sgd, lambda _: nn.utils.clip_grad_norm_(explicit.parameters(), 0.5, foreach=False))
    rep = rep_sgd(plain, scales, decay, lr=0.02, momentum=0.9, nesterov=True)
    trained(plain, rep, lambda opt: opt.clip_grad_norm_(0.5))
    assert sum(norm > 0.5 for norm in norms) >= 10
    torch.testing.assert_close(plain[3](x), explicit[3](x), rtol=0, atol=1e-11)  # 49 taps of weights within 1e-12
    if block == "qarepvgg":
        mult = rep.grad_mult(plain[3].weight)
        expected = value.kxk.square().view(-1, 1, 1).repeat(1, 3, 3)
        expected[:, 1, 1] += 1
        torch.testing.assert_close(mult.scale[:, 0], expected, rtol=1e-15, atol=0)
        assert mult.identity is None


class WithoutGradient(torch.autograd.Function):
    """c · x, whose c has a gradient of zeros, so that an optimizer decays it and does nothing else."""

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(c)
        return c * x

    @staticmethod
    def backward(ctx, grad):
        (c,) = ctx.saved_tensors
        return c * grad, torch.zeros_like(c)


class DecayingConstant(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.constant = nn.Parameter(block.constants[0].detach().clone().view(1, 1))

    def forward(self, x):
        return self.block(x) - self.block.constants[0] * x + WithoutGradient.apply(x, self.constant)


@named("decaying", [True, False])
def test_constant_branches_decay_with_the_kernel(decaying):
    """Weight decay takes hold of the merged kernel as a whole. A constant branch that decays too is its equal."""
    plain = BY_NAME["repvit"].plain()
    scales = searched(plain, BY_NAME["repvit"].branches)
    torch.manual_seed(5)
    explicit = csla.csla_model(plain, scales)
    torch.manual_seed(5)
    csla.reinitialize(plain, scales)
    if decaying:
        explicit[3] = DecayingConstant(explicit[3])
    trained(explicit, torch.optim.SGD(gr.param_groups(explicit, 0.05), lr=0.02, momentum=0.9), lambda _: 0.0)
    trained(plain, rep_sgd(plain, scales, 0.05, lr=0.02, momentum=0.9), lambda _: 0.0)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    difference = float((plain[3](x) - explicit[3](x)).detach().abs().max())
    assert difference <= 1e-11 if decaying else difference > 0.01


# ---- what would be wrong


@named("wrong", ["dilation", "one_of_two", "constant_in_m", "signed"])
def test_the_equivalence_is_not_a_matter_of_course(wrong):
    """Each departure that is easily made is far outside of the tolerance."""
    case = {"dilation": "unireplk_7", "one_of_two": "list", "constant_in_m": "qarepvgg", "signed": "acb"}[wrong]
    plain = BY_NAME[case].plain()
    scales = searched(plain, BY_NAME[case].branches)
    torch.manual_seed(5)
    explicit = csla.csla_model(plain, scales)
    torch.manual_seed(5)
    csla.reinitialize(plain, scales)
    v = scales["3"]
    if wrong == "dilation":
        scales = {"3": BranchScales(v.kxk, others=[Branch(b.scale, b.kernel_size) for b in v.others])}
    elif wrong == "one_of_two":
        scales = {"3": BranchScales(v.kxk, v.one_by_one, v.identity, others=v.others[:-1])}
    elif wrong == "constant_in_m":
        scales = {"3": BranchScales(v.kxk, v.one_by_one, True, constant_average=1)}
    mults = csla.grad_mults(plain, scales)
    if wrong == "signed":
        mult = mults[plain[3].weight]
        mults[plain[3].weight] = gr.GradMult(mult.scale * (v.others[0].scale > 0).view(-1, 1, 1, 1))
    options = {"lr": 0.02, "momentum": 0.9}
    trained(explicit, torch.optim.SGD(gr.param_groups(explicit, 0.0), **options), lambda _: 0.0, steps=20)
    rep = gr.FusedRepSGD(gr.param_groups(plain, 0.0), grad_mults=mults, **options)
    trained(plain, rep, lambda _: 0.0, steps=20)
    assert float((csla.merge(explicit)[3].weight - plain[3].weight).detach().abs().max()) > 1e6 * EQUIVALENCE_TOLERANCE


# ---- kernels with a side of 1


class Pointwise(nn.Module):
    """MobileOne's pair: depthwise 3 x 3 and pointwise, a norm behind each; and a row."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.first = nn.BatchNorm2d(6)
        self.pointwise = nn.Conv2d(6, 6, 1, bias=False)
        self.second = nn.BatchNorm2d(6)
        self.row = nn.Conv2d(6, 4, (1, 3), padding=(0, 1), bias=False)
        self.third = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.second(self.pointwise(self.first(self.depthwise(x)).relu())).relu()
        return self.third(self.row(x))


def test_a_pointwise_convolution_gets_branches_where_it_is_named():
    torch.manual_seed(0)
    plain = Pointwise().double()
    assert set(csla.coverage(plain).converted) == {"depthwise"}
    names = ["depthwise", "pointwise", "row"]
    searched_model = csla.hyper_search_model(plain, branches="mobileone:2", where=names)
    with torch.no_grad():
        for name, p in searched_model.named_parameters():
            if "scale" in name:
                p.uniform_(-1.5, 1.5)
    scales = csla.extract_scales(searched_model)
    assert list(scales) == names
    assert set(csla.coverage(plain, scales).converted) == set(names)
    torch.manual_seed(5)
    explicit = csla.csla_model(plain, scales)
    torch.manual_seed(5)
    csla.reinitialize(plain, scales)
    mults = csla.grad_mults(plain, scales)
    assert mults[plain.pointwise.weight].scale.shape == (6, 1, 1, 1)
    assert mults[plain.pointwise.weight].identity is not None
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": True}
    theirs = torch.optim.SGD(gr.param_groups(explicit, 1e-3), **options)
    ours = gr.FusedRepSGD(gr.param_groups(plain, 1e-3), **options, grad_mults=mults)
    for step in range(60):
        x = torch.randn(8, 6, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((explicit, theirs), (plain, ours)):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    merged = dict(csla.merge(explicit).named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p, merged[name], rtol=0, atol=EQUIVALENCE_TOLERANCE)


def test_an_even_kernel_has_no_branches_even_where_it_is_named():
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match=r"where: 0 cannot be converted: kernel 2 x 2, needed is odd and above 1"):
        csla.hyper_search_model(model, where="0")


def test_a_search_of_which_a_further_branch_is_missing_is_no_scales_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    model = csla.hyper_search_model(model, branches="mobileone:4")
    state = {key: value for key, value in model.state_dict().items() if "others.1." not in key}
    torch.save(state, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match="0 has no further branch 1, but one of number 2"):
        csla.load_scales(tmp_path / "gap.pth")
    torch.save({"scales_version": torch.tensor([2, 2]), "blocks": {}}, tmp_path / "version.pth")
    with pytest.raises(ValueError, match="scales_version"):
        csla.load_scales(tmp_path / "version.pth")
