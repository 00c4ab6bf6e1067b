"""Whole jobs: which learning rate a row gets, what seeds see, and what diverges."""

from __future__ import annotations

import json
import re

import pytest
import torch
from cases_recipes import tensors, train, train_arguments

import gradrep_kernels as gr
from gradrep_kernels.cli import main
from gradrep_kernels.recipes import job, speed, trainings
from gradrep_kernels.recipes.training import accuracy, train_epoch
from gradrep_kernels.recipes.trainings import do_training

pytestmark = pytest.mark.usefixtures("no_pictures")

CHOOSING = ("--lr", "0.05,0.2", "--lr-seeds", "2", "--validation", "0.4", "--seeds", "3", "--search-epochs", "1")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def recorded(monkeypatch):
    """The trainings of a job, whose validation accuracies are taken from a table {(recipe, lr): accuracy}."""
    done, table = [], {}

    def recording(folder, options, training, listener):
        done.append(training)
        figures = do_training(folder, options, training, listener)
        return {**figures, "validation_accuracy": table.get((training.recipe, training.lr), 0.0)}

    monkeypatch.setattr(job, "do_training", recording)
    return done, table


def test_each_row_takes_its_best_rate_and_others_take_that_of_theirs(source, tmp_path, recorded):
    done, table = recorded
    table.update({("sgd", 0.05): 0.5, ("sgd", 0.2): 0.4, ("repopt", 0.05): 0.1, ("repopt", 0.2): 0.6})
    train(source, tmp_path, "--name", "a", "--recipe", "sgd,repopt,csla", "--ablate", "ones", *CHOOSING)
    assert {training.name: training.lr for training in done} == {
        "search": 0.1,
        **{f"{name}-lr{lr}-seed{seed}": lr for name in ("sgd", "repopt") for lr in (0.05, 0.2) for seed in (0, 1)},
        **{f"{name}-seed{seed}": 0.2 for name in ("csla", "repopt-ones") for seed in (0, 1, 2)},
        "sgd-seed2": 0.05,
        "repopt-seed2": 0.2,
    }
    recipes = summary_of(tmp_path / "a")["recipes"]
    assert {name: figures["learning_rate"] for name, figures in recipes.items()} == {
        "sgd": 0.05,
        "repopt": 0.2,
        "repopt-ones": 0.2,
        "csla": 0.2,
    }
    names = ("repopt-lr0.2-seed0", "repopt-lr0.2-seed1", "repopt-seed2")
    of_rate = [json.loads((tmp_path / "a" / "state" / f"{name}.json").read_text()) for name in names]
    assert recipes["repopt"]["test_accuracy"] == [figures["epochs"][-1]["test_accuracy"] for figures in of_rate]
    assert sorted(recipes["repopt"]["by_rate"]) == ["0.05", "0.2"]


def test_of_equal_rates_the_lowest_is_taken(source, tmp_path, recorded):
    train(source, tmp_path, "--name", "a", "--recipe", "sgd", *CHOOSING)
    assert summary_of(tmp_path / "a")["recipes"]["sgd"]["learning_rate"] == 0.05


def test_the_test_images_and_the_validation_part_are_never_trained_on(source, tmp_path, monkeypatch):
    seen = []

    def watching(trainee, data, *rest):
        seen.append(len(data.train))
        return train_epoch(trainee, data, *rest)

    monkeypatch.setattr(trainings, "train_epoch", watching)
    train(source, tmp_path, "--recipe", "sgd", *CHOOSING)
    assert set(seen) == {18}  # of 30, less 40 %


def test_a_diverged_training_ends_says_so_and_stands_in_the_table(source, tmp_path, capsys):
    train(source, tmp_path, "--name", "a", "--recipe", "sgd", "--lr", "1e30", "--epochs", "9")
    out, err = capsys.readouterr()
    assert "sgd-seed0: diverged in epoch 1, what it computes is not finite; --lr below 1e+30 may help" in err
    assert "(1 diverged)" in out
    figures = json.loads((tmp_path / "a" / "state" / "sgd-seed0.json").read_text())
    assert (figures["diverged"], len(figures["epochs"])) == (1, 1)


def test_a_rate_that_diverges_is_not_chosen(source, tmp_path):
    train(source, tmp_path, "--name", "a", "--recipe", "sgd", *CHOOSING, "--lr", "0.1,1e30")
    assert summary_of(tmp_path / "a")["recipes"]["sgd"]["learning_rate"] == 0.1


def test_a_diverged_search_leaves_its_rows_out(source, tmp_path, capsys):
    arguments = ["--name", "a", "--recipe", "sgd,repopt", "--search-lr", "1e30"]
    assert main(train_arguments(source, tmp_path, *arguments)) == 1
    out, err = capsys.readouterr()
    assert "search: diverged in epoch 1, what it computes is not finite; --search-lr below 1e+30 may help" in err
    assert re.search("repopt .* the Hyper-Search diverged", out)
    assert list(summary_of(tmp_path / "a")["recipes"]) == ["sgd"]
    assert not (tmp_path / "a" / "scales.pt").exists()
    assert main([*train_arguments(source, tmp_path, *arguments), "--resume"]) == 1


def test_rows_that_need_no_search_are_trained_where_it_diverged(source, tmp_path):
    arguments = ["--name", "a", "--recipe", "repopt", "--ablate", "ones,hs-init", "--search-lr", "1e30", *CHOOSING]
    for more in ([], ["--resume"]):
        assert main([*train_arguments(source, tmp_path, *arguments), *more]) == 1
        recipes = summary_of(tmp_path / "a")["recipes"]
        assert {name: figures["learning_rate"] for name, figures in recipes.items()} == {
            "repopt-ones": 0.05,
            "repopt-hs-init": 0.05,
        }


def test_a_rate_that_diverged_once_comes_last(source, tmp_path, monkeypatch):
    def made_up(folder, options, training, listener):
        figures = do_training(folder, options, training, listener)
        diverged = 1 if training.lr == 0.2 and training.seed == 0 else None
        return {**figures, "diverged": diverged, "validation_accuracy": {0.05: 0.3, 0.2: 0.97}[training.lr]}

    monkeypatch.setattr(job, "do_training", made_up)
    train(source, tmp_path, "--name", "a", "--recipe", "sgd", *CHOOSING, "--lr-seeds", "3")
    assert summary_of(tmp_path / "a")["recipes"]["sgd"]["learning_rate"] == 0.05


def test_a_part_of_no_image_cannot_choose(source, tmp_path, capsys):
    assert main(train_arguments(source, tmp_path, "--recipe", "sgd", *CHOOSING, "--validation", "0.01")) == 2
    assert "--validation 0.01 of 30 training images is none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_search_alone_is_an_error(source, tmp_path, capsys):
    assert main(["search", "--data", source, "--out", str(tmp_path), "--lr", "1e30", "--search-epochs", "2"]) == 2
    assert re.search(r"error: the Hyper-Search diverged in epoch \d", capsys.readouterr().err)


def test_steps_are_timed_on_networks_of_their_own(finished, options, data, monkeypatch):
    """Whatever the clock says: its ticks are counted."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(speed, "now", lambda device: next(ticks))
    state = torch.get_rng_state()
    found = speed.seconds_per_step(finished, options, data, {"sgd": 0.1, "repopt": 0.1, "sgs": 0.1})
    assert found == {"sgd": [1, 1, 1], "repopt": [1, 1, 1], "sgs": [1, 1, 1]}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_damaged_part_is_named(source, tmp_path, capsys):
    train(source, tmp_path, "--name", "a", "--recipe", "sgd")
    damaged = tmp_path / "a" / "state" / "sgd-seed0.json"
    damaged.write_text("{")
    arguments = [*train_arguments(source, tmp_path, "--name", "a", "--recipe", "sgd"), "--resume"]
    assert main(arguments) == 2
    assert f"{damaged} is damaged" in capsys.readouterr().err
    damaged.unlink()
    damaged.with_suffix(".pt").write_bytes(b"half")
    assert main(arguments) == 2
    assert "sgd-seed0.pt: cannot be read, it is damaged" in capsys.readouterr().err
    damaged.with_suffix(".pt").unlink()
    assert main(arguments) == 0
    assert tensors(tmp_path / "a" / "weights" / "sgd-seed0.pt")


def test_a_job_with_averages_tells_and_keeps_them(source, tmp_path, data):
    train(source, tmp_path, "--name", "whole", "--recipe", "sgd,repopt", "--ema-decay", "0.5", "--validation", "0.4",
          "--momentum-dtype", "bfloat16")  # fmt: skip
    folder = tmp_path / "whole"
    summary = summary_of(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = (folder / "summary.md").read_text()
    assert "| recipe | lr | test accuracy, % | of the weights, % |" in text
    assert "Test accuracy after 2 epochs, over seed 0, of moving averages of the weights." in text
    for name, figures in summary["recipes"].items():
        last = [line for line in lines if line["run"] == f"{name}-seed0"][-1]
        assert figures["test_accuracy"] == [last["test_accuracy"]]
        assert figures["weights_test_accuracy"] == [last["weights_test_accuracy"]]
        assert f"{name} (averages) against its weights: one seed allows no statement." in summary["statements"]
        network = gr.models.repopt_vgg_small(num_classes=10)
        network.load_state_dict(tensors(folder / "weights" / f"{name}-seed0.pt"))
        assert accuracy(network, data, data.test, "cpu") == last["test_accuracy"]
        kept = json.loads((folder / "state" / f"{name}-seed0.json").read_text())
        assert {"validation_accuracy", "weights_validation_accuracy"} <= kept.keys()
    (search,) = [line for line in lines if line["run"] == "search"][-1:]
    assert "weights_test_accuracy" not in search
