"""Write what compilers make of the GPU kernels, in float32, as Markdown: a table for a version of Triton, one for nvcc.

It needs Triton and nvcc, no GPU. A file that is there keeps its tables of other versions of Triton.

python tests/support/compiled_figures.py bench/results/compiled.md           # of this Triton, and of nvcc
python tests/support/compiled_figures.py bench/results/compiled.md --triton  # of this Triton alone
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import compile_gate
import torch
import triton
from gate_variants import compiled_histogram, compiled_over_pairs, compiled_over_parameters

from gradrep_kernels.ops.triton.joint_histogram import private_cells
from gradrep_kernels.ops.triton.pair_ranges import BLOCK, pair_ranges_kernel
from gradrep_kernels.ops.triton.rep_grad_norm import rep_grad_norm_kernel
from gradrep_kernels.ops.triton.rep_sgd_step import rep_sgd_step_kernel

CUDA = {  # kernels as the compiler names them
    "joint_histogram, CUDA C++, tables in shared memory": "joint_histogram_kernelILb1Ef",
    "joint_histogram, CUDA C++, into the result": "joint_histogram_kernelILb0Ef",
    "pair_ranges, CUDA C++, over images": "image_extrema_kernelIf",
    "pair_ranges, CUDA C++, over pairs": "pair_ranges_kernelIf",
}


def triton_kernels(target: str) -> dict[str, compile_gate.Compiled]:
    step, pairs = compiled_over_parameters, compiled_over_pairs
    plain = {"grad_scale": None, "found_inf": None}
    return {
        "rep_sgd_step, Triton": step(rep_sgd_step_kernel, torch.float32, target, {"hyper": "*fp32"}, plain),
        "rep_grad_norm, Triton": step(rep_grad_norm_kernel, torch.float32, target, {"partial": "*fp32"}, {}),
        "joint_histogram, Triton, 23 bins": compiled_histogram(torch.float32, target, private_cells(23)),
        "pair_ranges, Triton": pairs(pair_ranges_kernel, torch.float32, target, {"BLOCK": BLOCK}),
    }


def of_triton() -> tuple[str, str]:
    """Heading and table of this version of Triton."""
    rows: dict[str, dict[str, compile_gate.Compiled]] = {}
    for target in compile_gate.TARGETS:
        for kernel, made in triton_kernels(target).items():
            rows.setdefault(kernel, {})[target] = made
    return f"Triton {triton.__version__}", table(rows)


def of_nvcc() -> tuple[str, str]:
    nvcc = re.search(r"release ([\d.]+)", compile_gate.setup_py().ask_nvcc("--version"))[1]
    with tempfile.TemporaryDirectory() as folder:
        _, compiled = compile_gate.compile_cuda(Path(folder), compile_gate.CUDA_TARGETS)
    rows = {
        kernel: {target: made for (name, target), made in compiled.items() if start in name}
        for kernel, start in CUDA.items()
    }
    return f"nvcc {nvcc}", table(rows)


def table(rows: dict[str, dict[str, compile_gate.Compiled]]) -> str:
    """`rows` by kernel and target."""
    targets = list(next(iter(rows.values())))
    head = ["kernel, float32", *targets, "128-bit loads, stores (sm_90)"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for kernel, made in rows.items():
        assert not any(made[target].spills for target in targets)
        cells = [f"{made[target].registers}, {made[target].shared}" for target in targets]
        wide = f"{made['sm_90'].wide_loads}, {made['sm_90'].wide_stores}"
        lines.append(f"| {kernel} | {' | '.join(cells)} | {wide} |")
    return "\n".join(lines)


INTRODUCTION = """# What compilers make of the GPU kernels

No GPU is needed for this, and none ran. `python tests/support/compiled_figures.py bench/results/compiled.md`

Registers of a thread, static bytes of shared memory of a block; nothing spills. CUDA C++ is not compiled for AMD.
"""


def merged(before: str, sections: list[tuple[str, str]]) -> str:
    """The file with new sections, each in the place of one of the same compiler: of nvcc, or of that minor version."""

    def compiler(heading: str) -> str:
        return re.match(r"nvcc|Triton \d+\.\d+", heading)[0]

    kept = [part.strip().split("\n\n", 1) for part in re.split(r"^## ", before, flags=re.MULTILINE)[1:]]
    by_compiler = {compiler(heading): (heading, text) for heading, text in (*kept, *sections)}
    return "\n".join(
        [INTRODUCTION, *(f"## {heading}\n\n{text}\n" for _, (heading, text) in sorted(by_compiler.items()))]
    )


if __name__ == "__main__":
    file, *alone = sys.argv[1:]
    made = [of_triton()] + ([] if alone == ["--triton"] else [of_nvcc()])
    before = Path(file).read_text(encoding="utf-8") if Path(file).exists() else ""
    Path(file).write_text(merged(before, made), encoding="utf-8")
