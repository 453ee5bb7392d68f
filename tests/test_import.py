"""What an import costs, and that the public names are there however they are asked for."""

import subprocess
import sys

import pytest

import torchdyn_mintime as tm


def python(code):
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"]])
def test_help_imports_neither_torch_nor_torchdyn(words):
    """They take seconds."""
    code = f"""
import sys
from torchdyn_mintime.__main__ import app
try:
    app({words!r})
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "torchdyn", "matplotlib", "pandas"}} & set(sys.modules)
"""
    python(code)


def test_a_room_is_at_hand_without_an_import_of_its_own():
    names = "tm.flows.Gaussian, tm.numerics.cut, tm.diagnostics.solver_error, tm.plots.front, tm.lightning.Shallowest"
    python(f"import torchdyn_mintime as tm; {names}, tm.LearnableSpan")
    assert {"diagnostics", "flows", "lightning", "numerics", "plots"} <= set(dir(tm))


def test_every_public_name_is_there_and_listed():
    assert set(tm.__all__) <= set(dir(tm)) and all(hasattr(tm, name) for name in tm.__all__)
    with pytest.raises(AttributeError, match="'torchdyn_mintime' has no attribute 'LearnableTime'"):
        tm.LearnableTime  # noqa: B018
    with pytest.raises(ImportError, match="LearnableTime"):
        from torchdyn_mintime import LearnableTime  # noqa: F401
