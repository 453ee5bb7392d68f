"""The public names of the package, imported when the first of them is asked for."""

from torchdyn_mintime.core import (
    LearnableSpan,
    SpeedLimit,
    as_network,
    parameter_groups,
    replicate_times,
    spans,
    unwrap,
    wrap,
)
from torchdyn_mintime.depth.compress import compress
from torchdyn_mintime.depth.early_exit import early_exit
from torchdyn_mintime.depth.growth import DepthGrowth
from torchdyn_mintime.depth.sampler import compress_sampler
from torchdyn_mintime.depth.shallowest import Shallowest
from torchdyn_mintime.depth.solver_fit import fit_solver
from torchdyn_mintime.depth.target import TargetLoss
from torchdyn_mintime.depth.trim import trim
from torchdyn_mintime.flows import FlowModel
from torchdyn_mintime.losses.lyapunov import LyapunovRegularizer
from torchdyn_mintime.losses.step_count import StepCount
from torchdyn_mintime.losses.step_doubling import StepDoubling
from torchdyn_mintime.numerics import IntegrationError, LearnableSolver

__all__ = [
    "DepthGrowth",
    "FlowModel",
    "IntegrationError",
    "LearnableSolver",
    "LearnableSpan",
    "LyapunovRegularizer",
    "Shallowest",
    "SpeedLimit",
    "StepCount",
    "StepDoubling",
    "TargetLoss",
    "as_network",
    "compress",
    "compress_sampler",
    "early_exit",
    "fit_solver",
    "parameter_groups",
    "replicate_times",
    "spans",
    "trim",
    "unwrap",
    "wrap",
]
