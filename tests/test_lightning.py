"""The Lightning callback: the same training as a plain loop with `loss + weight * span.duration`, and nothing else."""

import contextlib
import math
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import MinimumTime

# Lightning warns about workers and loggers that these tests do without on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*isinstance.treespec.*",
    "ignore:.*log_every_n_steps.*",
)

SPAN = torch.linspace(0, 1, 11)
WEIGHT = 0.3


def _data(batches=7, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches * size, 2, generator=generator)
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), size


def _loader(batches=7):
    data, size = _data(batches)
    return DataLoader(data, batch_size=size)


def _node(seed=0, **options):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    return NeuralODE(net, **{"solver": "rk4", **options})


class Learner(pl.LightningModule):
    """torchdyn's quickstart: it keeps its own t_span, passes it, and reads y_hat[-1]."""

    def __init__(self, t_span, model, optimizer=lambda p: torch.optim.Adam(p, lr=0.01)):
        super().__init__()
        self.model, self.t_span, self.optimizer = model, t_span, optimizer

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        _t_eval, y_hat = self.model(x, self.t_span)
        y_hat = y_hat[-1]
        loss = nn.CrossEntropyLoss()(y_hat, y)
        return {"loss": loss}

    def configure_optimizers(self):
        return self.optimizer(self.model.parameters())


def _trainer(epochs=2, callbacks=(), **options):
    return pl.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": list(callbacks),
            **options,
        }
    )


def _fit(learner, epochs=2, weight=WEIGHT, batches=7, **options):
    trainer = _trainer(epochs, [MinimumTime(weight=weight)], **options)
    trainer.fit(learner, _loader(batches))
    return trainer


def _plain_loop(
    node, make_optimizer, epochs=2, weight=WEIGHT, batches=7, accumulate=1, clip=None, autocast=False, record=None
):
    """Algorithm 1 in plain PyTorch, with Lightning's conventions: a window's loss is a mean, the last may be partial."""
    span = tm.wrap(node, SPAN)
    optimizer, loader = make_optimizer(span.parameters()), _loader(batches)
    span.train()
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader):
            # Without the cache of cast weights, as Lightning has it: with it, gradients add up in bfloat16.
            mixed = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
            with mixed if autocast else contextlib.nullcontext():
                loss = nn.CrossEntropyLoss()(span(x, SPAN)[1][-1], y)
            ((loss + weight * span.duration) / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                if clip is not None:
                    clip(span.parameters())
                optimizer.step()
                optimizer.zero_grad()
                span.clip_()
                if record is not None:
                    record.append(float(span.t_f.detach()))
    return span


def _same(learner, span):
    """To 1e-6, as the issue asks: the same sums in another order."""
    ours = learner.model
    assert float(span.t_f.detach()) != 1.0, "t_f never moved: the comparison would say nothing"
    assert float(ours.t_f.detach()) == pytest.approx(float(span.t_f.detach()), abs=1e-6)
    for (name, a), (_, b) in zip(ours.named_parameters(), span.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the plain loop


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_quickstart_learner_trains_as_the_plain_loop(name):
    learner = Learner(SPAN, _node(), OPTIMIZERS[name])
    _fit(learner)
    assert isinstance(learner.model, tm.LearnableSpan)
    _same(learner, _plain_loop(_node(), OPTIMIZERS[name]))


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_the_same_under_an_adjoint(sensitivity):
    learner = Learner(SPAN, _node(sensitivity=sensitivity))
    _fit(learner)
    _same(learner, _plain_loop(_node(sensitivity=sensitivity), OPTIMIZERS["adam"]))


@pytest.mark.parametrize("solver", ["euler", "tsit5"])
def test_the_same_with_other_solvers(solver):
    learner = Learner(SPAN, _node(solver=solver))
    _fit(learner)
    _same(learner, _plain_loop(_node(solver=solver), OPTIMIZERS["adam"]))


@pytest.mark.parametrize("accumulate", [2, 3, 7, 10])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_with_gradient_accumulation_and_a_partial_last_window(name, accumulate):
    learner = Learner(SPAN, _node(), OPTIMIZERS[name])
    _fit(learner, accumulate_grad_batches=accumulate)
    _same(learner, _plain_loop(_node(), OPTIMIZERS[name], accumulate=accumulate))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_gradient_clipping(algorithm, accumulate):
    limit = 0.05
    learner = Learner(SPAN, _node(), OPTIMIZERS["sgd"])
    _fit(learner, gradient_clip_val=limit, gradient_clip_algorithm=algorithm, accumulate_grad_batches=accumulate)

    def clip(parameters):
        # The price of time counts in the clipped norm, as every other part of the loss.
        if algorithm == "norm":
            assert float(nn.utils.clip_grad_norm_(list(parameters), limit)) > limit
        else:
            nn.utils.clip_grad_value_(list(parameters), limit)

    _same(learner, _plain_loop(_node(), OPTIMIZERS["sgd"], accumulate=accumulate, clip=clip))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_in_bfloat16_mixed_precision(accumulate):
    learner = Learner(SPAN, _node())
    _fit(learner, precision="bf16-mixed", accumulate_grad_batches=accumulate)
    assert learner.model.t_f.dtype == torch.float32
    _same(learner, _plain_loop(_node(), OPTIMIZERS["adam"], accumulate=accumulate, autocast=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GPU")
def test_in_float16_mixed_precision_on_a_gpu():
    learner = Learner(SPAN.cuda(), _node(), OPTIMIZERS["sgd"])
    _fit(learner, precision="16-mixed", accelerator="gpu")
    span = _plain_loop(_node(), OPTIMIZERS["sgd"])
    # The plain loop runs in float32 on the CPU: the price of time must not be scaled, float16 leaves three digits.
    assert float(learner.model.t_f.detach()) == pytest.approx(float(span.t_f.detach()), abs=2e-3)


def test_every_update_of_t_f_is_the_plain_loops():
    class Watch(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, learner, *_):
            self.seen.append(float(learner.model.t_f.detach()))

    learner, watch, expected = Learner(SPAN, _node()), Watch(), []
    _trainer(2, [MinimumTime(weight=WEIGHT), watch]).fit(learner, _loader())
    _plain_loop(_node(), OPTIMIZERS["adam"], record=expected)
    assert watch.seen == pytest.approx(expected, abs=1e-6)


def test_clipping_of_equation_14_is_the_plain_loops_too():
    # A price so high that t_f runs to its lower bound and stays there.
    learner = Learner(SPAN, _node(), OPTIMIZERS["sgd"])
    _fit(learner, weight=20.0)
    span = _plain_loop(_node(), OPTIMIZERS["sgd"], weight=20.0)
    assert float(learner.model.t_f.detach()) == float(span.t_f.detach()) == pytest.approx(0.1)


def test_weight_zero_adds_nothing():
    learner = Learner(SPAN, _node())
    _fit(learner, weight=0.0)
    span = tm.wrap(_node(), SPAN)
    optimizer = OPTIMIZERS["adam"](span.parameters())
    for _ in range(2):
        for x, y in _loader():
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(span(x)[1][-1], y).backward()
            optimizer.step()
            span.clip_()
    assert float(learner.model.t_f.detach()) == pytest.approx(float(span.t_f.detach()), abs=1e-6)


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
    learner = Manual(_node(0), _node(1))
    _fit(learner)
    plain = Manual(tm.wrap(_node(0), SPAN), tm.wrap(_node(1), SPAN))
    spans, optimizers = (plain.first, plain.second), plain.configure_optimizers()
    for _ in range(2):
        for batch in _loader():
            for i, optimizer in enumerate(optimizers):
                loss = plain.losses(*batch)[i] + WEIGHT * spans[i].duration
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                spans[i].clip_()
    for ours, span in zip((learner.first, learner.second), spans, strict=True):
        assert float(span.t_f.detach()) != 1.0
        assert float(ours.t_f.detach()) == pytest.approx(float(span.t_f.detach()), abs=1e-6)


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
    learner = ManualAlternating(_node())
    _fit(learner)
    span = tm.wrap(_node(), SPAN)
    weights, times = torch.optim.Adam(span.node.parameters(), lr=0.01), torch.optim.SGD([span.t_f], lr=0.02)
    for _ in range(2):
        for x, y in _loader():
            weights.zero_grad(), times.zero_grad()
            (nn.CrossEntropyLoss()(span(x, SPAN)[1][-1], y) + WEIGHT * span.duration).backward()
            weights.step(), times.step()
            span.clip_()
    assert float(learner.model.t_f.detach()) == pytest.approx(float(span.t_f.detach()), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What a user need not do


def test_one_added_line_shortens_the_span():
    vanilla, fast = Learner(SPAN, _node()), Learner(SPAN, _node())
    _trainer(3).fit(vanilla, _loader())
    _fit(fast, epochs=3, weight=1.0)
    assert isinstance(vanilla.model, NeuralODE)
    assert 0.1 <= float(fast.model.t_f.detach()) < 0.9


def test_the_learners_own_span_becomes_the_template():
    t_span = torch.linspace(0, 2, 21)
    learner = Learner(t_span, _node())
    _fit(learner, epochs=1)
    assert torch.equal(learner.model.t_span, t_span)
    assert learner.model.bounds == pytest.approx((0.1, 2.0), abs=1e-6)
    assert 1.5 < float(learner.model.t_f.detach()) < 2.0


def test_a_model_that_is_wrapped_already_keeps_its_span():
    span = tm.LearnableSpan(_node(), SPAN, t_f=0.8)
    learner = Learner(SPAN, span)
    _fit(learner, epochs=1)
    assert learner.model is span and float(span.t_f.detach()) != pytest.approx(0.8)


def test_several_nodes_deep_inside():
    class Last(nn.Module):
        def forward(self, sol):
            return sol[-1]

    class Deep(Learner):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.CrossEntropyLoss()(self.model(x), y)

    model = nn.Sequential(_node(0, return_t_eval=False), Last(), nn.Sequential(_node(1, return_t_eval=False), Last()))
    learner = Deep(None, model)
    trainer = _fit(learner, epochs=1)
    found = list(tm.spans(learner))
    assert len(found) == 2 and all(float(s.t_f.detach()) < 1.0 for s in found)
    assert len([k for k in trainer.callback_metrics if "t_f" in k]) == 2


def test_t_f_and_nfe_are_logged():
    learner = Learner(SPAN, _node())
    trainer = _fit(learner)
    metrics = trainer.callback_metrics
    (t_f,) = [v for k, v in metrics.items() if "t_f" in k and "nfe" not in k]
    (nfe,) = [v for k, v in metrics.items() if "nfe" in k]
    assert float(t_f) == pytest.approx(float(learner.model.t_f.detach()), abs=0.02)
    # rk4 over a grid of about ten steps.
    assert 20 <= float(nfe) <= 44


def test_the_callback_can_be_used_for_validation_and_prediction_too():
    class Validated(Learner):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val_loss", nn.CrossEntropyLoss()(self.model(x, self.t_span)[1][-1], y))

    learner = Validated(SPAN, _node())
    trainer = _trainer(2, [MinimumTime(weight=WEIGHT)])
    trainer.fit(learner, _loader(), _loader(2))
    t_f = float(learner.model.t_f.detach())
    (result,) = trainer.validate(learner, _loader(2), verbose=False)
    assert math.isfinite(result["val_loss"]) and float(learner.model.t_f.detach()) == t_f
    assert isinstance(learner.model.node, NeuralODE), "wrapped once, not once a stage"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("given", [SPAN, torch.linspace(0, 2, 21)], ids=["the default end", "another end"])
def test_training_resumes_where_it_stopped(tmp_path, given):
    whole = Learner(given, _node())
    _fit(whole, epochs=4)
    half = Learner(given, _node())
    trainer = _fit(half, epochs=2)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    # A fresh process: other weights, a bare NeuralODE, the same callback.
    resumed = Learner(given, _node(seed=5))
    second = _trainer(4, [MinimumTime(weight=WEIGHT)])
    second.fit(resumed, _loader(), ckpt_path=str(path))
    assert float(resumed.model.t_f.detach()) == pytest.approx(float(whole.model.t_f.detach()), abs=1e-7)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_loads_with_the_safe_default(tmp_path):
    learner = Learner(SPAN, _node())
    trainer = _fit(learner, epochs=1)
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    other = Learner(SPAN, tm.wrap(_node(seed=3)))
    other.load_state_dict(state)
    assert torch.equal(other.model.t_f, learner.model.t_f)
    bare = Learner(SPAN, _node(seed=3))
    assert not bare.load_state_dict(state, strict=False).missing_keys


def test_a_vanilla_checkpoint_can_start_minimum_time_training(tmp_path):
    vanilla = Learner(SPAN, _node())
    trainer = _trainer(1)
    trainer.fit(vanilla, _loader())
    path = tmp_path / "vanilla.ckpt"
    trainer.save_checkpoint(path)
    learner = Learner(SPAN, _node(seed=5))
    learner.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    _fit(learner, epochs=1)
    assert float(learner.model.t_f.detach()) < 1.0


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
    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.CrossEntropyLoss()(self.model(x), y)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    with pytest.raises(Exception, match="NeuralODE"):
        _fit(Plain(), epochs=1)


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.AdamW(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1)],
    ids=["AdamW", "SGD"],
)
def test_an_optimizer_that_decays_the_time_gets_a_warning(optimizer):
    with pytest.warns(UserWarning, match="(?i)decay"):
        _fit(Learner(SPAN, _node(), optimizer), epochs=1)


def test_an_optimizer_that_spares_the_time_gets_none():
    class Grouped(Learner):
        def configure_optimizers(self):
            return torch.optim.AdamW(tm.parameter_groups(self, lr=0.01, weight_decay=0.1))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(Grouped(SPAN, _node()), epochs=1)
        _fit(Learner(SPAN, _node()), epochs=1)
    assert not [w for w in caught if "decay" in str(w.message).lower()]


def test_an_optimizer_that_never_sees_the_time_is_noticed():
    # Made before the model was wrapped, or over the network's own parameters: t_f would silently stay where it is.
    class Forgetful(Learner):
        def configure_optimizers(self):
            return torch.optim.Adam(self.model.node.vf.parameters(), lr=0.01)

    with pytest.raises(Exception, match="t_f"):
        _fit(Forgetful(SPAN, _node()), epochs=1)
