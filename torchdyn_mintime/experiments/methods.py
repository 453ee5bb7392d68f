"""The methods of training, each a row of the tables.

A method is data: how the NeuralODE is set up, which terms are added to the loss, and which driver moves t_f and ends the
training. To add one, write an entry of ``METHODS``, or of ``FLOW_METHODS`` for flows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchdyn_mintime import (
    DepthGrowth,
    LearnableSolver,
    LearnableSpan,
    Shallowest,
    TargetLoss,
    parameter_groups,
    spans,
)
from torchdyn_mintime.core import RandomSpan
from torchdyn_mintime.depth.rollback import Rollback
from torchdyn_mintime.depth.target import LONGEST_WINDOW
from torchdyn_mintime.depth.times import CoordinateDescent, GaussNewtonTime
from torchdyn_mintime.depth.trials import Verdict
from torchdyn_mintime.experiments.context import Context, Settings, Step
from torchdyn_mintime.experiments.models import Model, span_of
from torchdyn_mintime.losses import local_error, lyapunov, potentials, samplers, step_doubling, stiffness, trajectory

__all__ = ["FLOW_METHODS", "METHODS", "Driver", "Grow", "GrowAlone", "KeepTarget", "Method", "Search", "Term"]

Term = Callable[[Step], Tensor | float]
"""A term of the loss of one iteration, a scalar."""

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}
"""The optimizers of the network, by their names in the settings."""

WEIGHT_DECAY = 1e-5
"""Weight decay of the network under AdamW. Times never decay."""

LONGER = 10
"""Methods that begin with few steps may take so many times the task's iterations, since theirs are far cheaper."""


# ---------------------------------------------------------------------------------- who moves t_f, and ends the training


def _target_of(run: Context) -> float:
    if run.settings.target is None:
        raise ValueError("this method needs a target loss, and the task has none of its own: give --target")
    return run.settings.target


class Driver:
    """The plain driver: training takes the iterations of the settings, and the optimizer moves t_f if it is a parameter.

    Args:
        run: the training.
        parts: objects with a state of their own, by name.

    Attributes:
        owns_rates: whether the driver sets the learning rates; the training then leaves them alone.
        limit: the largest number of iterations.
        verdict: the result of a search that has ended, else None.
    """

    owns_rates = False
    verdict: Verdict | None = None

    def __init__(self, run: Context, **parts: Any):
        self.run, self.parts, self.limit = run, parts, run.settings.iterations

    @property
    def at_limit(self) -> bool:
        """Whether all iterations of the settings were taken."""
        return len(self.run.history.loss) >= self.limit

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return self.at_limit

    def penalty(self) -> Tensor | float:
        """Returns the driver's own term of the loss."""
        return 0.0

    def before_step(self, loss: Tensor) -> bool:
        """Sees the terminal loss between backward and the optimizer's step. Returns whether the step is to be taken."""
        return True

    def after_step(self, loss: Tensor) -> str:
        """Sees the terminal loss after the optimizer's step. Returns why training failed, or an empty text."""
        return ""

    def recovers(self, why: str) -> bool:
        """Restores an earlier state after an iteration that failed. Returns whether there is one."""
        return False

    def finish(self) -> str:
        """Ends the training. Returns why it failed, or an empty text."""
        return ""

    def front(self) -> list[Model]:
        """Returns the models of a search at all depths that passed, from the deepest to the shallowest; else an empty list."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Returns what a stopped training needs to go on."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a :meth:`state_dict`."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class KeepTarget(Driver):
    """Finds the price of time at which the loss stays at its target."""

    def __init__(self, run: Context):
        # A loss of all data needs no mean: one over steps would be of longer intervals while t_f falls.
        self.price = TargetLoss(run.model, _target_of(run), window=min(run.batches.per_pass, LONGEST_WINDOW))
        super().__init__(run, price=self.price)

    def before_step(self, loss: Tensor) -> bool:
        self.price.step(loss)
        return True

    def finish(self) -> str:
        self.price.restore_best()
        return ""


class Grow(Driver):
    """Algorithm 2: after the iterations of pre-training, t_f grows until the loss meets its target.

    The loss is checked at each iteration, or as the mean of each pass where the data comes in batches. With ``patience=0``,
    as in the paper's code, t_f grows at every check, and each growth makes a new optimizer. With a patience, t_f grows when
    the loss has not improved for so many checks, and the optimizer stays.

    Args:
        run: the training.
        patience: number of checks without improvement before t_f grows.
        pretrained: whether the iterations of the settings come before the first check.
        parts: further objects with a state, by name.
    """

    def __init__(self, run: Context, patience: int = 0, pretrained: bool = True, **parts: Any):
        self.growth = DepthGrowth(run.model.node, _target_of(run), patience=patience)
        super().__init__(run, growth=self.growth, **parts)
        run.history.first_stage = run.settings.iterations if pretrained else None

    @property
    def done(self) -> bool:
        return self.growth.done

    def after_step(self, loss: Tensor) -> str:
        history, growth, per_pass = self.run.history, self.growth, self.run.batches.per_pass
        since = len(history.loss) - (history.first_stage or 0)
        if since < 0 or since % per_pass:
            return ""
        value = fmean(history.loss[-per_pass:])
        grew = growth.step(value)
        if grew and growth.patience == 0:
            self.run.renew_optimizer()
        if grew or growth.done or not growth.exhausted:
            return ""
        return f"t_f has grown to its limit {growth.max_t_f:g}, and the loss is still {value:.3g}"


class GrowAlone(Grow):
    """Growth without pre-training, on the terminal loss, for as many iterations as the settings say.

    If all data is one batch, a loss that explodes makes training go back to an earlier state, at half the learning rate.
    """

    owns_rates = True

    def __init__(self, run: Context, patience: int = 20):
        self.rollback = Rollback(run.model, run.optimizer)
        super().__init__(run, patience, pretrained=False, rollback=self.rollback)

    @property
    def done(self) -> bool:
        return super().done or self.at_limit

    def finish(self) -> str:
        if self.growth.done or not self.at_limit:
            return ""
        return f"the loss is above its target after {self.limit} iterations, at t_f = {self.run.model.t_f:.3g}"

    def before_step(self, loss: Tensor) -> bool:
        return not self._went_back(loss.item())

    def recovers(self, why: str) -> bool:
        return self._went_back(math.inf)

    def _went_back(self, loss: float) -> bool:
        # The loss of one batch of many is too noisy to tell that training has exploded.
        exploded = self.run.batches.per_pass == 1 and self.rollback.look(loss)
        if exploded:
            self.growth.restart()
        return exploded


class Search(Driver):
    """Searches for the fewest evaluations at which the loss meets its target and the solver error is small."""

    owns_rates = True

    def __init__(self, run: Context):
        self.search = Shallowest(target=run.settings.target, solver_tol=run.settings.solver_tol)
        super().__init__(run, search=self.search)
        run.history.searched = True
        self.search.batches_seen_together = run.batches.per_pass
        self.search.start(run.model, run.optimizer)

    @property
    def done(self) -> bool:
        return self.search.done or self.at_limit

    def penalty(self) -> Tensor:
        return self.search.penalty(self.run.loss_of_batch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.search.start(self.run.model, self.run.optimizer)

    def after_step(self, loss: Tensor) -> str:
        self.search.step(loss, self.run.loss_again)
        history = self.run.history
        if history.first_stage is None and any(trial.passed for trial in self.search.trials):
            history.first_stage = len(history.loss)
        return ""

    def recovers(self, why: str) -> bool:
        self.search.diverged(why)
        return True

    def finish(self) -> str:
        self.verdict = self.search.finish()
        return "" if self.verdict.feasible else "no number of steps met the target as a true ODE"

    def front(self) -> list[Model]:
        passed = [] if self.verdict is None else self.verdict.front
        return [cast(Model, self.search.take(evaluations=trial.evaluations)) for trial in passed]


# -------------------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Method:
    """One method of training.

    Attributes:
        label: the printed name.
        span: options of ``wrap``; None: torchdyn's bare NeuralODE, with torchdyn's solves and rk4 (U1).
        node: options of the NeuralODE that replace the task's. A solver may be a function that makes it.
        t_span: points of the solve that replace the task's.
        span_lr: learning rate of the times if the settings give none; None: the network's.
        terminal: weight of the terminal loss.
        rate: kappa of the Lyapunov term, eq. (17); None: no such term.
        terms: functions that make further terms of the loss from the model and the settings.
        solves: whether training needs the solution. LyaNet's does not.
        frozen: whether t_f stays as it is.
        skips: whether the NeuralODE is left out, to see what the layers around it do alone.
        driver: decides what happens to t_f, and when training ends.
        solver: makes from the model what is called in training; default: its node.
        times: makes a separate optimizer for the times, from a list of them.
        in_turn: makes one optimizer that steps the network's and that of the times in turn; default: both step at once.
        longer: factor on the task's iterations if none are asked for.
    """

    label: str
    span: Mapping[str, Any] | None = None
    node: Mapping[str, Any] = field(default_factory=dict)
    t_span: Tensor | None = None
    span_lr: float | None = None
    terminal: float = 1.0
    rate: float | None = None
    terms: tuple[Callable[[Model, Settings], Term], ...] = ()
    solves: bool = True
    frozen: bool = False
    skips: bool = False
    driver: Callable[[Context], Driver] = Driver
    solver: Callable[[Model], Callable[..., Any]] = attrgetter("node")
    times: Callable[[list[Tensor]], Optimizer] | None = None
    in_turn: Callable[[Optimizer, Optimizer], Any] | None = None
    longer: int = 1

    def loss_terms(self, model: Model, settings: Settings) -> list[Term]:
        """Returns the terms that are added to the terminal loss."""
        own = () if self.rate is None else (partial(_lyapunov, rate=self.rate),)
        return [make(model, settings) for make in (*own, *self.terms)]

    def optimizers(self, model: Model, settings: Settings) -> tuple[list[Any], Optimizer]:
        """Returns new optimizers, and the network's own, whose learning rates follow the settings."""
        decay = WEIGHT_DECAY if settings.optimizer == "adamw" else 0.0
        if next(spans(model), None) is None:
            groups: list[dict[str, Any]] = [
                {"params": list(model.parameters()), "lr": settings.lr, "weight_decay": decay}
            ]
        else:
            span_lr = self.span_lr if settings.span_lr is None else settings.span_lr
            groups = parameter_groups(model, lr=settings.lr, span_lr=span_lr, weight_decay=decay)
        make = OPTIMIZERS[settings.optimizer]
        if self.times is None:
            network = make(groups)
            return [network], network
        network, times = make(groups[:1]), self.times(groups[1]["params"])
        return [network, times] if self.in_turn is None else [self.in_turn(network, times)], network


# ------------------------------------------------------------------------------------------------ terms of the loss


def _price_of_time(model: Model, settings: Settings) -> Term:
    return lambda step: settings.weight * model.node.duration  # eq. (13)


def _lyapunov(model: Model, settings: Settings, rate: float) -> Term:
    """Returns the term of eq. (17), as the plain mean over points, as in the paper's code."""
    regularizer = lyapunov.regularizer_for(model, potentials.CrossEntropy(model.head), rate)
    return lambda step: regularizer.penalty(step.t_eval, step.sol, step.y, reduction="points")


def _lyanet(model: Model, settings: Settings, rate: float = 20.0) -> Term:
    """Returns the term of LyaNet, without a solve: 512 states from a ball of radius U(0, sqrt(225 n)) and one time."""
    regularizer = lyapunov.LyapunovRegularizer(model.node, potentials.CrossEntropy(model.head), rate)

    def term(step: Step) -> Tensor:
        # LyaNet evaluates every state with every sample's label. Samples of one class give the same value, so one of each
        # class is enough if the classes are equally large, as they are in these tasks.
        first = [int((step.y == c).nonzero()[0]) for c in step.y.unique()]
        sampler = samplers.ball((225.0 * step.z0.shape[1]) ** 0.5, uniform_radius=True)
        z0, y = step.z0[first], step.y[first]
        return regularizer.sampled_penalty(z0, y, sampler=sampler, samples=512, t_span=model.t_span)

    return term


def _penalty(make: Callable[..., Any], every: int = 1, **options: Any) -> Callable[[Model, Settings], Term]:
    """Returns the term of a regularizer of the last solve, which is added at every ``every``-th iteration."""

    def term_of(model: Model, settings: Settings) -> Term:
        regularizer, remembers = make(model.node, **options), isinstance(model.node, LearnableSpan)

        def term(step: Step) -> Tensor | float:
            solve = () if remembers else (step.t_eval, step.sol)  # a span remembers its last solve
            return 0.0 if step.iteration % every else regularizer.penalty(*solve)

        return term

    return term_of


# ---------------------------------------------------------------------------------------------------- the registry

_SHORT, _LONGER = span_of(5, 0.05), span_of(10, 0.1)
_ONE_STEP = span_of(1)
_ADJOINT = {"sensitivity": "adjoint"}
_WHOLE = Method("vanilla", span={}, frozen=True)
_LYAPUNOV = replace(_WHOLE, label="Lyapunov", terminal=0.0)
_ALGORITHM_2 = Method("convergence-rate", span={}, t_span=_SHORT, terminal=0.0, rate=20.0, driver=Grow)
_MINIMUM_TIME = Method("minimum-time", span={}, terms=(_price_of_time,))
_SEARCH = Method("shallowest true ODE", span={}, driver=Search, longer=LONGER)
_SNOPT = Method("SNOpt's time update, adjoint", span={"bounds": (0.1, 1.0)}, times=GaussNewtonTime, node=_ADJOINT)

METHODS: dict[str, Method] = {
    "vanilla": _WHOLE,
    "torchdyn": Method("torchdyn's own NeuralODE"),
    "minimum-time": _MINIMUM_TIME,
    "target": Method("minimum-time, given target", span={}, driver=KeepTarget),
    "convergence-rate": _ALGORITHM_2,
    "convergence-rate-patient": replace(
        _ALGORITHM_2, label="convergence-rate, patience 3", driver=partial(Grow, patience=3)
    ),
    "convergence-rate-longer": replace(_ALGORITHM_2, label="convergence-rate, pre-trained on [0, .1]", t_span=_LONGER),
    "growth": Method("growth from one step", span={}, t_span=span_of(1, 0.01), driver=GrowAlone, longer=LONGER),
    "pretrained": replace(_LYAPUNOV, label="Lyapunov on [0, .05]", t_span=_SHORT, rate=20.0),
    "pretrained-longer": replace(_LYAPUNOV, label="Lyapunov on [0, .1]", t_span=_LONGER, rate=20.0),
    # The Lyapunov term refuses fewer than five points, which is what it has from t_f = .035 on.
    "combined": Method("combined", span={"bounds": (0.035, 1.0)}, t_span=_SHORT, rate=20.0, terms=(_price_of_time,)),
    "combined-paper": Method(
        "combined, bounds as published",
        span={"bounds": (0.01001, 1.0)},
        t_span=_SHORT,
        rate=20.0,
        terms=(_price_of_time,),
    ),
    "lyapunov-1": replace(_LYAPUNOV, label="Lyapunov, rate 1", rate=1.0),
    "lyapunov-10": replace(_LYAPUNOV, label="Lyapunov, rate 10", rate=10.0),
    "lyapunov-20": replace(_LYAPUNOV, label="Lyapunov, rate 20", rate=20.0),
    "lyanet": replace(_WHOLE, label="LyaNet", terminal=0.0, terms=(_lyanet,), solves=False),
    "steer": replace(_WHOLE, label="STEER", solver=lambda model: RandomSpan(model.node, 0.5)),
    "taynode-2": replace(
        _WHOLE, label="TayNODE, K = 2", terms=(_penalty(trajectory.TaylorRegularizer, weight=1e-3, derivative=2),)
    ),
    "taynode-3": replace(
        _WHOLE, label="TayNODE, K = 3", terms=(_penalty(trajectory.TaylorRegularizer, weight=1e-3, derivative=3),)
    ),
    "rnode": replace(
        _WHOLE,
        label="RNODE",
        terms=(_penalty(trajectory.KineticEnergy, weight=0.01), _penalty(trajectory.JacobianNorm, weight=0.01)),
    ),
    "local-error": replace(
        _WHOLE, label="local error", terms=(_penalty(local_error.LocalError, weight=10.0, sampled=True),)
    ),
    "srnode": replace(_WHOLE, label="SRNODE", terms=(_penalty(stiffness.Stiffness, weight=1e-4),)),
    "residual": replace(_WHOLE, label="one residual block", node={"solver": "euler"}, t_span=_ONE_STEP),
    "step-doubling": replace(
        _WHOLE, label="1 step, step doubling", t_span=_ONE_STEP, terms=(_penalty(step_doubling.StepDoubling),)
    ),
    "shallowest": _SEARCH,
    "shallowest-adaptive": replace(
        _SEARCH, label="shallowest true ODE, tsit5", node={"solver": "tsit5"}, t_span=_ONE_STEP
    ),
    "skipped": Method("the ODE skipped", skips=True),
    "default-adaptive": replace(_WHOLE, label="vanilla, default tsit5", node={"solver": "tsit5"}, t_span=_ONE_STEP),
    "vanilla-adjoint": replace(_WHOLE, label="vanilla, adjoint", node=_ADJOINT),
    "vanilla-adjoint-adaptive": replace(
        _WHOLE, label="vanilla, adjoint and dopri5", node={**_ADJOINT, "solver": "dopri5"}, t_span=_ONE_STEP
    ),
    "snopt": _SNOPT,
    "snopt-adaptive": replace(
        _SNOPT,
        label="SNOpt's time update, adjoint and dopri5",
        node={**_ADJOINT, "solver": "dopri5"},
        t_span=_ONE_STEP,
    ),
    "coordinate-descent": replace(
        _MINIMUM_TIME,
        label="TO-FLOW's coordinate descent",
        times=partial(torch.optim.Adam, lr=0.02),
        in_turn=partial(CoordinateDescent, turns=(5, 1)),
    ),
    "minimum-time-learned": replace(
        _MINIMUM_TIME,
        label="minimum-time, learned solver of 4 stages",
        node={"solver": partial(LearnableSolver, 4)},
        t_span=_ONE_STEP,
        terms=(_price_of_time, _penalty(step_doubling.StepDoubling)),
    ),
    "minimum-time-adjoint": replace(_MINIMUM_TIME, label="minimum-time, adjoint", node=_ADJOINT),
}

FLOW_METHODS: dict[str, Method] = {
    "vanilla": METHODS["vanilla"],
    "torchdyn": METHODS["torchdyn"],
    "minimum-time": replace(_MINIMUM_TIME, t_span=span_of(12), span_lr=0.01),
    "minimum-time-doubling": Method(
        "minimum-time, step doubling",
        span={},
        t_span=span_of(12),
        span_lr=0.01,
        # Only at every fifth iteration, with five times the weight.
        terms=(_price_of_time, _penalty(step_doubling.StepDoubling, every=5, weight=5.0)),
    ),
    "minimum-time-paper": replace(_MINIMUM_TIME, label="minimum-time, as in the paper"),
    "shallowest": _SEARCH,
    "default-adaptive": METHODS["default-adaptive"],
}
