"""What a trained model is worth: accuracy, evaluations, seconds, and the same model solved exactly."""

import statistics
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchdyn.core.defunc import DEFuncBase

from torchdyn_mintime import LearnableSpan
from torchdyn_mintime.experiments.models import Classifier, NoODE, quiet_node
from torchdyn_mintime.experiments.training import clock, end_of, single_thread

__all__ = ["CHUNK", "Pass", "evaluate", "forward", "inference_times", "reference_logits"]

CHUNK = 1000
"""Samples solved at once, so that memory suffices."""

PATIENCE = 60.0
"""Seconds after which no new round of timing is begun, once there were three."""


@torch.no_grad()
def evaluate(logits: Tensor, y: Tensor) -> tuple[float, float]:
    """(loss, accuracy) of logits ``[batch, classes]``."""
    return cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


@dataclass(frozen=True)
class Pass:
    """One forward pass in eval mode.

    Attributes:
        logits: ``[batch, classes]``.
        steps: those of the grid, or the adaptive solver's accepted ones (torchdyn's does not tell: those it returned).
        nfe: evaluations of the field.
    """

    logits: Tensor
    steps: int
    nfe: int


@torch.no_grad()
def forward(model: Classifier, x: Tensor) -> Pass:
    """A forward pass in eval mode, and what it took; large data in parts, with the mean over parts."""
    model.eval()
    logits, steps, nfe = [], [], []
    for part in x.split(CHUNK):
        before = model.node.vf.nfe
        t_eval, sol = model.trajectory(part)
        logits.append(model.head(sol[-1]))
        steps.append(model.node.steps if isinstance(model.node, LearnableSpan) else len(t_eval) - 1)
        nfe.append(model.node.vf.nfe - before)
    return Pass(torch.cat(logits), round(statistics.mean(steps)), round(statistics.mean(nfe)))


@torch.no_grad()
def reference_logits(model: Classifier, x: Tensor, tolerance: float = 1e-7) -> Tensor:
    """Logits of the same trained model, its ODE solved in float64 at a tolerance of 1e-7.

    Where they disagree with the model's own, its steps are too long for it to be the ODE that it stands for.
    """
    model.eval()
    if isinstance(model.node, NoODE):
        return forward(model, x).logits
    core = model.node.vf.vf  # torchdyn wraps a field that takes no time
    timed = not isinstance(core, DEFuncBase) or core.has_time_arg
    field = deepcopy(core.vf if isinstance(core, DEFuncBase) else core).double()
    node = quiet_node(_Timed(field) if timed else field, solver="dopri5", atol=tolerance, rtol=tolerance)
    t_span = torch.tensor([float(model.t_span[0]), end_of(model)], dtype=torch.float64)
    span, head = LearnableSpan(node, t_span).to(x.device), deepcopy(model.head).double()
    return torch.cat([head(span(model.before(part).double())[1][-1]) for part in x.split(CHUNK)])


class _Timed(torch.nn.Module):
    """A field of (t, x) under the signature that torchdyn calls."""

    def __init__(self, field: torch.nn.Module):
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor, args: dict | None = None) -> Tensor:
        return self.field(t, x)


@torch.no_grad()
def inference_times(models: Sequence[Classifier], x: Tensor, calls: int = 11) -> list[float]:
    """Median seconds (see ``clock``) of one forward pass of each model, in turn on one thread, after one to warm up.

    Large models are called less often: no round is begun after :data:`PATIENCE` seconds, once there were three.
    """
    seconds: list[list[float]] = [[] for _ in models]
    began = time.monotonic()
    with single_thread():
        for call in range(calls + 1):
            if call > 3 and time.monotonic() - began > PATIENCE:
                break
            for model, own in zip(models, seconds, strict=True):
                model.eval()
                start = clock(x.device)
                model(x)
                if call:
                    own.append(clock(x.device) - start)
    return [statistics.median(own) for own in seconds]
