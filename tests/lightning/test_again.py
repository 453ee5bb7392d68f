"""A training after another: with the same callback or a new one, on the same module or another, however the first ended."""

import contextlib

import pytest
import pytorch_lightning as pl
import torch
from learners import Learner, halves, loader, make_node, trainer
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import GrowDepth, MinimumTime

CALLBACKS = {
    "weight": lambda: MinimumTime(weight=0.5),
    "target": lambda: MinimumTime(target=0.68),
    "growth": lambda: GrowDepth(0.67, pretraining=1, increment=0.2),
    "growth, never met": lambda: GrowDepth(1e-6, increment=0.5),
    "growth, never met before the end": lambda: GrowDepth(1e-6, increment=0.1),
}
ENDS = ("well", "an error", "an interruption", "an error at the start", "an error in another callback's setup")
pytestmark = pytest.mark.filterwarnings("ignore:GrowDepth did not converge")


class Ends(pl.Callback):
    """Ends a training in one of the ways in ``ENDS``."""

    def __init__(self, how):
        self.how = how

    def setup(self, run, learner, stage):
        if self.how == ENDS[4]:
            raise KeyError("a fault of the user's own")

    def on_train_start(self, run, learner):
        if self.how == ENDS[3]:
            raise KeyError("a fault of the user's own")

    def on_train_batch_start(self, run, learner, batch, batch_idx):
        if run.global_step == 5 and self.how in ENDS[1:3]:
            raise KeyError("a fault of the user's own") if self.how == ENDS[1] else KeyboardInterrupt


def fit(learner, *callbacks, epochs=5):
    run = trainer(epochs, *callbacks)
    run.fit(learner, loader(halves()))
    return run


def first(callback, how, learner):
    with contextlib.suppress(KeyError, SystemExit):  # Lightning exits after Ctrl-C
        fit(learner, callback, Ends(how))


def new(seed):
    return Learner(make_node(seed=seed, t_span=torch.linspace(0, 1, 5)))


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_trains_another_module_as_a_fresh_one_does(name, how):
    callback, expected, learner = CALLBACKS[name](), new(1), new(1)
    fit(expected, CALLBACKS[name]())
    first(callback, how, new(0))
    fit(learner, callback)
    assert learner.losses == expected.losses
    for key, value in expected.state_dict().items():
        assert torch.equal(learner.state_dict()[key], value), key


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("second", ["none", *CALLBACKS])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_module_is_given_back_whole(name, second, how):
    """It trains as one that was never in the first training's hands, with the same weights, times and bounds."""
    learner, like = new(0), tm.wrap(new(0))
    first(CALLBACKS[name](), how, learner)
    assert learner.model.t_f.requires_grad and "training_step" not in vars(learner) and learner.training
    like.model.bounds = learner.model.bounds  # what may grow t_f raises it for good
    like.load_state_dict(learner.state_dict())
    learner.losses.clear()
    for module in (learner, like):
        fit(module, *([] if second == "none" else [CALLBACKS[second]()]), epochs=2)
    assert learner.losses == like.losses
    assert all(torch.equal(value, like.state_dict()[key]) for key, value in learner.state_dict().items())


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_same_callback_on_the_same_module_begins_anew(name):
    callback, one, other = CALLBACKS[name](), new(0), new(0)
    fit(one, callback), fit(other, CALLBACKS[name]())
    fit(one, callback), fit(other, CALLBACKS[name]())
    assert one.losses == other.losses and one.model.t_f.item() == other.model.t_f.item()


def test_a_state_that_was_loaded_and_never_used_does_not_reach_the_next_training(tmp_path):
    """As after an error between the loading and the start."""
    run = fit(new(0), CALLBACKS["growth"](), epochs=1)
    run.save_checkpoint(path := tmp_path / "c.ckpt")
    callback, expected, learner = CALLBACKS["growth"](), new(1), new(1)

    class Late(pl.Callback):
        def on_fit_start(self, run, learner):
            raise KeyError("a fault of the user's own")

    with pytest.raises(KeyError):
        trainer(5, callback, Late()).fit(new(0), loader(halves()), ckpt_path=path, weights_only=True)
    fit(expected, CALLBACKS["growth"]()), fit(learner, callback)
    assert learner.losses == expected.losses


AVERAGES = {
    "SWA": lambda: StochasticWeightAveraging(0.02, swa_epoch_start=1),
    "EMA": lambda: EMAWeightAveraging(decay=0.8),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("name", ["weight", "growth, never met before the end"])
@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")
def test_averages_of_weights_do_not_depend_on_the_order_of_the_callbacks(name, average):
    """torchdyn's bare node cannot be copied, and the callbacks of averages copy the module first of all."""
    found = []
    for order in (1, -1):
        learner = new(0)
        fit(learner, *[CALLBACKS[name](), AVERAGES[average]()][::order])
        t_eval, _ = learner.model(halves()[0])
        assert t_eval[-1].item() == pytest.approx(learner.model.t_f.item(), abs=1e-6)
        assert learner.model.t_f.item() != 1.0
        found.append(learner.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=0, atol=1e-6, msg=key)
