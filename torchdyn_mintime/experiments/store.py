"""Finished and unfinished runs on disk, so that what was trained once is not trained again."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torchdyn_mintime.experiments.methods import find_method
from torchdyn_mintime.experiments.models import Classifier
from torchdyn_mintime.experiments.results import Result, measured
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import History

__all__ = ["JudgedStore", "Plan", "Store", "load_model"]


@dataclass(frozen=True)
class Plan:
    """One run to be made: names of ``TASKS`` and of ``find_method``, or a flow's, and the settings, the seed among them."""

    task: str
    method: str
    settings: Any

    @property
    def key(self) -> str:
        """A file name that differs wherever the plan does."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.task}-{self.method.replace(':', '-')}-seed{self.settings.seed}-{digest}"


def load_model(plan: Plan, path: Path) -> Classifier:
    """The trained model of a finished plan, from the file that a store has written."""
    with torch.random.fork_rng(devices=[]):
        model = find_method(plan.method).model(TASKS[plan.task], plan.settings)
    saved = torch.load(path)
    if "solver" in saved:
        from torchdyn_mintime.shallow import set_steps

        set_steps(model.node, saved["steps"], saved["solver"])
    model.load_state_dict(saved["model"])
    return model


class Store:
    """A folder with a JSON record (figures and history) and a model for each finished plan.

    Of classifiers; for others see :class:`JudgedStore`.

    Args:
        folder: made when something is written.
    """

    result_type: type = Result

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, plan: Plan) -> bool:
        """Whether the plan was finished."""
        return self._record(plan).exists()

    def result(self, plan: Plan) -> Any:
        """The figures of a finished plan."""
        return self.result_type(**json.loads(self._record(plan).read_text(encoding="utf-8"))["result"])

    def history(self, plan: Plan) -> History:
        """The history of a finished plan."""
        return History(**json.loads(self._record(plan).read_text(encoding="utf-8"))["history"])

    def model(self, plan: Plan) -> Any:
        """The trained model of a finished plan."""
        return load_model(plan, self._path(plan, ".pt"))

    def measure(self, plan: Plan, run: Any) -> Any:
        """The figures of a finished run."""
        return measured(plan.task, run)

    def structure(self, run: Any) -> dict[str, Any]:
        """What of a finished run's model its state_dict does not hold."""
        return run.driver.structure(run)

    def save(self, plan: Plan, run: Any) -> Any:
        """Measures a finished run and writes it; its checkpoint goes."""
        result = self.measure(plan, run)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"model": run.model.cpu().state_dict(), **self.structure(run)}
        torch.save(kept, self._path(plan, ".pt"))
        record = {"plan": asdict(plan), "result": asdict(result), "history": asdict(run.history)}
        self._write(self._record(plan), json.dumps(record))
        self._path(plan, ".checkpoint").unlink(missing_ok=True)
        return result

    def set_inference(self, plan: Plan, seconds: float) -> Result:
        """Adds the inference time, which is measured when several models are at hand."""
        record = json.loads(self._record(plan).read_text(encoding="utf-8"))
        result = replace(Result(**record["result"]), inference=seconds)
        self._write(self._record(plan), json.dumps({**record, "result": asdict(result)}))
        return result

    def checkpoint(self, plan: Plan, run: Any) -> None:
        """Writes what a stopped run needs to go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(plan, ".checkpoint")
        torch.save(run.state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)  # never half a file

    def resume(self, plan: Plan, run: Any, console: Console) -> None:
        """Takes up the checkpoint of a stopped run, where there is one."""
        path = self._path(plan, ".checkpoint")
        if path.exists():
            run.load_state_dict(torch.load(path, map_location=run.device))
            console.print(f"{plan.task}, {run.method.label}: goes on after {len(run.history.loss)} iterations")

    def _record(self, plan: Plan) -> Path:
        return self._path(plan, ".json")

    def _path(self, plan: Plan, suffix: str) -> Path:
        return self.folder / f"{plan.key}{suffix}"

    @staticmethod
    def _write(path: Path, text: str) -> None:
        part = path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)


class JudgedStore(Store):
    """Of runs that judge themselves, into the ``result_type`` of a subclass, and whose models need only their state."""

    def measure(self, plan: Plan, run: Any) -> Any:
        """The figures of a finished run."""
        return run.judge()

    def structure(self, run: Any) -> dict[str, Any]:
        """Nothing."""
        return {}
