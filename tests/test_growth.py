"""Growth of t_f: the scheduler, the way back from an exploded loss, the recipes, and the Lightning callback."""

import contextlib
import copy
import io
import json
import logging
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import random_model
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime import DepthGrowth, LearnableSpan, recipes
from torchdyn_mintime.growth import DivergedError, Rescue
from torchdyn_mintime.lightning import ConvergenceRate, GrowDepth, MinimumTime
from torchdyn_mintime.lyapunov import CrossEntropy, LyapunovRegularizer


def short_span(steps=5, step=0.01, solver="rk4", **options):
    node = random_model("mlp", dtype=torch.float32, solver=solver).node
    return LearnableSpan(node, torch.linspace(0, steps * step, steps + 1), **options)


# ---------------------------------------------------------------------------------------------------------- DepthGrowth


@given(start=st.integers(1, 8), needed=st.integers(0, 12), increment=st.sampled_from([None, 0.02]))
def test_without_patience_it_is_algorithm_2(start, needed, increment):
    """Lines 6 to 10: while the loss is above epsilon, t_f grows by gamma."""
    span = LearnableSpan(random_model("mlp", dtype=torch.float32).node, torch.linspace(0, 1, 101), t_f=start * 0.01)
    growth = DepthGrowth(span, 0.1, increment)
    grew = [growth.step(1.0) for _ in range(needed)]
    assert all(grew) and not growth.done
    assert growth.step(0.1) is False and growth.done and not growth.exhausted
    assert span.t_f.item() == pytest.approx(start * 0.01 + needed * (increment or 0.01), abs=1e-6)
    assert growth.step(5.0) is False and len(growth.history) == needed  # done is done
    assert [g.step for g in growth.history] == list(range(1, needed + 1))


def expected_growths(metrics, patience, improvement, threshold):
    """The rule in its plainest form: where t_f grows."""
    best, waited, grew = math.inf, 0, []
    for i, metric in enumerate(metrics):
        if metric <= threshold:
            break
        if metric < best * (1 - improvement):
            best, waited = metric, 0
        else:
            waited += 1
            if waited == patience:
                grew.append(i)
                best, waited = math.inf, 0
    return grew


@given(
    metrics=st.lists(st.floats(0.0, 2.0), max_size=40),
    patience=st.integers(1, 4),
    improvement=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_with_patience_it_grows_where_the_metric_stays(metrics, patience, improvement):
    growth = DepthGrowth(short_span(), 0.05, max_t_f=10.0, patience=patience, improvement=improvement)
    grew = [i for i, metric in enumerate(metrics) if growth.step(metric)]
    assert grew == expected_growths(metrics, patience, improvement, 0.05)


@given(metrics=st.lists(st.floats(0.0, 2.0), min_size=2, max_size=30), patience=st.integers(0, 3), data=st.data())
def test_saved_and_loaded_in_the_middle_it_goes_on_the_same(metrics, patience, data):
    cut = data.draw(st.integers(0, len(metrics)))
    whole = DepthGrowth(short_span(), 0.2, max_t_f=0.12, patience=patience)
    for metric in metrics:
        whole.step(metric)
    first = DepthGrowth(short_span(), 0.2, max_t_f=0.12, patience=patience)
    for metric in metrics[:cut]:
        first.step(metric)
    model, state = first.span.state_dict(), json.loads(json.dumps(first.state_dict()))  # plain values only
    second = DepthGrowth(short_span(), 7.0)  # what it was made with gives way to what was saved
    second.span.load_state_dict(model)
    second.load_state_dict(state)
    for metric in metrics[cut:]:
        second.step(metric)
    assert second.state_dict() == whole.state_dict()
    assert second.span.t_f.item() == whole.span.t_f.item() and second.span.bounds == whole.span.bounds
    assert not second.span.t_f.requires_grad


def test_the_optimizer_does_not_move_t_f_while_it_grows():
    span = short_span()
    optimizer = torch.optim.Adam(span.parameters(), 0.1)
    x = torch.randn(4, 2)
    for _ in range(2):  # momentum that would carry t_f on
        span(x)[1][-1].square().sum().backward()
        optimizer.step()
    span.clip_()
    growth = DepthGrowth(span, 0.01)
    before = span.t_f.item()
    for _ in range(3):
        loss = span(x)[1][-1].square().sum() + span.duration
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert span.t_f.item() == before
    growth.release()
    assert span.t_f.requires_grad


def test_it_stops_at_max_t_f_and_says_so_once(caplog):
    growth = DepthGrowth(short_span(), 0.1, 0.02, max_t_f=0.08)
    with caplog.at_level(logging.INFO, logger="torchdyn_mintime"):
        assert [growth.step(1.0) for _ in range(5)] == [True, True, False, False, False]
    assert growth.span.t_f.item() == pytest.approx(0.08) and growth.exhausted and not growth.done
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "reached max_t_f = 0.08 and the metric 1 is still above the threshold 0.1" in warned[0]
    grown = [r.getMessage() for r in caplog.records if "grew from" in r.getMessage()]
    assert len(grown) == 2 and "t_f grew from 0.05 to 0.07: metric 1 > 0.1" in grown[0]
    assert growth.step(0.05) is False and growth.done and not growth.exhausted


def test_the_upper_bound_is_raised_and_said(caplog):
    with caplog.at_level(logging.INFO, logger="torchdyn_mintime"):
        span = short_span()
        growth = DepthGrowth(span, 0.1)
    assert span.bounds[1] == growth.max_t_f == span.default_max_t_f() == 1.0
    assert "raised from 0.05 to max_t_f = 1" in caplog.text and caplog.records[-1].levelno == logging.INFO
    with caplog.at_level(logging.INFO, logger="torchdyn_mintime"):
        DepthGrowth(short_span(bounds=(0.01, 0.06)), 0.1, max_t_f=0.5)
    assert caplog.records[-1].levelno == logging.WARNING  # the user had said 0.06


def test_it_can_start_from_one_step_and_goes_on_along_the_template():
    span = LearnableSpan(random_model("mlp", dtype=torch.float32).node, torch.linspace(0, 1, 101), t_f=0.01)
    growth = DepthGrowth(span, 0.1)
    assert span.steps == 1
    growth.step(1.0)
    assert span(torch.randn(2, 2))[0].tolist() == pytest.approx([0, 0.01, 0.02])


@pytest.mark.parametrize("steps", [3, 7, 10, 11, 30, 100])
def test_one_step_is_allowed_whatever_float32_makes_of_it(steps):
    node = random_model("mlp", dtype=torch.float32).node
    assert LearnableSpan(node, torch.linspace(0, 1, steps + 1), t_f=1 / steps).steps == 1


def test_adaptive_solvers_must_say_by_how_much():
    span = short_span(solver="tsit5")
    with pytest.raises(ValueError, match="increment=None, but an adaptive solver"):
        DepthGrowth(span, 0.1)
    assert span.t_f.requires_grad
    assert DepthGrowth(span, 0.1, 0.05).step(1.0)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"threshold": 0.0}, ValueError, "threshold must be finite and above 0; got 0"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite and above 0; got nan"),
        ({"threshold": "low"}, TypeError, "threshold must be a number; got 'low'"),
        ({"threshold": 0.1, "increment": -0.1}, ValueError, "increment must be finite and above 0; got -0.1"),
        ({"threshold": 0.1, "increment": math.nan}, ValueError, "increment must be finite .* got nan"),
        ({"threshold": 0.1, "max_t_f": 0.04}, ValueError, "max_t_f = 0.04 lies below t_f = 0.05"),
        ({"threshold": 0.1, "max_t_f": math.inf}, ValueError, "max_t_f must be finite; got inf"),
        ({"threshold": 0.1, "patience": -1}, ValueError, "patience must be .* got -1"),
        ({"threshold": 0.1, "patience": 1.5}, ValueError, "patience must be .* got 1.5"),
        ({"threshold": 0.1, "improvement": 1.0}, ValueError, "improvement must be .* got 1.0"),
    ],
)
def test_bad_settings_change_nothing(arguments, error, text):
    span = short_span()
    with pytest.raises(error, match=text):
        DepthGrowth(span, **arguments)
    assert span.t_f.requires_grad and span.bounds[1] == pytest.approx(0.05)


def test_bad_metrics_and_objects():
    growth = DepthGrowth(short_span(), 0.1)
    for metric in (math.nan, math.inf, torch.tensor(math.nan)):
        with pytest.raises(ValueError, match=f"the metric is {float(metric)} at t_f = 0.05"):
            growth.step(metric)
    assert growth.steps == 0 and growth.span.t_f.item() == pytest.approx(0.05)
    with pytest.raises(TypeError, match="grows a LearnableSpan; got Linear"):
        DepthGrowth(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="this is no state of a DepthGrowth: .*'threshold'.* got the keys"):
        growth.load_state_dict({"best": 1.0})


# --------------------------------------------------------------------------------------------------------------- Rescue


def test_an_exploded_loss_goes_back_with_half_the_learning_rate():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    rescue = Rescue(net, optimizer, every=1)
    x = torch.randn(8, 2)
    for _ in range(3):
        loss = net(x).square().mean() * 1e-3 + 0.5
        assert rescue.look(loss.item()) is False
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    good = {k: v.clone() for k, v in net.state_dict().items()}
    steps = optimizer.state_dict()["state"][0]["step"].item()
    rescue.look(0.5)
    with torch.no_grad():
        net.weight.fill_(1e6)
    assert rescue.look(1e12) is True and rescue.count == 1
    assert all(torch.equal(good[k], v) for k, v in net.state_dict().items())
    assert optimizer.state_dict()["state"][0]["step"].item() == steps
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert rescue.look(math.nan) is True and optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_rescue_gives_up_at_last_and_never_starts_from_nothing():
    net = nn.Linear(1, 1)
    rescue = Rescue(net, torch.optim.SGD(net.parameters(), 1.0), limit=1, jump=10.0)
    with pytest.raises(ValueError, match="the loss is nan before anything was learned"):
        rescue.look(math.nan)
    rescue.look(1.0)
    assert not rescue.look(9.0) and rescue.look(11.0)  # ten times the best is where it starts
    with pytest.raises(DivergedError, match=r"the loss exploded to inf after 1 rescues, at the learning rates \[0.5\]"):
        rescue.look(math.inf)
    with pytest.raises(ValueError, match="factor .* got 2"):
        Rescue(net, rescue.optimizer, factor=2.0)


def test_a_loss_that_stays_far_above_its_best_was_spoiled():
    net = nn.Linear(1, 1)
    rescue = Rescue(net, torch.optim.SGD(net.parameters(), 1.0), stuck=3, every=1, floor=1.0)
    good = net.weight.item()
    rescue.look(0.2)
    with torch.no_grad():
        net.weight.add_(1.0)
    assert [rescue.look(0.45) for _ in range(3)] == [False, False, True]
    assert net.weight.item() == good
    assert [rescue.look(m) for m in (0.45, 0.45, 0.3, 0.45, 0.45)] == [False] * 5  # twice the best ends the row


def test_worse_than_at_the_start_is_exploded_and_noise_is_not():
    net = nn.Linear(1, 1)
    rescue = Rescue(net, torch.optim.SGD(net.parameters(), 1.0))
    assert [rescue.look(m) for m in (0.69, 0.9, 0.3, 0.65, 0.68)] == [False] * 5
    assert rescue.look(0.71) is True


def test_going_back_twice_leads_to_the_same_state():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    rescue = Rescue(net, optimizer, every=1)
    moments = []
    for loss in (0.5, math.nan, math.inf):
        rescue.look(loss)
        net(torch.ones(4, 2)).sum().backward()
        optimizer.step()
        moments.append(optimizer.state_dict()["state"][0]["exp_avg"].clone())
        optimizer.zero_grad()
    assert torch.equal(moments[1], moments[2]) and optimizer.state_dict()["state"][0]["step"] == 1


def test_only_a_good_state_is_kept():
    """A state at the brink would explode again, whatever the learning rate."""
    net = nn.Linear(1, 1)
    rescue = Rescue(net, torch.optim.SGD(net.parameters(), 1.0), every=1, jump=10.0)
    good = net.weight.item()
    rescue.look(0.5)
    with torch.no_grad():
        net.weight.add_(1.0)
    assert rescue.look(4.0) is False and rescue.look(5.1) is True
    assert net.weight.item() == good


# -------------------------------------------------------------------------------------------------------------- recipes


def blobs(n=64, extra=1):
    """Two clouds that need little depth, with zeros added to the state."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 2
    x = torch.randn(n, 2, generator=generator) * 0.2 + torch.where(y == 1, 1.0, -1.0)[:, None]
    return torch.cat([x, torch.zeros(n, extra)], 1), y


def small_model(t_f=0.05, full=False, seed=0):
    torch.manual_seed(seed)
    node = NeuralODE(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), solver="rk4")
    template = torch.linspace(0, 1, 101) if full else torch.linspace(0, t_f, round(t_f / 0.01) + 1)
    return LearnableSpan(node, template, t_f=t_f if full else None)


@pytest.mark.parametrize("batch_size", [None, 24])
def test_algorithm_2_reaches_the_threshold(batch_size):
    span, (x, y) = small_model(), blobs()
    report = recipes.convergence_rate(span, x, y, pretraining=40, threshold=0.05, batch_size=batch_size)
    assert report.converged and report.loss <= 0.05 and report.accuracy == 1.0
    with torch.no_grad():
        assert F.cross_entropy(span(x)[1][-1][:, :2], y).item() == pytest.approx(report.loss, rel=1e-4)
    assert report.t_f == span.t_f.item() and report.nfe == 4 * report.steps
    assert report.t_f == pytest.approx(0.05 + 0.01 * len(report.growths), abs=1e-6)
    assert report.iterations["pretraining"] == 40
    assert span.t_f.requires_grad  # given back
    assert "converged" in str(report) and "NOT" not in str(report)


def test_a_growth_that_does_not_converge_is_reported_and_gives_back_the_best(caplog):
    span, (x, y) = small_model(), blobs()
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]  # labels that mean nothing
    report = recipes.convergence_rate(span, x, y, pretraining=5, max_t_f=0.09, patience=2, terminal_weight=1.0)
    assert not report.converged and "t_f reached max_t_f at t_f = 0.09" in report.reason
    assert "NOT converged" in str(report)
    assert any("did not converge" in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)
    stage_two = report.history["terminal"][5:]
    assert report.loss <= min(stage_two) * (1 + 1e-4)
    assert report.t_f == span.t_f.item()


def test_a_training_that_never_stops_exploding_is_reported(monkeypatch):
    span, (x, y) = small_model(), blobs()
    losses, calls = recipes._Run.losses, []

    def explode(self, x, y, lyapunov):
        terminal, penalty = losses(self, x, y, lyapunov)
        calls.append(0)
        return terminal * (1.0 if len(calls) < 3 else 1e3), penalty

    monkeypatch.setattr(recipes._Run, "losses", explode)
    report = recipes.growth(span, x, y, threshold=1e-3)
    assert not report.converged and report.rescues == 8
    assert "after 8 rescues" in report.reason


def test_running_out_of_iterations_is_reported_too():
    span, (x, y) = small_model(), blobs()
    report = recipes.growth(span, x, y, lr=1e-5, threshold=1e-6, max_iterations=4)
    assert not report.converged and "the iterations ran out" in report.reason and report.iterations["growth"] == 4


def test_growth_from_one_step():
    span, (x, y) = small_model(t_f=0.01, full=True), blobs()
    report = recipes.growth(span, x, y, lr=0.03, threshold=0.05, patience=3)
    assert report.converged and report.growths and report.accuracy == 1.0
    assert "not improved for 3 steps" in report.growths[0].reason
    assert report.t_f == pytest.approx(0.01 + 0.01 * len(report.growths), abs=1e-6)


def test_a_loss_that_explodes_is_gone_back_from(monkeypatch):
    span, (x, y) = small_model(), blobs()
    losses, calls = recipes._Run.losses, []

    def spoiled(self, x, y, lyapunov):
        calls.append(0)
        if len(calls) == 10:  # what a step far too large leaves behind
            with torch.no_grad():
                for parameter in list(span.vf.parameters())[-2:]:  # the last layer, against what was learned
                    parameter.mul_(-300.0)
        return losses(self, x, y, lyapunov)

    monkeypatch.setattr(recipes._Run, "losses", spoiled)
    report = recipes.growth(span, x, y, threshold=0.02)
    assert report.rescues == 1 and report.converged
    assert max(report.history["terminal"]) < 1.0  # no step was taken from the exploded loss


def test_the_combined_loss_trades_depth_for_nothing():
    span, (x, y) = small_model(), blobs()
    report = recipes.combined(span, x, y, iterations=60, threshold=0.1, lr=0.1, span_lr=0.002)
    assert report.converged and report.loss <= 0.1 and report.growths == []
    assert len(set(report.history["t_f"])) > 10 and min(report.history["t_f"]) >= 0.04 - 1e-6
    report = recipes.combined(small_model(), x, y, iterations=2, threshold=1e-9)
    assert not report.converged and "never fell to 1e-09 in 2 iterations" in report.reason
    assert recipes.combined(small_model(), x, y, iterations=2, threshold=None).converged


def test_pretraining_and_vanilla_do_so_many_iterations():
    span, (x, y) = small_model(), blobs()
    report = recipes.pretrain(span, x, y, iterations=30)
    assert report.iterations == {"pretraining": 30} and report.t_f == pytest.approx(0.05)
    assert report.history["lyapunov"][-1] < report.history["lyapunov"][0]
    node = small_model().node
    node.t_span = torch.linspace(0, 0.2, 5)
    report = recipes.vanilla(node, x, y, iterations=30)
    assert len(report.history["terminal"]) == 30 and report.loss < report.history["terminal"][0]
    assert report.accuracy == 1.0


def test_the_recipes_refuse_what_they_cannot_train():
    x, y = blobs()
    with pytest.raises(ValueError, match="exactly one LearnableSpan; Linear has 0: wrap it first"):
        recipes.growth(nn.Linear(3, 3), x, y)
    with pytest.raises(ValueError, match="has 2: choose one"):
        recipes.pretrain(nn.Sequential(small_model(), small_model()), x, y)
    with pytest.raises(ValueError, match="x has 64 samples and y 3"):
        recipes.pretrain(small_model(), x, y[:3])
    with pytest.raises(ValueError, match="batch_size must be .* got 0"):
        recipes.pretrain(small_model(), x, y, batch_size=0)
    with pytest.raises(ValueError, match="the trajectory has 2 points, and 5 at least"):
        recipes.convergence_rate(small_model(t_f=0.01, full=True), x, y)


# ------------------------------------------------------------------------------------------------------------ GrowDepth


class Classifier(pl.LightningModule):
    def __init__(self, lr=0.03, t_f=0.02, metric=None):
        super().__init__()
        torch.manual_seed(0)
        node = NeuralODE(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), solver="rk4")
        self.model = LearnableSpan(node, torch.linspace(0, 1, 101), t_f=t_f)
        self.potential, self.lr, self.metric = CrossEntropy(classes=2), lr, metric

    def training_step(self, batch, batch_idx):
        x, y = batch
        _, sol = self.model(x)
        loss = self.potential(sol[-1], y).mean()
        self.log("loss", loss, on_epoch=True, on_step=False)
        if self.metric is not None:
            self.log("metric", self.metric(self.current_epoch), on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def loader():
    return DataLoader(TensorDataset(*blobs()), batch_size=32)


def fit(module, callback, epochs, path=None, **options):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=path, **({} if path is None else {"weights_only": True}))
    return trainer


def test_the_callback_grows_until_the_threshold_and_stops():
    module, callback = Classifier(), GrowDepth(threshold=0.1, monitor="loss")
    trainer = fit(module, callback, 200)
    assert callback.growth.done and trainer.current_epoch < 199
    assert trainer.callback_metrics["loss"] <= 0.1
    assert module.model.t_f.item() == pytest.approx(0.02 + 0.01 * len(callback.growth.history), abs=1e-6)
    assert trainer.callback_metrics["t_f"].item() == pytest.approx(module.model.t_f.item())


def test_the_callback_waits_for_the_pretraining_and_reads_the_training_loss():
    module, callback = Classifier(), GrowDepth(threshold=1e-9, pretraining=3, increment=0.02)
    fit(module, callback, 5)
    assert [g.t_f for g in callback.growth.history] == pytest.approx([0.04, 0.06])
    losses = [g.metric for g in callback.growth.history]
    assert 0 < losses[1] < losses[0] < 1


def test_the_training_loss_is_whole_under_accumulation():
    one, two = GrowDepth(threshold=1e-9), GrowDepth(threshold=1e-9)
    fit(Classifier(lr=0.0), one, 1)
    fit(Classifier(lr=0.0), two, 1, accumulate_grad_batches=2)
    assert two.growth.history[0].metric == pytest.approx(one.growth.history[0].metric, rel=1e-5)


def test_the_callback_says_when_it_did_not_converge_and_gives_back_the_best():
    values = [0.9, 0.5, 0.7, 0.8, 0.8]
    module = Classifier(metric=lambda epoch: values[epoch])
    callback = GrowDepth(threshold=0.1, monitor="metric", max_t_f=0.04)
    snapshots = []
    end = callback.on_train_epoch_end

    def record(trainer, pl_module):
        snapshots.append({k: v.clone() for k, v in pl_module.state_dict().items()})
        end(trainer, pl_module)

    callback.on_train_epoch_end = record
    with pytest.warns(
        UserWarning, match=r"did not converge: t_f reached max_t_f = 0.04 and metric is 0.7 > 0.1; .*metric 0.5"
    ):
        trainer = fit(module, callback, 10)
    assert trainer.current_epoch == 3 and callback.growth.exhausted
    assert all(torch.equal(v, snapshots[1][k]) for k, v in module.state_dict().items())


def test_the_callback_resumes_in_the_middle_of_growing(tmp_path):
    whole_callback, whole = GrowDepth(threshold=1e-9, patience=2), Classifier()
    fit(whole, whole_callback, 8)
    callback, module = GrowDepth(threshold=1e-9, patience=2), Classifier()
    fit(module, callback, 5).save_checkpoint(path := tmp_path / "middle.ckpt")
    resumed_callback, resumed = GrowDepth(threshold=1e-9, patience=2), Classifier()
    fit(resumed, resumed_callback, 8, path)
    assert resumed_callback.growth.state_dict() == whole_callback.growth.state_dict()
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_callback_goes_back_from_an_explosion():
    values = [0.9, 0.5, math.nan, 0.05]
    module = Classifier(metric=lambda epoch: values[epoch])
    callback = GrowDepth(threshold=0.1, monitor="metric")
    trainer = fit(module, callback, 10)
    assert callback.growth.done and trainer.current_epoch == 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.015)
    assert [g.metric for g in callback.growth.history] == pytest.approx([0.9, 0.5])


def test_the_way_back_is_in_the_checkpoint(tmp_path):
    """An explosion right after a resumption leads to the state that was good before it."""

    def explodes_at_4():
        return Classifier(metric=lambda epoch: [0.9, 0.5, 0.95, 0.8, math.inf, 0.05][epoch])

    whole, resumed = explodes_at_4(), explodes_at_4()
    fit(whole, GrowDepth(threshold=0.1, monitor="metric"), 10)
    fit(first := explodes_at_4(), GrowDepth(threshold=0.1, monitor="metric"), 4).save_checkpoint(path := tmp_path / "c")
    callback = GrowDepth(threshold=0.1, monitor="metric")
    fit(resumed, callback, 10, path)
    assert callback.growth.done and not torch.equal(first.model.t_f, resumed.model.t_f)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_callback_gives_up_on_a_loss_that_never_stops_exploding():
    module = Classifier(metric=lambda epoch: 0.5 if epoch < 2 else math.inf)
    callback = GrowDepth(threshold=0.1, monitor="metric")
    with pytest.warns(UserWarning, match=r"did not converge: the loss exploded to inf after 8 rescues.*\(metric 0.5\)"):
        trainer = fit(module, callback, 20)
    assert trainer.current_epoch == 11 and all(p.isfinite().all() for p in module.parameters())


def test_the_callback_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="threshold must be positive and finite; got nan"):
        GrowDepth(threshold=math.nan)
    with pytest.raises(ValueError, match="increment must be .* got -1"):
        GrowDepth(threshold=0.1, increment=-1)
    with pytest.raises(ValueError, match="patience must be .* got -2"):
        GrowDepth(threshold=0.1, patience=-2)
    with pytest.raises(MisconfigurationException, match=r"monitor='los'\) found no such metric; logged were .*'loss'"):
        fit(Classifier(), GrowDepth(threshold=0.1, monitor="los"), 2)
    with pytest.raises(ValueError, match="the loss is nan before anything was learned"):
        fit(Classifier(metric=lambda epoch: math.nan), GrowDepth(threshold=0.1, monitor="metric"), 2)
    with pytest.raises(ValueError, match="the metric is nan at t_f = 0.02"):
        fit(Classifier(metric=lambda epoch: math.nan), GrowDepth(threshold=0.1, monitor="metric", rescue=False), 2)
    with pytest.raises(MisconfigurationException, match="no span named 'other'; there are .'model'"):
        fit(Classifier(), GrowDepth(threshold=0.1, span="other"), 2)
    with pytest.raises(ValueError, match="max_t_f = 0.01 lies below t_f = 0.02"):
        fit(Classifier(), GrowDepth(threshold=0.1, max_t_f=0.01), 2)


def test_the_defaults_come_from_the_first_span_that_is_passed():
    """A Lightning callback makes its scheduler before the module has passed its own span."""
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Linear(2, 2), solver="rk4"))
    growth = tm.DepthGrowth(span, 1e-6)
    span(torch.randn(4, 2), torch.linspace(0, 5, 11))
    assert span.t_f.item() == 5.0
    assert growth.step(1.0)
    assert span.t_f.item() == pytest.approx(5.5)
    assert growth.max_t_f == pytest.approx(9.5)


def test_a_price_for_a_target_waits_for_the_first_span_too():
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Linear(2, 2), solver="rk4"))
    tm.TargetLoss(span, 0.1)
    span(torch.randn(4, 2), torch.linspace(0, 5, 11))
    assert span.t_f.item() == 5.0 and span.bounds == pytest.approx((0.5, 9.5))


# ------------------------------------------------------------------------------------------------- the ready module


def test_algorithm_2_in_lightning_reaches_the_threshold():
    module = ConvergenceRate(small_model(), classes=2)
    callback = GrowDepth(0.05, monitor="terminal", patience=3, pretraining=20)
    trainer = fit(module, callback, 200)
    assert callback.growth.done and trainer.callback_metrics["terminal"] <= 0.05
    assert trainer.callback_metrics["lyapunov"] >= 0
    assert module.model.t_f.item() == pytest.approx(0.05 + 0.01 * len(callback.growth.history), abs=1e-6)
    x, y = blobs()
    assert (module(x)[1][-1][:, :2].argmax(1) == y).all()


def test_the_combined_method_in_lightning_is_the_weighted_sum_and_moves_t_f():
    module = ConvergenceRate(small_model(), classes=2, terminal_weight=0.5, span_lr=0.001)
    x, y = blobs()
    t_eval, sol = module.model(x)
    terminal = F.cross_entropy(sol[-1][:, :2], y)
    lyapunov = LyapunovRegularizer(module.model, CrossEntropy(classes=2), 20.0)
    expected = lyapunov.penalty(t_eval, sol, y, reduction="points") + 0.5 * terminal
    assert module.training_step((x, y), 0).item() == pytest.approx(expected.item(), rel=1e-6)
    fit(module, MinimumTime(weight=10.0), 15)
    assert 0.04 - 1e-6 <= module.model.t_f.item() < 0.05  # never fewer points than the Lyapunov loss needs
    assert not [name for name in module.state_dict() if "_regularizer" in name]  # nothing is saved twice
    copied = copy.deepcopy(module)
    assert copied._regularizer.model is copied.model


def test_the_ready_module_says_what_it_cannot_train():
    with pytest.raises(ValueError, match="give a potential or the number of classes"):
        ConvergenceRate(small_model())
    with pytest.raises(ValueError, match="exactly one LearnableSpan; Linear has 0"):
        ConvergenceRate(nn.Linear(2, 2), classes=2)
    with pytest.raises(ValueError, match="terminal_weight .* got -1"):
        ConvergenceRate(small_model(), classes=2, terminal_weight=-1)
    span = small_model()
    bounds = span.bounds
    with pytest.raises(ValueError, match="rate"):
        ConvergenceRate(span, rate=-1.0, classes=2)
    assert span.bounds == bounds


def test_v_gets_a_gradient_where_more_than_the_field_is_trained():
    """An encoder that V's gradient does not reach learns to start from a large V."""
    encoder, head, span = nn.Linear(3, 3), nn.Linear(3, 2), small_model()
    assert recipes.lyapunov(span, CrossEntropy(classes=2), 20.0).detach_potential
    assert not recipes.lyapunov(span, CrossEntropy(head), 20.0).detach_potential
    assert not recipes.lyapunov(nn.Sequential(encoder, span), CrossEntropy(classes=2), 20.0).detach_potential
    encoder.requires_grad_(False)
    assert recipes.lyapunov(nn.Sequential(encoder, span), CrossEntropy(classes=2), 20.0).detach_potential


def test_a_rescue_goes_on_from_a_checkpoint(tmp_path):
    def drive(rescue, losses):
        went = []
        for loss in losses:
            went.append(rescue.look(loss))
            with torch.no_grad():
                for p in rescue.model.parameters():
                    p.add_(1.0)
        return went

    def begin():
        torch.manual_seed(0)
        net = nn.Linear(2, 1)
        return Rescue(net, torch.optim.SGD(net.parameters(), 1.0), every=2, stuck=3)

    losses = [0.5, 0.4, 0.9, 0.85, math.inf, 0.4, 0.9, 0.9, 0.9, 0.3]
    whole, first, second = begin(), begin(), begin()
    went = drive(whole, losses)
    assert sum(went) >= 2
    assert drive(first, losses[:4]) == went[:4]
    torch.save(
        {"rescue": first.state_dict(), "net": first.model.state_dict(), "optimizer": first.optimizer.state_dict()},
        tmp_path / "c.pt",
    )
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    second.model.load_state_dict(saved["net"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["rescue"])
    assert drive(second, losses[4:]) == went[4:]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert second.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="no state of a Rescue"):
        second.load_state_dict({})


def test_a_good_state_is_kept_at_the_first_look_and_every_fifth_after_it():
    net = nn.Linear(1, 1, bias=False)
    rescue = Rescue(net, torch.optim.SGD(net.parameters(), 1.0))
    for i in range(9):
        with torch.no_grad():
            net.weight.fill_(float(i))
        rescue.look(0.5)
    assert rescue.look(math.inf) and net.weight.item() == 5.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("jump", 1.0), ("jump", 0.5), ("jump", math.nan), ("factor", 0.0), ("factor", -0.5), ("floor", 0.0)],
)
def test_a_rescue_refuses_what_could_not_work(name, value):
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=f"{name} must be"):
        Rescue(net, torch.optim.SGD(net.parameters(), 1.0), **{name: value})


def test_growth_says_what_it_is_at(caplog):
    caplog.set_level(logging.INFO, logger="torchdyn_mintime")
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 0.1, 3), bounds=(0.01, 0.15))
    growth = tm.DepthGrowth(span, 0.01, max_t_f=0.15)
    assert "raised" not in caplog.text  # the bound is there already
    assert repr(growth) == (
        "DepthGrowth(growing at t_f=0.1, threshold=0.01, increment=0.05, max_t_f=0.15, patience=0, growths=0)"
    )
    growth.step(1.0), growth.step(1.0)
    assert repr(growth).startswith("DepthGrowth(exhausted at t_f=0.15")
    growth.step(0.001)
    assert repr(growth).startswith("DepthGrowth(done at t_f=0.15")
