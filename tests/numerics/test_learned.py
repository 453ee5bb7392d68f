"""LearnableSolver by itself and in plain torchdyn: equal to the steps it starts from, its conditions kept, exact gradients."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import FIELDS, random_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torchdyn.core import NeuralODE

from torchdyn_mintime.numerics import Grid, LearnableSolver, integrate, make_stepper

STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}
DTYPES = (torch.float32, torch.float64)
ULP = torch.finfo(torch.float64).eps


@st.composite
def solvers(draw):
    """A solver of any start, order and dtype, its coefficients moved from there."""
    stages = draw(st.integers(1, 7), label="stages")
    order = draw(st.sampled_from([1, 2]), label="order") if stages > 1 else 1
    first_node = order == 1 and draw(st.booleans(), label="first_node")
    solver = LearnableSolver(stages, order=order, first_node=first_node)
    torch.manual_seed(draw(st.integers(0, 99), label="seed"))
    with torch.no_grad():
        solver.free.add_(0.2 * torch.randn_like(solver.free))
    return solver


def end(solver, model, descending=False, node=None):
    """z at the end of [0.1, 0.9] by one step of the solver, in the package's own drive."""
    nodes = [0.9, 0.1] if descending else [0.1, 0.9]
    return integrate(node or model.rhs, model.x, Grid(nodes), make_stepper(solver)).states[-1]


# ---------------------------------------------------------------------------------------------------------------------
# What it starts from


@given(
    like=st.sampled_from(list(STAGES)),
    steps=st.integers(1, 5),
    kind=st.sampled_from(FIELDS),
    dtype=st.sampled_from(DTYPES),
    learning=st.booleans(),
    descending=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_equals_the_steps_it_is_made_of(like, steps, kind, dtype, learning, descending, seed):
    model = random_model(kind, seed=seed, dtype=dtype)
    solver = LearnableSolver(steps * STAGES[like], like).requires_grad_(learning)
    nodes = [0.1 + 0.8 * k / steps for k in range(steps)] + [0.9]
    stock = integrate(model.rhs, model.x, Grid(nodes[::-1] if descending else nodes), make_stepper(like)).states[-1]
    # Sums in another order, and times rounded once more: a few units in the last place for each evaluation.
    bound = 20 * steps * STAGES[like] * torch.finfo(dtype).eps * (1 + float(stock.detach().abs().max()))
    assert float((end(solver, model, descending) - stock).detach().abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stages, like", [(1, "euler"), (2, "midpoint"), (6, "midpoint"), (3, None), (4, "rk4")])
def test_plain_torchdyn_gives_the_same(stages, like, dtype):
    model = random_model("keyword", seed=3, dtype=dtype)
    solver = LearnableSolver(stages, like)
    node = NeuralODE(model.node.vf.vf, solver=solver)
    span = torch.tensor([0.1, 0.9], dtype=dtype)
    own = end(solver, model)
    assert torch.allclose(node(model.x, span)[1][-1], own, rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert torch.equal(node.trajectory(model.x, span)[-1], node(model.x, span)[1][-1])


@given(solver=solvers(), more=st.integers(1, 3))
def test_more_stages_start_as_the_same_method(solver, more):
    grown = LearnableSolver(solver.stages + more, solver, order=1, first_node=False)
    model = random_model("mlp", seed=1)
    assert torch.allclose(end(grown, model), end(solver, model), rtol=0, atol=1e-12)


@given(solver=solvers(), fewer=st.integers(1, 5))
def test_fewer_stages_keep_the_conditions(solver, fewer):
    if fewer >= solver.stages:
        return
    smaller = LearnableSolver(fewer, solver)
    assert smaller.stages == fewer
    assert smaller.order == (solver.order if fewer > 1 else 1)
    check_conditions(smaller)


def test_a_stage_without_effect_is_the_one_that_goes():
    solver = LearnableSolver(4, LearnableSolver(2, "midpoint"))  # two stages have no weight
    model = random_model("mlp", seed=2)
    assert torch.allclose(end(LearnableSolver(2, solver), model), end(solver, model), rtol=0, atol=1e-14)


@pytest.mark.parametrize("stages, order", [(1, 1), (2, 2), (3, 3), (4, 2), (5, 2)])
def test_the_default_has_its_order(stages, order):
    """z' = -z by one step of h: the error falls as h^(order + 1)."""
    solver = LearnableSolver(stages)
    x = torch.ones(1, dtype=torch.float64)
    errors = [
        abs(integrate(lambda t, z: -z, x, Grid([0.0, h]), make_stepper(solver)).states[-1].item() - math.exp(-h))
        for h in (0.02, 0.01)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The conditions


def check_conditions(solver):
    a, b, c = (v.detach() for v in solver.coefficients())
    # The last weight is what the others leave of 1, so that the sum is 1 to the rounding of the sum itself.
    assert abs(float(b.sum()) - 1) <= 2 * ULP * max(1.0, float(b.abs().max()))
    assert bool((a.triu() == 0).all())
    if solver.order == 2:
        assert bool((a.sum(1) - c).abs().max() <= 4 * ULP * max(1.0, float(a.abs().max())))
        size = max(1.0, float(b.abs().max())) * max(1.0, float(c.abs().max()))
        assert abs(float(b @ c) - 0.5) <= 4 * solver.stages * ULP * size
    elif not solver.first_node:
        assert c[0] == 0


@given(solver=solvers(), optimizer=st.sampled_from(["SGD", "Adam", "LBFGS"]), steps=st.integers(0, 12))
def test_the_conditions_hold_after_any_steps_of_an_optimizer(solver, optimizer, steps):
    model = random_model("depthcat", seed=4)
    target = torch.randn_like(model.x)
    # Without a line search LBFGS soon leaves what floating point can hold, coefficients and state alike.
    options = {"line_search_fn": "strong_wolfe"} if optimizer == "LBFGS" else {}
    optimizer = getattr(torch.optim, optimizer)(solver.parameters(), lr=0.1, **options)

    def closure():
        optimizer.zero_grad()
        loss = (end(solver, model) - target).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    check_conditions(solver)


def test_one_stage_has_nothing_to_learn_and_a_gradient_of_zero():
    """Not None: training on several ranks waits for a gradient of every parameter."""
    solver = LearnableSolver(1)
    end(solver, random_model("mlp")).sum().backward()
    assert torch.equal(solver.free.grad, torch.zeros_like(solver.free))


def test_the_first_node_is_learned_on_request():
    model = random_model("keyword")
    for first_node in (False, True):
        solver = LearnableSolver(1, order=1, first_node=first_node)
        end(solver, model).sum().backward()
        assert (solver.free.grad[-1, 0] != 0) == first_node


# ---------------------------------------------------------------------------------------------------------------------
# The optimum on linear fields, in closed form


@pytest.mark.parametrize("stages, powers", [(2, 1), (3, 2)])
@pytest.mark.parametrize("optimizer", ["Adam", "LBFGS"])
def test_the_least_squares_optimum_of_linear_fields_is_reached(stages, powers, optimizer):
    """z' = lambda z: the end is R(lambda) z with R = 1 + z + sum_k w_k z^k, linear in weights that are all free.

    Two stages with sum b = 1: w_2 = b_2 a_21 alone. Three stages with the order-2 conditions: w_3 = b_3 a_32 a_21 alone.
    """
    order = 1 if stages == 2 else 2
    rates = torch.linspace(-1.5, 0.5, 41, dtype=torch.float64)
    given = rates.exp() - sum(rates**k / math.factorial(k) for k in range(powers + 1))
    weight = (given * rates ** (powers + 1)).sum() / rates.pow(2 * powers + 2).sum()
    least = (given - weight * rates ** (powers + 1)).square().sum().item()

    solver = LearnableSolver(stages, order=order)
    x = torch.ones_like(rates)
    optimizer = getattr(torch.optim, optimizer)(solver.parameters(), lr=0.02 if optimizer == "Adam" else 0.5)

    def loss():
        step = integrate(lambda t, z: rates * z, x, Grid([0.0, 1.0]), make_stepper(solver)).states[-1]
        return (step - rates.exp()).square().sum()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(600 if isinstance(optimizer, torch.optim.Adam) else 20):
        optimizer.step(closure)
    found = loss().item()
    # At a minimum the loss is flat: 1e-6 of it is 1e-3 in the weight.
    assert least * (1 - 1e-9) <= found <= least * (1 + 1e-6)
    a, b, _ = solver.coefficients()
    found_weight = (b[1] * a[1, 0] if stages == 2 else b[2] * a[2, 1] * a[1, 0]).item()
    assert found_weight == pytest.approx(weight.item(), rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# torch.func, copies, types


def ends_of(solver, model):
    """The end as a function of the solver's parameter."""
    return lambda free: functional_call(_Step(solver, model), {"solver.free": free}, ())


class _Step(nn.Module):
    def __init__(self, solver, model):
        super().__init__()
        self.solver, self._model = solver, model

    def forward(self):
        return end(self.solver, self._model)


@given(solver=solvers(), kind=st.sampled_from(["mlp", "depthcat", "keyword"]))
def test_torch_func_gives_the_gradients_of_autograd(solver, kind):
    model = random_model(kind, seed=5)
    value = lambda free: ends_of(solver, model)(free).sin().sum()  # noqa: E731
    end(solver, model).sin().sum().backward()
    free, tangent = solver.free.detach(), torch.randn_like(solver.free)
    assert torch.allclose(grad(value)(free), solver.free.grad, rtol=1e-10, atol=1e-12)
    _, derivative = jvp(value, (free,), (tangent,))
    assert float(derivative.detach()) == pytest.approx(float((solver.free.grad * tangent).sum()), rel=1e-9, abs=1e-11)
    several = torch.stack([free, free + 0.1 * tangent])
    each = torch.stack([value(one) for one in several])
    assert torch.allclose(vmap(value)(several), each, rtol=1e-10, atol=1e-12)
    assert torch.allclose(vmap(grad(value))(several)[0], solver.free.grad, rtol=1e-10, atol=1e-12)


@given(solver=solvers())
def test_second_derivatives_are_those_of_differences(solver):
    model = random_model("mlp", seed=6)

    def slope():
        value = end(solver, model).sin().sum()
        return torch.autograd.grad(value, solver.free, create_graph=True)[0]

    direction = torch.randn_like(solver.free)
    second = torch.autograd.grad((slope() * direction).sum(), solver.free)[0]
    with torch.no_grad():
        solver.free.add_(1e-5 * direction)
    above = slope().detach()
    with torch.no_grad():
        solver.free.sub_(2e-5 * direction)
    numeric = (above - slope().detach()) / 2e-5
    # The second derivative along a direction is symmetric: the difference of slopes is the same vector, to h^2 = 1e-10.
    assert torch.allclose(second, numeric, rtol=1e-5, atol=1e-5 * (1 + float(second.abs().max())))


@given(solver=solvers())
def test_copies_and_files_hold_the_same_method(solver):
    model = random_model("keyword", seed=7)
    expected = end(solver, model)
    state = io.BytesIO()
    torch.save(solver.state_dict(), state)
    state.seek(0)
    loaded = LearnableSolver(solver.stages, order=solver.order, first_node=solver.first_node)
    loaded.load_state_dict(torch.load(state))  # with torch's safe default
    for made in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver)), loaded):
        assert made.extra_repr() == solver.extra_repr()
        assert torch.equal(end(made, model), expected)
        with torch.no_grad():
            made.free.add_(1.0)
        assert torch.equal(end(solver, model), expected)  # the original stands alone


def test_a_state_of_another_order_is_refused_and_changes_nothing():
    solver, other = LearnableSolver(3, order=1), LearnableSolver(3)
    with torch.no_grad():
        other.free.add_(1.0)
    before = solver.free.clone()
    with pytest.raises(ValueError, match="made with order=2, first_node=False"):
        solver.load_state_dict(other.state_dict())
    assert torch.equal(solver.free, before)
    with pytest.raises(RuntimeError, match="size mismatch"):
        solver.load_state_dict(LearnableSolver(4, order=1).state_dict())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_coefficients_keep_at_least_single_precision(cast):
    solver = LearnableSolver(4)
    getattr(solver, cast)()
    assert solver.free.dtype == (torch.float32 if cast == "float" else torch.float64)
    assert solver._mask.dtype == solver.free.dtype
    assert abs(float(solver.b.sum().detach()) - 1) <= 2 * torch.finfo(solver.free.dtype).eps


@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_half_precision_states_are_stepped(dtype, rtol):
    model = random_model("mlp", seed=8)
    solver, expected = LearnableSolver(4), end(LearnableSolver(4), model)
    half = random_model("mlp", seed=8)
    half.node.vf.to(dtype)
    half.x = model.x.to(dtype)
    found = end(solver, half)
    assert found.dtype == dtype
    found.float().square().sum().backward()
    assert solver.free.grad.dtype == torch.float64 and bool(solver.free.grad.isfinite().all())
    assert torch.allclose(found.double(), expected, rtol=8 * rtol, atol=8 * rtol)


def test_what_is_learned_in_place_is_seen_without_a_gradient():
    """The numbers of a solve without gradients are kept, and must follow every way to write to the parameter."""
    solver, model = LearnableSolver(2), random_model("mlp", seed=9)
    stepper = make_stepper(solver)

    def value():
        with torch.no_grad():
            return integrate(model.rhs, model.x, Grid([0.0, 1.0]), stepper).states[-1]

    def by_data():
        solver.free.data = solver.free.data + 0.1

    def by_copy():
        solver.load_state_dict({**solver.state_dict(), "free": solver.free.detach() + 0.1})

    seen = [value()]
    for write in (by_data, by_copy, lambda: solver.free.detach().add_(0.1)):
        write()
        with torch.enable_grad():
            learning = integrate(model.rhs, model.x, Grid([0.0, 1.0]), make_stepper(solver)).states[-1].detach()
        seen.append(value())
        assert torch.allclose(seen[-1], learning, rtol=0, atol=1e-14)
        assert not torch.allclose(seen[-1], seen[-2])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("stages", [0, -1, 1.5, "4", True, None])
def test_a_number_of_stages_that_cannot_be_had(stages):
    with pytest.raises(ValueError, match=r"stages must be a whole number of evaluations, 1 or more; got"):
        LearnableSolver(stages)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"stages": 3, "like": "rk4"}, ValueError, "3 stages are no whole number of rk4 steps"),
        ({"stages": 4, "like": "dopri5"}, ValueError, "like='dopri5' is unknown"),
        ({"stages": 4, "like": nn.Linear(2, 2)}, TypeError, "or a LearnableSolver; got Linear"),
        ({"stages": 4, "order": 3}, ValueError, "order=3 cannot be kept by 4 stages"),
        ({"stages": 1, "order": 2}, ValueError, "order=2 cannot be kept by 1 stages"),
        ({"stages": 2, "like": "euler", "order": 2}, ValueError, "order=2 cannot be kept by 2 stages"),
        ({"stages": 2, "order": 2, "first_node": True}, ValueError, "first_node=True moves c_1 from 0"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        LearnableSolver(**arguments)


def test_nothing_is_said_about_a_tolerance():
    """torchdyn warns where tolerances come with a method of fixed steps; a solver of ours takes none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node = NeuralODE(nn.Tanh(), solver=LearnableSolver(2))
        node(torch.ones(1, 2))


@given(solvers())
def test_autocast_does_not_round_the_coefficients(solver):
    solver = solver.float()
    expected = solver.coefficients()
    with torch.autocast("cpu", torch.bfloat16):
        found = solver.coefficients()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
