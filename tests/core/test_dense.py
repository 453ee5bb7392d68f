"""dense=True: the steps of the template alone, and the asked times by the method's interpolant."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import FIELDS, Breathing, closed_form, random_model
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.numerics import Grid, LearnedStepper, integrate, make_stepper

D = torch.float64
LOCAL_ORDERS = {"euler": 2, "midpoint": 3, "rk4": 4, "dopri5": 5, "tsit5": 5, 1: 2, 2: 3, 3: 3, 4: 3, 6: 3}
"""Powers of the step size in the error of a state inside one step, by the method, or by the stages of a learned one."""


def solver(name):
    return name if isinstance(name, str) else tm.LearnableSolver(name)


def span_of(how="rk4", points=5, field="breathing", **options):
    node, equation, x = closed_form(field, solver=solver(how), **options)
    return tm.LearnableSpan(node, torch.linspace(0, 1, points, dtype=D), t_f=0.9), equation, x


def exact(equation, t_eval, x, start=0.0):
    times = t_eval.detach()
    return torch.stack([equation.exact(torch.tensor(start, dtype=D), t, x) for t in times])


# ---------------------------------------------------------------------------------------------------------------------
# The order


@pytest.mark.parametrize(("how", "power"), LOCAL_ORDERS.items())
def test_the_error_inside_one_step(how, power):
    equation, x = Breathing(), torch.tensor([[1.0, -0.5]], dtype=D)
    stepper = make_stepper(how) if isinstance(how, str) else LearnedStepper(tm.LearnableSolver(how)).as_numbers()
    errors = []
    for h in (0.4, 0.2, 0.1):
        times = [0.2 + share * h for share in (0.1, 0.35, 0.6, 0.85)]
        found = integrate(equation, x, Grid([0.2, 0.2 + h], dense=times), stepper, adapt=False).states
        errors.append((found - exact(equation, torch.tensor(times, dtype=D), x, 0.2)).abs().max().item())
    # Halving h divides the error by 2^power, or by more; a fifth is for the terms of the next power.
    assert errors[0] / errors[1] > 0.8 * 2**power and errors[1] / errors[2] > 0.8 * 2**power


@pytest.mark.parametrize(("how", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_a_solve_is_as_accurate_inside_its_steps_as_at_their_ends(how, order):
    errors = []
    for points in (9, 17, 33):
        span, equation, x = span_of(how, points)
        with torch.no_grad():
            t_eval, sol = span(x, torch.linspace(0, 1, 101, dtype=D), dense=True)
        assert len(sol) == 91 and span.steps == len(span.nodes) - 1
        errors.append((sol - exact(equation, t_eval, x)).abs().max().item())
    assert errors[0] / errors[1] > 0.8 * 2**order and errors[1] / errors[2] > 0.8 * 2**order


@pytest.mark.parametrize("how", ["dopri5", "tsit5"])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
def test_a_thousand_times_cost_an_adaptive_solver_what_two_do(how, tolerance):
    span, equation, x = span_of(how, 2, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        ends = span(x)[1]
        nfe = span.nfe
        t_eval, sol = span(x, torch.linspace(0, 1, 1000, dtype=D), dense=True)
        assert span.nfe == nfe and torch.equal(sol[-1], ends[-1])
        with pytest.warns(UserWarning, match="With dense=True it takes the steps"):
            landing = span(x, torch.linspace(0, 1, 1000, dtype=D))
        assert span.nfe > 50 * nfe
    torch.testing.assert_close(t_eval, landing[0], rtol=0, atol=0)
    # The tolerance is that of a step's end. Inside, the error has one power of the step size less, and is not controlled.
    assert (sol - exact(equation, t_eval, x)).abs().max() < 50 * tolerance


# ---------------------------------------------------------------------------------------------------------------------
# What is returned


@given(
    kind=st.sampled_from(FIELDS),
    how=st.sampled_from(["euler", "midpoint", "rk4", "dopri5", "tsit5", 1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    points=st.integers(2, 6),
    asked=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5, 0.61, "t_f"]), min_size=1, max_size=6),
    reverse=st.booleans(),
    grad=st.booleans(),
)
def test_rows_are_those_asked_for_and_cost_nothing(kind, how, dtype, points, asked, reverse, grad):
    model = random_model(kind, dtype=torch.float32 if dtype is torch.bfloat16 else dtype, solver=solver(how))
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, points), t_f=0.83)
    if kind == "lambda" and dtype is torch.bfloat16:
        dtype = torch.float32  # its weight is not one of the module's
    span, x = span.to(dtype), model.x.to(dtype)
    direction = torch.linspace(1 if reverse else 0, 0 if reverse else 1, points)
    times = [span.t_f.item() if t == "t_f" else t for t in asked]
    with torch.set_grad_enabled(grad):
        path = span(x, direction)[1]
        nfe, nodes = span.nfe, [t.item() for t in span.grid(direction)]
        t_eval, sol = span(x, direction, save_at=times, dense=True)
    assert span.nfe == nfe and t_eval.tolist() == pytest.approx(times, abs=1e-7) and sol.dtype == dtype
    again = dict(zip(times, sol, strict=True))
    assert all(torch.equal(again[t], row) for t, row in zip(times, sol, strict=True))
    if not span.adaptive:
        for t, row in zip(nodes, path, strict=True):
            if t in again:  # a point of the grid is that point
                assert torch.equal(again[t], row)
    assert t_eval.requires_grad == (grad and span.t_f.item() in times)


def test_the_points_of_a_span_that_is_passed_are_asked_for():
    span, _, x = span_of("rk4", 4)
    for passed in (
        torch.linspace(0, 1, 50, dtype=D),
        torch.linspace(1, 0, 50, dtype=D),
        torch.tensor([0.3, 0.31, 0.6]),
    ):
        with torch.no_grad():
            t_eval, sol = span(x, passed, dense=True)
            nfe, steps = span.nfe, span.last.steps
            assert torch.equal(sol, span.trajectory(x, passed, dense=True))
            landing, path = span(x, passed)
        torch.testing.assert_close(t_eval, landing, rtol=0, atol=0)
        torch.testing.assert_close(sol, path, rtol=1e-2, atol=1e-3)  # of steps of a third
        ends = sorted([passed[0].item(), passed[-1].item()])
        inside = [t for t in (1 / 3, 2 / 3) if ends[0] < t < ends[1]]
        assert nfe == 4 * (len(inside) + 1) == 4 * (len(steps) - 1)


def test_a_frozen_span_is_solved_where_it_starts_and_ends():
    span, equation, x = span_of("rk4", 41)
    span.t_f.requires_grad_(False).fill_(1.0)
    for passed in (torch.linspace(-0.5, 1.2, 7, dtype=D), torch.linspace(0.2, 0.9, 3, dtype=D)):
        with torch.no_grad():
            t_eval, sol = span(x, passed, dense=True)
        torch.testing.assert_close(t_eval, passed.to(t_eval))
        steps = round((passed[-1] - passed[0]).item() * 40)
        assert span.steps == steps
        torch.testing.assert_close(sol, exact(equation, t_eval, x, passed[0].item()), rtol=1e-6, atol=1e-6)


def test_a_span_whose_steps_are_laid_keeps_them():
    span, _, x = span_of("rk4", 11)
    span.lay([0.0, 0.5, 0.8])
    with torch.no_grad(), pytest.warns(UserWarning, match="from 0 to 1, reaches beyond .* it was cut to \\[0, 0.8\\]"):
        t_eval, sol = span(x, torch.linspace(0, 1, 21, dtype=D), dense=True)
    span(x, torch.linspace(0, 1, 21, dtype=D), dense=True)  # it is said once
    assert span.last.steps == [0.0, 0.5, 0.8] and len(sol) == len(t_eval) == 17


@given(points=st.integers(2, 12), reverse=st.booleans(), frozen=st.booleans())
def test_a_first_call_with_dense_times_settles_laid_steps_and_gets_the_rows_of_its_times(points, reverse, frozen):
    node, _, x = closed_form("breathing", solver="rk4")
    span = tm.LearnableSpan(node)
    span.t_f.requires_grad_(not frozen)
    span.lay([0.0, 0.25, 0.5, 0.75, 1.0])
    span.interval = replace(span.interval, settled=False)  # as a search leaves it that lays steps before the first call
    times = 2 * torch.linspace(0, 1, points) ** 1.5
    times = times.flip(0) if reverse else times
    for training in (False, True, True, False):
        t_eval, sol = span.train(training)(x, times, dense=True)
        torch.testing.assert_close(t_eval, times)
        assert len(sol) == points and sorted(span.last.steps) == pytest.approx([0, 0.5, 1, 1.5, 2])


def test_without_times_nothing_is_interpolated():
    span, _, x = span_of("rk4")
    with torch.no_grad():
        assert torch.equal(span(x, dense=True)[1], span(x)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("learn_t0", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("how", ["euler", "midpoint", "rk4", 1, 2, 3])
def test_gradients_against_central_differences(how, learn_t0, reverse):
    """Of times inside the first, the middle and the last step, and of t_f itself."""
    node, _, x = closed_form("breathing", solver=solver(how))
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 4, dtype=D), t_f=0.9, learn_t0=learn_t0)
    if learn_t0:
        with torch.no_grad():
            span.t0.fill_(0.05)
    x = x.requires_grad_()
    direction = torch.linspace(0, 1, 4, dtype=D)
    direction = direction.flip(0) if reverse else direction
    asked = [0.15, 0.4, 0.7, 0.85]
    wanted = [*span.parameters(), x]

    def value():
        t_eval, sol = span(x, direction, save_at=asked, dense=True)
        end = span(x, direction, dense=True)[1][-1]
        return ((1 + torch.arange(4, dtype=D))[:, None, None] * sol.sin()).sum() + end.cos().sum() + t_eval.sum()

    found = torch.autograd.grad(value(), wanted)
    for tensor, gradient in zip(wanted, found, strict=True):
        flat, differences = tensor.detach().view(-1), []
        for i in range(len(flat)):
            with torch.no_grad():
                ends = []
                for h in (1e-5, -1e-5):
                    flat[i] += h
                    ends.append(value())
                    flat[i] -= h
                differences.append((ends[0] - ends[1]) / 2e-5)
        # h^2 of the difference and the rounding over h, both about 1e-10; values of size 10.
        torch.testing.assert_close(gradient.view(-1), torch.stack(differences), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["dopri5", "tsit5"])
def test_gradients_of_adaptive_solvers_are_those_of_the_ode(how):
    """To the tolerance. What a state inside depends on t_f by is the last step alone, and tends to nothing."""
    node, equation, x = closed_form("breathing", solver=how, atol=1e-11, rtol=1e-11)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 2, dtype=D), t_f=0.9)
    x = x.requires_grad_()
    t_eval, sol = span(x, save_at=[0.2, 0.5, 0.88, 0.9], dense=True)
    found = torch.autograd.grad(sol.sin().sum(), [x, span.t_f, equation.rate])
    end = span.t_f.detach().requires_grad_()
    times = [*t_eval[:3].detach(), end]
    path = torch.stack([equation.exact(torch.tensor(0.0, dtype=D), t, x) for t in times])
    expected = torch.autograd.grad(path.sin().sum(), [x, end, equation.rate])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_methods_without_an_interpolant_are_refused():
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="alf"), torch.linspace(0, 1, 3))
    before = span.last
    with pytest.raises(ValueError, match="alf has no interpolant"):
        span(torch.randn(3, 4), save_at=[0.1], dense=True)
    assert span.last is before


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint", "checkpoint"])
def test_gradients_of_other_ways_are_refused_and_inference_is_not(sensitivity):
    checkpoint = sensitivity == "checkpoint"
    node, _, x = closed_form("breathing", solver="rk4", sensitivity="autograd" if checkpoint else sensitivity)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 5, dtype=D), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=f"dense=True .*{sensitivity}"):
        span(x, save_at=[0.3], dense=True)
    with torch.no_grad():
        assert torch.isfinite(span(x, save_at=[0.3], dense=True)[1]).all()
    if not checkpoint:  # whose gradients are those of autograd, whatever the sensitivity
        span.trajectory(x, torch.linspace(0, 1, 9, dtype=D), dense=True).sum().backward()


def test_times_outside_are_refused_as_ever():
    span, _, x = span_of("rk4")
    with pytest.raises(ValueError, match=r"save_at=\[0.95\] must lie within"):
        span(x, save_at=[0.95], dense=True)
    one_step, _, _ = span_of(3, 2)
    with pytest.raises(ValueError, match="dense=True for states inside"):
        one_step(x, save_at=[0.3])


@pytest.mark.parametrize("how", ["rk4", "tsit5", 4])
def test_under_autocast_the_states_inside_keep_float32(how):
    """The field has no product that autocast would round: the states are those without it, to the last digit."""
    node, _, x = closed_form("breathing", solver=solver(how))
    span = tm.LearnableSpan(node.float(), torch.linspace(0, 1, 3)).float()
    times = {"save_at": [0.3, 0.6], "dense": True}
    with torch.no_grad():
        expected = span(x.float(), **times)[1]
        with torch.autocast("cpu", torch.bfloat16):
            found = span(x.float(), **times)[1]
    assert found.dtype == torch.float32 and torch.equal(found, expected)
