"""The learnable interval around a NeuralODE: spans, the field bound to a solve, and solves beside the model's own.

What other rooms use of this one is named here.
"""

from torchdyn_mintime.core import checks
from torchdyn_mintime.core.evaluation import (
    Loss,
    as_batches,
    as_number,
    check_end_alone,
    evaluate_with_reference,
    evaluate_without_ode,
    looks_between,
    mean_loss,
    model_output,
    of_output,
    rest_of,
    with_note,
)
from torchdyn_mintime.core.field import STATEFUL, BoundField, Field, cost_columns, evaluating, random_kept, takes
from torchdyn_mintime.core.interval import Interval
from torchdyn_mintime.core.network import as_network
from torchdyn_mintime.core.random_span import RandomSpan
from torchdyn_mintime.core.reference import (
    TOLERANCE,
    as_returned,
    ending,
    exact_solves,
    in_float64,
    position,
    reference_end,
    reference_solution,
    reference_states,
    relative_error,
    replaced_solves,
    rk4_solution,
    solve_of_samples,
    solved_spans,
    solver_error,
)
from torchdyn_mintime.core.sharding import replicate_times
from torchdyn_mintime.core.shards import refuse_shards
from torchdyn_mintime.core.solve import LastSolve, Method
from torchdyn_mintime.core.span import LOAD_HINT, Call, LearnableSpan
from torchdyn_mintime.core.speed_limit import SpeedLimit
from torchdyn_mintime.core.untraced import last_solve, never_first, refine, undisturbed, untraced
from torchdyn_mintime.core.wrapping import (
    freeze_times,
    has_bare,
    named_spans,
    only_span,
    parameter_groups,
    require_spans,
    spans,
    times_of,
    unwrap,
    with_solver,
    wrap,
)

__all__ = [
    "LOAD_HINT",
    "STATEFUL",
    "TOLERANCE",
    "BoundField",
    "Call",
    "Field",
    "Interval",
    "LastSolve",
    "LearnableSpan",
    "Loss",
    "Method",
    "RandomSpan",
    "SpeedLimit",
    "as_batches",
    "as_network",
    "as_number",
    "as_returned",
    "check_end_alone",
    "checks",
    "cost_columns",
    "ending",
    "evaluate_with_reference",
    "evaluate_without_ode",
    "evaluating",
    "exact_solves",
    "freeze_times",
    "has_bare",
    "in_float64",
    "last_solve",
    "looks_between",
    "mean_loss",
    "model_output",
    "named_spans",
    "never_first",
    "of_output",
    "only_span",
    "parameter_groups",
    "position",
    "random_kept",
    "reference_end",
    "reference_solution",
    "reference_states",
    "refine",
    "refuse_shards",
    "relative_error",
    "replaced_solves",
    "replicate_times",
    "require_spans",
    "rest_of",
    "rk4_solution",
    "solve_of_samples",
    "solved_spans",
    "solver_error",
    "spans",
    "takes",
    "times_of",
    "undisturbed",
    "untraced",
    "unwrap",
    "with_note",
    "with_solver",
    "wrap",
]
