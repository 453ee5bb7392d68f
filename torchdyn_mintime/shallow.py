"""The names of older versions: see :mod:`torchdyn_mintime.depth.shallowest`."""

from torchdyn_mintime.core.reference import exact_solves as referenced  # noqa: F401
from torchdyn_mintime.depth.shallowest import *  # noqa: F403
