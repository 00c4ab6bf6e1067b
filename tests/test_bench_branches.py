# ruff: noqa: E402 - the benches are no package: their folder goes on the path first
"""The study of what branches cost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradrep_kernels as gr

BENCH = Path(__file__).resolve().parent.parent / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not here", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import study_branches as study


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_published_blocks_are_those_of_the_models():
    plain, branches = study.vgg("repvgg")()
    published = gr.models.repopt_vgg_small(mode="repvgg", num_classes=study.CLASSES)
    assert weights(study.normed_model(plain, branches)) == weights(published)


@pytest.mark.parametrize("name", [name for name in study.FAMILIES if not name.startswith("timm")])
def test_forms_of_a_family_train_the_same_blocks(name):
    torch.manual_seed(0)
    models, scales = study.FAMILIES[name].forms()
    published, explicit, plain = models.values()
    assert len(scales) >= 4
    for block, value in scales.items():
        normed, csla = published.get_submodule(block), explicit.get_submodule(block)
        kernels = len(value.branches(plain.get_submodule(block).kernel_size))
        assert len(normed.branches) == kernels + value.has_identity
        assert sum(isinstance(m, nn.Conv2d) for m in csla.modules()) == kernels
    assert weights(published) > weights(explicit) > weights(plain)
    outputs = [model.eval()(torch.randn(2, 3, 32, 32)) for model in models.values()]
    assert {tuple(y.shape) for y in outputs} == {(2, study.CLASSES)}


@pytest.mark.parametrize(("of", "states", "factors"), [("SGD", 1, 8 * 9 * 4), ("AdamW", 2, 8 * 9 * 4 * 3)])
def test_memory_is_that_of_a_count_by_hand(of, states, factors):
    torch.manual_seed(0)
    n, c, side = 4, 8, 6
    model = nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(c, study.CLASSES),
    )  # fmt: skip
    scales = gr.csla.extract_scales(gr.csla.hyper_search_model(model))
    training = study.training(study.FORMS[-1], model, scales, of, (n, 3, side, side))
    found, parameters = training.memory(), 4 * weights(model)
    assert found["gradients"] == parameters
    assert found["weights and buffers"] == parameters + 4 * 2 * c + 8  # statistics, and batches seen
    assert found["states"] - states * parameters in (0, 4 * len(list(model.parameters())))  # AdamW's counts
    assert found["factors"] == factors
    # Autograd keeps the convolution's output for the norm, the ReLU's output, two numbers a channel of the norm, its
    # input of the linear layer, and what cross_entropy makes of the logits. The images are not the training's.
    maps, small = 4 * n * c * side * side, 4 * (2 * c + n * c + n * study.CLASSES)
    assert 2 * maps + small <= found["kept for the backward pass"] <= 2 * maps + small + 200
    assert training.memory() == found


def test_branches_with_norms_keep_an_output_each():
    """Of which the plain form keeps one."""
    torch.manual_seed(0)
    models, scales = study.FAMILIES["MobileOne: 4 branches, 3 x 3 depthwise"].forms()
    kept = [
        study.training(form, model, scales, "SGD", (2, 3, 32, 32)).memory()["kept for the backward pass"]
        for form, model in models.items()
    ]
    assert kept[0] > 1.5 * kept[2]
    assert kept[1] == pytest.approx(kept[2], rel=0.05)


def test_the_study_runs_and_tells_what_it_found(tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--quick", "--results", str(tmp_path), "--threads", "1", "RepVGG", "MobileOne"]
    assert study.main(arguments) == 0
    assert torch.get_num_threads() == threads
    found = json.loads((tmp_path / "study-branches.json").read_text())
    assert [row["family"].partition(":")[0] for row in found["rows"]] == ["RepVGG", "MobileOne"]
    for row in found["rows"]:
        assert list(row["forms"]) == list(study.FORMS)
        for of in study.OPTIMIZERS:
            assert row["forms"][study.FORMS[-1]][of]["times_ours"]["median"] == 1
            assert all(form[of]["seconds"]["n"] >= 2 for form in row["forms"].values())
    text = (tmp_path / "study-branches.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| plain, ours |") == 2
    assert "Its figures mean nothing" in text


def test_a_network_of_timm_stands_beside_its_same_blocks():
    with study.timm_alone():
        pytest.importorskip("timm")
        torch.manual_seed(0)
        models, scales = study.FAMILIES["timm: repvit_m1"].forms()
        own, published, *_ = models.values()
        assert weights(own) == weights(published)  # legacy RepViT: norms in both kernels, and x itself
        assert len(scales) == 23
        assert next(iter(models)) == study.OWN


def test_words_that_no_family_has_are_refused(capsys):
    with pytest.raises(SystemExit):
        study.main(["ResNeXt"])
    assert "no family has these words: ResNeXt" in capsys.readouterr().err


def test_the_page_of_the_results_is_what_they_give():
    path = BENCH / "results" / "study-branches.json"
    if not path.exists():
        pytest.skip("an sdist brings no results of the benches")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == study.page(found)
    assert {row["family"] for row in found["rows"]} | set(found["skipped"]) == set(study.FAMILIES)
    assert not found["quick"]
