"""Run files of tests in Triton's interpreter, in processes of their own.

TRITON_INTERPRET must be set before Triton is imported. One process imports torch, Triton and the package once (4 s of
CPU time), and forks for each file.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import fast_interpreter
import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1200  # seconds for a file


def run(file: str, folder: str = "ops") -> None:
    """Fail with the output of `pytest tests/<folder>/<file>` if that fails, or if it ran nothing."""
    server = _server()
    with tempfile.NamedTemporaryFile("r") as output:
        server.stdin.write(f"{ROOT / 'tests' / folder / file}\t{output.name}\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        if status != "0":
            pytest.fail(f"{file} in the interpreter: {status or 'the process died'}\n{output.read()}", pytrace=False)


@functools.cache
def _server() -> subprocess.Popen:
    """The process that interprets. It ends with this one, which waits for it, so that its time counts as this one's."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "GRADREP_BACKEND": "auto"}
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # closes its standard input
    return server


# ---- in the process that interprets


def serve() -> None:
    """For each line (file, where its output goes) on standard input, write pytest's exit status to standard output."""
    from gradrep_kernels.ops import triton  # noqa: F401 (not in the process that asks)

    fast_interpreter.use()
    for line in sys.stdin:
        file, output = line.rstrip("\n").split("\t")
        child = os.fork()
        if not child:
            _test(file, output)
        print(_status(child), flush=True)


def _status(child: int) -> str:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"{LIMIT} seconds were not enough" if status == -signal.SIGALRM else str(status)


def _test(file: str, output: str) -> None:
    """Run a file of tests, and end this process."""
    signal.alarm(LIMIT)
    with open(output, "w") as where:
        os.dup2(where.fileno(), 1)
        os.dup2(where.fileno(), 2)
        status = pytest.main(["-p", "no:cacheprovider", "-W", "ignore:invalid value:RuntimeWarning", file])
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
