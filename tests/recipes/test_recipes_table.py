"""The rows of the table: the network and the optimizer that each is made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import gradrep_kernels as gr
from gradrep_kernels.recipes.build import build, multiplier_bytes, plain_model, search_model
from gradrep_kernels.recipes.table import ABLATIONS, OPTIMIZERS, RECIPES, ablated, default_rate
from gradrep_kernels.recipes.training import train_epoch

pytestmark = pytest.mark.usefixtures("one_thread")


def all_rows():
    return [*RECIPES.values(), *map(ablated, ABLATIONS)]


@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row.name)
def test_every_row_is_built_the_same_from_its_seed_and_learns(row, options, data, scales):
    first, again = (build(row, options, data, scales, 3, 0.1) for _ in range(2))
    for a, b in zip(first.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(a, b)
    other = build(row, options, data, scales, 4, 0.1)
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))
    assert (first.sgs is not None) == row.sgs
    losses = [train_epoch(first, data, options, 3, epoch, 4, lambda: None)["train_loss"] for epoch in range(4)]
    assert losses[-1] < losses[0]


def kernels(trainee):
    return [p for p in trainee.model.parameters() if p.dim() == 4]


def mults(trainee):
    return [trainee.optimizer.grad_mult(p) for p in kernels(trainee)]


def test_repopt_breaks_the_rules_that_an_ablation_names(options, data, scales):
    plain, repopt = (build(RECIPES[recipe], options, data, scales, 0, 0.1) for recipe in ("sgd", "repopt"))
    no_init, no_grad = (build(ablated(ablation), options, data, scales, 0, 0.1) for ablation in ("init", "grad"))
    for a, b, c, d in zip(kernels(plain), kernels(no_init), kernels(repopt), kernels(no_grad)):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert not torch.equal(a, c)
    assert mults(no_grad) == [None] * len(kernels(no_grad))
    for a, b, (name, value) in zip(mults(repopt), mults(no_init), scales.items()):
        assert torch.equal(a.scale, b.scale), name
        assert torch.equal(a.scale[:, 0, 0, 0], value.kxk.square())


def test_ablated_scales_are_ones_means_or_where_the_search_starts(options, data, scales):
    ones, initial, mean = (
        mults(build(ablated(ablation), options, data, scales, 0, 0.1))
        for ablation in ("ones", "hs-init", "channel-mean")
    )
    for m in ones:
        assert m.scale[0, 0].tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 1]]
        assert len(torch.unique(m.scale[:, 0, 0, 0])) == 1
    # In module order: no shortcut, none, first, none, first, second: 1, 1, √2, 1, √2, 1.
    assert [round(float(m.scale[0, 0, 0, 0]), 5) for m in initial] == [1, 1, 2, 1, 2, 1]
    for m, value in zip(mean, scales.values()):
        torch.testing.assert_close(m.scale[:, 0, 0, 0], value.kxk.mean().square().expand(value.channels))


def test_ones_and_initial_scales_need_no_search(options, data):
    for ablation in ("ones", "hs-init"):
        row = ablated(ablation)
        assert not row.needs_search
        build(row, options, data, None, 0, 0.1)


def test_all_rows_start_from_one_plain_network(options, data, scales):
    plain = plain_model(options, data, 0).state_dict()
    explicit = build(RECIPES["csla"], options, data, scales, 0, 0.1).model
    branched = build(RECIPES["repvgg"], options, data, scales, 0, 0.1).model
    for name in scales:
        assert torch.equal(explicit.get_submodule(name).conv.weight, plain[f"{name}.weight"])
        assert torch.equal(branched.get_submodule(name).convs[0].weight, plain[f"{name}.weight"])
    assert torch.equal(explicit.linear.weight, plain["linear.weight"])


def test_rows_without_multipliers_are_trained_by_torchs_own_sgd(options, data, scales):
    kinds = {row.name: type(build(row, options, data, scales, 0, 0.1).optimizer) for row in all_rows()}
    assert {label for label, kind in kinds.items() if kind is torch.optim.SGD} == {
        row.name for row in all_rows() if not row.extended
    }
    assert {"sgd", "csla", "repvgg"} <= {row.name for row in all_rows() if not row.extended}
    assert all(kind in (gr.FusedRepSGD, torch.optim.SGD) for kind in kinds.values())
    assert type(search_model(options.of_search(), data).optimizer) is torch.optim.SGD


RULES = [name for name in OPTIMIZERS if name != "sgd"]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_of_optimizer_trains_rows_with_and_without_a_scaling(name, options, data):
    changed = dataclasses.replace(options, optimizer=name, lr=(default_rate(name),), momentum=0.0)
    for row in ("sgd", "sgs"):
        trainee = build(RECIPES[row], changed, data, None, 0, changed.lr[0])
        plain, extended = OPTIMIZERS[name].plain, OPTIMIZERS[name].extended
        assert type(trainee.optimizer) is (plain if row == "sgd" else extended).make
        assert trainee.optimizer.defaults["lr"] == default_rate(name)
        assert trainee.optimizer.param_groups[0]["weight_decay"] == changed.weight_decay
        losses = [train_epoch(trainee, data, changed, 3, epoch, 3, lambda: None)["train_loss"] for epoch in range(3)]
        assert losses[-1] < losses[0]


def test_adamw_trains_repopt_by_branch_scales(options, data, scales):
    changed = dataclasses.replace(options, optimizer="adamw", lr=(1e-3,))
    optimizer = build(RECIPES["repopt"], changed, data, scales, 0, 1e-3).optimizer
    assert type(optimizer) is gr.FusedRepAdamW
    assert type(build(RECIPES["csla"], changed, data, scales, 0, 1e-3).optimizer) is torch.optim.AdamW


def test_the_fixed_scaling_is_that_of_alpha_and_beta(options, data):
    trainee = build(RECIPES["sgs-grid"], options, data, None, 0, 0.1)
    (scale,) = {tuple(trainee.optimizer.grad_mult(p, total=True).scale.flatten().tolist()) for p in kernels(trainee)}
    centre, edge, corner = scale[4], scale[1], scale[0]
    assert (centre / edge, centre / corner) == (pytest.approx(1.7), pytest.approx(5.0))
    assert sum(scale) / 9 == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["repopt", "everything", "yolov6"])
def test_decay_sets_are_those_of_the_papers(rule, options, data):
    changed = dataclasses.replace(options, decay=rule)
    optimizer = search_model(changed, data).optimizer
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    scales_of_convs = {name for name in names if name.endswith(("scale_conv.weight", "scale_1x1.weight"))}
    identities = {name for name in names if name.endswith("scale_identity.weight")}
    norms_and_biases = {name for name in names if ".bn." in name or name.endswith(".bias")}
    assert scales_of_convs
    assert identities <= decayed
    assert (scales_of_convs <= decayed) == (rule != "repopt")
    assert bool(norms_and_biases & decayed) == (rule == "everything")
    assert (names == decayed) == (rule == "everything")


def test_multiplier_bytes_are_those_of_the_structured_form(options, data, scales):
    structured = sum(value.channels * 9 + value.channels * value.has_identity for value in scales.values()) * 4
    assert multiplier_bytes(build(RECIPES["repopt"], options, data, scales, 0, 0.1)) == structured
    assert multiplier_bytes(build(RECIPES["sgd"], options, data, scales, 0, 0.1)) == 0
    both = build(RECIPES["repopt+sgs"], options, data, scales, 0, 0.1)
    both.sgs.update(torch.rand(2, 4, 3, 32, 32))
    assert multiplier_bytes(both) == structured  # the product stays in the structured form
