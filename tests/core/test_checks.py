"""Checks of numbers: what passes, what is refused, and what is said of it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.core import checks
from torchdyn_mintime.core import random_span as steer
from torchdyn_mintime.core import speed_limit as speed
from torchdyn_mintime.depth import times as optim
from torchdyn_mintime.lightning import ConvergenceRate, GrowDepth, MinimumTime
from torchdyn_mintime.losses import local_error, potentials, samplers


@pytest.mark.parametrize("value", [1, 1.5, np.float32(1.5), np.float64(1.5), np.int64(3), Fraction(3, 2), 1e-300])
def test_a_number_of_any_kind_passes_as_a_float(value):
    for check in (checks.number, checks.positive, checks.finite, checks.scalar):
        found = check(value, "x")
        assert type(found) is float and found == float(value)


@pytest.mark.parametrize("value", [None, "1", b"1", True, 1j, [1.0], (1.0,), {}, object(), torch.nn.Identity()])
def test_what_is_no_number_is_a_type_error(value):
    for check in (checks.number, checks.positive, checks.finite, checks.scalar, checks.count):
        with pytest.raises(TypeError, match="x must be a (whole )?number"):
            check(value, "x")


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["large", "small", "beyond its own text"])
def test_an_integer_too_large_for_a_float_is_a_value_error(value):
    for check in (checks.number, checks.positive, checks.finite, checks.scalar):
        with pytest.raises(ValueError, match="x must be finite; got an integer too large for a float"):
            check(value, "x")


@pytest.mark.parametrize(
    "limits, value, text",
    [
        ({}, math.nan, "x must be finite; got nan"),
        ({}, -math.inf, "x must be finite; got -inf"),
        ({"above": 0}, 0, "x must be finite and above 0; got 0"),
        ({"least": 0}, -0.5, "x must be finite and 0 or more; got -0.5"),
        ({"least": 0, "below": 1}, 1.0, "x must be 0 or more and below 1; got 1.0"),
        ({"least": 0, "below": 1, "wanted": "a share"}, math.nan, "x must be a share; got nan"),
    ],
)
def test_limits_are_named(limits, value, text):
    with pytest.raises(ValueError, match="^x must be") as raised:
        checks.number(value, "x", **limits)
    assert str(raised.value) == text


def test_limits_are_kept():
    assert checks.number(0, "x", least=0) == 0
    assert checks.number(-1e300, "x") == -1e300
    with pytest.raises(ValueError, match="x must be positive and finite; got 0"):
        checks.positive(0, "x")


def test_counts():
    assert checks.count(np.int64(2), "n", 1) == 2 and checks.count(10**400, "n") == 10**400
    with pytest.raises(ValueError, match="n must be a whole number of steps, 1 or more; got 1.5"):
        checks.count(1.5, "n", 1, " of steps")
    with pytest.raises(ValueError, match="n must be 1 or more; got 0"):
        checks.count(0, "n", 1)
    with pytest.raises(ValueError, match="n must be 0 or more; got an integer too large to show"):
        checks.count(-(10**5000), "n")


def test_a_tensor_of_one_entry_is_a_number():
    for value in (torch.tensor(2.0, requires_grad=True), torch.tensor([[2]]), np.array([2.0])):
        assert checks.finite(value, "x") == 2.0
    assert math.isnan(checks.scalar(torch.tensor(math.nan), "x"))
    with pytest.raises(ValueError, match=r"one number; got the shape \(3,\): take its mean"):
        checks.scalar(torch.zeros(3), "x")
    with pytest.raises(TypeError, match="x must be a number"):
        checks.scalar(torch.zeros((), device="meta"), "x")
    with pytest.raises(TypeError, match="x must be a number"):
        checks.finite(torch.tensor(1j), "x")


def span():
    return tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, 5))


HUGE = 10**400
CALLS = {
    "bound": lambda: tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), bounds=(0.1, HUGE)),
    "t_f": lambda: tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), t_f=HUGE),
    "save_at": lambda: span()(torch.ones(3, 2), save_at=[0.1, HUGE]),
    "lr": lambda: tm.parameter_groups(span(), lr=HUGE),
    "threshold": lambda: GrowDepth(HUGE),
    "increment": lambda: GrowDepth(0.1, increment=HUGE),
    "max_t_f": lambda: GrowDepth(0.1, max_t_f=HUGE),
    "weight": lambda: MinimumTime(weight=HUGE),
    "target": lambda: MinimumTime(target=HUGE),
    "terminal_weight": lambda: ConvergenceRate(span(), classes=2, terminal_weight=HUGE),
    "rate": lambda: ConvergenceRate(span(), HUGE, classes=2),
    "floor": lambda: potentials.TruncatedCrossEntropy(classes=2, floor=HUGE),
    "radius": lambda: samplers.ball(HUGE),
    "high": lambda: samplers.box(0.0, HUGE),
    "low": lambda: samplers.box(-HUGE, 0.0),
    "price": lambda: optim.GaussNewtonTime(span().parameters(recurse=False), price=HUGE),
    "decay": lambda: optim.GaussNewtonTime(span().parameters(recurse=False), decay=HUGE),
    "max_speed": lambda: speed.SpeedLimit(nn.Linear(2, 2), HUGE),
    "width": lambda: steer.RandomSpan(span(), HUGE),
    "weight ": lambda: local_error.LocalError(span(), HUGE),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_constructor_names_an_integer_too_large_for_a_float(name):
    with pytest.raises(ValueError, match=f"{name.strip()}.* must be finite; got an integer too large for a float"):
        CALLS[name]()
