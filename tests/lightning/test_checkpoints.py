"""Checkpoints that version 0.1.0 wrote in the middle of a training load, and the training ends as it did there."""

import gzip
from pathlib import Path

import pytest
import torch
from learners import Learner, loader, make_node, points, trainer

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


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.filterwarnings("ignore:GrowDepth did not converge")
def test_a_checkpoint_of_version_0_1_0_is_gone_on_from(written, name, tmp_path):
    torch.save(written[name]["checkpoint"], tmp_path / "c.ckpt")
    module, callback = Learner(make_node(t_span=torch.linspace(0, 1, 5), seed=5)), CALLBACKS[name]()
    trainer(24, callback).fit(module, loader(points()), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
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
    for key, value in ends.items():
        if key.endswith("bounds") and not len(value):  # it held none where they are the default
            continue
        # Another version of torch may round otherwise, over 36 steps of Adam.
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
