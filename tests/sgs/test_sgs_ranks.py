"""Updates over several ranks: the scalings of one process, to the bit."""

import logging
import math
import warnings
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import start_processes
from sgs_controllers import controller, make_batches, sgd, train
from torch import nn

import gradrep_kernels as gr
from gradrep_kernels.sgs.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def process_group(rank, ranks, meeting):
    where = {"init_method": f"file://{meeting}", "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks, **where)
    yield
    dist.destroy_process_group()


def on_rank(rank, folder):
    """Four processes import torch once for both tests: first all of them are ranks, then the first two."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with process_group(rank, 4, folder / "four"):
        torch.save(on_one_of_four(rank), folder / f"four {rank}")
    if rank < 2:
        with process_group(rank, 2, folder / "two"):
            torch.save(on_one_of_two(rank), folder / f"two {rank}")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(on_rank, (folder,), 4)
    return {
        name: [torch.load(folder / f"{name} {rank}", weights_only=False) for rank in range(ranks)]
        for name, ranks in (("two", 2), ("four", 4))
    }


DEALT = {0: [0, 2], 1: [1]}  # which batches each rank gets


class Uneven(nn.Module):
    """Its second convolution is only called for some batches: on one rank, never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.always, self.rarely = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 5, padding=2)
        self.norm = nn.BatchNorm2d(3)  # its buffers: DistributedDataParallel's forward broadcasts them

    def forward(self, x):
        y = self.norm(self.always(x)).relu()
        return self.rarely(y) if x[0, 0, 0, 0] > 0 else y


def rank_batches():
    batches = make_batches(3)
    for i, batch in enumerate(batches):
        batch[0, 0, 0, 0] = 1.0 if i != 1 else -1.0
    return batches


def on_one_of_two(rank):
    found = {}
    batches = [rank_batches()[i] for i in DEALT[rank]]
    for key, options in OPTIONS.items():
        model = Uneven()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        sgs = gr.SpatialGradientScaling(wrapped, sgd(model), batches=2, **options)
        sgs.update(batches)
        found[key] = {name: g.tolist() for name, g in sgs.scalings.items()}
    alone = controller(Uneven(), batches=2, process_group=[dist.new_group([0]), dist.new_group([1])][rank])
    alone.update(batches)
    found["own group"] = {name: g.tolist() for name, g in alone.scalings.items()}

    poisoned = [batches[0] * (math.nan if rank else 1.0)]
    sgs = controller(Uneven(), batches=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sgs.update(poisoned)
    found["not finite on rank 1"] = [str(w.message) for w in caught], sgs.scalings["always"].eq(1).all().item()

    sgs = controller(nn.parallel.DistributedDataParallel(Uneven(), find_unused_parameters=True), batches=2)
    errors = {}
    for what, batches_here in {"fails on rank 1": batches if rank == 0 else ["nonsense"], "all empty": []}.items():
        try:
            sgs.update(batches_here)
        except Exception as error:
            errors[what] = type(error).__name__ + ": " + str(error)
    sgs.update([] if rank else rank_batches())  # one empty rank is no error
    found["errors"], found["empty on rank 1"] = errors, {name: g.tolist() for name, g in sgs.scalings.items()}

    optimizer = sgd(model := Uneven())
    sgs = gr.SpatialGradientScaling(model, optimizer, every_steps=1)
    train(model, optimizer, [batches[0], batches[0] * 2])
    found["steps"] = {name: g.tolist() for name, g in sgs.scalings.items()}

    ranks = Ranks(None)
    big = torch.tensor([2**31 - 1, 5])
    found["sums"] = [ranks.reduce([big, big[:1]], "sum", torch.device("cpu"), 2**32)[0].tolist(), ranks.bytes]
    found["sums"] += [
        ranks.reduce([big // 2, big[:1] // 2], "sum", torch.device("cpu"), 2**31 - 1)[0].tolist(),
        ranks.bytes,
    ]
    return found


OPTIONS = {"plain": {}, "remove near": {"remove_near": True}, "autocorrelation": {"dependence": "autocorrelation"}}


def test_two_ranks(results):
    first, second = results["two"]

    def one_process(batches, number, **options):
        sgs = controller(Uneven(), batches=number, **options)
        sgs.update(batches)
        return {name: g.tolist() for name, g in sgs.scalings.items()}

    assert {name: np.array(g).shape for name, g in first["plain"].items()} == {"always": (3, 3), "rarely": (5, 5)}
    for key, options in OPTIONS.items():
        expected = one_process(rank_batches(), 3, **options)
        if key == "autocorrelation":  # sums of floats, in another order
            assert all(np.allclose(first[key][name], expected[name], atol=1e-6) for name in expected)
        else:
            assert first[key] == expected  # to the bit
        assert second[key] == first[key]
    assert first["own group"] == one_process([rank_batches()[i] for i in DEALT[0]], 2)
    assert second["own group"]["rarely"] == np.ones((5, 5)).tolist()
    for found in (first, second):
        messages, kept = found["not finite on rank 1"]
        assert kept
        assert any("always" in message for message in messages)
        assert found["sums"] == [[2**32 - 2, 10], 24, [2**31 - 2, 4], 24 + 12]  # int64, then int32
    assert "failed on 1 other rank" in first["errors"]["fails on rank 1"]
    assert second["errors"]["fails on rank 1"].startswith("TypeError: a batch must be a Tensor")
    assert all("ValueError: batches is empty" in found["errors"]["all empty"] for found in (first, second))
    assert first["empty on rank 1"] == second["empty on rank 1"] == one_process(rank_batches(), 2)
    assert first["steps"] == second["steps"]
    assert first["steps"]["always"] != np.ones((3, 3)).tolist()


MANY_DEALT = {
    1: [[0, 1, 2, 3, 4]],
    2: [[4], [0, 1, 2, 3]],
    4: [[0, 3], [1], [], [2, 4]],
}  # ranks: which batches each gets


def unlike_batches():
    """Of other numbers of images and other sizes; the second convolution is not called for the second."""
    shapes = [(5, 2, 14, 13), (2, 2, 9, 17), (7, 2, 6, 6), (3, 2, 12, 12), (1, 2, 20, 8)]
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    for i, batch in enumerate(batches):
        batch[0, 0, 0, 0] = -1.0 if i == 1 else 1.0
    return batches


def scalings_and_bytes(batches, **options):
    """{name: G} and what the update says in its log of the bytes to other ranks."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("gradrep_kernels.sgs.controller")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # fewer batches than asked for
            sgs = controller(Uneven(), batches=5, **options)
            sgs.update(batches)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return {name: g.tolist() for name, g in sgs.scalings.items()}, int(records[-1].getMessage().split()[-5])


def on_one_of_four(rank):
    groups = {4: None, 2: dist.new_group([0, 1])}
    batches, found = unlike_batches(), {}
    for ranks, group in groups.items():
        for remove_near in (False, True):
            if rank < ranks:
                mine = [batches[i] for i in MANY_DEALT[ranks][rank]]
                found[ranks, remove_near] = scalings_and_bytes(mine, remove_near=remove_near, process_group=group)
    return found


def test_the_same_batches_on_one_two_and_four_ranks(results):
    batches = unlike_batches()
    maps = {"always": [(batch, 3, 1) for batch in batches]}
    called = [batch for i, batch in enumerate(batches) if i != 1]
    maps["rarely"] = [(torch.empty(len(batch), 3, *batch.shape[2:]), 5, 2) for batch in called]
    for remove_near in (False, True):
        expected, nothing_sent = scalings_and_bytes(batches, remove_near=remove_near)
        assert nothing_sent == 0
        assert all(torch.tensor(g).ne(1).any() for g in expected.values())
        for ranks in (2, 4):
            for rank in range(ranks):
                found, sent = results["four"][rank][ranks, remove_near]
                assert found == expected, (ranks, rank)  # to the bit
                if not remove_near:  # where n does not depend on the values
                    assert sent == bytes_of_an_update(maps)


def bytes_of_an_update(maps):
    """How much one rank sends.

    They are n of each layer and two numbers (int64), both ends of ranges (float64), tables and a flag (int32).
    """
    pairs, cells = 0, 0
    for calls in maps.values():
        channels, radius = calls[0][0].shape[1], calls[0][1] // 2
        displacements = [(i, j) for i in range(radius + 1) for j in range(-radius, radius + 1) if (i, j) > (0, 0)]
        n = [
            sum(len(x) * (x.shape[2] + 2 * pad - abs(i)) * (x.shape[3] + 2 * pad - abs(j)) for x, _, pad in calls)
            for i, j in displacements
        ]
        pairs += channels * len(displacements)
        cells += channels * len(displacements) * (1 + (max(n) - 1).bit_length()) ** 2
    return 8 * (pairs + 2) + 8 * 4 * pairs + 4 * (cells + 1)
