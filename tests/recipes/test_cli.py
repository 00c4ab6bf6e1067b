"""The help of the commands and `env`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import gradrep_kernels as gr
from gradrep_kernels.cli import main
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


def test_env_as_text_and_as_json():
    done = subprocess.run(
        [sys.executable, "-m", "gradrep_kernels", "env", "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert {"versions", "platform", "cpu", "cuda", "backend", "ops"} <= found.keys()
    assert {row["op"] for row in found["ops"]} >= {"rep_sgd_step", "joint_histogram"}


def test_env_says_which_backend_is_forced(capsys, monkeypatch):
    from gradrep_kernels import use_backend

    with use_backend("reference"):
        assert main(["env"]) == 0
    assert "backend          reference" in capsys.readouterr().out


def test_the_environment_names_every_op_on_every_device():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__ or torch.__version__.startswith(found["versions"]["torch"])
    assert {(row["op"], row["device"]) for row in found["ops"]} == {
        (op, device) for op in gr.ops.OPS for device in ("cpu", "cuda")
    }
    text = environment_text(found)
    for row in found["ops"]:
        assert row["op"] in text
        assert all(
            reason in text
            for name, reason in row.items()
            if name in ("cpp", "triton", "cuda") and reason != "available"
        )
