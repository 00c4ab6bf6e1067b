"""`quantize RUN`: figures of trained networks in few bits, its options, its report."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cases_recipes import tensors, train
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels import csla
from gradrep_kernels.branches.spread import KernelHistory
from gradrep_kernels.cli import main
from gradrep_kernels.recipes import plots
from gradrep_kernels.recipes.data.load import load_data
from gradrep_kernels.recipes.quantization import int8
from gradrep_kernels.recipes.quantization import plots as quantize_plots
from gradrep_kernels.recipes.quantization import run as quantize
from gradrep_kernels.recipes.quantization.int8 import FLOWS, chosen_flow
from gradrep_kernels.recipes.quantization.report import closing_lines, write_report
from gradrep_kernels.recipes.table import RECIPES
from gradrep_kernels.recipes.training import train_epoch

FX_IS_HERE = FLOWS["fx"].why_not() is None
needs_fx = pytest.mark.skipif(not FX_IS_HERE, reason="this torch has no FX graph mode quantization")
QUICK = ("--qat-epochs", "1", "--bits", "8,3")


def undrawn(patch, module):
    """Pictures take longer to draw than a tiny network takes to train."""
    for name in module.__all__:
        patch.setattr(module, name, lambda path, *_: path.write_bytes(b"not drawn"))


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """The folder of a run with a plain row, blocks whose norm follows, and blocks with norms."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        undrawn(patch, plots)
        train(source, out, "--name", "run", "--recipe", "repopt,csla,repvgg", "--epochs", "1", "--check-steps", "0")
    return out / "run"


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    undrawn(monkeypatch, quantize_plots)
    return Path(shutil.copytree(trained, tmp_path / "runs" / "run"))


@pytest.fixture(scope="module")
def quantized(trained, tmp_path_factory):
    """The folder of the run after the command."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("quantized") / "run"))
    assert main(["quantize", str(folder), *QUICK]) == 0
    return folder


def report(folder):
    return json.loads((folder / "quantize.json").read_text())


@needs_fx
def test_every_figure_of_every_network(quantized):
    summary, before = report(quantized), json.loads((quantized / "summary.json").read_text())
    assert list(summary["rows"]) == ["repopt", "csla", "repvgg"]
    for name, figures in summary["rows"].items():
        # Merged and folded it computes what was trained: 12 images tell no rounding of float32.
        assert figures["fp32"] == pytest.approx(before["recipes"][name]["test_accuracy"], abs=1e-9)
        assert figures["rounded"].keys() == {"per tensor", "per channel"}
        for of_bits in (*figures["rounded"].values(), {"8": figures["ptq"]["per channel"], "3": figures["qat"]}):
            assert list(of_bits) == ["8", "3"]
            assert all(len(found) == 1 and 0 <= min(found) <= max(found) <= 1 for found in of_bits.values())
        assert figures["norms_left"] == 0
    # CSLA's norm stands behind the block and stays. RepVGG's are in it, and are gone.
    assert [figures["qat_merged_norms"] for figures in summary["rows"].values()] == [None, 6, 0]
    moments = {name: list(figures["spread"]) for name, figures in summary["rows"].items()}
    assert moments == {
        "repopt": ["trained", "fused"],
        "csla": ["trained", "added"],
        "repvgg": ["trained", "fused", "added"],
    }


@needs_fx
def test_the_report_in_words(quantized):
    text = (quantized / "quantize.md").read_text()
    assert text.startswith("# run in few bits\n")
    for heading in ("Weights rounded per tensor", "Weights rounded per channel", "Weights and activations in 8 bits"):
        assert f"## {heading}\n" in text
    assert re.search(r"^\| repvgg \| .*\| merged, no norms left \|$", text, re.MULTILINE)
    assert re.search(r"^\| repopt \| .*\| as trained \|$", text, re.MULTILINE)
    assert "QAT trained 1 epoch at 0.01 of the training's learning rate" in text
    assert "stage2.0.conv" in text  # the middle one of six
    for picture in ("quantize_kernels.png", "quantize_locations.png"):
        assert f"]({picture})" in text
        assert (quantized / picture).read_bytes().startswith(b"\x89PNG")


def test_the_run_itself_is_left_alone(quantized, trained):
    for path in trained.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (quantized / path.relative_to(trained)).read_bytes(), path
    assert not list(quantized.rglob("*.tmp"))
    assert not (quantized / ".running").exists()


def test_accuracies_are_those_of_networks_made_by_hand(quantized, trained, source):
    """The plain row, with the norms folded by the formula and weights rounded by torch."""
    data = load_data(source)
    model = gr.models.repopt_vgg_small(num_classes=10, in_channels=3).eval()
    model.load_state_dict(tensors(trained / "weights" / "repopt-seed0.pt"))
    blocks = [model.stage0, *model.stage1, *model.stage2]
    with torch.no_grad():
        for block in blocks:
            factor = block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()
            kernel = block.conv.weight * factor.view(-1, 1, 1, 1)
            block.conv.bias = nn.Parameter(block.bn.bias - block.bn.running_mean * factor)
            block.bn = nn.Identity()
            step = float(kernel.abs().max()) / 3
            block.conv.weight.copy_(torch.fake_quantize_per_tensor_affine(kernel, step, 0, -3, 3))
        weight = model.linear.weight
        weight.copy_(torch.fake_quantize_per_tensor_affine(weight, float(weight.abs().max()) / 3, 0, -3, 3))
        x = data.standardise(data.test.read(torch.arange(12)))
        expected = float((model(x).argmax(1) == data.test.labels).double().mean())
    assert report(quantized)["rows"]["repopt"]["rounded"]["per tensor"]["3"][0] == pytest.approx(expected)


def test_what_is_done_is_not_done_again(quantized, monkeypatch, capsys, tmp_path):
    folder = Path(shutil.copytree(quantized, tmp_path / "run"))
    first = report(folder)
    monkeypatch.setattr(quantize, "accuracy", None)
    (folder / "quantize.json").unlink()
    assert main(["quantize", "run", "--out", str(tmp_path), *QUICK]) == 0
    assert report(folder) == first
    assert "0 of 3 networks to quantize" in capsys.readouterr().err
    with pytest.raises(TypeError):  # Other settings are another figure.
        main(["quantize", str(folder), "--bits", "7", "--no-int8"])
    (folder / "state" / "quantize-csla-seed0.json").write_text("{")
    assert main(["quantize", str(folder), *QUICK]) == 2
    assert "quantize-csla-seed0.json is damaged" in capsys.readouterr().err


def test_some_rows_some_seeds_and_no_8_bits(folder, capsys):
    arguments = ["--rows", "repvgg,repopt", "--seeds", "1", "--no-int8", "--layer", "stage0.conv"]
    assert main(["quantize", str(folder), *arguments]) == 0
    summary = report(folder)
    assert list(summary["rows"]) == ["repopt", "repvgg"]
    assert (summary["seeds"], summary["layer"], summary["compared"]) == ([0], "stage0.conv", [])
    assert all(figures["ptq"] is figures["qat"] is None for figures in summary["rows"].values())
    assert summary["settings"] == {"bits": [8, 6, 5, 4]}
    said = capsys.readouterr().out
    assert "There are no columns of PTQ and QAT: left out by --no-int8." in said
    assert "Weights and activations" not in said


def test_without_a_library_for_8_bits(folder, monkeypatch, capsys):
    def not_here():
        raise ImportError("No module named 'that'")

    monkeypatch.setattr(quantize, "chosen_flow", chosen_flow)
    gone = {name: dataclasses.replace(flow, load=not_here) for name, flow in FLOWS.items()}
    monkeypatch.setattr(int8, "FLOWS", gone)
    arguments = ["quantize", str(folder), "--rows", "repopt", "--bits", "4"]
    assert main([*arguments, "--int8"]) == 2
    assert re.search(r"error: --int8: .*No module named 'that'; .*pip install", capsys.readouterr().err)
    assert main([*arguments, "--flow", "pt2e"]) == 2
    assert re.search(r"error: --flow pt2e: PT2E of torchao: No module.*pip install", capsys.readouterr().err)
    assert not (folder / "quantize.json").exists()
    assert main(arguments) == 0
    assert re.search(r"no columns of PTQ and QAT: .*No module named 'that'", (folder / "quantize.md").read_text())


def test_a_network_that_cannot_be_converted_says_why(folder, monkeypatch, capsys):
    def refuses(*_):
        raise RuntimeError("cannot trace this\nand more")

    refusing = dataclasses.replace(FLOWS["fx"], load=lambda: None, prepare=refuses)
    monkeypatch.setattr(quantize, "chosen_flow", lambda name: (refusing, None))
    arguments = ["quantize", str(folder), "--rows", "repopt", "--bits", "4"]
    assert main(arguments) == 0
    assert "repopt has no PTQ and QAT: RuntimeError: cannot trace this." in (folder / "quantize.md").read_text()
    (folder / "state" / "quantize-repopt-seed0.json").unlink()
    assert main([*arguments, "--int8"]) == 2
    assert "repopt: FX graph mode of torch.ao.quantization cannot convert this network" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_left_out(folder):
    path = folder / "weights" / "repopt-seed0.pt"
    weights = tensors(path)
    weights["stage0.conv.weight"][0] = float("nan")
    torch.save(weights, path)
    assert main(["quantize", str(folder), "--rows", "repopt,csla", "--no-int8", "--bits", "4"]) == 0
    summary = report(folder)
    assert summary["not_finite"] == {"repopt": [0]}
    assert list(summary["rows"]) == ["csla"]
    assert "repopt: the weights of seed 0 are not finite, and are left out." in (folder / "quantize.md").read_text()


def test_weights_of_the_chosen_learning_rate(folder):
    """Of a row that chose, files have the rate in their names. This row chose 0.1."""
    weights = folder / "weights"
    (weights / "repopt-seed0.pt").rename(weights / "repopt-lr0.1-seed0.pt")
    shutil.copy(weights / "csla-seed0.pt", weights / "repopt-lr0.3-seed0.pt")
    assert main(["quantize", str(folder), "--rows", "repopt", "--no-int8", "--bits", "4"]) == 0
    before = json.loads((folder / "summary.json").read_text())["recipes"]["repopt"]["test_accuracy"]
    assert report(folder)["rows"]["repopt"]["fp32"] == pytest.approx(before, abs=1e-9)


WRONG = {
    "no run": (("nowhere",), "nowhere: no run of `train`, neither as a folder nor in "),
    "no run there": (("/nowhere",), "/nowhere: no run of `train`"),
    "few bits": (("RUN", "--bits", "8,1"), "--bits must be whole numbers from 2 to 16 with commas between, got 8,1"),
    "no number": (("RUN", "--bits", "8,x"), "--bits must be whole numbers from 2 to 16 with commas between, got 8,x"),
    "no bits": (("RUN", "--bits", "none"), "--bits must be whole numbers from 2 to 16"),
    "another row": (("RUN", "--rows", "sgd"), "--rows must be of repopt, csla, repvgg, got sgd"),
    "more seeds": (("RUN", "--seeds", "2"), "--seeds 2: the run has 1"),
    "no seeds": (("RUN", "--seeds", "0"), "--seeds must be at least 1, got 0"),
    "no images": (("RUN", "--calibration", "0"), "--calibration must be at least 1, got 0"),
    "epochs": (("RUN", "--qat-epochs", "-1"), "--qat-epochs must be at least 0, got -1"),
    "layer": (("RUN", "--layer", "linear"), "--layer must be a convolution above 1 x 1, as stage0.conv"),
    "flow": (("RUN", "--flow", "onnx"), "--flow must be one of fx, pt2e, got 'onnx'"),
    "flow of none": (("RUN", "--flow", "fx", "--no-int8"), "--flow fx: with --no-int8 there is none"),
    "device": (("RUN", "--device", "tpu"), "--device must be cpu, cuda or cuda:N, got 'tpu'"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_told_in_a_line(arguments, said, trained, capsys):
    before = sorted(trained.rglob("*"))
    assert main(["quantize", *(str(trained) if text == "RUN" else text for text in arguments)]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert sorted(trained.rglob("*")) == before


def test_a_run_that_is_not_there_whole(folder, capsys):
    (folder / "weights" / "csla-seed0.pt").unlink()
    assert main(["quantize", str(folder), "--no-int8"]) == 2
    assert "csla-seed0.pt is not there" in capsys.readouterr().err
    (folder / "summary.json").unlink()
    assert main(["quantize", str(folder)]) == 2
    assert "this run is not finished; `train --resume --name run`" in capsys.readouterr().err


# ---- quantization-aware training


@needs_fx
def test_training_in_8_bits_keeps_the_multipliers_and_the_settings(folder, monkeypatch):
    seen = []

    def watched(trainee, data, options, seed, epoch, epochs, on_batch):
        names = {id(p): name for name, p in trainee.model.named_parameters()}
        optimizer = trainee.optimizer
        mults = {names[id(p)]: optimizer.grad_mult(p) for g in optimizer.param_groups for p in g["params"]}
        seen.append((type(optimizer), trainee.lr, options.warmup, epochs, mults))
        return train_epoch(trainee, data, options, seed, epoch, epochs, on_batch)

    monkeypatch.setattr(quantize, "train_epoch", watched)
    assert main(["quantize", str(folder), "--rows", "repopt", *QUICK, "--int8"]) == 0
    kind, lr, warmup, epochs, mults = seen[0]
    assert (len(seen), kind, lr, warmup, epochs) == (1, gr.FusedRepSGD, pytest.approx(0.001), 0, 1)
    plain = gr.models.repopt_vgg_small(num_classes=10, in_channels=3)
    expected = {
        name: next(m for p, m in csla.grad_mults(plain, csla.load_scales(folder / "scales.pt")).items() if p is weight)
        for name, weight in plain.named_parameters()
        if name.endswith("conv.weight")
    }
    assert {name for name, m in mults.items() if m is not None} == expected.keys()
    for name, weight in plain.named_parameters():
        if name in expected:
            assert torch.equal(mults[name].dense(weight.shape), expected[name].dense(weight.shape))


@needs_fx
def test_a_diverging_training_in_8_bits_is_told(folder, monkeypatch):
    monkeypatch.setattr(quantize, "train_epoch", lambda *_: {"train_loss": None})
    assert main(["quantize", str(folder), "--rows", "repopt", "--bits", "8"]) == 0
    assert report(folder)["rows"]["repopt"]["qat"] == [None]
    assert "| - (1 diverged) |" in (folder / "quantize.md").read_text()


def flow_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_gives_a_network_of_8_bits(name, per_channel, recwarn):
    flow = FLOWS[name]
    if (why_not := flow.why_not()) is not None:
        pytest.skip(why_not)
    model, x = flow_network().eval(), torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    deployed = csla.merge(model, fold_norm=True)
    expected = deployed(x).detach()
    prepared = flow.prepare(deployed, x[:4], False, per_channel)
    prepared.eval()
    prepared(x)
    converted = flow.convert(prepared)
    converted.eval()
    found = converted(x[:5]).detach()  # Any number of images goes.
    error = (found - expected[:5]).abs().max() / expected.abs().max()
    assert 0 < error < 0.1  # Activations have 7 bits in fx on x86, and the outputs are small differences of large ones.
    grids = {True: torch.per_channel_affine, False: torch.per_tensor_affine}
    if name == "fx":
        assert converted.get_submodule("0").weight().qscheme() == grids[per_channel]
    else:
        assert ("quantize_per_channel" in str(converted.graph)) == per_channel
    assert not [w for w in recwarn if w.category is UserWarning and "torchao" not in str(w.filename)]


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_keeps_the_parameters_for_the_optimizer(name):
    """So that it goes on with its multipliers. Gradients reach them through the fake quantization."""
    flow = FLOWS[name]
    if (why_not := flow.why_not()) is not None:
        pytest.skip(why_not)
    model = flow_network().train()
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    frozen = model[0].weight
    mults = {frozen: torch.zeros(8, 3, 3, 3), model[3].weight: torch.ones(8, 8, 3, 3)}
    optimizer = gr.FusedRepSGD(parameters, lr=0.1, grad_mults=mults)
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    prepared = flow.prepare(model, x, True, True)
    prepared.train()
    assert {id(p) for p in prepared.parameters()} == {id(p) for p in parameters}
    prepared(x).square().mean().backward()
    optimizer.step()
    moved = [not torch.equal(p, was) for p, was in zip(parameters, before)]
    assert moved == [p is not frozen for p in parameters]
    flow.freeze(prepared)
    prepared.eval()
    expected = prepared(x)
    prepared(1000 * x)  # What comes later moves no range.
    assert torch.equal(prepared(x), expected)


# ---- the report


PART = {"whole": 0.1, "centre": 0.2, "surround": 0.05, "largest_over_std": 4.0}
ABOUT = {
    "run": "x", "model": "m", "seeds": [0, 1, 2], "layer": "a", "settings": {"bits": [5]}, "flow": None,
    "why_no_int8": "left out", "data": {"name": "d", "test": 1000}, "versions": {"torch": "2"},
}  # fmt: skip


def a_network(fp32, in_5_bits):
    return {
        "fp32": fp32,
        "rounded": {"per tensor": {"5": in_5_bits}, "per channel": {"5": fp32}},
        "norms_left": 0,
        "spread": {"mean": {"trained": PART}, "layers": {"a": {"trained": PART}}},
    }


def written(folder, **networks):
    kernels = {name: KernelHistory(torch.randn(2, 2, 3, 3), None, None) for name in networks}
    return write_report(folder, ABOUT, [RECIPES[name] for name in networks], networks, kernels)


def test_differences_are_paired_by_seed(tmp_path):
    """Three seeds: 5 bits lose 1, 2 and 3 points. Student's t of two degrees of freedom is 4.3027."""
    summary = written(tmp_path, sgd=[a_network(0.90, 0.89), a_network(0.80, 0.78), a_network(0.70, 0.67)])
    per_tensor, per_channel = summary["compared"]
    assert per_tensor["mean"] == pytest.approx(-2)
    assert per_tensor["half_width"] == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert (per_channel["mean"], per_channel["half_width"]) == (0, pytest.approx(0.1))  # one image
    assert summary["statements"] == []  # The interval holds 0.
    text = (tmp_path / "quantize.md").read_text()
    assert "| sgd | 80.00 ± 10.00 | 78.00 ± 11.00 (-2.0 ± 2.5) |" in text
    assert "| sgd | as trained | 0.1000 | 0.2000 | 0.0500 | 4.0 |" in text
    assert any("78.00 ± 11.00 (-2.0 ± 2.5)" in line for line in closing_lines(summary))


def test_rows_are_compared_by_what_they_lose(tmp_path):
    """repopt loses 0 and 1 points where sgd loses 10 and 12, with the seeds that both have."""
    bad = {"not_finite": True}
    sgd = [a_network(0.90, 0.80), a_network(0.5, 0.5), a_network(0.70, 0.58)]
    summary = written(tmp_path, sgd=sgd, repopt=[a_network(0.6, 0.6), bad, a_network(0.6, 0.59)])
    assert summary["not_finite"] == {"repopt": [1]}
    (found,) = (d for d in summary["compared"] if d["other"] == "sgd" and "per tensor" in d["row"])
    assert (found["mean"], found["seeds"]) == (pytest.approx(10.5), 2)
    assert found["half_width"] == pytest.approx(12.7062 * 0.5, rel=1e-4)  # of one degree of freedom
    assert [
        s for s in summary["statements"] if s.startswith("repopt, 5 bits per tensor, each less its fp32, is better")
    ]
    assert "repopt: the weights of seed 1 are not finite" in (tmp_path / "quantize.md").read_text()
