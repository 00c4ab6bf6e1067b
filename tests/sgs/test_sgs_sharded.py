"""Models that FSDP2 shards: hooks scale DTensors, and ranks with fewer batches take part in every forward."""

import copy
import warnings
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import start_processes
from sgs_controllers import FailingOnce, assert_same, controller, make_batches, train
from torch import nn

import gradrep_kernels as gr

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]


@contextmanager
def process_group(rank, ranks, **where):
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=30), **where)
    try:
        yield
    finally:
        dist.destroy_process_group()


def network():
    """Its convolutions have 5, 3 and 1 output channels, which two ranks share unevenly."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3), nn.Tanh(), nn.Conv2d(3, 1, 3), nn.Flatten()
    )


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for i in (0, 2):
        fully_shard(model[i], mesh=mesh)
    return fully_shard(model, mesh=mesh)


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.01),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "told": lambda p: gr.FusedRepSGD(p, lr=1e-3, momentum=0.9),
}
RUNS = [(make, apply_to) for make in MAKERS for apply_to in ("gradient", "update")]


def weights(model):
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in model.named_parameters()}


def run(make, wrap=lambda model: model, times=1, **options):
    """The weights after some steps, of which one has a closure, and the scalings.

    Args:
        times: how often each batch of an update counts, as if so many ranks had brought it
    """
    model = wrap(network())
    optimizer = MAKERS[make](model.parameters())
    sgs = gr.SpatialGradientScaling(model, optimizer, batches=2 * times, **options)
    if "every_steps" not in options:
        before = list(model.parameters())
        sgs.update(make_batches() * times)
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))  # not left gathered
    for closure in (False, True):
        train(model, optimizer, make_batches(seed=3), closure)
        grads = [p.grad for p in model.parameters()]
        assert all(type(grad) is type(p.data) for grad, p in zip(grads, model.parameters()))
    return weights(model), sgs.scalings


def after_a_step_that_raised(wrap=lambda model: model, times=1):
    """Gradients that were added to the scaled copies, which stay in `.grad`, are kept."""

    model = wrap(network())
    optimizer = FailingOnce(model.parameters(), lr=1e-3)
    sgs = gr.SpatialGradientScaling(model, optimizer, batches=2 * times)
    sgs.update(make_batches() * times)
    model(make_batches()[0]).square().sum().backward()
    with pytest.raises(RuntimeError, match="the step fails"):
        optimizer.step()
    model(make_batches()[1]).square().sum().backward()
    optimizer.step()
    return weights(model)


def partial_gradient():
    """A gradient that is the sum of what the ranks hold, for a parameter that each has whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    ranks = dist.get_world_size()
    mesh, found = init_device_mesh("cpu", (ranks,)), {}
    for apply_to in ("gradient", "update"):
        model = network()
        for conv in (model[0], model[2], model[4]):
            whole = DTensor.from_local(conv.weight.detach(), mesh, [Replicate()], run_check=False)
            conv.weight = nn.Parameter(whole)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        sgs = gr.SpatialGradientScaling(model, optimizer, apply_to=apply_to)
        twin = controller(network())
        twin.update(make_batches())
        sgs.load_state_dict(twin.state_dict())
        grad = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
        parts = [torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(ranks)]
        model[0].weight.grad = given = DTensor.from_local(grad, mesh, [Partial()], run_check=False)
        expected = model[0].weight.to_local().double() - 0.5 * sgs.scalings["0"] * sum(parts).double()
        optimizer.step()
        assert model[0].weight.grad is given
        found[apply_to] = (model[0].weight.full_tensor().detach() - expected).abs().max().item()
    return found


@pytest.fixture
def one_rank():
    with process_group(0, 1, store=dist.HashStore()):
        yield


@pytest.mark.parametrize(("make", "apply_to"), RUNS)
def test_one_rank_steps_as_without_shards(one_rank, make, apply_to):
    found, scalings = run(make, sharded, apply_to=apply_to)
    expected, expected_scalings = run(make, apply_to=apply_to)
    assert_same(scalings, expected_scalings)
    assert_same(found, expected)


def test_a_copy_of_a_sharded_optimizer_keeps_the_scalings(one_rank):
    model = sharded(network())
    optimizer = MAKERS["sgd"](model.parameters())
    sgs = gr.SpatialGradientScaling(model, optimizer)
    sgs.update(make_batches())
    alone = copy.deepcopy(optimizer)
    train(model, optimizer, make_batches(1))
    for copied, p in zip(alone.param_groups[0]["params"], optimizer.param_groups[0]["params"]):
        copied.grad = p.grad
    alone.step()
    for copied, p in zip(alone.param_groups[0]["params"], optimizer.param_groups[0]["params"]):
        assert torch.equal(copied.full_tensor(), p.full_tensor())


# -- two ranks ---------------------------------------------------------------------------------------------------------

DEALT = {  # which batches each rank gets
    "alike": ([0, 1], [2, 3]),
    "fewer on rank 1": ([0, 2, 3], [1]),
    "fewer on rank 0": ([1], [0, 2, 3]),
}


def unlike_batches():
    shapes = [(5, 2, 14, 13), (2, 2, 9, 17), (7, 2, 7, 7), (3, 2, 12, 12)]
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]


def outcome(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def on_one_of_two(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    with process_group(rank, 2, init_method=f"file://{folder / 'meeting'}"):
        for make, apply_to in RUNS:
            found[make, apply_to] = run(make, sharded, apply_to=apply_to)
        found["every_steps"] = run("adamw", sharded, every_steps=1)
        found["after a step that raised"] = after_a_step_that_raised(sharded)
        found["partial"] = partial_gradient()
        for remove_near in (False, True):
            for dealt, shares in DEALT.items():
                sgs = controller(sharded(network()), batches=4, remove_near=remove_near)
                sgs.update([unlike_batches()[i] for i in shares[rank]])
                found[dealt, remove_near] = sgs.scalings
        model, calls = sharded(network()), []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        sgs = controller(model, batches=4)
        good = unlike_batches()[:2]

        def failing():
            yield good[0]
            raise OSError("the disk is gone")

        cases = {
            "none on rank 1": good if rank == 0 else [],
            "none on either": [],
            "fails on rank 1": good if rank == 0 else failing(),
            "wrong kind on rank 0": ["image.png"] if rank == 0 else good,
            "wrong kind at last on rank 0": [*good, 3] if rank == 0 else good,
        }
        found["errors"] = {what: outcome(lambda b=batches: sgs.update(b)) for what, batches in cases.items()}
        found["calls"] = len(calls)
        found["untouched"] = sgs.scalings
        found["then works"] = outcome(lambda: sgs.update(good))
        found["calls of an update"] = len(calls)
        plain = controller(network())
        found["of a model that is not sharded"] = outcome(lambda: plain.update([] if rank else good))
    torch.save(found, folder / f"rank {rank}")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    start_processes(on_one_of_two, (folder,), 2)
    return [torch.load(folder / f"rank {rank}", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("make", "apply_to"), RUNS)
def test_two_ranks_with_uneven_shards_step_as_one_process(two_ranks, make, apply_to):
    """Both ranks train on the same images, and the mean of two equal gradients is exact."""
    expected, expected_scalings = run(make, times=2, apply_to=apply_to)
    for found in two_ranks:
        found_weights, scalings = found[make, apply_to]
        assert_same(scalings, expected_scalings)
        assert_same(found_weights, expected)


def test_every_steps_on_two_ranks(two_ranks):
    expected, expected_scalings = run("adamw", every_steps=1)
    for found in two_ranks:
        assert found["every_steps"][1].keys() == expected_scalings.keys()
        assert not any(torch.equal(g, torch.ones(3, 3)) for g in found["every_steps"][1].values())
        assert found["every_steps"][0].keys() == expected.keys()
    assert_same(two_ranks[0]["every_steps"][0], two_ranks[1]["every_steps"][0])


def test_gradients_added_to_a_copy_are_kept_on_two_ranks(two_ranks):
    expected = after_a_step_that_raised(times=2)
    for found in two_ranks:
        assert_same(found["after a step that raised"], expected)


def test_a_partial_gradient(two_ranks):
    for found in two_ranks:
        assert found["partial"].keys() == {"gradient", "update"}
        assert max(found["partial"].values()) < 1e-5


@pytest.mark.parametrize("remove_near", [False, True])
def test_unlike_numbers_of_batches_pool_those_there_are(two_ranks, remove_near):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sgs = controller(network(), batches=4, remove_near=remove_near)
        sgs.update(unlike_batches())
    for found in two_ranks:
        for dealt in DEALT:
            assert_same(found[dealt, remove_near], sgs.scalings)


def test_failures_reach_every_rank_before_any_forward(two_ranks):
    first, second = (found["errors"] for found in two_ranks)
    assert first["none on rank 1"] == second["none on rank 1"]
    assert first["none on rank 1"].startswith("ValueError: batches is empty on a rank: an update needs at least one on")
    assert first["none on either"] == second["none on either"]
    assert first["none on either"].startswith("ValueError: batches is empty: an update needs")
    assert second["fails on rank 1"] == "OSError: the disk is gone"
    assert "failed on 1 other rank" in first["fails on rank 1"]
    for case in ("wrong kind on rank 0", "wrong kind at last on rank 0"):
        assert first[case].startswith("TypeError: a batch must be a Tensor")
        assert "failed on 1 other rank" in second[case]
    for found in two_ranks:
        assert found["calls"] == 0
        assert all(torch.equal(g, torch.ones(3, 3)) for g in found["untouched"].values())
        assert found["then works"] is None
        assert found["calls of an update"] == 4
        assert found["of a model that is not sharded"] is None
