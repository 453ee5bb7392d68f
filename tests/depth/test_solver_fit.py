"""fit_solver: a field held, and a solver fitted to it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import random_model
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, autograd_trace, hutch_trace
from torchdyn.nn import DataControl, DepthCat

import torchdyn_mintime as tm
from torchdyn_mintime.depth import solver_fit
from torchdyn_mintime.diagnostics import solver_error

STATES = 96


def field(seed=0, timed=False, scale=1.0):
    """A network of the plane, in float64 with lively weights."""
    torch.manual_seed(seed)
    layers = [DepthCat(1), nn.Linear(3, 16)] if timed else [nn.Linear(2, 16)]
    net = nn.Sequential(*layers, nn.Tanh(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2 * scale)
    return net


def states(n=STATES, seed=1, dtype=torch.float64):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fit(model, x=None, **options):
    return tm.fit_solver(model, states() if x is None else x, progress=False, **options)


def everything(module):
    """All that a fit must leave alone."""
    return {
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "frozen": [p.requires_grad for p in module.parameters()],
        "types": [(p.dtype, id(p)) for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "nfe": getattr(getattr(module, "vf", None), "nfe", None),
        "random": torch.get_rng_state(),
    }


def assert_untouched(module, before):
    after = everything(module)
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())
    assert torch.equal(before["random"], after["random"])
    assert all(before[k] == after[k] for k in ("frozen", "types", "modes", "nfe"))


# ---------------------------------------------------------------------------------------------------------------------
# What it finds


@settings(max_examples=6)
@given(seed=st.integers(0, 99), timed=st.booleans(), evaluations=st.sampled_from([3, 4, 6]))
def test_it_errs_less_than_every_stock_solver_with_as_many_evaluations(seed, timed, evaluations):
    node = NeuralODE(field(seed, timed))
    found = fit(node, evaluations=evaluations)
    assert found.evaluations == found.node.solver.stages == evaluations
    assert found.error.rms < min(other.rms for other in found.others.values())
    assert found.error.rms <= found.error.worst and found.error.most <= found.error.worst
    assert found.node.solver.first_node == timed


def test_the_errors_are_those_of_fresh_states():
    net = field(3, timed=True)
    found = fit(NeuralODE(net), states(400), evaluations=4)
    fresh = states(400, seed=7)
    exact = tm.LearnableSpan(NeuralODE(net, solver="dopri5", atol=1e-9, rtol=1e-9), torch.tensor([0.0, 1.0]).double())
    with torch.no_grad():
        end, own = exact(fresh)[1][-1], found.node(fresh)[1][-1]
    error = ((own - end).square().mean() / (end - fresh).square().mean()).sqrt().item()
    # Two samples of 100 and 400 states: their root mean squares differ by some 10 %, more where few states err most.
    assert error == pytest.approx(found.error.rms, rel=0.5)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_linear_field_is_fitted_as_in_closed_form(stages):
    """z' = -z: the end is w z with w free from two evaluations on, and 0 by one step of Euler."""
    node = NeuralODE(lambda t, x, args=None: -x)
    found = fit(node, evaluations=stages)
    if stages == 1:
        assert found.error.rms == pytest.approx(math.exp(-1) / (1 - math.exp(-1)), rel=1e-5)
        assert found.error.rms == pytest.approx(found.others["euler"].rms, rel=1e-12)
    else:
        assert found.error.rms < 1e-6


def test_the_node_runs_in_plain_torchdyn_and_in_a_span():
    net = field(4, timed=True)
    node = NeuralODE(net)
    found = fit(node, evaluations=3)
    assert type(found.node) is NeuralODE and found.node.vf is node.vf
    x = states(8, seed=9)
    expected = found.node(x)[1][-1]
    span = tm.LearnableSpan(found.node)
    assert torch.allclose(span(x)[1][-1], expected, rtol=0, atol=1e-13)
    assert span.nfe == 3
    assert not found.node.solver.free.requires_grad
    assert node.solver is not found.node.solver and node.t_span is None


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_a_node_under_an_adjoint_is_fitted_and_keeps_its_setting(sensitivity):
    node = NeuralODE(field(5), solver="dopri5", sensitivity=sensitivity, atol=1e-4, rtol=1e-4)
    found = fit(node, evaluations=2)
    assert node.sensitivity == node.sensalg == sensitivity
    assert found.node(states(4))[1].shape == (2, 4, 2)
    assert tm.LearnableSpan(found.node).sensitivity == "autograd"


def test_the_interval_is_that_of_the_span_or_of_the_node():
    net = field(6, timed=True)
    span = tm.LearnableSpan(NeuralODE(net), torch.tensor([0.2, 1.0]).double(), t_f=0.7)
    node = NeuralODE(net)
    node.t_span = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    one, other = fit(span, evaluations=3), fit(node, evaluations=3)
    assert one.node.t_span.tolist() == pytest.approx([0.2, 0.7])
    assert one.error.rms == pytest.approx(other.error.rms, rel=1e-3)  # 0.7 is not the same in float32
    assert len(node.t_span) == 3


def test_a_t_f_outside_its_bounds_is_taken_as_a_solve_takes_it():
    span = tm.LearnableSpan(NeuralODE(field()), torch.tensor([0.0, 1.0]).double(), t_f=0.7, bounds=(0.5, 0.8))
    with torch.no_grad():
        span.t_f.fill_(0.9)
    found = fit(span, evaluations=2)
    assert found.node.t_span.tolist() == pytest.approx([0.0, 0.8]) and span.t_f == 0.9 and span.training


@pytest.mark.parametrize("times", [[1.0], [1.0, 1.0], [0.0, math.nan], [0.0, math.inf]])
def test_an_interval_without_a_length_is_refused(times):
    node = NeuralODE(field())
    node.t_span = torch.tensor(times)
    with pytest.raises(ValueError, match="from one finite time to another"):
        fit(node)


def test_the_inverse_has_a_solver_of_its_own():
    net = field(7, timed=True, scale=1.2)
    node = NeuralODE(net)
    forward = fit(node, states(200), evaluations=4)
    ends = forward.node(states(200, seed=3))[1][-1].detach()
    backward = fit(node, ends, evaluations=4, inverse=True)
    assert backward.node.t_span.tolist() == [1.0, 0.0]
    # There and back: each error is small by itself.
    back = backward.node(ends)[1][-1]
    span, down = tm.LearnableSpan(forward.node), torch.tensor([1.0, 0.0]).double()
    with pytest.warns(UserWarning, match="4 stages was fitted to solves forward in time and is run backward"):
        tableau_run_backward = span(ends, down)[1][-1]
    exact = tm.LearnableSpan(NeuralODE(net, solver="dopri5", atol=1e-9, rtol=1e-9), torch.tensor([0.0, 1.0]).double())
    with torch.no_grad():
        end = exact(ends, torch.tensor([1.0, 0.0]).double())[1][-1]
    assert (back - end).square().mean() < 0.3 * (tableau_run_backward - end).square().mean()
    # Both in one span, each in its own direction.
    span.solver.other = backward.node.solver
    assert torch.allclose(span(ends, down)[1][-1], back, rtol=0, atol=1e-13)
    assert torch.equal(span(ends)[1][-1], tm.LearnableSpan(forward.node)(ends)[1][-1])


def test_a_tolerance_takes_the_fewest_evaluations_that_meet_it():
    node = NeuralODE(field(8))
    errors = [fit(node, evaluations=n).error.rms for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert fit(node, tol=errors[1] * 1.01).evaluations == 2
    assert fit(node, tol=2 * errors[0], evaluations=3).evaluations == 1
    before = everything(node)
    with pytest.raises(
        ValueError, match=r"no solver of up to 2 evaluations meets tol=.*is \d.*, with 2\. Give a larger"
    ):
        fit(node, tol=errors[2], evaluations=2)
    assert_untouched(node, before)


def test_known_ends_are_taken_as_they_are():
    node = NeuralODE(field(9))
    with torch.no_grad():
        ends = tm.LearnableSpan(NeuralODE(node.vf.vf.vf, solver="dopri5", atol=1e-9, rtol=1e-9))(states())[1][-1]
    one, other = fit(node, evaluations=3), fit(node, evaluations=3, reference=ends)
    assert torch.allclose(one.node.solver.b, other.node.solver.b, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of fields


def test_images():
    model = random_model("conv", batch=40)
    x = torch.randn(40, 2, 4, 4, dtype=torch.float64)
    found = fit(model.node, x, evaluations=3)
    assert found.error.rms < found.others["euler"].rms
    assert found.node(x)[1].shape == (2, 40, 2, 4, 4)


def test_states_that_are_numbers():
    """States [n]; z' = -z, of which a solver of two stages may give the exact end."""
    x = states()[:, 0]
    found = fit(NeuralODE(lambda t, z, args=None: -z), x, evaluations=2)
    # To the 1e-7 of the reference solve.
    assert found.node(x)[1][-1].allclose(x * math.exp(-1), atol=1e-6)


@pytest.mark.parametrize("trace", [autograd_trace, hutch_trace])
def test_a_flow_is_fitted_with_its_log_density(trace):
    noise = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    node = NeuralODE(CNF(field(10), trace_estimator=trace, noise_dist=noise if trace is hutch_trace else None))
    x = torch.cat([torch.zeros(STATES, 1).double(), states()], 1)
    before = everything(node)
    found = fit(node, x, evaluations=4)
    assert_untouched(node, before)  # the random numbers that the noise was drawn with too
    assert torch.equal(fit(node, x, evaluations=4).node.solver.free, found.node.solver.free)
    assert found.error.log_density < 0.3 * found.others["midpoint"].log_density
    assert found.error.rms < 0.5 * found.others["midpoint"].rms
    assert "nats" in str(found)


def test_a_log_density_in_another_column_has_a_size_of_its_own():
    net = field(10)
    first = NeuralODE(CNF(net))

    def last(t, x, args=None):  # [z, l], as the wrapper in torchcfm's examples
        rates = first.vf.vf.vf(torch.nn.functional.pad(x[:, :2], (1, 0)))
        return torch.cat([rates[:, 1:], -rates[:, :1]], 1)

    node = NeuralODE(last, optimizable_params=list(net.parameters()))
    column = torch.zeros(STATES, 1).double()
    one = fit(node, torch.cat([states(), column], 1), evaluations=2, log_density=-1)
    other = fit(first, torch.cat([column, states()], 1), evaluations=2)
    # The same sums in another order.
    assert one.error.log_density == pytest.approx(other.error.log_density, rel=1e-3)
    assert one.error.rms == pytest.approx(other.error.rms, rel=1e-3)


def both_ways(make, x, evaluations, iterations=solver_fit.ITERATIONS):
    """Fits with the chain rule where it holds, and by differences of the solve alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_fit, "ITERATIONS", iterations)
        one = fit(NeuralODE(make()), x, evaluations=evaluations)
        patch.setattr(solver_fit, "MOST_SLOPES", 0)
        return one, fit(NeuralODE(make()), x, evaluations=evaluations)


class Number(nn.Module):
    """A field of states [n]."""

    def __init__(self, seed):
        super().__init__()
        self.net = field(seed)

    def forward(self, x):
        return self.net(torch.stack([x, -x], 1))[:, 0]


@settings(max_examples=6)
@given(seed=st.integers(0, 99), kind=st.sampled_from(["with time", "without", "of numbers"]))
def test_derivatives_of_the_field_lead_where_differences_of_the_solve_do(seed, kind):
    x = states()[:, 0] if kind == "of numbers" else states()
    make = (lambda: Number(seed)) if kind == "of numbers" else (lambda: field(seed, kind == "with time"))
    one, other = (found.node.solver.free for found in both_ways(make, x, 6, iterations=3))
    assert not torch.equal(one, other)
    # The two derivatives differ by about 1e-4 of their size, and over seeds 0 to 99 three iterations by at most 4e-3 of what
    # they move. Later the ways may part: a step that one fit just takes, the other just refuses.
    start = tm.LearnableSolver(6, order=1, first_node=kind == "with time").free
    assert (one - other).norm() < 0.01 * (one - start).norm()


class Together(nn.Module):
    """A field whose rows act on each other."""

    def __init__(self):
        super().__init__()
        self.net = field(3)

    def forward(self, x):
        return self.net(x) - 3 * x.mean(0)


def test_a_field_whose_rows_act_on_each_other_is_fitted_by_differences_of_the_solve():
    one, other = both_ways(Together, states(), 6)
    assert torch.equal(one.node.solver.free, other.node.solver.free)


class NearTheEnd(nn.Module):
    """A field that is not defined from x_1 = 1 on, which no path reaches."""

    def forward(self, x):
        first, second = x.unbind(1)
        return torch.stack([3 * (1 - first), torch.sin(second) * (2 + 0.1 * torch.log(1 - first))], 1)


class WithLabel(nn.Module):
    """A field of large states, whose last entry is a label and stands still."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.angles = nn.Embedding(3, 2).double()

    def forward(self, x):
        moved = 1e5 * torch.sin(2 * x[:, :2].flip(1) / 1e5 + self.angles(x[:, 2].long()))
        return torch.cat([moved, torch.zeros_like(x[:, :1])], 1)


class MixedUnits(nn.Module):
    """A field whose first entry is 1e6 times as large as the others."""

    def forward(self, x):
        return torch.stack([1e6 * torch.cos(x[:, 1]), 2 * torch.sin(3 * x[:, 2]), -2 * torch.sin(2 * x[:, 1])], 1)


@pytest.mark.parametrize("kind", [NearTheEnd, WithLabel, MixedUnits])
def test_the_derivatives_of_a_field_are_taken_where_its_paths_go(kind):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 3, generator=generator).double()
    if kind is NearTheEnd:
        x = torch.cat([1 - 10 ** (3 * torch.rand(300, 1, generator=generator).double() - 3), x[:, :1]], 1)
    elif kind is WithLabel:
        x = torch.cat([1e5 * x[:, :2], torch.randint(0, 3, (300, 1), generator=generator).double()], 1)
    one, other = both_ways(kind, x, 7)
    assert not torch.equal(one.node.solver.free, other.node.solver.free)
    # Two ways down to the same errors; a fit that ends early is 8 to 30 times worse.
    assert one.error.rms < 2 * other.error.rms


class Labelled(nn.Module):
    """A field with a label for each row, passed or set."""

    def __init__(self):
        super().__init__()
        self.net, self.labels = field(11), None

    def forward(self, t, x, args=None):
        labels = self.labels if args is None or "labels" not in args else args["labels"]
        return self.net(x) + torch.sin(3 * t + labels)[:, None]


@pytest.mark.parametrize("how", ["args", "attribute"])
def test_conditions_belong_to_their_rows(how):
    net, labels = Labelled(), torch.linspace(0, 2, STATES).double()
    net.labels = labels if how == "attribute" else None
    found = fit(NeuralODE(net), evaluations=4, args={"labels": labels} if how == "args" else None)
    assert found.error.rms < 0.5 * found.others["midpoint"].rms


@pytest.mark.parametrize("inverse", [False, True])
def test_a_field_with_args_is_solved_in_a_span_both_ways(inverse):
    labels, x = torch.linspace(0, 2, STATES).double(), states()
    args = {"labels": labels}
    found = fit(NeuralODE(Labelled()), x, evaluations=4, inverse=inverse, args=args)
    times = found.node.t_span
    span = tm.LearnableSpan(found.node, times.flip(0) if inverse else None)
    exact = tm.LearnableSpan(NeuralODE(found.node.vf.vf, solver="dopri5", atol=1e-9, rtol=1e-9), times.sort().values)
    with torch.no_grad():
        end = (span(x, times, args=args) if inverse else span(x, args=args))[1][-1]
        wanted = exact(x, times, args=args)[1][-1]
    error = (end - wanted).square().mean().sqrt() / (wanted - x).square().mean().sqrt()
    assert span.nfe == 4 and error < 2 * found.error.rms


def test_a_field_without_args_runs_in_a_span_where_torchdyn_refuses_it():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = field(12)

        def forward(self, t, x):
            return self.net(x) * (1 + t)

    found, x = fit(NeuralODE(Timed()), evaluations=3), states(8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'args'"):
        found.node(x)
    assert tm.LearnableSpan(found.node)(x)[1].shape == (2, 8, 2)
    assert "(t, x, args=None)" in tm.depth.solver_fit.SolverFit.__doc__


def test_data_control():
    torch.manual_seed(0)
    net = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    found = fit(NeuralODE(net), evaluations=4)
    assert found.error.rms < found.others["midpoint"].rms


def test_fields_in_single_precision():
    """Evaluated in double where they can be, and else in their own type: then the fit sees rounding, and stops there."""
    net = field(12).float()
    easy = fit(NeuralODE(net), states(dtype=torch.float32), evaluations=3)
    constant = torch.ones(2)  # no module holds it

    def stubborn(t, x, args=None):
        return net(x.float() * constant)

    hard = fit(NeuralODE(stubborn, optimizable_params=list(net.parameters())), states().float(), evaluations=3)
    assert easy.node.solver.free.dtype == hard.node.solver.free.dtype == torch.float64
    assert hard.error.rms < hard.others["euler"].rms
    assert hard.error.rms == pytest.approx(easy.error.rms, rel=0.5)


class Rounded(nn.Module):
    """A part of a field that is in single precision whatever it is given, as the softmax of attention often is."""

    def forward(self, x):
        return torch.tanh(x.float()).to(x)


@given(seed=st.integers(0, 99))
@settings(max_examples=4)
def test_single_precision_inside_a_field_costs_no_accuracy(seed):
    net = field(seed, timed=True)
    rounded = nn.Sequential(*net[:2], Rounded(), net[3])
    smooth, rough = (fit(NeuralODE(vf), evaluations=4).error.rms for vf in (net, rounded))
    # Errors of about 1e-3 against a rounding of 1e-7; the two fits may end an iteration apart.
    assert rough == pytest.approx(smooth, rel=0.1)


def test_a_layer_that_stands_twice_in_a_field_keeps_its_type():
    """torch's functional_call leaves such a layer with the tensors that it was given."""
    shared = nn.Linear(2, 2)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), shared, nn.Tanh(), shared)
    node = NeuralODE(net)
    before = everything(node)
    fit(node, states(dtype=torch.float32), evaluations=2)
    solver_error(tm.LearnableSpan(node), states(dtype=torch.float32))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert_untouched(net, everything(net))
    assert all(torch.equal(v, before["state"][k]) for k, v in node.state_dict().items())


def test_a_field_of_zeros_has_no_error():
    found = fit(NeuralODE(lambda t, x, args=None: 0 * x), evaluations=2)
    assert found.error.rms == 0


def test_steps_that_are_too_large_count_as_an_infinite_error():
    """z' = -z^7 from about 3: each stage raises what is too large to its seventh power."""
    node = NeuralODE(lambda t, x, args=None: -x.pow(7))
    x = 3 + 0.1 * states()
    assert fit(node, x, evaluations=8).error.rms == math.inf
    with pytest.raises(ValueError, match="no solver of up to 3 evaluations meets"):
        fit(node, x, tol=1e-9, evaluations=3)


def test_a_fit_in_inference_mode_is_as_elsewhere():
    """Of a field that differentiates inside, which inference mode forbids, too."""
    node, x = NeuralODE(CNF(field(timed=True))), torch.cat([torch.zeros(STATES, 1).double(), states()], 1)
    with torch.inference_mode():
        found = fit(node, x.clone(), evaluations=2)
    assert torch.equal(found.node.solver.free, fit(node, x, evaluations=2).node.solver.free)
    found.node(x)[1][-1].sum().backward()  # a tensor of inference mode would take no gradient


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_changed(wrapped):
    net = nn.Sequential(DepthCat(1), nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double().eval()
    net[1].weight.requires_grad_(False)
    node = NeuralODE(net, solver="dopri5", sensitivity="adjoint")
    model = tm.LearnableSpan(node) if wrapped else node
    before, last = everything(model), copy.copy(getattr(model, "last", None))
    fit(model, evaluations=2)
    assert_untouched(model, before)
    assert getattr(model, "last", None) is last
    assert not hasattr(net[0], "noise")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"evaluations": 0}, ValueError, "evaluations must be 1 or more; got 0"),
        ({"evaluations": 2.5}, ValueError, "evaluations must be a whole number"),
        ({"tol": 0}, ValueError, "tol must be positive"),
        ({"tol": "low"}, TypeError, "tol must be a number"),
        ({"x": torch.ones(STATES, 3).double()}, ValueError, "does not accept a state of shape"),
        ({"x": torch.ones(STATES, 2, dtype=torch.long)}, TypeError, "x0 must be a tensor of floating-point numbers"),
        ({"x": [[1.0, 2.0]]}, TypeError, "x0 must be a tensor of floating-point numbers"),
        ({"x": states().log()}, ValueError, "x0 holds NaN"),
        ({"x": states(6)}, ValueError, "coefficients, too many for x0 of the shape"),
        ({"reference": states(5)}, ValueError, "reference must hold the exact end of each row"),
        ({"reference": "exact"}, ValueError, "reference must hold the exact end of each row"),
        ({"reference": states().log()}, ValueError, "reference holds NaN"),
        ({"args": {"y": 1}}, ValueError, "takes no `args`"),
        ({"log_density": 2}, ValueError, "log_density=2 must be a column of the states"),
    ],
)
def test_bad_input(options, error, match):
    node = NeuralODE(field())
    before = everything(node)
    with pytest.raises(error, match=match):
        fit(node, **options)
    assert_untouched(node, before)


def test_another_kind_of_model_is_refused():
    with pytest.raises(TypeError, match="takes a NeuralODE or a LearnableSpan; got Sequential"):
        fit(nn.Sequential(NeuralODE(field())))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(16).double()])
def test_a_field_that_does_not_repeat_is_refused(layer):
    net = field()
    net.insert(1, layer)
    with pytest.raises(ValueError, match="in training mode within the field.*eval"):
        fit(NeuralODE(net))
    assert fit(NeuralODE(net.eval()), evaluations=1).evaluations == 1


def test_a_field_that_draws_is_refused():
    with pytest.raises(ValueError, match="a field that draws at random"):
        fit(NeuralODE(lambda t, x, args=None: x + torch.randn_like(x)))


def test_a_reference_that_fails_says_where():
    node = NeuralODE(lambda t, x, args=None: x.square() * 100)
    before = everything(node)
    with pytest.raises(tm.IntegrationError, match="at t ="):
        fit(node)
    assert_untouched(node, before)
