"""The commands of docs/experiments.md: each runs, at toy size, as it stands there."""

from __future__ import annotations

import json
import shlex
import types

import pytest
from cases_recipes import ROOT, experiments_table, write_cifar, write_folder

from gradrep_kernels.cli import main
from gradrep_kernels.models import repopt_ghostnet
from gradrep_kernels.models.repopt_vgg import RepOptVGG
from gradrep_kernels.recipes import job
from gradrep_kernels.recipes.networks import MODELS

if not (ROOT / "docs").is_dir():
    pytest.skip("an sdist brings no pages", allow_module_level=True)

COMMANDS = {
    f"{row['source']}: {row['what']}": shlex.split(row["command"].strip("`")) for row in experiments_table("source")
}
TRAINED = {name: words for name, words in COMMANDS.items() if words[1] in ("train", "search")}

TOY = {
    "--batch-size": "4", "--search-batch-size": "4", "--epochs": "1", "--search-epochs": "1", "--seeds": "1",
    "--threads": "1", "--workers": "1", "--warmup": "0", "--search-warmup": "0", "--sgs-batches": "1",
    "--sgs-warmup": "0",
}  # fmt: skip
"""Options that make a toy of a command. Those that are its sweep keep their two first values."""
SMALL = {"epochs": "1,2", "batch-size": "4,5"}
"""Values of sweeps that a toy cannot have."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("experiments")
    return {
        "cifar100:C": f"cifar100:{write_cifar(root / 'cifar', 'cifar100', per_file=8)}",
        "folder:I": f"folder:{write_folder(root / 'images', per_class=4, size=(40, 20))}",
    }


@pytest.fixture
def tiny_networks(monkeypatch):
    """All networks that the commands name with four layers of eight channels. They have every setting."""

    def tiny(
        num_classes=1000, se=False, *, in_channels=3, strides=None, stem=None, width=None, head_width=None, dropout=None
    ):
        return RepOptVGG((1, 1, 1, 1), (8,) * 4, strides or (2,) * 5, num_classes, in_channels, se)

    def tiny_ghost(num_classes=1000, *, in_channels=3):
        return repopt_ghostnet(num_classes=num_classes, in_channels=in_channels, width=0.05)

    for name in MODELS:
        made = tiny_ghost if "ghost" in name else tiny
        network = types.FunctionType(made.__code__, made.__globals__, name, made.__defaults__, made.__closure__)
        network.__kwdefaults__ = made.__kwdefaults__
        monkeypatch.setitem(MODELS, name, network)


def toy(words, folders, out, search):
    given = dict(TOY)
    # A CPU refuses --channels-last for the first block of these networks.
    words = [folders.get(word, word) for word in words[1:] if word != "--channels-last"]
    for at, word in enumerate(words):
        if words[at - 1] == "--sweep":
            name, _, values = word.partition("=")
            cut = ";" if ";" in values else ","
            words[at] = f"{name}={SMALL.get(name, cut.join(values.split(cut)[:2]))}"
            given.pop(f"--{name}", None)
    if "folder:" in " ".join(words):
        given |= {"--image-size": "32", "--test-size": "36", "--test-resize": "40"}
    if search:
        given = {flag: value for flag, value in given.items() if flag in SEARCH}
    return [*words, "--out", str(out), *(text for pair in given.items() for text in pair)]


SEARCH = {"--batch-size", "--search-epochs", "--threads", "--warmup", "--image-size", "--test-size", "--test-resize"}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("name", TRAINED)
def test_every_command_runs(name, folders, tmp_path, tiny_networks, monkeypatch):
    words, measured = TRAINED[name], []
    monkeypatch.setattr(job, "write_costs", lambda *given: measured.append(given))  # It takes ten times the rest.
    assert main(toy(words, folders, tmp_path, words[1] == "search")) == 0
    summaries = list(tmp_path.rglob("summary.json"))
    assert summaries
    for summary in summaries:
        options = json.loads(summary.read_text())["options"]
        assert options["preset"] == words[words.index("--preset") + 1]
    assert len(measured) == (len(summaries) if "--costs" in words else 0)
