"""The name of older versions: see :mod:`torchdyn_mintime.depth.growth` and :mod:`torchdyn_mintime.depth.rollback`."""

from torchdyn_mintime.depth.growth import *  # noqa: F403
from torchdyn_mintime.depth.rollback import DivergedError, Rescue  # noqa: F401
