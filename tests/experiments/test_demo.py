"""The demo: what its picture draws is what was trained."""

from dataclasses import replace

import pytest
import torch

from torchdyn_mintime.experiments import demo, figures
from torchdyn_mintime.experiments.comparison import SEARCH_TWIN, Options, Row, compare
from torchdyn_mintime.experiments.measure import forward, scores
from torchdyn_mintime.experiments.models import span_of
from torchdyn_mintime.experiments.store import Store
from torchdyn_mintime.experiments.tasks import TASKS


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Vanilla of 16 steps on two moons, with the store that holds it."""
    monkeypatch.setitem(TASKS, "moons", replace(TASKS["moons"], t_span=span_of(16)))
    store = Store(tmp_path)
    _, plans = compare("moons", [Row("vanilla")], Options(defaults={"iterations": 3}), store)
    ((plan,),) = plans.values()
    return figures.finished(plan, store), store


def test_the_defaults_are_in_the_place_of_the_tasks_own(trained):
    shown, _ = trained
    assert shown.result["iterations"] == 3


def test_the_curve_of_losses_goes_through_the_models_own_loss(trained):
    shown, _ = trained
    found = dict(demo._losses_by_steps(shown))
    assert list(found) == [4 * steps for steps in demo.STEPS]
    own = scores(forward(shown.model, shown.x).output, shown.y)[0]
    assert found[64] == pytest.approx(own, rel=1e-5)
    assert shown.model.node.steps == 16  # it was a copy that took other steps


def test_the_exact_path_is_that_of_the_ode(trained):
    shown, _ = trained
    path = demo._exact_path(shown)
    assert path.shape == (demo.PATH_STEPS + 1, *shown.sol.shape[1:])
    torch.testing.assert_close(path[0], shown.sol[0])
    torch.testing.assert_close(path[-1], shown.sol[-1], atol=1e-3, rtol=1e-3)  # 16 steps of rk4 are nearly exact


def test_a_search_takes_ten_times_the_iterations_where_none_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "moons", replace(TASKS["moons"], t_span=span_of(4)))
    rows = [Row("vanilla"), Row("shallowest"), SEARCH_TWIN]
    lines, plans = compare("moons", rows, Options(defaults={"iterations": 2}), Store(tmp_path))
    assert [line.results["iterations"].iloc[0] for line in lines] == [2, 20, 2]
    assert list(plans) == rows
