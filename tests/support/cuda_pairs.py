"""The CUDA C++ of `pair_ranges` and `joint_histogram`, emulated or on a GPU, and its comparison with the reference."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field

import builds
import implementations
import pytest
import torch
from cases_pairs import assert_raised, laid_out, same_bits

from gradrep_kernels.ops import reference
from gradrep_kernels.ops.reference.pair_rule import arithmetic_dtype, sturges

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
H100, SMALL = 227 << 10, 48 << 10  # bytes of shared memory that a block can have

Four = ctypes.c_int64 * 4


class Arguments(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int64), ("x", ctypes.c_void_p), ("sizes", Four), ("strides", Four),
        ("displacements", ctypes.c_void_p), ("count", ctypes.c_int64),
        ("pad_rows", ctypes.c_int64), ("pad_columns", ctypes.c_int64), ("remove_near", ctypes.c_int64),
        ("ranges", ctypes.c_void_p), ("bins", ctypes.c_void_p), ("max_bins", ctypes.c_int64),
        ("result", ctypes.c_void_p),
    )  # fmt: skip


class Facts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "most_shared",
            "blocks_at_once",
            "plan_alone",
            "launches",
            "blocks",
            "shared",
            "tiled",
            "private_tables",
            "wild_writes",
            "tiles",
            "most_tiles",
            "table_pitch",
        )
    )


@functools.cache
def library() -> ctypes.CDLL:
    if builds.cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    # As nvcc rounds: every product and sum on its own. An unaligned read or an overflow ends all tests at once.
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    flags += ["-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error"]
    return ctypes.CDLL(str(builds.program("emulated_cuda", [*flags, f"-I{builds.ROOT / 'csrc'}"])))


@dataclass
class Emulated:
    """The ops, on CPU tensors; the facts of the last call."""

    facts: Facts = field(default_factory=Facts)
    device: str = "cpu"

    def _run(
        self, x, displacements, padding, remove_near, ranges, bins, max_bins, result, shared, blocks_at_once
    ) -> None:
        flat = torch.tensor(displacements, dtype=torch.int64)
        arguments = Arguments(
            DTYPES.index(x.dtype), x.data_ptr(), Four(*x.shape), Four(*x.stride()),
            flat.data_ptr(), len(displacements) // 2, *padding, remove_near,
            ranges.data_ptr(), None if bins is None else bins.data_ptr(), max_bins,
            None if result is None else result.data_ptr(),
        )  # fmt: skip
        self.facts = Facts(most_shared=shared, blocks_at_once=blocks_at_once, plan_alone=x.is_meta)
        library().emulate(ctypes.byref(arguments), ctypes.byref(self.facts))
        assert self.facts.wild_writes == 0

    def pair_ranges(self, x, displacements, padding, remove_near, *, shared=H100, blocks_at_once=5):
        pairs = len(displacements) // 2
        ranges, n = (
            x.new_full((x.shape[1], pairs, 2, 2), 7, dtype=arithmetic_dtype(x.dtype)),
            x.new_full((x.shape[1], pairs), 7, dtype=torch.int64),
        )
        self._run(x, displacements, padding, remove_near, ranges, None, 0, n, shared, blocks_at_once)
        return ranges, n

    def pair_ranges_(self, ends, n, x, displacements, padding, remove_near, *, shared=H100, blocks_at_once=5):
        self._run(x, displacements, padding, remove_near, ends, None, -1, n, shared, blocks_at_once)

    def joint_histogram(
        self, x, displacements, ranges, bins, max_bins, padding, remove_near, *, shared=H100, blocks_at_once=5
    ):
        counts = x.new_zeros((x.shape[1], len(displacements) // 2, max_bins, max_bins), dtype=torch.int64)
        self.joint_histogram_(
            counts, x, displacements, ranges, bins, padding, remove_near, shared=shared, blocks_at_once=blocks_at_once
        )
        return counts

    def joint_histogram_(
        self, counts, x, displacements, ranges, bins, padding, remove_near, *, shared=H100, blocks_at_once=5
    ):
        self._run(
            x,
            displacements,
            padding,
            remove_near,
            ranges.contiguous(),
            bins.contiguous(),
            counts.shape[-1],
            counts,
            shared,
            blocks_at_once,
        )
        assert self.facts.shared <= shared

    def plan(self, x, displacements, max_bins, padding, remove_near, *, blocks_at_once) -> Facts:
        """The facts of `joint_histogram` on a tensor of the meta device."""
        nothing = torch.zeros(1, dtype=torch.int32)
        self._run(x, displacements, padding, remove_near, nothing, nothing, max_bins, nothing, H100, blocks_at_once)
        return self.facts


@dataclass
class OnGPU:
    device: str = "cuda"

    def pair_ranges(self, *arguments, **emulated):
        return implementations.get("pair_ranges", "cuda", "cuda")(*arguments)

    def pair_ranges_(self, *arguments, **emulated):
        implementations.get("pair_ranges_", "cuda", "cuda")(*arguments)

    def joint_histogram(self, *arguments, **emulated):
        return implementations.get("joint_histogram", "cuda", "cuda")(*arguments)

    def joint_histogram_(self, *arguments, **emulated):
        implementations.get("joint_histogram_", "cuda", "cuda")(*arguments)


ON_GPU = [
    pytest.param(OnGPU(), id=p.id, marks=p.marks) for p in implementations.of("joint_histogram") if p.id == "cuda-cuda"
]


def on_gpu(test):
    return implementations.on_gpu(pytest.mark.parametrize("ops", ON_GPU or [None])(test))


OPS = [pytest.param(Emulated(), id="emulated"), *ON_GPU]


def check(
    ops,
    x,
    displacements,
    padding,
    remove_near,
    *,
    layout="contiguous",
    bins=None,
    ranges=None,
    shared=(H100,),
    **emulated,
) -> None:
    """Ranges and counts, added to sevens, against the reference on the CPU, with each amount of shared memory.

    Bins and ranges are those of x unless others are given.
    """
    there, x = laid_out(x.to(ops.device), layout), laid_out(x, layout)
    expected_ranges, expected_n = reference.pair_ranges(x, displacements, padding, remove_near)
    ranges, bins = expected_ranges if ranges is None else ranges, sturges(expected_n) if bins is None else bins
    most = int(bins.max())
    expected = reference.joint_histogram(x, displacements, ranges, bins, most, padding, remove_near)
    ranges, bins = ranges.to(ops.device), bins.to(ops.device)
    for most_shared in shared:
        emulated["shared"] = most_shared
        found, n = ops.pair_ranges(there, displacements, padding, remove_near, **emulated)
        assert torch.equal(n.cpu(), expected_n)
        assert same_bits(found.cpu(), expected_ranges), (found, expected_ranges)
        raising = functools.partial(ops.pair_ranges_, **emulated)
        assert_raised(raising, there, displacements, padding, remove_near)
        counts = torch.full_like(expected, 7, device=ops.device)
        ops.joint_histogram_(counts, there, displacements, ranges, bins, padding, remove_near, **emulated)
        assert torch.equal(counts.cpu(), expected + 7)


HALF_3X3 = [0, 1, 1, -1, 1, 0, 1, 1]
HALF_7X7 = [v for i in range(4) for j in range(-3, 4) if (i, j) > (0, 0) for v in (i, j)]
