"""The training step in other precisions, layouts, parts and by a compiler."""

from __future__ import annotations

import json

import pytest
import recipe_ranks
import torch
from cases_recipes import TINY, assert_same_tensors, bit_repeatable, tensors, train, train_arguments

from gradrep_kernels.cli import main
from gradrep_kernels.optim import GradScaler
from gradrep_kernels.recipes import job, metrics, ranks, steps
from gradrep_kernels.recipes.build import build
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.networks import MODELS
from gradrep_kernels.recipes.options.resolve import resolve
from gradrep_kernels.recipes.runs import open_run
from gradrep_kernels.recipes.shared_run import check_together
from gradrep_kernels.recipes.steps import TrainingSteps
from gradrep_kernels.recipes.table import RECIPES
from gradrep_kernels.recipes.training import train_epoch, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = ("sgd", "repopt+sgs", "csla", "repvgg")


def trained(row, options, data, scales, epochs=2):
    """The trainee after some epochs, and their losses."""
    trainee = build(RECIPES[row], options, data, scales, 0, 0.1)
    step = TrainingSteps(trainee, options)
    records = [train_epoch(trainee, data, options, 0, n, epochs, lambda: None, step) for n in range(epochs)]
    return trainee, [record["train_loss"] for record in records]


def with_options(source, **given):
    return resolve({"data": source, **TINY, "augment": (), "sgs_warmup": 0, **given})


@pytest.mark.parametrize("row", ROWS[:3])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(source, data, monkeypatch, row):
    """In float64, where norms do not see the batch."""
    monkeypatch.setitem(MODELS, "frozen", recipe_ranks.frozen)
    found = []
    for accumulate in (1, 3):
        options = with_options(source, model="frozen", batch_size=15, accumulate=accumulate, clip_norm=0.5)
        scales = recipe_ranks.double_scales(options, data)
        found.append(trained(row, options, data, scales))
    (one, losses), (parts, losses_of_parts) = found
    assert losses_of_parts == pytest.approx(losses, rel=1e-12)
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("changed", [{"channels_last": True}, {"amp": "bf16"}, {"amp": "fp16"}])
def test_layout_and_precision_change_nothing_but_rounding(source, data, scales, row, changed):
    """Six steps at a rate of 0.1 magnify it: by float32 to 1e-3 of the loss. bfloat16 has 8 bits, float16 has 11."""
    plain = with_options(source)
    _, losses = trained(row, plain, data, scales)
    options = with_options(source, **changed)
    trainee, close = trained(row, options, data, scales)
    assert close == pytest.approx(losses, rel=5e-3 if "channels_last" in changed else 5e-2)
    weights = [p for p in trainee.model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert all(p.dtype == torch.float32 for p in trainee.model.parameters())
    last = [p.is_contiguous(memory_format=torch.channels_last) for p in weights]
    assert all(last) if "channels_last" in changed else not any(last)
    if "amp" in changed:
        assert close != losses


@pytest.mark.parametrize(
    ("row", "changed", "refused"),
    [
        ("repvgg", {"amp": "bf16", "channels_last": True}, "stage0.conv.convs.1"),
        ("sgd", {"amp": "bf16", "channels_last": True}, None),  # It has no 1x1.
        ("dyrep", {"channels_last": True}, "stage0.conv may get"),
        ("repvgg", {"amp": "bf16"}, None),
        ("repvgg", {"channels_last": True}, "stage0.conv.convs.1"),
    ],
)
def test_what_onednn_cannot_train_is_refused(source, data, row, changed, refused):
    """Its backward of a 1x1 of stride 2 and 3 channels writes past the end of memory, here from 128 x 128 on."""
    options = with_options(source, strides=(2, 1, 2), **changed)
    trainee = build(RECIPES[row], options, data, None, 0, 0.1)
    if refused is None:
        steps.TrainingSteps(trainee, options)
        return
    with pytest.raises(InputError, match=f"--channels-last on a CPU: .* as {refused} "):
        steps.TrainingSteps(trainee, options)


def test_forwards_of_training_alone_are_in_low_precision(source, data, monkeypatch):
    """An update of spatial gradient scaling sees float32 maps."""
    options = with_options(source, amp="bf16")
    trainee = build(RECIPES["sgs"], options, data, None, 0, 0.1)
    seen = {True: set(), False: set()}
    norm = next(m for m in trainee.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, args, y: seen[module.training].add(args[0].dtype))
    train_epoch(trainee, data, options, 0, 0, 1, lambda: None)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}


@pytest.mark.parametrize("row", ["sgd", "repopt"])
def test_clipping_is_by_the_norm_without_the_scale_of_fp16(source, data, scales, row):
    """The first clipped step of fp16 and of float32 move the weights equally far, to rounding."""
    moved = []
    for amp in (None, "fp16"):
        options = with_options(source, amp=amp, clip_norm=1e-3, weight_decay=0.0)
        trainee = build(RECIPES[row], options, data, scales, 0, 0.1)
        before = [p.detach().clone() for p in trainee.model.parameters()]
        train_step(trainee, options, data.standardise(data.train.read(torch.arange(10))), data.train.labels[:10])
        moved.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(trainee.model.parameters(), before)]).norm())
    assert float(moved[0]) > 0
    assert float(moved[1]) == pytest.approx(float(moved[0]), rel=2e-2)


def test_a_resumed_training_in_fp16_knows_its_scale(source, tmp_path, monkeypatch, no_pictures):
    """It overflows at first, and so finds a lower one. Begun anew it would skip steps again."""
    made = []

    def scaler(device):
        made.append(GradScaler(device, init_scale=2.0**20))
        return made[-1]

    monkeypatch.setattr(steps, "GradScaler", scaler)
    monkeypatch.setattr(job, "seconds_per_step", lambda *_: {"sgd": [1.0, 1.0, 1.0]})  # fp16 takes long on a CPU.
    arguments = ["--recipe", "sgd", "--amp", "fp16", "--epochs", "3"]
    train(source, tmp_path, "--name", "whole", *arguments)
    assert 2.0**12 < made[0].get_scale() < 2.0**19  # It skipped some of the 9 steps.
    append = metrics.append

    def stopped(*given):
        append(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", stopped)
        assert main(train_arguments(source, tmp_path, "--name", "stopped", *arguments)) == 130
    assert main(["train", "--out", str(tmp_path), "--name", "stopped", "--resume"]) == 0
    assert_same_tensors(*(tensors(tmp_path / run / "weights" / "sgd-seed0.pt") for run in ("whole", "stopped")))
    whole, stopped = (bit_repeatable(tmp_path / run / "metrics.jsonl") for run in ("whole", "stopped"))
    assert whole == stopped


def test_compiled_steps_are_those_of_the_model(source, data, scales, monkeypatch):
    """By a backend that traces and runs the same operations; inductor would take a minute."""
    monkeypatch.setattr(steps, "COMPILER", "aot_eager")
    _, losses = trained("repopt+sgs", with_options(source), data, scales)
    trainee, compiled = trained("repopt+sgs", with_options(source, compile=True), data, scales)
    assert compiled == pytest.approx(losses, rel=1e-4)
    assert not any("_orig_mod" in name for name in trainee.model.state_dict())


def test_no_compiler_is_the_users_to_mend(source, data, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("g++ is not installed\nmuch more")

    monkeypatch.setattr(steps, "COMPILER", broken)
    options = with_options(source, compile=True)
    trainee = build(RECIPES["sgd"], options, data, None, 0, 0.1)
    with pytest.raises(InputError, match=r"^--compile: torch.compile does not work here \(.*\); leave it out$"):
        train_epoch(trainee, data, options, 0, 0, 1, lambda: None)


@pytest.mark.parametrize(
    ("given", "processes", "said"),
    [
        ({"accumulate": 10}, 1, "--batch-size must be at least 20, 2 for each of 10 parts, got 10"),
        ({}, 6, "--batch-size must be at least 12, 2 for each of 6 processes, got 10"),
        (
            {"accumulate": 5},
            2,
            "--batch-size must be at least 20, 2 for each of 2 processes, each with 5 parts, got 10",
        ),
        ({"sync_bn": True}, 2, "--sync-bn needs GPUs: torch's SyncBatchNorm has no form for CPUs; leave it out"),
    ],
)
def test_batches_and_norms_that_processes_cannot_share(source, monkeypatch, given, processes, said):
    monkeypatch.setattr(ranks, "count", lambda: processes)
    with pytest.raises(InputError, match=f"^{said}$"):
        check_together(with_options(source, **given))


@pytest.mark.parametrize(("given", "left"), [({"images": 7}, 7), ({"images": 10, "validation": 0.3}, 7)])
def test_fewer_images_than_a_batch_are_not_cut_into_empty_parts(source, tmp_path, given, left):
    """The mean loss of a part without images is NaN."""
    given = {"data": source, **TINY, "batch_size": 16, "accumulate": 4, "recipe": ("sgd",), **given}
    with pytest.raises(InputError, match=f"^--accumulate 4: of {left} training images .* at least 8$"):
        open_run(tmp_path, "a", given, resume=False)
    assert not list(tmp_path.iterdir())


def test_the_search_tells_the_mean_scales_of_its_branches(source, tmp_path, no_pictures):
    train(source, tmp_path, "--name", "a", "--recipe", "repopt", "--epochs", "1", "--search-epochs", "1")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [("scale_means" in line) for line in lines] == [True, False]
    scales = tensors(tmp_path / "a" / "scales.pt")
    by_hand = {}
    for key, tensor in scales.items():
        branch = next(name for name in ("identity", "1x1", "conv") if name in key.rsplit("scale", 1)[-1])
        by_hand.setdefault(branch, []).append(float(tensor.double().mean()))
    means = {branch: sum(values) / len(values) for branch, values in by_hand.items()}
    assert lines[0]["scale_means"] == pytest.approx(means, rel=1e-6)
    layers = lines[0]["layer_scale_means"]
    assert sorted(value["conv"] for value in layers.values()) == pytest.approx(sorted(by_hand["conv"]))
