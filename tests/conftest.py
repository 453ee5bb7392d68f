"""Profiles, seeds and dtypes shared by all tests.

pytest                                   the default profile: few examples, a few minutes in all
HYPOTHESIS_PROFILE=thorough pytest       many examples and the full counts of every statistical test
CI=1 pytest                              the default sizes, derandomized: one commit, one verdict
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The helpers beside this file (`problems`, `differences`) are imported by name, whichever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = ["mutation.py"]  # a command of its own, which needs cosmic-ray

# A solve takes as long as it takes on a busy machine: a deadline would only report the load.
_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=15, **_COMMON)
settings.register_profile("ci", max_examples=15, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=300, **_COMMON)

PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default")
settings.load_profile(PROFILE)

# Two threads on two shared cores are slower than one for the small networks used here, and noisier.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: counts over many random draws; small by default, in full under HYPOTHESIS_PROFILE=thorough"
    )


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, so that one test's verdict never depends on another's draws."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def float64():
    """float64 as the default dtype, put back afterwards: some of torchdyn's layers build constants in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)


@pytest.fixture
def draws():
    """`draws(full, few)`: how many random draws a statistical test makes under the profile in use."""
    return lambda full, few: full if PROFILE == "thorough" else few
