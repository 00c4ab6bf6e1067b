"""The arguments of the command line: the parser of each command, and what is said of wrong usage."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gradrep_kernels.recipes.costs.run import INFERENCE_BATCHES
from gradrep_kernels.recipes.data.load import KINDS
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.declare import Option
from gradrep_kernels.recipes.options.presets import PRESETS
from gradrep_kernels.recipes.options.resolve import OPTIONS
from gradrep_kernels.recipes.quantization.settings import SETTINGS
from gradrep_kernels.recipes.runs import SCALES

__all__ = ["parsed", "parsers"]


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


_PRESET_KINDS = {kind for preset in PRESETS.values() for kind in preset.kinds}
_OF_PRESETS = {name for preset in PRESETS.values() for name in preset.settings(search_alone=False)}
_RUN = "folder of a finished run of `train`, or its name in --out"
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
    help_text = _help(option).replace("%", "%%")
    flags += group.add_argument(option.flag, **settings, default=argparse.SUPPRESS, help=help_text).option_strings


def _help(option: Option) -> str:
    """The help of an option. Of CIFAR and folders it has the setting of a preset, where presets have one."""
    if option.name not in _OF_PRESETS or OPTIONS[option.name] is not option:  # `quantize` has some of these names
        return option.help_text(KINDS)
    return f"{option.help_text([kind for kind in KINDS if kind not in _PRESET_KINDS])}; CIFAR and folders: the preset's"


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
    _add_out(parser)
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


def parsers(prog: str) -> tuple[_Parser, dict[str, _Parser]]:
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
    train.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=V1,V2|FILE",
        help="a run for each value of an option, in one table; several are crossed; lists have ; between them, as in "
        "'strides=1,2,2;2,2,2'; FILE: a JSON or TOML list of option sets; default: one run",
    )
    train.add_argument(
        "--sweep-base", metavar="POINT", help="the point that the others are compared with; default: the first"
    )
    search = _add_run(commands, "search", "Hyper-Search alone: writes a scales file")
    search.add_argument(
        "--epochs", **_SETTINGS_OF_TYPE[int], dest="search_epochs", default=argparse.SUPPRESS,
        help="the same as --search-epochs; default: that",
    )  # fmt: skip
    search.add_argument(
        "--output", type=_path, metavar="FILE", help=f"the scales file; default: {SCALES} in the run's folder"
    )
    quantized = _add_quantize(commands)
    costs = commands.add_parser(
        "costs", help="what each recipe of a finished run costs: speed, memory, multiply-adds", allow_abbrev=False
    )
    costs.add_argument("run", type=_path, metavar="RUN", help=_RUN)
    _add_out(costs)
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
    parser.add_argument("run", type=_path, metavar="RUN", help=_RUN)
    for option in SETTINGS.values():
        _add_option(parser, option, [])
    _add_out(parser)
    return parser


def _add_out(parser: _Parser) -> None:
    parser.add_argument(
        "--out", type=_path, default=Path("runs"), metavar="DIR", help="folder of all runs; default: %(default)s"
    )


def _nearest(given: str, names: Iterable[str]) -> str:
    """The end of an error about `given`: which of `names` may have been meant."""
    near = difflib.get_close_matches(given, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parsed(arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """Values by name, `command` among them. It is None where no command was given.

    Raises InputError that names the option or command.
    """
    parser, commands = parsers(prog)
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
