"""Sweeps: their points, what is trained once, and the same results however often they are killed."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
from pathlib import Path

import pytest
from cases_recipes import TINY, as_arguments, assert_same_tensors, bit_repeatable, tensors, train
from test_recipes_resume import run_and_kill  # noqa: F401 (a fixture)

from gradrep_kernels.cli import main
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.options.resolve import OPTIONS, resolve
from gradrep_kernels.recipes.runs import stored_options
from gradrep_kernels.recipes.sweeps.points import read_points, resolved_points
from gradrep_kernels.recipes.sweeps.sharing import same_parts, take_over, touches_row, touches_search
from gradrep_kernels.recipes.table import RECIPES

pytestmark = pytest.mark.usefixtures("no_pictures")


def points(*texts):
    return {point.name: point.given for point in read_points(texts)}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["sgs-k=1,2.5"], {"sgs-k=1": {"sgs_k": 1.0}, "sgs-k=2.5": {"sgs_k": 2.5}}),
        (["--epochs=3"], {"epochs=3": {"epochs": 3}}),
        (
            ["epochs=1,2", "nesterov=yes,no"],
            {
                f"epochs={epochs}_nesterov={word}": {"epochs": epochs, "nesterov": word == "yes"}
                for epochs in (1, 2)
                for word in ("yes", "no")
            },
        ),
        (
            ["augment=flip,crop;none;"],
            {"augment=flip,crop": {"augment": ("flip", "crop")}, "augment=none": {"augment": ()}},
        ),
        (["lr=0.1,0.3"], {"lr=0.1": {"lr": ("0.1",)}, "lr=0.3": {"lr": ("0.3",)}}),
        (["amp=default,bf16"], {"amp=default": {}, "amp=bf16": {"amp": "bf16"}}),
        (["scales=a/b.pt;/c/d.pt"], {"scales=b.pt": {"scales": "a/b.pt"}, "scales=d.pt": {"scales": "/c/d.pt"}}),
        (["data=cifar10:/x,digits"], {"data=cifar10--x": {"data": "cifar10:/x"}, "data=digits": {"data": "digits"}}),
    ],
)  # fmt: skip
def test_points_of_values(texts, expected):
    assert points(*texts) == expected


def test_points_do_not_take_presets_of_two_papers_that_nobody_named(tmp_path):
    """The table would hold other settings of batch, decay and schedule for effects of what is swept."""
    given, texts = {"data": f"cifar100:{tmp_path}"}, ["recipe=sgd,sgs;sgd,repopt"]
    said = "points recipe=sgd,sgs and recipe=sgd,repopt .* sgs-cifar-200 and repopt-hs; name one by --preset$"
    with pytest.raises(InputError, match=said):
        resolved_points(read_points(texts), given)
    assert len(resolved_points(read_points(texts), {**given, "preset": "repopt-hs"})) == 2
    assert len(resolved_points(read_points(["preset=sgs-cifar-200,repopt-hs"]), given)) == 2


SETS = [{"name": "mine", "sgs-k": 2, "augment": ["flip"]}, {"lr": [0.1, 0.3], "nesterov": True}, {"clip_norm": None}]
AS_TOML = """
[[points]]
name = "mine"
sgs-k = 2
augment = ["flip"]
[[points]]
lr = [0.1, 0.3]
nesterov = true
[[points]]
clip_norm = "default"
"""


@pytest.mark.parametrize("name", ["sets.json", "sets.toml", "a=b.json"])
def test_points_of_a_file(tmp_path, monkeypatch, name):
    if name.endswith("toml"):
        pytest.importorskip("tomllib")
    (tmp_path / name).write_text(AS_TOML if name.endswith("toml") else json.dumps(SETS))
    monkeypatch.chdir(tmp_path)
    found = points(name)
    assert found.pop("mine") == {"sgs_k": 2.0, "augment": ("flip",)}
    second, third = found
    assert second.startswith("lr=0.1,0.3_nesterov=")
    assert found[second] == {"lr": ("0.1", "0.3"), "nesterov": True}
    assert third in ("clip-norm=default", "clip-norm=None")
    assert found[third] == {}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["sgs-kk=1,2"], "--sweep sgs-kk=1,2: `train` has no option 'sgs-kk'; did you mean sgs-k?"),
        (["out=a,b"], "no option 'out'"),
        (["workers=1,2"], "no result depends on --workers"),
        (["epochs=1,x"], "--sweep epochs=1,x: --epochs must be a whole number, got 'x'"),
        (["epochs=1.5"], "--epochs must be a whole number"),
        (["nesterov=maybe"], "--nesterov must be yes or no"),
        (["sgs-k="], "has no values"),
        (["sgs-k=1,1"], "two points of the name sgs-k=1"),
        (["sgs-k=1", "sgs-k=2"], "--sweep sgs-k=1 and --sweep sgs-k=2 both give --sgs-k"),
        (["nowhere.json"], "--sweep nowhere.json: No such file"),
        ([f"epochs={','.join(map(str, range(1, 40)))}", f"seed={','.join(map(str, range(40)))}"], "more than 1000"),
    ],
)
def test_wrong_points_are_told(texts, said):
    with pytest.raises(InputError) as error:
        read_points(texts)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold a list of option sets"),
        ("[1]", "must hold a list of option sets"),
        ('[{"epochs": "many"}]', "--epochs must be a whole number"),
        ('[{"epochs": true}]', "--epochs must be a whole number"),
        ('[{"epochs": 2.5}]', "--epochs must be a whole number"),
        ('[{"augment": [["flip"]]}]', "--augment must be a list"),
        ('[{"name": 3}]', "the name of a point must be a text"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, content, said):
    (tmp_path / "sets.json").write_text(content)
    with pytest.raises(InputError) as error:
        read_points([str(tmp_path / "sets.json")])
    assert said in str(error.value)


def test_a_name_is_that_of_a_folder_on_any_system(tmp_path):
    (tmp_path / "sets.json").write_text(json.dumps([{"name": '../a:b*"<\n'}, {"name": ".x" * 200}]))
    first, second = points(str(tmp_path / "sets.json"))
    assert first == "-a-b----"
    assert len(second) <= 150


def test_all_points_are_resolved_before_anything_starts():
    with pytest.raises(InputError, match="point sgs-k=0: --sgs-k must be a number above 0"):
        resolved_points(read_points(["sgs-k=1,0"]), {})
    with pytest.raises(InputError, match=r"points sgs-k=1 and sgs-k=1\.0 of --sweep are the same"):
        resolved_points(read_points(["sgs-k=1,1.0"]), {})
    with pytest.raises(InputError, match="--sgs-k is swept, so leave --sgs-k 3"):
        resolved_points(read_points(["sgs-k=1,2"]), {"sgs_k": 3})
    assert [options.sgs_k for options in resolved_points(read_points(["sgs-k=2,1"]), {}).values()] == [2, 1]


# -- what is trained once

# Option -> a value that is not TINY's. All that some training is said not to depend on.
OTHERS = {
    "sgs_every": 1, "sgs_warmup": 0, "sgs_batches": 2, "sgs_k": 2.0, "sgs_dependence": "autocorrelation",
    "sgs_apply_to": "update", "sgs_alpha": 1.7, "sgs_beta": 5.0, "remove_near": True,
    "search_epochs": 1, "search_lr": 0.05, "search_batch_size": 6, "search_weight_decay": 0.01,
    "search_decay": "everything", "search_warmup": 0, "search_warmup_lr": 0.01, "search_schedule": "cosine-whole",
    "search_nesterov": True, "search_label_smoothing": 0.2, "search_augment": ("flip",), "search_clip_norm": 0.5,
    "branches": "acb", "hs_init": "1", "check_steps": 0,
    "epochs": 3, "batch_size": 6, "weight_decay": 0.01, "decay": "everything", "warmup": 0, "warmup_lr": 0.01,
    "schedule": "cosine-whole", "nesterov": True, "label_smoothing": 0.2, "augment": ("flip",), "clip_norm": 0.5,
    "lr": (0.05,), "lr_seeds": 1, "ema_decay": 0.5, "momentum_dtype": "bfloat16",
}  # fmt: skip
NAMES_ONLY = {"preset", "quick", "recipe", "ablate", "scales", "optimizer"}  # not changed here
# What the Hyper-Search has where nothing is said, so that a change of the trainings' settings leaves it alone.
SEARCHED = {
    "search_lr": 0.1, "search_batch_size": 10, "search_weight_decay": 5e-4, "search_decay": "repopt",
    "search_warmup": 1, "search_warmup_lr": 0.0, "search_schedule": "cosine", "search_nesterov": False,
    "search_label_smoothing": 0.0, "search_augment": ("crop",), "search_clip_norm": 1.0,
}  # fmt: skip
BASE = {**TINY, **SEARCHED, "lr": (0.1,), "recipe": ("sgd", "sgs", "repopt"), "sgs_warmup": 1}


def arguments_of(given):
    """Options as text. A switch has no value."""
    texts = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            texts.append(flag)
        elif value is False:
            texts.append(f"--no-{flag[2:]}")
        else:
            texts += [flag, ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)]
    return texts


@pytest.fixture(scope="module")
def as_is(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("as-is")
    assert main(["train", "--data", source, "--out", str(out), "--name", "x", *arguments_of(BASE)]) == 0
    return out / "x"


@pytest.mark.parametrize("part", ["sgd", "sgs", "repopt", "search"])
def test_what_does_not_touch_a_training_changes_no_bit_of_it(source, as_is, tmp_path, part):
    """All options that are said not to touch it are changed at once, and it is trained anew."""
    touching = touches_search if part == "search" else lambda name: touches_row(name, RECIPES[part])
    apart = {name for name, declared in OPTIONS.items() if declared.outcome and not touching(name)}
    assert apart - NAMES_ONLY <= OTHERS.keys()
    changed = {name: value for name, value in OTHERS.items() if name in apart}
    assert changed
    # Only a row with scales takes --branches and --hs-init, and that of the ablation needs no search.
    rows = {"recipe": (part,), "ablate": ("hs-init",)} if part in ("sgd", "sgs") else {"recipe": ("repopt",)}
    given = {**BASE, **changed, **rows}
    assert main(["train", "--data", source, "--out", str(tmp_path), "--name", "x", *arguments_of(given)]) == 0
    file = "scales.pt" if part == "search" else f"weights/{part}-seed0.pt"
    assert_same_tensors(tensors(as_is / file), tensors(tmp_path / "x" / file))


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("sgs_k", 2.0, {"sgd", "repopt", "search", "check"}),
        (
            "sgs_alpha",
            2.0,
            {"sgd", "repopt", "search", "check"},
        ),  # of sgs-grid, but all scaling options touch all of it
        ("search_epochs", 1, {"sgd", "sgs"}),
        ("hs_init", "1", {"sgd", "sgs"}),
        ("epochs", 5, {"search"}),
        ("momentum", 0.5, set()),
        ("threads", 2, set()),
        ("validation", 0.2, set()),
        ("seed", 1, set()),
        ("workers", 2, {"sgd", "sgs", "repopt", "search", "check"}),
    ],
)
def test_what_is_shared(source, name, value, same):
    base = resolve({"data": source, **BASE, "workers": 1})
    assert set(same_parts(resolve({"data": source, **BASE, "workers": 1, name: value}), base)) == same


def test_a_row_whose_rate_another_chooses_depends_on_what_touches_that(source):
    several = {"data": source, **TINY, "lr": (0.1, 0.3), "recipe": ("repopt", "csla"), "search_lr": 0.1}
    one, other = (resolve({**several, **more}) for more in ({}, {"recipe": ("csla",)}))
    assert "csla" not in same_parts(one, other)
    assert "csla" in same_parts(one, resolve({**several, "sgs_k": 2.0}))
    ablated = [resolve({**several, "ablate": ("hs-init",), "search_epochs": n}) for n in (1, 2)]
    assert "repopt-hs-init" not in same_parts(*ablated)  # It needs no search, and takes the rate of repopt, which does.
    single = [resolve({**several, "lr": 0.1, "ablate": ("hs-init",), "search_epochs": n}) for n in (1, 2)]
    assert "repopt-hs-init" in same_parts(*single)


# -- whole sweeps

SWEEP = ("--recipe", "sgd,sgs,repopt", "--epochs", "2", "--seeds", "2", "--check-steps", "1")


def sweep_arguments(source, out, name, *more):
    return ["train", "--data", source, "--out", str(out), "--name", name, *as_arguments(TINY), *SWEEP, *more]


@pytest.fixture(scope="module")
def swept(source, tmp_path_factory):
    """The folder of a whole sweep, never interrupted."""
    out = tmp_path_factory.mktemp("swept")
    assert main(sweep_arguments(source, out, "whole", "--sweep", "sgs-k=1,4")) == 0
    return out / "whole"


def of(folder, file):
    return json.loads((folder / file).read_text())


def assert_same_sweeps(a, b):
    for name in of(a, "points.json")["points"]:
        assert sorted(p.name for p in (a / name).iterdir()) == sorted(p.name for p in (b / name).iterdir())
        for file in (a / name).rglob("*.pt"):
            assert_same_tensors(tensors(file), tensors(b / name / file.relative_to(a / name)))
        one, other = (bit_repeatable(folder / name / "metrics.jsonl") for folder in (a, b))
        assert sorted(map(json.dumps, one)) == sorted(map(json.dumps, other))
    one, other = (of(folder, "sweep.json") for folder in (a, b))
    assert one["compared"] == other["compared"]
    for name, point in one["points"].items():
        for row, figures in point["recipes"].items():
            theirs = other["points"][name]["recipes"][row]
            assert {**figures, "seconds_per_step": 0} == {**theirs, "seconds_per_step": 0}


def test_a_point_has_the_bits_of_a_run_of_its_own(source, swept, tmp_path):
    assert main(sweep_arguments(source, tmp_path, "alone", "--sgs-k", "4")) == 0
    alone, point = tmp_path / "alone", swept / "sgs-k=4"
    assert sorted(p.name for p in (alone / "weights").iterdir()) == sorted(
        p.name for p in (point / "weights").iterdir()
    )
    for file in [*(alone / "weights").iterdir(), alone / "scales.pt"]:
        assert_same_tensors(tensors(file), tensors(point / file.relative_to(alone)))
    a, b = of(alone, "summary.json"), of(point, "summary.json")
    for row, figures in a["recipes"].items():
        assert figures["test_accuracy"] == b["recipes"][row]["test_accuracy"]
        assert figures["taken_from"] is None
    assert a["csla_equals_gr"] == b["csla_equals_gr"]
    assert {row: figures["taken_from"] for row, figures in b["recipes"].items()} == {
        "sgd": "sgs-k=1",
        "sgs": None,
        "repopt": "sgs-k=1",
    }
    assert b["search"]["taken_from"] == "sgs-k=1"
    assert "sgd from sgs-k=1" in (point / "summary.md").read_text()


def test_a_sweep_leaves_its_files(swept):
    assert sorted(path.name for path in swept.iterdir()) == [
        "points.json", "sgs-k=1", "sgs-k=4", "sweep.json", "sweep.md", "sweep.png",
    ]  # fmt: skip
    lines = (swept / "sweep.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:2] for row in table[2:]] == [["sgd", "any"], ["sgs", "1"], ["sgs", "4"], ["repopt", "any"]]


def test_a_sweep_killed_again_and_again_ends_with_the_same_results(source, swept, tmp_path, run_and_kill):  # noqa: F811
    """At files that are being renamed: while points are made, in trainings, while the second takes over."""
    arguments = sweep_arguments(source, tmp_path, "killed", "--sweep", "sgs-k=1,4")
    second = tmp_path / "killed" / "sgs-k=4" / "state"
    for n, count in enumerate((2, 9, 20, 40, 8)):
        resume = ["--resume"] if n > 1 else []
        status = run_and_kill("rename", count, [*arguments, *resume])
        assert status == -signal.SIGKILL, (n, (tmp_path / "stderr.txt").read_text())
        assert (tmp_path / "killed").exists() == (n > 0)  # not before all its points are whole
    assert list(second.glob("*.json"))  # The last fall into the second point.
    assert main(["train", "--out", str(tmp_path), "--name", "killed", "--resume"]) == 0
    assert not list((tmp_path / "killed").rglob(f"*{files.TEMPORARY}"))
    assert_same_sweeps(swept, tmp_path / "killed")


def test_taking_over_may_stop_between_any_two_files(swept, tmp_path, monkeypatch):
    options = {name: stored_options(swept / name) for name in ("sgs-k=1", "sgs-k=4")}
    folder, replace = tmp_path / "sgs-k=4", Path.replace
    folder.mkdir()
    for allowed in range(20):
        renamed = []

        def stopping(path, to, allowed=allowed, renamed=renamed):
            if len(renamed) == allowed:
                raise KeyboardInterrupt
            renamed.append(to)
            return replace(path, to)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", stopping)
            found = take_over(folder, {"sgs-k=1": swept / "sgs-k=1"}, options)
            break
        for figures in (folder / "state").glob("*-seed?.json"):  # They say that the weights are there.
            assert (folder / "weights" / f"{figures.stem}.pt").exists()
        assert (folder / "scales.pt").exists() or not (folder / "state" / "search.json").exists()
    assert found == dict.fromkeys(("sgd", "repopt", "search", "check"), "sgs-k=1")
    assert allowed > 1
    for file in [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]:
        assert (folder / file).read_bytes() == (swept / "sgs-k=4" / file).read_bytes(), file
    assert len(list(folder.rglob("*.*"))) == 4 + 1 + 4 + 2  # weights, scales, their figures, search and check


def test_a_sweep_that_is_done_only_writes_its_table_again(source, swept, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*") if path.is_file()}
    assert main([*sweep_arguments(source, swept.parent, "whole", "--sweep", "sgs-k=1,4"), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "begin with sweep.md there" in out
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"sweep.md", "sweep.json", "sweep.png"}
    resume = ["train", "--out", str(swept.parent), "--name", "whole", "--resume"]
    assert main([*resume, "--sweep-base", "sgs-k=4"]) == 0
    assert of(swept, "sweep.json")["base"] == "sgs-k=4"
    assert main(resume) == 0
    assert of(swept, "sweep.json")["base"] == "sgs-k=1"
    stored = (swept / "points.json").read_text()
    (swept / "points.json").write_text(stored.replace('"base": "sgs-k=1"', '"base": "sgs-k=4"'))
    assert main(resume) == 0
    assert of(swept, "sweep.json")["base"] == "sgs-k=4"  # as it was started
    (swept / "points.json").write_text(stored)
    assert [of(swept / point, "state/ranks.json") for point in ("sgs-k=1", "sgs-k=4")] == [1, 1]


def test_a_sweep_is_no_run(swept, capsys):
    for command in ("costs", "quantize"):
        assert main([command, str(swept)]) == 2
        assert (
            f"{swept} is a sweep: name one of its runs, {swept}/POINT, of sgs-k=1, sgs-k=4" in capsys.readouterr().err
        )


def test_wrong_sweeps_are_one_line_and_leave_nothing(source, swept, tmp_path, capsys):
    def told(*more, out=tmp_path, name="x"):
        assert main(sweep_arguments(source, out, name, *more)) == 2
        assert not list(tmp_path.iterdir())
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        return line

    assert "point sgs-k=0: --sgs-k must be a number above 0" in told("--sweep", "sgs-k=1,0")
    assert "--sweep-base must name a point of sgs-k=1, sgs-k=2" in told("--sweep", "sgs-k=1,2", "--sweep-base", "x")
    assert "point scales=b.pt: --scales" in told("--sweep", "scales=default,b.pt")
    assert "--sweep-base sgs-k=1 goes with --sweep" in told("--sweep-base", "sgs-k=1")
    assert "there is no sweep to resume" in told("--sweep", "sgs-k=1,2", "--resume")
    assert "has something in it already" in told("--sweep", "sgs-k=1,4", out=swept.parent, name="whole")
    assert "is a sweep of sgs-k=1, sgs-k=4" in told("--sweep", "sgs-k=1,5", "--resume", out=swept.parent, name="whole")
    parts = ("--batch-size", "20", "--accumulate", "20")
    assert "point sgs-k=1: --batch-size must be at least 40" in told("--sweep", "sgs-k=1,2", *parts)
    assert "--sweep: --sgs-k changes nothing of sgd" in told("--sweep", "sgs-k=1,2", "--recipe", "sgd")
    assert "--sgs-k was 1.0 when" in told("--sgs-k", "4", "--resume", out=swept.parent, name="whole")


def test_options_of_all_points_are_printed(source, tmp_path, capsys):
    assert main(sweep_arguments(source, tmp_path, "x", "--sweep", "sgs-k=1,4", "--print-options")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {name: options["sgs_k"] for name, options in printed.items()} == {"sgs-k=1": 1.0, "sgs-k=4": 4.0}
    assert not list(tmp_path.iterdir())


PAGES = Path(__file__).resolve().parents[2] / "docs"


def commands_of(page):
    text = (PAGES / page).read_text(encoding="utf-8") if PAGES.exists() else ""
    return re.findall(r"(?:`|^    )gradrep (train [^`\n]*--sweep [^`\n]*)", text, re.MULTILINE)


@pytest.mark.parametrize("command", [*commands_of("howto/sweeps.md"), *commands_of("experiments.md")])
def test_sweeps_of_the_pages_are_resolved(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command), "--print-options"]) == 0, capsys.readouterr().err
    printed = json.loads(capsys.readouterr().out)
    assert len(printed) > 1
    assert not list(tmp_path.iterdir())


def test_a_sweep_has_a_name_and_is_resumed_by_it(source, tmp_path):
    given = ["train", "--data", source, "--out", str(tmp_path), *as_arguments(TINY), "--recipe", "sgd", "--epochs", "1"]
    for _ in range(2):
        assert main([*given, "--sweep", "weight-decay=0,0.01"]) == 0
    names = ["cifar10-small-sweep-weight-decay", "cifar10-small-sweep-weight-decay-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (tmp_path / names[1] / "sweep.json").unlink()
    assert main([*given, "--sweep", "weight-decay=0,0.01", "--resume"]) == 0
    assert (tmp_path / names[1] / "sweep.json").exists()


def test_a_search_that_diverges_is_taken_over_as_such(source, tmp_path):
    given = sweep_arguments(source, tmp_path, "x", "--sweep", "sgs-k=1,4", "--search-lr", "1e30", "--epochs", "1")
    assert main(given) == 1
    assert [point["not_trained"] for point in of(tmp_path / "x", "sweep.json")["points"].values()] == [["repopt"]] * 2


def test_a_grid_of_a_row_with_fixed_scalings(source, tmp_path):
    train(
        source, tmp_path, "--name", "grid", "--recipe", "sgd,sgs-grid", "--epochs", "1", "--validation", "0.2",
        "--sweep", "sgs-alpha=0.8,5", "--sweep", "sgs-beta=1,100",
    )  # fmt: skip
    sweep = of(tmp_path / "grid", "sweep.json")
    assert list(sweep["points"]) == [f"sgs-alpha={a}_sgs-beta={b}" for a in ("0.8", "5") for b in ("1", "100")]
    of_grid = [p["recipes"]["sgs-grid"]["validation_accuracy"][0] for p in sweep["points"].values()]
    assert (sweep["best"].keys() == {"sgs-grid"}) == (of_grid.count(max(of_grid)) == 1)  # none of equals
    assert [p["recipes"]["sgd"]["taken_from"] for p in sweep["points"].values()] == [
        None,
        *["sgs-alpha=0.8_sgs-beta=1"] * 3,
    ]
