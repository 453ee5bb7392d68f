"""What version 0.1.0 has written still loads, and goes on as it did there.

``version-0.1.0.pt`` holds states of a linear layer and a span around a 2-4-2 net, and of what decides about its depth.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.depth.rollback import Rollback


@pytest.fixture(scope="module")
def saved():
    return torch.load(Path(__file__).parent / "version-0.1.0.pt")


def build() -> nn.Sequential:
    node = NeuralODE(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), solver="rk4")
    return nn.Sequential(nn.Linear(2, 2), tm.LearnableSpan(node, torch.linspace(0, 1, 6)))


@pytest.mark.parametrize("kind, steps, solver", [("wrapped", 6, "rk4"), ("pinned", 3, "midpoint")])
def test_a_model(saved, kind, steps, solver):
    model = build()
    model.load_state_dict(saved[kind])
    with torch.no_grad():
        _, sol = model(saved["x"])
    # Products of matrices differ in the last bit from one processor to the next.
    torch.testing.assert_close(sol[-1], saved[f"{kind}_end"], rtol=1e-6, atol=1e-7)
    span = model[1]
    assert span.steps == steps and span.stepper.name == solver and span.pinned == (kind == "pinned")
    assert span.bounds == pytest.approx((0.1, 1.5)) and span.t_f.item() == pytest.approx(0.55)
    again = dict(model.state_dict())
    assert list(again) == list(saved[kind])
    assert all(torch.equal(again[name], saved[kind][name]) for name in again)


def test_a_growth(saved):
    model = build()
    model.load_state_dict(saved["growth_model"])
    growth = tm.DepthGrowth(model[1], 0.5)
    growth.load_state_dict(saved["growth"])
    assert growth.state_dict() == saved["growth"] and growth.history and growth.patience == 2


def test_a_target_loss_and_a_rollback(saved):
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    price, rollback = tm.TargetLoss(model, 0.5), Rollback(model, optimizer)
    price.load_state_dict(saved["price"])
    rollback.load_state_dict(saved["rescue"])
    assert price.weight == saved["price"]["weight"] and rollback.best == saved["rescue"]["best"]
    # What came later begins empty.
    later = {name: value for name, value in price.state_dict().items() if name not in saved["price"]}
    assert (
        later == {"recent": [], "durations": [], "ratio": None} and price.state_dict().keys() >= saved["price"].keys()
    )
    assert rollback.state_dict().keys() == saved["rescue"].keys()


def test_a_search_in_the_middle(saved):
    """What it had found is kept, and the way goes on downward from there."""
    x, model = saved["x"], build()
    model.load_state_dict(saved["search_model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    optimizer.load_state_dict(saved["search_optimizer"])
    search = tm.Shallowest(target=0.002)
    search.load_state_dict(saved["search"])
    search.start(model, optimizer)
    before = len(search.trials)

    def loss_of() -> torch.Tensor:
        return (model(x)[1][-1] - 2 * x.sin().flip(1)).square().mean()

    for _ in range(150):
        if search.done:
            break
        loss = loss_of()
        optimizer.zero_grad()
        (loss + search.penalty(loss_of)).backward()
        optimizer.step()
        search.step(loss, loss_of)
    verdict = search.finish()
    assert len(search.trials) > before or search.trials[-1].iterations > 20
    assert torch.isfinite(loss_of()) and verdict.iterations > saved["search"]["iterations"]
    if any(trial["passed"] for trial in saved["search"]["trials"]):
        assert verdict.feasible and verdict.best.evaluations <= saved["verdict"]["evaluations"]
