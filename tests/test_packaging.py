"""The package as a user gets it: sdist, wheel, an install where there is no compiler, wrong switches."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import builds
import pytest
from packaging import metadata

import gradrep_kernels

ROOT = Path(__file__).resolve().parents[1]
# What gets kernels into an environment that has the package without them: no cached wheel, no "already satisfied", and
# no other torch.
AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation PATH-TO-THE-SOURCES"
SWITCHES = ("GRADREP_BUILD", "GRADREP_CUDA", "GRADREP_BACKEND", "PYTHONPATH", "TRITON_INTERPRET")


def environment(**changes: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k not in SWITCHES}, "GRADREP_CUDA": "0", **changes}


def run(*command, env, cwd, ok=True) -> str:
    done = subprocess.run([str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a fresh checkout has: no build outputs."""
    copy = tmp_path_factory.mktemp("checkout") / "gradrep_kernels"
    ignored = shutil.ignore_patterns(
        "*.so",
        "_build.json",
        "__pycache__",
        "*.egg-info",
        ".git",
        ".venv",
        "build",
        "dist",
        "site",
        "runs",
        ".*_cache",
        ".hypothesis",
        "results",
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    """The sdist, and the wheel built from the unpacked sdist (not from the checkout)."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out, env=environment(GRADREP_BUILD="none"), cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    env = environment(GRADREP_BUILD="none")
    if builds.cpp_compiler():  # what is in the wheel depends neither on -O3 nor on all kernels: 60 s less
        for file in unpacked.glob("csrc/*_cpu.cpp"):
            if file.name != "pair_ranges_cpu.cpp":
                file.unlink()
        env = environment(GRADREP_BUILD="require", CXX=builds.compiler_with(out, "-O0"))
    command = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", out, unpacked)
    run(*command, env=env, cwd=out)
    return out


def names_in_sdist(built: Path) -> set[str]:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {member.name.split("/", 1)[1] for member in archive if member.isfile()}


SHIPPED = {
    # folder of the sdist: the kinds of files that must all be there
    "csrc": (".cpp", ".h", ".cu"),
    "gradrep_kernels": (".py", ".typed"),
    "tests": (".py", ".cpp"),
    "bench": (".py",),
    "docs": (".md", ".png", ".svg"),
    "examples": (".py",),
}
PAGES = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "NOTICE"}


@pytest.mark.parametrize("folder", SHIPPED)
def test_sdist_holds_what_a_build_its_tests_and_its_pages_need(built, source, folder):
    files = {p.relative_to(source).as_posix() for p in (source / folder).rglob("*") if p.suffix in SHIPPED[folder]}
    assert files
    assert files <= names_in_sdist(built)


def test_sdist_holds_the_files_of_the_root(built):
    assert PAGES | {"setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "mkdocs.yml"} <= names_in_sdist(built)


def test_sdist_holds_nothing_that_was_built(built):
    names = names_in_sdist(built)
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]
    top = {name.partition("/")[0] for name in names if "/" in name}
    assert top == {*SHIPPED, "gradrep_kernels.egg-info"}  # setuptools writes the last; no site, runs, build, .venv


@pytest.mark.skipif(builds.cpp_compiler() is None, reason="no C++ compiler")
def test_wheel_serves_every_python_from_3_10(built):
    (wheel,) = built.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert (
        [name for name in names if name.endswith(".so")]
        == [name for name in names if name.startswith("gradrep_kernels/_C.") and ".abi3." in name]
        != []
    )


def test_wheel_holds_the_package_alone(built, source):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"gradrep_kernels", next(name for name in folders if name.endswith(".dist-info"))}
    modules = {p.relative_to(source).as_posix() for p in (source / "gradrep_kernels").rglob("*.py")}
    expected = modules | {"gradrep_kernels/py.typed", "gradrep_kernels/_build.json"}
    assert {n for n in names if n.startswith("gradrep_kernels/") and not n.endswith(".so")} == expected


def metadata_of(built: Path) -> metadata.Metadata:
    """Parsed as an index parses it: a field that is wrong or unknown raises."""
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return metadata.Metadata.from_email(archive.read(name), validate=True)


def test_metadata_of_the_wheel_is_valid_and_whole(built, source):
    found = metadata_of(built)
    assert found.description.strip() == (source / "README.md").read_text(encoding="utf-8").strip()
    assert found.description_content_type == "text/markdown"
    assert {requirement.name for requirement in found.requires_dist if requirement.marker is None} == {"torch", "numpy"}
    assert {"recipes", "docs", "dev"} <= set(found.provides_extra)
    assert len(found.classifiers) == len(set(found.classifiers)) > 5
    assert not [classifier for classifier in found.classifiers if classifier.startswith("License ::")]


def test_both_papers_are_named_wherever_the_package_says_where_it_comes_from(built, source):
    """Metadata, README and citation name the same papers and the same code."""
    urls = set(metadata_of(built).project_urls.values())
    assert len(urls) == 4
    for file in ("README.md", "CITATION.cff"):
        text = (source / file).read_text(encoding="utf-8")
        assert not [url for url in urls if url not in text], file


def test_citation(source):
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((source / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == gradrep_kernels.__version__
    assert citation["authors"] == [{"name": "The gradrep_kernels authors"}]
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= set(reference)
        assert reference["identifiers"][0]["value"] == f"arXiv:{reference['url'].rpartition('/')[2]}"


def record_of(wheel: Path) -> dict[str, str]:
    return json.loads(zipfile.ZipFile(wheel).read("gradrep_kernels/_build.json"))


def test_wheel_says_what_was_built(built):
    (wheel,) = built.glob("*.whl")
    if builds.cpp_compiler() is None:
        expected = {"GRADREP_BUILD": "none", "_C": "GRADREP_BUILD=none", "_C_cuda": "GRADREP_BUILD=none"}
    else:
        expected = {"GRADREP_BUILD": "require", "_C": "built", "_C_cuda": "GRADREP_CUDA=0"}
    assert record_of(wheel) == expected


def test_wheel_names_its_license(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    files = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    assert re.search(r"^License(-Expression)?: MIT$", archive.read(files["METADATA"]).decode(), re.MULTILINE)
    assert "LICENSE" in files


def bare_environment(folder: Path) -> Path:
    """A new virtual environment that sees this one's torch and numpy, but not its gradrep_kernels."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Folders named in a .pth file are searched, but their own .pth files (editable installs) are not read.
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


TRAIN = """
import torch, gradrep_kernels as gr
from gradrep_kernels.ops import backends
print("installed in", gr.__file__)
torch.manual_seed(0)
conv = torch.nn.Conv2d(1, 4, 3, padding=1)
model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 2))
mults = {conv.weight: gr.GradMult(torch.full((4, 1, 3, 3), 2.0))}
optimizer = gr.FusedRepSGD(gr.param_groups(model, 1e-4), lr=0.1, momentum=0.9, grad_mults=mults)
x, y = torch.randn(16, 1, 4, 4), torch.arange(16) % 2
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(float(loss))
assert losses[-1] < 0.2 < losses[0], losses
for row in backends.report(("cpu",)):
    print(row["op"], row["serves"], "|", row["cpp"])
try:
    with gr.use_backend("cpp"):
        optimizer.step()
except RuntimeError as error:
    print("asked for:", error)
"""


def test_install_without_a_compiler_works_and_says_why(source, tmp_path):
    python = bare_environment(tmp_path / "venv")
    env = environment(PATH=str(tmp_path / "venv" / "bin"), CXX="")
    told = run(python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", source, env=env, cwd=tmp_path)
    assert "GRADREP_BUILD=require shows the whole error" in told
    assert re.search(r"filename=gradrep_kernels-\S+-py3-none-any\.whl", told)  # it must not pass for one with kernels
    output = run(python, "-c", TRAIN, env=env, cwd=tmp_path)
    assert str(tmp_path / "venv") in output
    assert "rep_sgd_step reference | gradrep_kernels._C is not usable (ModuleNotFoundError" in output
    assert "asked for: backend 'cpp' was asked for, but cannot serve rep_sgd_step on cpu" in output
    assert f"GRADREP_BUILD=require {AGAIN}" in output
    assert output.count("UserWarning: CPU tensors are computed by plain torch") == 1
    said = "gradrep_kernels._C is not built (the build failed with "
    assert said in output
    second_line = run(python, "-m", "gradrep_kernels", "env", env=env, cwd=tmp_path).splitlines()[1]
    assert second_line.startswith(f"compiled         {said.removeprefix('gradrep_kernels.')}")
    assert f"GRADREP_BUILD=require {AGAIN}. _C_cuda is not built (GRADREP_CUDA=0)" in second_line


def test_require_fails_loudly_without_a_compiler(source, tmp_path):
    python = bare_environment(tmp_path / "venv")
    env = environment(PATH=str(tmp_path / "venv" / "bin"), CXX="", GRADREP_BUILD="require")
    told = run(python, "setup.py", "-q", "bdist_wheel", "-d", tmp_path, env=env, cwd=source, ok=False)
    assert "g++" in told or "c++" in told


def test_install_without_torch_tells_how_to_get_the_kernels(source, tmp_path):
    python = bare_environment(tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.py").write_text("raise ImportError('no torch in this test')")
    told = run(python, "setup.py", "--version", env=environment(), cwd=source)
    assert f"pip install torch, then {AGAIN}" in told


NO_KERNELS = {
    # switch of the build: what the record says of each module
    "auto": "torch was not importable in the build environment: no torch in this test",
    "none": "GRADREP_BUILD=none",
}


@pytest.mark.parametrize("switch", NO_KERNELS)
def test_a_build_without_kernels_records_why(source, tmp_path, switch):
    """The first without torch, as in an isolated build."""
    expected = {"GRADREP_BUILD": switch, "_C": NO_KERNELS[switch], "_C_cuda": NO_KERNELS[switch]}
    python = bare_environment(tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.py").write_text("raise ImportError('no torch in this test')")
    env = environment(GRADREP_BUILD=switch)
    wheel = ("build", "--build-base", tmp_path / "build", "bdist_wheel", "-d", tmp_path)
    run(python, "setup.py", "-q", *wheel, env=env, cwd=source)
    (made,) = tmp_path.glob("*-py3-none-any.whl")
    assert record_of(made) == expected
    in_place = source / "gradrep_kernels" / "_build.json"
    assert not in_place.exists()
    run(python, "setup.py", "-q", "build_ext", "--inplace", env=env, cwd=source)
    assert json.loads(in_place.read_text()) == expected
    in_place.unlink()


CUDA_ASKED_FOR = {
    # switches besides GRADREP_CUDA: whether the build goes on, what it says
    "required": (
        dict(GRADREP_CUDA="1", GRADREP_BUILD="require"),
        False,
        "GRADREP_CUDA=1, but _C_cuda cannot be built: nvcc is not found; set CUDA_HOME",
    ),
    "wanted": (dict(GRADREP_CUDA="1"), True, "_C_cuda is not built: nvcc is not found"),
    "if it can be": (dict(GRADREP_CUDA="auto"), True, ""),
}


@pytest.mark.parametrize("case", CUDA_ASKED_FOR)
def test_cuda_without_nvcc(source, tmp_path, case):
    """Loud when asked for, quiet when absent."""
    switches, goes_on, says = CUDA_ASKED_FOR[case]
    told = run(
        sys.executable,
        "setup.py",
        "--version",
        env=environment(CUDA_HOME=str(tmp_path), **switches),
        cwd=source,
        ok=goes_on,
    )
    assert says in told
    assert bool(says) == ("_C_cuda" in told)


def test_a_cuda_build_that_fails_does_not_lose_the_cpu_kernels(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "nvcc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo release 13.0 || { echo 'ptxas: out of order'; exit 1; }\n")
    broken.chmod(0o755)
    for file in copy.glob("csrc/*_cpu.cpp"):  # module.cpp is left, which is compiled at once
        file.unlink()
    env = environment(CUDA_HOME=str(tmp_path), GRADREP_CUDA="1")
    told = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", env=env, cwd=copy)
    assert "gradrep_kernels._C_cuda could not be built (RuntimeError: nvcc failed on " in told
    assert [file.name for file in copy.glob("gradrep_kernels/*.so")] == ["_C.abi3.so"]
    record = json.loads((copy / "gradrep_kernels" / "_build.json").read_text())
    assert record.pop("_C_cuda").startswith("the build failed with RuntimeError: nvcc failed on ")
    assert record == {"GRADREP_BUILD": "auto", "_C": "built"}
    told = run(
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
        env={**env, "GRADREP_BUILD": "require"},
        cwd=copy,
        ok=False,
    )
    assert "ptxas: out of order" in told


# Each waits for the other's first compilation: the build gets past both only where they run side by side.
SIDE_BY_SIDE = """#!/bin/sh
case "$*" in *" -c "*csrc/*) ;; *) {otherwise};; esac
touch {here}/{own}
for n in $(seq 600); do [ -e {here}/{other} ] && break; sleep 0.1; done
[ -e {here}/{other} ] || exit 1
{then}
"""


def test_both_modules_are_compiled_side_by_side(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "source")
    for file in copy.glob("csrc/*_cpu.cpp"):  # module.cpp is left, which is compiled at once
        file.unlink()
    (tmp_path / "bin").mkdir()
    compile_it = f'exec {shutil.which("g++")} "$@"'
    scripts = {
        "nvcc": dict(own="nvcc", other="g++", otherwise="echo release 13.0; exit 0", then="echo ptxas met g++; exit 1"),
        "g++": dict(own="g++", other="nvcc", otherwise=compile_it, then=compile_it),
    }
    for name, parts in scripts.items():
        script = tmp_path / "bin" / name
        script.write_text(SIDE_BY_SIDE.format(here=tmp_path, **parts))
        script.chmod(0o755)
    switches = dict(GRADREP_CUDA="1", GRADREP_BUILD="require", MAX_JOBS="2")
    env = environment(CUDA_HOME=str(tmp_path), CXX=str(tmp_path / "bin" / "g++"), **switches)
    told = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", env=env, cwd=copy, ok=False)
    assert "ptxas met g++" in told


@pytest.mark.parametrize("switch", ["GRADREP_BUILD", "GRADREP_CUDA"])
def test_unknown_switch(source, switch):
    told = run(sys.executable, "setup.py", "--version", env=environment(**{switch: "sometimes"}), cwd=source, ok=False)
    assert f"{switch} must be one of auto" in told


def test_unknown_backend():
    """Told at the first op: an import that raises could not be mended in the process."""
    code = "from gradrep_kernels.ops import backends; backends.implementation('pair_ranges', 'cpu')"
    told = run(sys.executable, "-c", code, env=environment(GRADREP_BACKEND="gpu"), cwd=ROOT, ok=False)
    assert "GRADREP_BACKEND must be one of auto, reference, cpp, triton, cuda, got 'gpu'" in told
