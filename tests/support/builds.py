"""Compilers' outputs that tests share: built once for the same inputs, and compilers that take a test's flags last."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build" / "tests"
NEWEST = 3  # builds of one name that stay: one takes up to 30 MB, and each edit of csrc makes another
# Variables by which a compiler is chosen or told what to do.
VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CPATH", "CUDA_HOME", "CUDA_PATH")
VARIABLES += ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")


def setup_py():
    """The build script, for nvcc and its flags."""
    spec = importlib.util.spec_from_file_location("gradrep_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cpp_compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def version(*compilers: str | None) -> list[str]:
    """Path and version of each compiler."""
    lines = []
    for compiler in filter(None, compilers):
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
        lines += [os.path.realpath(compiler), done.stdout]
    return lines


def sources(*patterns: str) -> list[Path]:
    """Files of csrc."""
    return sorted(path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def kept(name: str, inputs: Iterable[str | Path], make: Callable[[Path], object]) -> Path:
    """Return the folder that `make` fills, or that it filled from the same inputs before.

    Args:
        name:   of the build; a few builds of a name are kept under build/tests
        inputs: everything that the build depends on: texts, and files that are read
        make:   is called with a new, empty folder. The folder is moved afterwards, so nothing in it may hold its path.
    """
    digest = hashlib.sha256()
    for part in (*inputs, *(f"{variable}={os.environ.get(variable)}" for variable in VARIABLES)):
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(f"{part if isinstance(part, Path) else ''} {len(data)} ".encode() + data)
    place = KEPT / f"{name}-{digest.hexdigest()[:32]}"
    if place.is_dir():
        os.utime(place)
        return place
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT, prefix="unfinished-", ignore_cleanup_errors=True) as folder:
        new = Path(folder) / "made"
        new.mkdir()
        make(new)
        try:
            new.rename(place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    by_age = sorted(KEPT.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-NEWEST]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def program(name: str, flags: Sequence[str], compiler: str | None = None) -> Path:
    """tests/support/NAME.cpp as a program or library; the flags hold what it includes."""
    source = ROOT / "tests" / "support" / f"{name}.cpp"
    compiler = compiler or cpp_compiler()

    def build(folder: Path) -> None:
        command = [compiler, *flags, source, "-o", folder / name]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    inputs = [source, *sorted(source.parent.glob("*.h")), *sources("*.h"), *flags, *version(compiler)]
    return kept(name, inputs, build) / name


def compiler_with(folder: Path, *flags: str) -> str:
    """A C++ compiler for setup.py, as the variable CXX names it, that takes these flags after all others.

    CXXFLAGS stand before the flags of setup.py, and of two -O the last holds.
    """
    compiler = Path(cpp_compiler())
    script = folder / compiler.name
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(compiler))} "$@" {shlex.join(flags)}\n')
    script.chmod(0o755)
    return str(script)
