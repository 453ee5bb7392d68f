"""The name of older versions: see :mod:`torchdyn_mintime.numerics.grid`."""

from torchdyn_mintime.numerics.grid import *  # noqa: F403
