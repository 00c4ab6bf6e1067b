"""backends: what is forced is used or refused with the reason; what is absent is quiet."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import gradrep_kernels as gr
from gradrep_kernels.ops import backends
from gradrep_kernels.ops import registry as ops


def test_every_op_has_a_schema_a_reference_and_a_meaning():
    for name, op in ops.OPS.items():
        registered = getattr(torch.ops.gradrep_kernels, name).default
        arguments = [a.name for a in registered._schema.arguments]
        code = op.reference.__wrapped__.__code__ if hasattr(op.reference, "__wrapped__") else op.reference.__code__
        assert list(code.co_varnames[: code.co_argcount]) == arguments
        assert op.meaning


def test_reference_serves_everything_everywhere():
    with gr.use_backend("reference"):
        for name, op in ops.OPS.items():
            for device in ("cpu", "cuda", "mps", "xla"):
                assert backends.implementation(name, device) is op.reference


def test_auto_takes_what_there_is():
    for name in ops.OPS:
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
        "reference": tuple(ops.OPS),
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
    code = "import gradrep_kernels.ops.backends as b; print(b.forced(), b.implementation('rep_grad_norm', 'cpu').__module__)"
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
