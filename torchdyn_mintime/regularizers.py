"""The name of older versions: see :mod:`torchdyn_mintime.losses`."""

from torchdyn_mintime.losses.local_error import *  # noqa: F403
from torchdyn_mintime.losses.step_doubling import *  # noqa: F403
from torchdyn_mintime.losses.trajectory import *  # noqa: F403
