"""The command line. Arguments become options, errors one line and an exit status."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gradrep_kernels.csla import load_scales, save_scales
from gradrep_kernels.recipes import files, interrupts, ranks
from gradrep_kernels.recipes.costs.page import costs_page
from gradrep_kernels.recipes.costs.run import COSTS, INFERENCE_BATCHES, costs_of_run
from gradrep_kernels.recipes.data import KINDS
from gradrep_kernels.recipes.declare import Option
from gradrep_kernels.recipes.environment import environment, environment_text, version_line
from gradrep_kernels.recipes.errors import WRITE_ERRORS, InputError, OutputError
from gradrep_kernels.recipes.job import run_job
from gradrep_kernels.recipes.options import OPTIONS, resolve
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.quantize import quantize, run_folder
from gradrep_kernels.recipes.quantize_report import closing_lines as quantized_lines
from gradrep_kernels.recipes.quantize_settings import SETTINGS, chosen_settings
from gradrep_kernels.recipes.report import closing_lines, scales_line
from gradrep_kernels.recipes.runs import SCALES, Run
from gradrep_kernels.recipes.shared_run import open_together

__all__ = ["entry", "main"]

_WRONG_INPUT, _INTERRUPTED, _NOBODY_READS = 2, 130, 141  # the last two as shells tell SIGINT and SIGPIPE


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))


def _number(of: Callable[[str], Any], needed: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return of(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {needed}, got {text[:80]!r}") from None

    return read


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must name a file or a folder, got {text!r}")
    return Path(text)


# The type of an option -> settings of argparse. All other types are given as text.
_SETTINGS_OF_TYPE: dict[type, dict[str, Any]] = {
    int: {"type": _number(int, "a whole number"), "metavar": "N"},
    float: {"type": _number(float, "a number"), "metavar": "X"},
    tuple: {"type": _names, "metavar": "LIST"},
    bool: {"action": argparse.BooleanOptionalAction},
}


class _Parser(argparse.ArgumentParser):
    """Raises InputError of one line where argparse would print all usage."""

    def __init__(self, *arguments: Any, **settings: Any):
        self.flags: list[str] = []
        super().__init__(*arguments, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.flags += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument ").replace(": must ", " must ", 1))


def _add_option(group: Any, option: Option, flags: list[str]) -> None:
    settings = dict(_SETTINGS_OF_TYPE.get(option.type, {}))
    if option.metavar is not None:
        settings["metavar"] = option.metavar
    help_text = option.help_text(KINDS).replace("%", "%%")
    flags += group.add_argument(option.flag, **settings, default=argparse.SUPPRESS, help=help_text).option_strings


def _add_run(commands: Any, name: str, help_text: str) -> _Parser:
    """Add a command that starts or resumes a run."""
    parser = commands.add_parser(
        name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.", allow_abbrev=False
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS.values():
        if name in option.commands:
            if option.group not in groups:
                groups[option.group] = parser.add_argument_group(option.group)
            _add_option(groups[option.group], option, parser.flags)
    parser.add_argument(
        "--out", type=_path, default=Path("runs"), metavar="DIR", help="folder of all runs; default: %(default)s"
    )
    parser.add_argument(
        "--name",
        help="folder of this run in it; default: DATA-MODEL, -BRANCHES where given, with a number where that is taken",
    )
    parser.add_argument(
        "--print-options",
        action="store_true",
        help="print the options as JSON, as they are resolved, and start nothing; default: start",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was stopped, with its options; default: start a new one",
    )
    return parser


def _parsers(prog: str) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of the command line, and that of each command."""
    parser = _Parser(
        prog=prog,
        description="Gradient re-parameterization and spatial gradient scaling, end to end.",
        epilog=f"`{prog} COMMAND --help` lists the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="versions of this package and of torch, in one line")
    commands = parser.add_subparsers(
        dest="command", title="commands", metavar="train | search | quantize | costs | env"
    )
    train = _add_run(commands, "train", "search scales, then train with each recipe and compare")
    search = _add_run(commands, "search", "Hyper-Search alone: writes a scales file")
    search.add_argument(
        "--output", type=_path, metavar="FILE", help=f"the scales file; default: {SCALES} in the run's folder"
    )
    quantized = _add_quantize(commands)
    costs = commands.add_parser(
        "costs", help="what each recipe of a finished run costs: speed, memory, multiply-adds", allow_abbrev=False
    )
    costs.add_argument("run", type=_path, metavar="RUN", help="the folder of the run")
    costs.add_argument("--device", default=argparse.SUPPRESS, help="cpu, cuda or cuda:N; default: the run's")
    costs.add_argument(
        "--memory",
        **_SETTINGS_OF_TYPE[float],
        default=argparse.SUPPRESS,
        help="GiB that a step may take on the CPU; default: no largest batch is looked for",
    )
    costs.add_argument(
        "--inference-batches",
        **_SETTINGS_OF_TYPE[tuple],
        default=argparse.SUPPRESS,
        help=f"batch sizes of the deployed network; default: {','.join(map(str, INFERENCE_BATCHES))}",
    )
    env = commands.add_parser(
        "env", help="versions, devices, and which implementation serves each op", allow_abbrev=False
    )
    env.add_argument("--json", action="store_true", help="as JSON; default: text")
    return parser, {"train": train, "search": search, "quantize": quantized, "costs": costs, "env": env}


def _add_quantize(commands: Any) -> _Parser:
    help_text = "trained networks of a run in few bits: accuracies, spread of the weights, pictures"
    parser = commands.add_parser(
        "quantize", help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.", allow_abbrev=False
    )
    parser.add_argument(
        "run", type=_path, metavar="RUN", help="folder of a finished run of `train`, or its name in --out"
    )
    for option in SETTINGS.values():
        _add_option(parser, option, [])
    parser.add_argument(
        "--out", type=_path, default=Path("runs"), metavar="DIR", help="folder of all runs; default: %(default)s"
    )
    return parser


def _nearest(given: str, names: Iterable[str]) -> str:
    """The end of an error about `given`: which of `names` may have been meant."""
    near = difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _parsed(arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """Values by name, `command` among them. It is None where no command was given.

    Raises InputError that names the option or command.
    """
    parser, commands = _parsers(prog)
    # argparse would list all commands, and not say which is near.
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is not None and first not in commands:
        near = _nearest(first, commands) or f"; there are {', '.join(commands)}"
        raise InputError(f"{first!r} is no command{near}")
    known, others = parser.parse_known_args(arguments)
    given = vars(known)
    if others:
        name, chosen = given["command"], commands.get(given["command"], parser)
        other = next((text for text in others if text.startswith("-")), others[0]).partition("=")[0]
        place = f"`{name}`" if name else prog
        near = _nearest(other, chosen.flags) or f"; `{chosen.prog} --help` lists what there is"
        raise InputError(f"{place} takes no {other}{near}")
    if given["command"] is None and not given["version"]:
        given["help"] = parser.format_help()
    return given


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
            status = _run(_parsed(sys.argv[1:] if arguments is None else arguments, prog))
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


def _summary(run: Run) -> dict[str, Any]:
    """Do a run. What stops it says how to go on."""
    try:
        return run_job(run, Reporter(silent=ranks.silent()))
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
    return _print(json.dumps(options.to_json(), indent=2))


def _train(given: dict[str, Any]) -> int:
    if given.pop("print_options"):
        return _print_options({name: value for name, value in given.items() if name in OPTIONS})
    out, name, resume = given.pop("out"), given.pop("name"), given.pop("resume")
    with ranks.joined(), open_together(out, name, given, resume=resume) as run:
        summary = _summary(run)
    shown = _print("\n".join([*closing_lines(summary), f"Written to {run.folder}; begin with summary.md there."]))
    agrees = summary["csla_equals_gr"] is None or summary["csla_equals_gr"]["agrees"]
    return shown if agrees and not summary["not_trained"] else 1


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
    folder = given.pop("run")
    costs = costs_of_run(folder, given, Reporter().line)
    return _print(f"{costs_page(costs)}\nWritten to {folder / COSTS}.json and .md.")


def _env(given: dict[str, Any]) -> int:
    facts = environment()
    return _print(json.dumps(facts, indent=2) if given["json"] else environment_text(facts))
