"""The search for the fewest evaluations: trained on small tasks, and its loop on figures that are written down."""

import contextlib
import copy
import io
import itertools
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn
from torch.nn.functional import cross_entropy
from torchdyn.core import NeuralODE
from torchdyn.datasets import generate_concentric_spheres

import torchdyn_mintime as tm
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
            # The reference of the search is solved in float64 at 1e-7, the states of the model are of float32.
            assert independent_error(model, x) <= 0.1 + 1e-5
        errors = [solver_error(model, x) for x in (batch[0], kept[0])]
        assert max(errors) == pytest.approx(trial.solver_error, rel=1e-3)
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
        found.append([(t.label, t.passed, t.iterations, round(t.solver_error, 4)) for t in verdict.trials])
    assert found[0] == found[1] and len(found[0]) > 3


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
    assert verdict.best.loss <= verdict.target and settled.iterations >= 200  # two windows of 100


@pytest.mark.parametrize(("solvers", "allowed"), [([], {"rk4"}), (["midpoint"], {"rk4", "midpoint"})])
def test_only_the_solvers_that_may_be_taken_are(solvers, allowed):
    verdict = Shallowest(5.0, solver_tol=0.5, solvers=solvers).fit(span_of(), square, [X], progress=False)
    assert {t.solver for t in verdict.trials} == allowed and verdict.best.evaluations == 4 - 2 * bool(solvers)


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


@pytest.mark.parametrize(
    "batches",
    [lambda: (x for x in X.split(8)), lambda: [{"x": X, "y": 0}], lambda: [(X, "anything")], lambda: [[X]]],
    ids=["generator", "dict", "tuple", "list"],
)
def test_batches_of_any_kind(batches):
    verdict = Shallowest(5.0, solver_tol=0.5).fit(span_of(), square, batches(), progress=False, max_iterations=200)
    assert verdict.feasible


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
    assert search.status().startswith("2 x midpoint: loss 0.0687 (target 0.05), iteration 662")

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


def test_a_passed_span_says_what_the_interval_is_and_a_look_in_eval_mode_does_not():
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Sequential(nn.Linear(3, 3)), solver="rk4"))
    span.eval()
    span(torch.randn(4, 3), torch.linspace(0, 2, 2))
    span.train()
    set_steps(span, 3)
    span(torch.randn(4, 3), torch.linspace(0, 5, 11))
    torch.testing.assert_close(span.grid().detach(), torch.linspace(0, 5, 4))


def test_set_steps_keeps_the_interval():
    span = span_of()
    set_steps(span, 3, "midpoint")
    torch.testing.assert_close(span.grid().detach(), torch.linspace(0, 1, 4))
    span(torch.randn(4, 3))
    assert span.nfe == 6


@pytest.mark.parametrize(("options", "shown"), [({}, True), ({"progress": False}, False)])
def test_the_progress_is_shown_on_request_and_by_default(options, shown, monkeypatch):
    made = []

    class Recorded(shallowest.Progress):
        def __init__(self, **settings):
            made.append(settings)
            super().__init__(**{**settings, "disable": True})

    monkeypatch.setattr(shallowest, "Progress", Recorded)
    Shallowest(target=10.0, solver_tol=5.0, solvers=[]).fit(span_of(), criterion, [annuli(8)], **options)
    assert made == [{"disable": not shown, "transient": True}]


def test_a_foreign_state_is_refused_and_changes_nothing():
    search = Shallowest(target=0.1)
    with pytest.raises(ValueError, match=r"no state of a Shallowest: .*'trials'.* are missing; got the keys \['a'\]"):
        search.load_state_dict({"a": 1})
    assert search.trials == [] and not search.done
