"""A whole job: Hyper-Search, learning rates, every recipe for every seed, the check CSLA = GR, the report.

A job that is killed at any moment can be resumed. Each of its parts has a file of its own in `state` (trainings.py),
and everything else in the folder can be made again from those.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradrep_kernels.messages import counted
from gradrep_kernels.recipes import files, metrics, ranks
from gradrep_kernels.recipes.build import plain_model
from gradrep_kernels.recipes.costs.run import COSTS, cost_settings, write_costs
from gradrep_kernels.recipes.data.loader import Loader
from gradrep_kernels.recipes.equivalence import csla_equals_gr
from gradrep_kernels.recipes.options.declare import shown
from gradrep_kernels.recipes.options.resolve import Options
from gradrep_kernels.recipes.progress import Reporter
from gradrep_kernels.recipes.report import write_report
from gradrep_kernels.recipes.runs import Run
from gradrep_kernels.recipes.scale_sources import initial_scales
from gradrep_kernels.recipes.shared_run import check_count
from gradrep_kernels.recipes.speed import seconds_per_step
from gradrep_kernels.recipes.table import Recipe
from gradrep_kernels.recipes.training import repeatable
from gradrep_kernels.recipes.trainings import (
    CHECK,
    RANKS,
    SEARCH,
    STATE,
    Training,
    do_training,
    epochs_so_far,
    searched_scales,
    training_name,
)
from gradrep_kernels.recipes.validation import hold_out, split_data
from gradrep_kernels.recipes.workers import Call, Listener, Step, do_steps

__all__ = ["run_job"]

_METRICS = "metrics.jsonl"
_SPEED, _SECONDS = "speed", "seconds"  # names in `state`
_REMEDY = "remove it to do this part anew"
_BRANCHES_COST = 2.0  # Steps with branches, over those without.


def run_job(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Do the rest of a run and write its report.

    Returns the summary, which summary.json holds too. Of several processes rank 0 alone writes, and all return it.
    """
    try:
        summary = _RunningJob(run, reporter).run()
        ranks.from_first(lambda: _tell_costs(run, summary, reporter))
        return summary
    finally:
        split_data.cache_clear()  # The data may change before the next job of this process.
        reporter.close()


def _tell_costs(run: Run, summary: Mapping[str, Any], reporter: Reporter) -> None:
    """Measure what each recipe costs, where that is asked for and not done. It is what it costs one process."""
    if run.options.costs and not (run.folder / f"{COSTS}.json").exists():
        reporter.line(f"{run.folder}: what each recipe costs")
        with ranks.alone():
            write_costs(run, cost_settings(run.options), summary, reporter.doing)


class _RunningJob:
    """A run, with the results of its parts by their names."""

    def __init__(self, run: Run, reporter: Reporter):
        self.folder, self.options, self.data, self.reporter = run.folder, run.options, run.data, reporter
        self.trained_on, _ = hold_out(self.data, self.options.validation)
        self.rows = self.options.rows
        first = self.options.seed
        self.seeds = range(first, first + self.options.seeds)
        self.searches = self.options.searches
        self.state = self.folder / STATE
        self.results: dict[str, Any] = {}
        self.start = time.monotonic()

    def run(self) -> dict[str, Any]:
        steps = list(self._steps())
        self.results |= ranks.from_first(lambda: self._begin([step.name for step in steps]))
        listener = _Progress(self.folder / _METRICS, self.reporter) if ranks.first() else _Silent()
        workers = self.options.workers if ranks.count() == 1 else 1
        do_steps(steps, self.results, workers, listener, self._done)
        if self.rows and _SPEED not in self.results:
            self.reporter.doing("seconds a step")
            self.reporter.line(f"{self.folder}: timing a step of each row")
            rates = {row.name: self._rate(row) for row in self.rows if self._trained(row)}
            self._done(_SPEED, seconds_per_step(self.folder, self.options, self.trained_on, rates))
        return ranks.from_first(self._report)

    def _begin(self, names: Sequence[str]) -> dict[str, Any]:
        """Make the folder fit for the rest of the steps of these names, and return the results that are there."""
        self.state.mkdir(exist_ok=True)
        self._check_ranks()
        results = {}
        for name in [*names, _SPEED, _SECONDS]:
            path = self.state / f"{name}.json"
            if path.exists():
                results[name] = files.read_json(path, _REMEDY)
        self.seconds_before = results.pop(_SECONDS, 0.0)
        epochs = {
            name: results[name]["epochs"] if name in results else epochs_so_far(self.folder, name)
            for name in names
            if name != CHECK
        }
        metrics.rewrite(self.folder / _METRICS, epochs)
        self._announce(epochs, results)
        return results

    def _check_ranks(self) -> None:
        """Hold the number of processes against that of the beginning, which results depend on."""
        path, processes = self.state / f"{RANKS}.json", ranks.count()
        if path.exists():
            check_count(self.folder, files.read_json(path, _REMEDY))
            return
        check_count(self.folder, 1 if any(self.state.iterdir()) else processes)
        files.write_json(path, processes)

    def _report(self) -> dict[str, Any]:
        self._save_seconds()
        scales, initial = searched_scales(self.folder), None
        if scales is not None:
            with repeatable(self.options.threads, "cpu"):
                initial = initial_scales(plain_model(self.options, self.data, self.options.seed))
        with ranks.alone():  # The others wait for the summary, and would take what is told on the way for it.
            return write_report(
                self.folder, self.options, self.data, self._trainings(), list(self.seeds), self.results, scales, initial
            )

    def _steps(self) -> Iterator[Step]:
        options = self.options
        after_search = (SEARCH,) if self.searches else ()
        if self.searches:
            search = Training(SEARCH, None, options.seed, options.search_lr, options.search_epochs)
            # It goes first, because others wait for it.
            yield Step(SEARCH, (), lambda: self._training_call(search), math.inf)
        if options.check_steps and self.rows and (self.searches or options.scales is not None):
            yield Step(CHECK, after_search, lambda: (_check, (self.folder, options)), 0.0)
        for row in self.rows:
            cost = options.epochs * (1.0 if row.plain_network else _BRANCHES_COST)
            needs = after_search if row.needs_search else ()
            choosing = self._choosing(row)
            for training in choosing:
                yield Step(training.name, needs, lambda t=training: self._training_call(t), cost)
            choices = [training.name for training in self._choosing(self._rate_row(row))]
            chosen = {training.seed for training in choosing}
            for seed in self.seeds:
                if seed not in chosen:
                    call = lambda row=row, seed=seed: self._call_at_rate(row, seed)  # noqa: E731
                    yield Step(training_name(row.name, seed), (*needs, *choices), call, cost)

    def _choosing(self, row: Recipe) -> list[Training]:
        """The trainings that choose the learning rate of a row, none where there is no choice."""
        rates = self.options.lr
        if len(rates) == 1 or self._rate_row(row) is not row:
            return []
        return [
            Training(training_name(row.name, seed, lr), row.name, seed, lr, self.options.epochs)
            for lr in rates
            for seed in self.seeds[: self.options.lr_seeds]
        ]

    def _rate_row(self, row: Recipe) -> Recipe:
        """The row whose choice of a learning rate holds for `row`."""
        return next((other for other in self.rows if other.name == row.rate_of), row)

    def _rate(self, row: Recipe) -> float:
        """The learning rate with the best mean accuracy on the validation part, the lowest of equals.

        It is the lowest too where the row that chooses could not be trained.
        """
        choosing = self._choosing(self._rate_row(row))
        if not choosing or not self._trained(self._rate_row(row)):
            return self.options.lr[0]
        merits = {lr: [0, 0.0] for lr in self.options.lr}
        for training in choosing:
            figures = self.results[training.name]
            # A rate comes after all that diverged less often.
            merits[training.lr][0] -= figures["diverged"] is not None
            merits[training.lr][1] += figures["validation_accuracy"]
        return max(merits, key=merits.__getitem__)

    def _call_at_rate(self, row: Recipe, seed: int) -> Call:
        training = Training(training_name(row.name, seed), row.name, seed, self._rate(row), self.options.epochs)
        return self._training_call(training)

    def _trainings(self) -> dict[str, dict[float, list[dict[str, Any]]]]:
        """{row: {learning rate, the chosen one first: figures of each seed}} of the rows that were trained."""
        found = {}
        for row in filter(self._trained, self.rows):
            rate = self._rate(row)
            by_rate: dict[float, list[dict[str, Any]]] = {rate: []}
            for training in self._choosing(row):
                by_rate.setdefault(training.lr, []).append(self.results[training.name])
            names = [training_name(row.name, seed) for seed in self.seeds]
            by_rate[rate] += [self.results[name] for name in names if name in self.results]
            found[row.name] = by_rate
        return found

    def _trained(self, row: Recipe) -> bool:
        return not (row.needs_search and self.searches and self.results[SEARCH]["diverged"])

    def _training_call(self, training: Training) -> Call:
        row = next((row for row in self.rows if row.name == training.recipe), None)
        if row is not None and not self._trained(row):
            return _not_trained, ()
        return do_training, (self.folder, self.options, training)

    def _announce(self, epochs: Mapping[str, Sequence[Any]], results: Mapping[str, Any]) -> None:
        """Say what is ahead. `epochs` are those that are done of each training, `results` those that are whole."""
        options, parts = self.options, []
        if self.searches:
            parts.append(f"a Hyper-Search of {counted(options.search_epochs, 'epoch')}")
        trainings = len(epochs) - self.searches
        if trainings:
            rates = shown(options.lr)
            parts.append(
                f"{counted(trainings, 'training')} of {counted(options.epochs, 'epoch')} with learning rate {rates}"
            )
        at_a_time = f"; {options.workers} at a time" if options.workers > 1 and len(epochs) > 1 else ""
        if ranks.count() > 1:
            at_a_time = f"; {ranks.count()} processes train together"
        self.reporter.line(f"{self.folder}: {', '.join(parts)}{at_a_time}")
        for line in options.advice():
            self.reporter.line(line)
        planned = {name: options.search_epochs if name == SEARCH else options.epochs for name in epochs}
        batches = {name: self._batches(options.of_search() if name == SEARCH else options) for name in epochs}
        done = sum((planned[name] if name in results else len(epochs[name])) * batches[name] for name in epochs)
        self.reporter.start(sum(planned[name] * batches[name] for name in epochs), done)

    def _batches(self, options: Options) -> int:
        """How many batches an epoch has."""
        return len(Loader(self.trained_on, self.trained_on.train, options.batch_size, seed=0))

    def _done(self, name: str, result: Any) -> None:
        if name in (CHECK, _SPEED):
            self.results[name] = result
        if not ranks.first():
            return
        if name in (CHECK, _SPEED):
            files.write_json(self.state / f"{name}.json", result)
        else:
            self.reporter.line(_training_line(name, result, "--search-lr" if name == SEARCH and self.rows else "--lr"))
        self._save_seconds()

    def _save_seconds(self) -> None:
        self.results[_SECONDS] = self.seconds_before + time.monotonic() - self.start
        files.write_json(self.state / f"{_SECONDS}.json", self.results[_SECONDS])


class _Progress:
    """The `Listener` of a job: metrics.jsonl, and what a person sees."""

    def __init__(self, metrics_path: Path, reporter: Reporter):
        self.metrics_path, self.reporter = metrics_path, reporter

    def batch(self) -> None:
        self.reporter.batch()

    def epoch(self, training: str, epoch: int, epochs: int, record: Mapping[str, Any]) -> None:
        metrics.append(self.metrics_path, training, epoch, record)
        self.reporter.doing(f"{training} {epoch}/{epochs}")
        loss = "not finite" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
        reached = f", test accuracy {record['test_accuracy']:.2%}" if "test_accuracy" in record else ""
        self.reporter.epoch(f"  {training}, epoch {epoch} of {epochs}: loss {loss}{reached}")


class _Silent:
    """The `Listener` of ranks that write and print nothing."""

    def batch(self) -> None:
        pass

    def epoch(self, training: str, epoch: int, epochs: int, record: Mapping[str, Any]) -> None:
        pass


def _training_line(name: str, figures: Mapping[str, Any], flag: str) -> str:
    """`flag`: the option that sets its learning rate."""
    if "not_trained" in figures:
        return f"{name}: not trained, {figures['not_trained']}"
    if figures["diverged"]:
        lower = f"{flag} below {figures['lr']:g} may help"
        return f"{name}: diverged in epoch {figures['diverged']}, what it computes is not finite; {lower}"
    epochs = figures["epochs"]
    seconds = sum(record["seconds"] + record["sgs_seconds"] for record in epochs)
    reached = epochs[-1]["test_accuracy"]
    return f"{name}: test accuracy {reached:.2%} after {counted(len(epochs), 'epoch')}, {seconds:.1f} s"


def _not_trained(listener: Listener) -> dict[str, Any]:
    return {"not_trained": "the Hyper-Search diverged"}


def _check(folder: Path, options: Options, listener: Listener) -> dict[str, Any] | None:
    if not ranks.first():  # It is done on one CPU. The others wait at the beginning of the next training.
        return None
    scales = searched_scales(folder)
    if scales is None:  # The Hyper-Search diverged.
        return None
    data, _ = split_data(options)
    with repeatable(options.threads, options.device):
        return csla_equals_gr(options, data, scales)
