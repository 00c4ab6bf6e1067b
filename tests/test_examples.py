"""Each script in examples/ runs as a user starts it, and what it says about itself is so."""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases_optim import dense
from foreign_blocks import Foreign, Plain
from timm_alone import importable_timm
from torch import nn

import gradrep_kernels as gr

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = [
    pytest.mark.skipif(not EXAMPLES.exists(), reason="examples/ is not here"),
    pytest.mark.filterwarnings("ignore"),  # of the frameworks
]


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Run a script with arguments, and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)
    sys.modules.pop("digits", None)


def tensors(path: Path) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(torch.load(path, weights_only=False))
    found = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert found
    return found


def assert_alike(a: Path, b: Path) -> None:
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.fixture
def digits():
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install gradrep_kernels[recipes]")


@pytest.fixture
def scales_file(digits, start, tmp_path):
    network = importlib.import_module("digits").network
    path = tmp_path / "scales.pth"
    gr.csla.save_scales(gr.csla.extract_scales(gr.csla.hyper_search_model(network(), init=0.8)), path)
    return path


def test_own_loop_goes_on_where_it_was_stopped(digits, start, tmp_path):
    said = start("own_loop.py", "whole", "--epochs", 3)
    assert said.count("epoch") == 3
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole" / "scales.pth").rename(tmp_path / "stopped" / "scales.pth")  # a search is not run again
    start("own_loop.py", "stopped", "--epochs", 2)
    assert start("own_loop.py", "stopped", "--epochs", 3) == said.splitlines(True)[2]
    assert_alike(tmp_path / "stopped" / "checkpoint.pth", tmp_path / "whole" / "checkpoint.pth")
    saved = torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)
    assert all(not torch.equal(g, torch.ones(3, 3)) for g in saved["sgs"]["scalings"].values())
    assert len(saved["optimizer"]["grad_mults"]) == 4


def test_averages_are_ahead_of_the_weights(digits, start):
    said = start("ema.py", "--epochs", 2).splitlines()
    accuracies = [[float(part.split()[1]) for part in line.split(": ")[1].split(", ")[1:]] for line in said]
    assert len(accuracies) == 2
    assert all(averages > weights + 5 for weights, averages in accuracies)
    assert accuracies[-1][1] > 90


def test_sgs_with_any_optimizer(digits, start):
    said = start("sgs_any_optimizer.py")
    figures = [float(line.split()[-2]) for line in said.splitlines() if line.endswith("%")]
    assert len(figures) == 3
    assert min(figures) > 50


def test_a_scales_file(start, tmp_path):
    said = start("scales_file.py")
    assert "6 of 6 k x k convolutions have scales" in said
    assert "11,008 bytes" in said
    torch.manual_seed(0)
    found = gr.csla.extract_scales(gr.models.repopt_vgg_small(mode="hs", num_classes=10))
    gr.csla.save_scales(found, tmp_path / "some.pth")
    assert "some.pth: scales of 6 blocks" in start("scales_file.py", tmp_path / "some.pth")


def test_lightning_resumes(start, scales_file, tmp_path):
    pytest.importorskip("lightning", reason="needs lightning: pip install gradrep_kernels[interop]")
    whole = start("lightning_digits.py", tmp_path, "--epochs", 3)
    last = tmp_path / "checkpoints" / "epoch=2.ckpt"
    last.rename(tmp_path / "whole.ckpt")
    resumed = start("lightning_digits.py", tmp_path, "--epochs", 3, "--resume", last.with_name("epoch=1.ckpt"))
    assert resumed == whole
    assert "after 3 epochs" in whole
    assert_alike(last, tmp_path / "whole.ckpt")


def test_accelerate_resumes(start, scales_file, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install gradrep_kernels[interop]")

    def run(epochs: int) -> str:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        return start("accelerate_digits.py", tmp_path, "--cpu", "--epochs", epochs)

    whole = run(3)
    (tmp_path / "epoch-002").rename(tmp_path / "whole")
    assert run(3) == whole.splitlines(True)[2]
    for name in ("optimizer.bin", "custom_checkpoint_0.pkl"):
        assert_alike(tmp_path / "epoch-002" / name, tmp_path / "whole" / name)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_of_timm(start):
    clipped = mock.patch.object(gr.FusedRepSGD, "clip_grad_norm_", autospec=True, return_value=torch.ones(()))
    with importable_timm(), clipped as clip:
        said = start("timm_model.py")
    assert "10 of 11 k x k convolutions would get branches" in said
    losses = [float(line.split()[-1]) for line in said.splitlines()[1:]]
    assert losses[0] > losses[-1]
    assert [call.args[1] for call in clip.call_args_list] == [5.0] * 6


BRANCHES = {  # model of timm: what is covered, and what one of its convolutions stands for
    "mobileone_s0": ("22 of 22", "stages.0.0.reparam_conv.0", [*[(3, 3)] * 4, (1, 1), "identity"]),
    "repvgg_a0": ("22 of 22", "stages.0.1.reparam_conv.0", [(3, 3), (1, 1), "identity"]),
    "repvit_m1": ("23 of 28", "stages.0.blocks.0.token_mixer.c", ["kxk", "1x1", "identity=1"]),
    "fastvit_t8": ("16 of 26", "stages.1.downsample.proj.0.reparam_conv.0", [(7, 7), (3, 3), "identity"]),
}


def test_models_of_timm_with_branches(start):
    with importable_timm():
        said = start("timm_branches.py")
        for of_model, (name, (covered, _, _)) in zip(said.split("deployed"), BRANCHES.items()):
            assert f"{name}\n  {covered} k x k convolutions have branches" in of_model
            assert of_model.count("FusedRep") == 3
    assert "nan" not in said
    assert said.count("43 of 43 norms are folded") == 1


@pytest.mark.parametrize("name", BRANCHES)
def test_plain_forms_of_timm_have_the_convolutions_of_the_deployed_ones(start, name):
    """And the branches that the blocks had. timm merges its own blocks."""
    with importable_timm():
        import timm
        from timm.utils.model import reparameterize_model

        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=2)
        deployed = reparameterize_model(model)
        sys.modules.pop("timm_branches", None)  # the study of branches imports it too, with another timm
        branches = importlib.import_module("timm_branches").plain_form(model)
        sys.modules.pop("timm_branches")
    _, conv, kinds = BRANCHES[name]
    assert branches[conv] == kinds
    kernels = [
        sorted(tuple(m.weight.shape) for m in of.modules() if isinstance(m, nn.Conv2d)) for of in (model, deployed)
    ]
    assert kernels[0] == kernels[1]
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)
    named = dict(model.named_modules())
    assert all(isinstance(named[conv], nn.Conv2d) for conv in branches)


# ---- YOLOv6


class Masked(torch.optim.SGD):
    """An optimizer with the arguments of YOLOv6's RepVGGOptimizer and its attribute `grad_mask_map`."""

    def __init__(self, model, scales, args, cfg, reinit, cpu_mode):
        assert not reinit
        solver = cfg.solver
        super().__init__(groups(args, cfg, model), solver.lr0, solver.momentum, nesterov=True, foreach=False)
        blocks: list = []
        listed(model, blocks)
        self.grad_mask_map = {}
        for block, (*identity, one_by_one, kxk) in zip(blocks, scales, strict=True):
            scale = gr.BranchScales(kxk, one_by_one, identity[0] if identity else False)
            self.grad_mask_map[block.conv.weight] = dense(scale.grad_mult((3, 3)), block.conv.weight.shape)

    def step(self):
        for p, mask in self.grad_mask_map.items():
            p.grad.mul_(mask)
        super().step()


def groups(args, cfg, model):
    decays = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": cfg.solver.weight_decay}
    return [decays, {"params": [p for p in model.parameters() if p.dim() == 1]}]


def listed(model, blocks):
    blocks += [module for module in model.modules() if isinstance(module, (Foreign, Plain))]


def built(config, classes, device):
    Block = Foreign if config.endswith("yolov6n_hs.py") else Plain
    head = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))  # searched by neither
    return nn.Sequential(Block(3, 6, stride=2), Block(6, 6), head, nn.Conv2d(6, classes, 1))


def test_yolov6_on_a_stand_in(start, tmp_path, monkeypatch):
    """Modules with the names of YOLOv6's hold small networks, and a plain optimizer with masks."""
    names = {
        "yolov6.models.yolo": {"build_model": built},
        "yolov6.utils.config": {"Config": types.SimpleNamespace(fromfile=str)},
        "yolov6.utils.RepOptimizer": {
            "RepVGGOptimizer": Masked,
            "extract_blocks_into_list": listed,
            "get_optimizer_param": groups,
        },
    }
    for name in ("yolov6", "yolov6.models", "yolov6.utils", *names):
        module = types.ModuleType(name)
        vars(module).update(names.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    assert_yolov6(start("yolov6.py", tmp_path), "2 of 3")
    torch.save({"model": built("yolov6n_hs.py", 80, "cpu").state_dict()}, tmp_path / "last_ckpt.pt")
    assert_yolov6(start("yolov6.py", tmp_path, "--scales", tmp_path / "last_ckpt.pt"), "2 of 3")


@pytest.mark.skipif("GRADREP_YOLOV6" not in os.environ, reason="GRADREP_YOLOV6 names no checkout of YOLOv6")
def test_yolov6_itself(start):
    assert_yolov6(start("yolov6.py", os.environ["GRADREP_YOLOV6"]), "35 of 43")


def assert_yolov6(said: str, coverage: str) -> None:
    assert f"{coverage} k x k convolutions have scales" in said
    differences = [float(line.split(" by ")[1].split()[0]) for line in said.splitlines() if line.startswith("step")]
    assert len(differences) == 3
    assert max(differences) < 1e-6
