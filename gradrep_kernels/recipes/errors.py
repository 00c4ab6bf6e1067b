"""Errors that a user of the commands can put right.

The command line shows one line, with exit status 2.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["InputError", "extra"]


class InputError(ValueError):
    """An option, a file or a folder is not what it should be.

    The message says which and why.
    """


def extra(module: str, package: str) -> ModuleType:
    """Import an optional dependency.

    Raises InputError, saying what to install, where it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as reason:
        raise InputError(f"this needs {package}: pip install 'gradrep_kernels[recipes]' ({reason})") from None
