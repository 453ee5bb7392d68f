"""Faults in the middle of a training: a clear error or a recovery, the model as it was, and a resume that is bit-equal."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from learners import SPAN
from profiles import PROFILE
from torch import nn
from torchdyn.core import NeuralODE
from trust.training import EPOCHS, METHODS, ends_with, equal, last_checkpoint, learner, loader, trainer

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import GrowDepth, MinimumTime
from torchdyn_mintime.numerics.integrate import integrate


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def finite(model):
    return all(bool(torch.isfinite(v).all()) for v in model.state_dict().values() if v.is_floating_point())


def safe_load(folder):
    checkpoint = torch.load(last_checkpoint(folder), weights_only=True)
    for value in checkpoint["state_dict"].values():
        assert not value.is_floating_point() or bool(torch.isfinite(value).all())
    return checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# The field, the learning rate, the solution


class Breaking(nn.Module):
    """A field that returns NaN as long as it is told to."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.broken = False

    def forward(self, x):
        out = self.net(x)
        return out * math.nan if self.broken else out


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("method", ["weight", "target", "growth"])
def test_a_field_that_turns_nan_in_the_middle_of_an_epoch(tmp_path, method, solver):
    before = {}

    def hook(model, batch_idx):
        if model.current_epoch == 1 and batch_idx == 1:
            before.update(snapshot(model))
            model.model.vf.vf.vf.broken = True

    model = learner(Breaking(), solver=solver, hook=hook)
    callback = METHODS[method]()
    with pytest.raises(tm.IntegrationError, match="not finite") as caught:
        trainer(3, callback, tmp_path).fit(model, loader())
    assert "t_f" in str(caught.value)
    assert equal(snapshot(model), before), "the step that failed must leave the model as it was"
    checkpoint = safe_load(tmp_path)
    assert checkpoint["epoch"] == 0
    # The way out that the error offers: the last checkpoint, with a field that is whole again.
    again = learner(Breaking(), solver=solver, lr=0.01)
    run = trainer(2, METHODS[method](), tmp_path)
    run.fit(again, loader(), ckpt_path=last_checkpoint(tmp_path))
    assert run.current_epoch == 2 and finite(again)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("method", ["weight", "target"])
@pytest.mark.parametrize("momentum", [True, False], ids=["Adam", "SGD"])
def test_a_learning_rate_of_1000(tmp_path, method, solver, momentum, monkeypatch):
    # A field of such weights is stiff. It ends at the limit of steps, which is lowered here for time's sake.
    monkeypatch.setitem(integrate.__kwdefaults__, "max_steps", 300)
    model = learner(lr=1e3, solver=solver, momentum=momentum)
    run = trainer(3, METHODS[method](), tmp_path)
    try:
        run.fit(model, loader())
    except (tm.IntegrationError, ValueError) as error:
        assert "learning rate" in str(error) or "not finite" in str(error) or "loss is" in str(error)  # noqa: PT017
    (span,) = tm.spans(model)
    lower, upper = span.bounds
    # Whatever happened, t_f is a time inside its bounds, and what was saved can be loaded.
    assert lower - 1e-6 <= span.t_f.item() <= upper + 1e-6
    if path := last_checkpoint(tmp_path):
        torch.load(path, weights_only=True)


def test_a_learning_rate_of_1000_is_recovered_from_by_grow_depth():
    model = learner(lr=1e3, momentum=False)
    # A loss ten times the best, and above 1, sends the training back with half the rate.
    with pytest.warns(UserWarning, match="did not converge"):
        trainer(40, GrowDepth(threshold=1e-6, increment=0.5, max_t_f=1.5)).fit(model, loader())
    assert finite(model)


class BlowUp(nn.Module):
    """x' = a x^2, which is infinite after 1 / (a x)."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.rate * x.square()


@pytest.mark.parametrize("solver", ["rk4", "euler", "tsit5", "dopri5"])
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
def test_a_blow_up_in_finite_time_and_the_way_back(solver, sensitivity):
    span = tm.wrap(NeuralODE(BlowUp(), solver=solver, sensitivity=sensitivity), torch.linspace(0, 40, 81))
    x = torch.full((2, 2), 1.0)
    before = snapshot(span)
    with pytest.raises(tm.IntegrationError) as caught:
        span(x)
    assert caught.value.solver == solver and 0 <= caught.value.time <= 40
    assert equal(snapshot(span), before)
    with torch.no_grad():
        span.t_f.fill_(0.5)
    _, sol = span(x)
    # x(t) = x / (1 - x t) is 2; Euler's one step of a half gives 1.5, and 1e-3 is the adaptive tolerance.
    assert sol[-1].mean().item() == pytest.approx(2.0, rel=0.3 if solver == "euler" else 0.05)


def test_a_blow_up_in_a_training_names_the_way_out(tmp_path):
    model = learner(BlowUp(), lr=5.0, momentum=False)
    with pytest.raises((tm.IntegrationError, ValueError)):
        # Points at 3 and above reach infinity before t = 1.
        trainer(8, MinimumTime(weight=0.0), tmp_path).fit(model, loader())
    (span,) = tm.spans(model)
    assert math.isfinite(span.t_f.item())


# ---------------------------------------------------------------------------------------------------------------------
# Batches of no and of one sample


@pytest.mark.parametrize("solver", ["rk4", "tsit5", "dopri5"])
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_of_none_or_one(batch, sensitivity, solver):
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    span = tm.wrap(NeuralODE(net, solver=solver, sensitivity=sensitivity), SPAN)
    before = snapshot(span)
    t_eval, sol = span(torch.randn(batch, 2))
    assert sol.shape == (len(t_eval), batch, 2)
    (sol[-1].sum() + 0.1 * span.duration).backward()
    assert bool(torch.isfinite(span.t_f.grad))
    if batch == 0:
        assert span.t_f.grad.item() == pytest.approx(0.1, abs=1e-7), "the price of time alone is left"
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    assert equal(snapshot(span), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_last_batch_of_one_trains_on(method):
    model = learner()
    run = trainer(2, METHODS[method]())
    run.fit(model, loader(size=17))
    assert run.global_step == 6 and finite(model)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_fit_is_bit_equal_to_one_that_was_never_stopped(tmp_path, method, solver):
    if method == "growth" and solver == "tsit5":
        solver = "midpoint"

    def fit(folder, epochs, seed, checkpoint=None):
        model, callback = learner(seed=seed, solver=solver), METHODS[method]()
        torch.manual_seed(1 + seed)
        run = trainer(epochs, callback, folder)
        run.fit(model, loader(), ckpt_path=checkpoint)
        return ends_with(model, callback, run)

    whole = fit(tmp_path / "whole", EPOCHS, 0)
    fit(tmp_path / "half", EPOCHS // 2, 0)
    # Other weights and another random state: all must come from the checkpoint.
    resumed = fit(tmp_path / "half", EPOCHS, 5, last_checkpoint(tmp_path / "half"))
    for key in whole:
        assert equal(resumed[key], whole[key]), (key, resumed[key], whole[key])
    name = next(k for k in whole["model"] if k.endswith("t_f"))
    assert whole["model"][name].item() != 1.0, "t_f never moved: the comparison would say nothing"
    if method == "growth":
        assert len(whole["callback"]["growth"]["history"]) == EPOCHS
    if method == "target":
        assert whole["callback"]["price"]["weight"] > 0


def test_killed_at_random_moments_and_resumed(tmp_path):
    # In a process of its own, which forks one child after another: torch is imported once.
    kills = 20 if PROFILE == "thorough" else 2
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("training.py")), str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        timeout=800,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3])),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed") == kills
    whole, killed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    # Not the generator itself: a fit that is killed after its last checkpoint has nothing left to do, and draws nothing.
    # What was drawn on the way shows in the weights.
    for key in set(whole) - {"random"}:
        assert equal(killed[key], whole[key]), (key, killed[key], whole[key])
    assert whole["step"] > 0 and whole["callback"]["price"]["weight"] > 0
