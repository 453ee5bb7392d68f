"""The name of older versions: see :mod:`torchdyn_mintime.core.random_span`."""

from torchdyn_mintime.core.random_span import *  # noqa: F403
