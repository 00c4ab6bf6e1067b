"""The help of the commands and `env`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

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


def test_env_into_a_pipe_that_closes():
    command = f"{sys.executable} -m gradrep_kernels env | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("gradrep_kernels ")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_env_says_which_backend_is_forced(capsys):
    with use_backend("reference"):
        assert main(["env"]) == 0
    assert "backend          reference" in capsys.readouterr().out


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
        assert all(
            reason in text
            for name, reason in row.items()
            if name in ("cpp", "triton", "cuda") and reason != "available"
        )
