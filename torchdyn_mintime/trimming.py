"""The name of older versions: see :mod:`torchdyn_mintime.depth.trim`."""

from torchdyn_mintime.depth.trim import *  # noqa: F403
