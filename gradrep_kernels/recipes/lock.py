"""A lock on the folder of a run, so that no two processes run it.

The system releases it with any death of the process. Where it has no such locks (Windows, some network file systems),
there is none.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.files import writing

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock"]

_FILE = ".running"
"""It holds the process's number. A killed process leaves it, without its lock."""


class Lock:
    """The lock on a folder, from `take` to `release`.

    Python's files are closed in programs that it starts, so the worker processes of a run do not hold it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._held: BinaryIO | None = None

    def take(self) -> None:
        """Take it.

        Raises InputError, naming the process, where a living one holds it. Raises OutputError where the folder cannot
        be written.
        """
        if fcntl is None:
            return
        path = self.folder / _FILE
        while True:
            with writing(path):
                held = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with held:
                    number = held.read().decode(errors="replace")
                # Empty between taking the lock and writing the number.
                who = f"process {number}" if number.isdigit() else "another process"
                raise InputError(f"{self.folder} is being run by {who}; wait for it or stop it") from None
            except OSError:  # a file system without locks
                held.close()
                path.unlink(missing_ok=True)
                return
            # Who held it may have removed the file since it was opened. Without its name the lock keeps nobody out.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(held.fileno()), path.stat()):
                    break
            held.close()
        self._held = held
        with contextlib.suppress(OSError):  # On a full disk it locks all the same.
            held.truncate(0)
            held.write(str(os.getpid()).encode())

    def release(self) -> None:
        """Release it, if it is held, and remove its file."""
        if self._held is not None:
            with contextlib.suppress(OSError):
                (self.folder / _FILE).unlink()
            self._held.close()
            self._held = None
