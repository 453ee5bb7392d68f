"""The name of older versions: see :mod:`torchdyn_mintime.losses.step_count`."""

from torchdyn_mintime.losses.step_count import *  # noqa: F403
