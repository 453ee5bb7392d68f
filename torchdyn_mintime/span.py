"""The name of older versions: see :mod:`torchdyn_mintime.core.span`."""

from torchdyn_mintime.core.span import *  # noqa: F403
