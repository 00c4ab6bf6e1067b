"""What a step and clipping ask of the device: how many launches, and that nothing waits for it.

Without a GPU, calls into ATen are counted. Each of them is a launch on a GPU, or a view.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases_optim import Pair, csla_norm
from implementations import on_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from gradrep_kernels import FusedRepSGD, use_backend
from gradrep_kernels.ops.reference import scale_gradients
from gradrep_kernels.optim import gather, norm, parameters
from gradrep_kernels.optim.gather import hyper_table

NO_WORK = {"detach", "view", "reshape", "unbind", "alias", "empty_like"}


class Calls(TorchDispatchMode):
    """Counts the calls of operations that are work for a device."""

    def __init__(self):
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name not in NO_WORK:
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


# ---- learning rates on the device


def groups_of(count: int, device: str) -> list[dict]:
    options = {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "maximize": False}
    return [
        {"lr": torch.tensor(0.1 * n, device=device), "weight_decay": 1e-4 * (n % 2), **options} for n in range(count)
    ]


def test_rates_on_the_device_take_as_many_launches_in_any_number():
    counts = []
    for number in (1, 28):
        groups = groups_of(number, "meta")
        hyper_table(groups, FusedRepSGD.update_rule)  # makes the constants
        with Calls() as calls:
            table = hyper_table(groups, FusedRepSGD.update_rule)
        assert table.shape == (number, 6)
        assert table.device.type == "meta"
        counts.append(calls.counted)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) <= 3
    assert not counts[0]["_local_scalar_dense"]


def test_a_table_with_numbers_of_the_device_has_the_values_of_one_without(monkeypatch):
    groups = groups_of(5, "cpu")
    groups[3]["weight_decay"] = torch.tensor([0.25], dtype=torch.float64)
    expected = hyper_table(groups, FusedRepSGD.update_rule)
    tensors = lambda numbers: [n for n, v in enumerate(numbers) if isinstance(v, torch.Tensor)]  # noqa: E731
    monkeypatch.setattr(gather, "places_on_device", tensors)
    for _ in range(2):
        assert torch.equal(hyper_table(groups, FusedRepSGD.update_rule), expected)


# ---- clipping


def gradients(dtype: torch.dtype, count: int = 9) -> list[torch.Tensor]:
    torch.manual_seed(count)
    grads = [torch.randn(n % 5 + 1, 3, dtype=dtype) * 3e4 for n in range(count)]
    return [*grads, torch.randn(4, 6, dtype=dtype).t(), torch.randn(0, dtype=dtype)]


@pytest.mark.parametrize("factor", [1e-9, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_gradients_are_scaled_as_one_by_one(dtype, factor):
    together, alone = gradients(dtype), gradients(dtype)
    together.append(torch.sparse_coo_tensor([[1, 3]], torch.full((2, 2), 3e4), (4, 2), dtype=dtype))
    alone.append(together[-1].clone())
    number = torch.tensor(factor, dtype=torch.float64)
    norm.scale_in_place(together, number)
    for g in alone:
        parameters.in_place(g, lambda values: values.mul_(number.to(values.dtype.to_real())))
    for a, b in zip(together, alone):
        assert torch.equal(a.to_dense(), b.to_dense())


@pytest.mark.parametrize(("dtype", "launches"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_clipping_scales_all_gradients_in_a_few_launches(dtype, launches):
    """Without kernels, too."""
    for count in (5, 60):
        grads = gradients(dtype, count)
        factor = torch.tensor(0.5)
        with use_backend("reference"), Calls() as calls:
            norm.scale_in_place(grads, factor)
        calls.counted.pop("_local_scalar_dense", None)  # a factor on the CPU is read, since 1 writes nothing
        assert sum(calls.counted.values()) == launches


def test_temporary_copies_are_of_a_part_of_the_gradients():
    tensors = [torch.empty(n) for n in (3, 4, 3, 20, 0, 1, 9, 1)]
    runs = list(scale_gradients._runs(tensors, 10))
    assert [[t.numel() for t in run] for run in runs] == [[3, 4, 3], [20], [0, 1, 9], [1]]


def one_is_missing(params):
    params[1].grad = None


def one_is_strided(params):
    weight = params[0]
    weight.grad = torch.stack((weight.grad, weight.grad), dim=-1)[..., 0]


def one_is_sparse(params):
    params[-1].grad = params[-1].grad.to_sparse()


def one_is_of_another_class(params):
    params[1].grad = params[1].grad.as_subclass(Subclass)


class Subclass(torch.Tensor):
    pass


CHANGES = [lambda params: None, one_is_missing, one_is_strided, one_is_sparse, one_is_of_another_class]


@pytest.mark.parametrize("change", CHANGES)
def test_clipping_by_a_plan_is_clipping_without_one(case, change):
    pair = Pair(case, torch.float32).train(4)
    params = list(pair.ours.parameters())
    found = []
    for planned in (True, False):
        pair.set_grads(7)
        change(params)
        if not planned:
            pair.opt._forget_plan()
        norm = pair.opt.clip_grad_norm_(0.5)
        found.append([norm, *(p.grad.to_dense() for p in params if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_clipping_by_a_plan_knows_the_multipliers_of_now(case):
    pair = Pair(case, torch.float64).train(4)
    weight, twin = next(zip(pair.ours.parameters(), pair.twin.parameters()))
    pair.set_grads(3)
    pair.opt.clip_grad_norm_(1e9)
    pair.opt.set_grad_mult(weight, torch.tensor(4.0, dtype=torch.float64))
    pair.masks[twin] = torch.full_like(twin, 4.0)
    expected = csla_norm(pair.twin.parameters(), pair.masks)
    assert float(pair.opt.clip_grad_norm_(1e9)) == pytest.approx(expected, rel=1e-14)


# ---- waiting


@pytest.fixture
def no_waiting():
    """Waiting for the device raises. It stays allowed while arrays are made."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("rate", ["number", "tensor"])
def test_nothing_waits_for_the_device_once_arrays_exist(case, no_waiting, rate, clips):
    if not case.is_served_by_kernels("cuda"):
        pytest.skip("the reference reads hyper-parameters on the host")
    pair = Pair(case, torch.float32)
    pair.ours.cuda()
    if rate == "tensor":
        pair.opt.param_groups[0]["lr"] = torch.tensor(0.05, device="cuda")
    for step in range(6):
        pair.set_grads(step)
        for p in pair.ours.parameters():
            p.grad = p.grad.cuda()
        if step == 3:
            no_waiting()
            for p in pair.ours.parameters():
                p.grad = p.grad.clone()
        if step >= 3 and clips:
            pair.opt.clip_grad_norm_(1.0)
        pair.opt.step()
        torch.cuda.set_sync_debug_mode("default")
