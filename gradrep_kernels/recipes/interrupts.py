"""Ctrl-C that is never lost.

Python prints and drops an exception that is raised while an object is being destroyed: a generator that closes, a
callback of a weak reference, a `__del__`. A KeyboardInterrupt that hits such a moment would let a training go on.
One that is raised while a C++ module begins can end the process by std::terminate: Triton's makes its enums by a call
of Python that must not fail.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["asked", "check", "held_back", "kept_from_children", "noted"]

_ONE_PRESS = 1.0
"""Seconds within which signals are one: `timeout -s INT` sends its own twice, to the process and to its group."""

_first: float | None = None  # when this process was asked to stop
_held_back = False  # whether a block runs that must not be torn


def asked() -> bool:
    """Whether there was a Ctrl-C since `noted` began."""
    return _first is not None


def check() -> None:
    """Raise KeyboardInterrupt if there was a Ctrl-C. Loops call it at every turn."""
    if _first is not None:
        raise KeyboardInterrupt


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Note each Ctrl-C inside the block, so that `check` raises one that Python dropped.

    The first raises KeyboardInterrupt, as ever. A second one, later than a second after it, ends the process at once:
    what the first began to wait for may never come. Nothing changes outside the main thread, and where the signal is
    ignored or somebody else's.
    """
    global _first
    _first = None
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if dropped.exc_type is KeyboardInterrupt else hook(dropped)
    try:
        signal.signal(signal.SIGINT, _note)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook


def _note(*_: object) -> None:
    global _first
    if _first is None:
        _first = time.monotonic()
        if not _held_back:
            raise KeyboardInterrupt
    elif time.monotonic() - _first > _ONE_PRESS:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let a Ctrl-C that `noted` notes wait for the end of the block, and raise it there."""
    global _held_back
    _held_back = True
    try:
        yield
    finally:
        _held_back = False
    check()


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Start processes inside the block that never get a Ctrl-C. This one does.

    A terminal sends it to all processes, also to those that have not come to ignoring it, and their parent is who ends
    them. Where signals cannot be blocked, nothing is done.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
