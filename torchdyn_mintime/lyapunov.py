"""The name of older versions: see :mod:`torchdyn_mintime.losses`."""

from torchdyn_mintime.losses.certificate import *  # noqa: F403
from torchdyn_mintime.losses.lyapunov import *  # noqa: F403
from torchdyn_mintime.losses.potentials import *  # noqa: F403
from torchdyn_mintime.losses.samplers import *  # noqa: F403
