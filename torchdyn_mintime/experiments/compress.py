"""A trained model made shallow and handed on as plain torchdyn: the ``compress`` command."""

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
from torchdyn_mintime.experiments.store import Plan, Store, load_model
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import LOOKED_AT, Run, race

__all__ = ["compress"]

SLACK = (0.02, 1e-3)
"""How far above its training loss a model may come out, where no target is given: relative and absolute."""

SOLVER_TOL = 0.1
"""The relative solver error allowed at t_f where nothing is trained; a search has the same by itself."""

CONFIDENCES = (0.6, 0.7, 0.75, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 0.99, 0.995, 0.999)
"""Levels at which a sample may leave by itself; the lowest found by halving that keeps the accuracy is taken."""

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
        folder: where the compressed model goes.
        store: where the data is, where to train, and what to print on.
        target: the training loss to keep; default: the model's own, by 2 % and .001 more.
        lr: learning rate; default: a tenth of the run's, since the model is trained already.
        iterations: of fine-tuning, at most; default: as many as the run had.
        only_trim: train nothing, and take away the steps and the time that the loss does not need.

    Returns:
        The file written; None where the target was not met as a true ODE.

    Raises:
        UsageError: the checkpoint is no finished run's, or its model cannot be compressed.
    """
    plan, before = _record_of(checkpoint)
    task, method, console = TASKS[plan.task], TASKS[plan.task].method(plan.method), store.console
    if method.span is not None and not method.frozen:
        raise UsageError(f"{checkpoint} is a {method.label} model, made shallow by its training; give a vanilla one")
    if method.skips or task.goal is not measure.CLASSIFICATION:
        raise UsageError(
            f"{checkpoint} has no ODE of a classifier, so there is nothing to make shallow; give a vanilla one"
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
        with console.status("taking away what the loss does not need"):
            wrap(model, model.t_span)
            _trim(model, data, target)
        after["training"] = measure.clock(data.x.device) - start
        after["t_f"] = model.t_f
        measure.judge_classifier(model, data, after)
        with console.status("letting each sample leave by itself"):
            console.print(_by_sample(plan, checkpoint, data, target), highlight=False)
    else:
        run = Run(task, SEARCHED, settings, data, store.device, start=model.state_dict())
        if not race([run], console, plan.task):
            run.failure = run.driver.finish()
            console.print("Stopped: this is the best model so far. To look for a better one, start the command again.")
        model, after = run.model, run.judge()
    path, said = None, f"Nothing was written: {after['failure']}"
    if not after["failure"]:
        path = _write(model, plan, data, folder / f"{checkpoint.stem}-compressed.pt")
        accuracy = 100 * scores(forward(model, data.x_test).output, data.y_test)[1]
        said = f"In plain torchdyn {accuracy:.2f} % on the test data; with how to load it inside: {path}"
    base = results.frame_of([before])
    lines = [results.Line("before", base, base), results.Line("after", results.frame_of([{**before, **after}]), base)]
    cells = task.goal.report.frame(lines, detailed=True).drop(columns=["paper", "inference ms", "to target s"])
    caption = f"Target: training loss {target:.4g}. At 1e-7: the same model, its ODE solved at that tolerance."
    results.print_table(cells, f"{task.title}: compressed", caption, console)
    console.print(f"Evaluations: {before['nfe'] / max(after['nfe'], 1):.1f} times fewer. {said}", highlight=False)
    return path


def _record_of(checkpoint: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan and the figures of a finished run."""
    try:
        record = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
        plan = record["plan"]
        return Plan(plan["task"], plan["method"], Settings(**plan["settings"])), record["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{checkpoint} is not the .pt of a finished run with its .json beside it ({error}); train one first: "
            "`python -m torchdyn_mintime run digits --method vanilla` writes it to results/runs"
        ) from error


def _bare(plan: Plan, checkpoint: Path, device: torch.device | str) -> models.Model:
    """The trained model with torchdyn's own NeuralODE, whatever it was trained through."""
    model = load_model(plan, checkpoint)
    if isinstance(model.node, LearnableSpan):
        model.node = model.node.node
    return model.to(device)


def _trim(model: models.Model, data: datasets.Data, target: float, keep_step: bool = False) -> None:
    """Judged on as many training samples as a search looks at: a march looks at the rest of the model at every step."""
    x, y = data.x[:LOOKED_AT].split(CHUNK), data.y[:LOOKED_AT].split(CHUNK)
    try:
        trim(model, list(zip(x, y, strict=True)), cross_entropy, target, solver_tol=SOLVER_TOL, keep_step=keep_step)
    except ValueError as error:  # the model is above the target, or no true ODE, as it is
        raise UsageError(f"{error} (--target)") from error


def _by_sample(plan: Plan, checkpoint: Path, data: datasets.Data, target: float) -> str:
    """One end for all samples against an end for each, both at the model's own steps, chosen on the training data."""
    model, common = (_bare(plan, checkpoint, data.x.device).eval() for _ in range(2))
    for each in (model, common):
        wrap(each, each.t_span)
    assert isinstance(model.node, LearnableSpan)
    if model.node.adaptive:
        return "Samples cannot leave by themselves: the solver chooses its steps for a whole batch."

    def exits(level: float, x: Tensor) -> tuple[Tensor, float]:
        """The outputs, and the evaluations per sample."""
        parts = [early_exit(model, part, lambda out: out.softmax(1).amax(1) >= level) for part in x.split(CHUNK)]
        return torch.cat([p.output for p in parts]), torch.cat([p.nfe for p in parts]).double().mean().item()

    _trim(common, data, target, keep_step=True)
    x, y = data.x[:LOOKED_AT], data.y[:LOOKED_AT]
    kept = scores(forward(common, x).output, y)[1]
    # The higher the level, the later a sample leaves, and as a rule the more are right.
    first = bisect_left(CONFIDENCES, True, key=lambda level: scores(exits(level, x)[0], y)[1] >= kept)
    if first == len(CONFIDENCES):
        return f"A confidence of {CONFIDENCES[-1]:g} does not keep the accuracy where each sample leaves by itself."
    level = CONFIDENCES[first]
    test, (own, nfe) = forward(common, data.x_test), exits(level, data.x_test)
    right = [100 * scores(out, data.y_test)[1] for out in (test.output, own)]
    return (
        f"At the model's own steps: one end for all takes {test.nfe} evaluations at {right[0]:.2f} % on the test data; where "
        f"each sample leaves at a confidence of {level:g}, {nfe:.1f} in the mean ({nfe / test.nfe:.2f} of them) at "
        f"{right[1]:.2f} %."
    )


def _write(model: models.Model, plan: Plan, data: datasets.Data, path: Path) -> Path:
    """Takes the span out of the model, and writes its state, its grid and its solver."""
    name, solver = model.node.stepper.name, model.node.solver
    with torch.no_grad():
        unwrap(model, data.x_test[:8])
    model.t_span = model.node.t_span  # what is passed at every call
    path.parent.mkdir(parents=True, exist_ok=True)
    how = "model.node = NeuralODE(field, solver=solver); model.node.t_span = t_span; model.load_state_dict(state)"
    if isinstance(solver, LearnableSolver):
        how = f"from torchdyn_mintime import LearnableSolver; solver = LearnableSolver({solver.stages}); {how}"
    kept = {"state": model.state_dict(), "t_span": model.node.t_span, "solver": name, "task": plan.task, "how": how}
    torch.save(kept, path)
    return path
