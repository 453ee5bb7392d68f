"""The command ``compress``: makes a trained model shallow, and writes it as plain torchdyn."""

import functools
import json
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdyn_mintime import LearnableSolver, LearnableSpan, early_exit, trim, unwrap, wrap
from torchdyn_mintime.experiments import UsageError, datasets, measure, methods, models, results
from torchdyn_mintime.experiments.context import Settings
from torchdyn_mintime.experiments.measure import CHUNK, forward, scores
from torchdyn_mintime.experiments.store import Plan, Store, load_model, put
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import LOOKED_AT, Run, race

__all__ = ["compress"]

SLACK = (0.02, 1e-3)
"""Without a given target, the loss may rise above the model's training loss by this share of it and this much more."""

SOLVER_TOL = 0.1
"""The solver error that ``--trim`` allows, over the displacement. It is also the default of a search."""

CONFIDENCES = (0.6, 0.7, 0.75, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 0.995, 0.999)
"""Levels of confidence at which a sample may stop early. Bisection takes the lowest that keeps the accuracy."""

SEARCHED = replace(methods.METHODS["shallowest"], label="compress")


def compress(
    checkpoint: Path,
    folder: Path,
    store: Store,
    *,
    target: float | None = None,
    lr: float | None = None,
    iterations: int | None = None,
    only_trim: bool = False,
) -> Path | None:
    """Fine-tunes a model that ``run`` has trained to the fewest evaluations, and writes it as plain torchdyn.

    Args:
        checkpoint: the ``.pt`` of a finished run, with its ``.json`` beside it.
        folder: where to write the compressed model.
        store: has the data, the device and the console.
        target: the training loss to keep; default: 0.001 more than 1.02 times the model's own.
        lr: learning rate; default: a tenth of the run's, since the model is trained already.
        iterations: of fine-tuning, at most; default: as many as the run's settings have.
        only_trim: train nothing, and only remove steps and time that the loss does not need.

    Returns:
        The file written; None if no model met the target as a true ODE.

    Raises:
        UsageError: the checkpoint is not that of a finished run, or its model cannot be compressed.
    """
    plan, before = _record_of(checkpoint)
    task, method, console = TASKS[plan.task], TASKS[plan.task].method(plan.method), store.console
    if method.span is not None and not method.frozen:
        raise UsageError(
            f"{checkpoint} is a {method.label} model, whose training has made it shallow already; give a vanilla one"
        )
    if method.skips or task.goal is not measure.CLASSIFICATION:
        raise UsageError(
            f"compress takes only classifiers with an ODE, and {checkpoint} is none; give a vanilla classifier"
        )
    model = _bare(plan, checkpoint, store.device)
    data = store.data(plan).to(torch.device(store.device))
    if target is None:
        own = before["train_loss"]
        if only_trim:
            own = max(own, scores(forward(model, data.x[:LOOKED_AT]).output, data.y[:LOOKED_AT])[0])
        target = own * (1 + SLACK[0]) + SLACK[1]
    settings = plan.settings.but(target=target, lr=plan.settings.lr / 10 if lr is None else lr, iterations=iterations)
    after: dict[str, Any] = {"failure": "", "lr": settings.lr}
    if only_trim:
        start = measure.clock(data.x.device)
        with console.status("removing steps and time that the loss does not need"):
            wrap(model, model.t_span)
            _trim(model, data, target)
        after["training"] = measure.clock(data.x.device) - start
        after["t_f"] = model.t_f
        measure.judge_classifier(model, data, after)
        with console.status("stopping each sample early"):
            console.print(_by_sample(plan, checkpoint, data, target), highlight=False)
    else:
        run = Run(task, SEARCHED, settings, data, store.device, start=model.state_dict())
        if not race([run], console, plan.task):
            run.failure = run.driver.finish()
            console.print("Stopped: this is the best model so far. Start the command again to search for a better one.")
        model, after = run.model, run.judge()
    path, said = None, f"Nothing was written: {after['failure']}"
    if not after["failure"]:
        path = _write(model, plan, data, folder / f"{checkpoint.stem}-compressed.pt")
        accuracy = 100 * scores(forward(model, data.x_test).output, data.y_test)[1]
        said = f"In plain torchdyn {accuracy:.2f} % on the test data. The file, whose entry 'how' says how to load it: {path}"
    base = results.frame_of([before])
    lines = [results.Line("before", base, base), results.Line("after", results.frame_of([{**before, **after}]), base)]
    cells = task.goal.report.frame(lines, detailed=True).drop(columns=["paper", "inference ms", "to target s"])
    caption = f"Target: training loss {target:.4g}. At 1e-7: the same model with its ODE solved at that tolerance."
    results.print_table(cells, f"{task.title}: compressed", caption, console)
    console.print(f"Evaluations: {before['nfe'] / max(after['nfe'], 1):.1f} times fewer. {said}", highlight=False)
    return path


def _record_of(checkpoint: Path) -> tuple[Plan, dict[str, Any]]:
    """Returns the plan and the figures of a finished run."""
    try:
        if checkpoint.suffix != ".pt":
            raise ValueError("its name does not end in .pt")
        record = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
        plan = record["plan"]
        return Plan(plan["task"], plan["method"], Settings(**plan["settings"])), record["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{checkpoint} is not the .pt of a finished run with its .json beside it ({error}). Train one first: "
            "`python -m torchdyn_mintime run digits --method vanilla` writes it into results/runs"
        ) from error


def _bare(plan: Plan, checkpoint: Path, device: torch.device | str) -> models.Model:
    """Returns the trained model with torchdyn's own NeuralODE, also if it was trained in a span."""
    model = load_model(plan, checkpoint)
    if isinstance(model.node, LearnableSpan):
        model.node = model.node.node
    return model.to(device)


def _trim(model: models.Model, data: datasets.Data, target: float, keep_step: bool = False) -> None:
    """Trims the model, by the loss on the first :data:`LOOKED_AT` training samples."""
    x, y = data.x[:LOOKED_AT].split(CHUNK), data.y[:LOOKED_AT].split(CHUNK)
    try:
        trim(model, list(zip(x, y, strict=True)), cross_entropy, target, solver_tol=SOLVER_TOL, keep_step=keep_step)
    except ValueError as error:  # the model is above the target, or no true ODE, as it is
        raise UsageError(f"{error} (--target)") from error


def _by_sample(plan: Plan, checkpoint: Path, data: datasets.Data, target: float) -> str:
    """Compares one end for all samples with an end for each, both at the model's own steps and chosen on the training data."""
    model, common = (_bare(plan, checkpoint, data.x.device).eval() for _ in range(2))
    for each in (model, common):
        wrap(each, each.t_span)
    assert isinstance(model.node, LearnableSpan)
    if model.node.adaptive:
        return "Samples cannot stop early: the adaptive solver chooses its steps for a whole batch."

    def exits(level: float, x: Tensor) -> tuple[Tensor, float]:
        """Returns the outputs, and the mean evaluations of a sample."""
        parts = [early_exit(model, part, lambda out: out.softmax(1).amax(1) >= level) for part in x.split(CHUNK)]
        return torch.cat([p.output for p in parts]), torch.cat([p.nfe for p in parts]).double().mean().item()

    _trim(common, data, target, keep_step=True)
    x, y = data.x[:LOOKED_AT], data.y[:LOOKED_AT]
    kept = scores(forward(common, x).output, y)[1]
    # The higher the level, the later a sample stops, and as a rule the higher the accuracy.
    first = bisect_left(CONFIDENCES, True, key=lambda level: scores(exits(level, x)[0], y)[1] >= kept)
    if first == len(CONFIDENCES):
        return f"If each sample stops early, even a confidence of {CONFIDENCES[-1]:g} does not keep the accuracy."
    level = CONFIDENCES[first]
    test, (own, nfe) = forward(common, data.x_test), exits(level, data.x_test)
    right = [100 * scores(out, data.y_test)[1] for out in (test.output, own)]
    return (
        f"At the model's own steps, one end for all samples takes {test.nfe} evaluations, for {right[0]:.2f} % on the test "
        f"data. If each sample stops at a confidence of {level:g}, it takes {nfe:.1f} in the mean ({nfe / test.nfe:.2f} of "
        f"that), for {right[1]:.2f} %."
    )


def _write(model: models.Model, plan: Plan, data: datasets.Data, path: Path) -> Path:
    """Takes the span out of the model, and writes the model's state, grid and solver."""
    name, solver = model.node.stepper.name, model.node.solver
    with torch.no_grad():
        model.t_span = model.node.grid()  # what is passed at every call
        unwrap(model, data.x_test[:8])
    model.t_span = model.node.t_span
    how = "model.node = NeuralODE(field, solver=solver); model.node.t_span = t_span; model.load_state_dict(state)"
    if isinstance(solver, LearnableSolver):
        how = f"from torchdyn_mintime import LearnableSolver; solver = LearnableSolver({solver.extra_repr()}); {how}"
    kept = {"state": model.state_dict(), "t_span": model.node.t_span, "solver": name, "task": plan.task, "how": how}
    put(path, functools.partial(torch.save, kept))
    return path
