"""TargetLoss: the price of time that holds a loss on its target."""

import contextlib
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.depth.target import TargetLoss


class Decay(nn.Module):
    """z' = -z: the loss z(t_f)^2 / 2 of z(0) = 1 is exp(-2 t_f) / 2, so the shortest t_f for a target is known."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64), requires_grad=False)

    def forward(self, t, x, args=None):
        return -self.rate * x


def decay_span(t_f: float, **options) -> tm.LearnableSpan:
    points = torch.linspace(0, 4, 41, dtype=torch.float64)
    return tm.LearnableSpan(NeuralODE(Decay(), solver="rk4"), points, t_f=t_f, **options)


def loss_of(span: tm.LearnableSpan) -> torch.Tensor:
    return span(torch.ones(3, 1, dtype=torch.float64))[1][-1].square().mean() / 2


@pytest.mark.parametrize("start", [0.2, 1.5, 4.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_finds_the_shortest_interval_from_either_side_whatever_the_unit_of_the_loss(start, scale):
    span, target = decay_span(start), 0.05
    price = TargetLoss(span, target * scale, window=1)
    for _ in range(600):
        span.zero_grad()
        loss = scale * loss_of(span)
        loss.backward()
        price.step(loss)
    assert price.feasible
    assert price.restore_best()
    exact = -math.log(2 * target) / 2
    # 3 %: t_f moves by up to 2 % a step, and a model is kept when it is 1 % shorter than the last one kept.
    assert span.t_f.item() == pytest.approx(exact, rel=0.03)
    assert scale * loss_of(span).item() <= target * scale * (1 + 1e-9)


@pytest.mark.parametrize("start", [0.2, 1.5, 4.0])
def test_a_start_that_is_learned_is_moved_as_the_end_is(start):
    """The optimizer after it finds no gradient: it would move t0 without any price."""
    span, target = decay_span(start, learn_t0=True), 0.05
    price, optimizer = TargetLoss(span, target, window=1), torch.optim.SGD(span.parameters(), lr=1.0)
    for _ in range(600):
        optimizer.zero_grad()
        loss = loss_of(span)
        loss.backward()
        price.step(loss)
        moved = span.t0.item(), span.t_f.item()
        optimizer.step()
        assert (span.t0.item(), span.t_f.item()) == moved
    assert price.restore_best() and span.t0.item() != 0.0
    # What counts is the duration. 5 %: both ends move by up to 2 % of it a step.
    assert span.duration.item() == pytest.approx(-math.log(2 * target) / 2, rel=0.05)


def test_the_sizes_of_a_version_without_a_learned_start_are_taken_over():
    price = TargetLoss(decay_span(1.0, learn_t0=True), 0.05)
    state = {**price.state_dict(), "size": [0.25]}
    price.load_state_dict(state)
    assert price.state_dict()["size"] == [0.25, 0.0]


@given(
    seed=st.integers(0, 999),
    noise=st.floats(0.1, 1.0),
    start=st.sampled_from([1.5, 4.0]),
    window=st.sampled_from([None, 16]),
)
def test_a_lucky_batch_is_not_feasible(seed, noise, start, window):
    """Losses of batches scatter around that of all data: a tenth of them lie below a third of it where noise is 1."""
    span, target = decay_span(start), 0.05
    price = TargetLoss(span, target) if window is None else TargetLoss(span, target, window=window)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(800):
        loss = math.exp(-2 * span.t_f.item()) / 2
        factor = math.exp(noise * torch.randn((), generator=generator).item() - noise**2 / 2)  # 1 in the mean
        span.t_f.grad = torch.tensor(-2 * loss * factor, dtype=torch.float64)
        price.step(loss * factor)
    assert price.feasible and price.restore_best()
    # Beyond the two standard errors the mean of 16 or 50 losses is a few percent off where their scatter is large.
    assert 0.3 * target <= loss_of(span).item() <= 1.1 * target
    assert price.best["loss"] <= target


def test_a_window_that_is_not_whole_says_nothing():
    price = TargetLoss(decay_span(1.0), 0.05, window=3)
    for loss, feasible in ((0.01, False), (0.02, False), (0.01, True)):
        price.step(loss)
        assert price.feasible == feasible
    # Their mean and two standard errors, which are the deviation over the root of 3.
    assert price.best["loss"] == pytest.approx(0.04 / 3 + 2 * (0.01 / 3**0.5) / 3**0.5)
    with pytest.raises(ValueError, match="window must be 1 or more; got 0"):
        TargetLoss(decay_span(1.0), 0.05, window=0)


@pytest.mark.parametrize("bias", [0.5, 2.0])
def test_with_batches_the_loss_over_them_decides_and_is_held_on_the_target(bias):
    """The steps see a loss that is off by a factor, as under dropout, or on other data."""
    span, target = decay_span(3.0), 0.05
    batches = [(torch.full((rows, 1), 1.0, dtype=torch.float64), torch.zeros(rows, 1)) for rows in (3, 5)]

    def loss(z, y):
        return (z - y).square().mean() / 2

    price = TargetLoss(span, target, window=8, batches=batches, loss=loss)
    for _ in range(300):
        span.zero_grad()
        value = bias * loss_of(span)
        value.backward()
        price.step(value)
    assert price.restore_best() and span.training
    assert price.best["loss"] == pytest.approx(loss_of(span).item(), rel=1e-12)
    # Looked at every 8 steps, between which t_f moves.
    assert 0.9 * target <= price.best["loss"] <= target


def test_a_loss_that_is_judged_takes_the_place_of_the_mean():
    span = decay_span(1.0)
    price = TargetLoss(span, 0.05, window=1)
    price.judge(0.06)
    price.step(0.01)
    assert not price.feasible  # the mean of the steps has no say any more
    price.judge(0.04)
    assert price.best == {"duration": 1.0, "loss": 0.04, "step": 1}
    again = TargetLoss(decay_span(1.0), 0.05, window=1)
    again.load_state_dict(price.state_dict())
    again.step(0.01)
    assert again.best == price.best and again.state_dict()["ratio"] == price.state_dict()["ratio"] == 4.0
    for name, call in (
        ("nan", lambda: price.judge(math.nan)),
        ("together", lambda: TargetLoss(span, 1.0, batches=[1])),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    empty = TargetLoss(span, 0.05, window=1, batches=[], loss=lambda z: 0.0)
    with pytest.raises(ValueError, match="batches is empty"):
        empty.step(0.01)


@pytest.mark.parametrize("loss", [0.004, 0.03, 0.049, 0.07, 0.9])
@pytest.mark.parametrize("gradient", [-2.0, -0.02, -0.001, 0.0, 0.01, 1.0])
def test_a_step_is_its_formula(loss, gradient):
    """The first one, where the means are the values themselves: a price that starts at loss over duration."""
    span, target = decay_span(1.5), 0.05
    price = TargetLoss(span, target, window=1)
    span.t_f.grad = torch.tensor(gradient, dtype=torch.float64)
    price.step(loss)
    weight = loss / 1.5 * math.exp(0.05 * min(max(math.log(target / loss), -1.0), 1.0))
    assert price.weight == pytest.approx(weight, rel=1e-12)
    cost = 1.5 * weight * min(max(target / loss, 0.1), 10.0)
    slope = (1.5 * gradient + cost) / (abs(1.5 * gradient) + cost)
    assert span.t_f.item() == pytest.approx(1.5 * math.exp(-0.02 * slope), rel=1e-12)
    assert span.t_f.grad is None and price.feasible == (loss <= target)


def test_a_step_is_2_percent_at_most_and_a_gradient_that_is_not_finite_is_none():
    span = decay_span(1.5)
    price = TargetLoss(span, 0.05, window=1)
    for _ in range(30):
        span.t_f.grad = torch.tensor(-0.1, dtype=torch.float64)
        price.step(0.05)
    before = span.t_f.item()
    span.t_f.grad = torch.tensor(-1e6, dtype=torch.float64)
    price.step(0.05)
    assert span.t_f.item() == pytest.approx(before * math.exp(0.02), rel=1e-9)
    held = span.t_f.item(), price.weight
    span.t_f.grad = torch.tensor(math.inf, dtype=torch.float64)
    price.step(0.05)
    assert span.t_f.item() == held[0] and span.t_f.grad is None


def test_an_unreachable_target_is_said_and_leaves_the_model(caplog):
    span = decay_span(0.5)
    price = TargetLoss(span, 1e-9, max_t_f=4.0, window=1)
    for _ in range(200):
        span.zero_grad()
        loss = loss_of(span)
        loss.backward()
        price.step(loss)
    before = span.t_f.item()
    assert not price.feasible and not price.restore_best()
    assert "no step met the target" in caplog.text
    assert span.t_f.item() == before
    assert before == pytest.approx(4.0)  # it went as far as it may


def test_the_optimizer_does_not_move_the_time_again():
    span = decay_span(1.0)
    optimizer = torch.optim.Adam(span.parameters(), lr=0.5)
    price = TargetLoss(span, 0.05, window=1)
    loss = loss_of(span)
    loss.backward()
    price.step(loss)
    moved = span.t_f.item()
    optimizer.step()
    assert span.t_f.item() == moved != 1.0


def test_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    def run(span, price, n):
        for _ in range(n):
            span.zero_grad()
            loss = loss_of(span)
            loss.backward()
            price.step(loss)

    whole, cut = decay_span(2.0), decay_span(2.0)
    a, b = TargetLoss(whole, 0.05, window=1), TargetLoss(cut, 0.05, window=1)
    run(whole, a, 60)
    run(cut, b, 37)
    torch.save({"span": cut.state_dict(), "price": b.state_dict()}, tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed = decay_span(1.0)
    c = TargetLoss(resumed, 0.05, window=1)
    resumed.load_state_dict(saved["span"])
    c.load_state_dict(saved["price"])
    run(resumed, c, 23)
    assert resumed.t_f.item() == whole.t_f.item()
    assert c.weight == a.weight and c.best == a.best


@pytest.mark.parametrize(
    ("target", "error"), [(0.0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_bad_targets(target, error):
    with pytest.raises(error, match="target"):
        TargetLoss(decay_span(1.0), target)


def test_a_loss_that_is_not_finite_changes_nothing():
    span = decay_span(1.0)
    price = TargetLoss(span, 0.05, window=1)
    loss_of(span).backward()
    before = price.state_dict(), span.t_f.item()
    with pytest.raises(ValueError, match="nan"):
        price.step(math.nan)
    assert (price.state_dict(), span.t_f.item()) == before
    with pytest.raises(ValueError, match="max_t_f"):
        TargetLoss(span, 0.05, max_t_f=0.5, window=1)
    with pytest.raises(ValueError, match="no LearnableSpan"):
        TargetLoss(nn.Linear(2, 2), 0.05)


def test_a_price_for_a_target_waits_for_the_first_span_too():
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Linear(2, 2), solver="rk4"))
    tm.TargetLoss(span, 0.1, window=1)
    span(torch.randn(4, 2), torch.linspace(0, 5, 11))
    assert span.t_f.item() == 5.0 and span.bounds == pytest.approx((0.5, 9.5))
