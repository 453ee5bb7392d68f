"""Figures are of the call that the model makes: with its args, its own span and direction, the times that it asks for."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.diagnostics import (
    evaluate_with_reference,
    evaluate_without_ode,
    hamiltonian,
    loss_profile,
    report,
    solver_error,
)

T_SPAN = torch.linspace(0, 1, 9, dtype=torch.float64)


class Decay(nn.Module):
    """z' = -rate gain z, with a gain that the call passes."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, t, x, args=None):
        return -self.rate * (args or {}).get("gain", 1.0) * x


class Model(nn.Module):
    """Looks at the end of one call of its span, or at more of it."""

    CALLS: ClassVar = {
        "plain": lambda span, x: span(x)[-1],
        "args": lambda span, x: span(x, args={"gain": 2.0})[-1],
        "descending": lambda span, x: span(x, T_SPAN.flip(0))[-1],
        "a span of its own": lambda span, x: span(x, T_SPAN[::4])[-1],
        "an earlier time": lambda span, x: span(x, save_at=[0.3])[-1],
        "two times": lambda span, x: span(x, save_at=[0.3, 1.0])[-1],
    }
    MORE: ClassVar = {
        "all times": lambda span, x: span(x).mean(0),
        "the first of two": lambda span, x: span(x, save_at=[0.3, 1.0])[0],
    }
    ENDS: ClassVar = {"args": -2.0, "descending": 1.0, "an earlier time": -0.3}
    """The exponent of the exact solution, in units of the rate, where it is not -1."""

    def __init__(self, how, solver="rk4", sensitivity="autograd", dtype=torch.float64):
        super().__init__()
        node = NeuralODE(Decay(), solver=solver, sensitivity=sensitivity, return_t_eval=False, atol=1e-9, rtol=1e-9)
        self.span, self.how = tm.LearnableSpan(node, T_SPAN).to(dtype), how

    def forward(self, x):
        return 0.5 * (self.CALLS | self.MORE)[self.how](self.span, x)

    def exact(self, x):
        return 0.5 * x * torch.exp(self.ENDS.get(self.how, -1.0) * self.span.vf.vf.rate.detach())


def square(z):
    return z.square().mean()


def states(seed=0):
    return torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(
    how=st.sampled_from(sorted(Model.CALLS)),
    solver=st.sampled_from(["euler", "midpoint", "rk4", "tsit5", "dopri5"]),
    sensitivity=st.sampled_from(["autograd", "adjoint", "interpolated_adjoint"]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_loss_solved_exactly_is_that_of_the_call(how, solver, sensitivity, seed, dtype):
    model, x = Model(how, solver, sensitivity, dtype), states(seed)
    exact = square(model.exact(x)).item()
    # Of a solve at 1e-7; in float32 the states that the model gets are rounded.
    found, _ = evaluate_with_reference(model, [x.to(dtype)], square)
    assert found == pytest.approx(exact, rel=1e-5)
    assert evaluate_without_ode(model, [x.to(dtype)], square)[0] == pytest.approx(square(0.5 * x).item(), rel=1e-5)


def test_every_state_that_a_call_returns_is_solved_exactly():
    model, x = Model("all times", "euler"), states()
    means = torch.exp(-1.3 * T_SPAN).mean()
    assert evaluate_with_reference(model, [x], square)[0] == pytest.approx(square(0.5 * means * x).item(), rel=1e-6)
    assert evaluate_with_reference(Model("the first of two", "euler"), [x], square)[0] == pytest.approx(
        square(0.5 * math.exp(-0.39) * x).item(), rel=1e-6
    )


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("how", Model.CALLS)
@pytest.mark.parametrize("solver", ["euler", "rk4"])
def test_an_early_exit_that_nobody_takes_is_the_models_own_solve(how, solver, every):
    model, x = Model(how, solver), states()
    own, nfe = model(x), model.span.nfe
    found = tm.early_exit(model, x, lambda out: out[:, 0] > 99, every=every)
    torch.testing.assert_close(found.output, own)
    assert not found.met.any()
    if how != "an earlier time":  # after which the exit looks no further
        assert found.nfe.tolist() == [nfe] * 5
    assert found.times.tolist() == [{"descending": 0.0, "an earlier time": 0.3}.get(how, 1.0)] * 5


@pytest.mark.parametrize("how", Model.CALLS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_the_loss_profile_is_of_the_call(how, solver):
    model, x = Model(how, solver), states()
    profile = loss_profile(model, [x], square)
    sign = -1 if how == "descending" else 1
    rates = sign * 2 * 1.3 * (2 if how == "args" else 1)
    # Eight steps of rk4 are exact to about 1e-5, two ("a span of its own") to 1e-3.
    assert profile.rate == pytest.approx(rates, rel=5e-3)
    assert profile.times[0].item() == (how == "descending")
    assert profile.times[-1].item() == {"descending": 0.0, "an earlier time": 0.3}.get(how, 1.0)
    assert profile.loss[-1].item() == pytest.approx(square(model(x)).item(), rel=1e-6)
    assert profile.loss[0].item() == pytest.approx(square(0.5 * x).item())


@pytest.mark.parametrize("how", ["plain", "args", "descending", "a span of its own", "two times"])
def test_the_hamiltonian_at_the_end_is_the_derivative_of_the_loss_in_t_f(how):
    model, x = Model(how).eval(), states()
    found = hamiltonian(model, x, square)
    model.span.bounds = (0.1, 2.0)
    losses = []
    for t_f in (1.0 - 1e-4, 1.0 + 1e-4):
        with torch.no_grad():
            model.span.t_f.fill_(t_f)
            # A call's own times move with t_f, as its template's points do.
            t_span = torch.linspace(0, t_f, 9, dtype=torch.float64)
            t_span = {"descending": t_span.flip(0), "a span of its own": t_span[::4]}.get(how, t_span)
            out = model.span(x, t_span, args={"gain": 2.0 if how == "args" else 1.0})[-1]
            losses.append(square(0.5 * out).item())
    # The field at the end is the derivative of the exact solution: two steps of rk4 ("a span of its own") are off by 1 %,
    # eight by 1e-3 at most.
    near = 2e-2 if how == "a span of its own" else 2e-3
    assert found.at_end == pytest.approx((losses[1] - losses[0]) / 2e-4, rel=near)
    assert found.drift < near * abs(found.at_end)
    assert found.times[-1] == 1.0


@pytest.mark.parametrize("how", Model.MORE)
def test_figures_that_replace_the_end_alone_refuse_a_model_that_sees_more(how):
    model, x = Model(how), states()
    for figure in (
        lambda: tm.early_exit(model, x, lambda out: out[:, 0] > 99),
        lambda: loss_profile(model, [x], square),
        lambda: hamiltonian(model, x, square),
    ):
        with pytest.raises(ValueError, match="uses more of the span's trajectory than its last state"):
            figure()


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
@pytest.mark.parametrize("how", Model.CALLS)
def test_the_solver_error_is_that_of_the_state_that_the_model_sees(how, solver):
    model, x = Model(how, solver), states()
    out, exact = model(x), model.exact(x)
    error = (out - exact).square().mean().sqrt() / (exact - 0.5 * x).square().mean().sqrt()
    # dopri5's own error is 1e-9, below that of the reference.
    assert solver_error(model, x) == pytest.approx(error.item(), rel=1e-3, abs=1e-7)


def test_a_loss_that_ends_before_t_f_has_no_hamiltonian():
    with pytest.raises(ValueError, match="its loss does not depend on t_f"):
        hamiltonian(Model("an earlier time"), states(), square)


@pytest.mark.parametrize("how", ["args", "descending", "a span of its own", "an earlier time"])
def test_the_report_is_of_the_call_and_leaves_the_model_as_it_was(how):
    from rich.console import Console

    model, x = Model(how), states()
    model(x)
    last, nfe, steps = model.span.last, model.span.nfe, model.span.steps
    found = report(model, [x], square, console=Console(quiet=True))
    assert found.loss[1] == pytest.approx(square(model.exact(x)).item(), rel=1e-6)
    assert (found.spans[0].steps, found.nfe) == (steps, nfe)
    assert (found.spans[0].hamiltonian is None) == (how == "an earlier time")
    assert found.solver_error == pytest.approx(solver_error(model, x))
    assert model.span.last is last


def test_a_look_at_an_exit_does_not_decide_the_template():
    span = tm.LearnableSpan(NeuralODE(Decay(), solver="rk4", return_t_eval=False))

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.span = span

        def forward(self, x):
            return self.span(x, 3 * T_SPAN)[-1]

    model, x = Asks(), states()
    before = span.interval, span.t_f.item()
    found = tm.early_exit(model, x, lambda out: out[:, 0] > 99)
    assert found.times.tolist() == [3.0] * 5
    assert (span.interval, span.t_f.item()) == before and not span.interval.settled
