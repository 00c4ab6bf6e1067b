"""Metadata is in pyproject.toml; this file only decides which native kernels to build.

GRADREP_BUILD = auto (build what the machine can, never fail) | require (fail if a kernel cannot be built) | none
GRADREP_CUDA  = auto (nvcc is found and torch is a CUDA build) | 1 | 0
TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CXX and CXXFLAGS are honoured as torch does.

_C (CPU) and _C_cuda are separate modules: a CUDA build that fails must not lose the CPU kernels. Both use LibTorch's
stable ABI and Python's limited API, so that one binary serves torch >= 2.11 and Python >= 3.10.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

CHOICES = {"GRADREP_BUILD": ("auto", "require", "none"), "GRADREP_CUDA": ("auto", "1", "0")}
TORCH_TARGET = "0x020b000000000000"  # 2.11


def option(name):
    value = os.environ.get(name) or CHOICES[name][0]
    if value not in CHOICES[name]:
        raise SystemExit(f"gradrep_kernels: {name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    return value


BUILD, CUDA = option("GRADREP_BUILD"), option("GRADREP_CUDA")


def say(message):
    print(f"gradrep_kernels: {message}", file=sys.stderr, flush=True)


def cpp_extension():
    """torch's build helpers, or None (with a word on how to get the kernels) where torch is not importable."""
    try:
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch must not stop a pure Python install either
        if BUILD == "require":
            raise SystemExit(
                f"gradrep_kernels: GRADREP_BUILD=require, but torch is not importable in the build environment ({error}); "
                "install torch first and use pip install --no-build-isolation"
            ) from None
        say(
            f"torch is not importable here ({error}), so the package is installed without compiled kernels. "
            "To get them: pip install torch, then pip install --no-build-isolation gradrep_kernels"
        )
        return None
    return cpp_extension


def cpu_module(ext):
    sources = ["csrc/module.cpp", *sorted(str(p) for p in Path("csrc").glob("*_cpu.cpp"))]
    # No FMA contraction: every product and sum is rounded on its own, as the reference does.
    flags = ["/O2", "/fp:precise"] if os.name == "nt" else ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    return ext.CppExtension(
        "gradrep_kernels._C",
        sources,
        depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],  # py_limited_api sets Py_LIMITED_API
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
        optional=BUILD != "require",
    )


def commands(ext):
    class Build(ext.BuildExtension):
        def run(self):
            self._or_give_up(super().run)

        def build_extension(self, extension):
            self._or_give_up(lambda: super(Build, self).build_extension(extension), extension.name)

        def _or_give_up(self, build, name="the kernels"):
            try:
                build()
            except (Exception, SystemExit) as error:
                if BUILD == "require":
                    raise
                first_line = (str(error).splitlines() or [""])[0][:200]
                say(
                    f"{name} could not be built ({type(error).__name__}: {first_line}); the package works without, more slowly. "
                    "GRADREP_BUILD=require shows the whole error"
                )

    return {"build_ext": Build.with_options(no_python_abi_suffix=False)}


ext = None if BUILD == "none" else cpp_extension()
if ext is None:
    setup()
else:
    setup(ext_modules=[cpu_module(ext)], cmdclass=commands(ext), options={"bdist_wheel": {"py_limited_api": "cp310"}})
