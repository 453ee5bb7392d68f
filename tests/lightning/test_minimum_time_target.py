"""MinimumTime with a target loss instead of a weight: the price of time is found."""

import pytest
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
