"""How a model is trained: each method as a row of the tables.

A method is data: how the NeuralODE is set up, which terms go on the loss, and who drives t_f. A new one is one entry of
``METHODS``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchdyn_mintime import parameter_groups, spans, wrap
from torchdyn_mintime.experiments.drivers import Driver, Grow, GrowAlone, KeepTarget, Search
from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.models import Classifier, NoODE, span_of
from torchdyn_mintime.experiments.optimizers import Together
from torchdyn_mintime.experiments.tasks import Settings, Task
from torchdyn_mintime.lyapunov import CrossEntropy, LyapunovRegularizer, ball
from torchdyn_mintime.optim import CoordinateDescent, GaussNewtonTime
from torchdyn_mintime.recipes import lyapunov
from torchdyn_mintime.regularizers import JacobianNorm, KineticEnergy, LocalError, StepDoubling, TaylorRegularizer
from torchdyn_mintime.steer import RandomSpan

if TYPE_CHECKING:
    from torchdyn_mintime.experiments.training import Step

__all__ = ["METHODS", "Method", "Term", "find_method", "vanilla_with"]

Term = Callable[["Step"], Tensor]
"""A term of the loss of one iteration, a scalar."""


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        label: as printed.
        span: options of ``wrap``; None leaves torchdyn's bare NeuralODE.
        node: options of the NeuralODE over the task's.
        t_span: the points of the solve over the task's.
        terminal: weight of the terminal loss.
        rate: kappa of the Lyapunov term, eq. (17); None is without one.
        terms: each makes another term of the loss from the model and the settings.
        solves: whether training needs the solution; LyaNet's does not.
        frozen: t_f stays as it is.
        skips: train without the NeuralODE: what the layers around it do alone.
        driver: decides what happens to t_f, and when training ends.
        solver: makes what is solved in training, from the model; default: its node.
        times: makes another optimizer for the times, from them.
        pair: makes one of the network's optimizer and that of the times.
    """

    label: str
    span: Mapping[str, Any] | None = None
    node: Mapping[str, Any] = field(default_factory=dict)
    t_span: Tensor | None = None
    terminal: float = 1.0
    rate: float | None = None
    terms: tuple[Callable[[Classifier, Settings], Term], ...] = ()
    solves: bool = True
    frozen: bool = False
    skips: bool = False
    driver: Callable[[], Driver] = Driver
    solver: Callable[[Classifier], Callable[..., Any]] = attrgetter("node")
    times: Callable[[list[Tensor]], Optimizer] | None = None
    pair: Callable[[Optimizer, Optimizer], Any] = Together

    def loss_terms(self, model: Classifier, settings: Settings) -> list[Term]:
        """What is added to the terminal loss."""
        own = () if self.rate is None else (_lyapunov(self.rate),)
        return [make(model, settings) for make in (*own, *self.terms)]

    def model(self, task: Task, settings: Settings) -> Classifier:
        """The task's network, set up for this method."""
        model = task.model(settings, self.t_span, **self.node)
        if self.skips:
            model.node = NoODE()
            if next(model.parameters(), None) is None:
                raise UsageError(f"{task.title} has no layers around its NeuralODE: skipped, nothing is left to train")
        if self.span is not None:
            wrap(model, model.t_span, **{"t_f": settings.start, **self.span})  # the one line
        for span in spans(model):
            span.t_f.requires_grad_(not self.frozen)
        return model

    def optimizer(self, model: Classifier, settings: Settings) -> tuple[Any, Optimizer]:
        """A new optimizer, and the part of it whose learning rates follow the settings."""
        if next(spans(model), None) is None:
            groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": settings.lr}]
        else:
            groups = parameter_groups(model, lr=settings.lr, span_lr=settings.span_lr)
        if self.times is None:
            own = _network_optimizer(groups, settings)
            return own, own
        network = _network_optimizer(groups[:1], settings)
        return self.pair(network, self.times(groups[1]["params"])), network


def _network_optimizer(groups: list[dict[str, Any]], settings: Settings) -> Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups)
    return torch.optim.SGD(groups, momentum=0.9)


# ------------------------------------------------------------------------------------------------ terms of the loss


def _price_of_time(model: Classifier, settings: Settings) -> Term:
    return lambda step: settings.weight * model.node.duration  # eq. (13)


def _lyapunov(rate: float) -> Callable[[Classifier, Settings], Term]:
    """Eq. (17), the plain mean over points as in the paper's code."""

    def make(model: Classifier, settings: Settings) -> Term:
        regularizer = lyapunov(model, CrossEntropy(model.head), rate)
        return lambda step: regularizer.penalty(step.t_eval, step.sol, step.y, reduction="points")

    return make


def _lyanet(rate: float) -> Callable[[Classifier, Settings], Term]:
    """LyaNet: 512 states drawn in a ball of radius U(0, sqrt(225 n)) and one time in each iteration; no solve."""

    def make(model: Classifier, settings: Settings) -> Term:
        regularizer = LyapunovRegularizer(model.node, CrossEntropy(model.head), rate)

        def term(step: "Step") -> Tensor:
            # LyaNet looks at every state with every sample's label. Samples of a class give the same, so one of each
            # is enough where classes are equally many, as they are in these tasks.
            first = [int((step.y == c).nonzero()[0]) for c in step.y.unique()]
            sampler = ball((225.0 * step.z0.shape[1]) ** 0.5, uniform_radius=True)
            return regularizer.sampled_penalty(
                step.z0[first], step.y[first], sampler=sampler, samples=512, t_span=model.t_span
            )

        return term

    return make


def _step_doubling(model: Classifier, settings: Settings) -> Term:
    regularizer = StepDoubling(model)
    return lambda step: regularizer.penalty()


def _along_trajectory(make_regularizer: Callable[[Any], Any]) -> Callable[[Classifier, Settings], Term]:
    """A regularizer of the path, on torchdyn's bare NeuralODE."""

    def make(model: Classifier, settings: Settings) -> Term:
        regularizer = make_regularizer(model.node)
        return lambda step: regularizer.penalty(step.t_eval, step.sol)

    return make


def _taylor(derivative: int) -> Callable[[Classifier, Settings], Term]:
    return _along_trajectory(lambda node: TaylorRegularizer(node, 1e-3, derivative))


def _local_error(model: Classifier, settings: Settings) -> Term:
    regularizer = LocalError(model.node, 10.0, sampled=True)
    return lambda step: regularizer.penalty()


# ---------------------------------------------------------------------------------------------------- the registry

_SHORT = span_of(5, 0.05)
_SNOPT: dict[str, Any] = {"span": {"bounds": (0.1, 1.0)}, "times": GaussNewtonTime}
_ADJOINT = {"sensitivity": "adjoint"}
_KINETIC = _along_trajectory(lambda node: KineticEnergy(node, 0.01))
_JACOBIAN = _along_trajectory(lambda node: JacobianNorm(node, 0.01))

METHODS: dict[str, Method] = {
    "vanilla": Method("vanilla"),
    "minimum-time": Method("minimum-time", span={}, terms=(_price_of_time,)),
    "target": Method("minimum-time, given target", span={}, driver=KeepTarget),
    "convergence-rate": Method("convergence-rate", span={}, t_span=_SHORT, terminal=0.0, rate=20.0, driver=Grow),
    "convergence-rate-patient": Method(
        "convergence-rate, patience 3",
        span={},
        t_span=_SHORT,
        terminal=0.0,
        rate=20.0,
        driver=lambda: Grow(patience=3),
    ),
    "growth": Method("growth from one step", span={}, t_span=span_of(1, 0.01), driver=GrowAlone),
    "pretrained": Method(
        "Lyapunov on [0, .05]",
        span={},
        frozen=True,
        t_span=_SHORT,
        terminal=0.0,
        rate=20.0,
    ),
    "combined": Method("combined", span={"bounds": (0.035, 1.0)}, t_span=_SHORT, rate=20.0, terms=(_price_of_time,)),
    "lyapunov-1": Method("Lyapunov, rate 1", span={}, frozen=True, terminal=0.0, rate=1.0),
    "lyapunov-10": Method("Lyapunov, rate 10", span={}, frozen=True, terminal=0.0, rate=10.0),
    "lyapunov-20": Method("Lyapunov, rate 20", span={}, frozen=True, terminal=0.0, rate=20.0),
    "lyanet": Method("LyaNet", terminal=0.0, terms=(_lyanet(20.0),), solves=False),
    "steer": Method("STEER", solver=lambda model: RandomSpan(model.node, 0.5)),
    "taynode-2": Method("TayNODE, K = 2", terms=(_taylor(2),)),
    "taynode-3": Method("TayNODE, K = 3", terms=(_taylor(3),)),
    "rnode": Method("RNODE", terms=(_KINETIC, _JACOBIAN)),
    "local-error": Method("local error", span={}, frozen=True, terms=(_local_error,)),
    "step-doubling": Method("1 step, step doubling", span={}, frozen=True, t_span=span_of(1), terms=(_step_doubling,)),
    "shallowest": Method("shallowest true ODE", span={}, driver=Search),
    "shallowest-adaptive": Method(
        "shallowest true ODE, tsit5", span={}, node={"solver": "tsit5"}, t_span=span_of(1), driver=Search
    ),
    "skipped": Method("the ODE skipped", skips=True),
    "default-adaptive": Method("vanilla, default tsit5", node={"solver": "tsit5"}, t_span=span_of(1)),
    "vanilla-adjoint": Method("vanilla, adjoint", node=_ADJOINT),
    "vanilla-adjoint-adaptive": Method(
        "vanilla, adjoint and dopri5", node={**_ADJOINT, "solver": "dopri5"}, t_span=span_of(1)
    ),
    "snopt": Method("SNOpt's time update, adjoint", **_SNOPT, node=_ADJOINT),
    "snopt-adaptive": Method(
        "SNOpt's time update, adjoint and dopri5", **_SNOPT, node={**_ADJOINT, "solver": "dopri5"}, t_span=span_of(1)
    ),
    "coordinate-descent": Method(
        "TO-FLOW's coordinate descent",
        span={},
        terms=(_price_of_time,),
        times=lambda times: torch.optim.Adam(times, lr=0.02),
        pair=lambda network, times: CoordinateDescent(network, times, turns=(5, 1)),
    ),
    "minimum-time-adjoint": Method("minimum-time, adjoint", span={}, node=_ADJOINT, terms=(_price_of_time,)),
}


def vanilla_with(steps: int) -> Method:
    """The control: vanilla on the same interval, with as many equal steps of rk4."""
    return Method(f"vanilla, {steps} steps", node={"solver": "rk4"}, t_span=span_of(steps))


def find_method(name: str) -> Method:
    """The method of a name: an entry of ``METHODS``, or ``vanilla:12`` for vanilla with 12 equal steps.

    Raises:
        UsageError: there is none.
    """
    base, _, steps = name.partition(":")
    if base == "vanilla" and steps.isdecimal() and int(steps) > 0:
        return vanilla_with(int(steps))
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}; choose among {', '.join(METHODS)}, vanilla:STEPS")
    return METHODS[name]
