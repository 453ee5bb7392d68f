"""GrowDepth: t_f grows in a Trainer until a metric is met, and the training says how it ended."""

import logging
import math

import pytest
import pytorch_lightning as pl
import torch
from learners import Learner, blobs, loader, make_node, trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from torchdyn_mintime import LearnableSpan
from torchdyn_mintime.lightning import GrowDepth


class Classifier(Learner):
    """Of two clouds, from a span of few steps of a hundredth."""

    def __init__(self, lr=0.03, t_f=0.02, **options):
        span = LearnableSpan(make_node(3, 8, seed=0), torch.linspace(0, 1, 101), t_f=t_f)
        super().__init__(span, optimizer=lambda p: torch.optim.Adam(p, lr), classes=2, **options)

    def accuracy(self):
        x, y = blobs()
        return (self.model(x)[1][-1][:, :2].argmax(1) == y).double().mean().item()


class Snapshots(pl.Callback):
    """Keeps the model's state at the beginning of every epoch: that of which the epoch's training metrics speak."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, run, learner):
        self.seen.append({name: value.clone() for name, value in learner.state_dict().items()})


def fit(module, *callbacks, epochs, path=None, batch=32, **options):
    run = trainer(epochs, *callbacks, **options)
    run.fit(module, loader(blobs(), batch), ckpt_path=path, **({} if path is None else {"weights_only": True}))
    return run


def metric(*values):
    return lambda epoch: values[epoch]


def test_it_grows_until_the_threshold_and_stops():
    module, callback = Classifier(), GrowDepth(threshold=0.1, monitor="loss")
    run = fit(module, callback, epochs=200)
    assert callback.growth.done and run.current_epoch < 199
    assert run.callback_metrics["loss"] <= 0.1
    assert module.model.t_f.item() == pytest.approx(0.02 + 0.01 * len(callback.growth.history), abs=1e-6)
    assert run.callback_metrics["t_f"].item() == pytest.approx(module.model.t_f.item())
    assert module.model.t_f.requires_grad  # given back


def test_it_grows_from_one_step():
    module, callback = Classifier(lr=0.01, t_f=0.01), GrowDepth(threshold=0.3, monitor="loss", patience=3)
    fit(module, callback, epochs=200, batch=64)
    growths = callback.growth.history
    assert callback.growth.done and growths and module.accuracy() == 1.0
    assert "not improved for 3 steps" in growths[0].reason
    assert module.model.t_f.item() == pytest.approx(0.01 + 0.01 * len(growths), abs=1e-6)


def test_it_waits_for_the_pretraining_and_reads_the_training_loss():
    module, callback = Classifier(), GrowDepth(threshold=1e-9, pretraining=3, increment=0.02)
    fit(module, callback, epochs=5)
    assert [g.t_f for g in callback.growth.history] == pytest.approx([0.04, 0.06])
    losses = [g.metric for g in callback.growth.history]
    assert 0 < losses[1] < losses[0] < 1
    # Two batches an epoch: each growth was told the mean of its own epoch.
    assert losses == pytest.approx([sum(module.losses[i : i + 2]) / 2 for i in (6, 8)])


def test_the_training_loss_is_whole_under_accumulation():
    one, two = GrowDepth(threshold=1e-9), GrowDepth(threshold=1e-9)
    fit(Classifier(lr=0.0), one, epochs=1)
    fit(Classifier(lr=0.0), two, epochs=1, accumulate_grad_batches=2)
    assert two.growth.history[0].metric == pytest.approx(one.growth.history[0].metric, rel=1e-5)


def test_it_says_when_it_did_not_converge_and_gives_back_the_best():
    module, snapshots = Classifier(metric=metric(0.9, 0.5, 0.7, 0.8, 0.8)), Snapshots()
    callback = GrowDepth(threshold=0.1, monitor="metric", max_t_f=0.04)
    with pytest.warns(
        UserWarning, match=r"did not converge: t_f reached max_t_f = 0.04 and metric is 0.7 > 0.1; .*metric 0.5"
    ):
        run = fit(module, snapshots, callback, epochs=10)
    assert run.current_epoch == 3 and callback.growth.exhausted
    assert all(torch.equal(value, snapshots.seen[1][name]) for name, value in module.state_dict().items())


def test_a_training_that_ends_before_the_threshold_says_so(caplog):
    callback = GrowDepth(threshold=1e-6)
    fit(Classifier(lr=1e-5), callback, epochs=4)
    assert not callback.growth.done and callback.growth.steps == 4
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("the training ended and the training loss never met the threshold: DepthGrowth(" in m for m in messages)


def test_it_resumes_in_the_middle_of_growing(tmp_path):
    whole_callback, whole = GrowDepth(threshold=1e-9, patience=2), Classifier()
    fit(whole, whole_callback, epochs=8)
    run = fit(Classifier(), GrowDepth(threshold=1e-9, patience=2), epochs=5)
    run.save_checkpoint(path := tmp_path / "middle.ckpt")
    resumed_callback, resumed = GrowDepth(threshold=1e-9, patience=2), Classifier()
    fit(resumed, resumed_callback, epochs=8, path=path)
    assert resumed_callback.growth.state_dict() == whole_callback.growth.state_dict()
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_goes_back_from_an_explosion():
    module = Classifier(metric=metric(0.9, 0.5, math.nan, 0.05))
    callback = GrowDepth(threshold=0.1, monitor="metric")
    run = fit(module, callback, epochs=10)
    assert callback.growth.done and run.current_epoch == 4
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.015)
    assert [g.metric for g in callback.growth.history] == pytest.approx([0.9, 0.5])


def test_it_goes_back_from_a_model_that_was_spoiled():
    def spoil(learner, batch_idx):
        if learner.current_epoch == 5 and batch_idx == 0:  # what a step far too large leaves behind
            with torch.no_grad():
                for parameter in list(learner.model.vf.parameters())[-2:]:  # the last layer, against what was learned
                    parameter.mul_(-300.0)

    module, callback = Classifier(t_f=0.05, hook=spoil), GrowDepth(threshold=0.02, monitor="loss", patience=20)
    run = fit(module, callback, epochs=400)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.015)  # once
    assert callback.growth.done and module.accuracy() == 1.0
    # Of two batches an epoch: after epoch 5 the training went on from what it was before.
    assert max(module.losses[10:12]) > 1.0 > max(module.losses[:10] + module.losses[12:])


class Spoiled(Classifier):
    """What a step far too large leaves behind, after the last step of the fifth epoch."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.current_epoch == 4 and self.trainer.is_last_batch:
            with torch.no_grad():
                for parameter in list(self.model.vf.parameters())[-2:]:  # the last layer, against what was learned
                    parameter.mul_(-3000.0)


@pytest.mark.parametrize("batch", [64, 16])
def test_the_last_step_of_an_epoch_can_be_gone_back_from(batch):
    """The loss of that epoch was good, the model after it is not."""
    module, callback = Spoiled(t_f=0.05), GrowDepth(threshold=1e-9, patience=50)
    run = fit(module, callback, epochs=12, batch=batch)
    losses = torch.tensor(module.losses).reshape(12, -1).mean(1)
    assert losses[5] > losses[0] and losses[6:].max() < losses[0]
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.015)  # once


def test_all_optimizers_go_back_and_schedulers_keep_the_lower_rate():
    def optimizers(module):
        weights = [p for p in module.parameters() if p.dim()]
        first = torch.optim.SGD(weights[:2], 0.4, momentum=0.9)
        second = torch.optim.SGD(weights[2:], 0.2, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1.0) for o in (first, second)]

    class ByHand(Classifier):
        def __init__(self):
            super().__init__(metric=metric(0.9, 0.5, math.inf, 0.4, 0.3, 0.2))
            self.automatic_optimization = False

        def configure_optimizers(self):
            return optimizers(self)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return loss

        def on_train_epoch_end(self):
            for scheduler in self.lr_schedulers():
                scheduler.step()

    module, rates = ByHand(), []
    momenta = lambda: [o.state[o.param_groups[0]["params"][0]]["momentum_buffer"].clone() for o in run.optimizers]  # noqa: E731

    class Watch(pl.Callback):
        def on_train_epoch_start(self, run, learner):
            rates.append([o.param_groups[0]["lr"] for o in run.optimizers])
            moments.append(momenta() if learner.current_epoch else None)

    moments = []
    run = trainer(6, Watch(), GrowDepth(threshold=1e-9, monitor="metric"))
    run.fit(module, loader(blobs(), 32))
    assert rates == [[0.4, 0.2]] * 3 + [[0.2, 0.1]] * 3
    # The last good epoch is the second: it began with the momenta of the first one.
    assert all(torch.equal(a, b) for a, b in zip(moments[1], moments[3], strict=True))


class Validated(Classifier):
    """Logs a metric in the validation."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        self.log("val", self.values[self.current_epoch])


def test_with_a_metric_of_the_validation_the_model_that_was_validated_is_given_back():
    class Seen(pl.Callback):
        def on_validation_end(self, run, learner):
            if not run.sanity_checking:
                seen.append({name: value.clone() for name, value in learner.state_dict().items()})

    seen, module = [], Validated((0.9, 0.5, 0.7, 0.8, 0.8))
    callback = GrowDepth(threshold=0.1, monitor="val", max_t_f=0.04)
    run = trainer(10, Seen(), callback)
    with pytest.warns(UserWarning, match=r"val is 0.7 > 0.1; the best model seen \(val 0.5\) is given back"):
        run.fit(module, loader(blobs(), 32), loader(blobs(), 64))
    assert all(torch.equal(value, seen[1][name]) for name, value in module.state_dict().items())


def test_an_epoch_without_a_validation_says_nothing_new():
    module, callback = Validated([0.9] * 10), GrowDepth(threshold=0.1, monitor="val")
    run = trainer(6, callback, check_val_every_n_epoch=3)
    run.fit(module, loader(blobs(), 32), loader(blobs(), 64))
    assert callback.growth.steps == 2


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_an_average_goes_on_in_the_middle_of_an_epoch(tmp_path):
    class Saving(pl.Callback):
        def on_train_batch_end(self, run, learner, outputs, batch, batch_idx):
            if learner.global_step == 5:
                run.save_checkpoint(tmp_path / "c")

    x, y = blobs(16)
    data = loader((x.repeat(4, 1), y.repeat(4)), 16)  # four batches that are the same
    whole, resumed = GrowDepth(threshold=1e-9), GrowDepth(threshold=1e-9)
    trainer(3, whole, Saving()).fit(Classifier(), data)
    trainer(3, resumed).fit(Classifier(), data, ckpt_path=tmp_path / "c", weights_only=True)
    assert [g.metric for g in resumed.growth.history] == pytest.approx([g.metric for g in whole.growth.history])


def test_the_way_back_is_in_the_checkpoint(tmp_path):
    """An explosion right after a resumption leads to the state that was good before it."""

    def explodes_at_4():
        return Classifier(metric=metric(0.9, 0.5, 0.95, 0.8, math.inf, 0.05))

    whole, resumed = explodes_at_4(), explodes_at_4()
    fit(whole, GrowDepth(threshold=0.1, monitor="metric"), epochs=10)
    run = fit(first := explodes_at_4(), GrowDepth(threshold=0.1, monitor="metric"), epochs=4)
    run.save_checkpoint(path := tmp_path / "c")
    callback = GrowDepth(threshold=0.1, monitor="metric")
    fit(resumed, callback, epochs=10, path=path)
    assert callback.growth.done and not torch.equal(first.model.t_f, resumed.model.t_f)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_gives_up_on_a_loss_that_never_stops_exploding():
    module = Classifier(metric=lambda epoch: 0.5 if epoch < 2 else math.inf)
    callback = GrowDepth(threshold=0.1, monitor="metric")
    with pytest.warns(
        UserWarning, match=r"did not converge: the loss exploded to inf, also after 8 returns.*\(metric 0.5\)"
    ):
        run = fit(module, callback, epochs=20)
    assert run.current_epoch == 11 and all(p.isfinite().all() for p in module.parameters())


def test_t_f_is_given_back_after_an_error_too():
    def fail(learner, batch_idx):
        assert not learner.model.t_f.requires_grad
        raise KeyError("a fault of the user's own")

    module = Classifier(hook=fail)
    with pytest.raises(KeyError):
        fit(module, GrowDepth(threshold=0.1), epochs=1)
    assert module.model.t_f.requires_grad


class TwoSpans(Classifier):
    def __init__(self):
        super().__init__()
        self.other = make_node(3)


def test_of_several_spans_the_one_that_is_named_grows():
    module = TwoSpans()
    fit(module, GrowDepth(threshold=1e-9, span="model"), epochs=2)
    assert module.model.t_f.item() == pytest.approx(0.04) and module.other.t_f.item() == 1.0


def test_it_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="threshold must be positive and finite; got nan"):
        GrowDepth(threshold=math.nan)
    with pytest.raises(ValueError, match="increment must be .* got -1"):
        GrowDepth(threshold=0.1, increment=-1)
    with pytest.raises(ValueError, match="patience must be .* got -2"):
        GrowDepth(threshold=0.1, patience=-2)
    with pytest.raises(MisconfigurationException, match=r"monitor='los'\) found no such metric; logged were .*'loss'"):
        fit(Classifier(), GrowDepth(threshold=0.1, monitor="los"), epochs=2)
    with pytest.raises(ValueError, match="the loss is nan before anything was learned"):
        fit(Classifier(metric=metric(math.nan)), GrowDepth(threshold=0.1, monitor="metric"), epochs=2)
    with pytest.raises(ValueError, match="the metric is nan at t_f = 0.02"):
        fit(Classifier(metric=metric(math.nan)), GrowDepth(threshold=0.1, monitor="metric", rescue=False), epochs=2)
    with pytest.raises(MisconfigurationException, match="no span named 'other'; there are .'model'"):
        fit(Classifier(), GrowDepth(threshold=0.1, span="other"), epochs=2)
    with pytest.raises(
        MisconfigurationException, match=r"there are \['model', 'other'\]: say with span= which one grows"
    ):
        fit(TwoSpans(), GrowDepth(threshold=0.1), epochs=2)
    with pytest.raises(ValueError, match="max_t_f = 0.01 lies below t_f = 0.02"):
        fit(Classifier(), GrowDepth(threshold=0.1, max_t_f=0.01), epochs=2)


class Silent(Classifier):
    """By hand, with nothing returned."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(*batch))


def test_a_step_that_returns_no_loss_needs_a_monitor():
    with pytest.raises(MisconfigurationException, match=r"monitor=None\) found no loss from training_step"):
        fit(Silent(), GrowDepth(threshold=0.1), epochs=1)


def test_a_look_is_not_lost_with_a_checkpoint_that_is_written_when_the_validation_ends(tmp_path):
    class Saving(pl.Callback):
        def on_validation_end(self, run, learner):
            if learner.current_epoch == 3:
                run.save_checkpoint(tmp_path / "c")

    whole, resumed, options = (
        GrowDepth(1e-9, monitor="val"),
        GrowDepth(1e-9, monitor="val"),
        dict(check_val_every_n_epoch=2),
    )
    data = loader(blobs(), 32), loader(blobs(), 64)
    run = trainer(8, whole, **options)
    run.callbacks.append(Saving())  # after it, as a ModelCheckpoint is
    run.fit(Validated([0.9] * 10), *data)
    trainer(8, resumed, **options).fit(Validated([0.9] * 10), *data, ckpt_path=tmp_path / "c", weights_only=True)
    assert resumed.growth.state_dict() == whole.growth.state_dict() and whole.growth.steps == 4


def test_a_threshold_that_is_met_in_an_epoch_whose_last_step_fails_gives_back_the_model_before_it():
    class Broken(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.current_epoch == 2 and self.trainer.is_last_batch:
                with torch.no_grad():
                    next(self.model.vf.parameters()).fill_(math.nan)

    module, states = Broken(metric=metric(0.9, 0.5, 0.05)), Snapshots()
    callback = GrowDepth(threshold=0.1, monitor="metric")
    fit(module, states, callback, epochs=5)
    assert callback.growth.done
    assert all(torch.equal(value, states.seen[2][name]) for name, value in module.state_dict().items())
