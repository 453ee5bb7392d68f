"""Snapshot and Rollback: the last good and the best state, and the way back to them."""

import math

import pytest
import torch
from torch import nn

from torchdyn_mintime.depth.rollback import DivergedError, Rollback, Snapshot


def trained(steps=3):
    """A layer and its Adam after some steps."""
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    step(net, optimizer, steps)
    return net, optimizer


def step(net, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.ones(4, 2)).square().mean().backward()
        optimizer.step()


def test_a_snapshot_gives_back_what_was_taken_as_often_as_wanted():
    net, optimizer = trained()
    snapshot = Snapshot()
    assert not snapshot and snapshot.state_dict() is None
    with pytest.raises(RuntimeError, match=r"no state to restore; call take\(model\) first"):
        snapshot.restore(net)
    snapshot.take(net, optimizer)
    ends = []
    for _ in range(2):
        step(net, optimizer, 2)
        ends.append(net.weight.detach().clone())
        snapshot.restore(net, optimizer)
    assert snapshot and torch.equal(*ends)  # the optimizer's moments were not written into


def test_a_snapshot_is_saved_and_loaded(tmp_path):
    net, optimizer = trained()
    for sources in ((net,), (net, optimizer)):
        first, second = Snapshot(), Snapshot()
        first.take(*sources)
        torch.save(first.state_dict(), tmp_path / "s.pt")
        state = torch.load(tmp_path / "s.pt", weights_only=True)
        assert isinstance(state, dict) == (len(sources) == 1)
        second.load_state_dict(state)
        kept = net.weight.detach().clone()
        with torch.no_grad():
            net.weight.zero_()
            for name in state if isinstance(state, dict) else ():
                state[name].zero_()  # what was loaded is a copy
        second.restore(*sources)
        assert torch.equal(net.weight, kept)
    second.load_state_dict(None)
    assert not second


def test_an_exploded_loss_goes_back_with_half_the_learning_rate():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    rollback = Rollback(net, optimizer, every=1)
    x = torch.randn(8, 2)
    for _ in range(3):
        loss = net(x).square().mean() * 1e-3 + 0.5
        assert rollback.look(loss.item()) is False
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    good = {k: v.clone() for k, v in net.state_dict().items()}
    steps = optimizer.state_dict()["state"][0]["step"].item()
    rollback.look(0.5)
    with torch.no_grad():
        net.weight.fill_(1e6)
    assert rollback.look(1e12) is True and rollback.count == 1
    assert all(torch.equal(good[k], v) for k, v in net.state_dict().items())
    assert optimizer.state_dict()["state"][0]["step"].item() == steps
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert rollback.look(math.nan) is True and optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_rollback_gives_up_at_last_and_never_starts_from_nothing():
    net = nn.Linear(1, 1)
    rollback = Rollback(net, torch.optim.SGD(net.parameters(), 1.0), limit=1, jump=10.0)
    with pytest.raises(ValueError, match="the loss is nan before anything was learned"):
        rollback.look(math.nan)
    rollback.look(1.0)
    assert not rollback.look(9.0) and rollback.look(11.0)  # ten times the best is where it starts
    with pytest.raises(
        DivergedError, match=r"the loss exploded to inf, also after 1 returns .* at the learning rates \[0.5\]"
    ):
        rollback.look(math.inf)
    with pytest.raises(ValueError, match="factor .* got 2"):
        Rollback(net, rollback.optimizers, factor=2.0)


def test_a_loss_that_stays_far_above_its_best_was_spoiled():
    net = nn.Linear(1, 1)
    rollback = Rollback(net, torch.optim.SGD(net.parameters(), 1.0), stuck=3, every=1, floor=1.0)
    good = net.weight.item()
    rollback.look(0.2)
    with torch.no_grad():
        net.weight.add_(1.0)
    assert [rollback.look(0.45) for _ in range(3)] == [False, False, True]
    assert net.weight.item() == good
    assert [rollback.look(m) for m in (0.45, 0.45, 0.3, 0.45, 0.45)] == [False] * 5  # twice the best ends the row


def test_worse_than_at_the_start_is_exploded_and_noise_is_not():
    net = nn.Linear(1, 1)
    rollback = Rollback(net, torch.optim.SGD(net.parameters(), 1.0))
    assert [rollback.look(m) for m in (0.69, 0.9, 0.3, 0.65, 0.68)] == [False] * 5
    assert rollback.look(0.71) is True


def test_going_back_twice_leads_to_the_same_state():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    rollback = Rollback(net, optimizer, every=1)
    moments = []
    for loss in (0.5, math.nan, math.inf):
        rollback.look(loss)
        net(torch.ones(4, 2)).sum().backward()
        optimizer.step()
        moments.append(optimizer.state_dict()["state"][0]["exp_avg"].clone())
        optimizer.zero_grad()
    assert torch.equal(moments[1], moments[2]) and optimizer.state_dict()["state"][0]["step"] == 1


def test_only_a_good_state_is_kept():
    """A state at the brink would explode again, whatever the learning rate."""
    net = nn.Linear(1, 1)
    rollback = Rollback(net, torch.optim.SGD(net.parameters(), 1.0), every=1, jump=10.0)
    good = net.weight.item()
    rollback.look(0.5)
    with torch.no_grad():
        net.weight.add_(1.0)
    assert rollback.look(4.0) is False and rollback.look(5.1) is True
    assert net.weight.item() == good


def test_a_rollback_goes_on_from_a_checkpoint(tmp_path):
    def drive(rollback, losses):
        went = []
        for loss in losses:
            went.append(rollback.look(loss))
            with torch.no_grad():
                for p in rollback.model.parameters():
                    p.add_(1.0)
        return went

    def begin():
        torch.manual_seed(0)
        net = nn.Linear(2, 1)
        return Rollback(net, torch.optim.SGD(net.parameters(), 1.0), every=2, stuck=3)

    losses = [0.5, 0.4, 0.9, 0.85, math.inf, 0.4, 0.9, 0.9, 0.9, 0.3]
    whole, first, second = begin(), begin(), begin()
    went = drive(whole, losses)
    assert sum(went) >= 2
    assert drive(first, losses[:4]) == went[:4]
    torch.save(
        {
            "rollback": first.state_dict(),
            "net": first.model.state_dict(),
            "optimizer": first.optimizers[0].state_dict(),
        },
        tmp_path / "c.pt",
    )
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    second.model.load_state_dict(saved["net"])
    second.optimizers[0].load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["rollback"])
    assert drive(second, losses[4:]) == went[4:]
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    assert second.optimizers[0].param_groups[0]["lr"] == whole.optimizers[0].param_groups[0]["lr"]
    with pytest.raises(ValueError, match="no state of a Rollback"):
        second.load_state_dict({})


def test_a_good_state_is_kept_at_the_first_look_and_every_fifth_after_it():
    net = nn.Linear(1, 1, bias=False)
    rollback = Rollback(net, torch.optim.SGD(net.parameters(), 1.0))
    for i in range(9):
        with torch.no_grad():
            net.weight.fill_(float(i))
        rollback.look(0.5)
    assert rollback.look(math.inf) and net.weight.item() == 5.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("jump", 1.0), ("jump", 0.5), ("jump", math.nan), ("factor", 0.0), ("factor", -0.5), ("floor", 0.0)],
)
def test_a_rollback_refuses_what_could_not_work(name, value):
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=f"{name} must be"):
        Rollback(net, torch.optim.SGD(net.parameters(), 1.0), **{name: value})


def test_as_many_states_are_restored_as_were_taken():
    net, optimizer = trained()
    snapshot = Snapshot()
    snapshot.take(net, optimizer)
    kept = net.weight.detach().clone()
    step(net, optimizer)
    now = net.weight.detach().clone()
    with pytest.raises(ValueError, match="2 states were taken; got 3 to restore"):
        snapshot.restore(net, optimizer, optimizer)
    assert torch.equal(net.weight, now) and not torch.equal(now, kept)


def test_a_state_of_one_optimizer_is_not_taken_for_that_of_two():
    net, optimizer = trained()
    old = Rollback(net, optimizer, every=1)
    old.look(0.5)
    other = torch.optim.SGD(net.parameters(), 0.1)
    rollback = Rollback(net, [optimizer, other], every=1)
    rollback.load_state_dict(old.state_dict())
    assert rollback.look(0.4) is False and rollback.look(math.inf) is True  # kept anew at the first look
    assert other.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("start", [30.0, 1.0, 0.0, -1.0, -1e4])
def test_a_loss_that_falls_is_never_gone_back_from_and_the_newest_state_is_the_good_one(start):
    net = nn.Linear(1, 1, bias=False)
    rollback = Rollback(net, torch.optim.SGD(net.parameters(), 1.0), stuck=2, every=1)
    for i in range(60):
        with torch.no_grad():
            net.weight.fill_(float(i))
        assert rollback.look(start - 0.7 * i) is False
    with torch.no_grad():
        net.weight.fill_(math.nan)
    assert rollback.look(math.nan) is True and net.weight.item() == 59.0


@pytest.mark.parametrize(("best", "jump", "bound"), [(0.3, 1.1, 1.1 * 0.3), (0.7, 3.3, 3.3 * 0.7), (-3.0, 4.0, 6.0)])
def test_a_loss_has_exploded_above_its_multiple_which_is_above_the_best_of_any_sign(best, jump, bound):
    net = nn.Linear(1, 1)
    rollback = Rollback(net, torch.optim.SGD(net.parameters(), 1.0), jump=jump)
    rollback.look(best)
    assert not rollback.exploded(bound) and rollback.exploded(math.nextafter(bound, math.inf))
