"""Versions, devices, and the implementation of each op.

Bug reports and results carry them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradrep_kernels.messages import counted
from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.version import __version__

__all__ = ["commit", "environment", "environment_text", "software", "version_line", "versions"]

_CHECKOUT = Path(__file__).resolve().parents[2]

_PACKAGES = ("torch", "numpy", "triton", "scikit-learn", "pillow", "matplotlib", "tqdm")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = _CHECKOUT, but: str | None = None) -> str:
    """The commit of a checkout, that of this package by default, or GRADREP_COMMIT, or "unknown".

    It ends with -dirty where a file differs, unless the file lies in the folder `but`.
    """
    unknown = os.environ.get("GRADREP_COMMIT") or "unknown"
    if not (root / ".git").exists():  # git would describe a checkout that an installed package lies in
        return unknown

    def git(*arguments: str) -> subprocess.CompletedProcess:
        # A checkout may belong to somebody else (in a container), which git refuses unless told.
        command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:
        described = git("describe", "--always", "--exclude=*")
        differs = git("diff", "--quiet", "HEAD", "--", ".", *([f":(exclude){but}"] if but else []))
    except (OSError, subprocess.SubprocessError):
        return unknown
    if described.returncode or not described.stdout.strip():
        return unknown
    return described.stdout.strip() + "-dirty" * bool(differs.returncode)


def software(summary: Mapping[str, Any]) -> str:
    """The version of torch, and the commit of the code where it is known. Earlier summaries have none."""
    known = summary.get("commit", "unknown")
    return f"torch {summary['versions']['torch']}" + ("" if known == "unknown" else f", commit {known}")


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and the packages it uses.

    None for one that is not installed.
    """
    return {
        "gradrep_kernels": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def version_line() -> str:
    """This package, torch, and which compiled modules are loaded."""
    loaded = [name for name, state in backends.compiled().items() if state.startswith("is loaded")]
    return f"gradrep_kernels {__version__}, torch {torch.__version__}, compiled: {', '.join(loaded) or 'nothing'}"


def environment() -> dict[str, Any]:
    """All of `python -m gradrep_kernels env`, as plain data.

    Raises InputError where GRADREP_BACKEND names no backend.
    """
    try:
        forced = backends.forced()
    except ValueError as reason:
        raise InputError(str(reason)) from None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    gpus = [torch.cuda.get_device_properties(n) for n in devices]
    return {
        "versions": versions(),
        "compiled": backends.compiled(),
        "platform": platform.platform(),
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": {
            "built": torch.version.cuda,
            "devices": [
                {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory} for gpu in gpus
            ],
        },
        "backend": forced,
        "ops": [{**_as_forced(row, forced), "meaning": OPS[row["op"]].meaning} for row in backends.report()],
    }


def _as_forced(row: dict[str, str], forced: str) -> dict[str, str]:
    """A row of `backends.report` in which only the backend that is forced is available."""
    if forced == "auto":
        return row
    others = {name for name in backends.NAMES[1:] if name != forced and row[name] == "available"}
    return {name: f"{forced} is asked for" if name in others else said for name, said in row.items()}


def environment_text(facts: dict[str, Any]) -> str:
    """The result of `environment()` for people, one fact a line."""
    cpu, cuda = facts["cpu"], facts["cuda"]
    built = (
        "torch is built without it"
        if cuda["built"] is None
        else f"{cuda['built']}, {counted(len(cuda['devices']), 'device')}"
    )
    lines = [_line(name, version or "not installed") for name, version in facts["versions"].items()]
    # Second, since it explains most of what is slow.
    lines.insert(1, _line("compiled", ". ".join(f"{module} {state}" for module, state in facts["compiled"].items())))
    lines += [
        _line("platform", facts["platform"]),
        _line("CPU", f"{counted(cpu['cores'], 'core')}, {counted(cpu['threads'], 'thread')}, {cpu['instructions']}"),
        _line("CUDA", built),
    ]
    for gpu in cuda["devices"]:
        capability, memory = gpu["capability"].replace(".", ""), f"{gpu['memory'] / 2**30:.0f} GiB"
        lines.append(_line("", f"{gpu['name']}, sm_{capability}, {memory}"))
    lines.append(_line("backend", f"{facts['backend']} ({_who_forces(facts['backend'])})"))
    for op in dict.fromkeys(row["op"] for row in facts["ops"]):
        rows = [row for row in facts["ops"] if row["op"] == op]
        lines += ["", f"{op}: {rows[0]['meaning']}"]
        for row in rows:
            lines.append(f"  {row['device']:<5} {row['serves']}")
            refusing = [
                name
                for name in backends.NAMES[1:]
                if row[name] not in ("available", row["serves"].removeprefix("none: "))
            ]
            lines += [f"        not {name}: {row[name]}" for name in refusing]
    return "\n".join(lines)


def _who_forces(backend: str) -> str:
    if backend == "auto":
        return "GRADREP_BACKEND or gr.use_backend forces another"
    return f"forced by {'GRADREP_BACKEND' if os.environ.get('GRADREP_BACKEND') == backend else 'gr.use_backend'}"


def _line(name: str, fact: str) -> str:
    return f"{name:<16} {fact}"
