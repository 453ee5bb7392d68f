"""The same seed gives the same result on the CPU, bit for bit."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from torchdyn_mintime.__main__ import app
from torchdyn_mintime.experiments.models import span_of
from torchdyn_mintime.experiments.tasks import TASKS

CLOCKS = ("seconds", "time", "training", "inference", "to_target", "cpu", "wall", "sampling")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name, task in TASKS.items():
        if len(task.t_span) > 2:
            small = replace(task.settings, test=64, batch=32) if name.startswith("flow") else task.settings
            monkeypatch.setitem(TASKS, name, replace(task, t_span=span_of(10), settings=small))


def results_of(folder):
    """Every tensor, table and figure that a command left, without what a clock showed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".csv":
            with path.open() as file:
                found[name] = [
                    {k: v for k, v in row.items() if not any(c in k.lower() for c in CLOCKS)}
                    for row in csv.DictReader(file)
                ]
        elif path.suffix in (".pt", ".ckpt"):
            found[name] = _plain(torch.load(path, weights_only=True))
        elif path.suffix == ".json":
            found[name] = _plain(json.loads(path.read_text()))
        elif path.name.startswith("figure-"):
            found[name] = path.read_bytes()  # a picture of models and data, without a clock
    return found


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not any(c in str(k).lower() for c in CLOCKS)}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def run(folder, monkeypatch, *words):
    folder.mkdir()
    monkeypatch.chdir(folder)
    torch.manual_seed(hash(folder) % 1000)  # the state that the process happens to be in plays no part
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return results_of(folder)


METHODS = ("--method", "minimum-time", "--method", "vanilla:2")
COMMANDS = {
    "run, two moons": ("run", "moons", *METHODS, "--iterations", "2"),
    "run, digits": ("run", "digits", "--method", "minimum-time", "--iterations", "2"),
    "demo": ("demo", "--iterations", "2"),
    "table": ("table", "5", "--seeds", "1", "--lrs", "own", "--iterations", "2", "--sweep", "2"),
    "figure": ("figure", "4", "--iterations", "2"),
    "flow": ("run", "flow-moons", "--method", "minimum-time", "--iterations", "1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_two_runs_are_equal_bit_for_bit(name, tmp_path, monkeypatch):
    first = run(tmp_path / "first", monkeypatch, *COMMANDS[name])
    second = run(tmp_path / "second", monkeypatch, *COMMANDS[name])
    assert first and first == second


def test_another_seed_gives_another_result(tmp_path, monkeypatch):
    words = ("run", "moons", "--iterations", "2")
    assert run(tmp_path / "first", monkeypatch, *words) != run(
        tmp_path / "second", monkeypatch, *words, "--first-seed", "1"
    )
