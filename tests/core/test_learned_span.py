"""A LearnableSpan with a LearnableSolver: equal to the steps it is made of, exact gradients, and all that a span does."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from differences import assert_close, difference, directions_like
from hypothesis import given
from hypothesis import strategies as st
from learners import Learner, points, trainer
from problems import FIELDS, random_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, autograd_trace, hutch_trace

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import MinimumTime
from torchdyn_mintime.losses.potentials import SquaredDistance

STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}
ENDS = torch.tensor([0.1, 0.9], dtype=torch.float64)


def moved(stages, order=1, seed=0, first_node=False):
    """A solver whose coefficients are those of no known method."""
    solver = tm.LearnableSolver(stages, order=order, first_node=first_node)
    noise = torch.randn(solver.free.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        solver.free.add_(0.1 * noise)
    return solver


def made(kind="mlp", solver=None, seed=0, **options):
    """A span over [0.1, 0.9] with t_f inside its bounds, in float64."""
    model = random_model(kind, seed=seed, solver=moved(3) if solver is None else solver)
    return model, tm.LearnableSpan(model.node, ENDS, bounds=(0.2, 2.0), **options)


def flow(trace, solver, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)) if trace is hutch_trace else None
    return NeuralODE(CNF(net, trace_estimator=trace, noise_dist=noise).double(), solver=solver)


def two_way():
    """A solver with another one for the way back."""
    solver = moved(3, seed=1)
    solver.direction, solver.other = 1, moved(4, seed=2)
    solver.other.direction = -1
    return solver


# ---------------------------------------------------------------------------------------------------------------------
# Values


@given(
    like=st.sampled_from(list(STAGES)),
    steps=st.integers(1, 4),
    kind=st.sampled_from(FIELDS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    descending=st.booleans(),
    learn_t0=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_equals_the_steps_it_is_made_of(like, steps, kind, dtype, descending, learn_t0, seed):
    stock = random_model(kind, seed=seed, dtype=dtype, solver=like)
    learned = random_model(kind, seed=seed, dtype=dtype, solver=tm.LearnableSolver(steps * STAGES[like], like))
    template = torch.linspace(0.1, 0.9, steps + 1, dtype=dtype)
    passed = template.flip(0) if descending else None
    expected = tm.LearnableSpan(stock.node, template)(stock.x, passed)[1][-1]
    span = tm.LearnableSpan(learned.node, template, learn_t0=learn_t0)
    t_eval, sol = span(learned.x, passed)
    assert len(t_eval) == len(sol) == 2 and span.nfe == steps * STAGES[like]
    bound = 20 * steps * STAGES[like] * torch.finfo(dtype).eps * (1 + float(expected.detach().abs().max()))
    assert float((sol[-1] - expected).detach().abs().max()) <= bound


@pytest.mark.parametrize("trace", [autograd_trace, hutch_trace])
def test_a_flow_is_as_with_the_steps(trace):
    x = torch.randn(5, 3, dtype=torch.float64)
    values = []
    for solver in ("rk4", tm.LearnableSolver(8, "rk4")):
        span = tm.LearnableSpan(flow(trace, solver), torch.linspace(0, 1, 3, dtype=torch.float64))
        torch.manual_seed(1)
        values.append(span(x)[1][-1])
    assert torch.allclose(*values, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["mlp", "keyword", "second order"])
def test_torchdyn_without_the_span_gives_the_same(kind):
    solver = moved(4)
    model, span = made(kind, solver)
    expected = span(model.x)[1][-1]
    bare = random_model(kind, solver=solver).node
    assert torch.allclose(bare(model.x, ENDS)[1][-1], expected, rtol=0, atol=1e-14)
    with pytest.warns(UserWarning, match="LearnableSolver, .* needs its class"):
        node = tm.unwrap(span)
    assert torch.allclose(node(model.x)[1][-1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_states(dtype):
    model, span = made(solver=tm.LearnableSolver(4))
    expected = span(model.x)[1][-1]
    span.to(dtype)
    sol = span(model.x.to(dtype))[1]
    assert sol.dtype == dtype and span.t_f.dtype == torch.float64
    sol[-1].float().square().sum().backward()
    assert span.node.solver.free.grad.dtype == torch.float64
    # Four evaluations of a field whose values are rounded to 8 (or 11) bits each.
    assert torch.allclose(sol[-1].double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast(checkpoint):
    model, span = made(solver=tm.LearnableSolver(4), checkpoint=checkpoint)
    span.float()
    x = model.x.float()
    exact = torch.autograd.grad(span(x)[1][-1].square().sum(), span.node.solver.free)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = span(x)[1]
    assert sol.dtype == torch.float32  # the states; the field's products are those of bfloat16
    found = torch.autograd.grad(sol[-1].square().sum(), span.node.solver.free)[0]
    assert torch.allclose(found, exact, rtol=0.1, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@given(
    kind=st.sampled_from(FIELDS),
    stages=st.integers(1, 5),
    order=st.sampled_from([1, 2]),
    first_node=st.booleans(),
    checkpoint=st.booleans(),
    descending=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_gradient_is_that_of_differences(kind, stages, order, first_node, checkpoint, descending, seed):
    order = order if stages > 1 else 1
    solver = moved(stages, order, seed, first_node and order == 1)
    model, span = made(kind, solver, seed, learn_t0=True, checkpoint=checkpoint)
    span.eval()  # nothing is clipped while the differences move the times
    x = model.x.clone().requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))

    def loss():
        t_eval, sol = span(x, ENDS.flip(0) if descending else None)
        return (torch.tanh(sol[-1]) * weights).sum() + 0.3 * t_eval[-1] ** 2 + 0.2 * t_eval[0]

    loss().backward()
    one = [torch.ones((), dtype=torch.float64)]
    for name, tensors, directions in (
        ("t_f", [span.t_f], one),
        ("t0", [span.t0], one),
        ("x", [x], directions_like([x], seed)),
        ("theta", model.parameters, directions_like(model.parameters, seed)),
        ("free", [solver.free], directions_like([solver.free], seed)),
    ):
        assert all(t.grad is not None for t in tensors), name
        found = sum(float((t.grad * d).sum()) for t, d in zip(tensors, directions, strict=True))
        scale = sum(float(t.grad.square().sum()) for t in tensors) ** 0.5
        assert_close(found, difference(loss, tensors, directions), max(scale, 1e-3), 1e-6, name)


@given(kind=st.sampled_from(FIELDS), stages=st.integers(1, 5), seed=st.integers(0, 99), frozen=st.sampled_from("sf-"))
def test_checkpoints_give_the_gradients_of_autograd(kind, stages, seed, frozen):
    """Whether the solver, the field or neither is frozen."""
    gradients = []
    for checkpoint in (False, True):
        solver = moved(stages, 1, seed)
        model, span = made(kind, solver, seed, learn_t0=True, checkpoint=checkpoint)
        for parameter in {"s": [solver.free], "f": model.parameters, "-": []}[frozen]:
            parameter.requires_grad_(False)
        span(model.x)[1][-1].sin().sum().backward()
        gradients.append([p.grad for p in (span.t_f, span.t0, solver.free, *model.parameters)])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-12, atol=1e-13)


def test_checkpoints_of_a_hypersolver_train_its_network():
    """What goes for learned coefficients goes for every parameter that a solver has."""
    from torchdyn.numerics.solvers.hyper import HyperEuler

    class Correction(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2).double()

        def forward(self, t, x):
            return self.net(x)

    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(2)
        solver = HyperEuler(Correction(), dtype=torch.float64)
        model = random_model("mlp", solver=solver)
        span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 4, dtype=torch.float64), checkpoint=checkpoint)
        span(model.x)[1][-1].sin().sum().backward()
        gradients.append([solver.hypernet.net.weight.grad, *(p.grad for p in model.parameters)])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_functional_call_takes_other_coefficients(checkpoint):
    model, span = made("keyword", checkpoint=checkpoint)
    other = (span.node.solver.free.detach() + 0.1).requires_grad_()
    found = functional_call(span, {"node.solver.free": other}, (model.x,))[1][-1]
    copied = copy.deepcopy(span)
    with torch.no_grad():
        copied.node.solver.free.copy_(other)
    expected = copied(model.x)[1][-1]
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    assert torch.allclose(other.grad, copied.node.solver.free.grad, rtol=1e-12, atol=1e-14)
    assert span.node.solver.free.grad is None


@pytest.mark.parametrize("kind", ["mlp", "depthcat", "keyword"])
def test_torch_func(kind):
    model, span = made(kind)
    free = span.node.solver.free.detach().clone()
    value = lambda v: functional_call(span, {"node.solver.free": v}, (model.x,))[1][-1].sin().sum()  # noqa: E731
    span(model.x)[1][-1].sin().sum().backward()
    expected = span.node.solver.free.grad
    tangent = torch.randn_like(free)
    assert torch.allclose(grad(value)(free), expected, rtol=1e-11, atol=1e-13)
    derivative = jvp(value, (free,), (tangent,))[1].detach()
    assert float(derivative) == pytest.approx(float((expected * tangent).sum()), rel=1e-10)
    several = torch.stack([free, free + 0.1 * tangent])
    assert torch.allclose(vmap(grad(value))(several)[0], expected, rtol=1e-11, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Copies and checkpoints


def test_a_state_of_either_solver_loads_into_the_other():
    learned_model, learned = made("keyword", moved(3, seed=4))
    _, stock = made("keyword", "rk4")
    expected = learned(learned_model.x)[1][-1]
    stock.load_state_dict(learned.state_dict())
    assert isinstance(stock.solver, tm.LearnableSolver) and len(stock.nodes) == 2
    assert torch.equal(stock(learned_model.x)[1][-1], expected)
    with pytest.raises(ValueError, match="no step_size|one step"):
        stock.interval.with_step_size(0.1, torch.float64)

    _, back = made("keyword", moved(3, seed=5))
    _, plain = made("keyword", "rk4", seed=1)
    with pytest.raises(RuntimeError, match="Missing key"):
        back.load_state_dict(plain.state_dict())  # which says nothing of the solver's coefficients
    back.load_state_dict(plain.state_dict(), strict=False)
    assert isinstance(back.solver, tm.LearnableSolver)


@pytest.mark.parametrize("stages, order, first_node", [(3, 1, True), (3, 2, False), (5, 1, False)])
def test_a_state_of_other_stages_loads(stages, order, first_node):
    model, learned = made("keyword", moved(stages, order, 4, first_node))
    _, other = made("keyword", tm.LearnableSolver(2))
    other.load_state_dict(learned.state_dict())
    assert other.solver.extra_repr() == learned.solver.extra_repr()
    assert torch.equal(other(model.x)[1][-1], learned(model.x)[1][-1])


def test_bare_and_wrapped_checkpoints_fit_each_other():
    solver = moved(3, seed=4)
    model, span = made("keyword", solver)
    expected = span(model.x)[1][-1]
    bare = random_model("keyword", seed=7, solver=moved(3, seed=8)).node
    result = bare.load_state_dict(span.state_dict(), strict=False)
    assert not [k for k in result.missing_keys if not k.startswith("solver_adjoint")]
    assert torch.equal(bare.solver.free, solver.free)
    assert torch.allclose(bare(model.x, ENDS)[1][-1], expected, rtol=0, atol=1e-14)
    _, wrapped = made("keyword", moved(3, seed=9), seed=3)
    wrapped.load_state_dict(random_model("keyword", solver=solver).node.state_dict())
    assert torch.equal(wrapped(model.x)[1][-1], expected)


def test_copies_stand_alone_and_hold_the_method():
    model, span = made("depthcat")
    expected = span(model.x)[1][-1]
    file = io.BytesIO()
    torch.save(span.state_dict(), file)
    file.seek(0)
    _, loaded = made("depthcat", seed=5)
    loaded.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(span), pickle.loads(pickle.dumps(span)), loaded):
        assert torch.equal(other(model.x)[1][-1], expected)
        with torch.no_grad():
            other.node.solver.free.add_(1.0)
        assert torch.equal(span(model.x)[1][-1], expected)
        assert not torch.allclose(other(model.x)[1][-1], expected)  # the copy steps by its own coefficients


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("descending", [False, True])
def test_each_direction_takes_the_solver_that_was_fitted_to_it(descending, checkpoint):
    model, span = made("keyword", two_way(), checkpoint=checkpoint)
    _, alone = made("keyword", moved(4, seed=2) if descending else moved(3, seed=1))
    asked = ENDS.flip(0) if descending else ENDS
    taking, idle = (span.solver.other, span.solver) if descending else (span.solver, span.solver.other)
    with torch.no_grad():
        assert torch.equal(span(model.x, asked)[1], alone(model.x, asked)[1])
        inside = torch.tensor([0.3, 0.7]).double()
        assert torch.equal(
            span.trajectory(model.x, inside.flip(0) if descending else inside, dense=True),
            alone.trajectory(model.x, inside.flip(0) if descending else inside, dense=True),
        )
    # In one way or another, the same sums in another order.
    span(model.x, asked)[1][-1].square().sum().backward()
    alone(model.x, asked)[1][-1].square().sum().backward()
    assert torch.allclose(taking.free.grad, alone.solver.free.grad, rtol=1e-9, atol=1e-12)
    assert torch.allclose(span.t_f.grad, alone.t_f.grad, rtol=1e-9, atol=1e-12)
    assert idle.free.grad is None or not idle.free.grad.any()
    assert span.nfe in (taking.stages, 2 * taking.stages)  # the backward of checkpoints evaluates once more

    network = tm.as_network(span, model.x)
    assert torch.allclose(network(model.x)[1][-1], span(model.x)[1][-1], rtol=0, atol=1e-13)


def test_both_directions_are_copied_and_saved():
    model, span = made("depthcat", two_way())
    down = ENDS.flip(0)
    expected = span(model.x)[1], span(model.x, down)[1]
    file = io.BytesIO()
    torch.save(span.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    _, loaded = made("depthcat", seed=5)
    _, stock = made("depthcat", "rk4", seed=6)
    for other in (loaded, stock):
        other.load_state_dict(state)
    for other in (copy.deepcopy(span), pickle.loads(pickle.dumps(span)), loaded, stock):
        assert other.solver.direction == 1 and other.solver.other.direction == -1
        assert torch.equal(other(model.x)[1], expected[0]) and torch.equal(other(model.x, down)[1], expected[1])
    # One that has none loads into one that has, and takes its other one away.
    _, plain = made("depthcat", moved(3, seed=7))
    loaded.load_state_dict(plain.state_dict())
    assert loaded.solver.other is None and loaded.solver.direction == 0


def test_a_load_keeps_the_solver_of_the_way_back_and_its_parameter():
    """Optimizers hold the parameter, and every rollback loads a state."""
    solver = two_way()
    other, free = solver.other, solver.other.free
    state = copy.deepcopy(solver.state_dict())
    free.requires_grad_(False)
    with torch.no_grad():
        free.add_(1.0)
    solver.load_state_dict(state)
    assert solver.other is other and solver.other.free is free and not free.requires_grad
    assert torch.equal(free, state["other.free"])


@pytest.mark.parametrize("present", [None, 2])
def test_a_loaded_solver_of_the_way_back_is_as_the_one_there(present):
    solver = moved(3).float()
    solver.free.requires_grad_(False)
    solver.other = None if present is None else tm.LearnableSolver(present)
    solver.load_state_dict(two_way().state_dict())
    assert solver.other.stages == 4 and solver.other.direction == -1
    assert solver.other.free.dtype == solver.other._mask.dtype == torch.float32
    assert not solver.other.free.requires_grad


def test_a_load_without_coefficients_fails_and_changes_nothing():
    solver = two_way()
    other = solver.other
    with pytest.raises(RuntimeError, match="Missing key.*free"):
        solver.load_state_dict({"_settings": tm.LearnableSolver(3, order=1).state_dict()["_settings"]})
    assert solver.direction == 1 and solver.other is other and int(solver._settings[2]) == 1


def test_a_state_from_before_directions_loads():
    solver, older = moved(3), moved(3, seed=3)
    state = older.state_dict()
    state["_settings"] = state["_settings"][:2]
    solver.direction = 1
    solver.load_state_dict(state)
    assert solver.direction == 0 and torch.equal(solver.free, older.free)


def test_a_solver_that_is_run_against_its_direction_says_so_once():
    model, span = made("keyword")
    span.solver.direction = -1
    span(model.x, ENDS.flip(0))
    with pytest.warns(UserWarning, match="3 stages was fitted to solves backward in time and is run forward"):
        span(model.x)
    span(model.x)
    with pytest.raises(ValueError, match="direction must be 1"):
        span.solver.direction = 2


def test_averages_hold_averaged_coefficients():
    model, span = made("mlp")
    average = torch.optim.swa_utils.AveragedModel(span)
    average.update_parameters(span)
    first = span.node.solver.free.detach().clone()
    with torch.no_grad():
        span.node.solver.free.add_(1.0)
    average.update_parameters(span)
    assert torch.allclose(average.module.node.solver.free, first + 0.5)
    assert average(model.x)[1].isfinite().all()


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_adjoints_are_refused(sensitivity):
    node = random_model("mlp", solver=tm.LearnableSolver(2), sensitivity=sensitivity).node
    with pytest.raises(ValueError, match="LearnableSolver has no adjoint.*make the node with sensitivity='autograd'"):
        tm.LearnableSpan(node)
    span = tm.LearnableSpan(random_model("mlp", sensitivity=sensitivity).node)
    before = span.solver
    with pytest.raises(ValueError, match="LearnableSolver has no adjoint"):
        span.solver = tm.LearnableSolver(2)
    assert span.solver is before


def test_a_solver_that_is_a_module_can_be_set():
    model, span = made(solver="rk4")
    solver = moved(3)
    span.solver = solver
    assert span.solver is span.node.solver is solver and "solver" not in span._modules
    assert torch.equal(span(model.x)[1], made(solver=solver)[1](model.x)[1])
    span.solver = "midpoint"
    assert span.stepper.name == "midpoint"


# ---------------------------------------------------------------------------------------------------------------------
# With the rest of the package


def test_time_and_solver_are_learned_together_by_minimum_time():
    learner = Learner(tm.wrap(NeuralODE(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), solver=moved(3))))
    (span,) = tm.spans(learner)
    before = span.t_f.item(), span.solver.free.detach().clone()
    data = DataLoader(TensorDataset(*points()), batch_size=12)
    trainer(4, MinimumTime(weight=1.0)).fit(learner, data)
    assert span.t_f.item() < before[0]
    assert not torch.equal(span.solver.free, before[1])
    assert abs(float(span.solver.b.sum().detach()) - 1) <= 4 * torch.finfo(span.solver.free.dtype).eps


def test_lightning_wraps_a_node_with_a_learned_solver():
    learner = Learner(NeuralODE(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), solver=moved(2)))
    data = DataLoader(TensorDataset(*points()), batch_size=12)
    trainer(1, MinimumTime(weight=0.1)).fit(learner, data)
    (span,) = tm.spans(learner)
    assert isinstance(span.solver, tm.LearnableSolver) and isinstance(learner, pl.LightningModule)
    assert span.solver.free.grad is not None


def test_groups_give_the_coefficients_a_rate_of_their_own():
    _, span = made("mlp")
    groups = tm.parameter_groups(span, lr=0.1, span_lr=0.02, solver_lr=0.003, weight_decay=0.5)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 0.5), (0.02, 0.0), (0.003, 0.0)]
    assert groups[2]["params"] == [span.node.solver.free]


@pytest.mark.parametrize("make", ["doubling", "lyapunov"])
@pytest.mark.parametrize("kind", ["mlp", "keyword"])
def test_penalties_compare_with_steps_of_rk4_and_have_the_gradients_of_differences(make, kind):
    solver = moved(3)
    model, span = made(kind, solver)
    span.eval()
    penalty = tm.StepDoubling(span) if make == "doubling" else None
    lyapunov = None if penalty else tm.LyapunovRegularizer(span, SquaredDistance(), 2.0, detach_potential=False)
    target = torch.zeros_like(model.x)

    def loss():
        t_eval, sol = span(model.x)
        return penalty.penalty() if penalty else lyapunov.penalty(t_eval, sol, target)

    value = loss()
    assert value.item() > 0
    gradients = torch.autograd.grad(value, [span.t_f, solver.free, *model.parameters], allow_unused=True)
    if make == "doubling":  # along the path of the ODE itself, the solver plays no part
        assert gradients[1] is not None and bool(gradients[1].any())
    one = [torch.ones((), dtype=torch.float64)]
    cases = [("t_f", [span.t_f], one, gradients[:1])]
    cases += [("theta", model.parameters, directions_like(model.parameters), gradients[2:])]
    if gradients[1] is not None:
        cases += [("free", [solver.free], directions_like([solver.free]), gradients[1:2])]

    # The denominator of step doubling is held constant: a difference sees it move, by as much as the value is large.
    held = span(model.x)[1][-1].detach().square().mean()

    def shown():
        with torch.enable_grad():
            shown = loss().detach()
            return shown * span(model.x)[1][-1].detach().square().mean() / held if make == "doubling" else shown

    for name, tensors, directions, found in cases:
        total = sum(float((g * d).sum()) for g, d in zip(found, directions, strict=True))
        scale = sum(float(g.square().sum()) for g in found) ** 0.5
        assert_close(total, difference(shown, tensors, directions), scale, 1e-6, name)


def test_two_ranks_train_alike_and_as_one(tmp_path):
    """DistributedDataParallel on two processes (gloo), each with half of a batch; the field takes no time."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    paths = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]  # a hang ends here
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), outputs
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    alone = [value for stages in (1, 3) for value in _train(stages, 0, 1)]
    assert seen[0] == pytest.approx(alone, abs=1e-12)


def _train(stages, rank, world):
    """Five steps of SGD; returns the coefficients and t_f."""
    _, span = made("mlp", moved(stages), learn_t0=True)
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = nn.parallel.DistributedDataParallel(span) if world > 1 else span
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        t_eval, sol = trained(x[rank::world])
        (sol[-1].square().mean() + 0.1 * t_eval[-1]).backward()
        optimizer.step()
    return [*span.node.solver.free.detach().flatten().tolist(), span.t_f.item()]


if __name__ == "__main__":
    own, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=own, world_size=2)
    (folder / f"{own}.json").write_text(json.dumps([v for stages in (1, 3) for v in _train(stages, own, 2)]))
    torch.distributed.destroy_process_group()
