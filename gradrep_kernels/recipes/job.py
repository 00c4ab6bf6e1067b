"""A whole job: Hyper-Search, every recipe for every seed, the check CSLA = GR, and the report.

A job that is killed at any moment can be resumed. One file is the truth about what has been done: `checkpoint.pt`,
replaced as a whole after every epoch. Scales and weights are written before the checkpoint says that they are there,
and everything else in the folder can be made again from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gradrep_kernels import csla
from gradrep_kernels.recipes import files, metrics
from gradrep_kernels.recipes.build import Trainee, build, multiplier_bytes, plain_model, search_model
from gradrep_kernels.recipes.equivalence import csla_equals_gr
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.loader import Loader
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import write_report
from gradrep_kernels.recipes.runs import SCALES, Run
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.table import Recipe
from gradrep_kernels.recipes.training import accuracy, repeatable, train_epoch

__all__ = ["run_job"]

_CHECKPOINT, _METRICS, _WEIGHTS = "checkpoint.pt", "metrics.jsonl", "weights"
_SEARCH = "search"


def run_job(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Do the rest of a run and write its report.

    Returns the summary, which summary.json holds too.
    """
    with repeatable(run.options.threads, run.options.device):
        try:
            return _RunningJob(run, reporter).run()
        finally:
            reporter.close()


class _RunningJob:
    """A run with the state of its checkpoint.

    `state` holds `finished` (the figures of each training that is done, by its name), `current` (the training under way
    with the states of its objects, or None), `check` (the result of CSLA = GR) and `seconds` (spent so far).
    """

    def __init__(self, run: Run, reporter: Reporter):
        self.folder, self.options, self.data, self.reporter = run.folder, run.options, run.data, reporter
        self.rows = self.options.rows
        self.seeds = range(self.options.seed, self.options.seed + self.options.seeds)
        needs_search = any(recipe.needs_search for recipe in self.rows)
        self.searches = self.options.scales is None and (needs_search or not self.rows)
        self.state: dict[str, Any] = {"finished": {}, "current": None, "check": None, "seconds": 0.0}
        checkpoint = self.folder / _CHECKPOINT
        if checkpoint.exists():
            try:
                self.state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            except Exception as error:  # torch.load raises half a dozen unrelated classes.
                reason = f"cannot be read, it is damaged ({type(error).__name__})"
                raise InputError(f"{checkpoint}: {reason}; start the run anew under another --name") from error
        self.seconds_before, self.start = self.state["seconds"], time.monotonic()

    def run(self) -> dict[str, Any]:
        metrics.rewrite(self.folder / _METRICS, self._epochs())
        self._announce()
        if self.searches:
            self._train(_SEARCH, self._search_model, self.options.seed, self.options.search_epochs, self._keep_scales)
        scales = csla.load_scales(self.folder / SCALES) if (self.folder / SCALES).exists() else None
        if scales is not None and self.rows and self.options.check_steps and self.state["check"] is None:
            self.reporter.doing("CSLA = GR")
            self.state["check"] = csla_equals_gr(self.options, self.data, scales)
            self._save()
        for recipe in self.rows:
            for seed in self.seeds:
                self._train_recipe(recipe, scales, seed)
        self._save()
        initial = None
        if scales is not None:
            initial = initial_scales(plain_model(self.options, self.data, self.options.seed))
        return write_report(
            self.folder, self.options, self.data, self.rows, list(self.seeds), self.state, scales, initial
        )

    def _announce(self) -> None:
        options, trainings = self.options, len(self.rows) * len(self.seeds)
        search = ", and a Hyper-Search first" if self.searches else ""
        self.reporter.line(f"{self.folder}: {trainings} trainings of {options.epochs} epochs{search}")
        if any(recipe.sgs for recipe in self.rows) and options.sgs_warmup >= options.epochs:
            late = f"--sgs-warmup {options.sgs_warmup}, of {options.epochs} epochs counted from 0"
            self.reporter.line(
                f"no update of the spatial gradient scaling falls due ({late}): it stays ones, and sgs changes nothing"
            )
        batches = len(Loader(self.data, self.data.train, options.batch_size, seed=0))
        epochs = trainings * options.epochs + self.searches * options.search_epochs
        done = sum(len(records) for records in self._epochs().values())
        self.reporter.start(epochs * batches, done * batches)

    def _search_model(self) -> Trainee:
        return search_model(self.options, self.data)

    def _train_recipe(self, recipe: Recipe, scales: csla.Scales | None, seed: int) -> None:
        name = f"{recipe.name}-seed{seed}"
        self._train(
            name,
            lambda: build(recipe, self.options, self.data, scales, seed),
            seed,
            self.options.epochs,
            lambda trainee: self._keep_weights(trainee, name),
        )

    def _train(
        self, name: str, make: Callable[[], Trainee], seed: int, epochs: int, keep: Callable[[Trainee], dict[str, Any]]
    ) -> None:
        """Do one training, from where the checkpoint says that it stands.

        `keep` writes the files of a finished training and returns the figures that the checkpoint is to keep.
        """
        if name in self.state["finished"]:
            return
        trainee = make()
        current = self.state["current"]
        if current is None:
            current = {"run": name, "epochs": [], "first_scalings": None}
        else:
            trainee.model.load_state_dict(current["model"])
            trainee.optimizer.load_state_dict(current["optimizer"])
            if trainee.sgs is not None:
                trainee.sgs.load_state_dict(current["sgs"])
        for epoch in range(len(current["epochs"]), epochs):
            self._train_epoch(trainee, current, seed, epoch, epochs)
        figures = {
            "epochs": current["epochs"],
            "parameters": sum(p.numel() for p in trainee.model.parameters() if p.requires_grad),
            **keep(trainee),
        }
        if trainee.sgs is not None:
            figures["scalings"] = {"start": current["first_scalings"], "end": _as_lists(trainee.sgs.scalings)}
        self.state["finished"][name], self.state["current"] = figures, None
        self._save()
        seconds = sum(record["seconds"] + record["sgs_seconds"] for record in figures["epochs"])
        reached = figures["epochs"][-1]["test_accuracy"]
        self.reporter.line(f"{name}: test accuracy {reached:.2%} after {epochs} epochs, {seconds:.1f} s")

    def _train_epoch(self, trainee: Trainee, current: dict[str, Any], seed: int, epoch: int, epochs: int) -> None:
        """Train and evaluate one epoch (from 0) and save it in checkpoint and metrics."""
        name = current["run"]
        self.reporter.doing(f"{name} {epoch + 1}/{epochs}")
        record = train_epoch(trainee, self.data, self.options, seed, epoch, epochs, self.reporter.batch)
        record["test_accuracy"] = accuracy(trainee.model, self.data, self.options.device)
        if not math.isfinite(record["train_loss"]):
            record["train_loss"] = None  # JSON has no NaN.
        current["epochs"].append(record)
        if trainee.sgs is not None:
            if record["sgs_updated"] and current["first_scalings"] is None:
                current["first_scalings"] = _as_lists(trainee.sgs.scalings)
            current["sgs"] = trainee.sgs.state_dict()
        current["model"], current["optimizer"] = trainee.model.state_dict(), trainee.optimizer.state_dict()
        self.state["current"] = current
        self._save()
        metrics.append(self.folder / _METRICS, name, epoch + 1, record)
        loss = "not finite" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
        reached = f"loss {loss}, test accuracy {record['test_accuracy']:.2%}"
        self.reporter.epoch(f"  {name}, epoch {epoch + 1} of {epochs}: {reached}")

    def _keep_scales(self, trainee: Trainee) -> dict[str, Any]:
        csla.save_scales(csla.extract_scales(trainee.model), self.folder / SCALES)
        return {}

    def _keep_weights(self, trainee: Trainee, name: str) -> dict[str, Any]:
        (self.folder / _WEIGHTS).mkdir(exist_ok=True)
        weights = {key: tensor.detach().cpu() for key, tensor in trainee.model.state_dict().items()}
        files.save_tensors(self.folder / _WEIGHTS / f"{name}.pt", weights)
        return {"multiplier_bytes": multiplier_bytes(trainee)}

    def _save(self) -> None:
        self.state["seconds"] = self.seconds_before + time.monotonic() - self.start
        files.save_tensors(self.folder / _CHECKPOINT, self.state)

    def _epochs(self) -> dict[str, list[dict[str, Any]]]:
        """{training: the records of its epochs so far}, in the order in which they were done."""
        epochs = {name: figures["epochs"] for name, figures in self.state["finished"].items()}
        current = self.state["current"]
        if current is not None:
            epochs[current["run"]] = current["epochs"]
        return epochs


def _as_lists(scalings: Mapping[str, torch.Tensor]) -> dict[str, list[list[float]]]:
    return {name: g.tolist() for name, g in scalings.items()}
