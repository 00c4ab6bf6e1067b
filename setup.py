"""Metadata is in pyproject.toml; this file decides which native kernels to build.

GRADREP_BUILD = auto (build what the machine can, never fail) | require (fail if a kernel cannot be built) | none
GRADREP_CUDA  = auto (nvcc is found and torch is a CUDA build) | 1 | 0 | only (1, where the CPU module is there already)
TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CXX and CXXFLAGS are honoured as torch does.

_C (CPU) and _C_cuda are separate modules: a CUDA build that fails must not lose the CPU kernels. Both use LibTorch's
stable ABI and Python's limited API, so that one binary serves torch >= 2.11 and Python >= 3.10.

nvcc is called here and not by torch's BuildExtension, which builds no module at all where a .cu file is among the
sources and torch is a CPU build or of another CUDA release. The headers of a CPU build suffice, and so does nvcc
without a GPU.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import ModuleError

CHOICES = {"GRADREP_BUILD": ("auto", "require", "none"), "GRADREP_CUDA": ("auto", "1", "0", "only")}
TORCH_TARGET = "0x020b000000000000"  # 2.11
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # where TORCH_CUDA_ARCH_LIST is unset and no GPU is visible
# No FMA contraction, no approximate division, no flushed denormals: every operation is rounded on its own, as the
# reference does.
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fmad=false",
    "-prec-div=true",
    "-ftz=false",
    "-DUSE_CUDA",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
ROOT = Path(__file__).resolve().parent
# Also where the package is installed without kernels, or pip kept a wheel of it.
INSTALL = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation PATH-TO-THE-SOURCES"


def option(name):
    value = os.environ.get(name) or CHOICES[name][0]
    if value not in CHOICES[name]:
        raise SystemExit(f"gradrep_kernels: {name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    return value


BUILD, CUDA = option("GRADREP_BUILD"), option("GRADREP_CUDA")


def say(message):
    print(f"gradrep_kernels: {message}", file=sys.stderr, flush=True)


def write_record(command, modules):
    """Leave in the package which modules were built and why others were not, for its warnings and `env`.

    `command` is the build command that knows whether the package stays among the sources. A module that this build
    has nothing to do with keeps what an earlier one wrote.
    """
    stays = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    file = Path(ROOT if stays else command.build_lib) / "gradrep_kernels" / "_build.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {**before, "GRADREP_BUILD": BUILD, **modules}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def without_kernels(reason):
    """The commands of a build that compiles nothing. `build_ext` is called by name only."""

    def recording(base):
        class Recording(base):
            def run(self):
                super().run()
                write_record(self, dict.fromkeys(("_C", "_C_cuda"), reason))

        return Recording

    return {"build_py": recording(build_py), "build_ext": recording(build_ext)}


def first_line(error):
    return (str(error).splitlines() or [""])[0][:200]


def cpp_extension():
    """torch's build helpers, or why there are none (with a word on how to get the kernels): torch is not importable."""
    try:
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch must not stop a pure Python install either
        if BUILD == "require":
            raise SystemExit(
                f"gradrep_kernels: GRADREP_BUILD=require, but torch is not importable in the build environment "
                f"({error}); install torch first, then {INSTALL}"
            ) from None
        say(
            f"torch is not importable here ({error}), so the package is installed without compiled kernels. "
            f"To get them: pip install torch, then {INSTALL}"
        )
        return None, f"torch was not importable in the build environment: {first_line(error)}"
    return cpp_extension, None


def nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, else on the PATH, else where it usually is."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (
        shutil.which("nvcc", path=os.path.join(home, "bin"))
        if home
        else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def ask_nvcc(*arguments: str) -> str:
    done = subprocess.run([nvcc(), *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def cuda_library_folders() -> list[str]:
    steps = ask_nvcc("--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
    return [
        os.path.realpath(folder)
        for line in re.findall("LIBRARIES=.*", steps)
        for folder in re.findall(r'-L([^"\s]+)', line)
    ]


def module(ext, name, sources, flags, linked=(), **more):
    return ext.CppExtension(
        f"gradrep_kernels.{name}",
        ["csrc/module.cpp", *sources],
        depends=sorted(map(str, [*Path("csrc").glob("*.h"), *linked])),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],  # py_limited_api sets Py_LIMITED_API
        extra_compile_args={"cxx": flags},
        py_limited_api=True,
        optional=BUILD != "require",
        **more,
    )


def cpu_module(ext):
    # No FMA contraction: every product and sum is rounded on its own, as the reference does.
    flags = (
        ["/O2", "/fp:precise"]
        if os.name == "nt"
        else ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    )
    return module(ext, "_C", sorted(str(p) for p in Path("csrc").glob("*_cpu.cpp")), flags)


def why_no_cuda() -> str | None:
    """Why _C_cuda cannot be built here; None if it can be."""
    import torch

    if os.name == "nt":
        return "it is built on Linux only"
    if nvcc() is None:
        return "nvcc is not found; set CUDA_HOME or put it on the PATH"
    if torch.version.hip is not None:
        return "torch is a ROCm build; its kernels are Triton's"
    release = re.search(r"release (\d+)", ask_nvcc("--version"))
    if release is None:
        return f"{nvcc()} does not say its release"
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != release[1]:
        releases = f"nvcc is of CUDA {release[1]} and torch of CUDA {torch.version.cuda}"
        return f"{releases}; set CUDA_HOME to a toolkit of torch's"
    if torch.version.cuda is None and CUDA == "auto":
        return "torch is a CPU build; GRADREP_CUDA=1 builds it nevertheless, for another torch"
    return None


def cuda_module(ext):
    import torch

    # What torch loads at import is found by its name. A CPU build of torch has no libtorch_cuda, but libtorch.so leads
    # to it.
    last = ["-Wl,--no-as-needed", "-ltorch_cuda" if torch.version.cuda else "-ltorch"]
    flags = ["-O2", "-g0", "-fvisibility=hidden"]
    linked = Path("csrc").glob("*.cu")
    folders = cuda_library_folders()
    return module(ext, "_C_cuda", [], flags, linked, libraries=["cudart"], library_dirs=folders, extra_link_args=last)


def max_jobs() -> int:
    given = os.environ.get("MAX_JOBS", "")
    return (given.isdigit() and int(given)) or os.cpu_count() or 1


def cuda_objects(ext, folder: Path, jobs: int | None = None) -> list[str]:
    """The .cu files compiled into `folder`, `jobs` (MAX_JOBS) at a time."""
    import torch

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = CUDA_ARCHITECTURES
    flags = [*NVCC_FLAGS, *ext._get_cuda_arch_flags(), *(f"-I{include}" for include in ext.include_paths())]
    host = shutil.which(os.environ.get("CXX") or "")
    if host:
        flags += ["-ccbin", host]
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(ROOT.glob("csrc/*.cu"))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    commands = [[nvcc(), *flags, "-c", str(source), "-o", made] for source, made in zip(sources, objects)]
    for command in commands:
        say(shlex.join(command))
    with ThreadPoolExecutor(jobs or max_jobs()) as pool:
        run = functools.partial(subprocess.run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for source, done in zip(sources, pool.map(run, commands)):
            if done.returncode != 0:
                raise RuntimeError(f"nvcc failed on {source}\n{done.stdout}")
    return objects


def modules(ext):
    """The modules to build, and why others are not: {name: reason}."""
    found = [] if CUDA == "only" else [cpu_module(ext)]
    if CUDA == "0":
        return found, {"_C_cuda": "GRADREP_CUDA=0"}
    reason = why_no_cuda()
    if reason is None:
        return [*found, cuda_module(ext)], {}
    if CUDA != "auto":
        if BUILD == "require":
            raise SystemExit(f"gradrep_kernels: GRADREP_CUDA={CUDA}, but _C_cuda cannot be built: {reason}")
        say(f"_C_cuda is not built: {reason}")
    return found, {"_C_cuda": reason}


def commands(ext, left_out):
    class Build(ext.BuildExtension):
        _objects = None  # a Future of cuda_objects

        def run(self):
            self._failed = {}  # name of an extension, or None for all of them -> why
            self._or_give_up(super().run)
            names = [extension.name for extension in self.extensions or []]
            states = {name: self._failed.get(name) or self._failed.get(None) or "built" for name in names}
            write_record(self, left_out | {name.rpartition(".")[2]: state for name, state in states.items()})

        def build_extensions(self):
            """Compile the .cu files beside the CPU module."""
            cuda = [extension for extension in self.extensions if extension.name.endswith("._C_cuda")]
            jobs = max_jobs()
            if not cuda or len(self.extensions) == 1 or jobs == 1:
                return super().build_extensions()
            # MAX_JOBS bounds both together: a compiler takes 1 to 2 GB.
            share = max(1, min(len(list(ROOT.glob("csrc/*.cu"))), jobs // 2))
            with ThreadPoolExecutor(1) as background:
                self._objects = background.submit(cuda_objects, ext, Path(self.build_temp) / cuda[0].name, share)
                os.environ["MAX_JOBS"] = str(jobs - share)  # ninja's
                super().build_extensions()

        def build_extension(self, extension):
            self._or_give_up(lambda: self._build(extension), extension.name)

        def _build(self, extension):
            folder = self.build_temp
            self.build_temp = os.path.join(folder, extension.name)  # both modules have a module.o
            try:
                if extension.name.endswith("._C_cuda"):
                    objects = self._objects and self._objects.result()  # raises what nvcc said
                    extension.extra_objects = objects or cuda_objects(ext, Path(self.build_temp))
                super().build_extension(extension)
            finally:
                self.build_temp = folder

        def _or_give_up(self, build, name=None):
            try:
                build()
            except (Exception, SystemExit) as error:
                if BUILD == "require":
                    raise
                reason = f"{type(error).__name__}: {first_line(error)}"
                self._failed[name] = f"the build failed with {reason}"
                say(
                    f"{name or 'the kernels'} could not be built ({reason}); "
                    "the package works without, more slowly. "
                    f"GRADREP_BUILD=require shows the whole error, as in: GRADREP_BUILD=require {INSTALL}"
                )

    found = {"build_ext": Build.with_options(no_python_abi_suffix=False)}
    try:
        BdistWheel = Distribution().get_command_class(
            "bdist_wheel"
        )  # setuptools' own from 70.1 on, before that the package wheel's
    except ModuleError:
        return found

    class Wheel(BdistWheel):
        def get_tag(self):
            """Name a wheel without a compiled module as one for every platform.

            Cached as one of this platform it would pass for complete.
            """
            self.root_is_pure = not any(map(os.path.exists, self.get_finalized_command("build_ext").get_outputs()))
            return super().get_tag()

    return {**found, "bdist_wheel": Wheel}


def main():
    ext, reason = (None, "GRADREP_BUILD=none") if BUILD == "none" else cpp_extension()
    if ext is None:
        setup(license="MIT", cmdclass=without_kernels(reason))
    else:
        ext_modules, left_out = modules(ext)
        setup(
            license="MIT",
            ext_modules=ext_modules,
            cmdclass=commands(ext, left_out),
            options={"bdist_wheel": {"py_limited_api": "cp310"}},
        )


if __name__ == "__main__":  # the compile gate of the tests imports this file to compile as the build does
    main()
