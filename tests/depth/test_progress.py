"""How far a long call is: on a terminal, and where there is none."""

import io

import pytest
from rich.console import Console

from torchdyn_mintime.depth import progress


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until a test moves it, in seconds."""
    time = [0.0]
    monkeypatch.setattr(progress, "perf_counter", lambda: time[0])
    return time


def console(monkeypatch, terminal):
    out = io.StringIO()
    one = Console(file=out, force_terminal=terminal, force_interactive=terminal, force_jupyter=False, width=80)
    monkeypatch.setattr(progress, "get_console", lambda: one)
    return out


def test_without_a_terminal_a_line_is_written_once_in_twenty_seconds(now, monkeypatch, capsys):
    out = console(monkeypatch, False)
    with progress.progress_shown(True) as show:
        for i in range(60):
            now[0] = float(i)
            show(f"second {i}", i, 60 if i > 30 else None)
    said = capsys.readouterr()
    assert said.err.splitlines() == ["second 20", "second 40: 40 of 60"] and said.out == out.getvalue() == ""


def test_on_a_terminal_there_is_a_bar(now, monkeypatch, capsys):
    out = console(monkeypatch, True)
    now[0] = 100.0
    with progress.progress_shown(True) as show:
        show("fitting", 1, 4)
    assert "fitting" in out.getvalue() and "25%" in out.getvalue() and capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_on_request(terminal, now, monkeypatch, capsys):
    out = console(monkeypatch, terminal)
    with progress.progress_shown(False) as show:
        now[0] = 100.0
        show("hidden", 1, None)
    said = capsys.readouterr()
    assert said.out == said.err == out.getvalue() == ""
