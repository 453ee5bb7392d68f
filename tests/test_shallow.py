"""The search for the fewest evaluations."""

import contextlib
import io
import logging
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchdyn.core import NeuralODE
from torchdyn.datasets import generate_concentric_spheres

import torchdyn_mintime as tm
from torchdyn_mintime.diagnostics import solver_error
from torchdyn_mintime.lightning import MinimumTime
from torchdyn_mintime.lightning import Shallowest as FindShallowest
from torchdyn_mintime.shallow import Shallowest, referenced, set_steps


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
        with referenced(span):
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


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(target=0), ValueError, "target"),
        (dict(target=math.nan), ValueError, "target"),
        (dict(target=0.1, solver_tol=-1), ValueError, "solver_tol"),
        (dict(target="low"), TypeError, "target"),
        (dict(target=0.1, solvers=["dopri5"]), ValueError, "dopri5"),
        (dict(target=0.1, solvers=["nonsense"]), ValueError, "nonsense"),
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


def test_referenced_gives_the_odes_own_end():
    span = span_of("euler", 1).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    exact = tm.wrap(NeuralODE(span.vf, solver="dopri5", atol=1e-9, rtol=1e-9), torch.tensor([0.0, 1.0]).double())
    with torch.no_grad():
        plain = span(x)[1][-1]
        with referenced(span):
            inside = span(x)[1][-1]
        after = span(x)[1][-1]
        truth = exact(x)[1][-1]
    # 1e-6: the reference is solved at tolerance 1e-7.
    torch.testing.assert_close(inside, truth, atol=1e-6, rtol=1e-6)
    assert torch.equal(plain, after) and not torch.allclose(plain, truth, atol=1e-3)


class Learner(pl.LightningModule):
    def __init__(self):
        super().__init__()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = NeuralODE(nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3)), solver="rk4")
        self.t_span = torch.linspace(0, 1, 21)

    def training_step(self, batch, _):
        loss = cross_entropy(self.model(batch[0], self.t_span)[1][-1][:, :2], batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.03)


def trainer(callback, epochs, **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    return pl.Trainer(max_epochs=epochs, callbacks=[callback], enable_checkpointing=False, **quiet, **options)


def loader(n=128):
    x, y = annuli(n)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=n)


def test_in_lightning():
    torch.manual_seed(0)
    module, callback = Learner(), FindShallowest(target=0.05, solver_tol=0.2)
    trainer(callback, 1500).fit(module, loader())
    assert callback.verdict is not None and callback.verdict.feasible
    assert callback.verdict.best.evaluations <= 4
    assert "training_step" not in module.__dict__
    module.model(torch.randn(4, 3), module.t_span)  # a span of 20 steps
    span = next(tm.spans(module))
    assert span.nfe == callback.verdict.best.evaluations
    other = Learner()
    tm.wrap(other).load_state_dict(module.state_dict())
    assert next(tm.spans(other)).pinned


def test_minimum_time_with_a_target_in_lightning():
    torch.manual_seed(0)
    module, callback = Learner(), MinimumTime(target=0.05)
    trainer(callback, 250).fit(module, loader())
    span = next(tm.spans(module))
    assert callback.price.feasible
    assert span.t_f.item() == pytest.approx(callback.price.best["duration"], rel=1e-6)
    assert span.t_f.item() < 1.0
    x, y = loader().dataset.tensors
    with torch.no_grad():
        assert cross_entropy(module.model(x)[1][-1][:, :2], y).item() <= 0.06  # the batch order differs


def test_minimum_time_takes_a_weight_or_a_target():
    with pytest.raises(ValueError, match="not both"):
        MinimumTime(weight=1.0, target=0.1)
    with pytest.raises(ValueError, match="target"):
        MinimumTime(target=-1.0)
    with pytest.raises(ValueError, match="monitor"):
        MinimumTime(weight=1.0, monitor="val")


def test_more_batches_than_the_patience_are_waited_for():
    """The mean loss of a pass settles no sooner than in a pass, however short the patience is."""
    batch, span = annuli(), span_of()
    search = Shallowest(target=0.05, solver_tol=0.2, patience=20)
    optimizer = torch.optim.Adam(span.parameters(), lr=0.03)
    search.start(span, optimizer)
    search.batches_seen_together = 100
    while not search.done and len(search.trials) == 1 and search.trials[0].iterations < 3000:
        loss = criterion(span(batch[0]), batch)
        optimizer.zero_grad()
        (loss + search.penalty()).backward()
        optimizer.step()
        search.step(loss, lambda: criterion(span(batch[0]), batch))
    assert search.trials[0].passed


def started(model, **options):
    search = Shallowest(target=1e9, solver_tol=10.0, **options)
    search.start(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3))
    return search


def test_evaluations_are_counted_over_all_that_is_measured():
    """An adaptive solver may take few steps for the last batch, and more for another."""
    node = NeuralODE(nn.Linear(2, 2), solver="tsit5", atol=1e-3, rtol=1e-3)
    span = tm.wrap(node, torch.linspace(0, 1, 2))
    search = started(span)
    with torch.no_grad():
        span.node.vf.vf.vf.weight.copy_(torch.tensor([[0.0, 8.0], [-8.0, 0.0]]))
        span.node.vf.vf.vf.bias.zero_()
    fast, still = torch.ones(2, 2), torch.full((2, 2), 1e-2)

    def over(*batches):
        return lambda: sum(span(x)[1][-1].square().mean() for x in batches)

    span(still)
    search._current().trial.evaluations = few = span.nfe
    assert search._check(over(still)) is True
    span(fast)
    assert span.nfe > few
    assert search._check(over(fast, still)) is False


def check_in_two(looks):
    """`_check` of two processes, as threads that meet at every mean: the results, or the errors."""
    meeting, said = threading.Barrier(2, timeout=60), [0.0, 0.0]

    def mean(rank, value):
        said[rank] = value
        meeting.wait()
        result = sum(said) / 2
        meeting.wait()  # nobody says the next one before both have heard this one
        return result

    def process(rank, search, look):
        search.reduce = lambda value: mean(rank, value)
        with torch.no_grad():
            try:
                return search._check(look)
            except (KeyError, RuntimeError) as error:
                return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2), *zip(*looks, strict=True)))


def test_a_check_is_decided_by_all_processes():
    """What one finds alone, a failed solve or a defect among it, all decide, and none waits for ever."""
    batch = annuli(32)

    def fine():
        span = span_of()
        search = started(span)
        criterion(span(batch[0]), batch)
        return search, lambda: criterion(span(batch[0]), batch)

    def failing():
        raise tm.IntegrationError("not finite", time=0.0, step=1, solver="rk4")

    def broken():
        raise KeyError("a defect")

    assert check_in_two([fine(), fine()]) == [True, True]
    assert check_in_two([fine(), (fine()[0], failing)]) == [False, False]
    assert check_in_two([fine(), (fine()[0], lambda: 1e12)]) == [False, False]
    refusing = fine()
    refusing[0].accept = lambda: False
    other = fine()
    other[0].accept = lambda: True
    assert check_in_two([refusing, other]) == [False, False]
    costly = fine()
    costly[0]._current().trial.evaluations = 1
    assert check_in_two([fine(), costly]) == [False, False]
    first, second = check_in_two([fine(), (fine()[0], broken)])
    assert isinstance(second, KeyError) and "failed in another process" in str(first)


def test_a_solve_that_fails_goes_back_and_a_training_that_stalls_does_not():
    batch, span = annuli(), span_of()
    search = started(span)
    criterion(span(batch[0]), batch)
    search.penalty()
    good = [p.clone() for p in span.parameters()]
    with torch.no_grad():
        for p in span.parameters():
            p.add_(1.0)
    search._slower("stalled")
    assert not any(torch.equal(a, b) for a, b in zip(good[1:], list(span.parameters())[1:], strict=True) if a.dim())
    search.diverged("the state is not finite")
    assert all(torch.equal(a, b) for a, b in zip(good, span.parameters(), strict=True))
    assert search._optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.3**2)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_without_a_measure_the_last_batch_is_solved_as_the_field_is_now(sensitivity):
    batch = annuli(32)
    node = NeuralODE(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), solver="rk4", sensitivity=sensitivity)
    span = tm.wrap(node, torch.linspace(0, 1, 11))
    search = started(span)
    (criterion(span(batch[0]), batch) + search.penalty()).backward()  # an adjoint counts its way back as well
    assert search._check(None) is True
    error = search._current().trial.solver_error
    with torch.no_grad():
        for p in span.node.vf.parameters():
            p.mul_(3.0)
    search._check(None)
    assert search._current().trial.solver_error > 2 * error


def test_a_search_that_fails_again_and_again_ends_in_every_loop():
    class Failing(Learner):
        calls = 0

        def training_step(self, batch, index):
            self.calls += 1
            raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")

    def fails(out, batch):
        raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")

    span, batch = span_of(), annuli(16)
    search = Shallowest(target=0.1, max_steps=1)
    verdict = search.fit(span, fails, [batch] * 40, progress=False)
    assert search.done and not verdict.feasible and len(search.trials) == 1
    module, callback = Failing(), FindShallowest(target=0.1, max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`training_step` returned `None`")
        trainer(callback, 40).fit(module, loader(16))
    assert module.calls == 9 and not callback.verdict.feasible


def test_a_foreign_state_is_refused_and_changes_nothing():
    search = Shallowest(target=0.1)
    with pytest.raises(ValueError, match=r"no state of a Shallowest: .*'trials'.* are missing; got the keys \['a'\]"):
        search.load_state_dict({"a": 1})
    assert search.trials == [] and not search.done


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_in_lightning_a_failed_solve_is_gone_back_from_and_a_step_without_loss_is_passed_over():
    class Stumbling(Learner):
        calls = 0

        def training_step(self, batch, index):
            self.calls += 1
            if self.calls == 2:
                return None
            if self.calls == 3:
                raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")
            return {"loss": super().training_step(batch, index)}

    torch.manual_seed(0)
    module, callback = Stumbling(), FindShallowest(target=0.05, solver_tol=0.2)
    fitting = trainer(callback, 5)
    fitting.fit(module, loader())
    assert module.calls == 5 and callback.verdict.iterations == 3
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.03 * 0.3)


def test_in_lightning_a_search_goes_on_from_its_checkpoint(tmp_path):
    def fitted(epochs, checkpoint=None):
        torch.manual_seed(1)
        module, callback = Learner(), FindShallowest(target=0.05, solver_tol=0.2)
        fitting = trainer(callback, epochs)
        fitting.fit(module, loader(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return module, callback, fitting

    whole, searched, _ = fitted(24)
    _, stopped, fitting = fitted(12)
    assert not stopped.search.done and not stopped.verdict.feasible
    fitting.save_checkpoint(tmp_path / "c.ckpt")
    second, resumed, _ = fitted(24, tmp_path / "c.ckpt")
    assert resumed.search.trials == searched.search.trials and resumed.verdict == searched.verdict
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_in_lightning_a_search_that_has_ended_is_not_started_again(tmp_path):
    torch.manual_seed(0)
    module, callback = Learner(), FindShallowest(target=0.5, solver_tol=0.5, solvers=[])
    fitting = trainer(callback, 1500)
    fitting.fit(module, loader())
    assert callback.verdict.feasible
    fitting.save_checkpoint(tmp_path / "c.ckpt")
    again, other = Learner(), FindShallowest(target=0.5, solver_tol=0.5, solvers=[])
    trainer(other, 1500).fit(again, loader(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert other.verdict == callback.verdict
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
