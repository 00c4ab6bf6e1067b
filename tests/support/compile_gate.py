"""Compile kernels ahead of time, in Triton or CUDA, and read what the compiler made of them. No GPU is needed."""

from __future__ import annotations

import functools
import os
import pickle
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import builds
import pytest
import torch
import triton
from builds import ROOT, setup_py
from torch.utils import cpp_extension
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_USAGE = re.compile(r"\b(REG|STACK|LOCAL|SHARED):(\d+)")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_BRANCH = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?BRA\S*\s.*?\b0x([0-9a-f]+)")
_PTX = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z]+\.[A-Za-z0-9_.:]+)", re.MULTILINE)
_AMDGCN = re.compile(r"^\t([a-z]+_[a-z0-9_]+)\b", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel on one target."""

    target: str
    registers: int  # per thread; vector registers on AMD
    spills: int  # bytes of stack and local memory per thread, on AMD spilled registers too
    shared: int  # bytes
    # SASS ('LDG.E.128') of CUDA C++, PTX ('ld.global.v4.b32') or amdgcn ('global_load_dwordx4') of Triton -> how many
    instructions: Counter[str] = field(repr=False)
    assembly: str = field(repr=False)  # PTX or amdgcn
    ttir: str = field(repr=False, default="")  # Triton's own intermediate form; empty for CUDA C++
    cubin: bytes = field(repr=False, default=b"")  # Triton's, for NVIDIA
    # SASS of CUDA C++: the instructions of each loop that has no other in it
    loops: tuple[Counter[str], ...] = field(repr=False, default=())

    def count(self, pattern: str) -> int:
        """How many instructions match the regular expression from their first letter on."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    def lengths(self, **wanted: int) -> list[int]:
        """Instructions of the innermost loops that have so many of each (ATOMS=16), the shortest first."""
        return sorted(
            loop.total()
            for loop in self.loops
            if all(sum(n for name, n in loop.items() if re.match(f"{k}\\b", name)) == v for k, v in wanted.items())
        )

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of 128 bits or more."""
        in_ptx = r"ld\.(\S+\.)?global\S*\.(v[48]\.\w32|v[24]\.\w64)|cp\.async"
        return self.count(rf"LDG\S*\.(128|256)|{in_ptx}|global_load_dwordx4")

    @property
    def wide_stores(self) -> int:
        """Stores to global memory of 128 bits or more."""
        in_ptx = r"st\.(\S+\.)?global\S*\.(v[48]\.\w32|v[24]\.\w64)"
        return self.count(rf"STG\S*\.(128|256)|{in_ptx}|global_store_dwordx4")

    def claims_of_alignment(self) -> list[bool]:
        """For each pointer cast from an integer and said to be aligned: whether only under a condition.

        Triton turns the claim into 128-bit accesses wherever the pointer is used. One at the kernel's top level,
        outside every `scf.if`, holds on all paths, also on that of unaligned tensors.
        """
        conditional: list[bool] = []
        regions: list[str] = []
        for line in self.ttir.splitlines():
            text = re.sub(r"\s*loc\(.*\)$", "", line).strip()
            if text.startswith("}"):
                regions.pop()
            if text.endswith("{"):
                regions.append("then" if "scf.if" in text else "else" if "else" in text else "other")
            if "tt.int_to_ptr" in text and "tt.divisibility" in text:
                conditional.append("then" in regions)
        return conditional

    @property
    def double_precision(self) -> int:
        """Instructions that compute in fp64, or convert from or to it."""
        in_sass = r"D(ADD|MUL|FMA|SETP|MNMX|MMA)|(F2F|I2F|F2I|FRND)\S*F64|MUFU\S*64"  # I2F.U64 is of an integer
        return self.count(rf"{in_sass}|\w+\S*\.f64|v_\w*f64")

    def machine_code(self) -> Compiled:
        """The same with SASS in the place of PTX.

        The disassembler takes 0.6 s for any cubin, half of what a compilation takes.
        """
        assert self.cubin
        return replace(self, instructions=Counter(_SASS.findall(_of_cubin(self.cubin, "-sass"))))

    @property
    def contracted(self) -> int:
        """Products and sums that are rounded once together.

        (A mixed-precision fma that adds −0 is AMD's product of unlike dtypes.)
        """
        if self.target.startswith("sm_"):
            return len(re.findall(r"\b(?:fma|mad)\.\S*f(?:16|32|64)", self.assembly))
        lines = re.findall(r"^\tv_(?:pk_)?(?:fma|fmac|mac|mad)\w*_(?:f16|f32|f64|bf16).*", self.assembly, re.MULTILINE)
        return sum("neg(0)" not in line for line in lines)


def compile_variant(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], target: str, **options: Any
) -> Compiled:
    """Compile `kernel` as a launch does that specializes nothing.

    Args:
        types:     parameter -> Triton's name of its type ('*fp32', 'i32')
        constants: the constexpr parameters, and optional ones that are None
        options:   num_warps, enable_fp_fusion, ... as at the launch
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    built = triton.compile(ASTSource(kernel, signature, dict(constants)), target=TARGETS[target], options=options)
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        facts = {name: int(n) for name, n in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        spills = facts["vgpr_spill_count"] + facts["sgpr_spill_count"] + facts["private_segment_fixed_size"]
        return Compiled(
            target,
            facts["vgpr_count"],
            spills,
            built.metadata.shared,
            Counter(_AMDGCN.findall(text)),
            text,
            built.asm["ttir"],
        )
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    facts = {name: int(n) for name, n in _USAGE.findall(_of_cubin(cubin, "-res-usage"))}
    return Compiled(
        target,
        facts["REG"],
        facts["STACK"] + facts["LOCAL"],
        built.metadata.shared,
        Counter(_PTX.findall(ptx)),
        ptx,
        built.asm["ttir"],
        cubin,
    )


def _of_cubin(cubin: bytes, *what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _cuobjdump(*what, file.name)


def _cuobjdump(*arguments: str) -> str:
    done = subprocess.run([_CUOBJDUMP, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


# -- CUDA


def _by_kernel(text: str, head: str) -> dict[str, str]:
    """Parts of a listing, by the mangled name that each begins with."""
    parts = re.split(head, text)
    return dict(zip(parts[1::2], parts[2::2]))


def _innermost_loops(sass: str) -> tuple[Counter[str], ...]:
    """What lies between the target of a backward branch and the branch."""
    branches = [(int(to, 16), int(at, 16)) for at, to in _BRANCH.findall(sass)]
    spans = [(to, at) for to, at in branches if to < at]
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    at = {int(n, 16): line for line, n in enumerate(re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", sass, re.MULTILINE))}
    names = _SASS.findall(sass)
    assert len(at) == len(names)
    return tuple(Counter(names[at[a] : at[b] + 1]) for a, b in inner)


def compile_cuda(folder: Path, targets: tuple[str, ...]) -> tuple[list[str], dict[tuple[str, str], Compiled]]:
    """Compile all .cu files as the build does: the objects, and (mangled name of a kernel, target) -> its code.

    A warning is an error.
    """
    numbers = [f"{target[3:-1]}.{target[-1]}" for target in targets]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(numbers) + "+PTX")
        patch.setenv("NVCC_APPEND_FLAGS", "-Werror all-warnings")
        objects = setup_py().cuda_objects(cpp_extension, folder)
    found = {}
    for made in objects:
        ptx = _by_kernel(_cuobjdump("-ptx", made), r"\.entry (\w+)\(")  # of the last target
        # What follows a kernel may be a function that another one calls, such as pow.
        ptx = {name: re.split(r"^(?:\.\w+ )*\.func\b", text, flags=re.MULTILINE)[0] for name, text in ptx.items()}
        for target in targets:
            sass = _by_kernel(_cuobjdump("-sass", "-arch", target, made), r"Function : (\w+)")
            for name, usage in _by_kernel(_cuobjdump("-res-usage", "-arch", target, made), r"Function (\w+):").items():
                facts = {fact: int(n) for fact, n in _USAGE.findall(usage)}
                instructions = Counter(_SASS.findall(sass[name]))
                found[name, target] = Compiled(
                    target,
                    facts["REG"],
                    facts["STACK"] + facts["LOCAL"],
                    facts["SHARED"],
                    instructions,
                    ptx[name],
                    loops=_innermost_loops(sass[name]),
                )
    return objects, found


@functools.cache
def built_cuda() -> tuple[list[Path], dict[tuple[str, str], Compiled]]:
    """What `compile_cuda` gives for all of CUDA_TARGETS, kept for the same sources and compilers."""

    def build(folder: Path) -> None:
        objects, found = compile_cuda(folder, CUDA_TARGETS)
        (folder / "found.pickle").write_bytes(pickle.dumps(([Path(made).name for made in objects], found)))

    inputs = [*builds.version(setup_py().nvcc(), shutil.which(os.environ.get("CXX") or "c++")), torch.__version__]
    inputs += [*CUDA_TARGETS, ROOT / "setup.py", Path(__file__), *builds.sources("*.cu", "*.h")]
    folder = builds.kept("cuda", inputs, build)
    names, found = pickle.loads((folder / "found.pickle").read_bytes())
    return [folder / name for name in names], found
