"""Processes for a test."""

from __future__ import annotations

from collections.abc import Callable

import torch.multiprocessing as mp

_METHOD = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"


def start_processes(function: Callable, arguments: tuple, number: int) -> None:
    """Call function(index, *arguments) in new processes, and raise what one of them raises.

    They are forks of a server that has imported torch, which takes 3.5 s of CPU time per process otherwise. The server
    has run nothing but imports, so its forks are as fresh as spawned processes are.
    """
    mp.set_forkserver_preload(["torch", "gradrep_kernels", "numpy", "pytest"])
    mp.start_processes(function, arguments, number, start_method=_METHOD)
