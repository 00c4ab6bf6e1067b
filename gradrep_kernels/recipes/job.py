"""The whole job: Hyper-Search, every recipe for every seed, the check CSLA = GR, the report; killed at any moment, it goes on.

One file is the truth about what has been done: `checkpoint.pt`, replaced as a whole after every epoch. Everything else
in the run's folder can be made again from it, or (scales, weights) is written before the checkpoint says that it is there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gradrep_kernels import csla
from gradrep_kernels.recipes import files
from gradrep_kernels.recipes.build import (
    Trainee,
    build,
    initial_scales,
    multiplier_bytes,
    plain_model,
    rows,
    search_model,
)
from gradrep_kernels.recipes.equivalence import csla_equals_gr
from gradrep_kernels.recipes.errors import InputError
from gradrep_kernels.recipes.loader import Loader
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import write_report
from gradrep_kernels.recipes.runs import SCALES, Run
from gradrep_kernels.recipes.training import accuracy, repeatable, train_epoch

__all__ = ["run_job"]

_CHECKPOINT, _METRICS, _WEIGHTS = "checkpoint.pt", "metrics.jsonl", "weights"
_SEARCH = "search"


def run_job(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Do what is left to do of a run and write its report; returns the summary (what summary.json holds)."""
    with repeatable(run.options.threads, run.options.device):
        try:
            return _Job(run, reporter).run()
        finally:
            reporter.close()


class _Job:
    def __init__(self, run: Run, reporter: Reporter):
        self.folder, self.options, self.data, self.reporter = run.folder, run.options, run.data, reporter
        self.rows = rows(self.options)
        self.seeds = range(self.options.seed, self.options.seed + self.options.seeds)
        self.searches = self.options.scales is None and (not self.rows or any(row.uses_scales for row in self.rows))
        checkpoint = self.folder / _CHECKPOINT
        # finished: {run: its figures}; current: the run under way with its states, or None; seconds: spent so far
        self.state: dict[str, Any] = {"finished": {}, "current": None, "check": None, "seconds": 0.0}
        if checkpoint.exists():
            try:
                self.state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            except Exception as error:  # torch.load raises half a dozen unrelated classes
                raise InputError(
                    f"{checkpoint}: cannot be read, it is damaged ({type(error).__name__}); start the run anew under another --name"
                ) from error
        self.before, self.begun = self.state["seconds"], time.monotonic()

    def run(self) -> dict[str, Any]:
        self._rewrite_metrics()
        steps = len(Loader(self.data, self.data.train, self.options.batch_size, seed=0))
        trainings = len(self.rows) * len(self.seeds)
        epochs = trainings * self.options.epochs + self.searches * self.options.search_epochs
        self.reporter.line(
            f"{self.folder}: {trainings} trainings of {self.options.epochs} epochs"
            + ", and a Hyper-Search first" * self.searches
        )
        if any(row.uses_sgs for row in self.rows) and self.options.sgs_warmup >= self.options.epochs:
            late = f"--sgs-warmup {self.options.sgs_warmup}, of {self.options.epochs} epochs counted from 0"
            self.reporter.line(
                f"no update of the spatial gradient scaling falls due ({late}): it stays ones, and sgs changes nothing"
            )
        self.reporter.start(epochs * steps, steps * sum(len(records) for records in self._epochs().values()))
        if self.searches:
            self._train(
                _SEARCH,
                lambda: search_model(self.options, self.data),
                self.options.seed,
                self.options.search_epochs,
                self._keep_scales,
            )
        scales = csla.load_scales(self.folder / SCALES) if (self.folder / SCALES).exists() else None
        if scales is not None and self.rows and self.options.check_steps and self.state["check"] is None:
            self.reporter.doing("CSLA = GR")
            self.state["check"] = csla_equals_gr(self.options, self.data, scales)
            self._save()
        for row in self.rows:
            for seed in self.seeds:
                self._train(
                    f"{row.label}-seed{seed}",
                    lambda row=row, seed=seed: build(row, self.options, self.data, scales, seed),
                    seed,
                    self.options.epochs,
                    lambda trainee, row=row, seed=seed: self._keep_weights(trainee, f"{row.label}-seed{seed}"),
                )
        self._save()
        return write_report(
            self.folder,
            self.options,
            self.data,
            self.rows,
            list(self.seeds),
            self.state,
            scales,
            self._initial_scales(scales),
        )

    def _train(
        self, key: str, make: Callable[[], Trainee], seed: int, epochs: int, keep: Callable[[Trainee], dict[str, Any]]
    ) -> None:
        """One training, from where the checkpoint says it stands; `keep` writes what is to stay of it."""
        if key in self.state["finished"]:
            return
        trainee = make()
        current = self.state["current"]
        if current is None:
            current = {"run": key, "epochs": [], "first_scalings": None}
        else:
            trainee.model.load_state_dict(current["model"])
            trainee.optimizer.load_state_dict(current["optimizer"])
            if trainee.sgs is not None:
                trainee.sgs.load_state_dict(current["sgs"])
        for epoch in range(len(current["epochs"]), epochs):
            self.reporter.doing(f"{key} {epoch + 1}/{epochs}")
            record = train_epoch(trainee, self.data, self.options, seed, epoch, epochs, self.reporter.batch)
            record["test_accuracy"] = accuracy(trainee.model, self.data, self.options.device)
            record["train_loss"] = (
                record["train_loss"] if math.isfinite(record["train_loss"]) else None
            )  # JSON has no NaN
            current["epochs"].append(record)
            if trainee.sgs is not None:
                if record["sgs_updated"] and current["first_scalings"] is None:
                    current["first_scalings"] = _as_lists(trainee.sgs.scalings)
                current["sgs"] = trainee.sgs.state_dict()
            current["model"], current["optimizer"] = trainee.model.state_dict(), trainee.optimizer.state_dict()
            self.state["current"] = current
            self._save()
            self._append_metrics(key, len(current["epochs"]), record)
            self.reporter.epoch(
                f"  {key}, epoch {epoch + 1} of {epochs}: loss {_shown(record['train_loss'])}, test accuracy {record['test_accuracy']:.2%}"
            )
        kept = {
            "epochs": current["epochs"],
            "parameters": sum(p.numel() for p in trainee.model.parameters() if p.requires_grad),
            **keep(trainee),
        }
        if trainee.sgs is not None:
            kept["scalings"] = {"start": current["first_scalings"], "end": _as_lists(trainee.sgs.scalings)}
        self.state["finished"][key], self.state["current"] = kept, None
        self._save()
        seconds = sum(record["seconds"] + record["sgs_seconds"] for record in kept["epochs"])
        self.reporter.line(
            f"{key}: test accuracy {kept['epochs'][-1]['test_accuracy']:.2%} after {epochs} epochs, {seconds:.1f} s"
        )

    def _keep_scales(self, trainee: Trainee) -> dict[str, Any]:
        csla.save_scales(csla.extract_scales(trainee.model), self.folder / SCALES)
        return {}

    def _keep_weights(self, trainee: Trainee, key: str) -> dict[str, Any]:
        (self.folder / _WEIGHTS).mkdir(exist_ok=True)
        weights = {name: tensor.detach().cpu() for name, tensor in trainee.model.state_dict().items()}
        files.save_tensors(self.folder / _WEIGHTS / f"{key}.pt", weights)
        return {"multiplier_bytes": multiplier_bytes(trainee)}

    def _initial_scales(self, scales: csla.Scales | None) -> csla.Scales | None:
        """By the names that the searched scales have; None where there are none."""
        return None if scales is None else initial_scales(plain_model(self.options, self.data, self.options.seed))

    def _save(self) -> None:
        self.state["seconds"] = self.before + time.monotonic() - self.begun
        files.save_tensors(self.folder / _CHECKPOINT, self.state)

    def _epochs(self) -> dict[str, list[dict[str, Any]]]:
        """{run: its epochs so far}, in the order they were done."""
        current = self.state["current"]
        return {key: kept["epochs"] for key, kept in self.state["finished"].items()} | (
            {} if current is None else {current["run"]: current["epochs"]}
        )

    def _rewrite_metrics(self) -> None:
        lines = [
            _metrics_line(key, n, record)
            for key, records in self._epochs().items()
            for n, record in enumerate(records, 1)
        ]
        files.write_text(self.folder / _METRICS, "".join(lines))

    def _append_metrics(self, key: str, epoch: int, record: dict[str, Any]) -> None:
        with (self.folder / _METRICS).open("a", encoding="utf-8") as out:
            out.write(_metrics_line(key, epoch, record))


def _metrics_line(key: str, epoch: int, record: dict[str, Any]) -> str:
    return json.dumps({"run": key, "epoch": epoch, **record}, allow_nan=False) + "\n"


def _as_lists(scalings: Mapping[str, torch.Tensor]) -> dict[str, list[list[float]]]:
    return {name: g.tolist() for name, g in scalings.items()}


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
