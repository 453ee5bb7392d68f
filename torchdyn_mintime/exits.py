"""The name of older versions: see :mod:`torchdyn_mintime.depth.early_exit`."""

from torchdyn_mintime.depth.early_exit import *  # noqa: F403
