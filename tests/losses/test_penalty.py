"""What all penalties over spans have in common: what they refuse, sum, count and remember."""

import pytest
import torch
from losses_common import make_span
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.losses.local_error import LocalError
from torchdyn_mintime.losses.penalty import Penalty
from torchdyn_mintime.losses.trajectory import JacobianNorm, KineticEnergy, TaylorRegularizer

PENALTIES = {
    "StepDoubling": (tm.StepDoubling, "rk4"),
    "LocalError": (LocalError, "rk4"),
    "KineticEnergy": (KineticEnergy, "rk4"),
    "JacobianNorm": (JacobianNorm, "rk4"),
    "TaylorRegularizer": (TaylorRegularizer, "rk4"),
    "StepCount": (lambda model, *weight: tm.StepCount(model, 2, *weight), "tsit5"),
}
ALL = pytest.mark.parametrize("make, solver", PENALTIES.values(), ids=PENALTIES)


@ALL
def test_what_every_penalty_refuses(make, solver):
    span, _ = make_span("mlp", solver)
    with pytest.raises(TypeError, match="model must be a module that holds LearnableSpans; got int"):
        make(3)
    with pytest.raises(ValueError, match=r"Linear has no LearnableSpan; wrap it first: torchdyn_mintime.wrap\(model\)"):
        make(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight must be finite and 0 or more; got -1"):
        make(span, -1.0)
    with pytest.raises(TypeError, match="weight must be a number; got '1'"):
        make(span, "1")
    with pytest.raises(RuntimeError, match="call the model first"):
        make(span).penalty()


@ALL
def test_every_penalty_is_weighted_and_summed_over_the_spans_and_leaves_no_trace(make, solver):
    found = []
    for seed in (1, 2):
        span, model = make_span("mlp", solver, seed)
        span(model.x)
        found.append(span)
    torch.manual_seed(0)
    alone = [make(span) for span in found]
    values = [penalty.penalty().item() for penalty in alone]
    counts = [(span.nfe, span.vf.nfe, span.last) for span in found]
    both = make(nn.ModuleList(found), 3.0)
    torch.manual_seed(0)
    assert both.penalty().item() == pytest.approx(3 * sum(values), rel=1e-9)
    assert both.nfe == sum(penalty.nfe for penalty in alone) > 0
    assert [(span.nfe, span.vf.nfe, span.last) for span in found] == counts
    assert repr(both).startswith(f"{type(both).__name__}(weight=3")


def test_a_penalty_of_a_users_own():
    class Speed(Penalty):
        """The mean square of the speed at the end."""

        def of_span(self, span, last):
            with self.beside(last.bound):
                return last.bound.function(last.grid.end, last.states[-1]).square().mean()

    span, model = make_span("linear", "rk4")
    t_eval, sol = span(model.x)
    penalty = Speed(span, 0.5)
    expected = 0.5 * model.rhs(t_eval[-1], sol[-1]).square().mean()
    assert penalty.penalty().item() == pytest.approx(expected.item(), rel=1e-12)
    assert penalty.nfe == 1 and span.nfe == 4 * span.steps
    penalty.penalty().backward()
    assert span.t_f.grad is not None


def test_only_penalties_along_the_trajectory_take_a_bare_node():
    node = NeuralODE(nn.Linear(2, 2), solver="rk4")
    assert KineticEnergy(node).model is node
    for make in (tm.StepDoubling, LocalError):
        with pytest.raises(ValueError, match="NeuralODE has no LearnableSpan"):
            make(node)
