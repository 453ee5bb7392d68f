"""MinimumTime: the same training as a plain loop with `loss + weight * span.duration`, and nothing else."""

import contextlib
import csv
import math
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from learners import Learner, loader, make_node, points, trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import MinimumTime

SPAN = torch.linspace(0, 1, 11)
WEIGHT = 0.3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


class Quickstart(Learner):
    """torchdyn's quickstart: it keeps its own t_span, passes it, and returns a dict."""

    def __init__(self, model, t_span=SPAN, optimizer=OPTIMIZERS["adam"]):
        super().__init__(model, t_span, optimizer)

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx)}


def node(seed=0, **options):
    return make_node(width=8, seed=seed, **options)


def batches(n=7):
    return loader(points(8 * n))


def fit(learner, epochs=2, weight=WEIGHT, **options):
    run = trainer(epochs, MinimumTime(weight=weight), **options)
    run.fit(learner, batches())
    return run


def plain_loop(model, make_optimizer, epochs=2, weight=WEIGHT, accumulate=1, clip=None, autocast=False, record=None):
    """Algorithm 1 in plain PyTorch, with Lightning's conventions: a window's loss is a mean, the last may be partial."""
    span = tm.wrap(model, SPAN)
    optimizer, data = make_optimizer(span.parameters()), batches()
    span.train()
    for _ in range(epochs):
        for i, (x, y) in enumerate(data):
            # Without the cache of cast weights, as Lightning has it: with it, gradients add up in bfloat16.
            mixed = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
            with mixed if autocast else contextlib.nullcontext():
                loss = nn.CrossEntropyLoss()(span(x, SPAN)[1][-1], y)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(data):
                (weight * span.duration).backward()  # once a step, of a partial window too
                if clip is not None:
                    clip(span.parameters())
                optimizer.step()
                optimizer.zero_grad()
                span.clip_()
                if record is not None:
                    record.append(span.t_f.item())
    return span


def assert_same(learner, span):
    """To 1e-6, as the issue asks: the same sums in another order."""
    ours = learner.model
    assert span.t_f.item() != 1.0, "t_f never moved: the comparison would say nothing"
    assert ours.t_f.item() == pytest.approx(span.t_f.item(), abs=1e-6)
    for (name, a), (_, b) in zip(ours.named_parameters(), span.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the plain loop


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_quickstart_learner_trains_as_the_plain_loop(name):
    learner = Quickstart(node(), optimizer=OPTIMIZERS[name])
    fit(learner)
    assert isinstance(learner.model, tm.LearnableSpan)
    assert_same(learner, plain_loop(node(), OPTIMIZERS[name]))


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_the_same_under_an_adjoint(sensitivity):
    learner = Quickstart(node(sensitivity=sensitivity))
    fit(learner)
    assert_same(learner, plain_loop(node(sensitivity=sensitivity), OPTIMIZERS["adam"]))


@pytest.mark.parametrize("solver", ["euler", "tsit5"])
def test_the_same_with_other_solvers(solver):
    learner = Quickstart(node(solver=solver))
    fit(learner)
    assert_same(learner, plain_loop(node(solver=solver), OPTIMIZERS["adam"]))


@pytest.mark.parametrize("accumulate", [2, 3, 7, 10])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_with_gradient_accumulation_and_a_partial_last_window(name, accumulate):
    learner = Quickstart(node(), optimizer=OPTIMIZERS[name])
    fit(learner, accumulate_grad_batches=accumulate)
    assert_same(learner, plain_loop(node(), OPTIMIZERS[name], accumulate=accumulate))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_gradient_clipping(algorithm, accumulate):
    limit = 0.05
    learner = Quickstart(node(), optimizer=OPTIMIZERS["sgd"])
    fit(learner, gradient_clip_val=limit, gradient_clip_algorithm=algorithm, accumulate_grad_batches=accumulate)

    def clip(parameters):
        # The price of time counts in the clipped norm, as every other part of the loss.
        if algorithm == "norm":
            assert float(nn.utils.clip_grad_norm_(list(parameters), limit)) > limit
        else:
            nn.utils.clip_grad_value_(list(parameters), limit)

    assert_same(learner, plain_loop(node(), OPTIMIZERS["sgd"], accumulate=accumulate, clip=clip))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_in_bfloat16_mixed_precision(accumulate):
    learner = Quickstart(node())
    fit(learner, precision="bf16-mixed", accumulate_grad_batches=accumulate)
    assert learner.model.t_f.dtype == torch.float32
    assert_same(learner, plain_loop(node(), OPTIMIZERS["adam"], accumulate=accumulate, autocast=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GPU")
def test_in_float16_mixed_precision_on_a_gpu():
    learner = Quickstart(node(), SPAN.cuda(), OPTIMIZERS["sgd"])
    fit(learner, precision="16-mixed", accelerator="gpu")
    span = plain_loop(node(), OPTIMIZERS["sgd"])
    # The plain loop runs in float32 on the CPU: the price of time must not be scaled, float16 leaves three digits.
    assert learner.model.t_f.item() == pytest.approx(span.t_f.item(), abs=2e-3)


def test_every_update_of_t_f_is_the_plain_loops():
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, run, learner, *_):
            self.seen.append(learner.model.t_f.item())

    learner, watch, expected = Quickstart(node()), Watch(), []
    trainer(2, MinimumTime(weight=WEIGHT), watch).fit(learner, batches())
    plain_loop(node(), OPTIMIZERS["adam"], record=expected)
    assert watch.seen == pytest.approx(expected, abs=1e-6)


def test_clipping_of_equation_14_is_the_plain_loops_too():
    # A price so high that t_f runs to its lower bound and stays there.
    learner = Quickstart(node(), optimizer=OPTIMIZERS["sgd"])
    fit(learner, weight=20.0)
    span = plain_loop(node(), OPTIMIZERS["sgd"], weight=20.0)
    assert learner.model.t_f.item() == span.t_f.item() == pytest.approx(0.1)


def test_weight_zero_adds_nothing():
    learner = Quickstart(node())
    fit(learner, weight=0.0)
    span = tm.wrap(node(), SPAN)
    optimizer = OPTIMIZERS["adam"](span.parameters())
    for _ in range(2):
        for x, y in batches():
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(span(x)[1][-1], y).backward()
            optimizer.step()
            span.clip_()
    assert learner.model.t_f.item() == pytest.approx(span.t_f.item(), abs=1e-6)


class Manual(pl.LightningModule):
    """Two NeuralODEs with an optimizer each, stepped by hand and in turn."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second
        self.automatic_optimization = False

    def losses(self, x, y):
        a = self.first(x, SPAN)[1][-1]
        b = self.second(x, SPAN)[1][-1]
        return nn.CrossEntropyLoss()(a, y), (b - x).square().mean() + b.square().mean()

    def training_step(self, batch, batch_idx):
        for i, optimizer in enumerate(self.optimizers()):
            loss = self.losses(*batch)[i]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.first.parameters(), lr=0.01), torch.optim.SGD(self.second.parameters(), lr=0.05)


def test_several_optimizers_by_hand():
    learner = Manual(node(0), node(1))
    fit(learner)
    plain = Manual(tm.wrap(node(0), SPAN), tm.wrap(node(1), SPAN))
    spans, optimizers = (plain.first, plain.second), plain.configure_optimizers()
    for _ in range(2):
        for batch in batches():
            for i, optimizer in enumerate(optimizers):
                loss = plain.losses(*batch)[i] + WEIGHT * spans[i].duration
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                spans[i].clip_()
    for ours, span in zip((learner.first, learner.second), spans, strict=True):
        assert span.t_f.item() != 1.0
        assert ours.t_f.item() == pytest.approx(span.t_f.item(), abs=1e-6)


class ManualAlternating(pl.LightningModule):
    """Algorithm 1 by hand: one backward, then the weights' optimizer and the time's."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        weights, times = self.optimizers()
        weights.zero_grad(), times.zero_grad()
        self.manual_backward(nn.CrossEntropyLoss()(self.model(x, SPAN)[1][-1], y))
        weights.step()
        times.step()

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.node.parameters(), lr=0.01), torch.optim.SGD([self.model.t_f], lr=0.02)


def test_an_optimizer_for_the_time_alone():
    learner = ManualAlternating(node())
    fit(learner)
    span = tm.wrap(node(), SPAN)
    weights, times = torch.optim.Adam(span.node.parameters(), lr=0.01), torch.optim.SGD([span.t_f], lr=0.02)
    for _ in range(2):
        for x, y in batches():
            weights.zero_grad(), times.zero_grad()
            (nn.CrossEntropyLoss()(span(x, SPAN)[1][-1], y) + WEIGHT * span.duration).backward()
            weights.step(), times.step()
            span.clip_()
    assert learner.model.t_f.item() == pytest.approx(span.t_f.item(), abs=1e-6)


class ByHand(Quickstart):
    """Several backwards before a step, or one and a clear between, as a training_step by hand may do."""

    def __init__(self, model, how, clears):
        super().__init__(model, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        self.automatic_optimization = False
        self.how, self.clears, self.seen = how, clears, []

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers(), self.loss(*batch)
        if self.how == "two losses":
            self.manual_backward(loss / 2, retain_graph=True)
            self.manual_backward(loss / 2)
        elif self.how == "sharpness-aware":  # the gradient of the first pass only says where to look
            self.manual_backward(loss)
            self.zero_grad()
            self.manual_backward(self.loss(*batch))
        else:
            self.manual_backward(loss / 3 if self.how == "accumulates" else loss)
        if self.how != "accumulates" or batch_idx % 3 == 2:
            self.seen.append(self.model.t_f.grad.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=self.clears == "None")


@pytest.mark.parametrize("clears", ["None", "0"])
@pytest.mark.parametrize("how", ["one", "two losses", "sharpness-aware", "accumulates"])
def test_the_price_is_on_the_gradient_once_a_step_whatever_the_number_of_backwards(how, clears):
    grads = {}
    for weight in (0.0, WEIGHT):
        learner = ByHand(node(), how, clears)
        fit(learner, epochs=1, weight=weight)
        grads[weight] = learner.seen
    assert len(grads[0.0]) == (2 if how == "accumulates" else 7)
    # float32, of gradients below 1
    assert [a - b for a, b in zip(grads[WEIGHT], grads[0.0], strict=True)] == pytest.approx(
        [WEIGHT] * len(grads[0.0]), abs=1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a user need not do


def test_one_added_line_shortens_the_span():
    vanilla, fast = Quickstart(node()), Quickstart(node())
    trainer(3).fit(vanilla, batches())
    fit(fast, epochs=3, weight=1.0)
    assert isinstance(vanilla.model, NeuralODE)
    assert 0.1 <= fast.model.t_f.item() < 0.9


def test_the_learners_own_span_becomes_the_template():
    t_span = torch.linspace(0, 2, 21)
    learner = Quickstart(node(), t_span)
    fit(learner, epochs=1)
    assert torch.equal(learner.model.t_span, t_span)
    assert learner.model.bounds == pytest.approx((0.1, 2.0), abs=1e-6)
    assert 1.5 < learner.model.t_f.item() < 2.0


def test_a_model_that_is_wrapped_already_keeps_its_span():
    span = tm.LearnableSpan(node(), SPAN, t_f=0.8)
    learner = Quickstart(span)
    fit(learner, epochs=1)
    assert learner.model is span and span.t_f.item() != pytest.approx(0.8)


def test_several_nodes_deep_inside():
    class Last(nn.Module):
        def forward(self, sol):
            return sol[-1]

    class Deep(Learner):
        def loss(self, x, y):
            return nn.CrossEntropyLoss()(self.model(x), y)

    model = nn.Sequential(node(0, return_t_eval=False), Last(), nn.Sequential(node(1, return_t_eval=False), Last()))
    learner = Deep(model)
    metrics = fit(learner, epochs=1).callback_metrics
    assert all(span.t_f.item() < 1.0 for span in tm.spans(learner))
    assert {"t_f/model.0", "nfe/model.0", "t_f/model.2.0", "nfe/model.2.0"} <= set(metrics)


def test_t_f_and_nfe_are_logged():
    learner = Quickstart(node())
    metrics = fit(learner).callback_metrics
    assert float(metrics["t_f"]) == pytest.approx(learner.model.t_f.item())
    # rk4 over a grid of about ten steps.
    assert 20 <= float(metrics["nfe"]) <= 44


@pytest.mark.parametrize("every", [1, 50])
def test_a_csv_log_has_t_f_and_nfe_at_every_epoch_and_at_the_steps_that_the_trainer_logs(tmp_path, every):
    learner, logger = Quickstart(node()), CSVLogger(tmp_path)
    run = fit(learner, epochs=3, logger=logger, log_every_n_steps=every)  # 7 batches an epoch
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["t_f"]]
    assert len(rows) == 3 + (21 if every == 1 else 0)
    assert all(20 <= float(row["nfe"]) <= 44 for row in rows)
    assert float(rows[-1]["t_f"]) == pytest.approx(learner.model.t_f.item(), abs=1e-6)
    assert {"t_f", "nfe"} <= set(run.callback_metrics)


def test_the_callback_can_be_used_for_validation_and_prediction_too():
    class Validated(Quickstart):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(*batch))

    learner, run = Validated(node()), trainer(2, MinimumTime(weight=WEIGHT))
    run.fit(learner, batches(), batches(2))
    t_f = learner.model.t_f.item()
    (result,) = run.validate(learner, batches(2), verbose=False)
    assert math.isfinite(result["val_loss"]) and learner.model.t_f.item() == t_f
    assert isinstance(learner.model.node, NeuralODE), "wrapped once, not once a stage"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("given", [SPAN, torch.linspace(0, 2, 21)], ids=["the default end", "another end"])
def test_training_resumes_where_it_stopped(tmp_path, given):
    whole = Quickstart(node(), given)
    fit(whole, epochs=4)
    fit(Quickstart(node(), given), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    # A fresh process: other weights, a bare NeuralODE, the same callback.
    resumed = Quickstart(node(seed=5), given)
    trainer(4, MinimumTime(weight=WEIGHT)).fit(resumed, batches(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert resumed.model.t_f.item() == pytest.approx(whole.model.t_f.item(), abs=1e-7)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_loads_with_the_safe_default(tmp_path):
    learner = Quickstart(node())
    fit(learner, epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    other, bare = Quickstart(tm.wrap(node(seed=3))), Quickstart(node(seed=3))
    other.load_state_dict(state)
    assert torch.equal(other.model.t_f, learner.model.t_f)
    assert not bare.load_state_dict(state, strict=False).missing_keys


def test_a_checkpoint_says_how_to_load_it_into_a_module_that_is_not_wrapped(tmp_path):
    class Validated(Quickstart):
        def __init__(self, seed=3):
            super().__init__(node(seed))

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(*batch))

    learner, path = Validated(0), tmp_path / "one.ckpt"
    run = trainer(1, MinimumTime(weight=WEIGHT))
    run.fit(learner, batches(), batches(1))
    run.save_checkpoint(path)
    with pytest.raises(RuntimeError, match="make the module, `from torchdyn_mintime import wrap; wrap.module"):
        Validated.load_from_checkpoint(path, weights_only=True)
    with pytest.raises(RuntimeError, match="then load this state_dict"):
        trainer(1).validate(Validated(), batches(2), ckpt_path=path, verbose=False, weights_only=True)
    # As it says, or with the callback: and the same again, since the wrapped module needs no hint.
    by_hand = tm.wrap(Validated())
    kept = torch.load(path, weights_only=True)["state_dict"]
    # The hint of version 0.1 has other words.
    old = {key.partition("(")[0] + "(was wrapped by a callback)" if "(" in key else key: v for key, v in kept.items()}
    assert old.keys() != kept.keys() and len(old) == len(kept)
    for state in (old, kept):
        by_hand.load_state_dict(state)
    (loss,) = trainer(1).validate(by_hand, batches(2), verbose=False)
    for other in (Validated(), tm.wrap(Validated())):
        run = trainer(1, MinimumTime(weight=WEIGHT))
        (found,) = run.validate(other, batches(2), ckpt_path=path, verbose=False, weights_only=True)
        assert found == loss and other.model.t_f.item() == learner.model.t_f.item() != 1.0
    assert set(by_hand.state_dict()) == set(learner.state_dict())


def test_a_vanilla_checkpoint_can_start_minimum_time_training(tmp_path):
    run = trainer(1)
    run.fit(Quickstart(node()), batches())
    run.save_checkpoint(tmp_path / "vanilla.ckpt")
    learner = Quickstart(node(seed=5))
    learner.load_state_dict(torch.load(tmp_path / "vanilla.ckpt", weights_only=True)["state_dict"])
    fit(learner, epochs=1)
    assert learner.model.t_f.item() < 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("weight", [-0.1, -1, math.nan, math.inf], ids=str)
def test_a_bad_weight_is_refused_and_named(weight):
    with pytest.raises(ValueError, match=str(weight).replace(".", r"\.")):
        MinimumTime(weight=weight)


@pytest.mark.parametrize("weight", ["heavy", [1.0]], ids=str)
def test_a_weight_of_the_wrong_kind_is_refused(weight):
    with pytest.raises((TypeError, ValueError)):
        MinimumTime(weight=weight)


def test_a_module_without_a_neural_ode_is_an_error():
    with pytest.raises(MisconfigurationException, match="found no NeuralODE in Learner"):
        fit(Learner(nn.Linear(2, 2)), epochs=1)


class Itself(NeuralODE):
    def training_step(self, batch, batch_idx):
        raise AssertionError("the training must not begin")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_a_module_that_is_a_neural_ode_itself_is_an_error():
    """It cannot be wrapped in place, and would train without the price of time."""
    with pytest.raises(
        MisconfigurationException, match="found no NeuralODE in Itself; make it in __init__ .* attribute"
    ):
        fit(Itself(nn.Linear(2, 2), solver="rk4"), epochs=1)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1)],
    ids=["AdamW", "SGD"],
)
def test_an_optimizer_that_decays_the_time_gets_a_warning(optimizer):
    with pytest.warns(UserWarning, match="(?i)decay"):
        fit(Quickstart(node(), optimizer=optimizer), epochs=1)


def test_an_optimizer_that_spares_the_time_gets_none():
    class Grouped(Quickstart):
        def configure_optimizers(self):
            return torch.optim.AdamW(tm.parameter_groups(self, lr=0.01, weight_decay=0.1))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Grouped(node()), epochs=1)
        fit(Quickstart(node()), epochs=1)
    assert not [w for w in caught if "decay" in str(w.message).lower()]


@pytest.mark.parametrize("how", [{"weight": WEIGHT}, {"target": 0.5}])
def test_a_time_that_is_frozen_gets_a_warning_and_stays(how):
    span = tm.LearnableSpan(node(), SPAN)
    span.t_f.requires_grad_(False)
    with pytest.warns(UserWarning, match="t_f of model is frozen, and stays at 1 whatever"):
        trainer(1, MinimumTime(**how)).fit(Quickstart(span), batches())
    assert span.t_f.item() == 1.0


def test_an_optimizer_that_never_sees_the_time_is_noticed():
    # Made before the model was wrapped, or over the network's own parameters: t_f would silently stay where it is.
    class Forgetful(Quickstart):
        def configure_optimizers(self):
            return torch.optim.Adam(self.model.node.vf.parameters(), lr=0.01)

    with pytest.raises(MisconfigurationException, match="t_f of model is in no optimizer"):
        fit(Forgetful(node()), epochs=1)


def test_with_a_target_a_start_that_is_learned_alone_is_moved_too():
    class Watch(pl.Callback):
        def on_before_zero_grad(self, run, learner, optimizer):
            left.append(learner.model.t0.grad)

    left = []
    span = tm.LearnableSpan(make_node(2, 4), torch.linspace(0, 1, 5), learn_t0=True)
    span.t_f.requires_grad_(False)
    callback, module = MinimumTime(target=5.0), Learner(span)
    trainer(2, callback, Watch()).fit(module, loader(points()))
    assert callback.price.weight is not None and module.model.t0.item() != 0.0 and left[1:] == [None] * len(left[1:])
