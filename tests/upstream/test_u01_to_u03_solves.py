"""U1 to U3: values. A stepper of the wrong order, a lost final point, a solve that never ends.

Every row has two halves. The first asserts the right behaviour of plain torchdyn 1.0.6 and is a strict xfail: when a new
release repairs it the test fails, and the row (and what was built around it) can go. The second holds the wrapped model to
the same behaviour.
"""

import contextlib
import math

import pytest
import torch
from problems import Cosine, Counted, Decay, Linear, Stuck, closed_form, random_model, reference
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm

# ---------------------------------------------------------------------------------------------------------------------
# U1: rk4 is first order when the field depends on t


def _order(error_at):
    """The observed order of convergence from 10, 20 and 40 steps: the mean slope of the error in log-log."""
    return math.log2(error_at(10) / error_at(40)) / 2


def _plain_error(field, solver, steps):
    span = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    x = torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    _, sol = NeuralODE(field, solver=solver)(x, span)
    return float((sol[-1] - field.exact(span[0], span[-1], x)).detach().abs().max())


def _wrapped_error(field, solver, steps, **options):
    x = torch.tensor([[0.4, -0.2]], dtype=torch.float64)
    span = tm.LearnableSpan(
        NeuralODE(field, solver=solver), torch.linspace(0, 1, steps + 1, dtype=torch.float64), **options
    )
    t_eval, sol = span(x)
    return float((sol[-1] - field.exact(t_eval[0], t_eval[-1], x)).detach().abs().max())


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U1: rk4 reads the nodes c[0..2] = 0, .5, .5 for k2..k4")
def test_u1_plain_rk4_is_fourth_order_for_a_field_of_time():
    assert _order(lambda n: _plain_error(Cosine(), "rk4", n)) >= 3.9


@pytest.mark.parametrize("name", ["rk4", "rk-4", "RungeKutta4"])
def test_u1_rk4_is_fourth_order_for_a_field_of_time(name):
    assert _order(lambda n: _wrapped_error(Cosine(), name, n)) == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("field", [Decay, Linear])
def test_u1_rk4_is_fourth_order_for_a_field_without_time(field):
    assert _order(lambda n: _wrapped_error(field(), "rk4", n)) == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_u1_the_other_fixed_step_solvers_have_their_order(solver, order):
    # Not the cosine itself: over [0, 1] its endpoint terms make euler's and midpoint's errors look better than they are.
    with torch.no_grad():
        observed = math.log2(_breathing_error(solver, 40) / _breathing_error(solver, 80))
    assert observed == pytest.approx(order, abs=0.15)


def _breathing_error(solver, steps):
    node, field, x = closed_form("breathing", solver=solver)
    t_eval, sol = tm.LearnableSpan(node, torch.linspace(0.2, 1.7, steps + 1, dtype=torch.float64))(x)
    return float((sol[-1] - field.exact(t_eval[0], t_eval[-1], x)).abs().max())


# ---------------------------------------------------------------------------------------------------------------------
# U2: adaptive solvers drop the final point


def _networks(count, t0=0.0):
    """Pairs of a random float32 network and a random end time, from one seed."""
    generator = torch.Generator().manual_seed(2)
    for i in range(count):
        torch.manual_seed(i)
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        length = 0.05 + 1.95 * torch.rand((), generator=generator)
        yield net, torch.stack([torch.tensor(t0), t0 + length]), torch.randn(4, 2)


def _decays(count):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        yield torch.stack([torch.zeros(()), 0.05 + 1.95 * torch.rand((), generator=generator)])


def _nets_only(net):
    # forward(t, x, **kwargs) spares the message torchdyn prints for every field without a time.
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, x, **kwargs):
            return self.net(x)

    return Field()


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="U2: t + dt rounds above T and the last point is not saved"
)
def test_u2_plain_torchdyn_returns_the_final_point_at_all_defaults(draws):
    missing = 0
    with torch.no_grad():
        for net, t_span, x in _networks(draws(4000, 250)):
            t_eval, _ = NeuralODE(_nets_only(net))(x, t_span)
            missing += len(t_eval) != 2
    assert missing == 0


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="U2: t + dt rounds above T and the last point is not saved"
)
def test_u2_plain_torchdyn_returns_the_final_point_with_dopri5(draws):
    missing, x = 0, torch.tensor([[1.0]])
    node = NeuralODE(Decay(dtype=torch.float32), solver="dopri5", atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for t_span in _decays(draws(2000, 150)):
            missing += len(node(x, t_span)[0]) != 2
    assert missing == 0


@pytest.mark.slow
@pytest.mark.parametrize("t0", [0.0, -1.0], ids=["from 0", "from -1"])
def test_u2_no_final_point_is_missing_at_all_defaults(draws, t0):
    count = draws(4000, 250) if t0 == 0 else draws(2000, 120)
    missing = wrong = 0
    with torch.no_grad():
        for i, (net, t_span, x) in enumerate(_networks(count, t0)):
            span = tm.LearnableSpan(NeuralODE(_nets_only(net)), t_span)
            t_eval, sol = span(x)
            missing += len(t_eval) != 2 or len(sol) != 2 or not torch.equal(t_eval[-1], span.t_f)
            if i % 10 == 0:
                # Tolerances of 1e-3 bound the local error; a lost step would be off by the size of the whole motion.
                z = reference(lambda t, x, net=net: net(x), x, t_span, steps=40)[-1]
                wrong += not torch.allclose(sol[-1], z, rtol=2e-2, atol=2e-2)
    assert (missing, wrong) == (0, 0)


@pytest.mark.slow
def test_u2_no_final_point_is_missing_with_dopri5(draws):
    missing, x = 0, torch.tensor([[1.0]])
    with torch.no_grad():
        for t_span in _decays(draws(2000, 150)):
            span = tm.LearnableSpan(
                NeuralODE(Decay(dtype=torch.float32), solver="dopri5", atol=1e-5, rtol=1e-5), t_span
            )
            t_eval, sol = span(x)
            exact = torch.exp(-(t_span[1] - t_span[0]))
            missing += len(t_eval) != 2 or not torch.allclose(sol[-1], exact.reshape(1, 1), atol=2e-4)
    assert missing == 0


def test_u2_the_published_case_has_its_final_point_and_a_gradient():
    t_span = torch.tensor([0.0, 0.38113805651664734])
    span = tm.LearnableSpan(NeuralODE(Decay(dtype=torch.float32), solver="dopri5", atol=1e-5, rtol=1e-5), t_span)
    t_eval, sol = span(torch.tensor([[1.0]]))
    assert len(t_eval) == 2
    sol[-1].sum().backward()
    assert float(span.t_f.grad) == pytest.approx(-math.exp(-0.38113805651664734), rel=1e-3)


def test_u2_every_asked_point_is_there_and_right():
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        inner = torch.sort(torch.rand(6, generator=generator)).values
        t_span = torch.cat([torch.zeros(1), 0.05 + 0.9 * inner, torch.ones(1)])
        field = Decay(dtype=torch.float32)
        t_eval, sol = tm.LearnableSpan(NeuralODE(field), t_span)(torch.tensor([[1.0, -2.0]]))
        assert torch.equal(t_eval.detach(), t_span)
        for t, z in zip(t_eval, sol, strict=True):
            assert torch.allclose(z, field.exact(t_eval[0], t, torch.tensor([[1.0, -2.0]])), atol=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# U3: adaptive solvers hang

HANGS = {
    "NaN field": (lambda t, x: x * math.nan, None, None),
    "inf field": (lambda t, x: x + math.inf, None, None),
    "field that turns NaN": (lambda t, x: x + torch.where(t > 0.5, math.nan, 0.0), None, None),
    "NaN state": (lambda t, x: -x, torch.tensor([[1.0, math.nan]]), None),
    "inf state": (lambda t, x: -x, torch.tensor([[1.0, math.inf]]), None),
    "infinite end": (lambda t, x: -x, None, torch.tensor([0.0, math.inf])),
    "finite-time blow-up": (lambda t, x: x * x, torch.tensor([[1.0, 2.0]]), torch.tensor([0.0, 3.0])),
}


@pytest.mark.parametrize("name", HANGS)
@pytest.mark.xfail(strict=True, raises=Stuck, reason="U3: no step limit and no check for NaN")
def test_u3_plain_torchdyn_ends(name):
    function, x, t_span = HANGS[name]
    x = torch.tensor([[1.0, 2.0]]) if x is None else x
    with contextlib.suppress(ValueError, RuntimeError):  # to end with an error is right
        NeuralODE(Counted(function))(x, torch.tensor([0.0, 1.0]) if t_span is None else t_span)


@pytest.mark.xfail(strict=True, raises=Stuck, reason="U3: an int64 span never reaches its end")
def test_u3_plain_torchdyn_ends_on_an_integer_span():
    NeuralODE(Counted(lambda t, x: -x))(torch.ones(1, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("t_span", [[0.0, math.nan], [0.0, 1.0, 0.5]], ids=["NaN end", "not monotone"])
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U3: fewer points than asked, without an error")
def test_u3_plain_torchdyn_refuses_a_span_it_cannot_follow(t_span):
    node = NeuralODE(Counted(lambda t, x: -x))
    try:
        t_eval, _ = node(torch.ones(1, 2), torch.tensor(t_span))
    except (ValueError, RuntimeError):
        return
    assert len(t_eval) == len(t_span)


# Counts that no solve of these problems needs before it must have given up: the wrapped solve has to stop by itself.
LIMIT = 400_000


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
@pytest.mark.parametrize("name", ["NaN field", "inf field", "field that turns NaN", "finite-time blow-up"])
def test_u3_a_solve_that_cannot_end_raises_integration_error(name, solver):
    function, x, t_span = HANGS[name]
    x = torch.tensor([[1.0, 2.0]]) if x is None else x
    span = tm.LearnableSpan(
        NeuralODE(Counted(function, LIMIT), solver=solver), torch.tensor([0.0, 1.0]) if t_span is None else t_span
    )
    before = {k: v.clone() for k, v in span.state_dict().items()}
    with pytest.raises(tm.IntegrationError) as caught:
        span(x)
    assert isinstance(caught.value, RuntimeError)
    names = {"tsit5": ("tsit5", "Tsitouras45"), "dopri5": ("dopri5", "DormandPrince45")}[solver]
    assert any(name in str(caught.value) for name in names)
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items())


@pytest.mark.parametrize("solver", ["euler", "rk4"])
@pytest.mark.parametrize("name", ["NaN field", "inf field", "field that turns NaN", "finite-time blow-up"])
def test_u3_a_fixed_step_solve_that_meets_nan_raises_too(name, solver):
    function, x, t_span = HANGS[name]
    x = torch.tensor([[1.0, 2.0]]) if x is None else x
    end = 1.0 if t_span is None else float(t_span[-1])
    span = tm.LearnableSpan(NeuralODE(Counted(function, LIMIT), solver=solver), torch.linspace(0, end, 101))
    with pytest.raises(tm.IntegrationError):
        span(x)


@pytest.mark.parametrize("name", ["NaN state", "inf state"])
@pytest.mark.parametrize("solver", ["tsit5", "rk4"])
def test_u3_a_state_that_is_not_finite_is_an_error(name, solver):
    function, x, _ = HANGS[name]
    with pytest.raises((ValueError, tm.IntegrationError)):
        tm.LearnableSpan(NeuralODE(Counted(function, LIMIT), solver=solver), torch.tensor([0.0, 1.0]))(x)


@pytest.mark.parametrize(
    "t_span",
    [torch.tensor([0.0, math.inf]), torch.tensor([0, 1]), torch.tensor([0.0, math.nan]), torch.tensor([0.0, 1.0, 0.5])],
    ids=["infinite", "integer", "NaN", "not monotone"],
)
def test_u3_a_span_that_cannot_be_followed_is_refused(t_span):
    node = NeuralODE(Counted(lambda t, x: -x, LIMIT))
    with pytest.raises((TypeError, ValueError)):
        tm.LearnableSpan(node, t_span)
    span = tm.LearnableSpan(node)
    with pytest.raises((TypeError, ValueError)):
        span(torch.ones(1, 2), t_span)


def test_u3_training_can_catch_the_error_and_go_on():
    model = random_model("mlp", dtype=torch.float32, solver="tsit5")
    span = tm.LearnableSpan(model.node)
    with pytest.raises((ValueError, tm.IntegrationError)):
        span(model.x * math.nan)
    _, sol = span(model.x)
    sol[-1].sum().backward()
    assert torch.isfinite(span.t_f.grad)
