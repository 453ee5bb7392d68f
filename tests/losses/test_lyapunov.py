"""V-dot and the Lyapunov penalty against closed forms and finite differences."""

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from differences import CENTRAL, assert_close, difference, directions_like
from hypothesis import given
from hypothesis import strategies as st
from losses_common import T_SPAN, square
from problems import FIELDS, ByArgs, Decay, closed_form, random_model, reference
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace
from torchdyn.nn import DataControl, DepthCat
from torchdyn.nn.galerkin import Fourier, GalLinear

from torchdyn_mintime import LearnableSpan, LyapunovRegularizer, spans, wrap
from torchdyn_mintime.losses.potentials import CrossEntropy, SquaredDistance
from torchdyn_mintime.losses.samplers import ball

KINDS = [*FIELDS, "float time"]


def breathing(z, *target, t):
    """A potential that depends on time by itself."""
    return square(z) * (2 + torch.sin(3 * t)) + torch.exp(t)


def wavy(z, *target):
    return (torch.sin(z) + 1.2).reshape(z.shape[0], -1).sum(1)


class Head(nn.Module):
    """A potential through a head of its own, for states of any shape."""

    def __init__(self, columns):
        super().__init__()
        self.head = nn.Linear(columns, 3, dtype=torch.float64)

    def forward(self, z, y):
        return F.cross_entropy(self.head(z.reshape(len(y), -1)), y, reduction="none")


def a_potential(name, x):
    if name == "head":
        return Head(x.reshape(x.shape[0], -1).shape[1]), (torch.arange(x.shape[0]) % 3,)
    return {"square": square, "breathing": breathing, "wavy": wavy}[name], ()


def flow_derivatives(rhs, potential, t, z, target, takes_time, h=2e-3):
    """V-dot and V-dotdot along the flow through (t, z), by five-point differences of V, each ``[batch]``."""

    def value(k):
        there = t + k * h
        state = reference(rhs, z, torch.stack([t, there]), steps=8)[-1] if k else z
        return potential(state, *target, t=there) if takes_time else potential(state, *target)

    with torch.no_grad():
        v = {k: value(k) for k in (-2, -1, 0, 1, 2)}
    first = sum(c * v[k] for k, c in CENTRAL) / h
    second = (-v[-2] + 16 * v[-1] - 30 * v[0] + 16 * v[1] - v[2]) / (12 * h * h)
    return first, second


# ------------------------------------------------------------------------------------------------------- V-dot, V-dotdot


@given(
    kind=st.sampled_from(KINDS),
    potential=st.sampled_from(["square", "breathing", "wavy", "head"]),
    seed=st.integers(0, 10_000),
    start=st.floats(-1, 1),
    step=st.floats(0.05, 0.5),
)
def test_v_dot_is_the_derivative_of_v_along_the_flow(kind, potential, seed, start, step):
    model = random_model(kind, seed)
    v, target = a_potential(potential, model.x)
    regularizer = LyapunovRegularizer(model.node, v, 1.0)
    t_eval = start + step * torch.arange(5, dtype=torch.float64)
    sol = torch.randn(5, *model.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    value, rate = regularizer.derivatives(t_eval, sol, *target)
    for i, t in enumerate(t_eval):
        expected, _ = flow_derivatives(model.rhs, v, t, sol[i], target, potential == "breathing")
        scale = expected.abs().max().clamp_min(1e-2)
        assert (rate[i] - expected).abs().max() <= 1e-6 * scale
    assert value.shape == rate.shape == sol.shape[:2]


@given(
    kind=st.sampled_from(["mlp", "depthcat", "keyword", "plain", "second order", "conv"]),
    potential=st.sampled_from(["square", "breathing", "wavy", "head"]),
    seed=st.integers(0, 10_000),
)
def test_v_dotdot_is_the_second_derivative_along_the_flow(kind, potential, seed):
    model = random_model(kind, seed)
    v, target = a_potential(potential, model.x)
    regularizer = LyapunovRegularizer(model.node, v, 1.0, order=2)
    sol = torch.randn(5, *model.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    terms = regularizer.derivatives(T_SPAN[:5], sol, *target)
    for i, t in enumerate(T_SPAN[:5]):
        expected = flow_derivatives(model.rhs, v, t, sol[i], target, potential == "breathing", h=1e-2)
        for term, number in zip(terms[1:], expected, strict=True):
            # The second difference divides rounding by h^2 and leaves h^4 of the sixth derivative.
            assert (term[i] - number).abs().max() <= 1e-5 * number.abs().max().clamp_min(1.0)


def layered(kind):
    """NeuralODEs of torchdyn's layers whose fields hold state of the batch, or read the time from their modules."""
    if kind == "DataControl":
        return NeuralODE(nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), solver="rk4")
    if kind == "GalLinear":
        net = nn.Sequential(DepthCat(1), GalLinear(2, 8, expfunc=Fourier(3)), nn.Tanh(), nn.Linear(8, 2))
        return NeuralODE(net, solver="rk4")
    net = nn.Sequential(DepthCat(1), nn.Linear(3, 8), nn.Tanh(), DataControl(), nn.Linear(10, 2))
    return NeuralODE(net, solver="rk4")


@pytest.mark.parametrize("kind", ["DataControl", "GalLinear", "both"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_v_dot_over_torchdyns_layers(float64, kind, wrapped):
    node = layered(kind)
    x = torch.randn(4, 2)
    model = LearnableSpan(node, T_SPAN) if wrapped else node
    regularizer = LyapunovRegularizer(model, square, 1.0)
    t_eval, sol = regularizer(x) if wrapped else regularizer(x, T_SPAN)
    if kind != "GalLinear":
        model(torch.randn(4, 2)) if wrapped else model(torch.randn(4, 2), T_SPAN)  # leaves another control behind
    _, rate = regularizer.derivatives(t_eval, sol)
    with torch.no_grad():
        node(x, T_SPAN)  # torchdyn's own way to set the control
        for i, t in enumerate(t_eval):
            z = sol[i]
            assert torch.allclose(rate[i], (2 * z * node.vf(t, z)).sum(1), rtol=1e-10)


def test_v_dot_sees_the_noise_of_the_solve():
    """Hutchinson's estimate of the trace is another field with other noise."""
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    cnf = CNF(net, trace_estimator=hutch_trace, noise_dist=noise)
    span = LearnableSpan(NeuralODE(cnf, solver="rk4"), torch.linspace(0, 1, 6))
    regularizer = LyapunovRegularizer(span, square, 1.0)
    t_eval, sol = regularizer(torch.randn(4, 3))
    drawn, random = cnf.noise.clone(), torch.get_rng_state()
    _, rate = regularizer.derivatives(t_eval, sol)
    assert torch.equal(cnf.noise, drawn) and cnf.noise_dist is noise
    assert torch.equal(torch.get_rng_state(), random)
    for i, z in enumerate(sol):
        assert torch.allclose(rate[i], (2 * z * cnf(z)).sum(1), rtol=1e-4, atol=1e-5)
    regularizer.penalty(t_eval, sol).backward()
    assert net[0].weight.grad is not None


def test_the_running_cost_column_is_no_part_of_the_state():
    node = NeuralODE(Decay(), solver="rk4", integral_loss=lambda t, x: x.square().sum(1))
    x = torch.cat([torch.zeros(3, 1), torch.randn(3, 2)], 1).double()
    t_eval, sol = node(x, T_SPAN)
    value, rate = LyapunovRegularizer(node, square, 1.0).derivatives(t_eval, sol)
    assert torch.allclose(value, sol[..., 1:].square().sum(2))
    assert torch.allclose(rate, -2 * value)


def test_a_builtin_function_whose_signature_is_not_known_can_be_a_potential():
    node, _, x = closed_form("decay", solver="rk4")
    norm = functools.partial(torch.linalg.vector_norm, dim=1)
    value, rate = LyapunovRegularizer(node, norm, 1.0).derivatives(*node(x, T_SPAN))
    assert torch.allclose(rate, -value)  # no time is passed to it


# -------------------------------------------------------------------------------------------------------------- penalty


@given(
    kind=st.sampled_from(["mlp", "depthcat", "plain", "conv"]),
    potential=st.sampled_from(["square", "breathing", "head"]),
    sensitivity=st.sampled_from(["autograd", "adjoint"]),
    detach=st.booleans(),
    reduction=st.sampled_from(["integral", "mean", "points"]),
    rate=st.floats(0.5, 20),
    seed=st.integers(0, 10_000),
)
def test_the_penaltys_gradient_is_its_difference(kind, potential, sensitivity, detach, reduction, rate, seed):
    model = random_model(kind, seed, sensitivity=sensitivity)
    v, target = a_potential(potential, model.x)
    # t_f between two points, where the discrete solution is differentiable; fine steps, so that the adjoint's own
    # gradient and that of the discrete solution agree.
    span = LearnableSpan(model.node, torch.linspace(0, 1, 41, dtype=torch.float64), t_f=0.762)
    regularizer = LyapunovRegularizer(span, v, rate, detach_potential=detach)
    with torch.no_grad():
        held = regularizer.derivatives(*span(model.x), *target)[0] + 0.0

    def value(smooth=False):
        t_eval, sol = span(model.x)
        if not detach and not smooth:
            return regularizer.penalty(t_eval, sol, *target, reduction=reduction)
        terms = regularizer.derivatives(t_eval, sol, *target)
        inner = terms[1] + rate * (held if detach else terms[0])
        per_point = F.relu(inner).mean(1)
        if reduction == "points":
            return per_point.mean()
        integral = torch.trapezoid(per_point, t_eval)
        return integral if reduction == "integral" else integral / (t_eval[-1] - t_eval[0])

    # Where some violation changes its sign, the relu has a kink, and a difference across it measures something else.
    with torch.no_grad():
        terms = regularizer.derivatives(*span(model.x), *target)
        if (terms[1] + rate * terms[0]).abs().min() < 1e-3:
            return
    loss = regularizer.penalty(*span(model.x), *target, reduction=reduction)
    loss.backward()
    tensors = [p for p in [*model.parameters, *(v.parameters() if isinstance(v, nn.Module) else [])] if p.requires_grad]
    groups = {"theta": tensors, "t_f": [span.t_f]}
    for name, group in groups.items():
        directions = directions_like(group, seed)
        analytic = sum(
            (0.0 if p.grad is None else (p.grad * d).sum().item()) for p, d in zip(group, directions, strict=True)
        )
        numeric = difference(value, group, directions)
        # The adjoint's gradient is that of the exact solution: RK4 at 1/40 differs by about h^4.
        rtol = 1e-6 if sensitivity == "autograd" else 1e-4
        assert_close(analytic, numeric, scale=1.0 + abs(loss.item()), rtol=rtol, what=f"{name} {sensitivity} {detach}")


def test_reductions_of_a_closed_form():
    node, _, x = closed_form("decay", solver="rk4")
    regularizer = LyapunovRegularizer(node, square, 5.0)
    t = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.6, 1.0], dtype=torch.float64)
    t_eval, sol = node(x, t)
    violation = regularizer.violation(t_eval, sol)
    assert torch.allclose(violation, 3 * sol.square().sum(2))  # V-dot = -2 V
    penalty = {r: regularizer.penalty(t_eval, sol, reduction=r).item() for r in ("mean", "integral", "points")}
    curve = violation.mean(1)
    assert penalty["points"] == pytest.approx(curve.mean().item())
    assert penalty["integral"] == pytest.approx(torch.trapezoid(curve, t).item())
    assert penalty["mean"] == pytest.approx(penalty["integral"])  # the interval has length 1
    assert penalty["mean"] != pytest.approx(penalty["points"], rel=1e-2)


def test_the_potential_is_detached_only_in_the_rate_term():
    node, _, x = closed_form("decay", solver="rk4")
    for detach, factor in ((True, -2.0), (False, 3.0)):
        regularizer = LyapunovRegularizer(node, square, 5.0, detach_potential=detach)
        z = x.expand(5, 3, 2).clone().requires_grad_()
        regularizer.violation(T_SPAN[:5], z).sum().backward()
        assert torch.allclose(z.grad, factor * 2 * z.detach())


@given(decay=st.floats(0.1, 5), rate=st.floats(0.1, 12))
def test_the_penalty_is_zero_exactly_when_the_condition_holds(decay, rate):
    node = NeuralODE(Decay(decay), solver="rk4")
    x = torch.randn(4, 2, dtype=torch.float64)
    penalty = LyapunovRegularizer(node, square, rate).penalty(*node(x, T_SPAN)).item()
    if abs(rate - 2 * decay) > 1e-9:
        assert (penalty == 0.0) == (rate < 2 * decay)


def test_the_penalty_trains_a_field_to_the_rate():
    torch.manual_seed(1)
    span = LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 0.5, 6))
    span.t_f.requires_grad_(False)
    regularizer = LyapunovRegularizer(span, square, 3.0)
    optimizer = torch.optim.Adam([p for p in regularizer.parameters() if p.requires_grad], 0.1)
    x = torch.randn(64, 2)
    before = regularizer.certificate(x).fraction
    for _ in range(150):
        loss = regularizer.penalty(*regularizer(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.5
    assert regularizer.certificate(x, rate=2.5).fraction == 1.0


# ------------------------------------------------------------------------------------------------- a model among models


def test_calls_go_through_and_leave_no_trace():
    net = nn.Sequential(DepthCat(1), nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), DataControl(), nn.Linear(10, 2))
    span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 6))
    regularizer = LyapunovRegularizer(span, square, 1.0)
    x = torch.randn(8, 2)
    t_eval, sol = regularizer(x)
    assert torch.equal(t_eval, span.grid())

    def state():
        control = next(m._control for m in net.modules() if hasattr(m, "_control"))
        return [span.nfe, span.vf.nfe, net[2].running_mean.clone(), net[2].running_var.clone(), net[0].t, control]

    before, random = state(), torch.get_rng_state()
    penalty = regularizer.penalty(t_eval, sol)
    regularizer.certificate(x)
    for a, b in zip(before, state(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert torch.equal(random, torch.get_rng_state())
    penalty.backward()
    assert all(p.grad is not None for p in net[1].parameters())


def test_inside_a_larger_model_before_and_after_wrap():
    node = NeuralODE(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), solver="rk4")
    regularizer = LyapunovRegularizer(node, CrossEntropy(classes=2), 20.0)
    model = nn.Sequential(nn.ZeroPad1d((0, 1)), regularizer)
    node.t_span = torch.linspace(0, 0.05, 6)
    wrap(model)
    assert isinstance(regularizer.model, LearnableSpan) and len(list(spans(model))) == 1
    x, y = torch.randn(8, 2), torch.randint(0, 2, (8,))
    t_eval, sol = model(x)
    expected = regularizer.penalty(t_eval, sol, y)
    assert torch.equal(regularizer.penalty_of_last(y), expected)
    expected.backward()
    assert next(spans(model)).t_f.grad is not None


class Gained(nn.Module):
    """z' = -gain z, with a gain that the call passes; a gain of 1 where it passes none."""

    def forward(self, t, x, args=None):
        return -(args or {}).get("gain", 1.0) * x


@pytest.mark.parametrize(
    ("bare", "how"),
    [*itertools.product([False, True], ["by name", "by position"]), (False, "by a model around the span")],
)
def test_args_are_those_of_the_last_forward_however_they_were_passed(bare, how):
    node = NeuralODE(Gained(), solver="rk4")
    model = node if bare else LearnableSpan(node, torch.linspace(0, 1, 11))
    regularizer, x, t_span = LyapunovRegularizer(model, square, 1.0), torch.randn(4, 2), torch.linspace(0, 1, 11)
    if how == "by a model around the span":
        t_eval, sol = model(x, args={"gain": 3.0})
    elif how == "by name":
        t_eval, sol = regularizer(x, t_span, args={"gain": 3.0})
    else:
        t_eval, sol = regularizer(x, t_span, (), {"gain": 3.0})
    _, slope = regularizer.derivatives(t_eval, sol)
    torch.testing.assert_close(slope, -6 * square(sol.flatten(0, 1)).view_as(slope))
    # The rate of V is 6; of the field without its args it is 2.
    assert regularizer.certificate(x, t_span=t_span).rates.min() == pytest.approx(6.0, rel=1e-3)


def test_the_last_forward_of_a_bare_node_and_of_none():
    node, _, x = closed_form("decay", solver="rk4")
    regularizer = LyapunovRegularizer(node, square, 5.0)
    with pytest.raises(RuntimeError, match="no last forward"):
        regularizer.penalty_of_last()
    t_eval, sol = regularizer(x, T_SPAN)
    assert torch.equal(regularizer.penalty_of_last(), regularizer.penalty(t_eval, sol))
    copied = pickle.loads(pickle.dumps(regularizer.potential)), copy.copy(regularizer)
    assert copied[1].rate == 5.0


def test_a_wrapped_one_can_be_copied_after_a_backward():
    span = LearnableSpan(random_model("mlp").node, T_SPAN)
    regularizer = LyapunovRegularizer(span, SquaredDistance(nn.Linear(2, 2, dtype=torch.float64)), 2.0)
    x = torch.randn(3, 2, dtype=torch.float64)
    regularizer.penalty(*regularizer(x), x).backward()
    twin = copy.deepcopy(regularizer)
    assert torch.equal(twin.penalty(*twin(x), x), regularizer.penalty(*regularizer(x), x))
    assert all(p.grad is not None for p in regularizer.potential.head.parameters())


def test_without_gradient_everything_can_still_be_evaluated():
    span = LearnableSpan(random_model("depthcat").node, T_SPAN)
    regularizer = LyapunovRegularizer(span, square, 2.0)
    x = torch.randn(3, 2, dtype=torch.float64)
    with_gradient = regularizer.penalty(*regularizer(x))
    with torch.no_grad():
        without = regularizer.penalty(*regularizer(x))
    assert not without.requires_grad
    assert without.item() == pytest.approx(with_gradient.item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ bad input


def trajectory(potential, rate=1.0, target=(), **options):
    node = random_model("mlp").node
    regularizer = LyapunovRegularizer(node, potential, rate, **options)
    return regularizer.penalty(T_SPAN, torch.randn(6, 3, 2, dtype=torch.float64), *target)


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf])
def test_a_rate_that_cannot_be_used(rate):
    with pytest.raises(ValueError, match=f"rate must be positive and finite; got {rate}"):
        trajectory(square, rate)


@pytest.mark.parametrize(
    "potential, error, text",
    [
        (lambda z: z.square().sum(), ValueError, r"one value a sample, \(3,\); got \(\)"),
        (lambda z: z.square(), ValueError, r"one value a sample, \(3,\); got \(3, 2\)"),
        (lambda z: z.sum(1) * 0 - 0.25 + 0 * z[:, 0], ValueError, r"is negative \(-0.25\) at t = 0"),
        (lambda z: square(z) * math.nan, ValueError, "the potential is NaN at t = 0"),
        (lambda z: square(z.detach()), ValueError, "no gradient with respect to the state"),
        (lambda z: torch.ones(3, requires_grad=True).double(), ValueError, "no gradient with respect to the state"),
        (lambda z, *, t: square(z.detach()) + t**2, ValueError, "no gradient with respect to the state"),
        (lambda z: 3.0, TypeError, "must return a tensor .* got float"),
    ],
)
def test_a_potential_that_cannot_be_used(potential, error, text):
    with pytest.raises(error, match=text):
        trajectory(potential)


def test_a_state_that_is_not_finite_is_named_as_the_cause():
    regularizer = LyapunovRegularizer(random_model("mlp").node, square, 1.0)
    sol = torch.full((6, 3, 2), math.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="the state itself is not finite"):
        regularizer.penalty(T_SPAN, sol)


def test_shapes_and_points_that_do_not_fit():
    regularizer = LyapunovRegularizer(random_model("mlp").node, SquaredDistance(), 1.0)
    sol = torch.randn(6, 3, 2, dtype=torch.float64)
    good = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="a target has 5 rows for a batch of 3 states"):
        regularizer.penalty(T_SPAN, sol, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="the trajectory has 2 points, and 5 at least"):
        regularizer.penalty(T_SPAN[:2], sol[:2], good)
    with pytest.raises(ValueError, match=r"got the shapes \(6,\) and \(5, 3, 2\)"):
        regularizer.penalty(T_SPAN, sol[:5], good)
    with pytest.raises(ValueError, match="t_eval must ascend.* from 1 to 0"):
        regularizer.penalty(T_SPAN.flip(0), sol, good)
    with pytest.raises(ValueError, match="reduction must be one of .* got 'sum'"):
        regularizer.penalty(T_SPAN, sol, good, reduction="sum")
    with pytest.raises(TypeError, match="must be tensors; got list"):
        regularizer.penalty([0.0, 1.0], sol, good)
    with pytest.raises(ValueError, match=r"target has the shape \(3, 1\), the state's output \(3, 2\)"):
        regularizer.penalty(T_SPAN, sol, torch.zeros(3, 1))


def test_other_bad_arguments():
    node = random_model("mlp").node
    with pytest.raises(TypeError, match="takes a NeuralODE or a LearnableSpan; got Sequential"):
        LyapunovRegularizer(nn.Sequential(node), square, 1.0)
    with pytest.raises(TypeError, match="potential must be callable.* got 3"):
        LyapunovRegularizer(node, 3, 1.0)
    with pytest.raises(TypeError, match="rate must be a number; got '2'"):
        LyapunovRegularizer(node, square, "2")
    with pytest.raises(ValueError, match="order must be 1 or 2; got 3"):
        LyapunovRegularizer(node, square, 1.0, order=3)
    with pytest.raises(ValueError, match="points must be .* got 3"):
        LyapunovRegularizer(node, square, 1.0).certificate(torch.ones(3, 2).double(), points=3, t_span=T_SPAN)
    with pytest.raises(ValueError, match="pass t_span="):
        LyapunovRegularizer(node, square, 1.0).certificate(torch.ones(3, 2).double())
    with pytest.raises(ValueError, match="samples must be .* got 0"):
        LyapunovRegularizer(node, square, 1.0).sampled_penalty(torch.ones(3, 2), sampler=ball(1.0), samples=0)
    with pytest.raises(ValueError, match=r"the sampler returned the shape \(2, 7\); asked were \(2, 2\)"):
        LyapunovRegularizer(node, square, 1.0).sampled_penalty(
            torch.ones(3, 2), sampler=lambda n, like: torch.zeros(n, 7), samples=2, t_span=T_SPAN
        )


def test_a_descending_trajectory_is_refused_with_both_its_ends():
    node, _, x = closed_form("decay", solver="rk4")
    t = T_SPAN.flip(0)
    with pytest.raises(ValueError, match="t_eval must ascend: .* it runs from 1 to 0$"):
        LyapunovRegularizer(node, square, 1.0).penalty(t, x.expand(len(t), *x.shape))


def test_in_inference_mode_the_figures_are_those_of_no_grad():
    net = nn.Sequential(DataControl(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 11, dtype=torch.float64))
    regularizer, found = LyapunovRegularizer(span, square, 2.0), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.ones(4, 2, dtype=torch.float64) * torch.arange(1, 5)[:, None]
            values = [regularizer.penalty(*regularizer(x)).item(), regularizer.certificate(x).rates.min().item()]
            torch.manual_seed(0)
            found.append([*values, regularizer.sampled_penalty(x, sampler=ball(1.0), samples=4).item()])
    assert found[0] == found[1]


def test_without_the_start_the_control_is_that_of_the_solve():
    net = nn.Sequential(DataControl(), nn.Linear(4, 2)).double()
    span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 11, dtype=torch.float64))
    regularizer, x = LyapunovRegularizer(span, square, 2.0), torch.randn(4, 2, dtype=torch.float64)
    whole = regularizer.derivatives(*regularizer(x))
    t_eval = span.grid()[5:].tolist()
    for one, other in zip(whole, regularizer.derivatives(*regularizer(x, None, t_eval)), strict=True):
        assert torch.allclose(one[5:], other, rtol=1e-12)


def test_times_of_half_precision_that_are_equal_leave_a_mean():
    span = LearnableSpan(NeuralODE(nn.Linear(2, 2).bfloat16(), solver="rk4"), torch.linspace(300, 301, 11))
    regularizer = LyapunovRegularizer(span, square, 2.0)
    t_eval, sol = regularizer(torch.randn(4, 2).bfloat16())
    points = regularizer.violation(t_eval, sol).float().mean(1)
    expected = torch.trapezoid(points, t_eval)  # over an interval of length 1
    assert regularizer.penalty(t_eval, sol).item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_certificate_of_a_descending_span_is_refused():
    regularizer = LyapunovRegularizer(NeuralODE(nn.Linear(2, 2), solver="rk4"), square, 2.0)
    with pytest.raises(ValueError, match="must ascend"):
        regularizer.certificate(torch.randn(4, 2), t_span=torch.linspace(1, 0, 11))


def test_sampled_states_have_the_args_of_their_samples():
    span = LearnableSpan(NeuralODE(ByArgs(), solver="rk4").double(), torch.linspace(0, 1, 11))
    regularizer, x = LyapunovRegularizer(span, square, 2.0), torch.randn(3, 2).double()
    scales, shift = torch.rand(3, 1).double(), torch.ones(2).double()

    def penalty(x, scale):
        regularizer(x, args={"scale": scale, "shift": shift})
        return regularizer.sampled_penalty(x, sampler=lambda n, like: torch.ones(n, *like.shape).double(), samples=4)

    apart = [penalty(x[i : i + 1], scales[i : i + 1]) for i in range(3)]
    assert penalty(x, scales).item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-12)


def test_of_alf_the_state_without_its_velocity_is_looked_at():
    net, x = nn.Linear(2, 2).double(), torch.randn(4, 2).double()
    span = LearnableSpan(NeuralODE(net, solver="alf"), torch.linspace(0, 1, 11, dtype=torch.float64))
    regularizer = LyapunovRegularizer(span, square, 2.0)
    t_eval, sol = regularizer(torch.cat([x, net(x)], 1))
    v, slope = regularizer.derivatives(t_eval, sol)
    z = sol[..., :2]
    assert torch.allclose(v, z.square().sum(2)) and torch.allclose(slope, 2 * (z * net(z)).sum(2))
