"""The commands train, search and env: parse and call."""

from gradrep_kernels.cli.main import main

__all__ = ["main"]
