"""Print what compilers make of the GPU kernels, in float32, as a Markdown table.

It needs Triton and nvcc, no GPU.

python tests/support/compiled_figures.py > bench/results/compiled.md
"""

from __future__ import annotations

import re

import compile_gate
import torch
import triton
from gate_variants import compiled_over_pairs, compiled_over_parameters

from gradrep_kernels.ops.triton.joint_histogram import block, joint_histogram_kernel, private_cells
from gradrep_kernels.ops.triton.pair_ranges import BLOCK, PLACES, channel_ranges_kernel, pair_ranges_kernel
from gradrep_kernels.ops.triton.rep_grad_norm import rep_grad_norm_kernel
from gradrep_kernels.ops.triton.rep_sgd_step import rep_sgd_step_kernel

COUNTING = "joint_histogram_kernelINS_8CountingILNS_5TilesE"
CUDA = {  # kernels as the compiler names them
    "rep_sgd_step, CUDA C++": "step_kernelINS_9SgdUpdateEfE",
    "rep_grad_norm, CUDA C++, over chunks": "grad_norm_kernelIfE",
    "joint_histogram, CUDA C++, up to 24 bins": f"{COUNTING}1ELi25ELb1EEEfE",
    "joint_histogram, CUDA C++, remove_near": f"{COUNTING}2ELi0ELb1EEEfE",
    "joint_histogram, CUDA C++, into the result": f"{COUNTING}0ELi0ELb0EEEfE",
    "pair_ranges, CUDA C++, one range per channel": "channel_ranges_kernelIf",
    "pair_ranges, CUDA C++, over images": "image_extrema_kernelIf",
    "pair_ranges, CUDA C++, over pairs": "pair_ranges_kernelIf",
}


def triton_kernels(target: str) -> dict[str, compile_gate.Compiled]:
    step, pairs = compiled_over_parameters, compiled_over_pairs
    table = {"CELLS": private_cells(23), "BLOCK": block(compile_gate.TARGETS[target].warp_size)}
    plain = {"grad_scale": None, "found_inf": None}
    return {
        "rep_sgd_step, Triton": step(rep_sgd_step_kernel, torch.float32, target, {"hyper": "*fp32"}, plain),
        "rep_grad_norm, Triton": step(rep_grad_norm_kernel, torch.float32, target, {"partial": "*fp32"}, {}),
        "joint_histogram, Triton, 23 bins": pairs(joint_histogram_kernel, torch.float32, target, table),
        "pair_ranges, Triton": pairs(pair_ranges_kernel, torch.float32, target, {"BLOCK": BLOCK}),
        "pair_ranges, Triton, one range per channel": pairs(
            channel_ranges_kernel, torch.float32, target, {"TOGETHER": 1, "BLOCK": PLACES}
        ),
    }


def figures() -> dict[str, dict[str, compile_gate.Compiled]]:
    """By kernel and target."""
    rows: dict[str, dict[str, compile_gate.Compiled]] = {}
    for target in compile_gate.TARGETS:
        for kernel, made in triton_kernels(target).items():
            rows.setdefault(kernel, {})[target] = made
    _, compiled = compile_gate.built_cuda()
    for kernel, start in CUDA.items():
        rows[kernel] = {target: made for (name, target), made in compiled.items() if start in name}
    return rows


def table() -> str:
    head = ["kernel, float32", *compile_gate.TARGETS, "128-bit loads, stores (sm_90)"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for kernel, by_target in figures().items():
        assert not any(made.spills for made in by_target.values())
        cells = [
            f"{made.registers}, {made.shared}" if made else "" for made in map(by_target.get, compile_gate.TARGETS)
        ]
        lines.append(
            f"| {kernel} | {' | '.join(cells)} | {by_target['sm_90'].wide_loads}, {by_target['sm_90'].wide_stores} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    nvcc = re.search(r"release ([\d.]+)", compile_gate.setup_py().ask_nvcc("--version"))[1]
    print("# What compilers make of the GPU kernels\n")
    print(
        f"No GPU is needed for this, and none ran. Triton {triton.__version__}, nvcc {nvcc}. "
        "`python tests/support/compiled_figures.py`\n"
    )
    print(
        "Registers of a thread, static bytes of shared memory of a block; nothing spills. "
        "CUDA C++ is not compiled for AMD.\n"
    )
    print(table())
