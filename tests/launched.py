"""Two processes of one script, as a user starts them, and what each of them left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["on_two_ranks"]


def on_two_ranks(script: str | Path, folder: Path, timeout: int = 600) -> list[Any]:
    """Runs ``python SCRIPT FOLDER`` and returns what its ranks wrote there, as 0.json and 1.json.

    The script starts the second process by itself, as Lightning's strategies do. A hang ends at the timeout (seconds).
    """
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={
            **{k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")},
            "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
