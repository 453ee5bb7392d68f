"""The device of the tests in this folder: a GPU. They are skipped where there is none.

pytest -m gpu                                    on a GPU
GPU_TESTS_DEVICE=cpu pytest tests/gpu            the same on the CPU, to rehearse them
"""

import os

import pytest
import torch

NAME = os.environ.get("GPU_TESTS_DEVICE", "cuda")


@pytest.fixture
def device():
    if NAME == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device(NAME)
