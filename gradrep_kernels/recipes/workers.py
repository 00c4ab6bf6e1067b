"""Do the steps of a job, each after those that it needs, several at a time in processes of their own."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from gradrep_kernels.recipes import interrupts
from gradrep_kernels.recipes.errors import InputError

__all__ = ["Call", "Listener", "Step", "do_steps"]

Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments before the last one, which is a `Listener`. Both can be pickled."""


class Listener(Protocol):
    """Hears how the work goes."""

    def batch(self) -> None:
        """One more batch is done."""

    def epoch(self, training: str, epoch: int, epochs: int, record: Mapping[str, Any]) -> None:
        """Epoch `epoch` (from 1) of `epochs` is done, with its figures."""


@dataclass(frozen=True)
class Step:
    """A part of a job that one process does.

    `call` makes what is to be called, once the steps that it needs are done.
    """

    name: str
    needs: tuple[str, ...]
    call: Callable[[], Call]
    cost: float
    """How long it takes, in units of any kind. The longest that can begin goes first, so that no process waits long at
    the end."""


def do_steps(
    steps: Sequence[Step],
    results: MutableMapping[str, Any],
    workers: int,
    listener: Listener,
    done: Callable[[str, Any], None],
) -> None:
    """Do the steps that have no result yet, and enter theirs into `results`.

    With one worker they are done in this process. `done(name, result)` is called after each, in this process. An
    exception in a step ends all of them and is raised here.

    Raises:
        InputError: a process was killed from outside.
    """
    waiting = sorted((step for step in steps if step.name not in results), key=lambda step: -step.cost)
    workers = min(workers, len(waiting))

    def next_step() -> Step | None:
        for step in waiting:
            if all(need in results for need in step.needs):
                waiting.remove(step)
                return step
        return None

    def finish(name: str, result: Any) -> None:
        results[name] = result
        done(name, result)

    if workers <= 1:
        while (step := next_step()) is not None:
            function, arguments = step.call()
            finish(step.name, function(*arguments, listener))
        return
    with _processes(workers) as processes:
        at_work: dict[_Worker, str] = {}
        while True:
            interrupts.check()
            for worker in processes:
                if worker not in at_work and (step := next_step()) is not None:
                    worker.connection.send(step.call())
                    at_work[worker] = step.name
            if not at_work:
                return
            for worker in _wait_for(list(at_work)):
                kind, content = worker.receive(at_work[worker])
                if kind == "told":
                    method, given = content
                    getattr(listener, method)(*given)
                elif kind == "done":
                    finish(at_work.pop(worker), content)
                else:
                    raise content


class _Worker:
    """A process, and this end of the connection to it."""

    def __init__(self, context: Any):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))  # No daemon, which could have no readers.
        with interrupts.kept_from_children():
            self.process.start()
        theirs.close()  # So that the end of the process ends the connection.

    def receive(self, step: str) -> tuple[str, Any]:
        """The next message. Raises InputError if the process is gone."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise InputError(
                f"the process that did {step} ended with status {self.process.exitcode} (out of memory? --workers 1 "
                "takes the least); --resume goes on"
            ) from None


def _wait_for(workers: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have sent something or ended. Waits for the first."""
    of_connection = {worker.connection: worker for worker in workers}
    return [of_connection[connection] for connection in wait(list(of_connection))]


@contextlib.contextmanager
def _processes(count: int) -> Iterator[list[_Worker]]:
    context = multiprocessing.get_context("spawn")  # A fork of a process with threads may hang.
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            workers.append(_Worker(context))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.connection.close()


class _Teller:
    """A `Listener` in a worker: it passes everything on to the one in the parent."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def batch(self) -> None:
        self.connection.send(("told", ("batch", ())))

    def epoch(self, *given: Any) -> None:
        self.connection.send(("told", ("epoch", given)))


def _serve(connection: Connection) -> None:
    """Do what the parent sends until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent ends its workers.
    logging.disable(logging.WARNING)  # The parent has read the same data, and said what there is to say.
    teller = _Teller(connection)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, arguments = connection.recv()
            try:
                answer = ("done", function(*arguments, teller))
            except ConnectionError:
                raise
            except (InputError, OSError, MemoryError) as error:
                answer = ("failed", error)
            except Exception:  # It may hold what cannot be pickled, so its text is sent.
                answer = ("failed", RuntimeError(f"in a worker process:\n{traceback.format_exc()}"))
            connection.send(answer)
