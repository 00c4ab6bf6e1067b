"""Versions, devices, and who computes what: for bug reports and beside every result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from gradrep_kernels.ops import backends
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.version import __version__

__all__ = ["environment", "environment_text", "versions"]

_PACKAGES = ("torch", "numpy", "triton", "scikit-learn", "pillow", "matplotlib", "tqdm")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """None for a package that is not installed."""
    return {
        "gradrep_kernels": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def environment() -> dict[str, Any]:
    """All of `python -m gradrep_kernels env`, as plain data."""
    gpus = (
        [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return {
        "versions": versions(),
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
        "backend": backends.forced(),
        "ops": [{**row, "meaning": OPS[row["op"]].meaning} for row in backends.report()],
    }


def environment_text(found: dict[str, Any]) -> str:
    """`environment()` for people: one fact a line."""
    lines = [f"{name:<16} {version or 'not installed'}" for name, version in found["versions"].items()]
    cpu, cuda = found["cpu"], found["cuda"]
    lines += [
        f"{'platform':<16} {found['platform']}",
        f"{'CPU':<16} {cpu['cores']} cores, {cpu['threads']} threads, {cpu['instructions']}",
        f"{'CUDA':<16} {'torch is built without it' if cuda['built'] is None else cuda['built'] + ', ' + (str(len(cuda['devices'])) + ' devices')}",
    ]
    lines += [
        f"{'':<16} {gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory'] / 2**30:.0f} GiB"
        for gpu in cuda["devices"]
    ]
    lines += [f"{'backend':<16} {found['backend']} (GRADREP_BACKEND or gr.use_backend)"]
    for op in dict.fromkeys(row["op"] for row in found["ops"]):
        rows = [row for row in found["ops"] if row["op"] == op]
        lines += ["", f"{op}: {rows[0]['meaning']}"]
        for row in rows:
            lines.append(f"  {row['device']:<5} {row['serves']}")
            lines += [
                f"        not {name}: {row[name]}" for name in backends.NAMES[1:] if row[name] not in ("available",)
            ]
    return "\n".join(lines)
