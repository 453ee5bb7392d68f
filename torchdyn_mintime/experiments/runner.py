"""Carries out plans: trains what is missing, side by side, and measures inference in turn."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from torchdyn_mintime.experiments import measure
from torchdyn_mintime.experiments.data import Data
from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.methods import find_method
from torchdyn_mintime.experiments.progress import bars
from torchdyn_mintime.experiments.results import Result
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import Run, race

__all__ = ["carry_out", "side_by_side", "time_inference"]

CHECKPOINT_SECONDS = 20.0


def carry_out(plans: Sequence[Plan], data: Data, store: Store, console: Console, device: str = "cpu") -> list[Result]:
    """Trains the plans that are not finished, one iteration of each in turn, and returns the figures of all.

    Args:
        plans: of one task and one seed.
        data: of that task and seed.
        store: where finished runs and checkpoints are.
        console: for progress bars.
        device: where to train.
    """
    return side_by_side(plans, lambda plan: _begun(plan, data, device), store, console)


def side_by_side(plans: Sequence[Plan], begin: Callable[[Plan], Any], store: Store, console: Console) -> list[Any]:
    """The same for runs of any kind, which ``begin`` makes."""
    missing = [plan for plan in plans if not store.has(plan)]
    runs = {plan: begin(plan) for plan in missing}
    for plan, run in runs.items():
        store.resume(plan, run, console)
    saved = time.monotonic()

    if runs:
        title = f"{missing[0].task} {missing[0].settings.seed}"
        with bars(list(runs.values()), title, console) as show:

            def advanced(run: Any) -> None:
                nonlocal saved
                show(run)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    for plan, other in runs.items():
                        if not other.done:
                            store.checkpoint(plan, other)
                    saved = time.monotonic()

            race(list(runs.values()), advanced)
    for plan, run in runs.items():
        store.save(plan, run)
    return [store.result(plan) for plan in plans]


def _begun(plan: Plan, data: Data, device: str) -> Run:
    try:
        return Run(TASKS[plan.task], find_method(plan.method), plan.settings, data, device)
    except (TypeError, ValueError) as error:  # settings that a span, a method or a search refuses
        raise UsageError(f"{plan.task}, {plan.method}: {error}") from error


def time_inference(plans: Sequence[Plan], data: Data, store: Store, *, calls: int = 11) -> list[Result]:
    """Times one forward pass over the test set, all models in turn, unless every one of them was timed before.

    A model that cannot be solved has no time.
    """
    results = {plan: store.result(plan) for plan in plans}
    timed = [plan for plan, result in results.items() if not math.isnan(result.accuracy)]
    if all(results[plan].inference is not None for plan in timed):
        return list(results.values())
    models = [store.model(plan) for plan in timed]
    with torch.no_grad():
        seconds = measure.inference_times(models, data.x_test, calls)
    for plan, t in zip(timed, seconds, strict=True):
        results[plan] = store.set_inference(plan, t)
    return list(results.values())
