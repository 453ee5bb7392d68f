"""The search for the fewest evaluations: trained on small tasks, and its loop on figures that are written down."""

import contextlib
import copy
import io
import itertools
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torchdyn.core import NeuralODE
from torchdyn.datasets import generate_concentric_spheres

import torchdyn_mintime as tm
from torchdyn_mintime.core import looks_between
from torchdyn_mintime.core.reference import exact_solves, solver_error
from torchdyn_mintime.depth import searched_model, shallowest
from torchdyn_mintime.depth.shallowest import Shallowest, set_steps
from torchdyn_mintime.depth.trials import Depth
from torchdyn_mintime.depth.verification import Verification


def annuli(n=64):
    x, y = generate_concentric_spheres(n, noise=1e-2, dim=2, inner_radius=0.5, outer_radius=1)
    return torch.cat([x, torch.zeros(n, 1)], 1), y.long()


def span_of(solver="rk4", steps=100, dim=3, width=16, **options) -> tm.LearnableSpan:
    net = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))
    with contextlib.redirect_stdout(io.StringIO()):
        return tm.wrap(NeuralODE(net, solver=solver, **options), torch.linspace(0, 1, steps + 1))


def criterion(out, batch):
    return cross_entropy(out[1][-1][:, :2], batch[1])


def square(out, batch):
    return out[1][-1].square().mean()


X = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def independent_error(span, x):
    """The error over the displacement, against scipy's DOP853 at 1e-10 on the trained field."""
    field, end = copy.deepcopy(span.vf).double(), span(x)[1][-1].detach().double()

    def rhs(t, z):
        with torch.no_grad():
            return field(torch.tensor(t), torch.as_tensor(z).view(x.shape)).flatten().numpy()

    ends = (span.t0.item(), span.t_f.item())
    exact = solve_ivp(rhs, ends, x.double().flatten().numpy(), "DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
    return np.linalg.norm(end.flatten().numpy() - exact) / np.linalg.norm(exact - x.double().flatten().numpy())


def drive(search, model, optimizer, batch, iterations, of=criterion):
    for _ in range(iterations):
        if search.done:
            return
        loss = of(model(batch[0]), batch)
        optimizer.zero_grad()
        (loss + search.penalty(lambda: of(model(batch[0]), batch))).backward()
        optimizer.step()
        search.step(loss, lambda: of(model(batch[0]), batch))


def test_annuli_needs_at_most_two_evaluations_and_every_depth_of_the_front_is_true():
    batch, span, kept = annuli(128), span_of(width=32), annuli(64)
    search = Shallowest(target=0.02, solver_tol=0.1)
    verdict = search.fit(span, criterion, [batch], lr=0.03, held_out=[kept], progress=False)
    assert verdict.feasible and verdict.best.passed and verdict.best.evaluations <= 2
    assert [t.evaluations for t in verdict.front] == [16, 8, 4, 3, 2, 1][: len(verdict.front)]
    own = {name: value.clone() for name, value in span.state_dict().items() if isinstance(value, torch.Tensor)}
    for trial in verdict.front:
        model = search.take(evaluations=trial.evaluations)
        for x, y in (batch, kept):
            with torch.no_grad():
                assert criterion(model(x), (x, y)) <= 0.02
                assert model.nfe == trial.evaluations
                with exact_solves(model):
                    assert criterion(model(x), (x, y)) <= 0.02
            # The search is sure of its figure to 1e-4 and holds that against the model; its states are of float32.
            assert independent_error(model, x) <= 0.1 + 1e-5
        errors = [solver_error(model, x) for x in (batch[0], kept[0])]
        assert max(errors) == pytest.approx(trial.solver_error, abs=1e-4)
        assert model.t_f.requires_grad
    assert all(torch.equal(value, span.state_dict()[name]) for name, value in own.items())
    span(batch[0])
    assert span.nfe == verdict.best.evaluations and span.t_f.requires_grad
    best = search.best
    assert best is not span and torch.equal(best(batch[0])[1][-1], span(batch[0])[1][-1])
    with pytest.raises(ValueError, match="no depth with evaluations=None and solver_tol=1e-09 has passed; passed have"):
        search.take(solver_tol=1e-9)
    tight = min(t.solver_error for t in verdict.front)
    assert search.take(solver_tol=tight)(batch[0]) is not None


def test_an_offset_of_the_state_changes_no_verdict():
    """The field sees the state without its offset: the same ODE, and the same search to rounding."""

    class Shifted(nn.Module):
        def __init__(self, net, offset):
            super().__init__()
            self.net, self.offset = net, offset

        def forward(self, t, x, **kwargs):
            return self.net(x - self.offset)

    found = []
    for offset in (0.0, 64.0):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        span = tm.wrap(NeuralODE(Shifted(net, offset), solver="rk4"), torch.linspace(0, 1, 101).double())

        def loss(out, x, offset=offset):
            return (out[1][-1] - offset).square().mean()

        verdict = Shallowest(0.2).fit(span, loss, [X.double() + offset], progress=False, max_iterations=150)
        found.append(verdict.trials)
    assert [(t.label, t.passed) for t in found[0]] == [(t.label, t.passed) for t in found[1]] and len(found[0]) > 3
    for one, other in zip(*found, strict=True):
        # The fit of a learned solver magnifies the rounding of the offset.
        assert one.solver_error == pytest.approx(other.solver_error, rel=0.2) or not one.passed


def test_without_a_target_the_loss_settles_and_the_target_is_that_and_some_slack():
    torch.manual_seed(1)
    span = span_of()
    y = 0.5 * X + 0.2 * torch.randn(16, 3)
    loss = lambda out, batch: (out[1][-1] - batch[1]).square().mean()  # noqa: E731
    with torch.no_grad():
        first = loss(span(X), (X, y)).item()
    verdict = Shallowest(slack=0.1, solvers=[]).fit(span, loss, [(X, y)], progress=False, max_iterations=3000)
    assert verdict.feasible
    settled = verdict.trials[0]
    reached = max(settled.loss, settled.reference_loss)
    assert verdict.target == pytest.approx(reached + 0.1 * (first - reached), rel=1e-3)
    assert verdict.best.loss <= verdict.target and settled.iterations >= 400  # two windows of 100 at each rate


@pytest.mark.parametrize(("solvers", "allowed"), [([], {"rk4"}), (["midpoint"], {"rk4", "midpoint"})])
def test_only_the_solvers_that_may_be_taken_are(solvers, allowed):
    verdict = Shallowest(5.0, solver_tol=0.5, solvers=solvers).fit(span_of(), square, [X], progress=False)
    assert {t.solver for t in verdict.trials} == allowed and verdict.best.evaluations == 4 - 2 * bool(solvers)


@pytest.mark.parametrize(
    ("solvers", "taken"), [(["rk4", "midpoint"], {"rk4", "midpoint"}), (["learned"], {"rk4", "learned"})]
)
def test_solvers_that_are_named_take_the_place_of_an_adaptive_one(solvers, taken):
    span = span_of("tsit5", steps=1)
    verdict = Shallowest(target=0.3, solvers=solvers).fit(span, criterion, [annuli()], progress=False)
    assert verdict.feasible and verdict.best.evaluations <= 4
    assert {trial.solver.split("-")[0] for trial in verdict.trials} <= taken
    span(annuli()[0])
    assert not span.adaptive and span.nfe == verdict.best.evaluations


def test_where_nothing_is_found_an_adaptive_solver_is_there_again():
    span = span_of("tsit5", steps=1)
    before = span.interval
    verdict = Shallowest(target=1e-6, solvers=["rk4"]).fit(
        span, criterion, [annuli()], max_iterations=3, progress=False
    )
    assert not verdict.feasible and span.stepper.name == "tsit5" and span.interval == before


def test_the_search_ends_with_its_budget_and_what_it_has():
    search = Shallowest(1e-9, budget=0.2)
    verdict = search.fit(span_of(), square, [X], progress=False)
    assert search.done and not verdict.feasible
    assert 0.2 <= sum(t.seconds for t in verdict.trials) < 5


def state_of(span, optimizer=None):
    return (
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in span.state_dict().items()},
        {name: p.requires_grad for name, p in span.named_parameters() if "solver" not in name},
        {name: m.training for name, m in span.named_modules() if "solver" not in name},
        span.node.sensitivity,
        span.by_autograd,
    )


class Stop(Exception):
    """A fault of the user's own."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("found", [True, False])
def test_whatever_ends_it_the_model_is_whole(error, found):
    span = span_of("midpoint", 20)
    net = next(m for m in span.modules() if isinstance(m, nn.Sequential))
    net[1].eval()
    _, needs, modes, *rest = state_of(span)
    calls = itertools.count()

    def loss(out, batch):
        if len(search.trials) > 3 or next(calls) > 60:
            raise error
        return square(out, batch)

    search = Shallowest(0.5 if found else 1e-9, solver_tol=0.5)
    with pytest.raises(error):
        search.fit(span, loss, [X], progress=False)
    _, needs_after, modes_after, *rest_after = state_of(span)
    assert (needs_after, modes_after, rest_after) == (needs, modes, rest)
    span(X)
    best = search.best
    if found:
        trial = [t for t in search.trials if t.passed][-1]
        assert span.nfe == trial.evaluations
        assert square(span(X), X).item() == pytest.approx(trial.loss, rel=1e-5)
    else:
        assert best is None and span.nfe == 40 and span.stepper.name == "midpoint"
        assert span.interval == span_of("midpoint", 20).interval


def test_an_optimizer_of_the_users_own_gets_its_rates_and_steps_back():
    span = span_of()
    optimizer = torch.optim.Adam(span.parameters(), lr=0.05)
    before = [len(h) for h in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)]
    search = Shallowest(1e-9)
    search.start(span, optimizer)
    assert not span.t_f.requires_grad
    drive(search, span, optimizer, (X,), 3, square)
    search.diverged("the state is not finite")
    drive(search, span, optimizer, (X,), 3, square)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.3)
    search.finish()
    assert optimizer.param_groups[0]["lr"] == 0.05 and span.t_f.requires_grad
    assert [len(h) for h in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)] == before
    search.finish()  # a second time changes nothing


def test_losses_below_zero_and_targets_below_zero():
    loss = lambda out, batch: square(out, batch) - 3.0  # noqa: E731
    verdict = Shallowest(-2.8, solver_tol=0.2).fit(span_of(), loss, [X], progress=False, max_iterations=600)
    assert verdict.feasible and verdict.best.loss <= -2.8
    assert verdict.best.evaluations <= 4
    verdict = Shallowest(0.0, solver_tol=0.2).fit(span_of(), loss, [X], progress=False, max_iterations=600)
    assert verdict.feasible


class Counted:
    """Knows how many there are, and can be gone through once."""

    def __init__(self, items):
        self.items = iter(items)
        self.length = len(items)

    def __len__(self):
        return self.length

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.items)


@pytest.mark.parametrize(
    "batches",
    [
        lambda: (x for x in X.split(8)),
        lambda: Counted(X.split(8)),
        lambda: [{"x": X, "y": 0}],
        lambda: [(X, "anything")],
        lambda: [[X]],
    ],
    ids=["generator", "counted", "dict", "tuple", "list"],
)
def test_batches_of_any_kind(batches):
    verdict = Shallowest(5.0, solver_tol=0.5).fit(span_of(), square, batches(), progress=False, max_iterations=200)
    assert verdict.feasible


def test_batches_that_are_gone_after_a_pass_are_refused_and_the_model_is_whole():
    class Spent(Counted):
        def __iter__(self):
            return self.items

    span, calls = span_of(), []
    loss = lambda out, batch: calls.append(batch) or square(out, batch)  # noqa: E731
    with pytest.raises(ValueError, match="batches gave no batch when gone through again; give a list, or a loader"):
        Shallowest(1e-9).fit(span, loss, Spent(X.split(4)), progress=False)
    assert {x.shape for x in calls} == {(4, 3)} and span.t_f.requires_grad


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "batches is empty; give at least one"),
        (iter(()), ValueError, "batches is empty; give at least one"),
        (X, TypeError, r"got a tensor: pass \[x\] for one batch"),
        (["abc"], ValueError, "a batch must be x, .* got str"),
        ([{}], ValueError, "a batch must be x, .* got dict"),
    ],
)
def test_batches_that_cannot_be_used_are_refused_and_nothing_is_changed(batches, error, match):
    span = span_of()
    before, *rest = state_of(span)
    with pytest.raises(error, match=match):
        Shallowest(1.0).fit(span, square, batches, progress=False)
    after, *rest_after = state_of(span)
    assert rest_after == rest and before.keys() == after.keys()


def test_held_out_data_and_losses_of_every_sample_are_refused_as_they_are():
    with pytest.raises(TypeError, match=r"held_out must be .* got a tensor: pass \[x\] for one batch"):
        Shallowest(1.0).fit(span_of(), square, [X], held_out=X, progress=False)
    with pytest.raises(ValueError, match=r"the loss must be one number; got the shape \(16, 3\): take its mean"):
        Shallowest(1.0).fit(span_of(), lambda out, batch: out[1][-1].square(), [X], progress=False)


def test_a_field_without_parameters_is_refused():
    span = tm.wrap(NeuralODE(nn.Tanh(), solver="rk4"), torch.linspace(0, 1, 3))
    with pytest.raises(ValueError, match="LearnableSpan has no parameters to train but its times; unfreeze its field"):
        Shallowest(1.0).fit(span, square, [X])
    assert span.t_f.requires_grad and span.steps == 2


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_a_node_under_an_adjoint_is_trained_by_autograd_and_gets_its_setting_back(sensitivity):
    torch.manual_seed(5)
    ours, twin = span_of(sensitivity=sensitivity), span_of()
    twin.load_state_dict(ours.state_dict(), strict=False)
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for span in (ours, twin):
        verdict = Shallowest(0.5, solver_tol=0.2).fit(span, square, [X], progress=False, max_iterations=120)
        assert verdict.feasible
    assert ours.node.sensitivity == sensitivity and not ours.by_autograd
    # Bit-equal to a search under autograd.
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), twin.parameters(), strict=True))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.spans = nn.ModuleList([span_of("rk4", 10), span_of("midpoint", 10)])

    def forward(self, x):
        for span in self.spans:
            t_eval, sol = span(x)
            x = sol[-1]
        return t_eval, sol


def test_of_several_spans_each_has_a_depth_of_its_own_and_the_total_counts():
    model = Two()
    search = Shallowest(0.5, solver_tol=0.3, solvers=[])
    verdict = search.fit(model, square, [X], progress=False, max_iterations=400)
    assert verdict.trials[0].label == "4 x rk4 + 8 x midpoint" and verdict.feasible
    assert [span.stepper.name for span in model.spans] == ["rk4", "midpoint"]
    model(X)
    assert sum(span.nfe for span in model.spans) == verdict.best.evaluations < 32
    taken = search.take(evaluations=32)
    taken(X)
    assert sum(span.nfe for span in taken.spans) == 32


def resumed_at(stop, after, tmp_path, target, tol):
    """Stops a search where ``stop(trial)`` holds, and compares it to one that went on: the trials so far."""
    batch = annuli(32)

    def begin():
        torch.manual_seed(3)
        span = span_of()
        return span, torch.optim.Adam(span.parameters(), lr=0.03), Shallowest(target=target, solver_tol=tol)

    def save(search, span, optimizer):
        torch.save({"m": span.state_dict(), "o": optimizer.state_dict(), "s": search.state_dict()}, tmp_path / "c.pt")

    span, optimizer, search = begin()
    search.start(span, optimizer)
    while not stop(search.trials[-1]):
        assert not search.done
        drive(search, span, optimizer, batch, 1)
    save(search, span, optimizer)
    before = len(search.trials)
    drive(search, span, optimizer, batch, after)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    third, third_optimizer, resumed = begin()
    third.load_state_dict(saved["m"])
    third_optimizer.load_state_dict(saved["o"])
    resumed.load_state_dict(saved["s"])
    resumed.start(third, third_optimizer)
    drive(resumed, third, third_optimizer, batch, after)
    for (name, a), b in zip(span.state_dict().items(), third.state_dict().values(), strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b), name
    for each in (*search.trials, *resumed.trials):
        each.seconds = 0.0
    assert resumed.trials == search.trials and len(search.trials) >= before
    assert resumed.finish().best == search.finish().best


@pytest.mark.parametrize(
    "stop",
    [
        lambda trial: trial.iterations == 7,
        lambda trial: trial.iterations == 25,
        lambda trial: trial.label == "2 x rk4" and trial.iterations == 0,
        lambda trial: trial.every[0].stages == 3 and trial.iterations == 0,
        lambda trial: trial.every[0].stages and trial.iterations == 12,
    ],
    ids=["warming up", "first depth", "between", "before a fit", "learned depth"],
)
def test_stop_and_resume_in_the_middle_is_the_same_search(stop, tmp_path):
    resumed_at(stop, 40, tmp_path, 0.3, 0.1)


def test_a_search_of_an_older_version_goes_on_in_the_middle():
    """Saved by version 0.1.0 as it tried midpoint, after two steps of rk4 had passed."""
    saved = torch.load(Path(__file__).parent / "data" / "search_in_the_middle.pt", weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, 11))
    optimizer, search = torch.optim.Adam(span.parameters(), lr=0.05), Shallowest(target=0.05, solver_tol=0.05)
    span.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    search.load_state_dict(saved["search"])
    search.start(span, optimizer)
    assert search.status().startswith("2 x midpoint: lowest loss 0.0687 (target 0.05), iteration 662")

    def loss():
        return span(saved["x"])[1][-1].square().mean()

    value = loss()
    assert span.nfe == 4
    optimizer.zero_grad()
    (value + search.penalty()).backward()
    optimizer.step()
    search.step(value, loss)
    verdict = search.finish()
    tried = [(t.steps, t.solver, t.iterations, t.passed) for t in verdict.trials]
    assert tried == [(1, "rk4", 620, False), (2, "rk4", 30, True), (2, "midpoint", 13, False)]
    assert verdict.feasible and verdict.best.evaluations == 8 and verdict.iterations == 663
    # What was found is loaded, and is what the trial says.
    assert loss().item() == pytest.approx(verdict.best.loss, rel=1e-4) and span.nfe == 8
    # Version 0.1 measured the error relative to the state.
    assert solver_error(span, saved["x"], relative_to="state") == pytest.approx(verdict.best.solver_error, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(target=math.inf), ValueError, "target"),
        (dict(slack=-0.1), ValueError, "slack"),
        (dict(budget=0.0), ValueError, "budget"),
        (dict(target=math.nan), ValueError, "target"),
        (dict(target=0.1, solver_tol=-1), ValueError, "solver_tol"),
        (dict(target=0.1, solver_tol=10.1), ValueError, "at most 10; got 10.1"),
        (dict(target=0.1, solver_tol=0.9e-7), ValueError, "at least 1e-07"),
        (dict(target="low"), TypeError, "target"),
        (dict(target=0.1, solvers=["dopri5"]), ValueError, "dopri5"),
        (dict(target=0.1, solvers=["nonsense"]), ValueError, "nonsense"),
        (dict(target=0.1, solvers="midpoint"), TypeError, "a list of names, .* got 'midpoint'"),
        (dict(target=0.1, solvers=["midpoint", 3]), TypeError, "a list of names, .* got .*3"),
        (dict(target=0.1, max_steps=0), ValueError, "max_steps"),
        (dict(target=0.1, patience=0), ValueError, "patience"),
        (dict(target=0.1, accept=True), TypeError, "accept must be a function without arguments; got True"),
    ],
)
def test_bad_bounds(options, error, match):
    with pytest.raises(error, match=match):
        Shallowest(**options)


def test_bad_models():
    search = Shallowest(target=0.1)
    with pytest.raises(RuntimeError, match="not started"):
        search.finish()
    with pytest.raises(ValueError, match="no LearnableSpan"):
        search.fit(nn.Linear(2, 2), criterion, [annuli(8)])


@pytest.mark.parametrize("name", ["max_steps", "patience"])
def test_old_arguments_are_taken_with_a_warning(name):
    with pytest.warns(FutureWarning, match=f"Shallowest chooses {name} by itself; leave it out"):
        search = Shallowest(target=0.1, **{name: 8})
    assert getattr(search, name) == 8


def test_an_optimizer_is_clipped_and_warmed_up_and_the_learned_solver_stepped_beside_it():
    """Gradients to the norm 2; twenty steps to the full rate; 0.03 for the coefficients, whose rate is lowered too."""
    span = span_of(dim=1)
    parameters = [p for p in span.parameters() if p is not span.t_f]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    searched = searched_model.SearchedModel(span, optimizer)
    searched.lay([Depth("learned-3", 1)])
    free, seen = span.solver.free, []
    searched.share_gradients = lambda gradients: seen.append([g.clone() for g in gradients])
    for i in range(25):
        before, coefficients = parameters[0].detach().clone(), free.detach().clone()
        for p in parameters:
            p.grad = torch.zeros_like(p)
        parameters[0].grad.fill_(100.0)
        free.grad = torch.full_like(free, 100.0)
        optimizer.step()
        whole = torch.cat(
            [(parameters[0] - before).flatten(), free.grad.flatten() if free.grad is not None else before.new_zeros(0)]
        )
        size = 2.0 * math.sqrt(len(before) / (len(before) + free.numel())) * min(1, (i + 1) / 20)
        assert whole.norm().item() == pytest.approx(size, rel=1e-4)
        # Adam's step is of the size of its rate, where the gradient is the same each time.
        assert (free - coefficients).abs().max().item() == pytest.approx(0.03, rel=1e-2)
        assert optimizer.param_groups[0]["lr"] == 1.0
    assert len(seen) == 25 and seen[0][0].eq(100.0).all()
    searched.scale_rates(0.5)
    assert searched._coefficients.param_groups[0]["lr"] == 0.015
    searched.release(True)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_with_a_closure_is_the_step_after_a_backward(kind):
    """Lightning computes the gradients in the optimizer's step: they are clipped, and learned solvers stepped, all the same."""

    def trained(by_closure):
        torch.manual_seed(2)
        span = span_of()
        optimizer = kind([p for p in span.parameters() if p is not span.t_f], lr=0.1)
        searched = searched_model.SearchedModel(span, optimizer)
        searched.lay([Depth("learned-3", 1)])
        for _ in range(5):

            def closure():
                optimizer.zero_grad()
                (loss := 1e3 * square(span(X), None)).backward()
                return loss

            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        searched.release(True)
        return [p.detach().clone() for p in span.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_a_search_with_lbfgs_leaves_its_gradients_alone():
    span = span_of()
    optimizer = torch.optim.LBFGS([p for p in span.parameters() if p is not span.t_f], line_search_fn="strong_wolfe")
    searched = searched_model.SearchedModel(span, optimizer)
    searched.lay([Depth("learned-3", 1)])
    seen, shared = [], []
    searched.share_gradients = lambda gradients: shared.append(gradients[0].clone())

    def closure():
        optimizer.zero_grad()
        (loss := 1e3 * square(span(X), None)).backward()
        seen.append(loss.item())
        last[:] = [span.solver.free.grad.clone()]
        return loss

    last = []
    for steps in range(1, 26):
        optimizer.step(closure)
        assert len(shared) == steps and torch.equal(shared[-1], last[0])  # that of the last call, and not a sum
    assert seen[-1] < 1e-3 * seen[0]
    searched.release(True)


def test_a_learning_rate_that_is_a_tensor_stays_one_and_is_given_back():
    torch.manual_seed(0)
    found = []
    for rate in (0.1, torch.tensor(0.1)):
        torch.manual_seed(1)
        span, search = span_of(), Shallowest(target=0.4)
        optimizer = torch.optim.Adam([p for p in span.parameters() if p is not span.t_f], lr=rate)
        search.start(span, optimizer)
        drive(search, span, optimizer, annuli(32), 30)
        search._slower("of a test")
        lowered = float(optimizer.param_groups[0]["lr"])
        assert lowered == pytest.approx(0.03)
        search.finish()
        assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.1)
        found.append([p.detach().clone() for p in span.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # Adam computes with a float32 rate


def test_a_search_is_of_one_model():
    search, batch = Shallowest(target=0.65), annuli(16)
    first, second = span_of(), span_of()
    search.fit(first, criterion, [batch], max_iterations=3, progress=False)
    state = {name: value.clone() for name, value in second.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="this search is that of another model; make a new Shallowest for each model"):
        search.fit(second, criterion, [batch], progress=False)
    now = second.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in state.items()) and second.t_f.requires_grad
    again = Shallowest(target=0.65)
    again.load_state_dict(search.state_dict())
    again.fit(
        second, criterion, [batch], max_iterations=6, progress=False
    )  # a state is of whatever model it is loaded for
    assert again.trials[0].iterations > 3 or again.done


def test_a_stream_of_batches_is_kept():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*annuli(16), strict=True))

    search = Shallowest(target=0.65)
    search.fit(span_of(), criterion, torch.utils.data.DataLoader(Stream(), 8), max_iterations=3, progress=False)
    assert search.batches_seen_together == 2


def test_a_passed_span_says_what_the_interval_is_and_a_look_in_eval_mode_does_not():
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Sequential(nn.Linear(3, 3)), solver="rk4"))
    span.eval()
    span(torch.randn(4, 3), torch.linspace(0, 2, 2))
    span.train()
    set_steps(span, 3)
    span(torch.randn(4, 3), torch.linspace(0, 5, 11))
    torch.testing.assert_close(span.grid().detach(), torch.linspace(0, 5, 4))


@pytest.mark.parametrize(("weight", "share"), [(0.0, 1.0), (3.0, 1.0), (3.0, 0.25)])
def test_what_is_added_is_the_reference_loss_and_twice_the_weighted_penalty(weight, share):
    """With the loss at the steps it is twice the mean that is trained; what is not that loss is divided by its share."""
    span = span_of().double()
    span.node.vf.vf.vf.insert(0, nn.BatchNorm1d(3).double())
    searched = searched_model.SearchedModel(span, torch.optim.SGD(span.parameters(), lr=1.0))
    searched.lay([Depth("midpoint", 1)])
    x = X.double()
    taken = span(x)[1][-1]
    statistics = span.node.vf.vf.vf[0].running_mean.clone()
    added = searched.objective(weight, 64, lambda: span(x)[1][-1].square().mean(), share)
    assert torch.equal(statistics, span.node.vf.vf.vf[0].running_mean) and span.nfe == 2
    layer = span.node.vf.vf.vf
    set_steps(span, 64, "rk4")
    with torch.no_grad():
        end = span(x)[1][-1]
    assert layer[0].training
    penalty = (taken - end).square().mean() / (end - x).square().mean()
    assert searched.penalty == pytest.approx(penalty.item(), rel=1e-9)
    assert searched.reference_loss == pytest.approx(end.square().mean().item(), rel=1e-9)
    expected = (end.square().mean() + 2 * weight * penalty) / share
    assert added.item() == pytest.approx(expected.item(), rel=1e-9)
    searched.release(True)


def test_a_new_learned_solver_is_fitted_to_the_reference_before_it_is_trained():
    """Of a rotation by 2 rad three stages of order 2 are 1 + 2i - 2 - 8 c i, with c free: the optimum has the sine right."""
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, -2.0], [2.0, 0.0]]))
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(net, solver="rk4"), torch.tensor([0.0, 1.0]))
    searched = searched_model.SearchedModel(span, torch.optim.SGD(span.parameters(), lr=1.0))
    searched.lay([Depth("learned-3", 1)])
    x = X[:, :2]
    optimum = abs(-1 - math.cos(2)) / math.hypot(math.cos(2) - 1, math.sin(2))
    assert solver_error(span, x) > 1.05 * optimum
    span(x)
    searched.objective(1.0, 16)
    assert solver_error(span, x) == pytest.approx(optimum, rel=1e-4)  # of float32
    assert torch.equal(net.weight.detach(), torch.tensor([[0.0, -2.0], [2.0, 0.0]])) and net.weight.requires_grad
    searched.release(True)


def rotation(solver):
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0, -2.0], [2.0, 0.0]]))
    with contextlib.redirect_stdout(io.StringIO()):
        return tm.wrap(NeuralODE(net, solver=solver), torch.tensor([0.0, 1.0]))


def test_a_solve_backward_fits_the_solver_of_the_way_back():
    solver, back = tm.LearnableSolver(3, order=1), tm.LearnableSolver(3, order=1)
    solver.direction, back.direction, solver.other = 1, -1, back
    span = rotation(solver)
    searched = searched_model.SearchedModel(span, torch.optim.SGD(span.parameters(), lr=1.0))
    searched.lay([Depth("learned-3", 1)])
    forward, backward = solver.free.detach().clone(), back.free.detach().clone()
    span(X[:, :2], torch.tensor([1.0, 0.0]))
    searched.objective(1.0, 16)
    assert torch.equal(solver.free, forward) and not torch.equal(back.free, backward)
    assert (solver.direction, back.direction) == (1, -1) and back.free.grad is None
    searched.release(True)


def test_a_fit_that_is_undone_says_nothing_of_a_direction(monkeypatch):
    span = rotation(tm.LearnableSolver(3, order=1))
    searched = searched_model.SearchedModel(span, torch.optim.SGD(span.parameters(), lr=1.0))
    searched.lay([Depth("learned-3", 1)])
    free = span.solver.free.detach().clone()

    def astray(optimizer, closure):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].add_(5.0)

    monkeypatch.setattr(torch.optim.LBFGS, "step", astray)
    span(X[:, :2])
    searched.objective(1.0, 16)
    assert span.solver.direction == 0 and torch.equal(span.solver.free, free)
    searched.release(True)


def test_set_steps_keeps_the_interval():
    span = span_of()
    set_steps(span, 3, "midpoint")
    torch.testing.assert_close(span.grid().detach(), torch.linspace(0, 1, 4))
    span(torch.randn(4, 3))
    assert span.nfe == 6


@pytest.mark.parametrize(("options", "shown"), [({}, True), ({"progress": False}, False)])
def test_the_progress_is_shown_on_request_and_by_default(options, shown, monkeypatch):
    wanted, said = [], []

    @contextlib.contextmanager
    def recorded(progress):
        wanted.append(progress)
        yield lambda *what: said.append(what)

    monkeypatch.setattr(shallowest, "progress_shown", recorded)
    search = Shallowest(target=-1.0, solvers=[])
    search.fit(span_of(), criterion, [annuli(8)], max_iterations=3, **options)
    assert wanted == [shown] and [what[1:] for what in said] == [(1, None), (2, None)]
    search.trials[-1].training_loss = math.inf  # a depth that has just begun
    assert search.status() == "4 x rk4: iteration 3"
    assert said[0][0].startswith("4 x rk4: lowest loss ") and "(target -1), iteration 1" in said[0][0]


@pytest.mark.parametrize("as_number", [torch.Tensor.float, torch.Tensor.item])
def test_a_loss_without_a_gradient_is_an_error(as_number):
    with pytest.raises(
        ValueError, match="the loss has no gradient, so it cannot be trained. A count, such as an accuracy"
    ):
        Shallowest(target=0.1).fit(
            span_of(), lambda out, batch: as_number((out[1][-1] > 0).float().mean()), [annuli(8)], progress=False
        )


def test_an_error_of_the_loss_says_how_it_is_called():
    with pytest.raises(AttributeError) as raised:
        Shallowest(target=0.1).fit(span_of(), lambda out, y: y.shape, [annuli(8)], progress=False)
    assert raised.value.__notes__ == ["fit calls loss(model(x), batch), where batch is a whole element of batches"]


def test_a_foreign_state_is_refused_and_changes_nothing():
    search = Shallowest(target=0.1)
    with pytest.raises(ValueError, match=r"no state of a Shallowest: .*'trials'.* are missing; got the keys \['a'\]"):
        search.load_state_dict({"a": 1})
    assert search.trials == [] and not search.done


# --------------------------------------------------------------------------------------- the loop, on figures written down
#
# The numbers in these tests are the rules themselves, not the module's constants: a constant that is changed fails here.


class Script:
    """A search for the target 1 over a model that is not trained, with a patience of 20 and 8 steps at most.

    Attributes:
        penalty: of its bound.
        cost: evaluations of the field in an iteration.
        looks: what the looks at the exact solution find, in turn; the last one is found again and again.
        looked: at which iteration of which depth a look was taken.
        weights, references: of the penalty and steps of the reference, in each iteration.
        compared: the iterations, from 0, in which the model was compared with its reference.
        model, optimizer, search: of the search.
    """

    def __init__(self, monkeypatch, looks=(), penalty=0.0, solver="rk4", cost=1, max_steps=8, patience=20, **options):
        monkeypatch.setattr(shallowest, "verify", self.look)
        self.penalty, self.cost, self.weights, self.references = penalty, cost, [], []
        self.compared = []
        self.looks, self.looked, self.asked = list(looks) or [Verification(False, math.inf)], [], []
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = tm.wrap(NeuralODE(nn.Linear(1, 1), solver=solver), torch.linspace(0, 1, 3))
        self.weight = next(p for p in self.model.parameters() if p.dim() == 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.search = Shallowest(**{"target": 1.0, "solver_tol": 0.1, **options})
        self.search.patience = patience or self.search.patience
        self.search.max_steps = max_steps or self.search.max_steps
        self.search.start(self.model, self.optimizer)
        searched = self.search._require_start()
        searched.objective, searched.nothing_added = self.objective, self.nothing_added

    def objective(self, weight, steps, closure=None, share=1.0):
        searched = self.search._require_start()
        searched.penalty, searched.reference_loss = self.penalty * 0.01, None
        searched.spent += self.cost
        self.weights.append(weight)
        self.references.append(steps)
        self.share = share
        self.compared.append(self.search.trials[-1].iterations)
        return torch.zeros(())

    def nothing_added(self):
        stage, compared = self.search._stage, list(self.compared)
        out = self.objective(stage.weight, stage.reference)
        self.compared = compared
        return out

    def look(self, model, looks, **bounds):
        trial = self.search.trials[-1]
        self.looked.append((trial.label, trial.iterations))
        self.asked.append(bounds)
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def run(self, loss, most=5000):
        """Iterations until the depth ends, or the search. ``loss`` may be a function of the iteration, from 1."""
        depths = len(self.search.trials)
        for i in range(1, most + 1):
            self.search.penalty()
            self.search.step(loss(i) if callable(loss) else loss, lambda: 0.5)
            if self.search.done or len(self.search.trials) > depths:
                return i
        return math.inf

    @property
    def label(self):
        return self.search.trials[-1].label

    @property
    def rate(self):
        return self.optimizer.param_groups[0]["lr"]

    @property
    def restarts(self):
        return self.search.state_dict()["restarts"]

    @property
    def stage(self):
        return self.search.state_dict()["stage"]


def falls_once(first, then):
    """A loss that falls at once, and then stays."""
    return lambda i: first if i == 1 else then


PASSED, FAILED = Verification(True, 0.5, 0.05, 0.6), Verification(False, 0.7, 0.01, 1.2, missed="exact loss")


@pytest.fixture
def script(monkeypatch):
    return lambda *args, **options: Script(monkeypatch, *args, **options)


def beyond_four(script, *args, **options):
    """A search whose first depth rested far from its bounds, and which has gone on to eight steps."""
    one = script(*args, **options)
    one.run(5.0)
    assert one.label == "8 x rk4"
    return one


def test_where_four_steps_rest_far_from_the_bounds_eight_are_tried_from_the_start(script):
    one, other = script(), script()
    initial = one.weight.item()
    one.weight.data.fill_(9.0)
    assert one.run(5.0) == 22 and one.label == "8 x rk4" and one.rate == 1.0  # 20 iterations without progress
    assert one.weight.item() == initial
    other.search.batches_seen_together = 1000
    assert other.run(5.0) == 102  # 100 iterations, were the patience longer
    near = script()
    near.run(1.9, 50)
    assert near.label == "4 x rk4"  # twice the bounds is not far


def test_where_four_steps_left_the_ode_eight_go_on_from_what_was_learned(script):
    one = script(penalty=6.0)
    one.weight.data.fill_(9.0)
    one.run(5.0)
    assert one.label == "8 x rk4" and one.weight.item() == 9.0 and one.rate == 1.0
    broken = script(penalty=6.0)
    initial = broken.weight.item()
    broken.search.batches_seen_together = 3
    broken.search.penalty()
    broken.search.step(5.0)
    broken.weight.data.fill_(9.0)
    broken.search.diverged("a solve failed")
    assert broken.label == "8 x rk4" and broken.weight.item() == initial


def test_without_a_target_too_eight_steps_go_on_from_what_four_have_learned(script):
    one = script([Verification(False, 0.5, 1.0)], target=None)
    one.weight.data.fill_(9.0)
    one.run(lambda i: 5.0 if i == 1 else 1.0)
    assert one.label == "8 x rk4" and one.weight.item() == 9.0


def test_a_training_that_rests_far_raises_its_rate_once_and_then_begins_again_more_slowly_three_times(script):
    one = beyond_four(script)
    assert one.run(5.0, 22) == math.inf and one.rate == 3.0 and one.restarts == 0
    # 21 iterations a stall, and 22 after each new beginning: three beginnings, then a lower rate once or twice, then the end.
    first, last = one.weight.item(), []
    for restarts, rate in ((1, 0.3), (2, 0.09), (3, 0.027)):
        one.weight.data.fill_(9.0)
        while one.restarts < restarts:
            assert one.run(5.0, 1) == math.inf
        assert one.rate == pytest.approx(rate) and one.weight.item() == first
        last.append(one.search.trials[-1].iterations)
    assert [b - a for a, b in itertools.pairwise([22, *last])] == [21, 22, 22]
    assert one.run(5.0) == 22 + 2 * 21 and one.search.done
    assert one.rate == pytest.approx(0.027 * 0.3**2) and one.restarts == 3


def test_the_patience_is_150_iterations_and_64_steps_are_the_most(script):
    one = script(patience=None, max_steps=None)
    assert one.run(1.9, 151) == math.inf and one.rate == 1.0
    assert one.run(1.9, 1) == math.inf and one.rate == pytest.approx(0.3)
    other = script(max_steps=None)
    while not other.search.done:
        other.search.diverged("the state is not finite")
    assert [trial.steps for trial in other.search.trials] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(("share", "restarts"), [(0.31, 3), (0.29, 0)])
def test_a_loss_below_three_tenths_of_the_first_has_begun_to_learn(script, share, restarts):
    one = beyond_four(script)
    one.search._first_loss = 1.0 + 0.9 / share
    one.run(1.9)
    assert one.restarts == restarts


def test_a_training_that_fell_and_rests_far_begins_again_too(script):
    one = beyond_four(script)
    one.search._first_loss, one.search._raised = 1000.0, True
    one.run(9.0, 22 + 21)
    assert one.restarts == 1 and one.rate == pytest.approx(0.1)  # that of the raised rate, over three


def test_a_rotation_is_found_at_a_rate_that_is_too_high_for_it():
    """At .1 the training rests at a fifth of its first loss, at 4 steps as at 8, and raised to .3 it gets worse."""
    torch.manual_seed(0)
    x, turn = torch.randn(64, 2), torch.tensor([[math.cos(3.0), math.sin(3.0)], [-math.sin(3.0), math.cos(3.0)]])
    span = span_of(steps=4, dim=2)
    search, optimizer = Shallowest(0.02, solver_tol=0.1), torch.optim.Adam(span.vf.parameters(), lr=0.1)
    search.start(span, optimizer)
    while not (search.done or search.trials[0].passed or len(search.trials) == 3):
        loss = mse_loss(span(x)[1][-1], x @ turn)
        optimizer.zero_grad()
        (loss + search.penalty(lambda: mse_loss(span(x)[1][-1], x @ turn))).backward()
        optimizer.step()
        search.step(loss, lambda: mse_loss(span(x)[1][-1], x @ turn))
    assert search.finish().feasible


def test_near_the_bounds_the_rate_is_lowered_twice_and_far_from_them_once(script):
    near, far = (beyond_four(script) for _ in range(2))
    for one in (near, far):
        one.search._first_loss, one.search._raised, one.search._restarts = 40.0, True, 3
    assert near.run(9.0) == 22 + 21 * 2 and near.search.done
    assert far.run(11.0) == 22 + 21 and far.search.done
    assert near.rate == pytest.approx(0.3**2) and far.rate == pytest.approx(0.3)


def test_the_first_depth_is_given_up_after_ten_times_the_patience_however_slowly_it_still_improves(script):
    one = script(max_steps=4)
    assert one.run(lambda i: 100 * math.exp(-5e-3 * i)) == 201
    assert one.rate == 1.0


def test_a_first_depth_that_still_improves_has_its_rate_raised_after_400_iterations(script):
    one = script()
    one.search.patience = 100
    one.run(lambda i: 100 * math.exp(-5e-3 * i), 399)
    assert one.rate == 1.0
    one.run(lambda i: 10 * math.exp(-5e-3 * i), 1)
    assert one.rate == 3.0
    one.run(lambda i: 9 * math.exp(-5e-3 * i), 450)
    assert one.rate == 3.0


def test_near_the_bounds_the_rate_is_not_raised(script):
    one = script(patience=1000)
    one.run(1.9, 401)
    assert one.rate == 1.0


@pytest.mark.parametrize(("loss", "rate"), [(0.5, 1.0), (lambda i: 1.9 if i < 23 else 0.5, 0.3)])
def test_a_rate_that_was_lowered_until_a_depth_passed_stays_for_the_next(script, loss, rate):
    one = script([PASSED])
    one.run(loss)
    assert one.label == "2 x rk4" and one.rate == pytest.approx(rate)


def test_the_patience_is_at_least_a_pass_over_the_batches(script):
    """The mean loss of a pass settles no sooner than in a pass, however short the patience is."""
    one = script([PASSED], solvers=[])
    one.search.batches_seen_together = 50
    met = one.run(lambda i: max(20 * 0.9**i, 0.5))
    assert one.looked == [("4 x rk4", met)] and one.search.trials[0].passed
    stalled = script()
    stalled.search.batches_seen_together = 50
    assert stalled.run(5.0) == 52


@pytest.mark.parametrize(("loss", "exploded"), [(9.9, False), (10.1, True), (math.nan, True), (math.inf, True)])
@pytest.mark.parametrize("first", [50.0, 0.01])
def test_a_loss_of_ten_times_the_first_or_the_target_has_exploded(script, first, loss, exploded):
    one = script()
    one.run(first, 1)
    one.run(max(first, 1.0) * loss, 1)
    assert one.rate == pytest.approx(0.3 if exploded else 1.0)


@pytest.mark.parametrize(("loss", "exploded"), [(39.0, False), (41.0, True)])
def test_a_loss_below_zero_explodes_above_itself(script, loss, exploded):
    """Nine times its size above it."""
    one = script(target=-100.0)
    one.run(-5.0, 1)
    one.run(loss, 1)
    assert one.rate == pytest.approx(0.3 if exploded else 1.0)


@pytest.mark.parametrize("reference", [math.nan, math.inf, 501.0])
def test_a_loss_that_explodes_at_the_reference_alone_has_exploded(script, reference):
    one = script()
    one.run(50.0, 1)
    one.search.penalty()
    one.search._require_start().reference_loss = reference
    one.search.step(40.0, lambda: 0.5)
    assert one.rate == pytest.approx(0.3)


def test_an_infinite_penalty_has_exploded_too_and_all_processes_hear_of_it(script):
    one = script()
    one.search.reduce = lambda value: math.inf if value == 0.0 else value
    one.run(50.0, 1)
    assert one.rate == pytest.approx(0.3)


def test_a_failed_solve_goes_back_to_the_good_state_of_the_last_tenth_iteration(script):
    one = script()

    def loss(i):
        one.weight.data.fill_(float(i))
        return 50 * 0.9**i if i <= 25 else 50 * 0.9**25

    one.run(loss, 25)
    one.optimizer.state[one.weight]["momentum_buffer"] = torch.ones(1, 1)
    one.search.diverged("the state is not finite")
    assert one.weight.item() == 20.0 and one.rate == pytest.approx(0.3)
    assert not one.optimizer.state  # what came after is forgotten


@pytest.mark.parametrize("batches", [1, 5])
def test_a_first_depth_that_cannot_solve_a_single_pass_gets_more_steps(script, batches):
    one = script()
    one.search.batches_seen_together = batches
    one.run(5.0, batches - 1)
    one.search.diverged("the state is not finite")
    assert one.label == "8 x rk4"
    other = script()
    other.search.batches_seen_together = batches
    other.run(5.0, batches)
    other.search.diverged("the state is not finite")
    assert other.label == "4 x rk4" and other.rate == pytest.approx(0.3)


def test_a_depth_that_fails_again_and_again_is_given_up_at_the_ninth_time(script):
    one = script()
    one.run(5.0, 1)
    calls = 0
    while not one.search.done:
        one.search.diverged("the state is not finite")
        calls += 1
    assert calls == 9 and one.rate == pytest.approx(0.3**8)
    assert not one.search.finish().feasible


@pytest.mark.parametrize(
    ("missed", "refined"),
    [("solver error", True), ("exact loss", True), ("loss", False), ("accept", False), ("evaluations", False)],
)
def test_the_reference_is_refined_only_where_a_look_missed_what_the_reference_stands_for(script, missed, refined):
    """Where the loss at the steps misses the target the solver error is not measured, and counts as infinite."""
    error = {"solver error": 0.2, "loss": math.inf}.get(missed, 0.05)
    one = script([Verification(False, 1.2, error, missed=missed)])
    one.run(0.5, 60)
    assert len(one.looked) >= 5 and (one.references[-1] > 8) == refined


def test_the_reference_begins_with_four_steps_or_twice_the_models_and_is_refined_up_to_sixty_four(script):
    """0.2^2 = 0.04 is 4.4 times the penalty of 0.009: the reference hides it."""
    one = script([Verification(False, 0.5, solver_error=0.2, missed="solver error")], penalty=0.9)
    one.run(0.5, 60)
    assert list(dict.fromkeys(one.references)) == [8, 16, 32, 64]
    assert one.references.count(8) == 1 and one.references.count(16) == one.references.count(32) == 10
    down = script([PASSED, FAILED])
    down.run(0.5)
    down.run(0.5, 1)
    assert down.label == "2 x rk4" and down.references[-1] == 4


def test_a_search_goes_down_from_the_model_found(script, caplog):
    caplog.set_level(logging.INFO)
    one = script([FAILED, PASSED], solvers=[])

    def at(value, loss):
        def of(i):
            one.weight.data.fill_(value)
            return loss

        return of

    one.run(at(2.0, 0.9), 1)
    failed_look = one.search.trials[0]
    assert (failed_look.loss, failed_look.reference_loss, failed_look.solver_error) == (0.7, 1.2, 0.01)
    one.run(at(3.0, 0.9))
    found = one.search.trials[0]
    assert (found.iterations, found.passed) == (11, True) and one.looked == [("4 x rk4", 1), ("4 x rk4", 11)]
    assert (found.loss, found.reference_loss, found.solver_error) == (0.5, 0.6, 0.05)
    assert one.asked[0]["target"] == 1.0 and one.asked[0]["solver_tol"] == 0.1 and one.asked[0]["evaluations"] == 16
    for label in ("2 x rk4", "3 x rk4"):  # the way down begins with the model found, each time
        assert one.label == label and one.weight.item() == 3.0 and one.rate == 1.0
        one.run(at(4.0, 4.0))
    assert one.search.done
    verdict = one.search.finish()
    assert verdict.feasible and verdict.best is found and one.weight.item() == 3.0
    assert one.model.stepper.name == "rk4" and one.model.steps == 4
    assert "4 x rk4 is enough" in caplog.text and "3 x rk4 is not enough" in caplog.text
    assert str(verdict).startswith("found 16 evaluations (4 x rk4): loss 0.5 and 0.6 solved exactly")


def down(script, first=1, **options):
    """A search that has passed its first depth after some iterations."""
    one = script([PASSED, FAILED], **options)
    one.run(lambda i: 0.5 if i == first else 1.2)
    assert one.label == "2 x rk4"
    return one


def test_on_the_way_down_nothing_begins_again_and_no_rate_is_raised(script):
    """What was found is learned already: a stall lowers the rate once, far from the bounds, and then the depth ends."""
    one = down(script)
    assert one.run(15.0) == 22 + 21 and one.restarts == 0
    assert not one.search.trials[1].passed and one.label == "learned-4"
    assert one.rate == 1.0  # as the depth before it began


def test_a_depth_on_the_way_down_has_twice_the_evaluations_of_the_way_to_it_and_300_iterations_at_least(script):
    """An iteration at 2 x rk4 takes 8 evaluations, and 4 x 4 for its reference."""
    assert down(script, first=9, cost=1000).stage["budget"] == 2 * 9 * 1000
    assert down(script, cost=24).stage["budget"] == 300 * 24


def test_near_its_bounds_a_depth_that_is_hopeless_has_a_lower_rate_once(script):
    one = down(script, cost=100)
    one.search.patience = 1000
    budget = one.stage["budget"]
    assert budget == 7200
    lowered = None
    for _ in range(200):
        ended = one.run(1.5, 1) == 1
        if lowered is None and one.rate < 0.5:
            lowered = one.search.trials[1].spent
            assert one.rate == pytest.approx(0.3)
        if ended:
            break
    assert lowered == budget / 2 and one.search.trials[1].spent <= budget


@pytest.mark.parametrize(("loss", "share"), [(11.0, 1.0), (12.0, 10 / 11), (21.0, 0.5), (math.nan, 0.1)])
def test_on_the_way_down_a_loss_far_above_its_target_has_less_weight_at_the_steps(script, loss, share):
    """By ten units or more; the first iteration, before any loss is known, has a tenth."""
    one = down(script)
    one.search.penalty()
    assert one.share == pytest.approx(0.1)
    one.search.step(loss, lambda: 0.5)
    one.search.penalty()
    assert one.share == pytest.approx(share)


def test_the_first_depth_has_all_its_weight_at_the_steps_and_a_tenth_of_that_of_the_penalty(script):
    one = script()
    one.search.penalty()
    assert one.share == 1.0 and one.weights == [pytest.approx(0.1 * 1.0 / 0.01)]  # a tenth of target / tolerance^2
    one.search.step(500.0, lambda: 0.5)
    one.search.penalty()
    assert one.share == 1.0
    later = down(script)
    later.search.penalty()
    assert later.weights[-1] == pytest.approx(1.0 / 0.01)


def test_far_from_its_bounds_the_first_depth_is_compared_with_its_reference_at_every_fourth_iteration(script):
    far, near = script(), script()
    far.run(2.1, 20)
    assert far.compared == [0, 4, 8, 12, 16]
    near.run(1.9, 6)
    assert near.compared == [0, 1, 2, 3, 4, 5]
    below = down(script)
    del below.compared[:]
    below.run(9.0, 6)
    assert below.compared == [0, 1, 2, 3, 4, 5]


def test_a_loss_that_a_look_finds_too_high_is_not_the_best_of_the_training(script):
    one = script([Verification(False, 1.5)])
    one.run(0.9, 5)
    trial = one.search.trials[0]
    assert (trial.loss, trial.training_loss, trial.reference_loss, trial.solver_error) == (1.5, 0.9, math.inf, math.inf)


def test_without_a_measure_there_is_the_loss_of_the_training_alone(script):
    one = script([Verification(True, -math.inf, 0.01, -math.inf)], solvers=[])
    one.search.penalty()
    one.search.step(0.9)
    trial = one.search.trials[0]
    assert (trial.passed, trial.loss, trial.training_loss, trial.reference_loss) == (True, math.inf, 0.9, math.inf)


@pytest.mark.parametrize(
    ("loss", "penalty", "missed", "words"),
    [
        (1.5, 0.5, "loss", "the loss missed the target"),
        (0.9, 1.5, "solver error", "the solver error was above the tolerance"),
    ],
)
def test_a_depth_that_no_look_has_seen_says_which_bound_it_missed_over_the_last_iterations(
    script, caplog, loss, penalty, missed, words
):
    caplog.set_level(logging.INFO)
    one = script([PASSED, FAILED])
    one.run(0.5)
    one.penalty = penalty
    one.run(loss)
    trial = one.search.trials[1]
    assert (trial.passed, trial.missed) == (False, missed)
    assert f"2 x rk4 is not enough: {words}" in caplog.text
    assert f", {words}, lowest loss in training {trial.training_loss:.4g}" in str(one.search.finish()).splitlines()[2]


def test_what_the_last_look_says_stays_while_the_training_is_within_its_bounds(script):
    one = script([Verification(False, 0.9, 0.05, missed="accept")])
    one.run(0.5, 15)
    assert one.looked[-1] == ("4 x rk4", 11) and one.search.trials[0].missed == "accept"
    one.run(3.0, 60)
    assert one.search.trials[0].missed == "loss"
    one.search.diverged("the state is not finite")
    assert one.search.trials[0].missed == "solve"


def test_a_metric_that_was_not_looked_at_has_not_missed_its_target(script):
    one = script()
    one.search.judge = lambda: 0.1
    one.run(3.0, 60)
    assert one.search.trials[0].missed == "training loss"


def test_once_a_loss_has_settled_the_last_look_says_what_is_missing(script):
    one = script([Verification(False, 0.5, 0.2, 0.6, missed="solver error")], target=None)
    one.run(settling(0.0), 400)
    assert one.search.trials[0].missed == "settling"
    one.run(settling(0.0), 50)
    assert one.search.trials[0].missed == "solver error"


def test_an_adaptive_solver_misses_its_number_of_steps(script):
    one = script(solver="tsit5", penalty=200.0)  # in hundredths: its bound is 1
    one.run(0.5, 30)
    assert one.search.trials[0].missed == "evaluations"


@pytest.mark.parametrize(("sign", "mode"), [(1.0, "max"), (-1.0, "min")])
def test_a_metric_that_gets_worse_in_training_names_the_other_mode(script, sign, mode):
    one = script([Verification(True, 0.9 * sign, 0.01, 0.9 * sign)], target=None)
    one.search.judge, one.search.figure, one.search.sign = (lambda: 0.1), "f1", sign
    one.search._judged = 0.1 * sign, math.inf
    worse = Verification(True, 0.9, 0.01, 0.9) if sign > 0 else Verification(True, -0.05, 0.01, -0.05)
    one.looks[:] = [worse]
    now = "0.9" if sign > 0 else "0.05"
    with pytest.warns(UserWarning, match=f"f1 was 0.1 before the training and is {now} after it.*mode to '{mode}'"):
        one.run(settling(0.0), 500)


# ----------------------------------------------------------------------------------------------------- without a target


def settling(fall):
    """A loss that falls from 11 to 1 at once, and by ``fall`` in 100 iterations from there."""
    return lambda i: 11.0 if i == 1 else 2.0 - fall / 100 * i


@pytest.mark.parametrize(("fall", "rate"), [(0.08, 0.3), (0.105, 1.0)])
def test_a_loss_has_settled_where_it_falls_by_less_than_a_hundredth_of_all_its_fall_in_a_hundred_iterations(
    script, fall, rate
):
    """9 to 9.3 is all its fall: 1 % of that is 0.09. The first iteration counts in the first mean until the 201st."""
    early, one = script([PASSED], target=None), script([PASSED], target=None)
    assert early.run(settling(fall), 200) == math.inf and early.rate == 1.0
    assert one.run(settling(fall), 201) == math.inf and one.rate == pytest.approx(rate)


def test_a_loss_that_has_settled_is_trained_at_a_lower_rate_until_it_settles_again_which_says_the_target(script):
    one = script([PASSED], target=None)
    # 2 until the 201st iteration, then a fall by 0.5 in 100 iterations, which ends at 1 with the 401st.
    path = lambda i: 11.0 if i == 1 else max(1.0, 2.0 - max(0, i - 201) / 200)  # noqa: E731
    settled = one.run(path)
    # From i = 401 on the mean of 100 iterations falls by (601 - i)^2 / 40,000 - (501 - i)^2 / 40,000 in another 100, and by
    # (601 - i)^2 / 40,000 from the 501st on: less than 0.1 from the 538th.
    assert settled == 538 and one.looked == [("4 x rk4", settled)]
    assert one.search.target == pytest.approx(0.6 + 0.02 * (11 - 0.6))
    assert one.rate == pytest.approx(0.3) and one.label == "2 x rk4"  # the way down begins at the lower rate


def test_where_the_settled_model_is_no_true_one_the_penalty_is_made_four_times_as_heavy_three_times(script):
    one = script([Verification(False, 0.5, 0.2, 0.6)], target=None)
    one.run(settling(0.0), 900)
    found = [label for label, _ in one.looked]
    iterations = [i for label, i in one.looked if label == "4 x rk4"]
    assert iterations == [401, 501, 601, 701] and found.count("4 x rk4") == 4
    unit = 0.02 * 9.0  # the slack of the fall from 11 to 2
    assert [one.weights[i] for i in (450, 550, 650)] == [pytest.approx(4.0**n * unit / 0.01) for n in (1, 2, 3)]
    assert [one.references[i] for i in (400, 450, 550, 650)] == [8, 16, 32, 64]
    assert one.search.trials[1].label == "8 x rk4"


def test_a_settled_model_that_misses_another_bound_is_trained_more_slowly(script):
    one = script([Verification(False, 0.5, 0.05, 0.6)], target=None)
    one.run(settling(0.0), 400)
    assert one.rate == pytest.approx(0.3)
    one.run(settling(0.0), 1)
    assert one.rate == pytest.approx(0.3**2) and one.references[-1] == 8


def test_half_the_budget_is_late_and_settles_the_loss_as_it_is(script, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shallowest, "perf_counter", lambda: now[0])
    one = script([PASSED], target=None, budget=10.0)

    def loss(i):
        now[0] += 1.0
        return 100.0 / i

    assert one.run(loss) == 5 and one.search.trials[0].passed and not one.search.done
    assert one.run(5.0, 1) == math.inf
    one.run(loss)
    assert one.search.done and now[0] == 10.0


# ------------------------------------------------------------------------------------------------------------ the others


def test_an_adaptive_solver_counts_steps_and_is_never_refined(monkeypatch):
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Linear(1, 1), solver="tsit5"), torch.linspace(0, 1, 3))
    search = Shallowest(target=1.0)
    search.start(span, torch.optim.SGD(span.parameters(), lr=1.0))
    monkeypatch.setattr(shallowest, "verify", lambda *_, **__: Verification(False, 0.5, solver_error=5.0))
    span(torch.zeros(2, 1))
    first = search.penalty()
    search.step(0.5, lambda: 0.5)
    state = search.state_dict()
    assert search.trials[0].steps == 2 and search.trials[0].evaluations == 14
    assert (state["restarts"], state["stage"]["reference"]) == (0, 4)
    assert first.item() > 0


def test_spans_of_different_adaptive_solvers_cannot_be_searched_together():
    with contextlib.redirect_stdout(io.StringIO()):
        model = nn.Sequential(*(tm.wrap(NeuralODE(nn.Linear(1, 1), solver=name)) for name in ("rk4", "tsit5")))
    search = Shallowest(target=1.0)
    with pytest.raises(ValueError, match="the spans have the solvers rk4, tsit5"):
        search.start(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert search.trials == [] and all(span.t_f.requires_grad for span in tm.spans(model))


def test_the_penalty_compares_ends_without_dropout():
    """Masks change with every evaluation, and two solves with other masks are of two fields."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3)).double()
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 5).double())
    searched = searched_model.SearchedModel(span, torch.optim.Adam(span.parameters()))
    searched.lay([Depth("rk4", 2)])
    x = X.double()
    penalties = []
    for mode in (True, True, False):
        span.train(mode)
        span(x)
        searched.objective(1.0, 4)
        penalties.append(searched.penalty)
    assert penalties[0] == penalties[1] == pytest.approx(penalties[2], rel=1e-12) and penalties[0] > 0
    searched.release(False)


class Series(nn.Module):
    """Sees the state at t = 0.1 and at the end, at times that the node is asked for."""

    def __init__(self, solver="rk4", **options):
        super().__init__()
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        with contextlib.redirect_stdout(io.StringIO()):
            self.node = NeuralODE(net, solver=solver)
        self.options = options

    def forward(self, x):
        sol = self.node(x, torch.tensor([0.0, 0.1, 1.0]), **self.options)[1]
        return torch.cat([sol[1], sol[-1]], 1)


def series_loss(out, batch):
    return mse_loss(out, batch[1])


def test_states_between_the_ends_must_be_at_times_of_their_own():
    x = torch.randn(64, 2)
    batch = x, torch.cat([0.9 * x, 0.4 * x], 1)
    model = tm.wrap(Series())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="node\\(x, times, dense=True\\)"):
        Shallowest(target=0.01).fit(model, series_loss, [batch], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.node.t_f.requires_grad and not model.node.pinned
    model = tm.wrap(Series(dense=True))
    verdict = Shallowest(target=0.01).fit(model, series_loss, [batch], lr=0.03, progress=False)
    assert verdict.feasible and verdict.best.evaluations < 16
    assert model.node(x, torch.tensor([0.0, 0.1, 1.0]), dense=True)[0].tolist() == pytest.approx([0, 0.1, 1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: -torch.distributions.Normal(z, 0.1).log_prob(y).mean(),  # which refuses what is NaN
        lambda z, y: (z - y).square().nanmean(),  # which leaves it out
    ],
)
def test_states_between_are_seen_whatever_a_loss_does_with_nan(loss):
    x = torch.randn(8, 2)
    y = torch.cat([x, x], 1)
    model = tm.wrap(Series())
    assert looks_between(model, lambda: loss(model(x), y))
    assert not looks_between(model, lambda: loss(model(x)[:, 2:], x))
    model = tm.wrap(Series(dense=True))
    assert not looks_between(model, lambda: loss(model(x), y))


def test_a_model_that_refuses_nan_or_draws_numbers_of_its_own_may_still_use_the_end_alone():
    x, draws = torch.randn(8, 2), np.random.default_rng(0)

    class Strict(Series):
        def forward(self, x):
            sol = self.node(x)[1]
            if not sol.isfinite().all():
                raise ValueError("a state is not finite")
            return sol[-1]

    model = tm.wrap(Strict())
    assert not looks_between(model, lambda: model(x).square().mean())
    assert not looks_between(model, lambda: model(x).square().mean() + draws.random())


class Gaps(nn.Module):
    """As an ODE-RNN between its observations: one node, called once for each gap."""

    def __init__(self, gaps, points=3, **options):
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        with contextlib.redirect_stdout(io.StringIO()):
            self.node = NeuralODE(net, solver="rk4", return_t_eval=False)
        self.jump, self.gaps, self.points, self.options = nn.Linear(2, 2), gaps, points, options

    def forward(self, x):
        for gap in self.gaps:
            first, last = gap if isinstance(gap, tuple) else (0.0, gap)
            span = None if gap is None else torch.linspace(first, last, self.points)
            x = self.node(self.jump(x), span, **self.options)[-1]
        return x


def mean_square(out, batch):
    return out.square().mean()


@pytest.mark.parametrize(
    ("gaps", "template", "match"),
    [
        ([0.2, 2.0], None, r"asks node for \[0, 2\] and for \[0, 0.2\], .* 'If the intervals differ'"),
        ([0.2, 2.0], 2.0, r"asks node for \[0, 0.2\] and for \[0, 2\], .* 'If the intervals differ'"),
        ([0.2, 2.0], 0.2, r"asks node for \[0, 2\] and for \[0, 0.2\], .* 'If the intervals differ'"),
        ([(0.0, 0.5), (0.5, 1.0)], 1.0, r"asks node for \[0, 0.5\] and for \[0.5, 1\]"),
        ([None, 0.5], 1.0, r"asks node for \[0, 0.5\] and for \[0, 1\]"),
        ([0.5], 1.0, r"asks node for \[0, 0.5\], which is not its interval \[0, 1\].*template"),
    ],
)
def test_a_node_that_is_asked_for_other_intervals_is_refused(gaps, template, match):
    x, bare = torch.randn(8, 2), Gaps(gaps)
    model = tm.wrap(bare, None if template is None else torch.linspace(0, template, 11))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        Shallowest(target=1.0).fit(model, mean_square, [x], progress=False)
    search = Shallowest(target=1.0)
    search.start(model, torch.optim.Adam(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is cut is said too
        loss = model(x).square().mean()
    with pytest.raises(ValueError, match=match):
        search.penalty(lambda: model(x).square().mean())
    search.finish()
    assert loss.isfinite() and model.node.t_f.requires_grad and not model.node.pinned
    if template is not None:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compress_refuses_a_node_that_is_asked_for_different_intervals():
    model, x = Gaps([0.2, 2.0]), torch.randn(8, 2)
    with pytest.raises(ValueError, match="If the intervals differ"):
        tm.compress(model, [x], lambda z: z.square().mean(), target=1.0, progress=False)


def test_a_span_that_rests_at_its_template_is_refused_for_another_one():
    """It is solved over whatever is passed, which no search keeps; a learned t_f cuts it before the search and after."""
    model, x = tm.wrap(Gaps([2.0, 2.0]), torch.linspace(0, 1, 11)), torch.randn(8, 2)
    refuse = searched_model.refuse_other_intervals
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuse(model, lambda: model(x))
    model.node.t_f.requires_grad_(False)
    with pytest.raises(ValueError, match=r"\[0, 2\], which is not its interval \[0, 1\]"):
        refuse(model, lambda: model(x))


@pytest.mark.parametrize(
    ("gaps", "template", "options"),
    [
        ([0.5, 0.5], None, {}),
        ([0.5, (0.5, 0.0)], None, {}),  # there and back
        ([1.0, None], 1.0, {}),
        ([0.5, 1.0, (0.25, 0.75)], 1.0, {"dense": True}),
        ([1.0, 0.5], None, {"dense": True}),
    ],
)
def test_a_node_that_is_asked_for_one_interval_twice_is_not_refused(gaps, template, options):
    model = tm.wrap(Gaps(gaps, **options), None if template is None else torch.linspace(0, template, 11))
    x = torch.randn(8, 2)
    verdict = Shallowest(target=50.0, solver_tol=5.0, solvers=["rk4"]).fit(
        model, mean_square, [x], max_iterations=2, progress=False
    )
    assert verdict.feasible
    # The steps of a learned interval are laid to its t_f, and what is passed means it all the same.
    model = tm.wrap(Gaps([1.0, None]), torch.linspace(0, 1, 11))
    with torch.no_grad():
        model.node.t_f.fill_(0.45)
    searched_model.refuse_other_intervals(model, lambda: model(x))


@pytest.mark.parametrize("first", [0, 1])
def test_dense_times_beyond_the_interval_are_refused_where_they_are_seen(first):
    """They need more steps than are laid. Before, each depth was given up after a long training for its evaluations."""

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = tm.wrap(Gaps([]), torch.linspace(0, 1, 5)).node

        def forward(self, given):
            return self.node(given[0], given[1], dense=True)

    x = torch.randn(16, 2)
    batches = [((x, torch.tensor([0.0, 0.3, end])),) for end in (1.0, 2.0)]
    model = Asking()
    with pytest.raises(
        ValueError, match=r"asks node by dense=True for times from 0 to 2, beyond its interval \[0, 1\]"
    ):
        Shallowest(target=1e3, solver_tol=5.0).fit(
            model, mean_square, batches[:: -1 if first else 1], max_iterations=20, progress=False
        )
    assert model.node.t_f.requires_grad and not model.node.pinned and model.node.interval.template[-1] == 1.0


@pytest.mark.parametrize("points", [3, 6])
def test_a_series_has_a_row_for_each_time_asked_before_and_after_a_search(points):
    class Asking(Gaps):
        def forward(self, x):
            return self.node(x, times, dense=True)

    times, x = torch.linspace(0, 2, points) ** 1.2, torch.randn(8, 2)
    model = tm.wrap(Asking([]))
    assert len(model.eval()(x)) == points
    verdict = Shallowest(target=50.0, solver_tol=5.0).fit(
        model, lambda out, batch: (out - times[:, None, None]).square().mean(), [x], max_iterations=5, progress=False
    )
    assert verdict.feasible and len(model(x)) == len(model.train()(x)) == points
    assert model.node.last.grid.returned == pytest.approx(times.tolist())


@pytest.mark.parametrize("steps", [1, 4])
def test_the_penalty_of_a_node_is_the_sum_over_its_calls(steps):
    """Each call's steps are compared with the reference from its own state, the states being those of the reference."""
    model = tm.wrap(Gaps([0.5, 0.5, 0.5])).double()
    x = X[:, :2].double()
    searched = searched_model.SearchedModel(model, torch.optim.SGD(model.parameters(), lr=1.0))
    searched.lay([Depth("midpoint", steps)])
    loss = model(x).square().mean()
    counted = model.node.node.vf.nfe
    last = model.node.last
    added = searched.objective(3.0, 64, lambda: model(x).square().mean())
    assert model.node.last is last and model.node.node.vf.nfe == counted
    gradient = torch.autograd.grad(added, model.node.vf.parameters())
    exact, by_steps = copy.deepcopy(model.node), copy.deepcopy(model.node)
    set_steps(exact, 64, "rk4")
    penalty, z = 0.0, x
    for _ in range(3):
        z = model.jump(z)
        end, taken = exact(z)[-1], by_steps(z)[-1]
        penalty += (taken - end).square().mean() / (end - z).detach().square().mean()
        z = end
    assert searched.penalty == pytest.approx(penalty.item(), rel=1e-6) and loss.isfinite()
    assert searched.reference_loss == pytest.approx(z.square().mean().item(), rel=1e-9)
    (z.square().mean() + 6 * penalty).backward()
    for own, parts in zip(gradient, zip(exact.vf.parameters(), by_steps.vf.parameters(), strict=True), strict=True):
        torch.testing.assert_close(own, parts[0].grad + parts[1].grad, rtol=1e-6, atol=1e-9)
    # That it is called three times is known from now on.
    calls = []
    searched.objective(3.0, 64, lambda: calls.append(1) or model(x).square().mean())
    assert len(calls) == 1 and searched.penalty == pytest.approx(penalty.item(), rel=1e-6)
    searched.release(True)


@pytest.mark.parametrize("asked", [[0.3, 0.6], [0.7, 0.2], [1.0, 0.25, 0.5], [0.2, 1.0]], ids=str)
@pytest.mark.parametrize("by", ["save_at", "span"])
def test_the_reference_is_seen_at_the_rows_of_the_times_asked_for(asked, by):
    """The reference is that of the end: another row is not that, in whatever order they are asked for."""
    if by == "span" and asked != sorted(asked):
        pytest.skip("a span ascends, or descends as a whole")
    torch.manual_seed(0)
    span, x = (
        tm.LearnableSpan(NeuralODE(nn.Linear(2, 2).double(), solver="rk4"), torch.linspace(0, 1, 3)),
        X[:, :2].double(),
    )

    def loss():
        given = {"save_at": asked} if by == "save_at" else {"t_span": torch.tensor([0.0, *asked], dtype=torch.float64)}
        sol = span(x, dense=True, **given)[1]
        return (sol * torch.arange(1, len(sol) + 1)[:, None, None]).square().mean()

    searched = searched_model.SearchedModel(span, torch.optim.SGD(span.parameters(), lr=1.0))
    searched.lay([Depth("rk4", 16)])
    plain = loss().item()
    searched.objective(0.0, 64, loss)
    # To the error of the reference, and of 16 steps.
    assert searched.reference_loss == pytest.approx(plain, rel=1e-5)
    searched.release(True)


def test_a_model_that_calls_its_node_for_each_of_many_even_gaps_is_found():
    """Before, the ends of all calls were compared with that of the last one, and nothing was found."""
    torch.manual_seed(0)
    model, x = tm.wrap(Gaps([0.25] * 4)), torch.randn(32, 2)
    verdict = Shallowest(target=0.05).fit(
        model, lambda out, batch: (out - 0.5 * x).square().mean(), [x], lr=0.03, max_iterations=150, progress=False
    )
    assert verdict.feasible and verdict.best.evaluations <= 4


def test_the_look_for_states_between_leaves_no_trace():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.span, self.norm = span_of(dim=2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(self.span(x + 0.1 * torch.randn_like(x))[1][-1])

    model, x = Noisy(), torch.randn(8, 2)
    model(x)
    state, last, random = copy.deepcopy(model.state_dict()), model.span.last, torch.get_rng_state()
    assert not looks_between(model, lambda: model(x).square().mean())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.span.last is last and torch.equal(torch.get_rng_state(), random) and model.training


def test_another_target_than_that_of_the_state_is_said():
    batch = torch.randn(16, 2), torch.zeros(16, dtype=torch.long)
    search, model = Shallowest(target=0.5), span_of(dim=2)
    search.fit(model, criterion, [batch], max_iterations=2, progress=False)
    with pytest.warns(UserWarning, match=r"its own target, 0\.5, and not with 0\.9"):
        Shallowest(target=0.9).load_state_dict(search.state_dict())
    Shallowest(target=0.5).load_state_dict(search.state_dict())
