"""ConvergenceRate: Algorithm 2 and the combined method, by a module and a callback."""

import copy

import pytest
import torch
import torch.nn.functional as F
from learners import blobs, loader, make_node, trainer
from torch import nn

from torchdyn_mintime import LearnableSpan
from torchdyn_mintime.lightning import ConvergenceRate, GrowDepth, MinimumTime
from torchdyn_mintime.losses.lyapunov import LyapunovRegularizer
from torchdyn_mintime.losses.potentials import CrossEntropy


def small_span(t_f=0.05):
    return LearnableSpan(make_node(3, 8, seed=0), torch.linspace(0, t_f, round(t_f / 0.01) + 1))


class Recorded(ConvergenceRate):
    """Keeps t_f and the two losses of every epoch, and the model's state before the callbacks look."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.t_f, self.terminal, self.lyapunov, self.states = [], [], [], []

    def on_train_epoch_end(self):
        metrics = self.trainer.callback_metrics
        self.t_f.append(self.model.t_f.item())
        self.terminal.append(metrics["terminal"].item())
        self.lyapunov.append(metrics["lyapunov"].item())


def fit(module, callback, epochs, batch=64, data=None):
    run = trainer(epochs, callback)
    run.fit(module, loader(data or blobs(), batch))
    return run


@pytest.mark.parametrize("batch", [64, 24])
def test_algorithm_2_reaches_the_threshold(batch):
    span, (x, y) = small_span(), blobs()
    module = Recorded(span, classes=2)
    callback = GrowDepth(0.05, monitor="terminal", patience=3, pretraining=20)
    run = fit(module, callback, 200, batch)
    growth = callback.growth
    assert growth.done and growth.history and run.callback_metrics["terminal"] <= 0.05
    assert span.t_f.item() == pytest.approx(0.05 + 0.01 * len(growth.history), abs=1e-6)
    # Stage one held t_f and lowered the Lyapunov loss; stage two was every epoch after it.
    assert module.t_f[:20] == pytest.approx([0.05] * 20) and 0 <= module.lyapunov[19] < module.lyapunov[0]
    assert growth.steps == len(module.t_f) - 20
    assert span.t_f.requires_grad  # given back
    with torch.no_grad():
        logits = module(x)[1][-1][:, :2]
    assert (logits.argmax(1) == y).all() and span.nfe == 4 * span.steps
    # What was logged is the mean of the batches before their steps; the model has taken one more pass.
    assert F.cross_entropy(logits, y).item() <= 0.05


def test_a_growth_that_does_not_converge_is_reported_and_gives_back_the_best():
    span, (x, y) = small_span(), blobs()
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]  # labels that mean nothing
    module = Recorded(span, classes=2, terminal_weight=1.0)
    callback = GrowDepth(0.01, monitor="terminal", patience=2, pretraining=5, max_t_f=0.09)
    with pytest.warns(
        UserWarning, match="did not converge: t_f reached max_t_f = 0.09 and terminal is .* is given back"
    ):
        fit(module, callback, 200, data=(x, y))
    assert callback.growth.exhausted and not callback.growth.done
    stage_two = module.terminal[5:]
    best = stage_two.index(min(stage_two))
    assert span.t_f.item() == pytest.approx(module.t_f[5 + best])
    with torch.no_grad():  # after the step that followed its measurement
        assert F.cross_entropy(module(x)[1][-1][:, :2], y).item() <= min(stage_two) * (1 + 1e-3)


def test_the_combined_method_is_the_weighted_sum_and_moves_t_f():
    span, (x, y) = small_span(), blobs()
    module = Recorded(span, classes=2, terminal_weight=0.5, span_lr=0.001)
    t_eval, sol = span(x)
    terminal = F.cross_entropy(sol[-1][:, :2], y)
    lyapunov = LyapunovRegularizer(span, CrossEntropy(classes=2), 20.0)
    expected = lyapunov.penalty(t_eval, sol, y, reduction="points") + 0.5 * terminal
    assert module.training_step((x, y), 0).item() == pytest.approx(expected.item(), rel=1e-6)
    fit(module, MinimumTime(weight=10.0), 15, batch=32)
    assert 0.04 - 1e-6 <= span.t_f.item() < 0.05  # never fewer points than the Lyapunov loss needs
    assert len(set(module.t_f)) > 5 and module.terminal[-1] < module.terminal[0]
    assert not [name for name in module.state_dict() if "regularizer" in name]  # nothing is saved twice
    copied = copy.deepcopy(module)
    assert copied.regularizer.model is copied.model


def test_what_it_cannot_train_is_said():
    with pytest.raises(ValueError, match="give a potential or the number of classes"):
        ConvergenceRate(small_span())
    with pytest.raises(ValueError, match="Linear has no LearnableSpan; wrap it first"):
        ConvergenceRate(nn.Linear(2, 2), classes=2)
    with pytest.raises(ValueError, match="Sequential has 2 LearnableSpans"):
        ConvergenceRate(nn.Sequential(small_span(), small_span()), classes=2)
    with pytest.raises(ValueError, match="terminal_weight .* got -1"):
        ConvergenceRate(small_span(), classes=2, terminal_weight=-1)
    adaptive = LearnableSpan(make_node(3, solver="tsit5"), torch.linspace(0, 0.05, 6))
    with pytest.raises(ValueError, match="needs the points of a fixed-step solver to look at; tsit5 is adaptive"):
        ConvergenceRate(adaptive, classes=2)
    span = small_span()
    bounds = span.bounds
    with pytest.raises(ValueError, match="rate"):
        ConvergenceRate(span, rate=-1.0, classes=2)
    assert span.bounds == bounds


def test_v_gets_a_gradient_where_more_than_the_field_is_trained():
    """An encoder that V's gradient does not reach learns to start from a large V."""

    def detached(model, **options):
        return ConvergenceRate(model, **options).regularizer.detach_potential

    encoder, head, span = nn.Linear(3, 3), nn.Linear(3, 2), small_span()
    assert detached(span, classes=2)
    assert not detached(span, potential=CrossEntropy(head))
    assert not detached(nn.Sequential(encoder, span), classes=2)
    encoder.requires_grad_(False)
    assert detached(nn.Sequential(encoder, span), classes=2)
