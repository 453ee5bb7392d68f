"""The goals of trainings, and the figures of trained models: by their own steps, solved exactly, and in seconds."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchdyn.models.cnf import autograd_trace, hutch_trace

from torchdyn_mintime import LearnableSpan
from torchdyn_mintime.experiments import datasets, models
from torchdyn_mintime.experiments.results import Line, Report, cell, factors
from torchdyn_mintime.numerics.step_control import rms

__all__ = [
    "CHUNK",
    "CLASSIFICATION",
    "DENSITY",
    "ROBUSTNESS",
    "TUTORIAL",
    "Goal",
    "Pass",
    "clock",
    "exact",
    "forward",
    "judge_classifier",
    "judge_flow",
    "judge_tutorial_flow",
    "median_seconds",
    "robust_accuracy",
    "scores",
    "single_thread",
    "solver_errors",
]

CHUNK = 1000
"""Number of samples solved at once, to limit memory."""

NOISE, ATTACK = 0.3, 0.1
"""Sizes of the noise and of the attack, in standard deviations of the training data."""

ATTACKED, ATTACKED_AT_ONCE = 500, 100
"""Number of test samples for robustness, and how many of them are differentiated at once, to limit memory."""

PATIENCE = 60.0
"""After so many seconds no new round of timing begins, if there were three."""


def clock(device: torch.device) -> float:
    """Returns a time in seconds. On a GPU it is wall time, once the device has finished.

    On a CPU it is the processor time of this thread, which leaves out the work of other programs. On an idle machine it equals
    wall time, since all work is done in one thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()


@contextmanager
def single_thread() -> Iterator[None]:
    """Works in one thread, so that times can be compared. Small networks are also faster in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def median_seconds(actions: Sequence[Callable[[], Any]], device: torch.device, calls: int = 11) -> list[float]:
    """Returns the median seconds (see :func:`clock`) of each action. The actions take turns, in one thread.

    The first round warms up and is not counted. No round begins after :data:`PATIENCE` seconds if three were counted.
    """
    seconds: list[list[float]] = [[] for _ in actions]
    began = time.monotonic()
    with single_thread(), torch.no_grad():
        for call in range(calls + 1):
            if call > 3 and time.monotonic() - began > PATIENCE:
                break
            for action, own in zip(actions, seconds, strict=True):
                start = clock(device)
                action()
                if call:
                    own.append(clock(device) - start)
    return [statistics.median(own) for own in seconds]


@torch.no_grad()
def scores(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """Returns (loss, accuracy) of logits ``[batch, classes]``."""
    return cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


@dataclass(frozen=True)
class Pass:
    """One forward pass in eval mode.

    Attributes:
        output: logits ``[batch, classes]``; of a flow, log-densities ``[batch]``.
        start, end: z(t0) and z(t_f), ``[batch, ...]``.
        steps: steps of the grid, or accepted steps of an adaptive solver. torchdyn's adaptive solvers do not tell theirs:
            for them it is the number of returned points less one.
        nfe: evaluations of the field.
    """

    output: Tensor
    start: Tensor
    end: Tensor
    steps: int
    nfe: int


@torch.no_grad()
def forward(model: models.Model, x: Tensor, chunk: int | None = None) -> Pass:
    """Takes a forward pass in eval mode, in parts of ``chunk`` samples (default :data:`CHUNK`).

    Steps and evaluations of the result are means over the parts.
    """
    model.eval()
    states, steps, nfe = [], [], []
    for part in x.split(chunk or CHUNK):
        before = model.node.vf.nfe
        t_eval, sol = model.trajectory(part)
        states.append((model.head(sol[-1]), sol[0], sol[-1]))
        steps.append(model.node.steps if isinstance(model.node, LearnableSpan) else len(t_eval) - 1)
        nfe.append(model.node.vf.nfe - before)
    output, start, end = map(torch.cat, zip(*states, strict=True))
    return Pass(output, start, end, round(statistics.mean(steps)), round(statistics.mean(nfe)))


def exact(model: models.Model, tolerance: float = 1e-7) -> models.Model:
    """Returns the trained model with its ODE solved in float64 by dopri5 at ``tolerance``, and a flow with its exact trace.

    Where its output differs from that of the model itself, the model's steps are too long to solve its ODE.
    """
    if isinstance(model.node, models.NoODE):
        return deepcopy(model).double()
    ends = torch.tensor([float(model.t_span[0]), model.t_f], dtype=torch.float64)
    return _solved(model, ends, solver="dopri5", atol=tolerance, rtol=tolerance)


def solver_errors(model: models.Model, x: Tensor, solver: str, steps: Sequence[int]) -> dict[int, float]:
    """Returns {evaluations: solver error over the displacement} of a trained model, for each number of equal steps."""
    reference, found = forward(exact(model), x.double()), {}
    for count in steps:
        points = torch.linspace(float(model.t_span[0]), model.t_f, count + 1, dtype=torch.float64)
        own = forward(_solved(model, points, solver=solver), x.double())
        found[own.nfe] = _relative_error(own, reference)
    return found


def _solved(model: models.Model, t_span: Tensor, **options: Any) -> models.Model:
    """Returns a copy in float64 whose ODE is solved at other points, with other options."""
    field = deepcopy(model.node.vf.vf).double()  # with torchdyn's wrapper, if the field takes no time
    for module in field.modules():
        if getattr(module, "trace_estimator", None) is hutch_trace:
            module.trace_estimator = autograd_trace
    before, head = deepcopy(model.before).double(), deepcopy(model.head).double()
    found = models.Model(field, t_span, before=before, head=head, **options)
    found.node = LearnableSpan(found.node, found.t_span)
    return found.to(next(field.parameters()).device)


# ----------------------------------------------------------------------------------------------------------- judges


def judge_classifier(model: models.Model, data: datasets.Data, figures: dict[str, Any]) -> None:
    """Writes the figures of a trained classifier into ``figures``. If one fails, those before it are kept."""
    figures["train_loss"], figures["train_accuracy"] = scores(forward(model, data.x).output, data.y)
    test = forward(model, data.x_test)
    figures["steps"], figures["nfe"] = test.steps, test.nfe
    figures["loss"], figures["accuracy"] = scores(test.output, data.y_test)
    reference = forward(exact(model), data.x_test.double())
    figures["reference_loss"], figures["reference_accuracy"] = scores(reference.output, data.y_test)
    figures["changed"] = (test.output.argmax(1) != reference.output.argmax(1)).double().mean().item()
    figures["error"] = _relative_error(test, reference) if test.steps else 0.0
    figures.update(robust_accuracy(model, data))


def robust_accuracy(model: models.Model, data: datasets.Data) -> dict[str, float]:
    """Returns the accuracies on the first :data:`ATTACKED` test samples under noise, and under an attack of one step.

    The noise is Gaussian, with :data:`NOISE` times the standard deviation of the training data. The attack (FGSM) moves every
    entry of a sample by :data:`ATTACK` times that deviation, in the direction of the sign of the loss's gradient. An entry that
    is the same in all of the training data, such as the zero that is added to annuli, is no input: it stays as it is.
    """
    x, y = data.x_test[:ATTACKED], data.y_test[:ATTACKED]
    varies = (data.x != data.x[0]).any(0)
    deviation, generator = data.x[:, varies].std().item() * varies, torch.Generator().manual_seed(0)
    noise = NOISE * deviation * torch.randn(x.shape, generator=generator).to(x)
    found = {"noisy": scores(forward(model, x + noise).output, y)[1]}
    moved = []
    for part, labels in zip(x.split(ATTACKED_AT_ONCE), y.split(ATTACKED_AT_ONCE), strict=True):
        part = part.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(part), labels), part)
        moved.append((part + ATTACK * deviation * gradient.sign()).detach())
    return {**found, "attacked": scores(forward(model, torch.cat(moved)).output, y)[1]}


def _relative_error(own: Pass, reference: Pass) -> float:
    """Returns the solver error of a pass, over the displacement. The reference is in float64."""
    return float(rms(own.end - reference.end) / rms(reference.end - reference.start))


def judge_flow(model: models.Model, data: datasets.Data, figures: dict[str, Any]) -> None:
    """Writes the figures of a trained flow, on the test samples."""
    x, flow = data.x_test, models.flow_of(model)
    figures["nll"] = _nll(forward(model, x, len(x)))
    with torch.no_grad():
        flow.log_prob(x[:512])
    figures["steps"], figures["nfe"] = flow.span.steps, flow.span.nfe
    figures["reference"] = _nll(forward(exact(model), x.double(), len(x)))
    with torch.random.fork_rng(devices=[]):
        (figures["sampling"],) = median_seconds([partial(flow.sample, len(x))], x.device, calls=3)


def judge_tutorial_flow(model: models.Model, data: datasets.Data, figures: dict[str, Any]) -> None:
    """Writes the figures of the tutorial's flow, with the exact trace: at the tolerance of the training, 1e-4, and at 1e-7."""
    x = data.x_test
    own, reference = (forward(exact(model, tolerance), x.double(), len(x)) for tolerance in (1e-4, 1e-7))
    figures.update(steps=own.steps, nfe=own.nfe, nll=_nll(own), reference=_nll(reference))


def _nll(found: Pass) -> float:
    return -found.output.mean().item()


# ------------------------------------------------------------------------------------------------------------ goals


@dataclass(frozen=True)
class Goal:
    """The goal of a training: its loss, and how the trained model is judged.

    Attributes:
        loss: (output, labels) -> the terminal loss.
        judge: writes the figures of a trained model into a dictionary.
        figures: the names of the figures that ``judge`` writes, beside steps and nfe.
        report: how the figures are shown.
        accuracy: (output, labels) -> the share of right labels; None if there are no labels.
        judges_failed: whether a model whose training failed is judged too.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[models.Model, datasets.Data, dict[str, Any]], None]
    figures: tuple[str, ...]
    report: Report
    accuracy: Callable[[Tensor, Tensor], Tensor] | None = None
    judges_failed: bool = True


def _exactly(line: Line) -> str:
    """Returns what the sentence on a classifier says: its loss beside the baseline's, and its accuracy when solved exactly."""
    models, parts = line.finished, []
    if line.base is not None:
        own, base = (f"{float(frame['loss'].astype(float).median()):.3g}" for frame in (models, line.base))
        parts.append(f"test loss {own}, baseline {base}")
    worst = 100 * models["changed"].max()
    parts.append(
        f"at 1e-7 at least {100 * models['reference_accuracy'].min():.1f} %, up to {worst:.1f} % of predictions change"
    )
    return "; ".join(parts)


_NLL = {"nll": cell("nll", "{:.3f}"), "nll at 1e-7": cell("reference", "{:.3f}")}

CLASSIFICATION = Goal(
    loss=cross_entropy,
    judge=judge_classifier,
    figures=(
        "train_loss",
        "train_accuracy",
        "loss",
        "accuracy",
        "reference_loss",
        "reference_accuracy",
        "changed",
        "error",
        "noisy",
        "attacked",
    ),
    report=Report(
        columns={
            "t_f": cell("t_f", "{:.4g}"),
            "evals": cell("nfe"),
            "training s": cell("training", "{:.2f}", first="pretraining"),
            "drive x depth": factors("training"),
            "inference ms": cell("inference", "{:.2f}", scale=1e3),
            "drive x depth of inference": factors("inference"),
            "to target s": cell("to_target", "{:.2f}", ratio=True),
            "loss": cell("loss", "{:.3g}"),
            "loss at 1e-7": cell("reference_loss", "{:.3g}"),
            "test %": cell("accuracy", "{:.1f}", scale=100),
            "at 1e-7 %": cell("reference_accuracy", "{:.1f}", scale=100),
            "changed %": cell("changed", "{:.1f}", scale=100),
            "error": cell("error", "{:.2g}"),
            "lr": cell("lr", of_failed=True),
        },
        details={
            "steps": cell("steps"),
            "training loss": cell("train_loss", "{:.4f}"),
            "training %": cell("train_accuracy", "{:.1f}", scale=100),
        },
        gains={"training": "training", "time to target": "to_target", "inference": "inference"},
        exactly=lambda line: _exactly(line),
        caption="Medians over seeds (and ranges). Ratios are taken within a seed, between models in a span: the gain of "
        "depth alone. Drive x depth: the drive is the time of torchdyn's own NeuralODE over that in a span, at equal steps; "
        "its product with the depth is the whole gain. To target: until the task's training loss, at 100 % accuracy. Loss: "
        "cross entropy of the test data. At 1e-7: the same model with its ODE solved at that tolerance. Changed: predictions "
        "that differ then. Error: of z(t_f), over the displacement. Times are those of one thread; all models took turns.",
        own="accuracy",
        reference="reference_accuracy",
        slack=0.003,
        higher=True,
    ),
    accuracy=lambda output, y: (output.argmax(1) == y).float().mean(),
)

ROBUSTNESS = replace(
    CLASSIFICATION.report,
    columns={
        "t_f": cell("t_f", "{:.4g}"),
        "evals": cell("nfe"),
        "loss": cell("loss", "{:.3g}"),
        "test %": cell("accuracy", "{:.1f}", scale=100),
        "changed %": cell("changed", "{:.1f}", scale=100),
        "under noise %": cell("noisy", "{:.1f}", scale=100),
        "under attack %": cell("attacked", "{:.1f}", scale=100),
        "lr": cell("lr", of_failed=True),
    },
    details={},
    gains={},
    caption=f"Medians over seeds (and ranges). Noise: Gaussian, of {NOISE:g} standard deviations of the training data. Attack: "
    f"one step of {ATTACK:g} standard deviations along the sign of the gradient. Both on the first {ATTACKED} test samples.",
)

DENSITY = Goal(
    loss=lambda log_density, y: -log_density.mean(),
    judge=judge_flow,
    figures=("nll", "reference", "sampling"),
    report=Report(
        columns={
            "t_f": cell("t_f", "{:.3g}"),
            "steps": cell("steps"),
            "evals": cell("nfe", ratio=True),
            "training s": cell("training", "{:.1f}"),
            "drive x depth": factors("training"),
            "sampling ms": cell("sampling", "{:.0f}", scale=1e3, ratio=True),
            **_NLL,
        },
        gains={"evaluations": "nfe", "training": "training", "sampling": "sampling"},
        exactly=lambda line: f"nll at 1e-7 at most {line.finished['reference'].max():.3f}",
        caption="Medians over seeds (and ranges). Ratios are taken within a seed, between models in a span: the gain of "
        "depth alone. Drive x depth: the drive is the time of torchdyn's own NeuralODE over that in a span, at equal steps. "
        "nll: negative log-likelihood of the test samples in nats, by the model's own steps; at 1e-7: of the same model with "
        "its ODE solved at that tolerance. Times are those of one thread.",
        own="nll",
        reference="reference",
        slack=0.02,  # nats
    ),
    judges_failed=False,
)

TUTORIAL = replace(
    DENSITY,
    judge=judge_tutorial_flow,
    figures=("nll", "reference"),
    report=replace(
        DENSITY.report,
        columns={
            "t_f": cell("t_f", "{:.3g}"),
            "evals": cell("nfe", ratio=True),
            "training s": cell("training", "{:.1f}"),
            "drive x depth": factors("training"),
            **_NLL,
        },
        gains={"evaluations": "nfe", "training": "training"},
        caption="Medians over seeds (and ranges). Ratios to vanilla are taken within a seed. nll: negative log-likelihood of "
        "the test samples in nats, solved at the tolerance of the training, 1e-4; at 1e-7: of the same model, solved at that "
        "tolerance.",
    ),
)
