"""backends: what is forced is used or refused with the reason; what is absent is quiet."""

from __future__ import annotations

import contextlib
import contextvars
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import gradrep_kernels as gr
from gradrep_kernels.ops import backends, registry
from gradrep_kernels.ops.schema import op, plan_ops

COMPUTING = {name: op for name, op in registry.OPS.items() if op.reference is not None}
SCHEMAS = {  # code of others calls the ops by these; the first six follow from the references' signatures
    "rep_sgd_step": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor?[] scales, "
    "Tensor?[] identities, bool[] first_steps, int[] groups, Tensor hyper, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, Tensor? clip=None, Tensor?(c!)[]? averages=None, int[]? numbers=None, "
    "Tensor?[]? elements=None, Tensor? tail=None) -> ()",
    "scale_gradients_": "(Tensor(a!)[] grads, Tensor factor) -> ()",
    "rep_grad_norm": "(Tensor[] grads, Tensor?[] scales, Tensor?[] identities) -> Tensor",
    "pair_ranges": "(Tensor x, int[] displacements, int[2] padding, bool remove_near) -> (Tensor ranges, Tensor n)",
    "pair_ranges_": "(Tensor(a!) ends, Tensor(b!)? n, Tensor x, int[] displacements, int[2] padding, "
    "bool remove_near) -> ()",
    "joint_histogram": "(Tensor x, int[] displacements, Tensor ranges, Tensor bins, int max_bins, int[2] padding, "
    "bool remove_near) -> Tensor",
    "joint_histogram_": "(Tensor(a!) counts, Tensor x, int[] displacements, Tensor ranges, Tensor bins, "
    "int[2] padding, bool remove_near) -> ()",
    "rep_sgd_plan": "(Tensor[] params, Tensor?[] momentum_buffers, Tensor?[] scales, Tensor?[] identities, "
    "int[] groups, Tensor?[]? averages=None, int[]? numbers=None, Tensor?[]? elements=None) -> int",
    "rep_sgd_plan_step": "(int plan, Tensor[] grads, float[] hyper, Tensor[] on_device, int[] places, "
    "Tensor? grad_scale, Tensor? found_inf, float[] tail=[], float max_norm=0., Tensor(a!)? norm=None, "
    "Tensor? clip=None) -> bool",
    "rep_sgd_plan_norm": "(int plan, Tensor[] grads, Tensor(a!) norm) -> bool",
    "rep_sgd_plan_free": "(Tensor param, int plan) -> ()",
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
        assert names[names.index(step.name) + 1 :][:4] == plan
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


@pytest.fixture
def alone():
    """Runs a function in a context of its own, where no test has set a backend; its result."""
    return contextvars.Context().run


def test_a_call_takes_effect_at_once(alone):
    def body():
        gr.use_backend("reference")
        assert backends.implementation("rep_grad_norm", "cpu") is COMPUTING["rep_grad_norm"].reference
        with gr.use_backend("auto"):
            gr.use_backend("cpp")
            assert backends.forced() == "cpp"
        assert backends.forced() == "reference"
        with pytest.raises(ValueError, match="got 'fast'"):
            gr.use_backend("fast")
        return backends.forced()

    assert alone(body) == "reference"


def test_a_call_is_of_its_thread_and_context_alone(alone):
    def body():
        gr.use_backend("reference")
        seen = []
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
        contextvars.copy_context().run(gr.use_backend, "cpp")  # as a task of asyncio does
        return [*seen, backends.forced()]

    assert alone(body) == [contextvars.Context().run(backends.forced), "reference"]


def test_a_block_ends_what_its_call_began(alone):
    def body():
        outside = backends.forced()
        made = gr.use_backend("reference")
        for _ in range(2):
            with made, gr.use_backend("cpp"), made:
                assert backends.forced() == "reference"
            assert backends.forced() == outside
        with contextlib.suppress(KeyError), gr.use_backend("reference"):
            gr.use_backend("cpp")
            raise KeyError
        assert backends.forced() == outside
        first = gr.use_backend("reference")
        gr.use_backend("cpp")
        with first:
            assert backends.forced() == "reference"
        return backends.forced()

    assert alone(body) == "cpp"  # the call that came last


def test_blocks_may_end_in_any_order(alone):
    def body():
        outside = backends.forced()
        a, b, c = (gr.use_backend(name) for name in ("reference", "cpp", "triton"))
        gr.use_backend(outside)
        for block in (a, b, c):
            block.__enter__()
        names = []
        for block in (b, a, c):
            block.__exit__(None, None, None)
            names.append(backends.forced())
        assert names == ["triton", "triton", outside]
        a.__enter__()
        contextvars.Context().run(a.__exit__, None, None, None)  # it is not open there
        assert backends.forced() == "reference"

    alone(body)


def test_as_a_decorator_it_forces_each_call(alone):
    def body():
        gr.use_backend("cpp")

        @gr.use_backend("reference")
        def named(fail=False):
            """Its words."""
            if fail:
                raise KeyError
            return backends.forced()

        assert backends.forced() == "cpp"
        assert (named(), named(), backends.forced()) == ("reference", "reference", "cpp")
        with gr.use_backend("triton"):
            assert (named(), backends.forced()) == ("reference", "triton")
        with pytest.raises(KeyError):
            named(fail=True)
        assert (named.__name__, named.__doc__) == ("named", "Its words.")
        return backends.forced()

    assert alone(body) == "cpp"


def test_the_name_pickles_by_reference():
    assert pickle.loads(pickle.dumps(gr.use_backend)) is gr.use_backend is backends.use_backend


def test_calls_in_a_loop_leave_nothing_behind(alone):
    def body():
        made = [gr.use_backend("reference") for _ in range(3)]
        assert all(part is not made[0] for part in vars(made[1])["_before"])
        assert backends._scope.get().blocks == ()

    alone(body)


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


# ---- the compiled module is missing

ABSENT = "ModuleNotFoundError: No module named 'gradrep_kernels._C'"
NOT_BUILT = {"GRADREP_BUILD": "auto", "_C": "torch was not importable in the build environment", "_C_cuda": "no nvcc"}


@pytest.fixture
def without_kernels(monkeypatch):
    """Makes the package one without the module _C: what its import says, and what the build recorded."""

    def make(failure: str = ABSENT, record: dict | None = None) -> None:
        module = backends._module
        monkeypatch.setattr(backends, "_module", lambda name: failure if name == "_C" else module(name))
        monkeypatch.setattr(backends, "_build_record", lambda: record or {})
        monkeypatch.setattr(backends, "_told", set())
        backends._load.cache_clear()
        backends._planner.cache_clear()

    yield make
    monkeypatch.undo()
    backends._load.cache_clear()
    backends._planner.cache_clear()


def heard(function, *args) -> list[warnings.WarningMessage]:
    """The warnings of a call under 'auto'."""
    with warnings.catch_warnings(record=True) as caught, gr.use_backend("auto"):
        warnings.simplefilter("always")
        function(*args)
    return caught


def a_step():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    gr.FusedRepSGD([p], lr=0.5).step()
    assert p.tolist() == [0.5] * 3


def a_histogram():
    gr.joint_histogram(torch.arange(18.0).reshape(1, 2, 3, 3), [(0, 1)], 2)


@pytest.mark.parametrize("use", [a_step, a_histogram])
def test_missing_kernels_are_told_once_at_the_callers_line(without_kernels, use):
    without_kernels(record=NOT_BUILT)
    (warning,) = heard(use)
    assert warning.category is UserWarning
    assert warning.filename == __file__
    for part in (
        "gradrep_kernels._C is not built (torch was not importable in the build environment)",
        "GRADREP_BUILD=require pip install --force-reinstall",
        "GRADREP_BACKEND=reference",
    ):
        assert part in str(warning.message)
    assert heard(a_step) == heard(a_histogram) == []


@pytest.mark.parametrize(
    ("failure", "record", "said"),
    [
        (ABSENT, {}, "gradrep_kernels._C is not built. To get it"),
        (ABSENT, {"_C": "built"}, "is not built (it was once, but this Python finds no file of it). "),
        (
            "ImportError: undefined symbol: aoti",
            {"_C": "built"},
            "but does not load (ImportError: undefined symbol: ao",
        ),
        ("ImportError: undefined symbol", {"GRADREP_BUILD": "none"}, "is there but does not load (ImportError: undefi"),
    ],
)
def test_the_reason_is_that_of_the_import_and_of_the_build(without_kernels, failure, record, said):
    without_kernels(failure, record)
    (warning,) = heard(a_step)
    assert said in str(warning.message)
    assert said.split("(")[0].split(". ")[0].removeprefix("gradrep_kernels._C ").strip() in backends.compiled()["_C"]


def forced_reference():
    with gr.use_backend("reference"):
        a_step()


def another_device():
    for device in ("meta", "cuda", "mps"):
        backends.implementation("rep_sgd_step", device)
        backends.planner("rep_sgd_step", device)


def asked_for_kernels():
    with gr.use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was asked for"):
        a_step()


@pytest.mark.parametrize(
    "use", [forced_reference, another_device, asked_for_kernels, backends.report, backends.compiled]
)
def test_nothing_is_told_where_plain_torch_is_no_surprise(without_kernels, use):
    without_kernels(record=NOT_BUILT)
    assert heard(use) == []
    assert len(heard(a_step)) == 1  # and the warning was not used up


def test_nothing_is_told_where_the_user_wants_no_kernels(without_kernels):
    without_kernels(record={"GRADREP_BUILD": "none", "_C": "GRADREP_BUILD=none"})
    assert heard(a_step) == []
    assert backends.compiled()["_C"].startswith("is not built (GRADREP_BUILD=none); build it where")


@pytest.mark.skipif(isinstance(backends._module("_C"), str), reason="there is no module _C")
def test_nothing_is_told_of_an_op_that_the_module_lacks(monkeypatch):
    monkeypatch.setattr(backends, "_told", set())
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda backend, *a: "has none" if backend == "cpp" else load(backend, *a))
    assert heard(backends.implementation, "rep_grad_norm", "cpu") == []


def test_a_warning_that_is_an_error_changes_nothing_and_comes_once(without_kernels):
    without_kernels(record=NOT_BUILT)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = gr.FusedRepSGD([p], lr=0.5, momentum=0.9)
    p.grad = torch.ones(3)
    with warnings.catch_warnings(), gr.use_backend("auto"):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is not built"):
            optimizer.step()
        assert p.tolist() == [1.0] * 3
        assert not optimizer.state
        optimizer.step()
    assert p.tolist() == [0.5] * 3


def test_what_is_compiled_hears_nothing_and_a_step_breaks_no_graph(without_kernels):
    """What dynamo traces must not hold a warning, which it would break the graph for."""
    without_kernels(record=NOT_BUILT)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = gr.FusedRepSGD([p], lr=0.5)
    p.grad = torch.ones(3)
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    assert not [warning for warning in heard(step) if "gradrep" in str(warning.message)]
    torch._dynamo.reset()
    ours = [warning for warning in heard(torch.compile(a_histogram, backend="eager")) if "_C" in str(warning.message)]
    torch._dynamo.reset()
    assert ours == []
    assert p.tolist() == [0.5] * 3


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"_C": "because"}'])
def test_a_record_may_be_missing_or_broken(monkeypatch, tmp_path, text):
    if text is not None:
        (tmp_path / "_build.json").write_text(text)
    monkeypatch.setattr(backends, "_PACKAGE", tmp_path)
    backends._build_record.cache_clear()
    try:
        assert backends._build_record() == (json.loads(text) if text and "because" in text else {})
    finally:
        monkeypatch.undo()
        backends._build_record.cache_clear()
