"""The name of older versions: see :mod:`torchdyn_mintime.depth.target`."""

from torchdyn_mintime.depth.target import *  # noqa: F403
