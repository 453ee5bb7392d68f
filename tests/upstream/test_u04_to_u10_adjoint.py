"""U4 to U10: gradients under an adjoint, precision, and what a solve is asked to save.

Two halves a row, as in `test_u01_to_u03_solves.py`.
"""

import math
import warnings

import pytest
import torch
from problems import Breathing, Counted, Decay, Linear, Stuck, closed_form, random_model, reference
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.numerics.solvers.ode import RungeKutta4

import torchdyn_mintime as tm

TIGHT = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
ADJOINTS = ("adjoint", "interpolated_adjoint")


def _times(*values):
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def _exact_time_gradients(field, x, t0, t_f):
    """dl/dt0 and dl/dt_f of l = sum z(t_f), from the closed form."""
    t0, t_f = _times(t0, t_f)
    return [float(g) for g in torch.autograd.grad(field.exact(t0, t_f, x).sum(), [t0, t_f])]


# ---------------------------------------------------------------------------------------------------------------------
# U4: gradients of the times under the adjoints


def _plain_time_gradients(sensitivity, points=()):
    node, field, x = closed_form("breathing", solver="dopri5", sensitivity=sensitivity, **TIGHT)
    t0, t_f = _times(0.2, 1.1)
    inner = [torch.tensor(p, dtype=torch.float64) for p in points]
    _, sol = node(x, torch.stack([t0, *inner, t_f]))
    sol[-1].sum().backward()
    return (t0.grad, t_f.grad), _exact_time_gradients(field, x, 0.2, 1.1)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U4: the adjoint's dl/dt0 has the wrong sign and value")
def test_u4_plain_adjoint_gives_the_gradient_of_t0():
    (got, _), (exact, _) = _plain_time_gradients("adjoint")
    assert float(got) == pytest.approx(exact, rel=1e-4)


@pytest.mark.xfail(
    strict=True, raises=RuntimeError, reason="U4: `invalid gradient at index 2` for more than two points"
)
def test_u4_plain_adjoint_takes_a_span_of_three_points():
    _plain_time_gradients("adjoint", points=[0.6])


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="U4: the interpolated adjoint has no gradient of the times"
)
def test_u4_plain_interpolated_adjoint_gives_the_gradient_of_t_f():
    (_, got), (_, exact) = _plain_time_gradients("interpolated_adjoint")
    assert got is not None
    assert float(got) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("points", [2, 3, 7])
@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_u4_the_gradients_of_both_times_are_right(sensitivity, points):
    node, field, x = closed_form("breathing", solver="dopri5", sensitivity=sensitivity, **TIGHT)
    span = tm.LearnableSpan(node, torch.linspace(0.2, 1.1, points, dtype=torch.float64), learn_t0=True)
    span(x)[1][-1].sum().backward()
    exact_t0, exact_t_f = _exact_time_gradients(field, x, 0.2, 1.1)
    # Autograd's is the gradient of the accepted steps, right to the solver's accuracy: 1e-4 at a tolerance of 1e-9.
    rel = 1e-4 if sensitivity == "autograd" else 1e-5
    assert float(span.t0.grad) == pytest.approx(exact_t0, rel=rel)
    assert float(span.t_f.grad) == pytest.approx(exact_t_f, rel=rel)


# ---------------------------------------------------------------------------------------------------------------------
# U5: the adjoint runs each inner interval backwards through U2


def _parameter_gradients(draw, dtype, plain):
    generator = torch.Generator().manual_seed(100 + draw)
    length = float(0.2 + 1.3 * torch.rand((), generator=generator))
    t_span = torch.tensor([0.1, 0.1 + length], dtype=dtype)
    gradients = []
    for sensitivity in ("autograd", "adjoint"):
        # The plain reference is our own Runge-Kutta loop: torchdyn's autograd loses points too.
        model = random_model("mlp", seed=draw, dtype=dtype, solver="tsit5", sensitivity=sensitivity)
        if sensitivity == "autograd":
            z = reference(model.rhs, model.x, t_span, steps=100)[-1]
        elif plain:
            z = model.node(model.x, t_span)[1][-1]
        else:
            z = tm.LearnableSpan(model.node, t_span)(model.x)[1][-1]
        z.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters]))
    exact, got = gradients
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.xfail(
    strict=True, raises=(AssertionError, RuntimeError), reason="U5: backward intervals lose their end (U2)"
)
def test_u5_plain_adjoint_equals_autograd(dtype):
    assert sum(_parameter_gradients(i, dtype, plain=True) > 0.05 for i in range(20)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_u5_adjoint_equals_autograd(dtype):
    # 5 % is what torchdyn exceeds; at its default tolerances (1e-3 forward, 1e-4 backward) an adjoint is right to about 1 %.
    assert sum(_parameter_gradients(i, dtype, plain=False) > 0.02 for i in range(20)) == 0


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_u5_inner_points_do_no_harm(sensitivity):
    gradients = []
    for points in (2, 12):
        model = random_model("keyword", seed=4, solver="tsit5", sensitivity=sensitivity, **TIGHT)
        tm.LearnableSpan(model.node, torch.linspace(0.1, 1.3, points, dtype=torch.float64))(model.x)[1][
            -1
        ].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters]))
    # The end state does not depend on what is saved on the way; 1e-6 leaves room for the solver's tolerance of 1e-9.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# U6: the adjoint on a reversed span


def _reversed(plain, sensitivity="adjoint"):
    node, field, x = closed_form("breathing", solver="dopri5", sensitivity=sensitivity, **TIGHT)
    t_span = torch.linspace(1.1, 0.2, 4, dtype=torch.float64)
    run = node if plain else tm.LearnableSpan(node, t_span.flip(0))
    t_eval, sol = run(x, t_span)
    sol[-1].sum().backward()
    exact = field.exact(t_span[0], t_span[-1], x)
    (rate,) = torch.autograd.grad(exact.sum(), [field.rate])
    return (t_eval.detach(), t_span), (sol[-1].detach(), exact.detach()), (float(field.rate.grad), float(rate))


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U6: t_eval comes back negated")
def test_u6_plain_adjoint_returns_the_times_of_a_reversed_span():
    times, _, _ = _reversed(plain=True)
    torch.testing.assert_close(*times)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U6: backward follows the field at negated times")
def test_u6_plain_adjoint_gives_the_gradient_of_a_reversed_span():
    _, _, (got, exact) = _reversed(plain=True)
    assert got == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_u6_a_reversed_span_is_right_in_times_value_and_gradient(sensitivity):
    times, states, (got, exact) = _reversed(plain=False, sensitivity=sensitivity)
    torch.testing.assert_close(*times)
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-8)
    assert got == pytest.approx(exact, rel=1e-4 if sensitivity == "autograd" else 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# U7: the adjoint with a running cost


def _running_cost(plain, sensitivity="adjoint"):
    """Gradients of l = sum z(t_f) + integral of |f|^2, and the same from the state augmented by the cost so far."""
    results = []
    for exact in (True, False):
        model = random_model("mlp", seed=7)
        net = model.node.vf
        cost = lambda t, x, rhs=model.rhs: rhs(t, x).square().sum(1)  # noqa: E731
        x = model.x.clone().requires_grad_(True)
        t0, t_f = _times(0.1, 0.9)
        extra = {}
        if exact:

            def augmented(t, y, rhs=model.rhs, cost=cost):
                z = y[:, 1:]
                return torch.cat([cost(t, z)[:, None], rhs(t, z)], 1)

            y = torch.cat([torch.zeros_like(x[:, :1]), x], 1)
            end = reference(augmented, y, torch.stack([t0, t_f]))[-1]
            (end[:, 1:].sum() + end[:, 0].sum()).backward()
            extra["cost"] = float(end[:, 0].detach().sum())
        else:
            node = NeuralODE(
                nn.Sequential(*net.vf.vf), solver="dopri5", sensitivity=sensitivity, integral_loss=cost, **TIGHT
            )
            if plain:
                node(x, torch.stack([t0, t_f]))[1][-1].sum().backward()
            else:
                span = tm.LearnableSpan(node, torch.tensor([0.1, 0.9], dtype=torch.float64), learn_t0=True)
                span(x)[1][-1].sum().backward()
                t0, t_f, extra["cost"] = span.t0, span.t_f, span.running_cost
        theta = torch.cat([p.grad.flatten() for p in model.parameters])
        results.append({"theta": theta, "x": x.grad, "t0": t0.grad, "t_f": t_f.grad, **extra})
    return results


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U7: the term dl/dtheta of the running cost is dropped")
def test_u7_plain_adjoint_gives_the_parameter_gradient_of_a_running_cost():
    exact, got = _running_cost(plain=True)
    torch.testing.assert_close(got["theta"], exact["theta"], rtol=1e-3, atol=1e-5)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U7: dl/dt_f lacks the running cost at t_f")
def test_u7_plain_adjoint_gives_the_time_gradient_of_a_running_cost():
    exact, got = _running_cost(plain=True)
    torch.testing.assert_close(got["t_f"], exact["t_f"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_u7_every_gradient_of_a_running_cost_is_right(sensitivity):
    exact, got = _running_cost(plain=False, sensitivity=sensitivity)
    for name in ("theta", "x", "t0", "t_f"):
        error = (got[name] - exact[name]).norm() / exact[name].norm()
        assert float(error) <= 1e-5, name


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_u7_the_value_of_the_running_cost_is_at_hand(sensitivity):
    exact, got = _running_cost(plain=False, sensitivity=sensitivity)
    assert float(got["cost"].detach().sum()) == pytest.approx(exact["cost"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# U8: save_at and args under an adjoint


def _saved(run, solver):
    t_span = torch.linspace(0, 1, 11, dtype=torch.float64)
    return run(torch.ones(2, 2, dtype=torch.float64), t_span, save_at=t_span[[3, 7, 10]])


@pytest.mark.parametrize("sensitivity", ADJOINTS)
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U8: save_at is passed into another slot and ignored")
def test_u8_plain_adjoint_returns_the_points_of_save_at(sensitivity):
    _, sol = _saved(NeuralODE(Decay(), solver="rk4", sensitivity=sensitivity), "rk4")
    assert len(sol) == 3


class _Scaled(nn.Module):
    """A field that needs what is passed as args."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t, x, args=None):
        return -self.rate * args["scale"] * x


@pytest.mark.xfail(
    strict=True, raises=(TypeError, KeyError, RuntimeError, ValueError), reason="U8: args lands in save_at"
)
def test_u8_plain_adjoint_hands_args_to_the_field():
    node = NeuralODE(_Scaled(), solver="rk4", sensitivity="adjoint")
    node(torch.ones(2, 2, dtype=torch.float64), torch.linspace(0, 1, 11, dtype=torch.float64), args={"scale": 2.0})


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_u8_save_at_returns_its_points_once_each(sensitivity, solver):
    field = Decay()
    span = tm.LearnableSpan(
        NeuralODE(field, solver=solver, sensitivity=sensitivity, **(TIGHT if solver == "dopri5" else {})),
        torch.linspace(0, 1, 11, dtype=torch.float64),
    )
    t_eval, sol = _saved(span, solver)
    asked = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(t_eval.detach(), asked)
    expected = torch.exp(-asked)[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(sol.detach(), expected, rtol=1e-6, atol=1e-6)
    # Two of the three points are inner ones: a gradient that reads the wrong slot shows here.
    (sol[0].sum() + 2 * sol[1].sum()).backward()
    exact = -4 * (0.3 * math.exp(-0.3) + 2 * 0.7 * math.exp(-0.7))
    assert float(field.rate.grad) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_u8_args_reach_the_field(sensitivity, solver):
    tight = TIGHT if solver == "dopri5" else {}
    span = tm.LearnableSpan(
        NeuralODE(_Scaled(), solver=solver, sensitivity=sensitivity, **tight),
        torch.linspace(0, 1, 21, dtype=torch.float64),
    )
    _, sol = span(torch.ones(2, 2, dtype=torch.float64), args={"scale": 2.0})
    # rk4 with 20 steps of .05 on x' = -2 x: 20 * (.1)^5 / 120 = 1.7e-6 of its own.
    assert float(sol[-1, 0, 0].detach()) == pytest.approx(math.exp(-2), rel=3e-6)
    sol[-1].sum().backward()
    assert float(span.t_f.grad) == pytest.approx(-2 * 4 * math.exp(-2), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# U9: float64 that is only as accurate as float32

X64 = torch.ones(1, 1, dtype=torch.float64)
# The method's own error is 1.9e-12; the tableau rounded to float32 gives 1.1e-8.
RK4_ERROR = 2.5e-12


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U9: the tableau is built in float32 and then cast")
def test_u9_plain_rk4_is_as_accurate_as_float64():
    _, sol = NeuralODE(Decay(), solver="rk4")(X64, torch.linspace(0, 1, 201, dtype=torch.float64))
    assert abs(float(sol[-1].detach()) - math.exp(-1)) <= RK4_ERROR


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U9: one float32 batch rounds a float64 solver for good")
def test_u9_plain_float64_solver_survives_a_float32_batch():
    node = NeuralODE(Decay(), solver=RungeKutta4(torch.float64))
    node.float()
    node(X64.float(), torch.linspace(0, 1, 3))
    node.double()
    _, sol = node(X64, torch.linspace(0, 1, 201, dtype=torch.float64))
    assert abs(float(sol[-1].detach()) - math.exp(-1)) <= RK4_ERROR


@pytest.mark.xfail(
    strict=True, raises=Stuck, reason="U9: step factors and tableau in float32 make tight tolerances futile"
)
def test_u9_plain_tsit5_reaches_a_tight_tolerance():
    with torch.no_grad():
        NeuralODE(Counted(lambda t, x: -x, 20_000), atol=1e-11, rtol=1e-11)(
            X64, torch.tensor([0.0, 1.0], dtype=torch.float64)
        )


def test_u9_rk4_is_as_accurate_as_float64():
    _, sol = tm.LearnableSpan(NeuralODE(Decay(), solver="rk4"), torch.linspace(0, 1, 201, dtype=torch.float64))(X64)
    assert abs(float(sol[-1].detach()) - math.exp(-1)) <= RK4_ERROR


def test_u9_a_float32_batch_leaves_the_float64_solver_alone():
    span = tm.LearnableSpan(
        NeuralODE(Decay(), solver=RungeKutta4(torch.float64)), torch.linspace(0, 1, 201, dtype=torch.float64)
    )
    span.node.float()
    _, sol = span(X64.float())
    assert sol.dtype == torch.float32
    span.node.double()
    _, sol = span(X64)
    assert sol.dtype == torch.float64
    assert abs(float(sol[-1].detach()) - math.exp(-1)) <= RK4_ERROR


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
def test_u9_adaptive_solvers_reach_a_tight_tolerance(solver):
    field = Counted(lambda t, x: -x, 20_000)
    span = tm.LearnableSpan(
        NeuralODE(field, solver=solver, atol=1e-11, rtol=1e-11), torch.tensor([0.0, 1.0], dtype=torch.float64)
    )
    with torch.no_grad():
        _, sol = span(X64)
    # torchdyn with a float64 tableau takes 1,256 evaluations (tsit5) for an error of 7.8e-12.
    assert field.count <= 2_500
    assert abs(float(sol[-1]) - math.exp(-1)) <= 5e-11


# ---------------------------------------------------------------------------------------------------------------------
# U10: the interpolated adjoint with an adaptive solver


def _trajectory_gradient(plain):
    node, field, x = closed_form("linear", solver="dopri5", sensitivity="interpolated_adjoint", **TIGHT)
    t_span = torch.linspace(0.1, 1.2, 5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t_eval, sol = (node if plain else tm.LearnableSpan(node, t_span))(x, t_span)
    weights = torch.linspace(1, 2, len(sol), dtype=torch.float64)[:, None, None]
    (weights * sol).sum().backward()
    exact = torch.stack([field.exact(t_span[0], t, x) for t in t_span])
    weights = torch.linspace(1, 2, len(exact), dtype=torch.float64)[:, None, None]
    (expected,) = torch.autograd.grad((weights * exact).sum(), [field.matrix])
    return (t_eval.detach(), t_span), (field.matrix.grad, expected)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U10: every point of the solver comes back")
def test_u10_plain_interpolated_adjoint_returns_the_asked_points():
    (t_eval, t_span), _ = _trajectory_gradient(plain=True)
    assert len(t_eval) == len(t_span)


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="U10: gradients of a trajectory loss are read at wrong indices"
)
def test_u10_plain_interpolated_adjoint_gives_the_gradient_of_a_trajectory_loss():
    _, (got, exact) = _trajectory_gradient(plain=True)
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)


def test_u10_interpolated_adjoint_is_right_for_a_trajectory_loss():
    times, (got, exact) = _trajectory_gradient(plain=False)
    torch.testing.assert_close(*times)
    assert float((got - exact).norm() / exact.norm()) <= 1e-5


def test_u10_the_fields_of_this_file_have_the_closed_forms_they_claim():
    # The halves above stand on `exact`: one look that it solves the equation of each field used here.
    t0, t_f = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.2, dtype=torch.float64)
    for field in (Decay(), Linear(), Breathing()):
        x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
        torch.testing.assert_close(
            reference(field, x, torch.stack([t0, t_f]))[-1], field.exact(t0, t_f, x), rtol=1e-8, atol=1e-9
        )
