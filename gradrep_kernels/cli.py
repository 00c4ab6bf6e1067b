"""The command line. Arguments become options, errors one line and an exit status."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from gradrep_kernels.csla import load_scales, save_scales
from gradrep_kernels.recipes import files, interrupts, ranks
from gradrep_kernels.recipes.costs.page import costs_page
from gradrep_kernels.recipes.costs.run import COSTS, costs_of_run
from gradrep_kernels.recipes.environment import environment, environment_text, version_line
from gradrep_kernels.recipes.errors import WRITE_ERRORS, InputError, OutputError
from gradrep_kernels.recipes.job import run_job
from gradrep_kernels.recipes.options.arguments import parsed
from gradrep_kernels.recipes.options.resolve import OPTIONS, resolve
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.quantization.report import closing_lines as quantized_lines
from gradrep_kernels.recipes.quantization.run import quantize
from gradrep_kernels.recipes.quantization.settings import chosen_settings
from gradrep_kernels.recipes.report import closing_lines, scales_line
from gradrep_kernels.recipes.runs import SCALES, Run, run_folder
from gradrep_kernels.recipes.shared_run import open_together
from gradrep_kernels.recipes.sweeps.run import Sweep, is_sweep, open_sweep, run_sweep, sweep_lines, sweep_options

__all__ = ["entry", "main"]

_WRONG_INPUT, _INTERRUPTED, _NOBODY_READS = 2, 130, 141  # the last two as shells tell SIGINT and SIGPIPE


def entry(prog: str = "gradrep") -> NoReturn:
    """Run the command line of this process, called `prog`, and end it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # It was closed by whoever started this.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # Names of files may be no UTF-8, and a terminal may know no ±.
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(prog=prog)
    except SystemExit as wanted:  # --help
        status = wanted.code
    status = _print("") or status
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # What is left is waiting for threads that read. A Ctrl-C shall end it, without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    ranks.leave(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None, prog: str = "gradrep") -> int:
    """Run a command and return its exit status.

    The status is 0, 1 where CSLA = GR did not hold or the search of `train` diverged, 2 for wrong input, a `search`
    that diverged, and files that cannot be written, 130 when interrupted, or 141 where nobody reads its messages any
    more. `prog` is what the user called.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with interrupts.noted():
        try:
            status = _run(parsed(sys.argv[1:] if arguments is None else arguments, prog))
            interrupts.check()
            return status
        except (Exception, KeyboardInterrupt) as wrong:
            return _ended(wrong)


def _ended(wrong: BaseException) -> int:
    """Say in one line what ended a command, and return the exit status. Raises what is a fault of this package.

    Of several processes the first that failed says it.
    """
    # What was interrupted may say so in its own way.
    interrupted = isinstance(wrong, KeyboardInterrupt) or interrupts.asked()
    if isinstance(wrong, BrokenPipeError) and not interrupted:
        return _NOBODY_READS
    if not ranks.speaks(wrong):
        return _INTERRUPTED if interrupted else _WRONG_INPUT
    if interrupted:
        how_on = "".join(map(str, wrong.args)) if isinstance(wrong, KeyboardInterrupt) else ""
        return _told(f"interrupted{how_on}", _INTERRUPTED)
    if isinstance(wrong, (InputError, OSError, MemoryError)):
        return _told(f"error: {_said(wrong)}", _WRONG_INPUT)
    if ranks.lost_another(wrong):
        return _told("error: another process of this training is gone; --resume goes on", _WRONG_INPUT)
    raise wrong


def _run(given: dict[str, Any]) -> int:
    command = given.pop("command")
    if given.pop("version"):
        return _print(version_line())
    if command is None:
        return _print(given["help"])
    return {"train": _train, "search": _search, "quantize": _quantize, "costs": _costs, "env": _env}[command](given)


def _said(wrong: Exception) -> str:
    """The message of an error, in one line."""
    if isinstance(wrong, MemoryError):
        text = f"not enough memory ({wrong})" if str(wrong) else "not enough memory"
    elif isinstance(wrong, OSError) and wrong.filename is not None:
        text = f"{os.fsdecode(wrong.filename)}: {wrong.strerror}"
    else:
        text = str(wrong) or type(wrong).__name__
    return text.replace("\r", "\\r").replace("\n", "\\n")


def _told(text: str, status: int) -> int:
    """Print a line to standard error, where somebody reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)
    return status


def _print(text: str) -> int:
    """Print to standard output and return the exit status.

    It is 0 if the reader of `env | head` has enough. Raises nothing: it is the last that a command does.
    """
    if ranks.silent():
        return 0
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as reason:
        _discard(sys.stdout)
        return _told(f"error: standard output cannot be written: {reason.strerror}", _WRONG_INPUT)
    return 0


def _discard(stream: Any) -> None:
    """Let a stream that cannot be written go nowhere. Else the flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _summary(run: Run | Sweep) -> dict[str, Any]:
    """Do a run or a sweep. What stops it says how to go on."""
    try:
        reporter = Reporter(silent=ranks.silent())
        return run_sweep(run, reporter) if isinstance(run, Sweep) else run_job(run, reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; --resume goes on after the last whole epoch") from None
    except OSError as reason:
        if reason.errno not in WRITE_ERRORS:
            raise
        raise OutputError.of(reason.filename or run.folder, reason) from None


def _print_options(given: dict[str, Any], search: bool = False) -> int:
    options = resolve(given, search)
    if not ranks.silent():
        for line in options.advice():
            _told(line, 0)
    command = "search" if search else "train"
    stored = {name: value for name, value in options.to_json().items() if command in OPTIONS[name].commands}
    return _print(json.dumps(stored, indent=2))


def _train(given: dict[str, Any]) -> int:
    texts, base = given.pop("sweep"), given.pop("sweep_base")
    out, name, resume = (given.pop(key) for key in ("out", "name", "resume"))
    if given.pop("print_options"):
        return _print(json.dumps(sweep_options(texts, given), indent=2)) if texts else _print_options(given)
    with ranks.joined():
        # Rank 0 alone has the folder, where machines share none.
        sweeps = bool(texts) or ranks.from_first(lambda: resume and name is not None and is_sweep(out / name))
        if base is not None and not sweeps:
            raise InputError(f"--sweep-base {base} goes with --sweep")
        opened = (
            open_sweep(out, name, given, texts, base, resume=resume)
            if sweeps
            else open_together(out, name, given, resume=resume)
        )
        with opened as started:
            summary = _summary(started)
    lines, page = (sweep_lines, "sweep.md") if sweeps else (closing_lines, "summary.md")
    shown = _print("\n".join([*lines(summary), f"Written to {started.folder}; begin with {page} there."]))
    return shown if all(map(_is_whole, summary["points"].values() if sweeps else [summary])) else 1


def _is_whole(summary: Mapping[str, Any]) -> bool:
    """Whether every row was trained, and CSLA = GR held."""
    return not summary["not_trained"] and (summary["csla_equals_gr"] or {"agrees": True})["agrees"]


def _search(given: dict[str, Any]) -> int:
    if given.pop("print_options"):
        return _print_options({name: value for name, value in given.items() if name in OPTIONS}, search=True)
    output, resume = given.pop("output"), given.pop("resume")
    if output is not None and output.exists():
        raise InputError(f"--output {output} is there already")
    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: no such folder")
    out, name = given.pop("out"), given.pop("name")
    with ranks.joined(), open_together(out, name, given, resume=resume, search=True) as run:
        summary = _summary(run)
        if summary["scales"] is None:
            epoch = summary["search"]["diverged"]
            raise InputError(
                f"the Hyper-Search diverged in epoch {epoch}: a lower --lr may help; there is no scales file"
            )
        if output is not None and ranks.first():
            with files.writing(output):
                save_scales(load_scales(run.folder / SCALES), output)
    return _print(f"{scales_line(summary)}\nWritten to {output or run.folder / SCALES}.")


def _quantize(given: dict[str, Any]) -> int:
    folder = run_folder(given.pop("run"), given.pop("out"))
    summary = quantize(folder, chosen_settings(given), Reporter())
    return _print("\n".join([*quantized_lines(summary), f"Written to {folder}; begin with quantize.md there."]))


def _costs(given: dict[str, Any]) -> int:
    folder = run_folder(given.pop("run"), given.pop("out"))
    costs = costs_of_run(folder, given, Reporter().line)
    return _print(f"{costs_page(costs)}\nWritten to {folder / COSTS}.json and .md.")


def _env(given: dict[str, Any]) -> int:
    facts = environment()
    return _print(json.dumps(facts, indent=2) if given["json"] else environment_text(facts))
