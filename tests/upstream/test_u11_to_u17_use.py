"""U11 to U17: batched times, grids, call signatures, frozen parameters, copies and checkpoints.

Two halves a row, as in `test_u01_to_u03_solves.py`.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from differences import assert_close, difference
from problems import Decay, closed_form, random_model, reference
from torch import nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalLinear
from torchdyn.nn.galerkin import Fourier

import torchdyn_mintime as tm

TIGHT = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")

# ---------------------------------------------------------------------------------------------------------------------
# U11: fields that must be evaluated one time at a time


def _galerkin():
    layer = GalLinear(2, 2, expfunc=Fourier(3))
    nn.init.normal_(layer.coeffs)
    return nn.Sequential(DepthCat(1), layer)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U11: GalLinear reads only the last entry of a batched t")
def test_u11_plain_galerkin_layer_takes_a_batch_of_times(float64):
    field = _galerkin()
    times, x = torch.tensor([[0.1], [0.5], [0.9]]), torch.randn(3, 2)
    field[0].t = times
    together = field(x)
    for i, t in enumerate(times):
        field[0].t = t
        torch.testing.assert_close(together[i : i + 1], field(x[i : i + 1]))


@pytest.mark.xfail(strict=True, raises=(RuntimeError, ValueError), reason="U11: a batch of times is no Python number")
def test_u11_plain_field_that_reads_a_number_takes_a_batch_of_times():
    model = random_model("float time", solver="rk4")
    model.node.vf(torch.linspace(0, 1, 3, dtype=torch.float64)[:, None], model.x)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_u11_a_galerkin_field_is_solved_and_differentiated_right(float64, solver, sensitivity):
    field = _galerkin()

    def rhs(t, x):
        return field[1](torch.cat([x, t.detach().reshape(1, 1).expand(len(x), 1)], 1))

    x, t_span = torch.randn(3, 2), torch.linspace(0.1, 1.0, 31)
    span = tm.LearnableSpan(
        NeuralODE(field, solver=solver, sensitivity=sensitivity, **(TIGHT if solver != "rk4" else {})), t_span
    )
    _, sol = span(x)
    exact = reference(rhs, x, t_span)
    # rk4 with 30 steps on a smooth field: its own error is below 1e-5; the adaptive tolerance is 1e-9.
    torch.testing.assert_close(sol, exact, rtol=1e-5, atol=1e-5)
    sol.square().sum().backward()
    (expected,) = torch.autograd.grad(exact.square().sum(), [field[1].coeffs])
    assert float((field[1].coeffs.grad - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_u11_a_field_that_reads_the_time_as_a_number_works(solver, sensitivity):
    model = random_model("float time", solver=solver, sensitivity=sensitivity, **(TIGHT if solver != "rk4" else {}))
    t_span = torch.linspace(0, 1, 21, dtype=torch.float64)
    span = tm.LearnableSpan(model.node, t_span)
    _, sol = span(model.x)
    torch.testing.assert_close(sol, reference(model.rhs, model.x, t_span), rtol=1e-6, atol=1e-6)
    sol[-1].sum().backward()
    assert span.t_f.grad is not None and all(p.grad is not None for p in model.parameters)


# ---------------------------------------------------------------------------------------------------------------------
# U12: near-duplicates among the times


def _ends():
    return [k * 0.01 for k in range(1, 201)]


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U12: the save_at assertion fires for near-duplicates")
def test_u12_plain_fixed_step_solve_takes_every_multiple_of_the_step():
    node, x = NeuralODE(Decay(dtype=torch.float32), solver="euler"), torch.ones(1, 1)
    with torch.no_grad():
        for end in _ends():
            node(x, torch.cat([torch.arange(0, end, 0.01), torch.tensor([end])]))


def test_u12_every_multiple_of_the_step_is_a_good_end():
    span = tm.LearnableSpan(NeuralODE(Decay(dtype=torch.float32), solver="rk4"), torch.arange(0, 2.005, 0.01))
    with torch.no_grad():
        for end in _ends()[1:]:
            span.t_f.fill_(end)
            t_eval, sol = span(torch.ones(1, 1))
            assert torch.equal(t_eval[-1], span.t_f)
            # A near-duplicate is dropped and its two steps become one, at most .1 % longer than the step.
            assert (t_eval.diff() > 0.005).all() and (t_eval.diff() < 0.0101).all()
            assert float(sol[-1]) == pytest.approx(math.exp(-end), abs=1e-5)


def test_u12_torchdyn_itself_accepts_every_grid_or_unwrap_says_that_it_does_not():
    template, refused = torch.arange(0, 2.005, 0.01), 0
    for end in _ends()[1::7]:
        for nudge in (0.0, 1e-7, -1e-7, 1e-6, -1e-6, 1.5e-5, 3e-5, -3e-5):
            node = NeuralODE(Decay(dtype=torch.float32), solver="euler")
            span = tm.LearnableSpan(node, template, bounds=(0.01, 3.0))
            with torch.no_grad():
                span.t_f.fill_(end + nudge)
            grid = span.grid()
            # A point further than a thousandth of the step from t_f, and nearer than torchdyn tells apart.
            if bool((grid.diff() <= 1e-8 + 1e-5 * grid[1:]).any()):
                assert nudge == 1.5e-5 and end > 1
                with pytest.raises(ValueError, match="torchdyn refuses the learned grid"):
                    tm.unwrap(span, torch.ones(1, 1))
                assert node.t_span is None
                refused += 1
            else:
                assert len(tm.unwrap(span, torch.ones(1, 1))(torch.ones(1, 1))[1]) == len(grid)
    assert refused


# ---------------------------------------------------------------------------------------------------------------------
# U13: fields of (t, x)


@pytest.mark.parametrize("kind", ["plain", "lambda"])
@pytest.mark.xfail(strict=True, raises=TypeError, reason="U13: the field is called with args=")
def test_u13_plain_torchdyn_calls_a_field_of_t_and_x(kind):
    model = random_model(kind, solver="rk4")
    model.node(model.x, torch.linspace(0, 1, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["plain", "lambda"])
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_u13_a_field_of_t_and_x_works(kind, solver, sensitivity):
    model = random_model(kind, solver=solver, sensitivity=sensitivity, **(TIGHT if solver != "rk4" else {}))
    t_span = torch.linspace(0, 1, 21, dtype=torch.float64)
    _, sol = tm.LearnableSpan(model.node, t_span)(model.x)
    exact = reference(model.rhs, model.x, t_span)
    # rk4 with 20 steps: its own error stays below 1e-5 on these fields.
    torch.testing.assert_close(sol, exact, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(sol[-1].sum(), model.parameters)
    expected = torch.autograd.grad(exact[-1].sum(), model.parameters)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_u13_the_original_model_is_not_changed_for_it():
    model = random_model("plain", solver="rk4")
    names = [name for name, _ in model.node.named_parameters()]
    span = tm.LearnableSpan(model.node)
    span(model.x)
    assert [name for name, _ in span.node.named_parameters()] == names


# ---------------------------------------------------------------------------------------------------------------------
# U14: parameters that are unused or frozen


class _WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2).double()
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, t, x, **kwargs):
        return torch.tanh(self.net(x))


def _partly_frozen():
    field = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    field[0].requires_grad_(False)
    return field


@pytest.mark.parametrize("make", [_WithUnused, _partly_frozen], ids=["unused", "frozen"])
@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="U14: every parameter is differentiated")
def test_u14_plain_adjoint_takes_unused_and_frozen_parameters(make):
    node = NeuralODE(make(), solver="dopri5", sensitivity="adjoint")
    node(torch.ones(3, 2, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))[1][-1].sum().backward()


@pytest.mark.parametrize("make", [_WithUnused, _partly_frozen], ids=["unused", "frozen"])
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_u14_only_what_requires_grad_is_differentiated(make, solver, sensitivity):
    torch.manual_seed(3)
    field, x = make(), torch.tensor([[1.0, -0.3], [0.2, 0.9]], dtype=torch.float64)
    span = tm.LearnableSpan(
        NeuralODE(field, solver=solver, sensitivity=sensitivity, **(TIGHT if solver != "rk4" else {})),
        torch.linspace(0, 1, 41, dtype=torch.float64),
    )
    span(x)[1][-1].square().sum().backward()
    rhs = (lambda t, z: field(t, z)) if isinstance(field, _WithUnused) else (lambda t, z: field(z))
    exact = reference(rhs, x, torch.tensor([0.0, 1.0], dtype=torch.float64))[-1].square().sum()
    for name, p in field.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif name == "unused":
            assert p.grad is None or not p.grad.any()
        else:
            (expected,) = torch.autograd.grad(exact, [p], retain_graph=True)
            # 40 steps of rk4 and their adjoint: both are within 1e-6 of the equation's own gradient.
            torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_u14_a_field_frozen_as_a_whole_still_has_time_gradients(sensitivity):
    node, field, x = closed_form("decay", solver="dopri5", sensitivity=sensitivity, **TIGHT)
    field.requires_grad_(False)
    span = tm.LearnableSpan(node, torch.tensor([0.0, 1.0], dtype=torch.float64))
    span(x)[1][-1].sum().backward()
    assert float(span.t_f.grad) == pytest.approx(float(-x.sum()) * math.exp(-1), rel=1e-6)
    assert field.rate.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# U15: second order with a running cost under autograd


def _second_order_with_cost():
    field = nn.Linear(4, 2).double()
    return NeuralODE(field, order=2, solver="rk4", integral_loss=lambda t, x: x.square().sum(1)), field


@pytest.mark.xfail(strict=True, raises=AttributeError, reason="U15: `horder_forward` does not exist")
def test_u15_plain_second_order_takes_a_running_cost():
    node, _ = _second_order_with_cost()
    node(torch.ones(3, 5, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64))


def test_u15_second_order_with_a_running_cost_works():
    torch.manual_seed(1)
    node, field = _second_order_with_cost()
    x = torch.cat([torch.zeros(3, 1), torch.randn(3, 4)], 1).double()
    t_span = torch.linspace(0, 1, 41, dtype=torch.float64)
    _, sol = tm.LearnableSpan(node, t_span)(x)

    def augmented(t, y):
        z = y[:, 1:]
        return torch.cat([z.square().sum(1, keepdim=True), z[:, 2:], field(z)], 1)

    # 40 steps of rk4 on a smooth linear equation.
    torch.testing.assert_close(sol[-1], reference(augmented, x, t_span)[-1], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# U16: copies, and graphs left behind


def _graphs(module):
    """Names of the tensors on a module that hold an autograd graph alive."""
    return [
        f"{name}.{key}"
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]


@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="U16: `vf_params` is a non-leaf tensor")
def test_u16_plain_node_can_be_deep_copied():
    copy.deepcopy(random_model("mlp").node)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="U16: DepthCat.t keeps the graph of a learnable time")
def test_u16_plain_forward_leaves_no_graph_behind():
    model = random_model("depthcat", solver="euler")
    t_f = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    model.node(model.x, torch.stack([torch.zeros_like(t_f), t_f]))
    assert not [name for name in _graphs(model.node) if name.endswith(".t")]


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_u16_a_wrapped_model_can_be_deep_copied_at_any_moment(solver, sensitivity):
    model = random_model("depthcat", solver=solver, sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5, dtype=torch.float64))
    copy.deepcopy(span)
    _, sol = span(model.x)
    twin = copy.deepcopy(span)
    sol[-1].sum().backward()
    again = copy.deepcopy(span)
    for other in (twin, again):
        torch.testing.assert_close(other(model.x)[1], span(model.x)[1], rtol=0, atol=0)
        assert other.t_f is not span.t_f
        ours, theirs = set(map(id, span.parameters())), set(map(id, other.parameters()))
        assert not ours & theirs
        with torch.no_grad():
            for p in other.node.parameters():
                p.mul_(0.5)
    with torch.no_grad():
        assert not torch.allclose(twin(model.x)[1], span(model.x)[1])


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_u16_a_forward_leaves_no_graph_behind(solver, sensitivity):
    model = random_model("depthcat", solver=solver, sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5, dtype=torch.float64), learn_t0=True)
    _, sol = span(model.x)
    assert not _graphs(span), "after the forward"
    sol[-1].sum().backward()
    assert not _graphs(span), "after the backward"


# ---------------------------------------------------------------------------------------------------------------------
# U17: checkpoints


def _reload(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.xfail(strict=True, raises=pickle.UnpicklingError, reason="U17: a whole model needs weights_only=False")
def test_u17_plain_model_loads_with_the_safe_default():
    _reload(NeuralODE(Decay()))


def test_u17_a_state_dict_loads_with_the_safe_default():
    model = random_model("mlp", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11, dtype=torch.float64))
    with torch.no_grad():
        span.t_f.fill_(0.43)
    loaded = _reload(span.state_dict(), weights_only=True)
    fresh = tm.LearnableSpan(
        random_model("mlp", seed=9, solver="rk4").node, torch.linspace(0, 1, 11, dtype=torch.float64)
    )
    fresh.load_state_dict(loaded)
    torch.testing.assert_close(fresh(model.x)[1], span(model.x)[1], rtol=0, atol=0)
    assert float(fresh.t_f.detach()) == 0.43


def test_u17_a_whole_wrapped_model_can_be_saved():
    model = random_model("mlp", solver="tsit5")
    span = tm.LearnableSpan(model.node)
    span(model.x)
    twin = _reload(span, weights_only=False)
    torch.testing.assert_close(twin(model.x)[1], span(model.x)[1], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Layers of torchdyn that keep something between calls, each by itself (U11's last clause, U19 in full)


def test_u11_data_control_follows_the_batch():
    field = nn.Sequential(DataControl(), nn.Linear(4, 2)).double()
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 21, dtype=torch.float64))
    for batch in (3, 5, 1):
        x = torch.randn(batch, 2, dtype=torch.float64)
        _, sol = span(x)
        exact = reference(
            lambda t, z, x=x: field[1](torch.cat([z, x], 1)), x, torch.linspace(0, 1, 2, dtype=torch.float64)
        )
        torch.testing.assert_close(sol[-1], exact[-1], rtol=1e-6, atol=1e-6)


def test_u11_hutchinson_noise_follows_the_batch():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    noise = MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    cnf = CNF(net, trace_estimator=hutch_trace, noise_dist=noise)
    model = nn.Sequential(
        Augmenter(augment_idx=1, augment_dims=1),
        tm.LearnableSpan(
            NeuralODE(cnf, solver="rk4", return_t_eval=False), torch.linspace(0, 1, 5, dtype=torch.float64)
        ),
    )
    for batch in (3, 5, 1):
        sol = model(torch.randn(batch, 2, dtype=torch.float64))
        assert sol.shape == (5, batch, 3) and torch.isfinite(sol).all()
        sol[-1].sum().backward()


def test_u11_the_time_gradient_of_a_galerkin_field_matches_differences(float64):
    span = tm.LearnableSpan(NeuralODE(_galerkin(), solver="rk4"), torch.linspace(0.1, 1.0, 7), t_f=0.82)
    x = torch.randn(3, 2)
    span(x)[1][-1].square().sum().backward()
    numeric = difference(lambda: span(x)[1][-1].square().sum(), [span.t_f], [torch.ones(())])
    assert_close(float(span.t_f.grad), numeric, abs(numeric), 1e-6, "dl/dt_f")
