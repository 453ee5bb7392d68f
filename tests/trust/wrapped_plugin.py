"""A pytest plugin: every `NeuralODE` that a test makes comes out wrapped. For suites that know nothing of this package.

    PYTHONPATH=/path/to/tests/trust pytest -p wrapped_plugin /path/to/torchdyn/test

t_f is frozen, so that a test which compares numbers sees the interval it passes. With WRAPPED_T_F=learned it is a
parameter as after `wrap`.
"""

import os
import sys

import torchdyn.core
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm

made = 0


class Wrapped(NeuralODE):
    """Stands where the tests look for the class. What it makes is a LearnableSpan around a node of the true class."""

    def __new__(cls, *args, **options):
        global made
        made += 1
        span = tm.LearnableSpan(NeuralODE(*args, **options))
        if os.environ.get("WRAPPED_T_F") != "learned":
            span.t_f.requires_grad_(False)
        return span


def pytest_configure(config):
    # Every module of torchdyn that hands the class on. The one that defines it keeps it: pickle looks it up there.
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "torchdyn" and name != NeuralODE.__module__ and hasattr(module, "NeuralODE"):
            module.NeuralODE = Wrapped
    assert torchdyn.core.NeuralODE is Wrapped


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{made} NeuralODEs were wrapped")
