"""Errors that a user of the commands can put right.

The command line shows one line, with exit status 2.
"""

from __future__ import annotations

import errno
import importlib
from types import ModuleType

__all__ = ["WRITE_ERRORS", "InputError", "OutputError", "extra", "one_line"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITE_ERRORS = (*_NO_ROOM, errno.EROFS, errno.EIO)
"""What the system says of writes alone."""


class InputError(ValueError):
    """An option, a file or a folder is not what it should be.

    The message says which and why.
    """


class OutputError(InputError):
    """A file of a run cannot be written. `--resume` goes on once it can be.

    Both arguments are text and stand in `args`, so that it pickles from one process to another.
    """

    def __init__(self, path: str, reason: str, until: str = "it can be"):
        super().__init__(path, reason, until)

    @classmethod
    def of(cls, path: object, reason: OSError) -> OutputError:
        """For what the system said of a write."""
        until = "there is room" if reason.errno in _NO_ROOM else "it can be"
        return cls(str(path), reason.strerror or str(reason), until)

    @property
    def reason(self) -> str:
        """What the system said."""
        return self.args[1]

    def __str__(self) -> str:
        path, reason, until = self.args
        return f"{path} cannot be written: {reason}; --resume goes on once {until}"


def one_line(reason: BaseException) -> str:
    """What an error of another library says, in one line."""
    return " ".join(str(reason).split()) or type(reason).__name__


def extra(module: str, package: str) -> ModuleType:
    """Import an optional dependency.

    Raises InputError, saying what to install, where it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as reason:
        raise InputError(f"this needs {package}: pip install 'gradrep_kernels[recipes]' ({reason})") from None
