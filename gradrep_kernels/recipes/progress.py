"""What a person sees while a job runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import TextIO

__all__ = ["Reporter"]

_QUIET_SECONDS = 10.0  # at most this long without a line where there is no bar


def _tqdm() -> ModuleType | None:
    try:
        import tqdm
    except ImportError:
        return None
    return tqdm


class Reporter:
    """Lines and progress to `stream` (standard error by default)."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self._tqdm = _tqdm() if self.stream.isatty() else None
        self._bar = None
        self._last = time.monotonic()

    def start(self, batches: int, done: int) -> None:
        """`batches` are the whole job's, of which `done` were done before (a resumed run)."""
        if self._tqdm is not None:
            self._bar = self._tqdm.tqdm(
                total=batches, initial=done, file=self.stream, unit="batch", dynamic_ncols=True, leave=False
            )

    def doing(self, what: str) -> None:
        if self._bar is not None:
            self._bar.set_description(what)

    def batch(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def epoch(self, text: str) -> None:
        """An epoch is done; worth a line only if there was none for a while."""
        if self._bar is None and time.monotonic() - self._last > _QUIET_SECONDS:
            self.line(text)

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)
        self._last = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
