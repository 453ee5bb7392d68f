"""The name of older versions: see :mod:`torchdyn_mintime.core.wrapping`."""

from torchdyn_mintime.core.wrapping import *  # noqa: F403
