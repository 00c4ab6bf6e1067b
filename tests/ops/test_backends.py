"""backends: what is forced is used or refused with the reason; what is absent is quiet."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gradrep_kernels as gr
from gradrep_kernels.ops import backends, registry
from gradrep_kernels.ops.schema import op, plan_ops

COMPUTING = {name: op for name, op in registry.OPS.items() if op.reference is not None}
SCHEMAS = {  # code of others calls the ops by these; the first five follow from the references' signatures
    "rep_sgd_step": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor?[] scales, "
    "Tensor?[] identities, bool[] first_steps, int[] groups, Tensor hyper, Tensor? grad_scale=None, "
    "Tensor? found_inf=None) -> ()",
    "rep_grad_norm": "(Tensor[] grads, Tensor?[] scales, Tensor?[] identities) -> Tensor",
    "pair_ranges": "(Tensor x, int[] displacements, int[2] padding, bool remove_near) -> (Tensor ranges, Tensor n)",
    "joint_histogram": "(Tensor x, int[] displacements, Tensor ranges, Tensor bins, int max_bins, int[2] padding, "
    "bool remove_near) -> Tensor",
    "joint_histogram_": "(Tensor(a!) counts, Tensor x, int[] displacements, Tensor ranges, Tensor bins, "
    "int[2] padding, bool remove_near) -> ()",
    "rep_sgd_plan": "(Tensor[] params, Tensor?[] momentum_buffers, Tensor?[] scales, Tensor?[] identities, "
    "int[] groups) -> int",
    "rep_sgd_plan_step": "(int plan, Tensor[] grads, float[] hyper, Tensor? grad_scale, Tensor? found_inf) -> bool",
    "rep_sgd_plan_free": "(int plan) -> ()",
}


def test_every_op_has_its_schema_and_a_meaning():
    schemas = {
        name: str(registry.registered(name)._schema).removeprefix(f"gradrep_kernels::{name}") for name in registry.OPS
    }
    assert SCHEMAS.items() <= schemas.items()
    assert all(op.meaning for op in registry.OPS.values())


def test_a_signature_without_a_schema_is_refused():
    def rep_something(params: list[torch.Tensor], options: dict) -> None: ...

    with pytest.raises(TypeError, match="options: an op cannot take"):
        op("what it means")(rep_something)


def test_the_ops_of_a_plan_follow_their_step():
    """They have no reference: only a backend with kernels makes plans."""
    names = list(registry.OPS)
    plans = []
    for step in (row for row in registry.OPS.values() if row.step is not None):
        plan = [row.name for row in plan_ops(step)]
        assert names[names.index(step.name) + 1 :][:3] == plan
        plans += plan
    assert plans == [name for name in names if name not in COMPUTING]


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_the_planner_is_that_of_the_backend_that_serves(name):
    with gr.use_backend(name):
        serves = next(row["serves"] for row in backends.report(("cpu",)) if row["op"] == "rep_sgd_step")
        assert (backends.planner("rep_sgd_step", "cpu") is not None) == (serves == "cpp")
        assert backends.planner("rep_sgd_step", "a device that nobody knows") is None


def test_reference_serves_everything_everywhere():
    with gr.use_backend("reference"):
        for name, op in COMPUTING.items():
            for device in ("cpu", "cuda", "mps", "xla"):
                assert backends.implementation(name, device) is op.reference


def test_auto_takes_what_there_is():
    for name in COMPUTING:
        assert callable(backends.implementation(name, "cpu"))
        assert callable(backends.implementation(name, "a device that nobody knows"))


@pytest.mark.parametrize("name", ["cuda", "triton", "cpp"])
def test_a_request_that_cannot_be_met_says_why(name):
    device = "cpu" if name != "cpp" else "cuda"
    if name == "triton" and backends.report(("cpu",))[0]["triton"] == "available":
        pytest.skip("Triton interprets kernels on the CPU here")
    with (
        gr.use_backend(name),
        pytest.raises(
            RuntimeError, match=f"backend '{name}' was asked for, but cannot serve rep_sgd_step on {device}: ."
        ),
    ):
        backends.implementation("rep_sgd_step", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_why():
    why = "torch is not a CUDA build here" if torch.version.cuda is None else "torch sees no GPU here"
    assert {row["cuda"] for row in backends.report(("cuda",))} == {why}
    with gr.use_backend("cuda"), pytest.raises(RuntimeError, match=f"cannot serve joint_histogram on cuda: {why}"):
        backends.implementation("joint_histogram", "cuda")


def test_a_gpu_takes_cuda_first_then_triton(monkeypatch):
    available = {
        "cuda": ("joint_histogram",),
        "triton": ("joint_histogram", "rep_sgd_step"),
        "reference": tuple(COMPUTING),
    }

    def load(backend, op, device):
        return (backend,) if op in available.get(backend, ()) else f"{backend} has no {op}"

    monkeypatch.setattr(backends, "_load", load)
    with gr.use_backend("auto"):
        assert [backends.implementation(op, "cuda") for op in ("joint_histogram", "rep_sgd_step", "rep_grad_norm")] == [
            ("cuda",),
            ("triton",),
            ("reference",),
        ]


def test_unknown_name():
    with (
        pytest.raises(ValueError, match="one of auto, reference, cpp, triton, cuda, got 'fast'"),
        gr.use_backend("fast"),
    ):
        pass


def test_the_block_ends():
    outside = backends.forced()
    with gr.use_backend("reference"):
        with gr.use_backend("auto"):
            assert backends.forced() == "auto"
        assert backends.forced() == "reference"
    assert backends.forced() == outside


def test_the_environment_forces():
    code = (
        "import gradrep_kernels.ops.backends as b; "
        "print(b.forced(), b.implementation('rep_grad_norm', 'cpu').__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "GRADREP_BACKEND": "reference"}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["reference", "gradrep_kernels.ops.reference.rep_grad_norm"]


def test_a_forced_backend_reaches_the_optimizer():
    """A cached plan of the C++ step must not outlive the request for another backend."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = gr.FusedRepSGD([p], lr=1.0, momentum=0.5)
    for _ in range(4):
        p.grad = torch.ones(3)
        optimizer.step()
    called = []
    table = {**backends.LOADERS, "reference": lambda op, device: lambda *a, **k: called.append(op)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "LOADERS", table)
        backends._load.cache_clear()
        with gr.use_backend("reference"):
            optimizer.step()
    backends._load.cache_clear()
    assert called == ["rep_sgd_step"]


def test_report_names_a_reason_for_each_absence():
    for row in backends.report():
        assert row["serves"] in backends.NAMES or row["serves"].startswith("none")
        for name in backends.NAMES[1:]:
            assert row[name] == "available" or len(row[name]) > 10
