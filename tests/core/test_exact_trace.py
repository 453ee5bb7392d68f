"""The closed form of a flow's trace is that of autograd, to rounding, and is taken where it holds alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torchdyn.core import NeuralODE
from torchdyn.models import CNF
from torchdyn.models.cnf import autograd_trace

import torchdyn_mintime as tm
from torchdyn_mintime.core.exact_trace import layers_of


def net(dim=2, width=8):
    return nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))


def by_autograd(*args, **kwargs):
    """The same trace under another name, so that it is not recognised."""
    return autograd_trace(*args, **kwargs)


@given(
    dim=st.integers(1, 5),
    width=st.integers(1, 20),
    gain=st.floats(0.1, 10),  # the larger, the more of the tanh are saturated
    solver=st.sampled_from(["euler", "rk4", "dopri5", tm.LearnableSolver(3)]),
    sensitivity=st.sampled_from(["autograd", "adjoint"]),
    inside=st.booleans(),
    cost=st.booleans(),
)
def test_values_and_gradients_are_those_of_autograd(dim, width, gain, solver, sensitivity, inside, cost):
    module = net(dim, width).double()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(gain)
    by_autograd_alone = sensitivity == "autograd" or isinstance(solver, tm.LearnableSolver)
    options = {"sensitivity": "autograd" if by_autograd_alone else sensitivity, "solver": solver}
    cost = cost and by_autograd_alone
    options |= {"integral_loss": lambda t, z: z.square().sum(1)} if cost else {}
    x = torch.randn(4, dim + 1 + cost, dtype=torch.float64, requires_grad=True)
    found = []
    for trace in (None, by_autograd):
        flow = CNF(module, trace_estimator=trace)
        assert (layers_of(flow) is None) == (trace is not None)
        span = tm.LearnableSpan(
            NeuralODE(nn.Sequential(flow) if inside else flow, **options),
            torch.linspace(0, 0.5, 3, dtype=torch.float64),
        )
        sol = span(x)[1]
        loss = (sol[-1].tanh() + sol[1 % len(sol)]).sum()
        found.append((sol, *torch.autograd.grad(loss, [x, span.t_f, *module.parameters()])))
        found[-1] += (torch.tensor(span.nfe),)
    for closed, plain in zip(*found, strict=True):
        # Sums over the units in another order; adaptive steps and adjoints repeat it some twenty times.
        torch.testing.assert_close(closed, plain, rtol=1e-9, atol=1e-9 * (1 + gain**2))


def test_no_gradient_is_needed_and_inference_mode_works():
    span = tm.LearnableSpan(NeuralODE(CNF(net()), solver="rk4"), torch.linspace(0, 1, 3))
    x = torch.randn(4, 3)
    with torch.inference_mode():
        found = span(x)[1]
    torch.testing.assert_close(found, span(x)[1].detach())


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def overridden(module):
    module.forward = lambda z: -z
    return module


@pytest.mark.parametrize(
    "field",
    [
        lambda: nn.Linear(3, 3),
        lambda: CNF(nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 2))),
        lambda: CNF(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh())),
        lambda: CNF(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))),
        lambda: CNF(parametrizations.weight_norm(nn.Linear(2, 2))),
        lambda: CNF(nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 4)), nn.Tanh(), nn.Linear(4, 2))),
        lambda: CNF(net(), order=2),
        lambda: CNF(net(), trace_estimator=by_autograd),
        lambda: hooked(CNF(net())),
        lambda: CNF(hooked(net())),
        lambda: CNF(nn.Sequential(*[hooked(m) for m in net()])),
        lambda: CNF(overridden(net())),
        lambda: hooked(nn.Sequential(CNF(net()))),
        lambda: nn.Sequential(CNF(net()), nn.Identity()),
        lambda: type("MyFlow", (CNF,), {})(net()),
    ],
)
def test_everything_else_is_left_to_autograd(field):
    assert layers_of(field()) is None
