"""Progress of a job as a person sees it: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import TextIO

__all__ = ["Reporter"]

QUIET_SECONDS = 10.0
"""Without a bar, the line of an epoch is printed only after so long a silence."""


def _tqdm() -> ModuleType | None:
    try:
        import tqdm
    except ImportError:
        return None
    return tqdm


class Reporter:
    """Writes lines and progress to `stream`, standard error by default. One that is `silent` writes nothing."""

    def __init__(self, stream: TextIO | None = None, *, silent: bool = False):
        self.stream = stream or sys.stderr
        self.silent = silent
        self._tqdm = _tqdm() if self.stream.isatty() and not silent else None
        self._bar = None
        self._last = time.monotonic()

    def start(self, batches: int, done: int) -> None:
        """Begin the bar of a job of so many `batches`. A resumed job has `done` some before."""
        if self._tqdm is not None:
            self._bar = self._tqdm.tqdm(
                total=batches, initial=done, file=self.stream, unit="batch", dynamic_ncols=True, leave=False
            )

    def doing(self, what: str) -> None:
        """Say on the bar what is being done."""
        if self._bar is not None:
            self._bar.set_description(what)

    def batch(self) -> None:
        """Count one more batch."""
        if self._bar is not None:
            self._bar.update()

    def epoch(self, text: str) -> None:
        """Report an epoch that is done, if there was no line for a while."""
        if self._bar is None and time.monotonic() - self._last > QUIET_SECONDS:
            self.line(text)

    def line(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        elif not self.silent:
            print(text, file=self.stream, flush=True)
        self._last = time.monotonic()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
