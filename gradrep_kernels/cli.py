"""The command line: arguments to options, errors to one line and an exit status."""

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
from gradrep_kernels.recipes.environment import environment, environment_text
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.job import run_job
from gradrep_kernels.recipes.options import ABLATIONS, DEFAULTS, MODELS, RECIPES, flag
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import check_line, scales_line, table
from gradrep_kernels.recipes.runs import SCALES, open_run

__all__ = ["main"]

_WRONG_INPUT, _INTERRUPTED = 2, 130


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip() not in ("", "none"))


_BOTH: dict[str, dict[str, Any]] = {  # options of train and search, by attribute name
    "data": {
        "metavar": "DATA",
        "help": "digits | cifar10:DIR | cifar100:DIR (binary distribution) | folder:DIR (train/CLASS/*, val/CLASS/*); default: digits",
    },
    "image_size": {"type": int, "help": "side of the images of folder:DIR"},
    "model": {"metavar": "MODEL", "help": ", ".join(MODELS)},
    "seed": {"type": int, "help": "first seed; the Hyper-Search's too"},
    "search_epochs": {"type": int, "help": "epochs of the Hyper-Search"},
    "batch_size": {"type": int, "help": "images per step"},
    "lr": {"type": float, "help": "learning rate at the end of the warm-up; half a cosine follows"},
    "momentum": {"type": float, "help": "of SGD"},
    "weight_decay": {"type": float, "help": "of convolutions, linear weights and identity scales"},
    "warmup": {"type": int, "help": "epochs of linear warm-up"},
    "label_smoothing": {"type": float, "help": "of the cross-entropy"},
    "augment": {"type": _names, "metavar": "LIST", "help": "comma-separated: flip, crop, cutout; or none"},
    "clip_norm": {"type": float, "help": "clip the gradient norm (that of the CSLA model, where there are Grad Mults)"},
    "device": {"help": "cpu, cuda or cuda:N"},
    "threads": {"type": int, "help": "threads on the CPU; results are the same bit for bit on the same number only"},
}
_TRAIN: dict[str, dict[str, Any]] = {
    "recipe": {"type": _names, "metavar": "LIST", "help": "comma-separated: " + "; ".join(f"{name} ({what})" for name, what in RECIPES.items()) + "; or all"},
    "ablate": {
        "type": _names, "metavar": "LIST",
        "help": "more rows, each RepOpt with one thing changed (RepOptimizers, Table 4): "
        + "; ".join(f"{name} ({what})" for name, what in ABLATIONS.items()) + "; or none",
    },
    "scales": {"metavar": "FILE", "help": "a scales file, own or published, instead of the Hyper-Search"},
    "seeds": {"type": int, "help": "how many seeds each recipe is trained with"},
    "epochs": {"type": int, "help": "epochs of each training"},
    "sgs_every": {"type": int, "help": "update the spatial gradient scaling every so many epochs"},
    "sgs_warmup": {"type": int, "help": "epoch of its first update, counted from 0"},
    "sgs_batches": {"type": int, "help": "batches for an update"},
    "sgs_k": {"type": float, "help": "k of its transform"},
    "remove_near": {"action": argparse.BooleanOptionalAction, "help": "drop pairs of near pixels (the SGS paper's ImageNet setting)"},
    "check_steps": {"type": int, "help": "steps of the float64 check CSLA = GR; 0: none"},
}  # fmt: skip
_NO_DEFAULT = {
    "ablate": "hs-init with all recipes, else none",
    "scales": "Hyper-Search",
    "clip_norm": "no clipping",
    "threads": "the cores one may use",
}


def _default(name: str) -> str:
    """The default for the help: one for all data, or one for each."""
    if name in _NO_DEFAULT:
        return _NO_DEFAULT[name]
    shown = {
        kind: ",".join(value) if isinstance(value := defaults[name], tuple) else str(value)
        for kind, defaults in DEFAULTS.items()
    }
    if len(set(shown.values())) == 1:
        return shown["digits"]
    return ", ".join(f"{value} ({kind})" for kind, value in shown.items() if value != "None")


def _add(parser: argparse.ArgumentParser, described: dict[str, dict[str, Any]]) -> None:
    for name, settings in described.items():
        help_text = settings["help"] if name == "data" else f"{settings['help']}; default: {_default(name)}"
        settings = (
            {"metavar": {int: "N", float: "X"}.get(settings.get("type")), **settings}
            if "action" not in settings
            else settings
        )
        parser.add_argument(
            flag(name), **{**settings, "default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
        )


def _add_run(parser: argparse.ArgumentParser) -> None:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradrep_kernels",
        description="Gradient re-parameterization and spatial gradient scaling, end to end.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | search | env")
    train = commands.add_parser(
        "train", help="search scales, then train with each recipe and compare", allow_abbrev=False
    )
    _add(train, {**_BOTH, **_TRAIN})
    _add_run(train)
    search = commands.add_parser("search", help="Hyper-Search alone: writes a scales file", allow_abbrev=False)
    _add(search, _BOTH)
    _add_run(search)
    search.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the scales file; default: {SCALES} in the run's folder"
    )
    env = commands.add_parser(
        "env", help="versions, devices, and which implementation serves each op", allow_abbrev=False
    )
    env.add_argument("--json", action="store_true", help="as JSON; default: text")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 where CSLA = GR did not hold, 2 for wrong input, 130 when interrupted."""
    given = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return {"train": _train, "search": _search, "env": _env}[given.pop("command")](given)
    except InputError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return _WRONG_INPUT
    except BrokenPipeError:  # `env | head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again
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
    found = environment()
    print(json.dumps(found, indent=2) if given["json"] else environment_text(found))
    return 0
