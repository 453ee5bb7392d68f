"""wrap, unwrap, spans and parameter_groups."""

import copy
import math
import warnings

import pytest
import torch
from problems import FIELDS, ByArgs, Counted, Decay, random_model
from torch import nn
from torch.distributions import MultivariateNormal
from torchdyn.core import MultipleShootingLayer, NeuralODE, ODEProblem
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalLinear
from torchdyn.numerics.solvers.ode import RungeKutta4

import torchdyn_mintime as tm

T_SPAN = torch.linspace(0, 1, 11)


def _node(width=3, **options):
    # `return_t_eval=False`, so that the states alone go on through a Sequential; `Last` takes the final one.
    net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width))
    return NeuralODE(net, **{"solver": "rk4", "return_t_eval": False, **options})


class Last(nn.Module):
    def forward(self, sol):
        return sol[-1]


def _deep(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(
        Augmenter(augment_dims=1), nn.Sequential(nn.Identity(), _node(**options)), Last(), nn.Linear(3, 2)
    )


class TwoUses(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = _node()
        self.again = self.first
        self.other = _node()
        self.many = nn.ModuleList([self.first, _node()])

    def forward(self, x):
        return self.other(self.again(self.first(x)[-1])[-1])[-1]


# ---------------------------------------------------------------------------------------------------------------------
# wrap


class MakesItsOwn(nn.Module):
    """A node in a closure, one in a list, an ODEProblem, a method of one, and one that forward makes at every call."""

    def __init__(self, *kinds):
        super().__init__()
        self.field = nn.Linear(2, 2)
        if "function" in kinds:
            node = NeuralODE(self.field)
            self.solve = lambda x: node(x)[1][-1]
        if "list" in kinds:
            self.nodes = [NeuralODE(self.field)]
        if "method" in kinds:
            self.odeint = ODEProblem(self.field, "rk4").odeint
        if "problem" in kinds:
            self.problem = ODEProblem(self.field, "rk4")
        if "child" in kinds:
            self.child = NeuralODE(self.field)

    def forward(self, x):
        return NeuralODE(self.field)(x)[1][-1]


@pytest.mark.parametrize(
    "kinds, named",
    [
        ((), r"to wrap in MakesItsOwn\. A node .* forward makes at every call"),
        (("function",), "out of reach are the NeuralODE in the function solve"),
        (("list",), "out of reach are the NeuralODE in the list nodes"),
        (("method",), "out of reach are the ODEProblem in the method odeint"),
        (("problem",), r"out of reach are problem \(ODEProblem\)\. .* Of an ODEProblem, .* make a NeuralODE"),
        (("function", "list"), "in the function solve, the NeuralODE in the list nodes"),
    ],
)
def test_nodes_that_wrap_cannot_reach_are_named(kinds, named):
    model = MakesItsOwn(*kinds)
    with pytest.raises(ValueError, match=f"(?s)no NeuralODE .*{named}" if kinds else named):
        tm.wrap(model)
    if kinds:  # beside one that it can reach they stay, and that is said
        model = MakesItsOwn(*kinds, "child")
        with pytest.warns(UserWarning, match="stay as they are: wrap replaces NeuralODEs that are attributes"):
            tm.wrap(model)
        assert isinstance(model.child, tm.LearnableSpan)
        with pytest.raises(ValueError, match="out of reach"):
            tm.wrap(model)


def test_an_ode_problem_and_odeint_are_refused_in_words():
    problem = ODEProblem(nn.Linear(2, 2), "rk4")
    with pytest.raises(TypeError, match=r"got ODEProblem\. ODEProblem \(make it a NeuralODE\)"):
        tm.LearnableSpan(problem)
    with pytest.raises(ValueError, match=r"the model \(ODEProblem\)"):
        tm.wrap(problem)
    span = tm.wrap(_node())
    assert not hasattr(span, "odeint")
    with pytest.raises(AttributeError, match=r"call the span itself, .* span\.node\.odeint is torchdyn's own"):
        span.odeint(torch.zeros(2, 3), T_SPAN)


def test_a_node_itself_gives_its_span():
    node = _node()
    span = tm.wrap(node, T_SPAN, t_f=0.7)
    assert isinstance(span, tm.LearnableSpan) and span.node is node
    assert float(span.t_f.detach()) == pytest.approx(0.7) and torch.equal(span.t_span, T_SPAN)


def test_a_node_deep_inside_is_wrapped_in_place():
    model = _deep()
    node = model[1][1]
    assert tm.wrap(model, T_SPAN) is model
    assert isinstance(model[1][1], tm.LearnableSpan) and model[1][1].node is node
    assert model(torch.randn(4, 2)).shape == (4, 2)


def test_the_wrapped_model_answers_as_the_bare_one():
    model = _deep()
    model[1][1].t_span = T_SPAN
    x = torch.randn(4, 2)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(tm.wrap(model)(x), expected, rtol=1e-5, atol=1e-6)


def test_every_gradient_arrives_in_a_deep_model():
    model = tm.wrap(_deep(), T_SPAN)
    model(torch.randn(4, 2)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert any(p is span.t_f for span in tm.spans(model) for p in model.parameters())


def test_a_node_used_twice_gets_one_span():
    model = TwoUses()
    tm.wrap(model, T_SPAN)
    assert model.first is model.again is model.many[0]
    assert isinstance(model.first, tm.LearnableSpan)
    assert len({id(s) for s in tm.spans(model)}) == len(list(tm.spans(model))) == 3
    model(torch.randn(2, 3)).sum().backward()
    assert model.first.t_f.grad is not None and model.other.t_f.grad is not None


def test_several_nodes_get_the_same_options_and_their_own_times():
    model = nn.ModuleList([_node(), _node(solver="tsit5")])
    tm.wrap(model, torch.linspace(0, 1, 11), bounds=(0.2, 2.0))
    assert all(s.bounds == pytest.approx((0.2, 2.0)) for s in tm.spans(model))
    assert model[0].t_f is not model[1].t_f


def test_nodes_keep_their_own_spans_where_none_is_given():
    model = nn.ModuleList([_node(), _node()])
    model[1].t_span = torch.linspace(0, 3, 7)
    tm.wrap(model)
    assert (len(model[0].t_span), len(model[1].t_span)) == (101, 7)


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ModuleList(), None, "model", lambda x: x],
    ids=["Linear", "Sequential", "empty", "None", "str", "lambda"],
)
def test_nothing_to_wrap_is_an_error(model):
    with pytest.raises((TypeError, ValueError)):
        tm.wrap(model)


def test_wrapping_twice_is_an_error():
    model = tm.wrap(_deep(), T_SPAN)
    span = model[1][1]
    with pytest.raises((TypeError, ValueError)):
        tm.wrap(model)
    assert model[1][1] is span and isinstance(span.node, NeuralODE)
    with pytest.raises((TypeError, ValueError)):
        tm.wrap(span)
    with pytest.raises(TypeError):
        tm.LearnableSpan(span)


@pytest.mark.parametrize("options", [{"bounds": (0.9, 0.1)}, {"step_size": -1.0}, {"t_f": math.nan}], ids=str)
def test_a_refused_wrap_leaves_the_model_as_it_was(options):
    model = TwoUses()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"0\.9|-1|nan"):
        tm.wrap(model, T_SPAN, **options)
    assert [type(m) for m in model.modules()] == before


def test_one_node_that_cannot_be_wrapped_refuses_all():
    model = nn.ModuleList([_node(), _node(solver="ieuler")])
    with pytest.raises(ValueError, match="(?i)ieuler|implicit"):
        tm.wrap(model, T_SPAN)
    assert all(isinstance(m, NeuralODE) for m in model)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError):
        tm.wrap(_deep(), T_SPAN, speed=3)


def test_state_dicts_of_the_bare_and_the_wrapped_model_load_into_each_other():
    bare, wrapped = TwoUses(), tm.wrap(TwoUses(), T_SPAN)
    wrapped.load_state_dict(bare.state_dict(), strict=True)
    for (name, p), q in zip(
        bare.named_parameters(), (p for n, p in wrapped.named_parameters() if not n.endswith("t_f")), strict=True
    ):
        assert torch.equal(p, q), name
    other = TwoUses()
    result = other.load_state_dict(wrapped.state_dict(), strict=False)
    assert not result.missing_keys
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), bare.parameters(), strict=True))


def test_a_missing_weight_is_still_an_error():
    # Accepting a bare state_dict must not turn strict loading off.
    wrapped = tm.wrap(_deep(), T_SPAN)
    state = _deep().state_dict()
    name = next(k for k in state if k.endswith("weight") and k.startswith("1."))
    incomplete = {k: v for k, v in state.items() if k != name}
    with pytest.raises(RuntimeError, match="(?i)missing"):
        wrapped.load_state_dict(incomplete, strict=True)
    with pytest.raises(RuntimeError, match="(?i)unexpected"):
        wrapped.load_state_dict({**state, "1.1.vf.vf.vf.9.weight": torch.zeros(1)}, strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Every kind of model the issue names


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5", "tsit5"])
@pytest.mark.parametrize("kind", FIELDS)
def test_every_kind_of_field_trains(kind, solver, sensitivity):
    model = random_model(kind, dtype=torch.float32, solver=solver, sensitivity=sensitivity)
    span = tm.wrap(model.node)
    optimizer = torch.optim.SGD(span.parameters(), lr=1e-3)
    before = float(span.t_f.detach()), [p.detach().clone() for p in model.parameters]
    t_span = torch.linspace(0, 1, 6)
    for _ in range(2):
        optimizer.zero_grad()
        _, sol = span(model.x, t_span)
        (sol[-1].square().mean() + 5 * span.duration).backward()
        optimizer.step()
    assert float(span.t_f.detach()) < before[0]
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters, before[1], strict=True))


@pytest.mark.parametrize("noise", [False, True], ids=["exact trace", "Hutchinson"])
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_a_continuous_normalizing_flow(noise, sensitivity):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    estimator = (
        {"trace_estimator": hutch_trace, "noise_dist": MultivariateNormal(torch.zeros(2), torch.eye(2))}
        if noise
        else {}
    )
    cnf = NeuralODE(CNF(net, **estimator), solver="dopri5", sensitivity=sensitivity, return_t_eval=False)
    model = tm.wrap(nn.Sequential(Augmenter(augment_idx=1, augment_dims=1), cnf, Last()))
    z = model(torch.randn(5, 2))
    (z[:, 0].mean() + z[:, 1:].square().sum()).backward()
    assert torch.isfinite(model[1].t_f.grad) and float(model[1].t_f.grad) != 0
    assert all(p.grad is not None for name, p in net.named_parameters() if name != "2.bias")


def test_depthcat_galerkin_and_data_control_in_one_field():
    field = nn.Sequential(DataControl(), DepthCat(1), nn.Linear(5, 2), nn.Tanh(), DepthCat(1), GalLinear(2, 2))
    model = tm.wrap(NeuralODE(field, solver="rk4"), T_SPAN)
    _, sol = model(torch.randn(4, 2))
    sol[-1].square().sum().backward()
    assert torch.isfinite(model.t_f.grad) and sol.shape == (11, 4, 2)


def test_the_second_call_of_a_shared_node_starts_where_the_first_ended():
    model = TwoUses()
    tm.wrap(model, torch.linspace(0, 1, 41))
    x = torch.randn(2, 3)
    with torch.no_grad():
        once = model.first(x)[-1]
        torch.testing.assert_close(model(x), model.other(model.first(once)[-1])[-1])


# ---------------------------------------------------------------------------------------------------------------------
# unwrap


def _learned(solver="rk4", t_f=0.43, kind="mlp", **options):
    model = random_model(kind, dtype=torch.float32, solver=solver, **options)
    span = tm.LearnableSpan(model.node, T_SPAN if solver in ("rk4", "euler", "midpoint") else None)
    with torch.no_grad():
        span.t_f.fill_(t_f)
    return span, model


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5", "tsit5"])
def test_the_way_back_gives_a_node_that_ends_in_t_f_by_itself(solver):
    span, model = _learned(solver)
    with torch.no_grad():
        expected = span(model.x)[1][-1]
        node = tm.unwrap(span)
        assert type(node) is NeuralODE and node is model.node
        t_eval, sol = node(model.x)
        # U2: torchdyn must not lose the end; then the two are the same method, to rounding or the solver's tolerance.
        assert float(t_eval[-1]) == pytest.approx(0.43, rel=1e-6)
        torch.testing.assert_close(sol[-1], expected, rtol=2e-3, atol=2e-3)
        assert not torch.allclose(sol[-1], model.x)


@pytest.mark.slow
def test_the_way_back_never_loses_the_end(draws):
    generator = torch.Generator().manual_seed(4)
    for i in range(draws(400, 40)):
        t_f = 0.05 + 0.9 * float(torch.rand((), generator=generator))
        model = random_model("mlp", seed=i, dtype=torch.float32, solver="tsit5" if i % 2 else "dopri5")
        span = tm.LearnableSpan(model.node)
        with torch.no_grad():
            span.t_f.fill_(t_f)
            expected = span(model.x)[1][-1]
            node = tm.unwrap(span, model.x)
            t_eval, sol = node(model.x)
        assert len(t_eval) == len(node.t_span)
        assert float(t_eval[-1]) == pytest.approx(t_f, rel=1e-5)
        torch.testing.assert_close(sol[-1], expected, rtol=5e-3, atol=5e-3)


def test_the_way_back_inside_a_model_is_in_place():
    model = tm.wrap(_deep(), T_SPAN)
    x, node = torch.randn(4, 2), model[1][1].node
    with torch.no_grad():
        model[1][1].t_f.fill_(0.62)
        expected = model(x)
        assert tm.unwrap(model) is model
        assert model[1][1] is node and not list(tm.spans(model))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_a_shared_node_comes_back_as_one():
    model = tm.wrap(TwoUses(), T_SPAN)
    tm.unwrap(model)
    assert model.first is model.again is model.many[0] and isinstance(model.first, NeuralODE)


def test_the_exported_span_is_the_learned_grid():
    span, _ = _learned()
    grid = span.grid().detach()
    node = tm.unwrap(span)
    torch.testing.assert_close(node.t_span, grid, rtol=1e-6, atol=1e-7)
    assert not node.t_span.requires_grad


def test_rk4_with_a_field_of_time_is_warned_about():
    span, model = _learned(kind="keyword")
    with pytest.warns(UserWarning, match="(?i)rk4"):
        tm.unwrap(span, model.x)


def test_rk4_without_time_is_not_warned_about_it():
    span, model = _learned(kind="mlp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tm.unwrap(span, model.x)
    assert not [w for w in caught if "order" in str(w.message).lower() or "U1" in str(w.message)]


def test_the_way_back_takes_the_input_of_the_model_and_leaves_no_trace():
    field = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.Dropout())
    model.append(NeuralODE(field, solver="rk4", return_t_eval=False))
    tm.wrap(model, T_SPAN)
    images, span = torch.randn(6, 1, 4, 4), model[5]
    model(images)
    last, state = span.last, {name: value.clone() for name, value in model.state_dict().items() if "batches" in name}
    drawn = torch.random.get_rng_state()
    starts = []
    span.node.register_forward_pre_hook(lambda node, args: starts.append(args[0]))
    tm.unwrap(model, images)
    assert torch.equal(torch.random.get_rng_state(), drawn) and span.last is last and model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    with torch.no_grad():  # torchdyn was checked from the state that the model's own layers make of the images
        torch.testing.assert_close(starts[0], model[:5].eval()(images))
    assert model(images).shape == (len(T_SPAN), 6, 5)


class PassesASpan(nn.Module):
    """torchdyn's quickstart: the model passes its own times, by position or by name, up or down."""

    def __init__(self, times=None, named=False, **options):
        super().__init__()
        self.node, self.times, self.named = _node(2, **{"solver": "rk4", **options}), times, named

    def forward(self, x):
        return (self.node(x, t_span=self.times) if self.named else self.node(x, self.times))[-1]


@pytest.mark.parametrize("times", [T_SPAN, T_SPAN.flip(0)], ids=["up", "down"])
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("named", [False, True])
def test_a_model_that_passes_a_span_is_warned_about_and_what_it_says_helps(named, solver, times):
    model, x = tm.wrap(PassesASpan(times, named, solver=solver), T_SPAN), torch.randn(6, 2)
    with torch.no_grad():
        model.node.t_f.fill_(0.3)
        expected = model(x)
        with pytest.warns(UserWarning, match="passes the node a span .* solve differs by .* call the node") as said:
            tm.unwrap(model, x)
        assert not torch.allclose(model(x), expected, atol=1e-2)
        model.times = None if "without a span" in str(said[0].message) else model.node.t_span.flip(0)
        torch.testing.assert_close(model(x), expected, rtol=2e-3, atol=2e-3)


def test_a_span_that_takes_more_steps_to_the_same_end_is_warned_about():
    model, x = tm.wrap(PassesASpan(torch.linspace(0, 1, 101)), torch.linspace(0, 1, 101)), 1e-3 * torch.randn(6, 2)
    model.node.lay(torch.linspace(0, 1, 21).tolist())
    with pytest.warns(
        UserWarning, match="a span of 101 points from 0 to 1.*not over the learned grid of 20 steps. Let"
    ):
        tm.unwrap(model, x)


def test_a_span_that_changes_nothing_is_not_warned_about():
    for times in (T_SPAN, None):
        model = tm.wrap(PassesASpan(times), T_SPAN)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tm.unwrap(model, torch.randn(6, 2))


@pytest.mark.parametrize("options", [{}, {"order": 1, "first_node": True}])
def test_an_unwrapped_learned_solver_loads_into_plain_torchdyn(options):
    def make():
        return nn.Sequential(_node(2, solver=tm.LearnableSolver(3, **options), return_t_eval=False))

    before, x = make(), torch.randn(5, 2)
    keys = list(before.state_dict())
    with torch.no_grad():
        before[0].solver.free.add_(0.1 * torch.randn_like(before[0].solver.free))
    with pytest.warns(UserWarning, match="whoever loads the model needs its class"):
        plain = tm.unwrap(tm.wrap(before), x)
    state, loaded = plain.state_dict(), make()
    assert list(state) == keys
    loaded.load_state_dict(state)
    assert torch.equal(loaded(x), plain(x))
    # As earlier versions wrote it: under one name.
    old, loaded = {k: v for k, v in state.items() if "solver_adjoint" not in k}, make()
    assert all("solver_adjoint" in k for k in loaded.load_state_dict(old, strict=False).missing_keys)
    assert torch.equal(loaded(x), plain(x))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "model"], ids=["Linear", "None", "str"])
def test_nothing_to_unwrap_is_an_error(model):
    with pytest.raises((TypeError, ValueError)):
        tm.unwrap(model)


def test_a_module_without_a_forward_cannot_be_unwrapped_with_a_state():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _node()

    with pytest.raises(NotImplementedError) as raised:
        tm.unwrap(tm.wrap(Steps()), torch.randn(2, 2))
    assert "If it has no forward, unwrap the network in it, such as unwrap(module.net, x)" in raised.value.__notes__[0]


def test_a_bare_node_is_nothing_to_unwrap():
    with pytest.raises((TypeError, ValueError)):
        tm.unwrap(_node())


def test_wrap_and_unwrap_keep_the_weights():
    model = _deep()
    before = copy.deepcopy(model.state_dict())
    tm.unwrap(tm.wrap(model, T_SPAN))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    tm.wrap(model)
    assert isinstance(model[1][1], tm.LearnableSpan)
    assert torch.equal(model[1][1].t_span, T_SPAN)


# ---------------------------------------------------------------------------------------------------------------------
# spans


def test_spans_finds_each_once():
    model = TwoUses()
    assert list(tm.spans(model)) == []
    tm.wrap(model, T_SPAN)
    assert {id(s) for s in tm.spans(model)} == {id(model.first), id(model.other), id(model.many[1])}
    span = tm.wrap(_node(), T_SPAN)
    assert list(tm.spans(span)) == [span]


# ---------------------------------------------------------------------------------------------------------------------
# parameter_groups


@pytest.mark.parametrize("learn_t0", [False, True])
def test_times_get_a_group_of_their_own_that_never_decays(learn_t0):
    model = tm.wrap(TwoUses(), T_SPAN, learn_t0=learn_t0)
    groups = tm.parameter_groups(model, lr=0.1, span_lr=0.01, weight_decay=0.3)
    times = {id(p) for s in tm.spans(model) for p in ([s.t_f, s.t0] if learn_t0 else [s.t_f])}
    seen = []
    for group in groups:
        parameters = list(group["params"])
        seen += [id(p) for p in parameters]
        if {id(p) for p in parameters} & times:
            assert {id(p) for p in parameters} <= times
            assert (group["lr"], group["weight_decay"]) == (0.01, 0.0)
        else:
            assert (group["lr"], group["weight_decay"]) == (0.1, 0.3)
    assert sorted(seen) == sorted(id(p) for p in model.parameters())


def test_the_time_learns_at_the_common_rate_by_default():
    groups = tm.parameter_groups(tm.wrap(_deep(), T_SPAN), lr=0.05)
    assert all(g["lr"] == 0.05 and g["weight_decay"] == 0.0 for g in groups)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
def test_a_decaying_optimizer_does_not_pull_the_time(optimizer):
    model = tm.wrap(_deep(), T_SPAN)
    span = model[1][1]
    steps = optimizer(tm.parameter_groups(model, lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight = model[3].weight.detach().clone()
    steps.step()
    assert float(span.t_f.detach()) == 1.0
    assert not torch.equal(model[3].weight, weight)


def test_frozen_times_and_weights_do_not_break_the_groups():
    model = tm.wrap(_deep(), T_SPAN)
    model[1][1].t_f.requires_grad_(False)
    optimizer = torch.optim.Adam(tm.parameter_groups(model, lr=0.1))
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert float(model[1][1].t_f) == 1.0


@pytest.mark.parametrize("lr", [-0.1, math.nan])
def test_a_bad_rate_is_refused_at_the_latest_by_the_optimizer(lr):
    with pytest.raises(ValueError, match="(?i)learning rate|lr"):
        torch.optim.Adam(tm.parameter_groups(tm.wrap(_deep(), T_SPAN), lr=lr if lr == lr else -1.0, span_lr=lr))


# ---------------------------------------------------------------------------------------------------------------------
# What else is refused


def test_what_cannot_work_says_so_when_it_is_wrapped():
    with pytest.raises(ValueError, match="(?i)sensitivity|magic"):
        tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4", sensitivity="magic"))


def test_a_multiple_shooting_layer_beside_a_node_is_left_alone():
    layer = MultipleShootingLayer(Decay(dtype=torch.float32), solver="mszero")
    model = nn.ModuleDict({"layer": layer, "node": _node()})
    tm.wrap(model, T_SPAN)
    assert model["layer"] is layer and isinstance(model["node"], tm.LearnableSpan)


def test_wrapping_evaluates_nothing():
    field = Counted(lambda t, x: -x)
    tm.wrap(NeuralODE(field, solver="rk4"), T_SPAN)
    assert field.count == 0


def test_a_state_that_cannot_be_guessed_is_asked_for():
    span = tm.wrap(NeuralODE(nn.Sequential(DepthCat(1), nn.Linear(3, 2)), solver="euler"))
    with pytest.raises(ValueError, match="pass x, which the model is called with"):
        tm.unwrap(span)
    assert isinstance(tm.unwrap(span, torch.randn(4, 2)), NeuralODE)


def test_a_field_that_needs_args_is_sent_to_the_network():
    span = tm.wrap(NeuralODE(ByArgs(), solver="rk4"))
    with pytest.raises(KeyError) as caught:
        tm.unwrap(span, torch.randn(4, 2))
    assert "as_network" in caught.value.__notes__[0]


def test_a_tableau_that_is_trained_is_used_and_gets_its_gradient():
    """Also where it has torchdyn's own values at first, and is changed after the node was wrapped."""
    solver, x = RungeKutta4(), torch.randn(4, 2)
    c, a, b, e = solver.tableau
    b = b.clone().requires_grad_()
    solver.tableau = c, a, b, e
    node = NeuralODE(nn.Linear(2, 2), solver=solver)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 3))
    with torch.no_grad():
        b += 0.05
    gradients = []
    for end in (node(x, torch.linspace(0, 1, 3))[1][-1], span(x)[1][-1]):
        gradients.append(torch.autograd.grad(end.square().sum(), b)[0])
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5) and gradients[0].any()
