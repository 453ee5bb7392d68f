"""Tests run the notebooks in their short mode: few iterations, the same cells."""

import os

os.environ.setdefault("TORCHDYN_MINTIME_SHORT", "1")
