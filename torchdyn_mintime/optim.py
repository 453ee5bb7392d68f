"""The name of older versions: see :mod:`torchdyn_mintime.depth.times`."""

from torchdyn_mintime.depth.times import *  # noqa: F403
