"""The search for the fewest evaluations: trained on small tasks, and its loop on figures that are written down."""

import contextlib
import io
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchdyn.core import NeuralODE
from torchdyn.datasets import generate_concentric_spheres

import torchdyn_mintime as tm
from torchdyn_mintime.core.reference import exact_solves, solver_error
from torchdyn_mintime.depth import searched_model, shallowest
from torchdyn_mintime.depth.shallowest import Shallowest, set_steps
from torchdyn_mintime.depth.verification import Verification


def annuli(n=128):
    x, y = generate_concentric_spheres(n, noise=1e-2, dim=2, inner_radius=0.5, outer_radius=1)
    return torch.cat([x, torch.zeros(n, 1)], 1), y.long()


def span_of(solver="rk4", steps=100) -> tm.LearnableSpan:
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3))
    with contextlib.redirect_stdout(io.StringIO()):
        return tm.wrap(NeuralODE(net, solver=solver), torch.linspace(0, 1, steps + 1))


def criterion(out, batch):
    return cross_entropy(out[1][-1][:, :2], batch[1])


def test_annuli_needs_two_evaluations_and_is_still_its_own_ode():
    batch, span = annuli(), span_of()
    verdict = Shallowest(target=0.02, solver_tol=0.15).fit(span, criterion, [batch], lr=0.03, progress=False)
    assert verdict.feasible and verdict.best.passed
    assert verdict.best.evaluations <= 4  # 2 on most seeds
    with torch.no_grad():
        assert criterion(span(batch[0]), batch).item() == pytest.approx(verdict.best.loss, rel=1e-4)
        with exact_solves(span):
            exact = criterion(span(batch[0]), batch).item()
    assert max(exact, verdict.best.loss) <= 0.02
    assert solver_error(span, batch[0]) <= 0.15
    assert span.nfe == verdict.best.evaluations
    assert span.t_f.requires_grad
    assert str(verdict.best.evaluations) in str(verdict)


def test_an_unreachable_bound_ends_with_what_was_tried_and_says_so(caplog):
    batch = annuli(32)
    search = Shallowest(target=1e-7, solver_tol=1e-3, max_steps=2, patience=5)
    verdict = search.fit(span_of(), criterion, [batch], progress=False, max_iterations=300)
    assert not verdict.feasible
    assert [t.steps for t in verdict.trials][:2] == [1, 2]
    assert not any(t.passed for t in verdict.trials)
    assert "NOT found" in str(verdict) and "NOT found" in caplog.text


def test_an_absurd_learning_rate_is_backed_off_from(caplog):
    caplog.set_level(logging.INFO)
    batch, span = annuli(), span_of()
    verdict = Shallowest(target=0.05, solver_tol=0.2).fit(
        span, criterion, [batch], lr=3.0, progress=False, max_iterations=500
    )
    assert "learning rate times" in caplog.text
    assert all(torch.isfinite(p).all() for p in span.parameters())
    assert math.isfinite(verdict.best.loss)


def test_stop_and_resume_in_the_middle_is_the_same_search(tmp_path):
    batch = annuli(64)

    def drive(search, span, optimizer, n):
        for _ in range(n):
            if search.done:
                return
            loss = criterion(span(batch[0]), batch)
            optimizer.zero_grad()
            (loss + search.penalty()).backward()
            optimizer.step()
            search.step(loss, lambda: criterion(span(batch[0]), batch))

    def begin():
        torch.manual_seed(3)
        span = span_of()
        return span, torch.optim.Adam(span.parameters(), lr=0.03), Shallowest(target=0.05, solver_tol=0.2)

    span, optimizer, search = begin()
    search.start(span, optimizer)
    drive(search, span, optimizer, 70)
    other, other_optimizer, first = begin()
    first.start(other, other_optimizer)
    drive(first, other, other_optimizer, 30)
    saved = {"m": other.state_dict(), "o": other_optimizer.state_dict(), "s": first.state_dict()}
    torch.save(saved, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    third, third_optimizer, resumed = begin()
    third.load_state_dict(saved["m"])
    third_optimizer.load_state_dict(saved["o"])
    resumed.load_state_dict(saved["s"])
    resumed.start(third, third_optimizer)
    drive(resumed, third, third_optimizer, 40)
    for a, b in zip(span.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.trials == search.trials


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
    assert solver_error(span, saved["x"]) == pytest.approx(verdict.best.solver_error, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(target=0), ValueError, "target"),
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


def test_one_lucky_batch_is_no_proof():
    x = torch.randn(128, 3)
    y = 0.5 * x + 0.3 * torch.randn(128, 3)  # the mean squared error cannot fall below .09 on all of them
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 128, 4)]
    search = Shallowest(target=0.05, solver_tol=0.2, max_steps=1, patience=60)
    loss = nn.functional.mse_loss
    verdict = search.fit(span_of(), lambda out, b: loss(out[1][-1], b[1]), batches, progress=False, max_iterations=300)
    assert not verdict.feasible


def test_a_passed_span_says_what_the_interval_is_and_a_look_in_eval_mode_does_not():
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Sequential(nn.Linear(3, 3)), solver="rk4"))
    span.eval()
    span(torch.randn(4, 3), torch.linspace(0, 2, 2))
    span.train()
    set_steps(span, 3)
    span(torch.randn(4, 3), torch.linspace(0, 5, 11))
    torch.testing.assert_close(span.grid().detach(), torch.linspace(0, 5, 4))


def test_the_solver_found_is_saved_and_times_come_back_as_they_were():
    span = span_of()
    span.t_f.requires_grad_(False)
    verdict = Shallowest(target=10.0, solver_tol=5.0).fit(span, criterion, [annuli(16)], progress=False)
    assert verdict.best.solver == "midpoint" and not span.t_f.requires_grad
    other = span_of()
    other.load_state_dict(span.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(other(x)[1], span(x)[1])


def test_a_learnable_start_is_frozen_too():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 11), learn_t0=True)
    verdict = Shallowest(target=0.6, solver_tol=0.2).fit(
        span, criterion, [annuli(32)], progress=False, max_iterations=200
    )
    span(torch.randn(4, 3))
    assert span.t0.item() == 0.0 and span.nfe == verdict.best.evaluations
    assert span.t0.requires_grad and span.t_f.requires_grad


def test_set_steps_keeps_the_interval():
    span = span_of()
    set_steps(span, 3, "midpoint")
    torch.testing.assert_close(span.grid().detach(), torch.linspace(0, 1, 4))
    span(torch.randn(4, 3))
    assert span.nfe == 6


def test_a_solve_that_fails_again_and_again_ends_the_search():
    def fails(out, batch):
        raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")

    search = Shallowest(target=0.1, max_steps=1)
    verdict = search.fit(span_of(), fails, [annuli(16)] * 40, progress=False)
    assert search.done and not verdict.feasible and len(search.trials) == 1


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


# --------------------------------------------------------------------------------------- the loop, on figures written down
#
# The numbers in these tests are the rules themselves, not the module's constants: a constant that is changed fails here.


class Penalty:
    """Stands in the place of StepDoubling: as much of its bound as is written down."""

    of_bound = 0.0
    made: list[int]

    def __init__(self, model, weight, refinement):
        self.refinement = refinement
        self.made.append(refinement)

    def penalty(self):
        return torch.tensor(self.of_bound * 0.01)  # of a solver_tol of 0.1


class Script:
    """A search for the target 1 over a model that is not trained.

    Attributes:
        looks: what the looks at the exact solution find, in turn; the last one is found again and again.
        looked: at which iteration of which depth a look was taken.
        model, optimizer, search: of the search.
    """

    def __init__(self, monkeypatch, looks=(), penalty=0.0, solver="rk4", **options):
        monkeypatch.setattr(searched_model, "StepDoubling", Penalty)
        monkeypatch.setattr(shallowest, "verify", self.look)
        Penalty.of_bound, Penalty.made = penalty, []
        self.looks, self.looked = list(looks) or [Verification(False, math.inf)], []
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = tm.wrap(NeuralODE(nn.Linear(1, 1), solver=solver), torch.linspace(0, 1, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.search = Shallowest(target=1.0, solver_tol=0.1, **options)
        self.search.start(self.model, self.optimizer)

    def look(self, model, measure, **bounds):
        trial = self.search.trials[-1]
        self.looked.append((trial.solver, trial.steps, trial.iterations))
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
    def rate(self):
        return self.optimizer.param_groups[0]["lr"]

    @property
    def restarts(self):
        return self.search.state_dict()["restarts"]


def falls_once(first, then):
    """A loss that falls at once, and then stays."""
    return lambda i: first if i == 1 else then


@pytest.fixture
def script(monkeypatch):
    return lambda *args, **options: Script(monkeypatch, *args, **options)


def test_a_training_that_learns_nothing_begins_again_three_times_each_time_more_slowly(script):
    one = script(patience=20, max_steps=1)
    # A stall is seen at iteration 22. Three times it begins again, then the rate is lowered twice, then the depth ends.
    assert one.run(5.0) == 3 * 22 + 22 + 21 + 21
    assert one.restarts == 3 and one.search.done
    assert one.rate == pytest.approx(0.3**3 * 0.3**2)


@pytest.mark.parametrize(("share", "restarts"), [(0.31, 3), (0.29, 0)])
def test_a_loss_below_three_tenths_of_the_first_has_begun_to_learn(script, share, restarts):
    one = script(patience=20, max_steps=1)
    one.run(falls_once(100.0, 100.0 * share))
    assert one.restarts == restarts


def test_near_the_bounds_the_rate_is_lowered_twice_and_far_from_them_once(script):
    near, far = (script(patience=20, max_steps=1) for _ in range(2))
    # The means have followed at iteration 91 and 88; from there it is 21 iterations a stall.
    assert near.run(falls_once(40.0, 9.0)) == 91 + 21 * 3
    assert far.run(falls_once(40.0, 11.0)) == 88 + 21 * 2
    assert near.restarts == far.restarts == 0
    assert near.rate == pytest.approx(0.3**2) and far.rate == pytest.approx(0.3)


def test_a_depth_is_given_up_after_ten_times_the_patience_however_slowly_it_still_improves(script):
    one = script(patience=20, max_steps=1)
    assert one.run(lambda i: 100 * math.exp(-5e-3 * i)) == 201
    assert one.rate == 1.0


def test_the_patience_is_at_least_a_pass_over_the_batches(script):
    """The mean loss of a pass settles no sooner than in a pass, however short the patience is."""
    one = script([Verification(True, 0.5)], patience=20, solvers=[])
    one.search.batches_seen_together = 100
    met = one.run(lambda i: max(20 * 0.9**i, 0.5))
    assert one.looked == [("rk4", 1, met)] and one.search.trials[0].passed
    stalled = script(patience=20, max_steps=1)
    stalled.search.batches_seen_together = 100
    assert stalled.run(5.0) == 3 * 102 + 102 + 101 + 101


@pytest.mark.parametrize(("loss", "exploded"), [(9.9, False), (10.1, True), (math.nan, True), (math.inf, True)])
def test_a_loss_of_ten_times_the_first_has_exploded(script, loss, exploded):
    one = script()
    one.run(50.0, 1)
    one.run(50.0 * loss, 1)
    assert one.rate == pytest.approx(0.3 if exploded else 1.0)


def test_an_infinite_penalty_has_exploded_too_and_all_processes_hear_of_it(script):
    one = script()
    one.search.reduce = lambda value: math.inf if value == 0.0 else value
    one.run(50.0, 1)
    assert one.rate == pytest.approx(0.3)


def test_a_failed_solve_goes_back_to_the_good_state_of_the_last_tenth_iteration(script):
    one = script()
    weight = next(p for p in one.model.parameters() if p.dim() == 2)

    def loss(i):
        weight.data.fill_(float(i))
        return 50 * 0.9**i if i <= 25 else 50 * 0.9**25

    one.run(loss, 25)
    one.optimizer.state[weight]["momentum_buffer"] = torch.ones(1, 1)
    one.search.diverged("the state is not finite")
    assert weight.item() == 20.0 and one.rate == pytest.approx(0.3)
    assert not one.optimizer.state  # what came after is forgotten


def test_a_training_that_stalls_stays_where_it_is(script):
    one = script(patience=20, max_steps=1)
    weight = next(p for p in one.model.parameters() if p.dim() == 2)
    good = weight.item()
    one.run(falls_once(40.0, 9.0), 106)
    weight.data.add_(1.0)
    one.run(9.0, 20)
    assert one.rate == pytest.approx(0.3) and weight.item() == good + 1.0
    one.search.diverged("the state is not finite")
    assert weight.item() == good and one.rate == pytest.approx(0.3**2)


def test_a_depth_that_fails_again_and_again_is_given_up_at_the_ninth_time(script):
    one = script(max_steps=1)
    calls = 0
    while not one.search.done:
        one.search.diverged("the state is not finite")
        calls += 1
    assert calls == 9 and one.rate == pytest.approx(0.3**8)
    assert not one.search.finish().feasible


@pytest.mark.parametrize(("solver", "refinements"), [("rk4", [2, 4, 8]), ("midpoint", [4, 8]), ("euler", [4, 8])])
def test_a_penalty_that_hides_most_of_the_error_is_refined_up_to_eight_times(script, solver, refinements):
    """A solver of low order begins with four parts a step: half a step shows too little of its error."""
    one = script([Verification(False, 0.5, solver_error=0.2)], penalty=0.9, solver=solver, max_steps=1)
    # 0.2^2 = 0.04 is 4.4 times the penalty of 0.009.
    assert one.run(0.5) == 10 * len(refinements) - 9 and one.search.done
    assert len(one.looked) == len(refinements) and one.restarts == len(refinements) - 1
    assert list(dict.fromkeys(Penalty.made)) == refinements
    assert one.rate == 1.0  # it was not the training's fault


def test_a_penalty_that_hides_a_part_of_the_error_is_scaled(script):
    one = script([Verification(False, 0.5, solver_error=0.15)], penalty=0.9, patience=50, max_steps=1)
    # 0.15^2 is 2.5 times the penalty: corrected, that is 2.25 times its bound, and no look is worth it any more.
    one.run(0.5, 40)
    assert one.looked == [("rk4", 1, 1)] and one.restarts == 0


def test_a_search_goes_up_to_a_depth_that_passes_and_down_from_the_model_found(script, caplog):
    caplog.set_level(logging.INFO)
    passed, failed = Verification(True, 0.5, 0.05, 0.6), Verification(False, 0.7, 0.01, 1.2)
    one = script([failed, passed], penalty=0.0, patience=15)
    weight = next(p for p in one.model.parameters() if p.dim() == 2)
    initial = weight.item()

    def at(value, loss):
        def of(i):
            weight.data.fill_(value)
            return loss

        return of

    one.run(at(1.0, 50.0))  # nothing is learned at one step
    assert weight.item() == initial and one.search.trials[1].steps == 2
    one.run(at(2.0, 0.9), 1)
    failed_look = one.search.trials[1]
    assert (failed_look.loss, failed_look.reference_loss, failed_look.solver_error) == (0.7, 1.2, 0.01)
    one.run(at(3.0, 0.9))
    found = one.search.trials[1]
    assert (found.iterations, found.passed) == (11, True) and one.looked == [("rk4", 2, 1), ("rk4", 2, 11)]
    assert (found.loss, found.reference_loss, found.solver_error) == (0.5, 0.6, 0.05)
    for steps in (2, 3):  # the way down begins with the model found, each time
        trial = one.search.trials[-1]
        assert (trial.solver, trial.steps) == ("midpoint", steps) and weight.item() == 3.0
        assert one.rate == pytest.approx(0.3**3)  # as the depth before it began
        one.run(at(4.0, 40.0))
    assert one.search.done
    verdict = one.search.finish()
    assert verdict.feasible and verdict.best is found and weight.item() == 3.0
    assert one.model.stepper.name == "rk4" and one.model.steps == 2
    assert "2 x rk4 is enough" in caplog.text and "3 x midpoint is not enough" in caplog.text
    assert str(verdict).startswith("found 8 evaluations (2 x rk4): loss 0.5 and 0.6 solved exactly")


def test_on_the_way_down_nothing_begins_again_from_the_start(script):
    """What was found is learned already: a stall lowers the rate."""
    one = script([Verification(True, 0.5)], patience=20)
    one.run(0.5)
    assert one.search.trials[-1].solver == "midpoint"
    assert one.run(4.0) == 22 + 21 + 21
    assert one.restarts == 0


def test_a_loss_that_a_look_finds_too_high_is_not_the_best_of_the_training(script):
    one = script([Verification(False, 1.5)])
    one.run(0.9, 5)
    trial = one.search.trials[0]
    assert (trial.loss, trial.reference_loss, trial.solver_error) == (0.9, math.inf, math.inf)


def test_without_a_measure_the_losses_stay_those_of_the_training(script):
    one = script([Verification(True, 0.0, 0.01)], solvers=[])
    one.search.penalty()
    one.search.step(0.9)
    trial = one.search.trials[0]
    assert (trial.passed, trial.loss, trial.reference_loss) == (True, 0.9, math.inf)


def test_the_weight_of_the_penalty_is_that_of_the_stage(script):
    one = script(penalty=0.5)
    first = one.search.penalty().item()
    assert first == pytest.approx(1.0 / 0.01 * 0.005)  # target / tolerance^2
    one.search.step(5.0)
    assert one.search.penalty().item() == pytest.approx(first * math.exp(-0.02))


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
    assert (state["restarts"], state["rung"]["refinement"]) == (0, 0)
    assert first.item() > 0 and state["rung"]["weight"] != 1.0  # the target over a bound of 1, at first


def test_spans_of_different_adaptive_solvers_cannot_be_searched_together():
    with contextlib.redirect_stdout(io.StringIO()):
        model = nn.Sequential(*(tm.wrap(NeuralODE(nn.Linear(1, 1), solver=name)) for name in ("rk4", "tsit5")))
    search = Shallowest(target=1.0)
    with pytest.raises(ValueError, match="the spans have the solvers rk4, tsit5"):
        search.start(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert search.trials == [] and all(span.t_f.requires_grad for span in tm.spans(model))
