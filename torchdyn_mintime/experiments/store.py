"""Keeps finished and unfinished runs on disk, so that nothing is trained twice."""

import hashlib
import json
import math
import pickle
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from torchdyn_mintime.experiments import UsageError, datasets, measure, models
from torchdyn_mintime.experiments.context import History, Settings
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import Run, race

__all__ = ["Plan", "Store", "load_model", "put", "reading"]

CHECKPOINT_SECONDS = 20.0
"""Unfinished runs are saved after so many seconds."""

FORMAT = 2
"""Version of the records. Runs of another version are made again."""

DRIVE_ROUNDS = 10
"""The drive is measured by so many iterations of training at most."""


@dataclass(frozen=True)
class Plan:
    """One run: the names of a task and of one of its methods, and the settings, which include the seed."""

    task: str
    method: str
    settings: Settings

    @property
    def key(self) -> str:
        """A file name without its ending. Different plans have different ones."""
        digest = hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.task}-{self.method.replace(':', '-')}-seed{self.settings.seed}-{digest}"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Says of a file that is missing, cut or of another kind which files to remove.

    Raises:
        UsageError: in the place of the error that the file gave.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path} is missing or damaged ({type(error).__name__}); remove {path.with_suffix('.*')}, and train it again"
        ) from error


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of which no other process, with the same folder, sees or writes a part.

    Args:
        path: the file; its folder is made.
        write: writes the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        write(part)
        part.replace(path)


def _write(path: Path, record: dict[str, Any]) -> None:
    put(path, lambda part: part.write_text(json.dumps(record) + "\n", encoding="utf-8"))


def load_model(plan: Plan, path: Path) -> models.Model:
    """Returns the trained model of a finished plan from its ``.pt`` file.

    Raises:
        UsageError: the file is missing or damaged.
    """
    task = TASKS[plan.task]
    with torch.random.fork_rng(devices=[]):
        model = task.model(task.method(plan.method), plan.settings)
    with reading(path):
        model.load_state_dict(torch.load(path))
    return model


class Store:
    """A folder with a record (figures and history, as JSON) and a model for each finished plan. Trains what is missing.

    Args:
        folder: the folder, which is made when something is written.
        console: for progress bars and messages; default: prints nothing.
        source: where image data is.
        device: where to train.
    """

    def __init__(
        self, folder: Path, console: Console | None = None, source: datasets.Source | None = None, device: str = "cpu"
    ):
        self.folder, self.source, self.device = folder, source or datasets.Source(), device
        self.console = console or Console(quiet=True)
        self._loaded: tuple[tuple, datasets.Data] | None = None
        self._spoken_of: set[Plan] = set()

    def has(self, plan: Plan) -> bool:
        """Returns whether the plan was finished."""
        return self._path(plan, ".json").exists()

    def result(self, plan: Plan) -> dict[str, Any]:
        """Returns the figures of a finished plan."""
        return self._record(plan)["result"]

    def history(self, plan: Plan) -> History:
        """Returns the history of a finished plan."""
        return History(**self._record(plan)["history"])

    def search(self, plan: Plan) -> dict[str, Any]:
        """Returns the ``verdict`` of a finished search, and as ``front`` the figures of its models at every depth that passed.

        Returns an empty dictionary if the plan is no search.
        """
        return self._record(plan).get("search", {})

    def model(self, plan: Plan) -> models.Model:
        """Returns the trained model of a finished plan."""
        return load_model(plan, self._path(plan, ".pt"))

    def data(self, plan: Plan) -> datasets.Data:
        """Returns the data of a plan."""
        wanted = (plan.task, plan.settings.seed, plan.settings.subset, plan.settings.test)
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = wanted, TASKS[plan.task].load(plan.settings, self.source)
        return self._loaded[1]

    def begin(self, plan: Plan) -> Run:
        """Returns the run of a plan, from its checkpoint if it was stopped.

        Raises:
            UsageError: a span, a method or a search refuses the settings, or the checkpoint is damaged.
            MissingData: the data is not there.
        """
        task, data = TASKS[plan.task], self.data(plan)
        method, path = task.method(plan.method), self._path(plan, ".checkpoint")
        try:
            run = Run(task, method, plan.settings, data, self.device)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{plan.task}, {plan.method}: {error}") from error
        if path.exists():
            with reading(path):
                run.load_state_dict(torch.load(path, map_location=run.device))
            self.console.print(f"{plan.task}, {method.label}: goes on after {len(run.history.loss)} iterations")
        return run

    def finish(self, plans: Sequence[Plan]) -> list[dict[str, Any]]:
        """Trains the plans that are not finished, one iteration of each in turn, and returns the figures of all plans.

        Args:
            plans: plans of one task, or none.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed. What was trained so far is saved, and the next call goes on from there.
        """
        self._say_what_is_done(plans)
        runs = {plan: self.begin(plan) for plan in plans if not self.has(plan)}
        plan_of, saved = {run: plan for plan, run in runs.items()}, time.monotonic()

        def checkpoint() -> list[str]:
            stopped = {plan: run for plan, run in runs.items() if not self.has(plan)}
            for plan, run in stopped.items():
                self.checkpoint(plan, run)
            return [f"{run.method.label} after {len(run.history.loss)} iterations" for run in stopped.values()]

        def advanced(run: Run) -> None:
            nonlocal saved
            if run.done:
                self.save(plan_of[run], run)
            elif time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint()
                saved = time.monotonic()

        if runs and not race(list(runs.values()), self.console, f"{plans[0].task} {plans[0].settings.seed}", advanced):
            kept = "; ".join(checkpoint()) or "every model of this seed, finished"
            raise KeyboardInterrupt(f"Stopped. Saved in {self.folder}: {kept}. The same command goes on from there.")
        for plan, run in runs.items():
            if not self.has(plan):  # there was nothing to train
                self.save(plan, run)
        self._spoken_of.update(plans)
        return [self.result(plan) for plan in plans]

    def _say_what_is_done(self, plans: Sequence[Plan]) -> None:
        """Prints which plans an earlier command has finished, once for each."""
        done = [plan for plan in plans if plan not in self._spoken_of and self.has(plan)]
        if done:
            labels, first = ", ".join(self.result(plan)["method"] for plan in done), done[0]
            hint = "" if self._spoken_of else f" (remove {self.folder} to train anew)"
            self.console.print(
                f"{TASKS[first.task].title}, seed {first.settings.seed}: already done: {labels}{hint}", highlight=False
            )
        self._spoken_of.update(done)

    def time_inference(self, plans: Iterable[Plan], calls: int = 11) -> None:
        """Times a forward pass over the test set, all models in turn, unless all of them were timed before.

        Leaves out models that cannot be solved, and flows, whose sampling is timed instead.
        """
        results = {plan: self.result(plan) for plan in plans}
        solved = [plan for plan, result in results.items() if not math.isnan(result.get("accuracy", math.nan))]
        if all(results[plan]["inference"] is not None for plan in solved):
            return
        x = self.data(solved[0]).x_test
        actions = [partial(self.model(plan).eval(), x) for plan in solved]
        for plan, seconds in zip(solved, measure.median_seconds(actions, x.device, calls), strict=True):
            timed = {**self._record(plan), "result": {**results[plan], "inference": seconds}}
            _write(self._path(plan, ".json"), timed)

    def drive(self, plan: Plan) -> dict[str, float]:
        """Returns the drive: how many times longer torchdyn's own NeuralODE takes than one in a span, by figure.

        Both take the steps of the task. Iterations of training are timed in turn, then inference, except for flows. Returns an
        empty dictionary if a training fails.

        Args:
            plan: vanilla, with the settings of its training.
        """
        path = self._path(plan, ".drive")
        if path.exists():
            with reading(path):
                return json.loads(path.read_text(encoding="utf-8"))
        runs = [self.begin(replace(plan, method=method)) for method in ("torchdyn", "vanilla")]
        began = time.monotonic()
        with measure.single_thread():
            for done in range(DRIVE_ROUNDS + 1):
                for run in runs:
                    run.step()
                    if run.failure:
                        return {}
                if done >= 3 and time.monotonic() - began > measure.PATIENCE:
                    break
        seconds = [statistics.median(b - a for a, b in pairwise(run.history.seconds)) for run in runs]
        ratio = seconds[0] / seconds[1]
        found = {"training": ratio, "to_target": ratio}
        if TASKS[plan.task].goal.accuracy is not None:
            x = self.data(plan).x_test
            bare, wrapped = measure.median_seconds([partial(run.model.eval(), x) for run in runs], x.device)
            found["inference"] = bare / wrapped
        _write(path, found)
        return found

    def save(self, plan: Plan, run: Run) -> dict[str, Any]:
        """Judges a finished run, writes it, removes its checkpoint, and returns its figures."""
        result = run.judge()
        searched = run.searched()  # while the model is still on the device of the training
        put(self._path(plan, ".pt"), partial(torch.save, run.model.cpu().state_dict()))
        record = {"plan": asdict(plan), "result": result, "history": asdict(run.history), "search": searched}
        _write(self._path(plan, ".json"), record)
        self._path(plan, ".checkpoint").unlink(missing_ok=True)
        return result

    def checkpoint(self, plan: Plan, run: Run) -> None:
        """Writes what a stopped run needs to go on, unless another process has finished the plan."""
        if not self.has(plan):
            put(self._path(plan, ".checkpoint"), partial(torch.save, run.state_dict()))

    def _record(self, plan: Plan) -> dict[str, Any]:
        path = self._path(plan, ".json")
        with reading(path):
            return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, plan: Plan, suffix: str) -> Path:
        return self.folder / f"{plan.key}{suffix}"
