"""``run sampler-moons``: its rows, what it keeps, and what it refuses."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from torchdyn_mintime.__main__ import app
from torchdyn_mintime.experiments import names, samplers


def call(*words, code=0):
    result = CliRunner().invoke(app, ("run", "sampler-moons", *words), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samplers, "STATES", 400)
    monkeypatch.setattr(samplers, "FRESH", 60)
    monkeypatch.setattr(samplers, "EVALUATIONS", (2, 4))


def test_a_row_for_each_method_seed_and_number_of_evaluations(tmp_path):
    words = (
        "--method",
        "euler",
        "--method",
        "midpoint",
        "--method",
        "fit-solver",
        "--iterations",
        "30",
        "--seeds",
        "2",
    )
    out = call(*words)
    rows = json.loads((tmp_path / "results/run-sampler-moons.json").read_text())
    asked = [(m, s, n) for s in (0, 1) for m in ("euler", "midpoint", "fit-solver") for n in (2, 4)]
    assert [(r["method"], r["seed"], r["evaluations"]) for r in rows] == asked
    for r in rows:
        best = min(o["error"] for o in rows if (o["seed"], o["evaluations"]) == (r["seed"], r["evaluations"]))
        assert (r["error"] == best) == (r["method"] == "fit-solver")
        assert r["distance"] > 0 and math.isfinite(r["exact_distance"])
    assert all(names.SAMPLER_METHODS[m] in out for m in ("euler", "midpoint", "fit-solver"))
    assert (tmp_path / "results/run-sampler-moons.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted((tmp_path / "results/runs").iterdir())
    assert len(kept) == 2
    before = [path.stat().st_mtime_ns for path in kept]
    call(*words)
    again = json.loads((tmp_path / "results/run-sampler-moons.json").read_text())
    assert [r["error"] for r in again] == [r["error"] for r in rows]
    assert [path.stat().st_mtime_ns for path in kept] == before  # trained once


def test_the_weights_may_move(tmp_path):
    call("--method", "compress", "--iterations", "20")
    (row,) = json.loads((tmp_path / "results/run-sampler-moons.json").read_text())
    assert row["method"] == "compress" and row["evaluations"] <= 8 and row["error"] < 0.15


@pytest.mark.parametrize(
    "words, text",
    [
        (("--method", "vanilla"), "there is no method 'vanilla' for sampler-moons"),
        (("--weight", "1"), "does not take"),
    ],
)
def test_what_has_no_use_is_refused(words, text):
    assert text in " ".join(call(*words, code=2).split())


@given(st.floats(-3, 3), st.integers(0, 99))
def test_the_distance_of_a_shifted_set_is_the_shift(shift, seed):
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(seed))
    # In one order or another: the best matching is that of a translation.
    moved = (x + torch.tensor([shift, 0.0]))[torch.randperm(20, generator=torch.Generator().manual_seed(seed))]
    # Rounding of float32 entries, whose squares are summed: the root of eps where the shift is 0.
    assert samplers.distance(x, moved) == pytest.approx(abs(shift), abs=1e-3)


def test_ctrl_c_keeps_the_fields_of_earlier_seeds_and_says_so(monkeypatch, tmp_path):
    matched, trained = samplers.matched, []

    def stopped(*args, **options):
        if trained:
            raise KeyboardInterrupt
        trained.append(1)
        return matched(*args, **options)

    monkeypatch.setattr(samplers, "matched", stopped)
    words = ("--method", "euler", "--iterations", "2", "--seeds", "2")
    assert "Models that were trained to the end are kept in results/runs" in call(*words, code=130)
    assert [path.name for path in (tmp_path / "results/runs").iterdir()] == ["sampler-moons-seed0-2.pt"]


def test_a_damaged_field_is_named_with_what_to_do(tmp_path):
    words = ("--method", "euler", "--iterations", "2")
    call(*words)
    (field,) = (tmp_path / "results/runs").iterdir()
    field.write_bytes(field.read_bytes()[:500])
    said = " ".join(call(*words, code=2).split())
    assert f"results/runs/{field.name} is missing or damaged" in said and f"remove results/runs/{field.stem}.*" in said


def test_a_field_is_written_in_one_piece(monkeypatch, tmp_path):
    def cut(state, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", cut)
    assert isinstance(
        CliRunner().invoke(app, ("run", "sampler-moons", "--method", "euler", "--iterations", "2")).exception, OSError
    )
    assert list((tmp_path / "results/runs").iterdir()) == []
