"""builds: what a compiler made is used again for the same inputs alone."""

from __future__ import annotations

from pathlib import Path

import builds
import pytest


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(builds, "KEPT", tmp_path / "kept")
    file = tmp_path / "a.cpp"
    file.write_text("int a;")
    return file


def build(source, *flags: str) -> tuple[str, bool]:
    """(what the build holds, whether it was made now)"""
    made = []

    def make(folder):
        made.append(folder)
        (folder / "a.o").write_text(source.read_text() + " ".join(flags))

    return (builds.kept("a", [source, *flags], make) / "a.o").read_text(), bool(made)


def test_the_same_inputs_are_built_once(source):
    assert build(source, "-O1") == ("int a;-O1", True)
    assert build(source, "-O1") == ("int a;-O1", False)


def test_another_text_flag_or_variable_is_another_build(source, monkeypatch):
    build(source, "-O1")
    assert build(source, "-O", "1")[1]
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert build(source, "-O1")[1]
    source.write_text("int b;")
    assert build(source, "-O1") == ("int b;-O1", True)


def test_a_build_that_fails_leaves_nothing(source):
    def fail(folder):
        (folder / "a.o").touch()
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        builds.kept("a", [source], fail)
    assert list(builds.KEPT.iterdir()) == []
    assert build(source) == ("int a;", True)


def test_the_newest_builds_stay(source):
    for n in range(builds.NEWEST + 2):
        build(source, f"-O{n}")
    assert len(list(builds.KEPT.iterdir())) == builds.NEWEST
    assert not build(source, f"-O{n}")[1]


@pytest.mark.skipif(builds.cpp_compiler() is None, reason="no C++ compiler")
def test_flags_come_last(tmp_path):
    script = builds.compiler_with(tmp_path, "-DLAST=a b")
    assert Path(script).read_text().endswith("\"$@\" '-DLAST=a b'\n")
    assert builds.version(script)[1] == builds.version(builds.cpp_compiler())[1]
