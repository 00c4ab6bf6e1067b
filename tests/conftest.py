"""A CUDA error that sticks fails the test that caused it, and the process ends: each later test would fail with it.

Kernels run on after the call that launched them. So the device is waited for in each phase of a test marked `gpu`.
A worker of pytest-xdist leaves by os._exit: xdist names the test and starts another worker. Elsewhere the session ends
with exit status DEVICE_LOST. GRADREP_TESTS_DONE names a file of finished tests. They are left out, and each that
finishes is added: bench/gpu_check.py starts pytest again with it. A process that has not used CUDA looks at a flag.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest

with contextlib.suppress(ModuleNotFoundError):  # tests/support is not beside a copy of this file
    import torchvision_alone  # noqa: F401 (timm, Lightning and torchmetrics import torchvision where it is installed)

DEVICE_LOST = 86  # pytest itself ends with 0 to 5; bench/gpu_check.py knows the number
_lost = pytest.StashKey[bool]()


def _wait_for_the_device(item: pytest.Item) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        item.config.stash[_lost] = True
        raise


def _phase(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        if item.get_closest_marker("gpu") and _lost not in item.config.stash:
            _wait_for_the_device(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item):
    return (yield from _phase(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item):
    return (yield from _phase(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item):
    return (yield from _phase(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    """The reports are out when the process leaves, and xdist does not yet take the test for done."""
    ran = yield
    if _lost in item.config.stash:
        if hasattr(item.config, "workerinput"):
            os._exit(DEVICE_LOST)
        item.session.shouldstop = f"a CUDA error ended the tests: {item.nodeid}"
    return ran


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Everything is written by now. Destructors that meet the error may abort, with a status of their own."""
    if _lost in config.stash:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            reporter.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(DEVICE_LOST)


@pytest.fixture(scope="session", autouse=True)
def _told_that_kernels_are_missing():
    """The package says so once in a process. Here it does before the tests, some of which want no warning."""
    backends = sys.modules.get("gradrep_kernels.ops.backends")
    if backends is None:
        return
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")
        backends.implementation("rep_sgd_step", "cpu")


# Parts of the names of tests that take more than about 3 s of CPU time each, or need a fixture that does: they run
# compilers, Triton's interpreter, or several processes that import torch.
SLOW = (
    "test_recipes_experiments",
    "interpreter",
    "test_sanitizers.py",
    "test_instruction_sets.py",
    "test_compile_gate",
    "test_cuda_pairs.py",
    "test_packaging.py",
    "test_distributed.py",
    "test_cli.py",
    "test_cpp_joint_histogram.py::test_drawn_cases",
    "test_triton_step_frame.py",
    "test_the_environment_forces",
    "test_the_step_is_one_graph",
    "test_the_whole_training_step",
    "test_multipliers_that_change_between_compiled_steps",
    "test_parameters_that_share_memory_are_stepped",
    "test_1500_parameters",
    "test_lightning",
    "test_wrappers_are_taken_off",
    "test_what_is_compiled_hears_nothing",
    "test_names_are_those_of_the_model_inside",
    "test_sgs_ranks.py",
    "test_sgs_sharded.py",
    "test_recipes_resume.py",
    "test_recipes_ranks.py",
    "test_recipes_steps.py::test_a_resumed_training_in_fp16",
    "test_recipes_steps.py::test_compiled_steps",
    "test_recipes_workers.py",
    "test_a_training_on_a_folder_ends",
    "test_trainings_in_processes_of_their_own_have_readers",
    "test_a_run_that_finds_no_room",
    "test_a_death_releases_the_lock",
    "test_an_update_takes_less_memory",
    "test_pictures_touch_no_global_setting",
    "test_bench.py::test_quick_form",
    "test_bench.py::test_a_selection_is_not_a_whole_run",
    "test_bench.py::test_gpu_check_goes_on",
    "test_bench.py::test_gpu_check_runs_what",
    "test_bench.py::test_gpu_check_runs_the_tests",
    "test_bench.py::test_gpu_check_takes_no_module",
    "test_bench.py::test_gpu_check_keeps_packages",
    "test_bench_tail.py::test_the_study_pairs",
    "test_lost_device.py",
    "test_first_gpu_run.py::test_the_probe_compiles",
    "test_first_gpu_run.py::test_every_op_is_called",
    "test_first_gpu_run.py::test_dry_run",
    "test_first_gpu_run.py::test_all_tests_are_collected",
    "test_first_gpu_run.py::test_study_compares",
    "test_examples.py",
    "test_docs.py::test_code_of_a_page[README",
    "test_docs.py::test_code_of_a_page[docs/howto/frameworks",
    "test_docs.py::test_code_of_a_page[docs/howto/scales",
)
COLLECTED = pytest.StashKey[list[pytest.Item]]()  # before any are left out


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    done = os.environ.pop("GRADREP_TESTS_DONE", None)  # a test may start pytest itself
    if done:
        config.pluginmanager.register(_Done(Path(done)))


class _Done:
    """Leaves out the tests that a file names; adds those that finish."""

    def __init__(self, file: Path):
        self._file = file
        self._before = set(file.read_text().splitlines()) if file.exists() else set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = [item for item in items if item.nodeid in self._before]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self._before]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        with self._file.open("a") as file:
            print(nodeid, file=file)
