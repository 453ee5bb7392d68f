"""A trained model made shallow and handed on as plain torchdyn: the ``compress`` command."""

import json
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdyn_mintime import LearnableSpan, early_exit, trim, unwrap, wrap
from torchdyn_mintime.experiments import measure
from torchdyn_mintime.experiments.data import Data
from torchdyn_mintime.experiments.drivers import Search
from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.images import Source
from torchdyn_mintime.experiments.methods import METHODS
from torchdyn_mintime.experiments.models import Classifier, NoODE
from torchdyn_mintime.experiments.progress import bars
from torchdyn_mintime.experiments.results import Result
from torchdyn_mintime.experiments.store import Plan, load_model
from torchdyn_mintime.experiments.tasks import TASKS, Settings
from torchdyn_mintime.experiments.training import LOOKED_AT, Run, clock, race

__all__ = ["Compressed", "compress"]

SLACK = (0.02, 1e-3)
"""How far above its training loss a model may come out, where no target is given: relative and absolute."""

SOLVER_TOL = 0.1
"""The relative solver error allowed at t_f where nothing is trained; a search has the same by itself."""

CONFIDENCES = (0.6, 0.7, 0.75, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 0.995, 0.999)
"""Levels at which a sample may leave by itself; the lowest found by halving that keeps the accuracy is taken."""


@dataclass(frozen=True)
class Compressed:
    """What became of a model.

    Attributes:
        evaluations, accuracy, reference_accuracy, train_loss: (before, after); accuracies are on the test data, the second
            with the ODE solved at tolerance 1e-7.
        plain_accuracy: of the model as plain torchdyn solves it; None where nothing was found.
        seconds: (of the training of the model given, of the fine-tuning).
        path: the file written; None where the target was not met as a true ODE.
    """

    evaluations: tuple[int, int]
    accuracy: tuple[float, float]
    reference_accuracy: tuple[float, float]
    train_loss: tuple[float, float]
    plain_accuracy: float | None
    seconds: tuple[float, float]
    path: Path | None


def compress(
    checkpoint: Path,
    folder: Path,
    console: Console,
    *,
    target: float | None = None,
    lr: float | None = None,
    iterations: int | None = None,
    source: Source | None = None,
    device: str = "cpu",
    only_trim: bool = False,
) -> Compressed:
    """Fine-tunes a model that ``run`` has trained to the fewest evaluations, and writes it as plain torchdyn.

    Args:
        checkpoint: the ``.pt`` of a finished run, with its ``.json`` beside it.
        folder: where the compressed model goes.
        console: for the table and the progress bar.
        target: the training loss to keep; default: the model's own, by 2 % and .001 more.
        lr: learning rate; default: a tenth of the run's, since the model is trained already.
        iterations: of fine-tuning, at most; default: as many as the run had.
        source: where image data is.
        device: where to train.
        only_trim: train nothing, and take away the steps and the time that the loss does not need.

    Raises:
        UsageError: the checkpoint is no finished run's, or its model cannot be compressed.
    """
    plan, result = _record_of(checkpoint)
    task, model = TASKS[plan.task], load_model(plan, checkpoint)
    if isinstance(model.node, LearnableSpan):
        raise UsageError(f"{checkpoint} is a {result.method} model, made shallow by its training; give a vanilla one")
    if isinstance(model.node, NoODE):
        raise UsageError(f"{checkpoint} has no ODE, so there is nothing to make shallow; give a vanilla one")
    data = task.load(plan.settings, source or Source()).to(torch.device(device))
    before = _figures(model.to(device), data)
    if target is None:
        own = before["train_loss"]
        if only_trim:
            seen = measure.forward(model, data.x[:LOOKED_AT]).logits
            own = max(own, measure.evaluate(seen, data.y[:LOOKED_AT])[0])
        target = own * (1 + SLACK[0]) + SLACK[1]
    lr = plan.settings.lr / 10 if lr is None else lr
    settings = plan.settings.but(target=target, lr=lr, iterations=iterations)
    if only_trim:
        with console.status("taking away what the loss does not need"):
            shallow, seconds, failure = _trimmed(model, data, settings.target)
        with console.status("letting each sample leave by itself"):
            said = _by_sample(lambda: load_model(plan, checkpoint).to(device), data, settings.target)
        console.print(said, highlight=False)
    else:
        shallow, seconds, failure = _fine_tuned(model, data, plan, settings, device, console)
    after = _figures(shallow, data)
    path = plain = None
    if not failure:
        path = _write(shallow, plan, data, folder, checkpoint.stem)
        plain = measure.evaluate(measure.forward(shallow, data.x_test).logits, data.y_test)[1]
    pairs = {name: (before[name], after[name]) for name in before}
    times = (result.training, seconds)
    found = Compressed(**pairs, plain_accuracy=plain, seconds=times, path=path)
    console.print(_table(found, task.title, settings.target))
    console.print(
        f"Plain torchdyn, with how to load it inside: {path}" if path else f"Nothing was written: {failure}",
        highlight=False,
    )
    return found


def _fine_tuned(
    model: Classifier, data: Data, plan: Plan, settings: Settings, device: str, console: Console
) -> tuple[Classifier, float, str]:
    """The model after the search, the seconds that it took, and why nothing was found."""
    search = Run(TASKS[plan.task], METHODS["shallowest"], settings, data, device, start=model.state_dict())
    assert isinstance(search.driver, Search)
    search.driver.limit = settings.iterations
    with bars([search], f"{plan.task} {plan.settings.seed}: compress", console) as show:
        race([search], show)
    return search.model, search.history.seconds_at(len(search.history.seconds)), search.failure


def _trimmed(model: Classifier, data: Data, target: float) -> tuple[Classifier, float, str]:
    start = clock(data.x.device)
    wrap(model, model.t_span)
    _trim(model, data, target)
    return model, clock(data.x.device) - start, ""


def _trim(model: Classifier, data: Data, target: float, keep_step: bool = False) -> None:
    """Judged on as many training samples as a search looks at: a march looks at the rest of the model at every step."""
    x, y = data.x[:LOOKED_AT].split(measure.CHUNK), data.y[:LOOKED_AT].split(measure.CHUNK)
    try:
        trim(model, list(zip(x, y, strict=True)), cross_entropy, target, solver_tol=SOLVER_TOL, keep_step=keep_step)
    except ValueError as error:  # the model is above the target, or no true ODE, as it is
        raise UsageError(f"{error} (--target)") from error


def _by_sample(load: Callable[[], Classifier], data: Data, target: float) -> str:
    """One end for all samples against an end for each, both at the model's own steps, chosen on the training data."""
    model, common = load().eval(), load()
    wrap(model, model.t_span)
    wrap(common, common.t_span)
    if model.node.adaptive:
        return "Samples cannot leave by themselves: the solver chooses its steps for a whole batch."

    def exits(level: float, x: Tensor) -> tuple[Tensor, float]:
        """The outputs, and the evaluations per sample."""
        parts = [
            early_exit(model, part, lambda out: out.softmax(1).amax(1) >= level) for part in x.split(measure.CHUNK)
        ]
        return torch.cat([p.output for p in parts]), torch.cat([p.nfe for p in parts]).double().mean().item()

    _trim(common, data, target, keep_step=True)
    x, y = data.x[:LOOKED_AT], data.y[:LOOKED_AT]
    kept = measure.evaluate(measure.forward(common, x).logits, y)[1]
    # The higher the level, the later a sample leaves, and as a rule the more are right.
    first = bisect_left(CONFIDENCES, True, key=lambda level: measure.evaluate(exits(level, x)[0], y)[1] >= kept)
    if first == len(CONFIDENCES):
        return f"A confidence of {CONFIDENCES[-1]:g} does not keep the accuracy where each sample leaves by itself."
    level = CONFIDENCES[first]
    test, (own, nfe) = measure.forward(common, data.x_test), exits(level, data.x_test)
    right = [100 * measure.evaluate(out, data.y_test)[1] for out in (test.logits, own)]
    return (
        f"At the model's own steps: one end for all takes {test.nfe} evaluations at {right[0]:.2f} % on the test data; where "
        f"each sample leaves at a confidence of {level:g}, {nfe:.1f} in the mean ({nfe / test.nfe:.2f} of them) at "
        f"{right[1]:.2f} %."
    )


def _record_of(checkpoint: Path) -> tuple[Plan, Result]:
    try:
        record = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
        plan = record["plan"]
        settings = type(TASKS[plan["task"]].settings)(**plan["settings"])
        return Plan(plan["task"], plan["method"], settings), Result(**record["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{checkpoint} is not the .pt of a finished run with its .json beside it ({error}); train one first: "
            "`python -m torchdyn_mintime run digits --method vanilla` writes it to results/runs"
        ) from error


def _figures(model: Classifier, data: Data) -> dict[str, Any]:
    test = measure.forward(model, data.x_test)
    return {
        "evaluations": test.nfe,
        "accuracy": measure.evaluate(test.logits, data.y_test)[1],
        "reference_accuracy": measure.evaluate(measure.reference_logits(model, data.x_test), data.y_test)[1],
        "train_loss": measure.evaluate(measure.forward(model, data.x).logits, data.y)[0],
    }


def _write(model: Classifier, plan: Plan, data: Data, folder: Path, name: str) -> Path:
    """Takes the span out of the model, and writes its state, its grid and its solver."""
    solver = model.node._stepper.name
    with torch.no_grad():
        unwrap(model, model.before(data.x_test[:8]))
    model.t_span = model.node.t_span  # what is passed at every call
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-compressed.pt"
    how = "model.node = NeuralODE(field, solver=solver); model.node.t_span = t_span; model.load_state_dict(state)"
    torch.save(
        {"state": model.state_dict(), "t_span": model.node.t_span, "solver": solver, "task": plan.task, "how": how},
        path,
    )
    return path


def _table(found: Compressed, title: str, target: float) -> Table:
    table = Table(
        title=f"{title}: compressed",
        caption=f"Target: training loss {target:.4g}. At 1e-7: the same model, its ODE solved at that tolerance.",
        box=box.SIMPLE_HEAD,
    )
    for head in ("", "before", "after", "ratio"):
        table.add_column(head, justify="left" if head == "" else "right")

    def row(label: str, values: tuple[float, float], form: str, ratio: bool = False, scale: float = 1.0) -> None:
        share = f"{values[0] / values[1]:.1f}" if ratio and values[1] else ""
        table.add_row(label, *(form.format(scale * v) for v in values), share)

    row("evaluations", found.evaluations, "{:g}", ratio=True)
    row("test accuracy, %", found.accuracy, "{:.2f}", scale=100)
    row("at 1e-7, %", found.reference_accuracy, "{:.2f}", scale=100)
    if found.plain_accuracy is not None:
        table.add_row("in plain torchdyn, %", "", f"{100 * found.plain_accuracy:.2f}", "")
    row("training loss", found.train_loss, "{:.4f}")
    row("training, then fine-tuning, s", found.seconds, "{:.2f}", ratio=True)
    return table
