"""U18 to U20: what torchdyn does not run, state kept on modules, and the implicit solver; with alf, its nearest relative.

Two halves a row, as in `test_u01_to_u03_solves.py`.
"""

import importlib

import pytest
import torch
from problems import Cosine, Decay, Linear, closed_form, random_model, reference
from torch import nn
from torch.distributions import MultivariateNormal
from torchdyn.core import MultipleShootingLayer, NeuralODE, NeuralSDE
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import DataControl
from torchdyn.numerics.solvers.hyper import HyperEuler
from torchdyn.numerics.solvers.ode import AsynchronousLeapfrog, ImplicitEuler

import torchdyn_mintime as tm

TIGHT = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
ADJOINTS = SENSITIVITIES[1:]

# ---------------------------------------------------------------------------------------------------------------------
# U18: dict states and other models


class _DictField(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.ones(()))

    def forward(self, t, x, **kwargs):
        return {k: -self.rate * v for k, v in x.items()}


DICT_STATE = {"position": torch.ones(2, 1), "velocity": torch.zeros(2, 1)}


@pytest.mark.parametrize("solver", ["euler", "rk4", "tsit5"])
@pytest.mark.xfail(strict=True, raises=(TypeError, AttributeError), reason="U18: dict states only pass custom solvers")
def test_u18_plain_torchdyn_takes_a_dict_state(solver):
    NeuralODE(_DictField(), solver=solver)(DICT_STATE, torch.linspace(0, 1, 5))


@pytest.mark.xfail(strict=True, raises=TypeError, reason="U18: NeuralSDE cannot be built in the release")
def test_u18_plain_torchdyn_builds_a_neural_sde():
    NeuralSDE(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.xfail(
    strict=True, raises=(TypeError, AttributeError), reason="U18: multiple shooting does not run as released"
)
def test_u18_plain_torchdyn_runs_a_multiple_shooting_layer():
    layer = MultipleShootingLayer(Linear(dtype=torch.float32), solver="mszero", sensitivity="adjoint")
    layer(torch.ones(2, 2), torch.linspace(0, 1, 5))[1][-1].sum().backward()


@pytest.mark.xfail(strict=True, raises=ImportError, reason="U18: the module imports a name that does not exist")
def test_u18_plain_torchdyn_has_its_hybrid_models():
    importlib.import_module("torchdyn.models.hybrid")


def test_u18_a_dict_state_is_refused_with_a_type_error():
    span = tm.LearnableSpan(NeuralODE(_DictField(), solver="rk4"))
    with pytest.raises(TypeError, match="(?i)tensor|dict"):
        span(DICT_STATE)


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(2, 2),
        lambda x: x,
        "rk4",
        None,
        nn.Sequential(nn.Linear(2, 2)),
    ],
    ids=["linear", "lambda", "str", "None", "Sequential"],
)
def test_u18_what_is_not_a_neural_ode_is_refused_with_a_type_error(other):
    with pytest.raises(TypeError, match="NeuralODE"):
        tm.LearnableSpan(other)


def test_u18_a_multiple_shooting_layer_is_refused_with_a_type_error():
    layer = MultipleShootingLayer(Linear(dtype=torch.float32), solver="mszero")
    with pytest.raises(TypeError, match="NeuralODE"):
        tm.LearnableSpan(layer)
    # `wrap` looks for NeuralODEs and finds none.
    with pytest.raises((TypeError, ValueError), match="NeuralODE"):
        tm.wrap(layer)


def test_u18_a_neural_sde_is_refused_with_a_type_error():
    # The release cannot build one; a bare instance stands for the class.
    sde = NeuralSDE.__new__(NeuralSDE)
    nn.Module.__init__(sde)
    with pytest.raises(TypeError, match="NeuralODE"):
        tm.LearnableSpan(sde)


# ---------------------------------------------------------------------------------------------------------------------
# U19: control and noise sit on the module


def _controlled(sensitivity):
    torch.manual_seed(5)
    field = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    node = NeuralODE(field, solver="dopri5", sensitivity=sensitivity, **TIGHT)
    return node, field, torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64) * 3


def _gradient_with_a_forward_between(run, field, x, other, between):
    sol = run(x)[1]
    if between:
        run(other)
    field.zero_grad()
    sol[-1].square().sum().backward()
    return torch.cat([p.grad.flatten() for p in field.parameters()])


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="U19: the control of the last forward serves every backward"
)
def test_u19_plain_adjoint_keeps_the_control_of_its_forward():
    node, field, x, other = _controlled("adjoint")
    run = lambda x: node(x, torch.tensor([0.0, 1.0], dtype=torch.float64))  # noqa: E731
    alone = _gradient_with_a_forward_between(run, field, x, other, between=False)
    mixed = _gradient_with_a_forward_between(run, field, x, other, between=True)
    torch.testing.assert_close(mixed, alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_u19_the_control_is_captured_by_each_forward(sensitivity):
    node, field, x, other = _controlled(sensitivity)
    span = tm.LearnableSpan(node, torch.tensor([0.0, 1.0], dtype=torch.float64))
    mixed = _gradient_with_a_forward_between(span, field, x, other, between=True)
    # The control is the detached input, as torchdyn has it.
    exact = reference(lambda t, z: field[1:](torch.cat([z, x], 1)), x, torch.tensor([0.0, 1.0], dtype=torch.float64))[
        -1
    ]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact.square().sum(), list(field.parameters()))])
    assert float((mixed - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_u19_the_noise_is_captured_by_each_forward(sensitivity):
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    noise = MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    cnf = CNF(net, trace_estimator=hutch_trace, noise_dist=noise)
    span = tm.LearnableSpan(
        NeuralODE(cnf, solver="dopri5", sensitivity=sensitivity, **TIGHT), torch.tensor([0.0, 1.0], dtype=torch.float64)
    )
    x = torch.cat([torch.zeros(3, 1), torch.randn(3, 2)], 1).double()
    gradients = []
    for between in (False, True):
        torch.manual_seed(11)
        _, sol = span(x)
        if between:
            span(x[:2])
        net.zero_grad()
        sol[-1, :, 0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sensitivity", ADJOINTS)
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.2)], ids=["BatchNorm", "Dropout"])
def test_u19_training_mode_layers_with_a_state_are_an_error_under_an_adjoint(sensitivity, layer):
    field = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 2))
    x = torch.randn(6, 2)

    def train():
        span = tm.LearnableSpan(NeuralODE(field, solver="rk4", sensitivity=sensitivity), torch.linspace(0, 1, 5))
        span.train()
        span(x)

    with pytest.raises((ValueError, RuntimeError), match="(?i)BatchNorm|Dropout"):
        train()


@pytest.mark.parametrize("sensitivity", ADJOINTS)
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.2)], ids=["BatchNorm", "Dropout"])
def test_u19_the_same_layers_are_welcome_in_eval_mode(sensitivity, layer):
    field = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 2)).eval()
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4", sensitivity=sensitivity), torch.linspace(0, 1, 5)).eval()
    _, sol = span(torch.randn(6, 2))
    sol[-1].sum().backward()
    assert torch.isfinite(span.t_f.grad)


def test_u19_a_training_batch_norm_is_fine_under_autograd():
    field = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 5))
    span(torch.randn(6, 2))
    assert int(field[1].num_batches_tracked) == 16


def test_u19_the_adjoints_backward_leaves_the_module_as_the_forward_left_it():
    model = random_model("depthcat", solver="rk4", sensitivity="adjoint")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5, dtype=torch.float64))
    _, sol = span(model.x)
    t = [m.t for m in span.modules() if hasattr(m, "t")]
    sol[-1].sum().backward()
    for before, after in zip(t, [m.t for m in span.modules() if hasattr(m, "t")], strict=True):
        assert (before is None and after is None) or torch.equal(torch.as_tensor(before), torch.as_tensor(after))


def test_u19_the_adjoints_backward_does_not_count_on_the_node():
    # U19 names the adjoint's backward among the solves that leave nfe alone; the wrapper's own `nfe` does include it.
    model = random_model("mlp", solver="rk4", sensitivity="adjoint")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5, dtype=torch.float64))
    _, sol = span(model.x)
    counted, own = model.node.vf.nfe, span.nfe
    sol[-1].sum().backward()
    assert model.node.vf.nfe == counted
    assert span.nfe > own


# ---------------------------------------------------------------------------------------------------------------------
# U20: the implicit solver


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="U20: the solution is a new leaf, cut from x and parameters"
)
def test_u20_plain_ieuler_has_gradients():
    node, field, x = closed_form("decay", solver="ieuler")
    x.requires_grad_(True)
    node(x, torch.linspace(0, 0.5, 6, dtype=torch.float64))[1][-1].sum().backward()
    assert x.grad is not None and x.grad.any()
    assert field.rate.grad is not None and field.rate.grad.any()


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U20: the field is evaluated at t instead of t + dt")
def test_u20_plain_ieuler_evaluates_at_the_end_of_the_step():
    x, t_span = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0.0, 0.5], dtype=torch.float64)
    _, sol = NeuralODE(Cosine(), solver="ieuler")(x, t_span)
    torch.testing.assert_close(sol[-1].detach(), 0.5 * torch.cos(3 * t_span[1]).reshape(1, 1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "solver", ["ieuler", "implicit_euler", ImplicitEuler()], ids=["ieuler", "implicit_euler", "instance"]
)
def test_u20_ieuler_is_refused_when_wrapped(solver):
    node = NeuralODE(Decay(), solver=solver)
    with pytest.raises(ValueError, match="(?i)ieuler|implicit"):
        tm.LearnableSpan(node)
    model = nn.Sequential(nn.Linear(2, 2), node)
    with pytest.raises(ValueError, match="(?i)ieuler|implicit"):
        tm.wrap(model)
    assert model[1] is node


# ---------------------------------------------------------------------------------------------------------------------
# alf, where it can work, and hypersolvers


class _Velocity(nn.Module):
    """The field of alf: v = f(t, x) on half of the state (x, v)."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, t, x, **kwargs):
        return -self.rate * x


def _alf_state():
    x = torch.tensor([[1.0, -0.5], [0.2, 0.4]], dtype=torch.float64)
    return torch.cat([x, -0.8 * x], 1)


@pytest.mark.parametrize(
    "solver", ["alf", "AsynchronousLeapfrog", AsynchronousLeapfrog()], ids=["alf", "long name", "instance"]
)
def test_u20_alf_works_with_fixed_steps_under_autograd(solver):
    t_span, xv = torch.linspace(0, 1, 41, dtype=torch.float64), _alf_state()
    plain = NeuralODE(_Velocity(), solver=solver)(xv, t_span)[1]
    span = tm.LearnableSpan(NeuralODE(_Velocity(), solver=solver), t_span)
    _, sol = span(xv)
    # torchdyn computes alf's dt from a running t, ours from the grid: the values agree to rounding.
    torch.testing.assert_close(sol, plain, rtol=1e-10, atol=1e-12)
    sol[-1, :, :2].sum().backward()
    # alf is of second order; at 40 steps it is within 1e-3 of x' = -.8 x.
    assert float(span.t_f.grad) == pytest.approx(
        float((-0.8 * xv[:, :2] * torch.exp(torch.tensor(-0.8))).sum()), rel=5e-3
    )


def test_u20_adaptive_alf_is_refused_when_wrapped():
    with pytest.raises(ValueError, match="(?i)alf|leapfrog"):
        tm.LearnableSpan(NeuralODE(_Velocity(), solver=AsynchronousLeapfrog(stepping_class="adaptive")))


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_u20_alf_under_an_adjoint_is_refused_when_wrapped(sensitivity):
    with pytest.raises(ValueError, match="(?i)alf|leapfrog"):
        tm.LearnableSpan(NeuralODE(_Velocity(), solver="alf", sensitivity=sensitivity))


class _Correction(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).double()

    def forward(self, t, x):
        return self.net(x)


def test_u20_a_hypersolver_instance_takes_its_own_steps():
    hyper, x = _Correction(), torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    t_span, field = torch.linspace(0, 1, 6, dtype=torch.float64), Linear()
    span = tm.LearnableSpan(NeuralODE(field, solver=HyperEuler(hyper, torch.float64)), t_span)
    _, sol = span(x)
    z, expected = x, [x]
    for dt in t_span.diff():
        z = z + dt * field(None, z) + dt**2 * hyper(None, z)
        expected.append(z)
    torch.testing.assert_close(sol, torch.stack(expected), rtol=1e-10, atol=1e-12)
    sol[-1].sum().backward()
    assert hyper.net.weight.grad is not None and hyper.net.weight.grad.any()
