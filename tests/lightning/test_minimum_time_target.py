"""MinimumTime with a target loss instead of a weight: the price of time is found."""

import pytest
import pytorch_lightning as pl
import torch
from learners import Learner, annuli, blobs, loader, make_node, trainer

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import ConvergenceRate, MinimumTime


def test_with_a_target_the_shortest_model_that_meets_it_is_given_back():
    torch.manual_seed(0)
    learner = Learner(make_node(3, 32), torch.linspace(0, 1, 21), lambda p: torch.optim.Adam(p, lr=0.03), classes=2)
    data, callback = annuli(), MinimumTime(target=0.05)
    trainer(250, callback).fit(learner, loader(data, 128))
    span = learner.model
    assert callback.price.feasible
    assert span.t_f.item() == pytest.approx(callback.price.best["duration"], rel=1e-6)
    assert span.t_f.item() < 1.0
    with torch.no_grad():
        assert learner.loss(*data).item() <= 0.05 * (1 + 1e-4)


def test_the_target_can_be_held_against_a_logged_metric():
    """The combined method of appendix F.2, with the price of time found for a terminal loss."""
    torch.manual_seed(0)
    span = tm.LearnableSpan(make_node(3, 8), torch.linspace(0, 0.05, 6))
    module = ConvergenceRate(span, classes=2, terminal_weight=1.0, lr=0.1)
    callback, data = MinimumTime(target=0.1, monitor="terminal"), blobs()
    trainer(60, callback).fit(module, loader(data, 64))
    assert callback.price.feasible and callback.price.best["loss"] <= 0.1
    # Never fewer points than the Lyapunov loss needs.
    assert 0.04 - 1e-6 <= span.t_f.item() == pytest.approx(callback.price.best["duration"], rel=1e-6)
    with torch.no_grad():
        assert module.potential(span(data[0])[1][-1], data[1]).mean().item() <= 0.1


class Validated(Learner):
    """Logs the loss of the validation, and keeps each with t_f as it was then."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen, self.moved = [], []

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(*batch))

    def on_validation_end(self):
        self.seen.append((self.model.t_f.item(), self.trainer.callback_metrics["val"].item()))

    def on_train_batch_start(self, batch, batch_idx):
        if self.current_epoch == 0:
            self.moved.append(self.model.t_f.item())


def test_the_target_is_held_against_a_metric_of_the_validation_for_the_model_that_was_validated():
    torch.manual_seed(0)
    learner = Validated(make_node(3, 16), torch.linspace(0, 1, 6), lambda p: torch.optim.Adam(p, lr=0.05), classes=2)
    data, callback = annuli(), MinimumTime(target=0.5, monitor="val")
    fit = trainer(10, callback, num_sanity_val_steps=1)
    fit.fit(learner, loader(data, 32, shuffle=True), loader(data, 64))
    assert set(learner.moved[1:]) == {1.0}  # nothing is known of the metric in the first epoch
    best = callback.price.best
    assert (learner.model.t_f.item(), best["loss"]) in learner.seen and best["loss"] <= 0.5
    assert best["duration"] <= 1.01 * min(t_f for t_f, loss in learner.seen if loss <= 0.5) < 1.0
    with torch.no_grad():
        assert learner.loss(*data).item() == pytest.approx(best["loss"], rel=1e-5)


def test_a_learned_t0_stays_too_until_the_metric_is_known():
    class Watched(Validated):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 0:
                self.moved.append(self.model.t0.item())

    span = tm.LearnableSpan(make_node(3, 8), torch.linspace(0, 1, 6), learn_t0=True)
    learner = Watched(span, optimizer=lambda p: torch.optim.Adam(p, lr=0.05), classes=2)
    trainer(2, MinimumTime(target=0.5, monitor="val")).fit(learner, loader(annuli(), 32), loader(annuli(), 64))
    assert len(learner.moved) > 2 and set(learner.moved) == {0.0}
    assert span.t0.item() != 0.0


def test_a_training_for_a_metric_of_the_validation_goes_on_from_a_checkpoint(tmp_path):
    class Saved(pl.Callback):
        def on_train_epoch_end(self, fit, module):
            if fit.current_epoch == 1:
                fit.save_checkpoint(tmp_path / "c.ckpt")

    def fitted(*callbacks, **options):
        learner = Validated(make_node(3, 8, seed=0), torch.linspace(0, 1, 6), classes=2)
        callback = MinimumTime(target=0.6, monitor="val")
        trainer(4, callback, *callbacks).fit(learner, loader(annuli(), 32), loader(annuli(), 64), **options)
        return learner.model.t_f.item(), callback.price.weight

    torch.manual_seed(0)
    whole = fitted(Saved())
    torch.manual_seed(0)
    assert fitted(ckpt_path=tmp_path / "c.ckpt") == whole


def test_the_target_is_met_on_all_the_data_and_not_on_a_lucky_batch():
    torch.manual_seed(0)
    learner = Learner(make_node(3, 32), torch.linspace(0, 1, 6), lambda p: torch.optim.Adam(p, lr=0.01), classes=2)
    data, callback = annuli(), MinimumTime(target=0.3)
    trainer(60, callback, accumulate_grad_batches=2).fit(learner, loader(data, 8, shuffle=True))
    assert callback.price.feasible and learner.model.t_f.item() < 1.0
    with torch.no_grad():
        assert learner.loss(*data).item() <= 0.3


def test_it_takes_a_weight_or_a_target():
    with pytest.raises(ValueError, match="not both"):
        MinimumTime(weight=1.0, target=0.1)
    with pytest.raises(ValueError, match="target"):
        MinimumTime(target=-1.0)
    with pytest.raises(ValueError, match="monitor"):
        MinimumTime(weight=1.0, monitor="val")


def test_a_metric_that_nobody_logs_is_named_once():
    module = Learner(make_node(3, 8), torch.linspace(0, 1, 6), classes=2)
    with pytest.warns(UserWarning, match="monitor='val_los' was not logged yet") as caught:
        trainer(3, MinimumTime(target=0.4, monitor="val_los")).fit(module, loader(annuli(16), 16))
    assert sum("val_los" in str(each.message) for each in caught) == 1


def test_a_metric_that_another_callback_logs_at_the_end_of_an_epoch_is_found():
    class Mean(pl.Callback):
        def on_train_epoch_end(self, run, module):
            module.log("mean", torch.tensor(module.losses).mean())

    torch.manual_seed(0)
    module, callback = (
        Learner(make_node(3, 8), torch.linspace(0, 1, 6), classes=2),
        MinimumTime(target=0.4, monitor="mean"),
    )
    run = trainer(3, callback)
    run.callbacks.append(Mean())
    run.fit(module, loader(annuli(16), 16))
    assert callback.price.weight is not None
