"""What a leaf declares is held against its op, and followed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gradrep_kernels import FusedRepSGD
from gradrep_kernels.ops.registry import OPS

STEPS = 5  # a plan, where there is one, is in use by then


def with_rule(**changes) -> type[FusedRepSGD]:
    rule = dataclasses.replace(FusedRepSGD.update_rule, **changes)
    return type("Changed", (FusedRepSGD,), {"update_rule": rule})


def test_a_rule_with_other_states_than_its_op_is_refused():
    with pytest.raises(
        ValueError, match=r"rep_sgd_step keeps \['momentum_buffers'\], in this order, and its rule has \[\]"
    ):
        with_rule(states=())([torch.zeros(3, requires_grad=True)])


def test_a_rule_may_say_how_a_group_gives_its_hyper_parameters():
    """As an optimizer must whose groups hold a pair, such as betas."""
    half = with_rule(
        hyper=lambda group: [group["lr"] * 0.5, *(group[key] for key in OPS["rep_sgd_step"].step.hyper[1:])]
    )
    ours, theirs = torch.ones(7, requires_grad=True), torch.ones(7, requires_grad=True)
    optimizers = half([ours], lr=0.5, momentum=0.5), torch.optim.SGD([theirs], lr=0.25, momentum=0.5)
    for _ in range(STEPS):
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = torch.arange(7.0)
            optimizer.step()
    assert torch.equal(ours, theirs)
