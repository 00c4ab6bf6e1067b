"""The processor, and how many of its cores a job may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cores", "free_processes", "own_threads", "processor"]

_MOST = 8
"""Each process holds torch and the data: some 0.4 GB."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """The cores that this process may use, by its affinity and by the quota of its container.

    Under torchrun all processes of a machine get as many.
    """
    return max(1, _cores_of_all() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def own_threads() -> int:
    """The threads that this process computes with: OMP_NUM_THREADS, else the cores that it may use.

    torchrun sets it to 1 where nobody did, so it does not count there.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if "LOCAL_WORLD_SIZE" in os.environ or not wanted.isdecimal() or int(wanted) < 1:
        return cores()
    return min(int(wanted), cores())


def _cores_of_all() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, _QUOTA.read_text(encoding="ascii").split())
    except (OSError, ValueError):  # Not in a container, or "max": no quota.
        return allowed
    return max(1, min(allowed, quota // period))


def free_processes(threads: int, device: str) -> int:
    """How many processes of so many threads there are cores for. A GPU serves one."""
    if device != "cpu":
        return 1
    return min(max(1, cores() // max(1, threads)), _MOST)


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # no Linux
        pass
    return platform.processor() or platform.machine()
