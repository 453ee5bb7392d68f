"""The command line, as a user calls it."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torchdyn.core import NeuralODE
from typer.testing import CliRunner

from torchdyn_mintime import LearnableSolver, __version__, wrap
from torchdyn_mintime.__main__ import app
from torchdyn_mintime.experiments import MissingData, compress, datasets, names, samplers, tables
from torchdyn_mintime.experiments.datasets import Source
from torchdyn_mintime.experiments.methods import METHODS, Method
from torchdyn_mintime.experiments.models import span_of
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import Run


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    """Ten steps instead of 100 for vanilla, and results in a folder of the test's own."""
    for name, task in TASKS.items():
        if len(task.t_span) > 2:
            monkeypatch.setitem(TASKS, name, replace(task, t_span=span_of(10)))
    monkeypatch.chdir(tmp_path)


def call(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_the_demo_prints_its_tables_and_says_where_the_pictures_are(tmp_path):
    out = " ".join(call("demo", "--iterations", "2").split())
    for text in ("evals", "loss", "exact loss", "test %", "changed %", "training s", "drive x depth", "inference ms"):
        assert text in out
    for text in (
        "vanilla",
        "minimum-time",
        "the search",
        "control: vanilla, ",
        "The search found nothing in 2 iterations",
    ):
        assert text in out
    for task in ("moons", "digits"):
        assert f"results/demo/{task}.png" in out
        assert (tmp_path / f"results/demo/{task}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "results/demo/demo.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["moons"] * 5 + ["digits"] * 5
    assert {row["iterations"] for row in rows} == {"2"}
    # The controls have as many steps as minimum-time ended with, and as the search's evaluations make.
    for _, ours, twin, search, few in (rows[:5], rows[5:]):
        assert ours["steps"] == twin["steps"] and int(few["steps"]) == math.ceil(int(search["nfe"]) / 4)
    page = (tmp_path / "results/demo/demo.md").read_text()
    assert page.count("| the search |") == 2 and "paper" not in page
    assert str(tmp_path) not in out  # no path of the machine


def test_run_shows_a_row_for_each_seed_and_does_not_train_twice(monkeypatch):
    words = ("run", "moons", "--method", "minimum-time", "--method", "vanilla:2", "--seeds", "2", "--iterations", "2")
    out = call(*words)
    assert "published t_f 0.0904: 0 of 2 within 25 %" in out
    assert "vanilla, 2 steps: t_f 1.0000" in out

    def never(self):
        raise AssertionError("a finished seed was trained again")

    monkeypatch.setattr(Run, "step", never)
    assert "published t_f 0.0904: 0 of 2 within 25 %" in call(*words)


def test_a_finished_run_says_that_it_is_done():
    words = ("run", "moons", "--method", "vanilla:2", "--iterations", "2")
    assert "already done" not in call(*words)
    out = " ".join(call(*words).split())
    assert "two moons, seed 0: already done: vanilla, 2 steps (remove results/runs to train anew)" in out
    assert out.count("already done") == 1


@pytest.mark.parametrize("method", ["vanilla:2", "shallowest", "growth", "minimum-time"])
def test_iterations_means_iterations_for_every_method(tmp_path, method):
    result = CliRunner().invoke(app, ["run", "moons", "--method", method, "--iterations", "7"])
    assert result.exit_code in (0, 3)
    (record,) = json.loads((tmp_path / f"results/run-moons-{method.replace(':', '-')}.json").read_text())
    assert record["iterations"] == 7


def test_a_search_that_found_nothing_has_an_exit_status_of_its_own_and_no_infinite_figure(caplog):
    out = call("run", "moons", "--method", "shallowest", "--iterations", "3", code=3)
    assert "no number of steps met the target" in " ".join(out.split())
    said = out + caplog.text
    assert "NOT found" in said and not re.search(r"\b(inf|nan)\b", said)


def test_ctrl_c_saves_what_was_trained_and_the_same_command_goes_on(tmp_path, monkeypatch):
    words = ("run", "moons", "--method", "vanilla:2", "--method", "shallowest", "--iterations", "40")
    step, taken = Run.step, []

    def pressed(run):
        if len(taken) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        step(run)
        taken.append(run)

    monkeypatch.setattr(Run, "step", pressed)
    out = " ".join(call(*words, code=130).split())
    assert "Stopped. Saved in results/runs: vanilla, 2 steps after 5 iterations; shallowest true ODE after 5" in out
    assert "The same command goes on" in out and len(taken) == 10
    monkeypatch.setattr(Run, "step", step)
    result = CliRunner().invoke(app, words)
    assert "vanilla, 2 steps: goes on after 5 iterations" in result.output
    stopped = json.loads((tmp_path / "results/run-moons-vanilla-2-shallowest.json").read_text())
    whole = CliRunner().invoke(app, [*words, "--output", "whole"])
    assert whole.exit_code == result.exit_code
    as_one = json.loads((tmp_path / "whole/run-moons-vanilla-2-shallowest.json").read_text())
    times = {"training", "inference", "to_target"}
    for one, other in zip(stopped, as_one, strict=True):
        assert {k: v for k, v in one.items() if k not in times} == {k: v for k, v in other.items() if k not in times}


def test_ctrl_c_ends_compress_with_the_best_model_so_far(tmp_path, monkeypatch):
    call("run", "digits", "--method", "vanilla:4", "--iterations", "60")
    (checkpoint,) = (tmp_path / "results/runs").glob("*.pt")
    step = Run.step

    def pressed(run):
        if run.driver.search.best is not None:
            os.kill(os.getpid(), signal.SIGINT)
        step(run)

    monkeypatch.setattr(Run, "step", pressed)
    out = " ".join(call("compress", str(checkpoint), "--target", "1.0", "--iterations", "400").split())
    assert "Stopped: this is the best model so far" in out and "times fewer" in out
    assert list((tmp_path / "results/compressed").glob("*.pt"))


def test_run_shows_that_t_f_is_at_its_bound():
    out = call("run", "moons", "--weight", "1000", "--lr", ".001", "--span-lr", "1", "--iterations", "3")
    assert "t_f is at its lower bound" in out


def test_missing_data_ends_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    out = call("run", "fashion-mnist", "--epochs", "1", code=1)
    assert "not run: data missing: FashionMNIST" in out
    assert "dataset-fashion-mnist" in out
    assert "not run" in call("figure", "5", code=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "moon"), "there is no task 'moon'"),
        (("run", "moons", "--method", "vanila"), "there is no method 'vanila'"),
        (("run", "moons", "--weight", "-1"), "'--weight'"),
        (("run", "moons", "--seeds", "0"), "'--seeds'"),
        (("table", "7"), "there is no table '7'"),
        (("table", "1", "--lrs", "a,b"), "numbers with commas"),
        (("table", "1", "--sweep", "0"), "positive"),
        (("table", "1", "--lrs", "nan"), "positive finite"),
        (("figure", "2"), "there is no figure '2'"),
        (("run", "moons", "--device", "foo"), "--device 'foo' cannot be used"),
        (("run", "moons", "--first-seed", "-1"), "'--first-seed'"),
        (("table", "5", "--first-seed", "-1"), "'--first-seed'"),
        (("figure", "7", "--seed", "-1"), "'--seed'"),
    ],
)
def test_bad_input_names_the_value_and_the_way_out(words, said):
    assert said in call(*words, code=2)


def test_a_table_and_a_figure(tmp_path):
    out = call("table", "5", "--seeds", "1", "--lrs", "own", "--iterations", "2", "--sweep", "2")
    assert "Table 5" in out
    assert "as many steps" in out
    assert "figure-7.png" in call("figure", "7")
    assert (tmp_path / "results/figure-7.png").exists()


def test_the_module_runs_by_its_name():
    done = subprocess.run(
        [sys.executable, "-m", "torchdyn_mintime", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("demo", "run", "table", "figure", "bench"):
        assert command in done.stdout


def test_the_help_of_run_has_a_line_on_each_task_and_method():
    lines = [line.strip() for line in call("run", "--help").splitlines()]
    for name in ("moons", "flow-tutorial", "minimum-time", "vanilla:STEPS", "minimum-time-paper"):
        assert any(line.startswith(f"{name} ") and len(line) > len(name) + 5 for line in lines)


@pytest.mark.parametrize(("command", "listed"), [("table", names.TABLES), ("figure", names.FIGURES)])
def test_the_help_of_tables_and_figures_has_a_line_on_each(command, listed):
    lines = [line.strip() for line in call(command, "--help").splitlines()]
    assert all(
        any(re.fullmatch(rf"{name} +{re.escape(text)}", line) for line in lines) for name, text in listed.items()
    )


def test_the_version_is_printed():
    assert call("--version").strip() == __version__


def test_bench_has_options_of_its_own():
    assert "--rounds must be at least 1" in call("bench", "--rounds", "0", code=2)


def test_compress_writes_a_shallow_model_that_plain_torchdyn_loads(tmp_path):
    call("run", "digits", "--method", "vanilla", "--iterations", "60")
    (checkpoint,) = (tmp_path / "results/runs").glob("digits-vanilla*.pt")
    out = call("compress", str(checkpoint), "--target", "1.0", "--iterations", "200")
    assert "evals" in out and "times fewer" in out
    (written,) = (tmp_path / "results/compressed").glob("*.pt")
    saved = torch.load(written)
    assert set(saved) == {"state", "t_span", "solver", "task", "how"}
    model = TASKS["digits"].model(Method("vanilla", node={"solver": saved["solver"]}), TASKS["digits"].settings)
    model.load_state_dict(saved["state"])
    model.t_span = saved["t_span"]
    assert type(model.node) is NeuralODE and len(saved["t_span"]) <= 3
    test = TASKS["digits"].load(TASKS["digits"].settings, Source())
    with torch.no_grad():
        accuracy = (model(test.x_test).argmax(1) == test.y_test).double().mean().item()
    assert f"In plain torchdyn {100 * accuracy:.2f} %" in " ".join(out.split())


@pytest.mark.parametrize("options", [None, {"stages": 3}, {"stages": 2, "order": 1, "first_node": True}])
def test_the_file_of_compress_loads_as_it_says(tmp_path, options):
    task, solver = TASKS["digits"], "rk4" if options is None else partial(LearnableSolver, **options)
    data = task.load(task.settings, Source())
    model = task.model(Method("vanilla", node={"solver": solver}), task.settings)
    model = wrap(model, model.t_span).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*whoever loads the model needs its class")
        path = compress._write(model, Plan("digits", "vanilla", task.settings), data, tmp_path / "model.pt")
    saved = torch.load(path)
    loaded = task.model(Method("vanilla", node={"solver": "euler"}), task.settings).eval()
    known = {**saved, "model": loaded, "field": loaded.node.vf.vf.vf, "NeuralODE": NeuralODE}
    exec(saved["how"], known)
    loaded.t_span = saved["t_span"]
    with torch.no_grad():
        assert torch.equal(loaded(data.x_test[:8]), model(data.x_test[:8]))


def test_compress_says_what_it_cannot_take(tmp_path):
    assert "is not the .pt of a finished run" in call("compress", str(tmp_path / "none.pt"), code=2)
    call("run", "moons", "--iterations", "1")
    (checkpoint,) = (tmp_path / "results/runs").glob("*.pt")
    assert "made it shallow already" in call("compress", str(checkpoint), code=2)
    call("run", "digits", "--method", "skipped", "--iterations", "1")
    (checkpoint,) = (tmp_path / "results/runs").glob("*skipped*.pt")
    assert "only classifiers with an ODE" in call("compress", str(checkpoint), code=2)
    call("run", "moons", "--method", "vanilla:2", "--iterations", "1")
    (checkpoint,) = (tmp_path / "results/runs").glob("*vanilla*.pt")
    words = ("compress", str(checkpoint), "--target", "1e-6", "--iterations", "1")
    assert "Nothing was written" in call(*words, code=3)


@pytest.fixture
def small_flows(monkeypatch):
    for name in ("flow-moons", "flow-circles", "flow-tutorial"):
        task = TASKS[name]
        monkeypatch.setitem(TASKS, name, replace(task, settings=task.settings.but(test=64, batch=32)))


def test_the_flow_tutorial_runs_bare_and_wrapped(monkeypatch, tmp_path):
    task = TASKS["flow-tutorial"]
    monkeypatch.setitem(TASKS, "flow-tutorial", replace(task, settings=task.settings.but(test=50)))
    assert "minimum-time" in call("run", "flow-tutorial", "--iterations", "1")
    vanilla, ours = json.loads((tmp_path / "results/run-flow-tutorial.json").read_text())
    assert [vanilla["method"], ours["method"]] == ["vanilla", "minimum-time"]
    # One step of training has not taken them apart yet: the same start, the same batches, the same noise.
    assert ours["nll"] == pytest.approx(vanilla["nll"], rel=1e-2)
    monkeypatch.setattr(Run, "step", lambda run: pytest.fail("trained again"))
    call("run", "flow-tutorial", "--iterations", "1")


def test_a_flow_tutorial_that_breaks_ends_and_says_so(monkeypatch, tmp_path, small_flows):
    """A bare model would not come back from weights that are NaN."""

    def breaks(model, settings):
        return lambda step: math.nan if step.iteration else 0.0

    task = TASKS["flow-tutorial"]
    own = {name: replace(METHODS[name], terms=(breaks,)) for name in ("vanilla", "minimum-time")}
    monkeypatch.setitem(TASKS, "flow-tutorial", replace(task, methods=own))
    out = " ".join(call("run", "flow-tutorial", "--iterations", "3", code=3).split())
    assert "failed on every seed" in out
    assert all(math.isnan(r["nll"]) for r in json.loads((tmp_path / "results/run-flow-tutorial.json").read_text()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "flow-tutorial", "--lr", ".1"), "flow-tutorial does not take --lr: leave it out"),
        (("run", "flow-moons", "--start", ".1", "--data", "x"), "flow-moons does not take --start, --data"),
        (("run", "flow-moons", "--method", "target"), "there is no method 'target' for a flow on two moons"),
        (("run", "flow-stars"), "there is no task 'flow-stars'"),
        (("table", "flows", "--lrs", ".1"), "table flows does not take --lrs"),
        (("table", "3", "--only", "moons"), "table 3 has no 'moons'; its tasks are annuli"),
        (("run", "moons", "--method", "vanilla:²"), "there is no method 'vanilla:²'"),
        (("table", "flows", "--only", "moons"), "table flows has no 'moons'; its tasks are flow-moons"),
        (("figure", "6", "--width", "4"), "flow-moons does not take --width"),
        (("run", "digits", "--subset", "5"), "digits does not take --subset: leave it out"),
        (("run", "moons", "--width", "5"), "moons does not take --width: leave it out"),
        (("run", "moons", "--iterations", "2", "--epochs", "3"), "give --iterations or --epochs"),
        (("table", "1", "--subset", "5"), "table 1 does not take --subset"),
        (("table", "2", "--only", "digits", "--subset", "5"), "table 2 digits does not take --subset"),
        (("figure", "7", "--subset", "5"), "figure 7 does not take --subset"),
        (("compress", "a.pt", "--trim", "--lr", ".1", "--iterations", "5"), "--trim does not take --lr, --iterations"),
    ],
)
def test_what_would_be_ignored_is_refused(words, said):
    assert said in " ".join(call(*words, code=2).replace("│", " ").split())


def test_the_table_of_flows(tmp_path, small_flows):
    out = call("table", "flows", "--only", "flow-moons", "--seeds", "1", "--iterations", "1")
    for label in ("over 18 min", "as in the paper", "as many steps", "best of a"):
        assert label in out
    assert (tmp_path / "results/table-flow-moons.gif").exists()
    assert (tmp_path / "results/table-flows-flow-moons.md").read_text().startswith("# Flows")


def test_compress_can_take_away_steps_alone(tmp_path):
    call("run", "annuli", "--method", "vanilla", "--iterations", "40", "--lr", ".03")
    (checkpoint,) = (tmp_path / "results/runs").glob("annuli-vanilla*.pt")
    out = call("compress", str(checkpoint), "--trim", "--target", "0.65")
    before, after = (re.search(rf"{label}\s+\S+\s+(\d+)", out).group(1) for label in ("before", "after"))
    assert int(after) < int(before) == 40
    (share,) = re.findall(r"in the mean \(([.\d]+) of that\)", " ".join(out.split()))
    assert 0 <= float(share) <= 1
    assert "Nothing was written" not in out and "above threshold" in call(
        "compress", str(checkpoint), "--trim", "--target", "1e-9", code=2
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--start", "2"), "moons, minimum-time: t_f = 2 lies outside its bounds"),
    ],
)
def test_settings_that_a_method_refuses_are_said_as_such(words, message):
    assert message in " ".join(call("run", "moons", *words, code=2).replace("│", " ").split())


def test_epochs_are_passes_over_the_data(tmp_path):
    call("run", "digits", "--method", "vanilla:1", "--epochs", "1")
    (record,) = (tmp_path / "results/runs").glob("digits-vanilla-1*.json")
    assert json.loads(record.read_text())["plan"]["settings"]["iterations"] == 1347 // 128


@pytest.mark.parametrize(("number", "task"), [("6", "flow-moons"), ("12", "flow-circles")])
def test_the_figures_of_flows_come_with_their_runs(monkeypatch, number, task):
    called = []
    monkeypatch.setattr(tables, "make_own", lambda *args: called.append(args))
    call("figure", number, "--iterations", "2", "--seed", "5")
    ((own, methods, options, _, store, name),) = called
    assert (own, methods, options.settings["iterations"]) == (task, ("vanilla", "minimum-time"), 2)
    assert list(options.seeds) == [5] and isinstance(store, Store)
    assert name == f"figure-{number}"


def test_a_damaged_image_file_is_said_where_its_figures_would_be(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "nowhere")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in datasets.IDX:
        (folder / name).write_bytes(b"not an IDX file")
    words = ("--data", str(folder), "--iterations", "1")
    assert "is not an IDX file" in call("figure", "5", *words, code=1)
    table = ("table", "2", "--only", "mnist", "--seeds", "1", "--lrs", "own")
    assert "is not an IDX file" in call(*table, *words, code=1)
    assert "is not an IDX file" in call("run", "mnist", *words, code=1)


def test_compress_says_that_its_data_is_missing(tmp_path, monkeypatch):
    call("run", "digits", "--method", "vanilla:1", "--iterations", "1")
    (checkpoint,) = (tmp_path / "results/runs").glob("digits-vanilla-1*.pt")

    def missing(*args):
        raise MissingData("data missing: digits")

    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], load=missing))
    assert "not run: data missing: digits" in call("compress", str(checkpoint), code=1)


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a defect")

    monkeypatch.setattr("torchdyn_mintime.experiments.tables.compare", broken)
    result = CliRunner().invoke(app, ["run", "moons"])
    assert isinstance(result.exception, ValueError) and "a defect" in str(result.exception)


def test_run_draws_what_it_did_and_prints_the_rate_that_held(tmp_path):
    assert "nothing is left to train" in call("run", "annuli", "--method", "skipped", code=2)
    out = call("run", "digits", "--method", "pretrained", "--method", "skipped", "--iterations", "2")
    assert "V(z(t)) <= V(z(t0)) exp(-20 (t - t0))" in out and "samples" in out
    for method in ("pretrained", "skipped"):
        assert (tmp_path / f"results/run-digits-{method}-seed0.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words", [("run", "moons"), ("run", "sampler-moons"), ("figure", "7"), ("table", "5"), ("demo",)]
)
@pytest.mark.parametrize("folder", ["afile", "afile/sub", "taken"])
def test_a_folder_that_cannot_be_written_is_said_before_any_training(tmp_path, monkeypatch, words, folder):
    (tmp_path / "afile").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "runs").touch()
    monkeypatch.setattr(Run, "step", lambda run: pytest.fail("trained first"))
    monkeypatch.setattr(samplers, "matched", lambda *args, **options: pytest.fail("trained first"))
    said = " ".join(call(*words, "--output", folder, code=2).split())
    assert f"{folder}" in said and "cannot be written" in said and "name another folder" in said


def test_data_that_is_missing_ends_a_table_of_its_task_alone(monkeypatch, tmp_path):
    out = call("table", "2", "--only", "mnist-cpu", "--seeds", "1", code=1)
    assert "not run: data missing: MNIST" in out and "table 2: not run: none of its tasks" in out


def test_tables_and_figures_show_models_that_missed_their_target_and_end_with_0():
    assert "failed on every seed" in call(
        *("table", "precision", "--only", "moons", "--seeds", "1", "--lrs", "own", "--iterations", "1")
    )
    call("figure", "8", "--iterations", "1")
    said = " ".join(call("--help").split())
    assert "3 a model of `run` or `compress` missed its target" in said and "end with 0" in said


def test_a_damaged_model_is_named_by_compress_and_run(tmp_path):
    words = ("run", "digits", "--method", "vanilla:1", "--iterations", "1")
    call(*words)
    (model,) = (tmp_path / "results/runs").glob("*.pt")
    assert "does not end in .pt" in call("compress", str(model.with_suffix(".json")), code=2)
    model.write_bytes(b"garbage" * 100)
    for command in (("compress", str(model)), words):
        said = " ".join(call(*command, code=2).split())
        assert f"{model.name} is missing or damaged" in said and f"{model.stem}.*, and train it again" in said
    model.unlink()
    assert "is missing or damaged" in " ".join(call("compress", str(model), code=2).split())
