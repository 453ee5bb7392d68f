"""Checkpoints load: those of 0.1.0 in the middle of a training, and those of a training that has ended, in every way."""

import gzip
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from learners import Learner, halves, loader, make_node, points, trainer

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import GrowDepth, MinimumTime, Shallowest

CALLBACKS = {
    "MinimumTime": lambda: MinimumTime(target=0.7),
    "GrowDepth": lambda: GrowDepth(threshold=1e-6, increment=0.05, max_t_f=1.95, pretraining=1),
    "Shallowest": lambda: Shallowest(target=0.5, solver_tol=0.2),
}


@pytest.fixture(scope="module")
def written():
    """By callback: "checkpoint" after 12 of 24 epochs, and the state that the model "ends" with."""
    with gzip.open(Path(__file__).with_name("checkpoints-0.1.0.pt.gz")) as file:
        return torch.load(file, weights_only=True)


class States(pl.Callback):
    """Keeps the model's state at the end of every epoch, before the callback that looks then."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, run, learner):
        self.seen.append({name: value.clone() for name, value in learner.state_dict().items()})


def close(state, ends):
    """Whether all entries agree; bounds that are the default were not held in 0.1.0."""
    entries = [key for key, value in ends.items() if not key.endswith("bounds") or len(value)]
    # Another version of torch may round otherwise, over 36 steps of Adam.
    return all(torch.allclose(state[key], ends[key], rtol=1e-4, atol=1e-5) for key in entries)


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.filterwarnings("ignore:GrowDepth did not converge")
def test_a_checkpoint_of_version_0_1_0_is_gone_on_from(written, name, tmp_path):
    torch.save(written[name]["checkpoint"], tmp_path / "c.ckpt")
    module, callback = Learner(make_node(t_span=torch.linspace(0, 1, 5), seed=5)), CALLBACKS[name]()
    states = States()
    trainer(24, states, callback).fit(module, loader(points()), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    ends, state = written[name]["ends"], module.state_dict()
    assert state.keys() == ends.keys()
    if name == "MinimumTime":
        # 0.1.0 gave back a model that one batch of three was lucky on. The price and the times go on as they were.
        assert state["model.t_f"] > ends["model.t_f"]
        return
    if name == "Shallowest":  # which climbed then, and goes down now
        (written_search,) = (s for key, s in written[name]["checkpoint"]["callbacks"].items() if "Shallowest" in key)
        assert callback.verdict.iterations > written_search["iterations"] > 0
        assert (
            callback.verdict.trials[: len(written_search["trials"]) - 1]
            == callback.search.trials[: len(written_search["trials"]) - 1]
        )
        return
    # 0.1.0 gave back the end of the epoch whose loss was best, which is not the model of that loss.
    (best,) = (i for i, seen in enumerate(states.seen) if close(seen, ends))
    assert close(state, {**states.seen[best - 1], "model.t_f": ends["model.t_f"]})


ENDED = {
    "MinimumTime": lambda: MinimumTime(weight=0.1),
    "Shallowest": lambda: Shallowest(target=0.68, solver_tol=0.3),
}


class Validated(Learner):
    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(*batch))


@pytest.fixture(scope="module", params=ENDED)
def ended(request, tmp_path_factory):
    """The name of a callback, the checkpoint of a training with it, and the validated loss of its module."""
    path, data = tmp_path_factory.mktemp("ended") / "c.ckpt", loader(halves(), batch=24)
    module, end = Validated(make_node(t_span=torch.linspace(0, 1, 5), seed=5)), trainer(60, ENDED[request.param]())
    end.fit(module, data, data)
    end.save_checkpoint(path)
    (figures,) = trainer(1).validate(module, data, verbose=False)
    return request.param, path, figures["val"]


def test_a_checkpoint_is_validated_where_the_trainer_has_the_callback(ended):
    name, path, expected = ended
    data = loader(halves(), batch=24)
    (found,) = trainer(1, ENDED[name]()).validate(Validated(), data, ckpt_path=path, verbose=False, weights_only=True)
    assert found["val"] == expected


def test_a_checkpoint_loads_by_the_recipe_that_the_error_names(ended):
    _, path, expected = ended
    recipe = r"make the module, `from torchdyn_mintime import wrap; wrap\(module\)`, then load this state_dict; or give"
    with pytest.raises(RuntimeError, match=recipe):
        Validated.load_from_checkpoint(path, weights_only=True)
    with pytest.raises(RuntimeError, match=recipe):
        trainer(1).validate(Validated(), loader(halves()), ckpt_path=path, verbose=False, weights_only=True)
    module = tm.wrap(Validated())
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    (found,) = trainer(1).validate(module, loader(halves(), batch=24), verbose=False)
    assert found["val"] == expected


def test_a_module_that_wraps_itself_loads_from_its_checkpoint(ended):
    class Wrapped(Validated):
        def __init__(self):
            super().__init__()
            tm.wrap(self)

    _, path, expected = ended
    module = Wrapped.load_from_checkpoint(path, weights_only=True)
    (found,) = trainer(1).validate(module, loader(halves(), batch=24), verbose=False)
    assert found["val"] == expected
