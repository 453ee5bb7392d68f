"""What a run looks like: how it went, the loss along the flow, and for Lyapunov methods the rate that held."""

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from torchdyn_mintime import LearnableSpan, plots
from torchdyn_mintime.experiments.data import Data
from torchdyn_mintime.experiments.methods import find_method
from torchdyn_mintime.experiments.models import Classifier, NoODE
from torchdyn_mintime.experiments.store import Plan
from torchdyn_mintime.experiments.training import History
from torchdyn_mintime.lyapunov import Certificate, CrossEntropy
from torchdyn_mintime.recipes import lyapunov

__all__ = ["certificate_of", "draw_run"]

MOST = 500
"""Samples shown, of the test data."""


def certificate_of(plan: Plan, model: Classifier, data: Data) -> Certificate | None:
    """Theorem 2 on test data at the method's rate; None for a method without one."""
    rate = find_method(plan.method).rate
    if rate is None:
        return None
    with torch.no_grad():
        z0 = model.eval().before(data.x_test[:MOST])
        return lyapunov(model, CrossEntropy(model.head), rate).certificate(z0, data.y_test[:MOST])


def draw_run(
    plan: Plan, model: Classifier, history: History, data: Data, certificate: Certificate | None, path: Path
) -> Path:
    """Writes the picture of a finished run, with its ``certificate_of``, and returns its path."""
    solved = not isinstance(model.node, NoODE)
    shows_points = certificate is not None and isinstance(model.node, LearnableSpan) and not model.node.adaptive
    figure, axes = plots.grid_of_axes(1, 1 + solved + 2 * shows_points)
    plots.growth(axes[0], history.t_f, history.loss, plan.settings.target, title="t_f and loss in training")
    if solved:
        x, y = data.x_test[:MOST], data.y_test[:MOST]
        with torch.no_grad():
            t_eval, sol = model.eval().trajectory(x)
            loss = [cross_entropy(model.head(z), y).item() for z in sol]
        lines = {"": (t_eval.tolist(), loss)}
        plots.curves(axes[1], lines, x="time t", y="loss of z(t)", title="test loss along the flow", log=True)
    if shows_points:
        assert certificate is not None
        plots.convergence(axes[2], certificate)
        regularizer = lyapunov(model, CrossEntropy(model.head), certificate.rate)
        plots.violation(axes[3], t_eval, regularizer.violation(t_eval, sol, y))
    return plots.save(figure, path)
