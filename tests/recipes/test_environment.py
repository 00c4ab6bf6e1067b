"""`env` says which compiled modules are there, which implementations could run here, and why others could not."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest
import torch

from gradrep_kernels import use_backend
from gradrep_kernels.cli import main
from gradrep_kernels.ops import backends
from gradrep_kernels.recipes import cores
from gradrep_kernels.recipes.environment import commit, environment, environment_text


def test_the_second_line_is_of_the_compiled_modules():
    facts = environment()
    assert facts["compiled"].keys() == {"_C", "_C_cuda"}
    first, second, *_ = environment_text(facts).splitlines()
    assert first.startswith("gradrep_kernels ")
    assert second == f"compiled         _C {facts['compiled']['_C']}. _C_cuda {facts['compiled']['_C_cuda']}"


def test_it_agrees_with_what_serves(monkeypatch):
    serves = {row["serves"] for row in backends.report(("cpu",))}
    state = environment()["compiled"]["_C"]
    assert state.startswith("is loaded from ") == (serves == {"cpp"} or backends.forced() != "auto")
    if state.startswith("is loaded from "):
        assert Path(state.removeprefix("is loaded from ")) == Path(
            importlib.import_module("gradrep_kernels._C").__file__
        )
    broken = "ImportError: undefined symbol"
    monkeypatch.setattr(backends, "_module", lambda name: broken)
    text = environment_text(environment())
    assert f"_C is there but does not load ({broken}); build it where torch and a C++ compiler are: " in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_available_on_a_device_that_is_not_here():
    why = "torch is not a CUDA build here" if torch.version.cuda is None else "torch sees no GPU here"
    for row in backends.report(("cuda",)):
        assert row["serves"] == f"none: {why}"
        assert "available" not in row.values()


def test_only_the_backend_that_is_forced_is_available(monkeypatch, capsys):
    with use_backend("reference"):
        facts = environment()
    for row in facts["ops"]:
        assert "available" not in [row[name] for name in ("cpp", "triton", "cuda")]
        assert row["device"] != "cpu" or row["reference"] == "available"
    monkeypatch.setenv("GRADREP_BACKEND", "reference")
    with use_backend("reference"):
        assert main(["env"]) == 0
    assert "reference (forced by GRADREP_BACKEND)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "torchrun", "threads"),
    [
        (None, False, 4),
        ("1", False, 1),
        ("3,2", False, 3),
        ("9", False, 4),
        ("0", False, 4),
        ("x", False, 4),
        ("1", True, 2),
    ],
)
def test_threads_are_those_that_the_user_wants(monkeypatch, wanted, torchrun, threads):
    monkeypatch.setattr(cores, "_cores_of_all", lambda: 4)
    for name, value in (("OMP_NUM_THREADS", wanted), ("LOCAL_WORLD_SIZE", "2" if torchrun else None)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cores.own_threads() == threads


def test_a_commit_is_dirty_where_more_than_results_differs(tmp_path):
    result, code = tmp_path / "bench" / "results" / "a.json", tmp_path / "a.py"
    result.parent.mkdir(parents=True)
    for path in (result, code):
        path.write_text("1")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = commit(tmp_path, but="bench/results")
    result.write_text("2")
    assert commit(tmp_path, but="bench/results") == clean
    assert commit(tmp_path) == f"{clean}-dirty"
    code.write_text("2")
    assert commit(tmp_path, but="bench/results") == f"{clean}-dirty"
