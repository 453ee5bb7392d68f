"""Profiles, seeds and dtypes shared by all tests.

pytest                                   the default profile: few examples, a few minutes in all
HYPOTHESIS_PROFILE=thorough pytest       many examples and the full counts of every statistical test
CI=1 pytest                              the default sizes, derandomized: one commit, one verdict
"""

import sys
from pathlib import Path

import pytest
import torch

# The helpers beside this file (`problems`, `differences`) are imported by name, whichever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

from profiles import PROFILE

collect_ignore = ["mutation.py", "upstream/branch.py"]  # commands of their own: one needs cosmic-ray

# Two threads on two shared cores are slower than one for the small networks used here, and noisier.
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: counts over many random draws; small by default, in full under HYPOTHESIS_PROFILE=thorough"
    )
    config.addinivalue_line("markers", "gpu: needs a GPU, and is skipped where there is none")


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
