"""Flows as tasks of the experiments: their runs and tables."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from breaking import Spoiled, steep
from rich.console import Console
from torch import nn

from torchdyn_mintime import plots
from torchdyn_mintime.experiments import UsageError, tables
from torchdyn_mintime.experiments.comparison import BEST_OF_SWEEP, TWIN, Options, Row, compare
from torchdyn_mintime.experiments.datasets import density_moons
from torchdyn_mintime.experiments.methods import FLOW_METHODS
from torchdyn_mintime.experiments.models import flow_of, span_of
from torchdyn_mintime.experiments.results import frame_of
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import Run

TINY = {"iterations": 2, "batch": 32, "test": 64}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Vanilla takes 10 steps instead of 100: the code is the same, and a test is short."""
    for name in ("flow-moons", "flow-circles"):
        monkeypatch.setitem(TASKS, name, replace(TASKS[name], t_span=span_of(10)))


def printed(task, methods, folder, seeds=(0,)):
    text = io.StringIO()
    store = Store(folder / "runs", Console(file=text, width=500))
    tables.make_own(task, methods, Options(seeds, settings=TINY), folder, store, "flows")
    return " ".join(text.getvalue().split())


@pytest.fixture
def drawn(monkeypatch):
    """The titles of the models that would be drawn."""
    titles = []
    monkeypatch.setattr(plots, "flows", lambda models, data, stem: titles.extend(models) or [])
    return titles


def test_flows_run_beside_their_controls_and_are_not_run_twice(tmp_path, drawn):
    assert TASKS["flow-circles"].settings.weight == 0.1
    words = ("flow-circles", ("vanilla", "minimum-time", "default-adaptive"), tmp_path, (0, 1))
    text = printed(*words)
    for label in ("minimum-time", "control: vanilla, default tsit5", "control: vanilla, as many steps"):
        assert label in text
    rows = json.loads((tmp_path / "flows.json").read_text())
    vanilla, ours, _, control, torchdyns = rows[::2]
    assert [r["seed"] for r in rows] == [0, 1] * 5
    assert vanilla["steps"] == 10 and control["steps"] == torchdyns["steps"] == ours["steps"] <= 12
    assert [r["wrapped"] for r in rows[::2]] == [True, True, True, True, False]
    assert control["nll"] != torchdyns["nll"]  # torchdyn's rk4 is another where the field depends on time (U1)
    assert all(math.isfinite(r["reference"]) and r["iterations"] == 2 for r in rows)
    assert (tmp_path / "flows.md").read_text().count("\n| ") >= 5
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Run, "step", lambda run: pytest.fail("trained again"))
        again = printed(*words)
        assert again.startswith("a flow on two circles, seed 0: already done: vanilla, minimum-time")
        assert text.endswith(again[again.index("a flow on two circles, seed by seed") :])


def test_flows_have_the_best_of_a_sweep_beside_them(tmp_path):
    rows = (Row("vanilla:4"), Row("minimum-time"), TWIN, BEST_OF_SWEEP)
    lines, _ = compare("flow-circles", rows, Options((0, 1), sweep=(2, 3), settings=TINY), Store(tmp_path))
    assert [line.control for line in lines] == [False, False, True, True]
    assert lines[-1].label.startswith("best of a sweep") and len(lines[2].results) == 2


def test_a_search_of_a_flow_looks_at_points_of_its_own(tmp_path):
    """Its batches are drawn anew: what a depth is judged by must not be another draw at every look."""
    settings = TASKS["flow-moons"].settings.but(**{**TINY, "iterations": 40, "target": 50.0, "solver_tol": 0.1})
    plan, store = Plan("flow-moons", "shallowest", settings), Store(tmp_path)
    run = store.begin(plan)
    run.step()
    assert torch.equal(run.loss_again(), run.loss_again())
    (result,) = store.finish([plan])
    front = store.search(plan)["front"]
    assert not result["failure"] and len(front) > 1
    assert [model["nfe"] for model in front] == sorted({model["nfe"] for model in front}, reverse=True)
    assert (result["nfe"], result["nll"]) == (front[-1]["nfe"], front[-1]["nll"])


@pytest.mark.parametrize("name", ["vanilla", "minimum-time", "minimum-time-doubling", "default-adaptive"])
def test_a_stopped_flow_goes_on_where_it_was(tmp_path, name):
    """Bit for bit as one that was not stopped."""
    plan, store = (
        Plan("flow-moons", name, TASKS["flow-moons"].settings.but(**{**TINY, "iterations": 6})),
        Store(tmp_path),
    )
    whole, stopped = store.begin(plan), store.begin(plan)
    for _ in range(6):
        whole.step()
    for _ in range(3):
        stopped.step()
    store.checkpoint(plan, stopped)
    again = store.begin(plan)
    while not again.done:
        again.step()
    assert again.history.loss == whole.history.loss and again.history.t_f == whole.history.t_f
    result = store.save(plan, again)
    assert not list(tmp_path.glob("*.checkpoint"))
    x = density_moons(50, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(store.model(plan)(x), whole.model.eval()(x))
        # torchdyn's own rk4 takes a field that depends on time a little too early (U1).
        assert torch.allclose(flow_of(store.model(plan)).log_prob(x), whole.model(x), atol=2e-3)
    assert result["iterations"] == 6 and result["training"] == again.history.seconds[-1]


@pytest.mark.parametrize("method", ["vanilla", "minimum-time"])
def test_a_stopped_flow_tutorial_goes_on_as_if_it_had_not_been(method):
    """Its noise and its batches too."""
    task = TASKS["flow-tutorial"]
    settings = task.settings.but(iterations=4, batch=16, test=50)
    whole, stopped, again = (Run(task, task.method(method), settings, task.load(settings, None)) for _ in range(3))
    for _ in range(4):
        whole.step()
        torch.rand(3)  # what is drawn beside it plays no part
    for _ in range(2):
        stopped.step()
    again.load_state_dict(stopped.state_dict())
    while not again.done:
        again.step()
    assert again.history.loss == whole.history.loss and again.history.t_f == whole.history.t_f


def undefined(model, settings):
    return lambda step: math.nan if step.iteration else 0.0


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        ({"terms": (steep,)}, "the gradient is not finite after 1 iterations"),
        ({"driver": Spoiled}, "the trained model cannot be solved"),
        ({"terms": (undefined,)}, "the loss is not finite after 1 iterations"),
    ],
    ids=["gradient", "weights", "loss"],
)
def test_a_flow_that_breaks_says_so_and_ends_no_table(tmp_path, monkeypatch, drawn, breaks, said):
    """In the middle of its training, or, with spoiled weights, when it is judged."""
    monkeypatch.setitem(FLOW_METHODS, "minimum-time", replace(FLOW_METHODS["minimum-time"], **breaks))
    text = printed("flow-moons", ("vanilla", "minimum-time"), tmp_path)
    assert f"1 of 1 failed: {said}" in text and "minimum-time failed on every seed" in text
    assert drawn == ["vanilla", "vanilla, 1 step"]  # with the control
    rows = json.loads((tmp_path / "flows.json").read_text())
    assert [math.isnan(r["nll"]) for r in rows] == [False, True, False, False]


def test_the_best_of_a_sweep_is_as_good_solved_exactly_too():
    good = {"seed": 0, "nll": 0.5, "reference": 0.5, "failure": ""}
    base, as_good = frame_of([{**good, "nll": 0.49}]), TASKS["flow-moons"].goal.report.as_good
    assert as_good(frame_of([good]), base)
    for bad in ({"reference": 0.52}, {"nll": 0.52}, {"failure": "broke"}, {"reference": math.nan}):
        assert not as_good(frame_of([{**good, **bad}]), base)
    assert not as_good(frame_of([good]), frame_of([{**good, "failure": "broke"}]))


def test_methods_of_flows_are_named():
    task = TASKS["flow-moons"]
    with pytest.raises(UsageError, match="minimum-time"):
        task.method("fast")
    model = task.model(task.method("vanilla:7"), task.settings)
    assert len(model.t_span) == 8 and isinstance(model.head.base, nn.Module)
