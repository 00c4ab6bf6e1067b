"""pytest's side of the benches: options, one result file per bench module, the table at the end."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from harness import ROOT, Setup, cores, thread_count
from report import Results

_results = pytest.StashKey[dict[str, Results]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gradrep_kernels benches")
    group.addoption("--quick", action="store_true", help="small sizes, few rounds: shows that the bench runs")
    group.addoption(
        "--results", type=Path, help="results go to RESULTS/DEVICE (default bench/results; with --quick runs/bench)"
    )
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    group.addoption("--seconds", type=float, help="for each comparison, about (default 4; with --quick 0.05)")
    group.addoption(
        "--threads",
        help="comma-separated numbers of CPU threads (default 1,2 as far as there are cores; with --quick 1)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_results] = {}


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU here")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def _threads(config: pytest.Config) -> list[int]:
    given = config.getoption("--threads")
    if _device(config).type == "cuda":
        return [torch.get_num_threads()]
    if given:
        return [int(n) for n in given.split(",")]
    return [n for n in ((1,) if config.getoption("--quick") else (1, 2)) if n <= cores()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", _threads(metafunc.config), ids=thread_count)


@pytest.fixture(scope="session")
def setup(pytestconfig: pytest.Config) -> Setup:
    quick = pytestconfig.getoption("--quick")
    folder = pytestconfig.getoption("--results") or (ROOT / "runs" / "bench" if quick else ROOT / "bench" / "results")
    seconds = pytestconfig.getoption("--seconds") or (0.05 if quick else 4.0)
    command = shlex.join(["python", "-m", "pytest", *pytestconfig.invocation_params.args])
    return Setup(_device(pytestconfig), quick, seconds, folder, command)


@pytest.fixture(scope="module")
def max_threads(pytestconfig: pytest.Config) -> int:
    return max(_threads(pytestconfig))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, setup: Setup):
    found = Results(request.module.__name__.removeprefix("bench_"), setup)
    request.config.stash[_results][request.module.__name__] = found
    return found


@pytest.fixture(autouse=True)
def _save_after_each(results: Results):
    torch.manual_seed(0)
    yield
    results.save()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and item.module.__name__ in item.config.stash[_results]:
        item.config.stash[_results][item.module.__name__].fail(item.name)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    chosen = any("::" in argument for argument in session.config.args) or bool(
        reporter and reporter.stats.get("deselected")
    )
    for results in session.config.stash[_results].values():
        results.finish(whole=exitstatus == 0 and not chosen)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for results in config.stash[_results].values():
        if not results.is_empty:
            terminalreporter.write_line("")
            terminalreporter.write_line(results.markdown())
            terminalreporter.write_line(f"written: {results.path} and .md")
