"""Several processes train what one process trains.

DDP, ZeroRedundancyOptimizer, FSDP2, tensor parallelism and distributed checkpoint, on two to four gloo processes on the
CPU. The processes of a world run all its checks in one go, and are forked from a server that has imported torch: nine
imports would take 60 s. Every check is a test of its own. All in float64: weights must equal those of one process to
the last few bits.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import multiprocessing
import os
import traceback

import pytest
import rep_signum
import torch
from cases_optim import CASES, SGD, OptimizerCase, assert_close, batch, dense, mults, net
from torch import nn

from gradrep_kernels import FusedRepSGD, GradMult
from gradrep_kernels.ops.reference.rounding_rule import element_numbers
from gradrep_kernels.optim.sharding import element_numbers_of

dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

OPTIONS = {"lr": 0.05, **SGD.hyper}
STEPS, MORE = 3, 3  # before and after a checkpoint
IMAGES = 12  # shared out evenly among two, three and four ranks
MAX_NORM = 0.3  # clips
TAIL = {"max_grad_norm": MAX_NORM, "ema_decay": 0.8}


def data(step: int) -> torch.Tensor:
    return batch(torch.float64, seed=100 + step, images=IMAGES)


def mine(step: int) -> torch.Tensor:
    return data(step).chunk(dist.get_world_size())[dist.get_rank()]


def train(model, optimizer, steps, images=mine, clip=None) -> list[torch.Tensor]:
    """The mean over the ranks of a mean over their images is the mean over all images.

    Returns the norms that were clipped.
    """
    norms = []
    for step in steps:
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        if clip is not None:
            norms.append(clip(MAX_NORM))
        optimizer.step()
    return norms


def one_process(steps=range(STEPS), clip=False, scaling=None, case: OptimizerCase = SGD, **options):
    """What all others must end with: (model, optimizer, norms)."""
    model = net(torch.float64)
    optimizer = case.make(model.parameters(), lr=0.05, **case.hyper, **options, grad_mults=mults(model))
    if scaling is not None:
        optimizer.set_spatial_scaling(model[2].weight, scaling)
    norms = train(model, optimizer, steps, data, optimizer.clip_grad_norm_ if clip else None)
    return model, optimizer, norms


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def assert_same(model, expected) -> None:
    named = dict(expected.named_parameters())
    for name, p in model.named_parameters():
        assert_close(whole(p.detach()), named[name.removeprefix("module.")])


# ---- data parallel


def ddp(bucket_view: bool, case: OptimizerCase = SGD) -> None:
    model = net(torch.float64)
    optimizer = case.make(model.parameters(), lr=0.05, **case.hyper, grad_mults=mults(model))
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    norms = train(wrapped, optimizer, range(STEPS), clip=optimizer.clip_grad_norm_)
    expected, _, expected_norms = one_process(clip=True, case=case)
    assert_same(model, expected)
    for a, b in zip(norms, expected_norms):
        assert_close(a, b)


def check_ddp():
    for case in CASES:
        ddp(bucket_view=False, case=case)


def check_ddp_with_gradients_as_bucket_views():
    ddp(bucket_view=True)


def set_mults_under_zero(zero, multipliers) -> None:
    """Each rank's inner optimizer holds some of the parameters."""
    for group in zero.optim.param_groups:
        for p in group["params"]:
            zero.optim.set_grad_mult(p, multipliers.get(p))


def zero_redundancy(bucket_view: bool):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make():
        model = net(torch.float64)
        zero = ZeroRedundancyOptimizer(
            model.parameters(), FusedRepSGD, parameters_as_bucket_view=bucket_view, **OPTIONS
        )
        set_mults_under_zero(zero, mults(model))
        return model, nn.parallel.DistributedDataParallel(model), zero

    model, wrapped, zero = make()
    held = sum(len(group["params"]) for group in zero.optim.param_groups)
    assert 0 < held < len(list(model.parameters()))
    train(wrapped, zero, range(STEPS))
    assert len(zero.optim.state) == held
    assert_same(model, one_process()[0])
    zero.consolidate_state_dict(to=0)
    box = [zero.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)  # in place of a file
    state, weights = box[0], copy.deepcopy(model.state_dict())
    assert "grad_mults" not in state["param_groups"][0]
    model, wrapped, zero = make()
    model.load_state_dict(weights)
    zero.load_state_dict(copy.deepcopy(state))
    train(wrapped, zero, range(STEPS, STEPS + MORE))
    expected = one_process(range(STEPS + MORE))[0]
    assert_same(model, expected)
    # on without ZeRO: its checkpoint has no multipliers, so the live ones stay
    model = net(torch.float64)
    model.load_state_dict(weights)
    optimizer = FusedRepSGD(model.parameters(), **OPTIONS, grad_mults=mults(model))
    with pytest.warns(UserWarning, match="which stay"):
        optimizer.load_state_dict(state)
    train(model, optimizer, range(STEPS, STEPS + MORE), data)
    assert_same(model, expected)


def check_zero_redundancy_optimizer():
    zero_redundancy(bucket_view=False)


def check_zero_redundancy_optimizer_with_bucket_views():
    zero_redundancy(bucket_view=True)


def check_zero_redundancy_optimizer_refuses_grad_mults_on_every_rank():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    with pytest.raises(ValueError, match=r"call set_grad_mult, under ZeroRedundancyOptimizer that of its \.optim"):
        ZeroRedundancyOptimizer(model.parameters(), FusedRepSGD, lr=0.1, grad_mults=mults(model))
    for option in ({"max_grad_norm": 1.0}, {"ema_decay": 0.9}, {"momentum_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is not an option of a parameter group"):
            ZeroRedundancyOptimizer(model.parameters(), FusedRepSGD, lr=0.1, **option)


# ---- fully sharded


def sharded(dim: int = 0, multiplied: bool = True, case: OptimizerCase = SGD, **options):
    """(model, optimizer) under FSDP2, a unit per convolution; 5, 6 and 8 rows share unevenly."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def placement(p):
        even = p.dim() > dim and p.shape[dim] % dist.get_world_size() == 0  # FSDP2 wants other dimensions than 0 even
        return Shard(dim if even else 0)

    model = net(torch.float64)
    for module in model:
        if isinstance(module, nn.Conv2d):
            fully_shard(module, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)
    grad_mults = mults(model) if multiplied else None
    return model, case.make(model.parameters(), lr=0.05, **case.hyper, **options, grad_mults=grad_mults)


def fsdp(dim: int, case: OptimizerCase) -> None:
    from torch.distributed.tensor import DTensor, Shard

    model, optimizer = sharded(dim, case=case)
    if dim:
        assert Shard(dim) in {p.placements[0] for p in model.parameters()}
    scaling = torch.rand(3, 3, generator=torch.Generator().manual_seed(5)) + 0.5
    optimizer.set_spatial_scaling(model[2].weight, scaling)
    versions = [p._version for p in model.parameters()]
    norms = train(model, optimizer, range(STEPS), clip=optimizer.clip_grad_norm_)
    expected, plain, expected_norms = one_process(clip=True, scaling=scaling, case=case)
    assert_same(model, expected)
    for a, b in zip(norms, expected_norms):
        assert not isinstance(a, DTensor)
        assert_close(a, b)
    for p, q, version in zip(model.parameters(), expected.parameters(), versions):
        for key in case.states:
            array = optimizer.state[p][key]
            assert isinstance(array, DTensor)
            assert array.placements == p.placements
            assert_close(array.full_tensor(), plain.state[q][key])
        assert p._version > version
    for p, q in zip(model.parameters(), expected.parameters()):
        ours, theirs = optimizer.grad_mult(p), plain.grad_mult(q)
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.same(theirs, p.shape)  # what the caller gave, whole
    assert [g["grad_mults_fingerprint"] for g in optimizer.param_groups] == [
        g["grad_mults_fingerprint"] for g in plain.param_groups
    ]


def tail_of(case: OptimizerCase) -> dict:
    return {**TAIL, "momentum_dtype": torch.bfloat16} if case is SGD else TAIL


def assert_same_tail(model, optimizer, expected, plain, case: OptimizerCase = SGD) -> None:
    """Weights, averages and the norm agree, and momentum in bfloat16 has the same bits however it is sharded."""
    assert_same(model, expected)
    assert_close(optimizer.last_grad_norm, plain.last_grad_norm)
    for p, q in zip(model.parameters(), expected.parameters()):
        assert_close(whole(optimizer.ema(p)), plain.ema(q))
        for key in case.states:
            ours, theirs = whole(optimizer.state[p][key]), plain.state[q][key]
            assert torch.equal(ours, theirs) if case is SGD else assert_close(ours, theirs) is None
    assert (
        optimizer.state_dict()["param_groups"][0]["step_count"] == plain.state_dict()["param_groups"][0]["step_count"]
    )


def check_the_end_of_a_step():
    """Under FSDP2 along both dimensions and under DDP: one norm over all ranks, averages of shards, the same bits."""
    for case in CASES:
        expected, plain, _ = one_process(case=case, **tail_of(case))
        for dim in (0, 1):
            model, optimizer = sharded(dim, case=case, **tail_of(case))
            train(model, optimizer, range(STEPS))
            assert_same_tail(model, optimizer, expected, plain, case)
        averages = optimizer.ema_state_dict(model)
        versions = [p._version for p in model.parameters()]
        with optimizer.swap_ema():
            for (name, p), q in zip(model.named_parameters(), expected.parameters()):
                assert_close(whole(p.detach()), plain.ema(q))
                assert_close(whole(averages[name]), plain.ema(q))
            inside = [p._version for p in model.parameters()]
        outside = [p._version for p in model.parameters()]
        assert all(a < b < c for a, b, c in zip(versions, inside, outside)), "autograd misses that weights changed"
        assert_same(model, expected)
        alone = net(torch.float64)
        own = case.make(alone.parameters(), lr=0.05, **case.hyper, **tail_of(case), grad_mults=mults(alone))
        train(nn.parallel.DistributedDataParallel(alone), own, range(STEPS))
        assert_same_tail(alone, own, expected, plain, case)
        for p in (*model.parameters(), *expected.parameters()):
            p.grad = None
        optimizer.step()
        plain.step()
        for p, q in zip(model.parameters(), expected.parameters()):
            assert_close(whole(optimizer.ema(p)), plain.ema(q))


def check_fsdp2_uneven_shards():
    for case in CASES:
        fsdp(0, case)


def check_fsdp2_sharded_along_dimension_1():
    for case in CASES:
        fsdp(1, case)


def check_fsdp2_grad_scaler():
    """Overflow on one rank only: no rank may step. Then unscaled steps as if nothing had been."""
    for case, fused in [(case, fused) for case in CASES for fused in (None, True)]:
        model, optimizer = sharded(case=case, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        start = [whole(p.detach()).clone() for p in model.parameters()]
        for step in (-1, *range(STEPS)):
            optimizer.zero_grad()
            scaler.scale(model(mine(step)).square().mean()).backward()
            if step < 0 and dist.get_rank() == 1:
                next(p for p in model.parameters() if p.grad.to_local().numel()).grad.to_local().view(-1)[0] = float(
                    "inf"
                )
            scaler.step(optimizer)
            scaler.update()
            if step < 0:
                assert not optimizer.state
                assert all(torch.equal(whole(p.detach()), w) for p, w in zip(model.parameters(), start))
        assert_same(model, one_process(case=case)[0])


def check_fsdp2_compiled_step():
    """Multipliers of shards are not traced: the compiled step falls back to the kernels."""
    model, optimizer = sharded()
    optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
    train(model, optimizer, range(STEPS))
    assert_same(model, one_process()[0])


def check_a_dtensor_is_no_multiplier():
    model, optimizer = sharded(multiplied=False)
    with pytest.raises(
        TypeError, match=r"must be given for the whole weight, as a plain tensor \(full_tensor\(\)\); got a DTensor"
    ):
        optimizer.set_grad_mult(model[0].weight, model[0].weight.detach().abs())


# ---- tensor parallel, and parameters placed by hand


def check_tensor_parallel_colwise_and_rowwise():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5)).double()

    def masks(model):
        g = torch.Generator().manual_seed(1)
        return {p: torch.rand(p.shape, generator=g) for p in model.parameters()}

    def images(step):
        return data(step).flatten(1)[:, :7]

    expected = make()
    plain = FusedRepSGD(expected.parameters(), **OPTIONS, grad_mults=masks(expected))
    expected_norms = train(expected, plain, range(STEPS), images, plain.clip_grad_norm_)
    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = FusedRepSGD(model.parameters(), **OPTIONS, grad_mults=masks(model))
    norms = train(model, optimizer, range(STEPS), images, optimizer.clip_grad_norm_)
    assert_same(model, expected)
    for a, b in zip(norms, expected_norms):
        assert_close(a, b)


SHAPES = [(6, 6, 3, 3), (7, 5, 3, 3), (4, 11, 3, 5), (9, 1, 3, 3), (2, 3, 1, 1), (12, 4, 5, 3), (1, 6, 3, 3)]


def placed(shape, mesh, placements):
    """A convolution's weight and one twin, each with the gradients of one step; one step each must give the same."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    g = torch.Generator().manual_seed(sum(shape))
    weight, grad = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    p = distribute_tensor(weight, mesh, placements)
    numbers = element_numbers(p.to_local(), element_numbers_of(p))
    every = DTensor.from_local(numbers, mesh, placements, shape=p.shape, stride=p.stride()).full_tensor()
    assert torch.equal(every.reshape(-1), torch.arange(weight.numel()))
    scales = [
        torch.rand(size, generator=g) + 0.5
        for size in ((shape[0], 1, *shape[2:]), shape[2:], shape, (shape[1], 1, 1), ())
    ]
    identity = torch.rand(shape[0], generator=g)
    for scale in scales:
        for mult in (GradMult(scale), GradMult(scale, identity)):
            p, q = nn.Parameter(distribute_tensor(weight, mesh, placements)), nn.Parameter(weight.clone())
            p.grad, q.grad = distribute_tensor(grad, mesh, placements), grad.clone()
            opt, plain = (
                FusedRepSGD([p], **OPTIONS, grad_mults={p: mult}),
                torch.optim.SGD([q], **OPTIONS, foreach=False),
            )
            norm = opt.clip_grad_norm_(1e9)
            assert_close(norm, (grad.square() * dense(mult, shape)).sum().sqrt())
            q.grad *= dense(mult, shape)
            opt.step()
            plain.step()
            assert_close(p.detach().full_tensor(), q.detach())


def check_every_placement_of_a_weight():
    """Multipliers of every form along every dimension, also on more ranks than rows.

    With and without an identity, whose diagonal is shifted or cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape in SHAPES:
        for placement in (Replicate(), Shard(0), Shard(1), Shard(2), Shard(3)):
            placed(shape, mesh, [placement])


def check_every_placement_on_two_dimensions_of_ranks():
    """Four ranks as 2 x 2; the last one is what FSDP2 over tensor parallelism makes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    mesh = init_device_mesh("cpu", (2, 2))
    for shape in SHAPES:
        for placements in (
            [Shard(0), Shard(1)],
            [Shard(0), Shard(0)],
            [Replicate(), Shard(1)],
            [Shard(1), Shard(1)],
            [Shard(1), Replicate()],
        ):
            placed(shape, mesh, placements)


def check_fsdp2_over_tensor_parallelism():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5)).double()

    def masks(model):
        g = torch.Generator().manual_seed(1)
        return {p: torch.rand(p.shape, generator=g) for p in model.parameters()}

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def images(step):
        return data(step).flatten(1)[:, :7].chunk(2)[mesh.get_local_rank("dp")]

    expected, model = make(), make()
    plain = FusedRepSGD(expected.parameters(), **OPTIONS, grad_mults=masks(expected))
    expected_norms = train(
        expected, plain, range(STEPS), lambda step: data(step).flatten(1)[:, :7], plain.clip_grad_norm_
    )
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = FusedRepSGD(model.parameters(), **OPTIONS, grad_mults=masks(model))
    norms = train(model, optimizer, range(STEPS), images, optimizer.clip_grad_norm_)
    assert_same(model, expected)
    for a, b in zip(norms, expected_norms):
        assert_close(a, b)


def check_a_gradient_that_is_still_a_sum_over_the_ranks():
    """Partial, as sequence parallelism leaves those of norms: summed for the step, .grad itself left as it is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for amp in (False, True):
        p = nn.Parameter(DTensor.from_local(torch.ones(4, dtype=torch.float64), mesh, [Replicate()]))
        part = torch.full((4,), float(dist.get_rank() + 1), dtype=torch.float64)
        p.grad = DTensor.from_local(part, mesh, [Partial()])
        opt = FusedRepSGD([p], lr=1.0, grad_mults={p: torch.tensor(0.5)})
        total = world * (world + 1) / 2
        assert float(opt.clip_grad_norm_(1e9)) == pytest.approx((4 * 0.5) ** 0.5 * total)
        if amp:
            opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        opt.step()
        assert p.to_local().tolist() == [1 - total * 0.5 / (2 if amp else 1)] * 4
        assert amp or p.grad.placements == (Partial(),)
        assert p.grad.full_tensor().tolist() == [total / (2 if amp else 1)] * 4


# ---- distributed checkpoint


def options_of(flat: bool):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=flat)


def dcp_save(folder, model, optimizer, flat: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer, options=options_of(flat))
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def dcp_load(folder, model, optimizer, flat: bool, partial: bool = False) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, state = get_state_dict(model, optimizer, options=options_of(flat))
    planner = dcp.DefaultLoadPlanner(allow_partial_load=partial)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder, planner=planner)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options_of(flat))


def check_checkpoint_saved(folder):
    """By two ranks, in both forms; and by one that has torch's SGD."""
    for flat in (False, True):
        model, optimizer = sharded()
        train(model, optimizer, range(STEPS))
        dcp_save(f"{folder}/ours{flat:d}", model, optimizer, flat)
        model, optimizer = sharded(**tail_of(SGD))
        train(model, optimizer, range(STEPS))
        dcp_save(f"{folder}/tail{flat:d}", model, optimizer, flat)
        model, _ = sharded()
        sgd = torch.optim.SGD(model.parameters(), **OPTIONS)
        train(model, sgd, range(STEPS))
        dcp_save(f"{folder}/sgd{flat:d}", model, sgd, flat)


def go_on(folder, model, optimizer, flat, images) -> None:
    dcp_load(f"{folder}/ours{flat:d}", model, optimizer, flat)
    train(model, optimizer, range(STEPS, STEPS + MORE), images)
    assert_same(model, one_process(range(STEPS + MORE))[0])


def check_checkpoint_loaded_on_another_number_of_ranks(folder):
    for flat in (False, True):
        go_on(folder, *sharded(), flat, mine)


def go_on_with_the_tail(folder, model, optimizer, flat, images) -> None:
    dcp_load(f"{folder}/tail{flat:d}", model, optimizer, flat)
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    train(model, optimizer, range(STEPS, STEPS + MORE), images)
    expected, plain, _ = one_process(range(STEPS + MORE), **tail_of(SGD))
    assert_same_tail(model, optimizer, expected, plain)


def check_the_end_of_a_step_goes_on_on_another_number_of_ranks(folder):
    for flat in (False, True):
        go_on_with_the_tail(folder, *sharded(**tail_of(SGD)), flat, mine)
    go_on_with_the_tail(folder, *sharded(1, **tail_of(SGD)), False, mine)


def check_checkpoint_along_another_dimension(folder):
    go_on(folder, *sharded(1), False, mine)


def check_checkpoint_without_its_multipliers_is_refused(folder):
    """Distributed checkpoint drops the key 'grad_mults'; the fingerprint in the groups tells."""
    for flat in (False, True):
        model, optimizer = sharded(multiplied=False)
        with pytest.raises(ValueError, match="group 0 had some, which the checkpoint has lost, and none are set"):
            dcp_load(f"{folder}/ours{flat:d}", model, optimizer, flat)


def check_checkpoint_of_torch_sgd(folder):
    """It has no fingerprint, which dcp.load must be told; the live multipliers stay."""
    for flat in (False, True):
        model, optimizer = sharded()
        dcp_load(f"{folder}/sgd{flat:d}", model, optimizer, flat, partial=True)
        train(model, optimizer, range(STEPS, STEPS + MORE))
        expected = net(torch.float64)
        sgd = torch.optim.SGD(expected.parameters(), **OPTIONS)
        train(expected, sgd, range(STEPS), data)
        ours = FusedRepSGD(expected.parameters(), **OPTIONS, grad_mults=mults(expected))
        ours.load_state_dict(sgd.state_dict())
        train(expected, ours, range(STEPS, STEPS + MORE), data)
        assert_same(model, expected)


# ---- running them

EVERYWHERE = [
    check_ddp,
    check_ddp_with_gradients_as_bucket_views,
    check_zero_redundancy_optimizer,
    check_zero_redundancy_optimizer_with_bucket_views,
    check_zero_redundancy_optimizer_refuses_grad_mults_on_every_rank,
    check_the_end_of_a_step,
    check_fsdp2_uneven_shards,
    check_fsdp2_sharded_along_dimension_1,
    check_tensor_parallel_colwise_and_rowwise,
    check_every_placement_of_a_weight,
    check_a_gradient_that_is_still_a_sum_over_the_ranks,
]
LOADS = [
    check_checkpoint_loaded_on_another_number_of_ranks,
    check_the_end_of_a_step_goes_on_on_another_number_of_ranks,
    check_checkpoint_along_another_dimension,
    check_checkpoint_without_its_multipliers_is_refused,
    check_checkpoint_of_torch_sgd,
]
WORLDS = {
    2: [
        check_checkpoint_saved,
        *EVERYWHERE,
        check_fsdp2_grad_scaler,
        check_fsdp2_compiled_step,
        check_a_dtensor_is_no_multiplier,
    ],
    3: [*EVERYWHERE, *LOADS],
    4: [check_every_placement_on_two_dimensions_of_ranks, check_fsdp2_over_tensor_parallelism],
}
FOLDER = {check_checkpoint_saved, *LOADS}
PRELOADED = [  # by the server that ranks are forked from; none of them starts a thread
    "torch._dynamo.backends.debugging",
    "torch._functorch.aot_autograd",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
]


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    rep_signum.enter()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet{world}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )
    failures = {}
    for check in WORLDS[world]:
        try:
            check(f"{folder}/checkpoint") if check in FOLDER else check()
        except (Exception, pytest.fail.Exception):  # the latter is what raises() and warns() raise
            failures[check.__name__] = traceback.format_exc()
    torch.save(failures, f"{folder}/failures{world}_{rank}")
    with contextlib.suppress(Exception):  # after a failure the ranks may be out of step
        dist.barrier()
    # Gloo's threads end one process in ten with "terminate called without an active exception" when torn down at exit.
    os._exit(0)


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """world -> {check: tracebacks by rank}.

    Each world is started when first asked for, those that load a checkpoint after the one that saves it.
    """
    folder, outcomes = str(tmp_path_factory.mktemp("distributed")), {}
    multiprocessing.set_forkserver_preload(PRELOADED)

    def of(world):
        if world not in outcomes:
            if world == 3:
                of(2)
            # Every test says so; none tries again.
            outcomes[world] = f"the {world} processes did not end well"
            torch.multiprocessing.start_processes(work, (world, folder), nprocs=world, start_method="forkserver")
            outcomes[world] = [torch.load(f"{folder}/failures{world}_{rank}") for rank in range(world)]
        assert not isinstance(outcomes[world], str), outcomes[world]
        return outcomes[world]

    of.folder = f"{folder}/checkpoint"
    return of


@pytest.mark.parametrize(
    ("world", "check"),
    [(world, check) for world, checks in WORLDS.items() for check in checks],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_ranks(failures, world, check):
    tracebacks = [
        f"rank {rank}:\n{failed[check.__name__]}"
        for rank, failed in enumerate(failures(world))
        if check.__name__ in failed
    ]
    assert not tracebacks, "\n".join(tracebacks)


def test_checkpoint_of_two_ranks_in_one_process(failures):
    """No process group here, plain parameters."""
    assert not any("check_checkpoint_saved" in failed for failed in failures(2))
    for flat in (False, True):
        model = net(torch.float64)
        go_on(failures.folder, model, FusedRepSGD(model.parameters(), **OPTIONS, grad_mults=mults(model)), flat, data)
        model = net(torch.float64)
        optimizer = FusedRepSGD(model.parameters(), **OPTIONS, **tail_of(SGD), grad_mults=mults(model))
        go_on_with_the_tail(failures.folder, model, optimizer, flat, data)
