"""Which branches a Hyper-Search gives each convolution, their starts, their files, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import Branch, BranchScales, csla
from gradrep_kernels.branches.csla import CSLABlock

named = pytest.mark.parametrize


def network(kernel=3, channels=8, groups=1):
    """A strided convolution and two with a shortcut."""
    layers = []
    for stride in (2, 1, 1):
        conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


NAMES = ["0", "3", "6"]


# ---- presets

PRESETS = {  # preset: (kernel, branches of the strided convolution, what one with a shortcut has more)
    "repvgg": (3, "3 x 3, 1 x 1", ", identity"),
    "acb": (3, "3 x 3, 1 x 3, 3 x 1", ""),
    "repghost": (3, "3 x 3", ", identity"),
    "mobileone:1": (3, "3 x 3, 1 x 1", ", identity"),
    "mobileone:4": (3, "3 x 3, 1 x 1, 3 x 3, 3 x 3, 3 x 3", ", identity"),
    "replk:5": (31, "31 x 31, 5 x 5", ""),
    "qarepvgg": (3, "3 x 3, 1 x 1", ", constant identity, constant average"),
    # The table of the published DilatedReparamBlock.
    **{
        f"unireplk {k}": (k, f"{k} x {k}, {further}", "")
        for k, further in {
            5: "3 x 3, 3 x 3 of dilation 2",
            7: "5 x 5, 3 x 3 of dilation 2, 3 x 3 of dilation 3",
            9: "5 x 5, 5 x 5 of dilation 2, 3 x 3 of dilation 3, 3 x 3 of dilation 4",
            11: "5 x 5, 5 x 5 of dilation 2, 3 x 3 of dilation 3, 3 x 3 of dilation 4, 3 x 3 of dilation 5",
            13: "5 x 5, 7 x 7 of dilation 2, 3 x 3 of dilation 3, 3 x 3 of dilation 4, 3 x 3 of dilation 5",
            15: "5 x 5, 7 x 7 of dilation 2, 3 x 3 of dilation 3, 3 x 3 of dilation 5, 3 x 3 of dilation 7",
            17: "5 x 5, 9 x 9 of dilation 2, 3 x 3 of dilation 4, 3 x 3 of dilation 5, 3 x 3 of dilation 7",
        }.items()
    },
}


@named("preset", PRESETS)
def test_presets_and_coverage(preset):
    kernel, strided, more = PRESETS[preset]
    preset = preset.split(" ")[0]
    plain = network(kernel, groups=8)
    expected = {"0": strided, "3": strided + more, "6": strided + more}
    found = csla.coverage(plain, branches=preset)
    assert (found.converted, found.what) == (expected, "would get branches")
    search = csla.hyper_search_model(plain, branches=preset)
    assert csla.coverage(search).converted == {n: f"a CSLABlock of {text}" for n, text in expected.items()}
    scales = csla.extract_scales(search)
    of_scales = csla.coverage(plain, scales).converted
    sorted_text = {
        n: sorted(text.replace("k x k", f"{kernel} x {kernel}").split(", ")) for n, text in of_scales.items()
    }
    assert sorted_text == {n: sorted(f"scales of {text}".split(", ")) for n, text in expected.items()}
    assert list(csla.grad_mults(plain, scales)) == [plain[n].weight for n in (0, 3, 6)]


def test_a_function_leaves_convolutions_plain():
    plain = network()
    choice = {"0": None, "3": "acb", "6": ["kxk", "1x1", "1x1=1", "identity"]}
    search = csla.hyper_search_model(plain, branches=lambda name, conv: choice[name])
    assert type(search[0]) is nn.Conv2d
    assert [list(value.tensors()) for value in csla.extract_scales(search).values()] == [
        ["conv", "1x3", "3x1"],
        ["conv", "1x1", "identity", "1x1.2"],
    ]
    found = csla.coverage(plain, branches=lambda name, conv: choice[name])
    assert found.left == {"0": "`branches` leaves it plain"}
    assert len(csla.grad_mults(plain, csla.extract_scales(search), partial=True)) == 2
    with pytest.raises(ValueError, match="the function returned None for every convolution"):
        csla.hyper_search_model(plain, branches=lambda name, conv: None)


def test_where_and_branches():
    search = csla.hyper_search_model(network(), branches="acb", where=["6"])
    assert [name for name, m in search.named_modules() if isinstance(m, CSLABlock)] == ["6"]


REFUSED = {
    "unknown": (
        "resnet",
        "must be one of repvgg, acb, repghost, mobileone:N, replk:K, unireplk, qarepvgg, got 'resnet'",
    ),
    "dbb": ("dbb", "'dbb' have no exact form: its average branch (1 x 1, then AvgPool) is linear but not elementwise"),
    "dbb-avg": ("dbb-avg", "is linear but not elementwise: each of its parameters lands on every tap"),
    "sequence": ("1x1-kxk", "no exact form: a sequence of trained kernels is bilinear"),
    "sequence_in_list": (
        ["kxk", "kxk-1x1"],
        "branches of 0: 'kxk-1x1' has no exact form: a sequence of trained kernels",
    ),
    "average_in_list": (["kxk", "average"], "no exact form: an average pool behind trained parameters is linear but"),
    "dyrep": ("dyrep", "it grows DBB's branches"),
    "no_number": ("mobileone", "mobileone:N is how this preset is written, got 'mobileone'"),
    "zero": ("mobileone:0", "mobileone:N is how this preset is written, got 'mobileone:0'"),
    "word": ("replk:x", "replk:K is how this preset is written, got 'replk:x'"),
    "number": ("acb:3", "acb is how this preset is written, got 'acb:3'"),
    "replk_large": (
        "replk:3",
        "branches of 0: replk:K needs an odd K smaller than the kernel, got 3 for a 3 x 3 kernel",
    ),
    "replk_even": ("replk:2", "replk:K needs an odd K smaller"),
    "unireplk": (
        "unireplk",
        "branches of 0: unireplk has no branches for a 3 x 3 kernel, it has some for 5 x 5, 7 x 7, 9 x 9, 11 x 11, "
        "13 x 13, 15 x 15, 17 x 17; `where`, or None of a function, leaves it plain",
    ),
    "no_kxk": (["1x1"], "branches of 0: there is no 'kxk' among them, which takes the present weight"),
    "empty": ([], "there is no 'kxk' among them"),
    "two_identities": (["kxk", "identity", "identity"], "branches of 0: 'identity' stands twice"),
    "even": (["kxk", (2, 2)], "(2, 2) is no branch (kernel_size must be odd, got 2 x 2), needed are 'kxk'"),
    "nonsense": (["kxk", "3by3"], "'3by3' is no branch, needed are 'kxk', '1x1'"),
    "kind": (["kxk", 1.5], "1.5 is no branch (kernel_size must be a number or (rows, columns), got 1.5)"),
    "large": (["kxk", "5x5"], "branches of 0: others: 5x5: a branch of 5 x 5 reaches 5 x 5 taps, more than the 3 x 3"),
    "dilated": (["kxk", ((3, 3), 2)], "a branch of 3 x 3 of dilation 2 reaches 5 x 5 taps, more than the 3 x 3 kernel"),
    "value": (["kxk", "1x1=one"], "'1x1=one' has no finite number behind '='"),
    "infinite": (["kxk", "identity=inf"], "'identity=inf' has no finite number behind '='"),
    "of_a_function": (lambda name, conv: "dbb", "'dbb' have no exact form"),
}


@named("case", REFUSED)
def test_refused_branches(case):
    branches, message = REFUSED[case]
    plain = network()
    before = copy.deepcopy(plain.state_dict())
    for use in (csla.hyper_search_model, csla.coverage):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            use(plain, branches=branches)
        assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())


@named("branches", [3, None, BranchScales(torch.ones(8)), lambda name, conv: 3])
def test_branches_of_another_kind(branches):
    with pytest.raises(TypeError, match="branches must be the name of a preset, a list of branches or a function"):
        csla.hyper_search_model(network(), branches=branches)


def test_identities_and_averages_stand_where_they_can():
    """An average only asks for 'same' padding, an identity for stride 1 too."""
    found = csla.coverage(network(), branches=["kxk", "identity", "identity=1", "average=2"]).converted
    assert found["0"] == "3 x 3, constant average"
    assert found["3"] == "3 x 3, identity, constant identity, constant average"


# ---- where scales start


def starts(search):
    return [float(value.kxk[0]) for value in csla.extract_scales(search).values()]


def test_depth_counts_blocks_with_an_identity():
    for branches in ("repvgg", "mobileone:2", "repghost", "qarepvgg"):
        assert starts(csla.hyper_search_model(network().double(), branches=branches)) == [1, math.sqrt(2), 1]
    for branches in ("acb", ["kxk", "1x1"]):  # nothing adds up along the depth
        assert starts(csla.hyper_search_model(network(), branches=branches)) == [1, 1, 1]
    value = csla.extract_scales(csla.hyper_search_model(network().double(), branches="mobileone:2"))["3"]
    assert [float(t[0]) for t in value.tensors().values()] == [math.sqrt(2), math.sqrt(2), 1, math.sqrt(2)]


def test_other_rules_of_init():
    plain = network().double()
    assert starts(csla.hyper_search_model(plain, {"0": 0.5, "3": -1, "6": 2})) == [0.5, -1, 2]
    seen = []

    def rule(name, conv, depth):
        seen.append((name, conv.stride, depth))
        return 1 / (1 + depth)

    assert starts(csla.hyper_search_model(plain, rule, branches="repghost")) == [1, 1 / 2, 1 / 3]
    assert seen == [("0", (2, 2), 0), ("3", (1, 1), 1), ("6", (1, 1), 2)]
    for init, message in [
        ({"0": 1.0, "3": 1.0}, "init does not fit the model: 6: missing"),
        ({**dict.fromkeys(NAMES, 1.0), "9": 1.0}, "init does not fit the model: 9: no block of that name"),
        ({**dict.fromkeys(NAMES, 1.0), "3": "2"}, "init of 3 must be a finite number, got '2'"),
        (lambda name, conv, depth: math.nan, "init of 0 must be a finite number, got nan"),
        (lambda name, conv, depth: None, "init of 0 must be a finite number, got None"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            csla.hyper_search_model(plain, init)


# ---- random numbers


def test_kernels_are_drawn_in_order_as_nn_conv2d_draws_them():
    plain = network(5, groups=2)
    branches = ["kxk", "3x3_d2", "1x1", "identity", "kx1", "kxk"]
    torch.manual_seed(7)
    drawn = [nn.Conv2d(8, 8, k, groups=2, bias=False).weight for k in (1, 3, (5, 1), 5) * 3]
    after = torch.rand(1)
    scales = csla.extract_scales(csla.hyper_search_model(plain, branches=branches))
    for make in (lambda m: csla.hyper_search_model(m, branches=branches), lambda m: csla.csla_model(m, scales)):
        torch.manual_seed(7)
        explicit = make(plain)
        assert torch.equal(torch.rand(1), after)
        own = [w for b in (explicit[int(n)] for n in NAMES) for w in (b.conv_1x1, *(o.conv for o in b.others))]
        assert all(torch.equal(conv.weight, weight) for conv, weight in zip(own, drawn, strict=True))
    torch.manual_seed(7)
    csla.reinitialize(plain, scales)
    assert torch.equal(torch.rand(1), after)


def test_msra():
    """Variance 2 / fan_in, where nn.Conv2d has 1 / (3 fan_in). 8 · 512 · 4 numbers leave 2 % of the deviation."""
    plain = nn.Sequential(nn.Conv2d(8, 512, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(512)).double()
    scales = {"0": BranchScales(torch.ones(512), torch.ones(512), others=[Branch(torch.ones(512), 3)])}
    explicit = csla.csla_model(plain, scales, one_by_one="msra")
    assert float(explicit[0].conv_1x1.weight.std()) == pytest.approx(math.sqrt(2 / 4), rel=0.06)
    assert float(explicit[0].others[0].conv.weight.std()) == pytest.approx(math.sqrt(2 / 36), rel=0.06)
    for use in (csla.csla_model, csla.reinitialize):
        with pytest.raises(ValueError, match="one_by_one must be 'conv2d' or 'msra', got 'he'"):
            use(plain, scales, one_by_one="he")


# ---- names meet a model


EIGHT = torch.ones(8)
MISFITS = {
    "channels": (
        "3",
        BranchScales(torch.ones(4), others=[Branch(torch.ones(4), 3)]),
        "3: scales of 4 channels, 3 has 8",
    ),
    "large": (
        "3",
        BranchScales(EIGHT, others=[Branch(EIGHT, 3, 2)]),
        "3: others: 3x3_d2: a branch of 3 x 3 of dilation 2 reaches 5 x 5 taps, more than the 3 x 3 kernel has",
    ),
    "identity": ("0", BranchScales(EIGHT, None, True, others=[Branch(EIGHT, 3)]), "0: an identity scale, but 0 has no"),
    "constant_identity": (
        "0",
        BranchScales(EIGHT, constant_identity=1),
        "0: a constant identity, but 0 has no shortcut",
    ),
    "constant_average": (
        "last",
        BranchScales(torch.ones(4), constant_average=1),
        "last: a constant average, but last has no 'same' padding or unlike numbers of channels",
    ),
}


@named("case", MISFITS)
def test_misfits(case):
    name, value, message = MISFITS[case]
    plain = network()
    plain.add_module("last", nn.Conv2d(8, 4, 3, padding=1))
    plain.add_module("norm", nn.BatchNorm2d(4))
    scales = csla.extract_scales(csla.hyper_search_model(plain, branches="mobileone:2"))
    scales[name] = value
    before = copy.deepcopy(plain.state_dict())
    for use in (csla.grad_mults, csla.csla_model, csla.reinitialize):
        with pytest.raises(ValueError, match=re.escape(f"1 mismatches: {message}")):
            use(plain, scales)
    assert all(torch.equal(before[key], t) for key, t in plain.state_dict().items())


def test_a_general_block_may_lack_the_identity():
    """An ACB has none. A block of the paper's branches that lacks it is told, as before."""
    plain = network()
    csla.grad_mults(plain, csla.extract_scales(csla.hyper_search_model(plain, branches="acb")))
    two = csla.extract_scales(csla.hyper_search_model(plain, branches=["kxk", "1x1"]))
    with pytest.raises(ValueError, match="3: no identity scale, but 3 has one"):
        csla.grad_mults(plain, two)
    csla.grad_mults(plain, two, partial=True)


# ---- files


def general_scales():
    """Blocks with all that a file can hold, float32 and float64."""
    others = [Branch(torch.randn(4), 3), Branch(torch.randn(4), 3), Branch(torch.randn(4), (1, 5), 2)]
    return {
        "a": BranchScales(torch.randn(4), torch.randn(4), torch.randn(4), others=others),
        "b": BranchScales(torch.randn(4).double(), None, True, constant_identity=0.1, constant_average=-2),
        "c.conv": BranchScales(torch.randn(4), torch.randn(4)),
    }


def assert_same_scales(a, b):
    assert list(a) == list(b)
    for name in a:
        assert list(a[name].tensors()) == list(b[name].tensors())
        for x, y in zip(a[name].tensors().values(), b[name].tensors().values()):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        for part in ("has_identity", "constant_identity", "constant_average"):
            assert getattr(a[name], part) == getattr(b[name], part)
        assert [(o.kernel_size, o.dilation) for o in a[name].others] == [
            (o.kernel_size, o.dilation) for o in b[name].others
        ]


def test_round_trip_of_general_scales(tmp_path):
    scales = general_scales()
    csla.save_scales(scales, tmp_path / "scales.pth")
    assert_same_scales(csla.load_scales(tmp_path / "scales.pth"), scales)
    content = torch.load(tmp_path / "scales.pth", weights_only=True)
    assert content["scales_version"] == 2
    assert content["blocks"]["a"]["others"][2].keys() == {"scale", "kernel_size", "dilation"}
    assert content["blocks"]["b"].keys() == {"conv", "identity", "constant_identity", "constant_average"}
    assert content["blocks"]["c.conv"].keys() == {"conv", "1x1"}


def test_a_file_without_further_branches_is_as_before(tmp_path):
    """Bytes and keys are those of the flat format, which every version reads."""
    t = torch.arange(3.0)
    csla.save_scales({"a": BranchScales(t, t + 1, t + 2), "b": BranchScales(t, None, True)}, tmp_path / "now.pth")
    flat = {
        "a.scale_conv.weight": t.clone(),
        "a.scale_1x1.weight": t + 1,
        "a.scale_identity.weight": t + 2,
        "b.scale_conv.weight": t.clone(),
        "b.scale_identity.weight": torch.empty(0),
    }
    now = torch.load(tmp_path / "now.pth", weights_only=True)
    assert list(now) == list(flat)
    assert all(torch.equal(now[key], flat[key]) for key in flat)


def test_readers_of_before_refuse_a_general_file(tmp_path):
    """They look for keys with known endings at the top, under 'model' and under 'state_dict', and find none."""
    csla.save_scales(general_scales(), tmp_path / "scales.pth")
    content = torch.load(tmp_path / "scales.pth", weights_only=True)
    endings = (".scale_conv.weight", ".scale_1x1.weight", ".scale_identity.weight", ".fusion_scale.weight")
    assert not any(key.endswith(endings) for key in content)
    assert not {"model", "state_dict", "model_state_dict"} & content.keys()


def test_scales_out_of_the_checkpoint_of_a_search(tmp_path):
    search = csla.hyper_search_model(
        network(5), branches=["kxk", "1x1", "identity=0.5", "average=2", (1, 5), "3x3_d2", 3]
    )
    scales = csla.extract_scales(search)
    for content in (search.state_dict(), {"model": {f"module.{k}": v for k, v in search.state_dict().items()}}):
        torch.save(content, tmp_path / "checkpoint.pth")
        assert_same_scales(csla.load_scales(tmp_path / "checkpoint.pth"), scales)


def broken(change):
    content = {"scales_version": 2, "blocks": {"a": {"conv": EIGHT, "others": [part()]}}}
    change(content)
    return content


def part():
    return {"scale": EIGHT, "kernel_size": (3, 3), "dilation": 1}


def state(**changes):
    flat = {
        "a.scale_conv.weight": EIGHT,
        "a.others.0.scale.weight": EIGHT,
        "a.others.0.layout": torch.tensor([3, 3, 1]),
        "a.constants": torch.ones(2),
    }
    return {**flat, **{f"a.{key.replace('__', '.')}": value for key, value in changes.items()}}


WRONG_FILES = {
    "newer": (
        broken(lambda c: c.update(scales_version=3)),
        "its scales_version is 3, this gradrep_kernels reads 2 and",
    ),
    "no_blocks": (broken(lambda c: c.pop("blocks")), "it has no 'blocks'"),
    "empty": (broken(lambda c: c["blocks"].clear()), "it is empty"),
    "block": (broken(lambda c: c["blocks"].update(b=3)), "b is a int"),
    "name": (broken(lambda c: c["blocks"].update({3: {}})), "3 is no name of a block"),
    "no_conv": (broken(lambda c: c["blocks"]["a"].pop("conv")), "a has no scale_conv"),
    "unknown": (broken(lambda c: c["blocks"]["a"].update(shift=EIGHT)), "a: unknown parts shift"),
    "no_dilation": (
        broken(lambda c: c["blocks"]["a"]["others"][0].pop("dilation")),
        "a: others[0] has not exactly scale, kernel_size and dilation",
    ),
    "nan": (
        broken(lambda c: c["blocks"]["a"]["others"][0].update(scale=EIGHT * math.nan)),
        "a: others[0]: scale must be finite",
    ),
    "channels": (
        broken(lambda c: c["blocks"]["a"]["others"].append({**part(), "scale": torch.ones(4)})),
        "a: others[1] has 4 channels, kxk has 8",
    ),
    "even": (
        broken(lambda c: c["blocks"]["a"]["others"][0].update(kernel_size=(2, 2))),
        "a: others[0]: kernel_size must be odd, got 2 x 2",
    ),
    "constant": (
        broken(lambda c: c["blocks"]["a"].update(constant_average="1")),
        "a: constant_average must be a finite",
    ),
    "several": (
        broken(lambda c: c["blocks"].update({name: {} for name in "bcdefg"})),
        "b has no scale_conv; c has no scale_conv; d has no scale_conv; e has no scale_conv; and 2 more",
    ),
    "state_layout": (state(others__0__layout=torch.ones(2)), "a.others.0.layout must hold kernel rows, kernel columns"),
    "state_constants": (state(constants=torch.ones(3)), "a.constants must have shape [2], got [3]"),
    "state_number": (state(others__0__layout=3), "a.others.0.layout is a int, not a tensor"),
    "state_half": (
        state(others__1__scale__weight=EIGHT),
        "a: others[1] has not exactly scale, kernel_size and dilation",
    ),
}


@named("case", WRONG_FILES)
def test_wrong_general_files(tmp_path, case):
    content, message = WRONG_FILES[case]
    torch.save(content, tmp_path / "scales.pth")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        csla.load_scales(tmp_path / "scales.pth")
    assert "scales.pth" in str(error.value)
    assert "\n" not in str(error.value)


# ---- models of before, and the check


def test_state_and_pickles_of_the_papers_block_are_as_before():
    plain = network()
    search = csla.hyper_search_model(plain)
    keys = {"conv.weight", "scale_conv.weight", "conv_1x1.weight", "scale_1x1.weight", "scale_identity.weight"}
    assert {key.removeprefix("3.") for key in search.state_dict() if key.startswith("3.")} == keys
    block = search[3]
    state = {key: value for key, value in block.__dict__.items() if key not in ("others", "average", "constants")}
    old = CSLABlock.__new__(CSLABlock)
    old.__setstate__(state)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(old(x), block(x))
    assert torch.equal(old.merged_kernel(), block.merged_kernel())


@named("branches", ["mobileone:2", "unireplk", ["kxk", "3x3_d2", "1x5", "identity"]])
def test_check_equivalence_takes_general_scales(branches):
    plain = network(5)
    scales = csla.extract_scales(csla.hyper_search_model(plain, branches=branches))
    scales = {n: v.mapped(lambda t: t * torch.linspace(-0.5, 1.5, t.numel())) for n, v in scales.items()}
    batches = [torch.randn(4, 8, 12, 12) for _ in range(3)]
    assert csla.check_equivalence(plain, scales, batches, steps=5)


def test_check_equivalence_tells_that_constants_do_not_decay():
    plain = network()
    scales = csla.extract_scales(csla.hyper_search_model(plain, branches="qarepvgg"))
    batches = [torch.randn(4, 8, 12, 12) for _ in range(3)]
    assert csla.check_equivalence(plain, scales, batches, weight_decay=0.0)
    assert not csla.check_equivalence(plain, scales, batches, weight_decay=0.1)


@named("branches", ["mobileone:2", "qarepvgg", ["kxk", (1, 3), "identity"]])
def test_models_without_data(branches):
    """Whatever the default device is, starts are computed on the CPU."""
    with torch.device("meta"):
        search = csla.hyper_search_model(network(), branches=branches)
    assert {t.device.type for n, t in search[3].state_dict().items()} == {"meta"}
    assert csla.coverage(search).counts == (3, 3)


def test_a_pickle_of_a_search_steps_on():
    search = pickle.loads(pickle.dumps(csla.hyper_search_model(network(7), branches="unireplk")))
    optimizer = gr.FusedRepSGD(gr.param_groups(search, 1e-4), lr=0.1)
    search(torch.randn(2, 8, 9, 9)).square().sum().backward()
    optimizer.step()
    assert len(csla.extract_scales(search)["3"].others) == 3
