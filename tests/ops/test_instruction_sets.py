"""The C++ loops as they are compiled for each instruction set: equal bits, and vectors as wide as the set has.

The other tests of the C++ kernels meet only the best set of the machine they run on.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import builds
import pytest

COMPILER = shutil.which("g++")
# As setup.py compiles: every product and sum is rounded on its own. nvcc alone knows of #pragma unroll, and GCC's own
# header for AVX-512 has a variable that it finds uninitialized (GCC bug 105593).
FLAGS = ("-std=c++20", "-O3", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")
FLAGS += ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

on_x86 = pytest.mark.skipif(
    COMPILER is None or platform.machine() not in ("x86_64", "AMD64"), reason="no g++ for x86-64 on this machine"
)


@pytest.fixture(scope="module")
def program() -> Path:
    return builds.program("instruction_sets", [*FLAGS, f"-I{builds.ROOT / 'csrc'}"], COMPILER)


@on_x86
def test_every_instruction_set_has_the_bits_of_the_base(program):
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    compared = dict(re.findall(r"^(avx2|avx512) (\d+)$", done.stdout, re.MULTILINE))
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    assert [name for name, flag in (("avx2", "avx2"), ("avx512", "avx512bw")) if flag in flags] == list(compared)
    assert all(int(results) > 500 for results in compared.values())


@on_x86
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump on this machine")
def test_vectors_are_as_wide_as_the_instruction_set_has_them(program):
    """A wider vector in a function that all sets share would crash an older machine."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", program], capture_output=True, text=True, check=True
    ).stdout
    widths: dict[tuple[str, str], set[str]] = defaultdict(set)  # of (instruction set, function): x, y, z
    name = ("base", "")
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = re.sub(r" \[clone .*\]$", "", start[1])
            of_a_set = re.match(r"(?:\w+ )?gradrep::(avx2|avx512)::", function)
            name = (of_a_set[1] if of_a_set else "base", function)
        widths[name].update(re.findall(r"%([xyz])mm", line))
        assert "vfmadd" not in line, name
    allowed = {"base": {"x"}, "avx2": {"x", "y"}, "avx512": {"x", "y", "z"}}
    assert [name for name, used in widths.items() if not used <= allowed[name[0]]] == []
    for set_of_instructions, widest in (("avx2", "y"), ("avx512", "z")):
        loops = {function: used for (its, function), used in widths.items() if its == set_of_instructions}
        for kind in ("Step", "Tail", "TailStep", "GradNorm", "Range", "Quantise", "Counting"):
            assert any(f"::{kind}Loops" in function for function in loops)
        assert [function for function, used in loops.items() if widest not in used] == []
