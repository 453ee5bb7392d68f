"""Lightning callbacks that put the paper's training into a Trainer, with no change to the module.

Import ``pytorch_lightning`` beside this, not ``lightning.pytorch``: torchdyn's NeuralODE is of the former family.
"""

from torchdyn_mintime.lightning.convergence_rate import ConvergenceRate
from torchdyn_mintime.lightning.grow_depth import GrowDepth
from torchdyn_mintime.lightning.minimum_time import MinimumTime
from torchdyn_mintime.lightning.shallowest import Shallowest

__all__ = ["ConvergenceRate", "GrowDepth", "MinimumTime", "Shallowest"]
