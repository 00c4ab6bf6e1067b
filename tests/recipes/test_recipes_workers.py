"""Steps in this process and in processes of their own: order, messages, and what ends badly."""

from __future__ import annotations

import os
import time

import pytest

from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.workers import Step, do_steps


class Heard:
    def __init__(self):
        self.batches, self.epochs = 0, []

    def batch(self):
        self.batches += 1

    def epoch(self, training, epoch, epochs, record):
        self.epochs.append((training, epoch, epochs, record))


def add(a, b, listener):
    listener.batch()
    listener.epoch("add", 1, 2, {"sum": a + b})
    return a + b


def process(seconds, listener):
    time.sleep(seconds)
    return os.getpid()


def wrong_input(listener):
    raise InputError("--lr is wrong")


def full_disk(listener):
    raise OSError(28, "No space left on device", "x.pt")


def fault(listener):
    raise ZeroDivisionError("by zero")


def gone(listener):
    os._exit(7)


def do(steps, workers, results=None):
    results, heard, order = {} if results is None else results, Heard(), []
    do_steps(steps, results, workers, heard, lambda name, result: order.append(name))
    return results, heard, order


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_get_the_results_of_those_before_them(workers):
    results = {"given": 10}
    steps = [
        Step("sum", ("five", "given"), lambda: (add, (results["five"], results["given"])), 9),
        Step("five", (), lambda: (add, (2, 3)), 1),
        Step("given", (), lambda: (fault, ()), 5),
    ]
    _, heard, order = do(steps, workers, results)
    assert results == {"five": 5, "sum": 15, "given": 10}
    assert order == ["five", "sum"]
    assert heard.batches == 2
    assert heard.epochs == [("add", 1, 2, {"sum": 5}), ("add", 1, 2, {"sum": 15})]


def test_the_longest_that_can_begin_goes_first():
    steps = [
        Step(name, needs, lambda: (add, (1, 1)), cost)
        for name, needs, cost in (("short", (), 1), ("long", (), 3), ("last", ("short",), 5), ("middle", (), 2))
    ]
    assert do(steps, 1)[2] == ["long", "middle", "short", "last"]


def test_several_processes_work_at_a_time():
    steps = [Step(f"s{n}", (), lambda: (process, (0.5,)), 1) for n in range(4)]
    results, _, _ = do(steps, 2)
    assert len(set(results.values())) == 2
    assert os.getpid() not in results.values()
    assert set(do(steps, 1)[0].values()) == {os.getpid()}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("function", "error", "said"),
    [(wrong_input, InputError, "--lr is wrong"), (full_disk, OSError, "No space left .*x.pt")],
)
def test_errors_of_users_and_of_the_disk_arrive_as_they_were(function, error, said, workers):
    steps = [Step("bad", (), lambda: (function, ()), 1), Step("slow", (), lambda: (process, (30,)), 2)]
    if workers == 1:
        steps.pop()
    start = time.monotonic()
    with pytest.raises(error, match=said):
        do([*steps, Step("never", ("bad",), lambda: (add, (1, 1)), 1)], workers)
    assert time.monotonic() - start < 25  # The others are ended, not waited for.


def test_a_fault_in_a_process_arrives_with_its_traceback():
    steps = [Step(name, (), lambda: (fault, ()), 1) for name in "ab"]
    with pytest.raises(RuntimeError, match=r"(?s)worker process.*in fault.*ZeroDivisionError: by zero"):
        do(steps, 2)


def test_a_process_that_is_gone_is_told():
    steps = [Step(name, (), lambda: (gone, ()), 1) for name in "ab"]
    with pytest.raises(InputError, match=r"the process that did [ab] ended with status 7 .*--resume goes on"):
        do(steps, 2)
