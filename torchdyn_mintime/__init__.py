"""Neural ODEs that learn how deep they need to be: minimum-time and convergence-rate training for torchdyn."""

from torchdyn_mintime.exits import early_exit
from torchdyn_mintime.flows import FlowModel
from torchdyn_mintime.growth import DepthGrowth
from torchdyn_mintime.lyapunov import LyapunovRegularizer
from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.regularizers import StepDoubling
from torchdyn_mintime.shallow import Shallowest
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.speed import SpeedLimit
from torchdyn_mintime.step_count import StepCount
from torchdyn_mintime.trimming import trim
from torchdyn_mintime.weighting import TargetLoss
from torchdyn_mintime.wrapping import parameter_groups, spans, unwrap, wrap

__all__ = [
    "DepthGrowth",
    "FlowModel",
    "IntegrationError",
    "LearnableSpan",
    "LyapunovRegularizer",
    "Shallowest",
    "SpeedLimit",
    "StepCount",
    "StepDoubling",
    "TargetLoss",
    "early_exit",
    "parameter_groups",
    "spans",
    "trim",
    "unwrap",
    "wrap",
]

__version__ = "0.1.0"
