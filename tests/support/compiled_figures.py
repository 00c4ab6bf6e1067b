"""Write what compilers make of the GPU kernels, in float32, as Markdown: a table for a version of Triton, one for nvcc.

It needs Triton and nvcc, no GPU. A file that is there keeps its tables of other versions of Triton.

python tests/support/compiled_figures.py bench/results/compiled.md           # of this Triton, and of nvcc
python tests/support/compiled_figures.py bench/results/compiled.md --triton  # of this Triton alone
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import compile_gate
import torch
import triton
from gate_variants import compiled_histogram, compiled_over_pairs, compiled_over_parameters, compiled_step

from gradrep_kernels.ops.triton.addressing import POINTERS, multiplier
from gradrep_kernels.ops.triton.joint_histogram import private_cells
from gradrep_kernels.ops.triton.pair_ranges import BLOCK, PLACES, channel_ranges_kernel, pair_ranges_kernel
from gradrep_kernels.ops.triton.rep_adamw_step import rep_adamw_step_kernel
from gradrep_kernels.ops.triton.rep_grad_norm import rep_grad_norm_kernel
from gradrep_kernels.ops.triton.rep_sgd_step import rep_sgd_step_kernel
from gradrep_kernels.ops.triton.scale_gradients import scale_gradients_kernel

COUNTING = "joint_histogram_kernelINS_8CountingILNS_5TilesE"
CUDA = {  # kernels as the compiler names them
    "rep_sgd_step, CUDA C++": "step_kernelINS_9SgdUpdateEfLNS_8TailKindE0E",
    "rep_sgd_step, CUDA C++, clipping and averages": "step_kernelINS_9SgdUpdateEfLNS_8TailKindE1E",
    "rep_sgd_step, CUDA C++, states in bfloat16 beside them": "step_kernelINS_9SgdUpdateEfLNS_8TailKindE2E",
    "rep_adamw_step, CUDA C++": "step_kernelINS_11AdamwUpdateEfLNS_8TailKindE0E",
    "rep_adamw_step, CUDA C++, clipping and averages": "step_kernelINS_11AdamwUpdateEfLNS_8TailKindE1E",
    "rep_grad_norm, CUDA C++, over chunks": "grad_norm_kernelIfE",
    "scale_gradients_, CUDA C++": "scale_gradients_kernelIfE",
    "joint_histogram, CUDA C++, up to 24 bins": f"{COUNTING}1ELi25ELb1EEEfE",
    "joint_histogram, CUDA C++, remove_near": f"{COUNTING}2ELi0ELb1EEEfE",
    "joint_histogram, CUDA C++, into the result": f"{COUNTING}0ELi0ELb0EEEfE",
    "pair_ranges, CUDA C++, one range per channel": "channel_ranges_kernelIf",
    "pair_ranges, CUDA C++, over images": "image_extrema_kernelIf",
    "pair_ranges, CUDA C++, over pairs": "pair_ranges_kernelIf",
}


def triton_kernels(target: str) -> dict[str, compile_gate.Compiled]:
    step, pairs = functools.partial(compiled_step, rep_sgd_step_kernel, torch.float32, target), compiled_over_pairs
    over_parameters = functools.partial(compiled_over_parameters, dtype=torch.float32, target=target)
    types, width = {"partial": "*fp32", "factor": "*fp32"}, {"WIDTH": POINTERS.value, "FACTOR": multiplier}
    return {
        "rep_sgd_step, Triton": step(),
        "rep_sgd_step, Triton, clipped, with an average and its state in bfloat16": step(("clip",), True, 1),
        "rep_adamw_step, Triton": compiled_step(rep_adamw_step_kernel, torch.float32, target, many_states=True),
        "rep_grad_norm, Triton": over_parameters(rep_grad_norm_kernel, types=types, constants=width),
        "scale_gradients_, Triton": over_parameters(scale_gradients_kernel, types=types, constants={}),
        "joint_histogram, Triton, 23 bins": compiled_histogram(torch.float32, target, private_cells(23)),
        "pair_ranges, Triton": pairs(pair_ranges_kernel, torch.float32, target, {"BLOCK": BLOCK}),
        "pair_ranges, Triton, one range per channel": pairs(
            channel_ranges_kernel, torch.float32, target, {"TOGETHER": 1, "BLOCK": PLACES}
        ),
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
    _, compiled = compile_gate.built_cuda()
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
