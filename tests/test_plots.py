"""Pictures: what is drawn is what was measured."""

import contextlib
import io

import numpy as np
import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime import diagnostics, plots
from torchdyn_mintime.lyapunov import SquaredDistance


@pytest.fixture
def span():
    with contextlib.redirect_stdout(io.StringIO()):
        return tm.LearnableSpan(NeuralODE(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), solver="rk4"))


def test_convergence_and_violation(span, tmp_path):
    regularizer = tm.LyapunovRegularizer(span, SquaredDistance(), 2.0)
    x, target = torch.randn(16, 2), torch.zeros(16, 2)
    certificate = regularizer.certificate(x, target)
    figure, (left, right) = plots.grid_of_axes(1, 2)
    plots.convergence(left, certificate)
    assert len(left.lines) == 17  # a line a sample, and the bound
    np.testing.assert_allclose(left.lines[-1].get_ydata()[-1], np.exp(-2.0), rtol=1e-5)
    t_eval, sol = span(x)
    plots.violation(right, t_eval, regularizer.violation(t_eval, sol, target))
    assert plots.save(figure, tmp_path / "deep" / "a.png").stat().st_size > 1000


def test_growth_profile_and_hamiltonian(span):
    _, axes = plots.grid_of_axes(1, 3)
    plots.growth(axes[0], [0.1, 0.2], [1.0, 0.01], 0.01)
    assert axes[0].lines[0].get_ydata().tolist() == [0.1, 0.2]
    x, y = torch.randn(16, 2), torch.randint(0, 2, (16,))
    found = diagnostics.loss_profile(span, [(x, y)], nn.functional.cross_entropy)
    plots.profile(axes[1], found)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), found.loss.tolist())
    energy = diagnostics.hamiltonian(span, x, nn.functional.cross_entropy, y)
    plots.hamiltonian(axes[2], energy)
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), energy.values.tolist())
