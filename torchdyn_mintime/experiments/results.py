"""What is kept of a trained model: its figures as one flat record, printed, and written as CSV and JSON."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchdyn_mintime import IntegrationError
from torchdyn_mintime.experiments import measure
from torchdyn_mintime.experiments.training import Run

__all__ = ["Result", "measured", "print_table", "write"]

WIDTH = 110


@dataclass
class Result:
    """The figures of one trained model.

    Attributes:
        t_f: terminal time, in units of time.
        steps, nfe: of one forward pass on the test set; evaluations of the field.
        training: seconds of all iterations.
        inference: seconds of one forward pass over the test set; filled in where models are timed in turn.
        pretraining: seconds of the first of two stages; None where there is one.
        to_target: seconds of training until the loss first was .01 or less at 100 %; None if never.
        train_loss, train_accuracy, accuracy: at the end, on the training and on the test set (accuracy).
        reference_loss, reference_accuracy: on the test set, of the same model solved at tolerance 1e-7.
        failure: why training stopped early, or an empty text.
    """

    task: str
    method: str
    seed: int
    lr: float
    iterations: int
    t_f: float
    steps: int
    nfe: int
    training: float
    inference: float | None
    pretraining: float | None
    to_target: float | None
    train_loss: float
    train_accuracy: float
    loss: float
    accuracy: float
    reference_loss: float
    reference_accuracy: float
    failure: str = ""


def measured(task: str, run: Run) -> Result:
    """Measures the model of a finished run, all but the inference time. What cannot be solved has NaN figures, and failed."""
    model, data, history = run.model, run.data, run.history
    first, nan = run.driver.first_stage, math.nan
    failure, steps, nfe = run.failure, 0, 0
    on_training = on_test = exactly = (nan, nan)
    try:
        on_training = measure.evaluate(measure.forward(model, data.x).logits, data.y)
        test = measure.forward(model, data.x_test)
        on_test, steps, nfe = measure.evaluate(test.logits, data.y_test), test.steps, test.nfe
        exactly = measure.evaluate(measure.reference_logits(model, data.x_test), data.y_test)
    except IntegrationError as error:
        failure = failure or f"the trained model cannot be solved: {error}"
    return Result(
        task=task,
        method=run.method.label,
        seed=run.settings.seed,
        lr=run.settings.lr,
        iterations=len(history.loss),
        t_f=measure.end_of(model),
        steps=steps,
        nfe=nfe,
        training=history.seconds_at(len(history.seconds)),
        inference=None,
        pretraining=None if first is None else history.seconds_at(first),
        to_target=history.to_target(run.settings.target),
        train_loss=on_training[0],
        train_accuracy=on_training[1],
        loss=on_test[0],
        accuracy=on_test[1],
        reference_loss=exactly[0],
        reference_accuracy=exactly[1],
        failure=failure,
    )


def print_table(table: Table, console: Console, width: int = WIDTH) -> None:
    """Prints a table at the width that its figures need: a narrow window then wraps lines, but no figure is cut."""
    Console(width=max(console.width, width), file=console.file).print(table)


def write(results: Sequence[Any], folder: Path, name: str) -> list[Path]:
    """Writes ``name.csv`` and ``name.json``, of one record or more, all of one kind."""
    folder.mkdir(parents=True, exist_ok=True)
    table, record = folder / f"{name}.csv", folder / f"{name}.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(results[0])])
        writer.writeheader()
        writer.writerows(asdict(r) for r in results)
    record.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    return [table, record]
