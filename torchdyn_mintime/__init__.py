"""Neural ODEs that learn how deep they need to be: minimum-time and convergence-rate training for torchdyn."""

from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import parameter_groups, spans, unwrap, wrap

__all__ = ["IntegrationError", "LearnableSpan", "parameter_groups", "spans", "unwrap", "wrap"]

__version__ = "0.1.0"
