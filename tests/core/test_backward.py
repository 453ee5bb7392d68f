"""What a backward solve sees: the field of its own forward, and every tensor that reaches the field from outside.

The right gradient is that of autograd, which keeps the graph of the forward itself. Solves are in float64; an adjoint at a
tolerance of 1e-9 agrees with autograd to about 1e-6, and a replayed step to rounding.
"""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchdyn.core import NeuralODE
from torchdyn.nn import DepthCat
from torchdyn.numerics.solvers.ode import RungeKutta4

import torchdyn_mintime as tm

D = torch.float64
TIGHT = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}
BACKWARDS = ("checkpoint", "adjoint", "interpolated_adjoint")  # those that evaluate the field again
WAYS = ("autograd", *BACKWARDS)
SOLVERS = ("rk4", "dopri5", "tsit5")

backwards = pytest.mark.parametrize("way", BACKWARDS)
solvers = pytest.mark.parametrize("solver", SOLVERS)


def span_of(field, way="autograd", solver="dopri5", points=21, **options):
    sensitivity = "autograd" if way == "checkpoint" else way
    node = NeuralODE(field, solver=solver, sensitivity=sensitivity, **TIGHT, **options)
    return tm.LearnableSpan(node, torch.linspace(0, 1, points, dtype=D), t_f=0.83, checkpoint=way == "checkpoint")


def gradients(loss, *tensors):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])


def assert_equal(got, expected, rtol=1e-5):
    assert float((got - expected).norm() / expected.norm()) <= rtol


def state(batch=5, seed=0):
    return torch.randn(batch, 2, dtype=D, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Tensors from outside the field


class Conditioned(nn.Module):
    """A field that reads a condition from its arguments, from itself and from a function around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(2, 2).double()
        self.held = 0.0
        self.table = {"scale": [1.0]}
        self.around = None

    def forward(self, t, x, args=None):
        outside = (args or {}).get("c", 0.0) + self.held
        outside = outside if self.around is None else outside + self.around()
        return torch.tanh(self.net(x)) * self.table["scale"][0] + outside


def conditioned_loss(way, solver, places):
    """Returns the loss, and the tensors outside the field that it depends on."""
    field = Conditioned()
    torch.manual_seed(4)
    encoder, other, x = nn.Linear(2, 2).double(), nn.Linear(2, 2).double(), state()
    condition, args = encoder(x), {}
    if "args" in places:
        args = {"c": condition}
    if "attribute" in places:
        field.held = condition * 0.5
    if "container" in places:
        field.table["scale"][0] = 1 + torch.tanh(condition)
    if "closure" in places:
        field.around = lambda: 0.3 * condition
    if "parameters" in places:
        field.around = lambda: other(x)
    outside = [*encoder.parameters()] if set(places) - {"parameters"} else []
    outside += [*other.parameters()] if "parameters" in places else []
    span = span_of(field, way, solver)
    sol = span(x, args=args)[1]
    # The whole trajectory, and the condition once more on the loss: its own graph must still be there.
    loss = sol.square().sum() + sol[-1].sum()
    if places == ("parameters",):
        return loss, [*outside, field.net.weight]
    return loss + 0.1 * condition.sum(), [*outside, field.net.weight]


@backwards
@solvers
@pytest.mark.parametrize("places", [("args",), ("attribute",), ("container",), ("closure",), ("parameters",)], ids=str)
def test_a_tensor_from_outside_the_field_gets_its_gradient(way, solver, places):
    loss, tensors = conditioned_loss("autograd", solver, places)
    expected = gradients(loss, *tensors)
    loss, tensors = conditioned_loss(way, solver, places)
    # A fixed-step adjoint has the solver's own error: order 4 at 20 steps.
    assert_equal(gradients(loss, *tensors), expected)


@backwards
@given(places=st.sets(st.sampled_from(["args", "attribute", "container", "closure"]), min_size=1))
def test_so_do_several_at_once(way, places):
    loss, tensors = conditioned_loss("autograd", "dopri5", places)
    expected = gradients(loss, *tensors)
    loss, tensors = conditioned_loss(way, "dopri5", places)
    assert_equal(gradients(loss, *tensors), expected)


class Switched(nn.Module):
    """A field that uses a condition from the middle of the interval on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net, self.held, self.around = nn.Linear(2, 2).double(), None, None

    def forward(self, t, x, args=None):
        dx = torch.tanh(self.net(x))
        if t > 0.5:
            given = ((args or {}).get("c"), self.held, self.around and self.around())
            dx = dx + sum(c for c in given if c is not None)
        return dx


@backwards
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("place", ["args", "attribute", "attribute with a graph", "closure"])
def test_a_condition_that_is_used_late_gets_its_gradient_or_is_refused(way, solver, place):
    found = []
    for chosen in ("autograd", way):
        field, leaf = Switched(), torch.linspace(1, 2, 2, dtype=D).requires_grad_()
        condition = torch.sin(leaf)
        args = {"c": condition} if place == "args" else {}
        field.held = {"attribute": leaf, "attribute with a graph": condition}.get(place)
        field.around = (lambda c: lambda: c)(condition) if place == "closure" else None
        loss = span_of(field, chosen, solver)(state(), args=args)[1].square().sum()
        if chosen != "autograd" and place in ("closure", "attribute with a graph"):
            with pytest.raises(ValueError, match="not yet in its first evaluation"):
                loss.backward()
            return
        found.append(gradients(loss, leaf, field.net.weight))
    # The field jumps: where a fixed step of an adjoint meets the jump, it is of first order.
    assert_equal(found[1], found[0], 1e-12 if way == "checkpoint" else 2e-2)


@pytest.mark.parametrize("kind", [nn.ParameterDict, dict, types.MappingProxyType])
def test_args_may_be_any_mapping(kind):
    span = span_of(Conditioned())
    args = kind({"c": nn.Parameter(torch.ones(2, dtype=D))})
    span(state(), args=args)[1][-1].sum().backward()
    assert args["c"].grad is not None


@backwards
@pytest.mark.parametrize("kind", [nn.ParameterDict, dict])
def test_what_is_put_into_a_mapping_later_does_not_reach_the_backward(way, kind):
    field, kept = Conditioned(), nn.Parameter(torch.ones(2, dtype=D))
    found = []
    for later in (1.0, 9.0):
        args = kind({"c": kept})
        loss = span_of(field, way)(state(), args=args)[1][-1].square().sum()
        args["c"] = nn.Parameter(torch.full((2,), later, dtype=D))
        found.append(gradients(loss, kept, field.net.weight))
    assert torch.equal(*found)


@backwards
def test_what_lies_behind_a_condition_is_passed_once(way):
    field, x, passes = Conditioned(), state(), []
    encoder = nn.Linear(2, 2).double()
    encoder.register_full_backward_hook(lambda *_: passes.append(1))
    field.held = encoder(x.requires_grad_())
    span_of(field, way)(x)[1][-1].sum().backward()
    assert len(passes) == 1


@pytest.mark.parametrize("way", WAYS)
def test_wrapping_and_copying_leave_a_condition_its_graph(way):
    field, x = Conditioned(), state()
    encoder = nn.Linear(2, 2).double()
    field.held = encoder(x)
    span = span_of(field, way)
    copied = copy.deepcopy(span)
    span(x)[1][-1].sum().backward()
    assert encoder.weight.grad is not None
    assert all(not m.held.requires_grad for m in copied.modules() if isinstance(m, Conditioned))


@backwards
def test_finding_such_tensors_costs_no_evaluation_in_the_count(way):
    counts = []
    for held in (torch.ones(2, dtype=D), torch.ones(2, dtype=D, requires_grad=True)):
        field = Conditioned()
        field.held = held
        span = span_of(field, way, "rk4")
        span(state())
        counts.append(span.nfe)
    assert counts[0] == counts[1]


class Remembering(nn.Module):
    """A field that keeps an activation of its last evaluation, with its graph, and is scaled by a tensor around it."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(5)
        self.inner, self.outer = nn.Linear(2, 8).double(), nn.Linear(8, 2).double()
        self.scale = lambda: scale  # a closure, which no attribute shows

    def forward(self, x):
        self.hidden = torch.tanh(self.inner(x))
        return self.scale() * self.outer(self.hidden)


@backwards
def test_an_activation_that_a_field_keeps_hides_no_tensor_from_outside(way):
    found = []
    for chosen in ("autograd", way):
        scale = torch.tensor(1.5, dtype=D, requires_grad=True)
        field = Remembering(scale)
        span = span_of(field, chosen, "rk4")
        for _ in range(3):  # from the second call on there is an activation of the call before
            gradient = gradients(span(state())[1][-1].square().sum(), scale, *field.outer.parameters())
        found.append(gradient)
    assert_equal(found[1], found[0])


@backwards
@pytest.mark.parametrize("make", [Conditioned, lambda: Remembering(1.0)], ids=["plain", "remembering"])
def test_a_running_cost_with_parameters_of_its_own_gives_them_a_gradient(way, make):
    if way == "checkpoint":
        pytest.skip("a running cost beside the state is the adjoints'")
    found = []
    for sensitivity in ("autograd", way):
        field, weight = make(), torch.tensor(0.7, dtype=D, requires_grad=True)
        span = span_of(field, sensitivity, integral_loss=lambda t, z, w=weight: w * z.square().sum(1))
        x = state() if sensitivity != "autograd" else torch.cat([torch.zeros(5, 1, dtype=D), state()], 1)
        sol = span(x)[1]
        loss = sol[-1, :, -2:].sum() + (sol[-1, :, 0].sum() if sensitivity == "autograd" else 0.0)
        loss.backward()
        found.append(torch.stack([weight.grad, *(p.grad.sum() for p in field.parameters())]))
    assert_equal(found[1], found[0])


def test_a_solver_with_parameters_is_differentiated_by_checkpoints_and_refused_by_adjoints():
    found = []
    for way in ("autograd", "checkpoint"):
        torch.manual_seed(0)
        solver, field = tm.LearnableSolver(3).double(), nn.Linear(2, 2).double()
        span = tm.LearnableSpan(NeuralODE(field, solver=solver), checkpoint=way == "checkpoint")
        span(state())[1][-1].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in solver.parameters()]))
    assert_equal(found[1], found[0], 1e-12)


def test_so_is_a_tableau_that_is_learned():
    found = {}
    for way in WAYS:
        torch.manual_seed(0)
        solver = RungeKutta4(D)
        c, a, b, error = solver.tableau
        solver.tableau = (c, a, b := b.clone().requires_grad_(), error)
        span = span_of(nn.Linear(2, 2).double(), way, solver, solver_adjoint="rk4")
        if way in ("autograd", "checkpoint"):
            found[way] = gradients(span(state())[1][-1].square().sum(), b)
            continue
        with pytest.raises(ValueError, match="gives what the solver learns"):
            span(state())
    assert_equal(found["checkpoint"], found["autograd"], 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The field of the forward


class Labelled(nn.Module):
    """A field with all that a user may change between a forward and its backward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Linear(4, 2).double()
        self.norm = nn.BatchNorm1d(2).double()
        self.drop = nn.Dropout(0.5)
        self.label = torch.zeros(2, dtype=D)
        self.register_buffer("scale", torch.ones((), dtype=D))
        self.eval()

    def forward(self, x):
        x = self.norm(self.drop(x)) + F.dropout(x, 0.5, self.training)
        return torch.tanh(self.net(torch.cat([x, self.label.expand(len(x), 2)], 1))) * self.scale


CHANGES = {
    "label": lambda field: setattr(field, "label", torch.ones(2, dtype=D)),
    "label removed": lambda field: delattr(field, "label"),
    "mode": lambda field: field.train(),
    "buffer replaced": lambda field: setattr(field, "scale", torch.full((), 3.0, dtype=D)),
    "buffer written": lambda field: field.scale.mul_(3.0),
    "statistics": lambda field: (field.train(), field.norm(state(8, 9)), field.eval()),
}


@backwards
@solvers
@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=4, unique=True))
def test_what_is_set_on_the_field_after_a_forward_is_put_back_for_its_backward(way, solver, changes):
    found = []
    for changed in (False, True):
        field, x = Labelled(), state()
        loss = span_of(field, way, solver)(x)[1][-1].square().sum()
        if changed:
            for name in changes:
                CHANGES[name](field)
        before = {k: v.clone() for k, v in field.state_dict().items()}
        modes, label = [m.training for m in field.modules()], getattr(field, "label", None)
        found.append(gradients(loss, *field.parameters()))
        # The backward leaves everything as the user has set it.
        assert all(torch.equal(v, before[k]) for k, v in field.state_dict().items())
        assert modes == [m.training for m in field.modules()] and label is getattr(field, "label", None)
    assert_equal(found[1], found[0], 1e-12)


@backwards
def test_what_is_frozen_after_the_forward_has_its_gradient_still(way):
    found = []
    for frozen in (False, True):
        field, x = Conditioned(), state()
        span = span_of(field, way, "rk4")
        loss = span(x)[1][-1].square().sum()
        field.net.weight.requires_grad_(not frozen)
        with torch.no_grad():
            span.t_f.mul_(0.9)  # as clip_ does; the solve has its own number
        loss.backward()
        assert field.net.weight.requires_grad is not frozen
        found.append(field.net.bias.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("way", WAYS)
def test_a_scripted_module_may_be_a_part_of_the_field(way):
    found = []
    for script in (lambda m: m, torch.jit.script):
        torch.manual_seed(0)
        field = nn.Sequential(script(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()))
        found.append(gradients(span_of(field, way, "rk4")(state())[1].square().sum(), *field.parameters()))
    assert_equal(found[1], found[0], 1e-10)


@backwards
def test_the_entries_of_args_are_those_of_the_forward(way):
    found = []
    for changed in (False, True):
        field, x, args = Conditioned(), state(), {"c": torch.ones(2, dtype=D)}
        span = span_of(field, way)
        loss = span(x, args=args)[1][-1].square().sum()
        if changed:
            args["c"] = torch.zeros(2, dtype=D)
        found.append(gradients(loss, field.net.weight))
    assert_equal(found[1], found[0], 1e-12)


class Restless(nn.Module):
    """A field that something else changes: what it reads is written in place, or is new at every evaluation."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(6)
        linear = nn.Linear(2, 2).double()
        self.net = linear
        if kind == "spectral norm":
            linear.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.95]], dtype=D)  # its iteration converges slowly
            self.net = nn.utils.parametrizations.spectral_norm(linear, n_power_iterations=1)
        self.kind, self.label, self.calls = kind, torch.ones(2, dtype=D), [0]
        self.late = {"gain": 1.0}

    def forward(self, t, x, args=None):
        self.calls[0] += 1
        x = self.net(x) + self.label
        if self.kind == "functional dropout":
            x = F.dropout(x, 0.3)
        if self.kind == "noise":
            x = x + 0.1 * torch.randn_like(x)
        if self.kind == "count in a list":
            x = x * self.calls[0]
        if self.kind == "noise late" and t > 0.5:
            x = x + torch.randn_like(x)
        return x * self.late["gain"] if t > 0.5 else x


@backwards
@solvers
@pytest.mark.parametrize(
    "kind",
    [
        "spectral norm",
        "functional dropout",
        "noise",
        "noise late",
        "count in a list",
        "label written in place",
        "late entry",
    ],
)
def test_a_field_that_does_not_repeat_is_refused(way, solver, kind):
    field = Restless(kind)
    span = tm.LearnableSpan(
        NeuralODE(field, solver=solver, sensitivity="autograd" if way == "checkpoint" else way),
        torch.linspace(0, 1, 5, dtype=D),
        checkpoint=way == "checkpoint",
    )
    loss = span(state())[1][-1].sum()
    if kind == "label written in place":
        field.label.zero_()
    if kind == "late entry":
        field.late["gain"] = 2.0
    with pytest.raises(ValueError, match="not the one of the forward solve"):
        loss.backward()


@backwards
def test_a_count_that_changes_nothing_is_no_reason_to_refuse_and_goes_on(way):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = nn.Linear(2, 2).double(), 0

        def forward(self, x):
            self.calls += 1
            return self.net(x)

    field = Counting()
    span = span_of(field, way, "rk4")
    loss = span(state())[1][-1].sum()
    assert field.calls == span.nfe
    loss.backward()
    assert field.calls == span.nfe > 0


@backwards
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_to_refuse(way, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)).to(dtype)
    sensitivity = "autograd" if way == "checkpoint" else way
    span = tm.LearnableSpan(
        NeuralODE(net, solver="rk4", sensitivity=sensitivity), torch.linspace(0, 1, 9), checkpoint=way == "checkpoint"
    )
    span(1e3 * state().to(dtype))[1][-1].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_a_penalty_sees_the_label_of_the_solve_that_it_belongs_to():
    found = []
    for changed in (False, True):
        field, x = Labelled(), state()
        span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 4, dtype=D))
        span(x)
        if changed:
            field.label = torch.ones(2, dtype=D)
        found.append(tm.StepDoubling(span).penalty().detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Fields that differentiate, or are evaluated again, inside


class Hamiltonian(nn.Module):
    """The field (dH/dp, -dH/dq), which needs autograd whatever happens around it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            slope = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
        return torch.cat([slope[:, 1:], -slope[:, :1]], 1)


@backwards
@solvers
@pytest.mark.parametrize("save_at", [(), (0.4, 0.83)], ids=["all points", "save_at"])
def test_a_hamiltonian_field_has_the_gradient_of_autograd(way, solver, save_at):
    found = []
    for chosen in ("autograd", way):
        span = span_of(Hamiltonian(), chosen, solver)
        x = state().requires_grad_()
        loss = span(x, save_at=save_at)[1].square().sum() + span.duration
        found.append(
            gradients(loss, x, span.t_f, *[p for n, p in span.node.vf.named_parameters() if "2.bias" not in n])
        )
    assert_equal(found[1], found[0])


@backwards
def test_a_field_may_keep_what_it_differentiates(way):
    class Keeping(Hamiltonian):
        def forward(self, x):
            with torch.enable_grad():
                self.inside = (x * 1.0).detach().requires_grad_()
                return torch.autograd.grad(self.energy(self.inside).sum(), self.inside, create_graph=True)[0]

    found = []
    for chosen in ("autograd", way):
        field = Keeping()
        loss = span_of(field, chosen, "rk4")(state())[1][-1].square().sum()
        found.append(gradients(loss, field.energy[0].weight))
    assert_equal(found[1], found[0])


class Recomputed(nn.Module):
    """A field that keeps nothing for backward: torch.utils.checkpoint evaluates it again, off the modules."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(8)
        self.net = nn.Sequential(DepthCat(1), nn.Linear(3, 8), nn.Tanh(), DepthCat(1), nn.Linear(9, 2)).double()
        self.reentrant = reentrant

    def forward(self, x):
        return self.net(x) if self.reentrant is None else checkpoint(self.net, x, use_reentrant=self.reentrant)


# torch: a reentrant checkpoint where no gradient is asked for, as in the first look of an adaptive solver.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("points", [2, 6])
@pytest.mark.parametrize("solver", ["euler", *SOLVERS])
@pytest.mark.parametrize("way, reentrant", [("autograd", True), *((way, False) for way in WAYS)])
def test_torch_checkpoints_inside_a_field_see_the_time_of_their_evaluation(way, reentrant, solver, points):
    found = []
    for chosen in (None, reentrant):
        field = Recomputed(chosen)
        span = span_of(field, way, solver, points=points)
        x = state().requires_grad_()
        span(x)[1].square().sum().backward()
        tensors = [x, span.t_f, *field.parameters()]
        found.append(torch.cat([p.grad.flatten() for p in tensors]))
        assert not any(getattr(m, "t", None) is not None and m.t.requires_grad for m in field.modules())
    # The same computation but for the order of sums.
    assert_equal(found[1], found[0], 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# The running cost's gradient under an adjoint


def _with_cost(sensitivity, loss_of, solver="dopri5"):
    field = Conditioned()
    span = span_of(field, sensitivity, solver, integral_loss=lambda t, z: field.net(z).square().sum(1))
    loss_of(span, span(state())[1][-1])
    return torch.cat([p.grad.flatten() for p in (field.net.weight, span.t_f)])


@pytest.mark.parametrize("sensitivity", BACKWARDS[1:])
@pytest.mark.parametrize("factor", [1.0, 1024.0, 0.25])
def test_a_running_cost_on_the_loss_is_scaled_like_the_rest(sensitivity, factor):
    convention = _with_cost(sensitivity, lambda span, z: z.sum().backward())
    scaled = _with_cost(sensitivity, lambda span, z: (factor * (z.sum() + span.running_cost.sum())).backward())
    assert_equal(scaled / factor, convention, 1e-9)


@pytest.mark.parametrize("sensitivity", BACKWARDS[1:])
def test_a_running_cost_on_the_loss_is_counted_once_by_two_backwards(sensitivity):
    def two(span, z):
        (z[:, 0].sum() + span.running_cost.sum()).backward(retain_graph=True)
        z[:, 1].sum().backward()

    together = _with_cost(sensitivity, lambda span, z: (z.sum() + span.running_cost.sum()).backward())
    assert_equal(_with_cost(sensitivity, two), together, 1e-7)


@pytest.mark.parametrize("sensitivity", BACKWARDS[1:])
def test_a_running_cost_that_was_added_already_is_not_added_again_by_a_second_backward(sensitivity):
    def two(span, z):
        cost = span.running_cost.sum()
        z.sum().backward(retain_graph=True)
        cost.backward()

    with pytest.raises(ValueError, match="put both on one loss"):
        _with_cost(sensitivity, two)


@pytest.mark.parametrize("sensitivity", BACKWARDS[1:])
def test_a_weight_for_every_entry_of_the_batch(sensitivity):
    weights = torch.linspace(-1, 2, 5, dtype=D)
    got = _with_cost(sensitivity, lambda span, z: (span.running_cost * weights).sum().backward())
    # By autograd: the cost as a column of the state.
    field = Conditioned()
    span = span_of(field, "autograd", integral_loss=lambda t, z: field.net(z).square().sum(1))
    sol = span(torch.cat([torch.zeros(5, 1, dtype=D), state()], 1))[1]
    (sol[-1, :, 0] * weights).sum().backward()
    assert_equal(got, torch.cat([p.grad.flatten() for p in (field.net.weight, span.t_f)]))


@pytest.mark.parametrize("sensitivity", BACKWARDS[1:])
def test_in_float16_the_running_cost_must_be_on_the_loss(sensitivity):
    net = nn.Linear(2, 2)
    node = NeuralODE(net, solver="rk4", sensitivity=sensitivity, integral_loss=lambda t, z: z.square().sum(1))
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 3))
    for on_the_loss in (False, True):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = span(state().float())[1][-1].sum()
            loss = loss + span.running_cost.sum() if on_the_loss else loss
        if on_the_loss:
            loss.backward()
            assert torch.isfinite(net.weight.grad).all()
        else:
            with pytest.raises(ValueError, match="GradScaler"):
                loss.backward()
