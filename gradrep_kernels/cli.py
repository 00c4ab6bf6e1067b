"""The command line. Arguments become options, errors one line and an exit status."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.csla import load_scales, save_scales
from gradrep_kernels.recipes.data import KINDS
from gradrep_kernels.recipes.declare import Option
from gradrep_kernels.recipes.environment import environment, environment_text
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.job import run_job
from gradrep_kernels.recipes.options import OPTIONS
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import check_line, scales_line, table
from gradrep_kernels.recipes.runs import SCALES, open_run

__all__ = ["main"]

_WRONG_INPUT, _INTERRUPTED = 2, 130


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))


# The type of an option -> settings of argparse. All other types are given as text.
_SETTINGS_OF_TYPE: dict[type, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    tuple: {"type": _names, "metavar": "LIST"},
    bool: {"action": argparse.BooleanOptionalAction},
}


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    settings = dict(_SETTINGS_OF_TYPE.get(option.type, {}))
    if option.metavar is not None:
        settings["metavar"] = option.metavar
    help_text = option.help_text(KINDS).replace("%", "%%")
    parser.add_argument(option.flag, **settings, default=argparse.SUPPRESS, help=help_text)


def _add_run(commands: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    """Add a command that starts or resumes a run."""
    parser = commands.add_parser(name, help=help_text, allow_abbrev=False)
    for option in OPTIONS.values():
        if name in option.commands:
            _add_option(parser, option)
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs; default: %(default)s"
    )
    parser.add_argument(
        "--name", help="folder of this run in it; default: DATA-MODEL, with a number where that is taken"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was stopped, with its options; default: start a new one",
    )
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradrep_kernels",
        description="Gradient re-parameterization and spatial gradient scaling, end to end.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | search | env")
    _add_run(commands, "train", "search scales, then train with each recipe and compare")
    search = _add_run(commands, "search", "Hyper-Search alone: writes a scales file")
    search.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the scales file; default: {SCALES} in the run's folder"
    )
    env = commands.add_parser(
        "env", help="versions, devices, and which implementation serves each op", allow_abbrev=False
    )
    env.add_argument("--json", action="store_true", help="as JSON; default: text")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0, 1 where CSLA = GR did not hold, 2 for wrong input, or 130 when interrupted.
    """
    given = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return {"train": _train, "search": _search, "env": _env}[given.pop("command")](given)
    except InputError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return _WRONG_INPUT
    except BrokenPipeError:  # The reader of `env | head` has enough.
        # Without this the flush at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted; --resume goes on after the last whole epoch", file=sys.stderr)
        return _INTERRUPTED


def _train(given: dict[str, Any]) -> int:
    run = open_run(given.pop("out"), given.pop("name"), resume=given.pop("resume"), given=given)
    summary = run_job(run, Reporter())
    lines = [table(summary)]
    if summary["scales"]:
        lines.append(scales_line(summary))
    if summary["csla_equals_gr"]:
        lines.append(check_line(summary))
    print("\n".join([*lines, f"Written to {run.folder}; begin with summary.md there."]))
    return 0 if summary["csla_equals_gr"] is None or summary["csla_equals_gr"]["agrees"] else 1


def _search(given: dict[str, Any]) -> int:
    output, resume = given.pop("output"), given.pop("resume")
    if output is not None and not resume and output.exists():
        raise InputError(f"--output {output} is there already")
    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: no such folder")
    run = open_run(given.pop("out"), given.pop("name"), resume=resume, search=True, given=given)
    summary = run_job(run, Reporter())
    if output is not None:
        save_scales(load_scales(run.folder / SCALES), output)
    print(f"{scales_line(summary)}\nWritten to {output or run.folder / SCALES}.")
    return 0


def _env(given: dict[str, Any]) -> int:
    facts = environment()
    print(json.dumps(facts, indent=2) if given["json"] else environment_text(facts))
    return 0
