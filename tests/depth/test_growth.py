"""DepthGrowth: where t_f grows, how far, what it says, and that it goes on from a checkpoint."""

import contextlib
import io
import json
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import random_model
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime import DepthGrowth, LearnableSpan


def short_span(steps=5, step=0.01, solver="rk4", **options):
    node = random_model("mlp", dtype=torch.float32, solver=solver).node
    return LearnableSpan(node, torch.linspace(0, steps * step, steps + 1), **options)


@given(start=st.integers(1, 8), needed=st.integers(0, 12), increment=st.sampled_from([None, 0.02]))
def test_without_patience_it_is_algorithm_2(start, needed, increment):
    """Lines 6 to 10: while the loss is above epsilon, t_f grows by gamma."""
    span = LearnableSpan(random_model("mlp", dtype=torch.float32).node, torch.linspace(0, 1, 101), t_f=start * 0.01)
    growth = DepthGrowth(span, 0.1, increment)
    grew = [growth.step(1.0) for _ in range(needed)]
    assert all(grew) and not growth.done
    assert growth.step(0.1) is False and growth.done and not growth.exhausted
    assert span.t_f.item() == pytest.approx(start * 0.01 + needed * (increment or 0.01), abs=1e-6)
    assert growth.step(5.0) is False and len(growth.history) == needed  # done is done
    assert [g.step for g in growth.history] == list(range(1, needed + 1))


def expected_growths(metrics, patience, improvement, threshold):
    """The rule in its plainest form: where t_f grows."""
    best, waited, grew = math.inf, 0, []
    for i, metric in enumerate(metrics):
        if metric <= threshold:
            break
        if metric < best * (1 - improvement):
            best, waited = metric, 0
        else:
            waited += 1
            if waited == patience:
                grew.append(i)
                best, waited = math.inf, 0
    return grew


@given(
    metrics=st.lists(st.floats(0.0, 2.0), max_size=40),
    patience=st.integers(1, 4),
    improvement=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_with_patience_it_grows_where_the_metric_stays(metrics, patience, improvement):
    growth = DepthGrowth(short_span(), 0.05, max_t_f=10.0, patience=patience, improvement=improvement)
    grew = [i for i, metric in enumerate(metrics) if growth.step(metric)]
    assert grew == expected_growths(metrics, patience, improvement, 0.05)


@given(metrics=st.lists(st.floats(0.0, 2.0), min_size=2, max_size=30), patience=st.integers(0, 3), data=st.data())
def test_saved_and_loaded_in_the_middle_it_goes_on_the_same(metrics, patience, data):
    cut = data.draw(st.integers(0, len(metrics)))
    whole = DepthGrowth(short_span(), 0.2, max_t_f=0.12, patience=patience)
    for metric in metrics:
        whole.step(metric)
    first = DepthGrowth(short_span(), 0.2, max_t_f=0.12, patience=patience)
    for metric in metrics[:cut]:
        first.step(metric)
    model, state = first.span.state_dict(), json.loads(json.dumps(first.state_dict()))  # plain values only
    second = DepthGrowth(short_span(), 7.0)  # what it was made with gives way to what was saved
    second.span.load_state_dict(model)
    second.load_state_dict(state)
    for metric in metrics[cut:]:
        second.step(metric)
    assert second.state_dict() == whole.state_dict()
    assert second.span.t_f.item() == whole.span.t_f.item() and second.span.bounds == whole.span.bounds
    assert not second.span.t_f.requires_grad


def test_the_optimizer_does_not_move_t_f_while_it_grows():
    span = short_span()
    optimizer = torch.optim.Adam(span.parameters(), 0.1)
    x = torch.randn(4, 2)
    for _ in range(2):  # momentum that would carry t_f on
        span(x)[1][-1].square().sum().backward()
        optimizer.step()
    span.clip_()
    growth = DepthGrowth(span, 0.01)
    before = span.t_f.item()
    for _ in range(3):
        loss = span(x)[1][-1].square().sum() + span.duration
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert span.t_f.item() == before
    growth.release()
    assert span.t_f.requires_grad


def test_it_stops_at_max_t_f_and_says_so_once(caplog):
    growth = DepthGrowth(short_span(), 0.1, 0.02, max_t_f=0.08)
    with caplog.at_level(logging.INFO, logger="torchdyn_mintime"):
        assert [growth.step(1.0) for _ in range(5)] == [True, True, False, False, False]
    assert growth.span.t_f.item() == pytest.approx(0.08) and growth.exhausted and not growth.done
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "reached max_t_f = 0.08 and the metric 1 is still above the threshold 0.1" in warned[0]
    grown = [r.getMessage() for r in caplog.records if "grew from" in r.getMessage()]
    assert len(grown) == 2 and "t_f grew from 0.05 to 0.07: metric 1 > 0.1" in grown[0]
    assert growth.step(0.05) is False and growth.done and not growth.exhausted


def test_the_upper_bound_is_raised_and_said(caplog):
    with caplog.at_level(logging.INFO, logger="torchdyn_mintime"):
        span = short_span()
        growth = DepthGrowth(span, 0.1)
    assert span.bounds[1] == growth.max_t_f == span.default_max_t_f() == 1.0
    assert "raised from 0.05 to max_t_f = 1" in caplog.text and caplog.records[-1].levelno == logging.INFO
    with caplog.at_level(logging.INFO, logger="torchdyn_mintime"):
        DepthGrowth(short_span(bounds=(0.01, 0.06)), 0.1, max_t_f=0.5)
    assert caplog.records[-1].levelno == logging.WARNING  # the user had said 0.06


def test_it_can_start_from_one_step_and_goes_on_along_the_template():
    span = LearnableSpan(random_model("mlp", dtype=torch.float32).node, torch.linspace(0, 1, 101), t_f=0.01)
    growth = DepthGrowth(span, 0.1)
    assert span.steps == 1
    growth.step(1.0)
    assert span(torch.randn(2, 2))[0].tolist() == pytest.approx([0, 0.01, 0.02])


@pytest.mark.parametrize("steps", [3, 7, 10, 11, 30, 100])
def test_one_step_is_allowed_whatever_float32_makes_of_it(steps):
    node = random_model("mlp", dtype=torch.float32).node
    assert LearnableSpan(node, torch.linspace(0, 1, steps + 1), t_f=1 / steps).steps == 1


def test_adaptive_solvers_must_say_by_how_much():
    span = short_span(solver="tsit5")
    with pytest.raises(ValueError, match="increment=None, but an adaptive solver"):
        DepthGrowth(span, 0.1)
    assert span.t_f.requires_grad
    assert DepthGrowth(span, 0.1, 0.05).step(1.0)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"threshold": 0.0}, ValueError, "threshold must be finite and above 0; got 0"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite and above 0; got nan"),
        ({"threshold": "low"}, TypeError, "threshold must be a number; got 'low'"),
        ({"threshold": 0.1, "increment": -0.1}, ValueError, "increment must be finite and above 0; got -0.1"),
        ({"threshold": 0.1, "increment": math.nan}, ValueError, "increment must be finite .* got nan"),
        ({"threshold": 0.1, "max_t_f": 0.04}, ValueError, "max_t_f = 0.04 lies below t_f = 0.05"),
        ({"threshold": 0.1, "max_t_f": math.inf}, ValueError, "max_t_f must be finite; got inf"),
        ({"threshold": 0.1, "patience": -1}, ValueError, "patience must be .* got -1"),
        ({"threshold": 0.1, "patience": 1.5}, ValueError, "patience must be .* got 1.5"),
        ({"threshold": 0.1, "improvement": 1.0}, ValueError, "improvement must be .* got 1.0"),
    ],
)
def test_bad_settings_change_nothing(arguments, error, text):
    span = short_span()
    with pytest.raises(error, match=text):
        DepthGrowth(span, **arguments)
    assert span.t_f.requires_grad and span.bounds[1] == pytest.approx(0.05)


def test_bad_metrics_and_objects():
    growth = DepthGrowth(short_span(), 0.1)
    for metric in (math.nan, math.inf, torch.tensor(math.nan)):
        with pytest.raises(ValueError, match=f"the metric is {float(metric)} at t_f = 0.05"):
            growth.step(metric)
    assert growth.steps == 0 and growth.span.t_f.item() == pytest.approx(0.05)
    with pytest.raises(TypeError, match="grows a LearnableSpan; got Linear"):
        DepthGrowth(nn.Linear(2, 2), 0.1)
    with pytest.raises(ValueError, match="this is no state of a DepthGrowth: .*'threshold'.* got the keys"):
        growth.load_state_dict({"best": 1.0})


def test_the_defaults_come_from_the_first_span_that_is_passed():
    """A Lightning callback makes its scheduler before the module has passed its own span."""
    with contextlib.redirect_stdout(io.StringIO()):
        span = tm.wrap(NeuralODE(nn.Linear(2, 2), solver="rk4"))
    growth = tm.DepthGrowth(span, 1e-6)
    span(torch.randn(4, 2), torch.linspace(0, 5, 11))
    assert span.t_f.item() == 5.0
    assert growth.step(1.0)
    assert span.t_f.item() == pytest.approx(5.5)
    assert growth.max_t_f == pytest.approx(9.5)


def test_growth_says_what_it_is_at(caplog):
    caplog.set_level(logging.INFO, logger="torchdyn_mintime")
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 0.1, 3), bounds=(0.01, 0.15))
    growth = tm.DepthGrowth(span, 0.01, max_t_f=0.15)
    assert "raised" not in caplog.text  # the bound is there already
    assert repr(growth) == (
        "DepthGrowth(growing at t_f=0.1, threshold=0.01, increment=0.05, max_t_f=0.15, patience=0, growths=0)"
    )
    growth.step(1.0), growth.step(1.0)
    assert repr(growth).startswith("DepthGrowth(exhausted at t_f=0.15")
    growth.step(0.001)
    assert repr(growth).startswith("DepthGrowth(done at t_f=0.15")
