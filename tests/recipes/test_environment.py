"""`env` says near its top which compiled modules are there, and why others are not."""

from __future__ import annotations

from gradrep_kernels.ops import backends
from gradrep_kernels.recipes.environment import environment, environment_text


def test_the_second_line_is_of_the_compiled_modules():
    facts = environment()
    assert facts["compiled"].keys() == {"_C", "_C_cuda"}
    first, second, *_ = environment_text(facts).splitlines()
    assert first.startswith("gradrep_kernels ")
    assert second == f"compiled         _C {facts['compiled']['_C']}. _C_cuda {facts['compiled']['_C_cuda']}"


def test_it_agrees_with_what_serves(monkeypatch):
    serves = {row["serves"] for row in backends.report(("cpu",))}
    assert (environment()["compiled"]["_C"] == "is loaded") == (serves == {"cpp"} or backends.forced() != "auto")
    broken = "ImportError: undefined symbol"
    monkeypatch.setattr(backends, "_module", lambda name: broken)
    text = environment_text(environment())
    assert f"_C is there but does not load ({broken}); build it where torch and a C++ compiler are: " in text
