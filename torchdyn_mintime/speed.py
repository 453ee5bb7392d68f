"""The name of older versions: see :mod:`torchdyn_mintime.core.speed_limit`."""

from torchdyn_mintime.core.speed_limit import *  # noqa: F403
