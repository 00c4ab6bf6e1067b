"""The command line itself: help, version, usage errors, and streams that nobody reads. `env`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from cases_recipes import train_arguments

import gradrep_kernels
from gradrep_kernels import use_backend
from gradrep_kernels.cli import main
from gradrep_kernels.ops.registry import OPS
from gradrep_kernels.recipes.environment import environment, environment_text


@pytest.mark.parametrize("command", ["train", "search", "env"])
def test_every_option_has_help_with_its_default(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    described = text[text.index("\noptions:") :].split("\n  -")[2:]  # without -h
    assert described
    for option in described:
        assert "default: " in " ".join(option.split()), option


def test_env_as_json(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"versions", "platform", "cpu", "cuda", "backend", "ops"} <= facts.keys()
    assert {row["op"] for row in facts["ops"]} >= {"rep_sgd_step", "joint_histogram"}


USAGE = {
    "command": (["trian"], "'trian' is no command; did you mean train?"),
    "nothing like a command": (["x"], "'x' is no command; there are train, search, quantize, costs, env"),
    "option": (["train", "--epoch", "3"], "`train` takes no --epoch; did you mean --epochs?"),
    "option with its value": (["train", "--sgs_every=3"], "`train` takes no --sgs_every; did you mean --sgs-every?"),
    "option of another command": (["search", "--seeds", "3"], "did you mean --seed?"),
    "option before the command": (["--versoin"], "gradrep takes no --versoin; did you mean --version?"),
    "nothing like an option": (["env", "--qqq"], "`env` takes no --qqq; `gradrep env --help` lists what there is"),
    "word too many": (["train", "digits"], "`train` takes no digits"),
    "no abbreviations": (["train", "--resum"], "did you mean --resume?"),
    "no value": (["train", "--epochs"], "--epochs: expected one argument"),
    "no whole number": (["train", "--epochs", "ten"], "--epochs must be a whole number, got 'ten'"),
    "no number": (["search", "--momentum", "0,9"], "--momentum must be a number, got '0,9'"),
    "many digits": (["train", "--seed", "1" * 5000], "--seed must be a whole number, got '111"),
    "no file": (["search", "--output", "a\0b"], "--output must name a file or a folder, got 'a\\x00b'"),
    "empty folder": (["train", "--out", ""], "--out must name a file or a folder, got ''"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_usage_error_is_one_line_that_names_what_is_near(case, capsys):
    arguments, said = USAGE[case]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert len(err) < 200
    assert out == ""


def test_without_a_command_there_is_a_short_help(capsys):
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: gradrep ")
    assert len(out.splitlines()) < 24
    assert all(f"\n    {command} " in out for command in ("train", "search", "env", "costs", "quantize"))
    assert err == ""


def test_the_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    loaded = [name for name in ("_C", "_C_cuda") if environment()["compiled"][name].startswith("is loaded")]
    assert line == (
        f"gradrep_kernels {gradrep_kernels.__version__}, torch {torch.__version__}, "
        f"compiled: {', '.join(loaded) or 'nothing'}"
    )


# ---- as processes

MODULE = f"{shlex.quote(sys.executable)} -m gradrep_kernels"
SCRIPT = f"{shlex.quote(sys.executable)} -c 'from gradrep_kernels.cli import entry; entry()'"


def shell(command, **variables):
    environment = {**os.environ, **variables}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, executable="/bin/bash")
    text = done.stderr.decode()
    assert "Traceback" not in text
    assert "Exception ignored" not in text
    return done.returncode, done.stdout.decode(errors="replace"), text


def test_it_is_named_as_it_was_called():
    assert shell(f"{MODULE} train --help")[1].startswith("usage: python -m gradrep_kernels train ")
    assert shell(f"{SCRIPT} train --help")[1].startswith("usage: gradrep train ")


@pytest.mark.parametrize("command", ["env", "train --help"])
def test_into_a_pipe_that_closes(command):
    status, out, _ = shell(f"set -o pipefail; {MODULE} {command} | head -1")
    assert out.startswith(("gradrep_kernels ", "usage: "))
    assert status == 0


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full_are_no_error(streams):
    assert shell(f"{MODULE} env {streams}")[0] == 0


def test_an_output_that_cannot_be_written_is_told():
    status, _, err = shell(f"{MODULE} env > /dev/full")
    assert (status, err) == (2, "error: standard output cannot be written: No space left on device\n")


def test_a_terminal_that_knows_few_letters():
    status, out, _ = shell(f"{MODULE} env", PYTHONIOENCODING="ascii")
    assert status == 0
    assert "M \\u2299 g" in out


def test_a_training_whose_messages_nobody_reads_ends_and_is_no_success(source, tmp_path):
    arguments = shlex.join(train_arguments(source, tmp_path, "--recipe", "sgd", "--epochs", "1", "--seeds", "2"))
    status, *_ = shell(f"set -o pipefail; {MODULE} {arguments} 2> >(head -c 1 > /dev/null)")
    assert status == 141


@pytest.mark.parametrize("command", ["env", "train --recipe sgd"])
def test_a_backend_that_is_none_is_told(command, tmp_path):
    status, out, err = shell(f"{MODULE} {command}", GRADREP_BACKEND="foo")
    said = "error: GRADREP_BACKEND must be one of auto, reference, cpp, triton, cuda, got 'foo'\n"
    assert (status, out, err) == (2, "", said)


# ---- env


def test_env_says_which_backend_is_forced(capsys):
    with use_backend("reference"):
        assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "backend          reference (forced by gr.use_backend)" in out
    assert "not cpp: reference is asked for" in out


def test_the_environment_names_every_op_on_every_device():
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__ or torch.__version__.startswith(facts["versions"]["torch"])
    computing = [name for name, op in OPS.items() if op.reference is not None]  # the others are plans of these
    expected = {(op, device) for op in computing for device in ("cpu", "cuda")}
    assert {(row["op"], row["device"]) for row in facts["ops"]} == expected
    text = environment_text(facts)
    for row in facts["ops"]:
        assert row["op"] in text
        reasons = {row[name] for name in ("cpp", "triton", "cuda")} - {"available"}
        assert all(reason in text for reason in reasons)
