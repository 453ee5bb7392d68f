r"""Minimum-time flows: section 4.2 and appendix E.4 of the paper, with the controls beside them.

Every method trains the same field from the same start on the same batches: the hypernetwork of the Neural ODEs
example, base N(0, 0.1 I), Adam. Each trained model is then judged on fresh samples, by the steps it was trained with
and once more by a solve in float64 at tolerance 1e-7: that of the ODE itself.
"""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.models import quiet_node
from torchdyn_mintime.experiments.training import History, clock
from torchdyn_mintime.flows import FlowModel, Gaussian, HyperCNF
from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.regularizers import StepDoubling
from torchdyn_mintime.span import LearnableSpan

__all__ = [
    "FLOW_METHODS",
    "FLOW_TASKS",
    "FlowMethod",
    "FlowResult",
    "FlowRun",
    "FlowSettings",
    "FlowTask",
    "bare_nll",
    "circles",
    "find_flow_method",
    "moons",
]

# --------------------------------------------------------------------------------------------------------------- data


def moons(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Fresh samples of two moons with noise 0.06, ``[n, 2]``.

    Example:
        >>> moons(5).shape
        torch.Size([5, 2])
    """
    angle = math.pi * torch.rand(n, generator=generator)
    side = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, -1.0)
    # The lower moon is the upper one turned by half a turn about (1/2, 1/4).
    x = torch.stack([0.5 + side * (torch.cos(angle) - 0.5), 0.25 + side * (torch.sin(angle) - 0.25)], 1)
    return x + 0.06 * torch.randn(n, 2, generator=generator)


def circles(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Fresh samples of two circles of radius 1 and 0.5 with noise 0.06, ``[n, 2]``: the Neural ODEs example's.

    Example:
        >>> circles(5).shape
        torch.Size([5, 2])
    """
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    radius = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, 0.5)
    x = radius[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    return x + 0.06 * torch.randn(n, 2, generator=generator)


@dataclass(frozen=True)
class FlowTask:
    """Data to learn the density of.

    Attributes:
        name: as typed.
        title: as printed.
        draw: (n, generator) -> fresh samples ``[n, 2]``.
        weight: the price of time, eq. (13).
    """

    name: str
    title: str
    draw: Callable[..., Tensor]
    weight: float


FLOW_TASKS = {
    task.name: task
    for task in (
        FlowTask("flow-moons", "a flow on two moons", moons, 0.35),
        # The paper's price is .35, at which circles give up .04 nats; .1 was chosen on seeds 0 to 2.
        FlowTask("flow-circles", "a flow on two circles", circles, 0.1),
    )
}

# ------------------------------------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class FlowSettings:
    """What all methods share.

    Attributes:
        iterations: optimizer steps. The paper takes 1,000.
        batch: fresh samples a step.
        lr: Adam's learning rate.
        decay: the learning rate at the end over that at the start, along a cosine. The paper says that its rate starts
            at 0.05, not how it goes on.
        test: fresh samples that the trained model is judged on.
        weight: the price of time, eq. (13).
        seed: of the initialisation and the batches.
    """

    iterations: int = 200
    batch: int = 512
    lr: float = 0.05
    decay: float = 0.02
    test: int = 20_000
    weight: float = 0.35
    seed: int = 0


EVERY = 5
"""Iterations from one step-doubling penalty to the next."""


@dataclass(frozen=True)
class FlowMethod:
    """One way to train.

    Attributes:
        label: as printed.
        steps: number of equal steps on [0, 1] that the interval is laid with; 0 is an adaptive solver's choice.
        learn: whether t_f is learned. Else torchdyn's bare NeuralODE is trained.
        t_f: where it starts.
        span_lr: Adam's learning rate of t_f; None is the field's, one group as in the paper.
        doubling: weight of the step-doubling penalty, which is taken at every fifth iteration, five times as heavy.
    """

    label: str
    steps: int = 100
    learn: bool = False
    t_f: float = 1.0
    span_lr: float | None = None
    doubling: float = 0.0


FLOW_METHODS: dict[str, FlowMethod] = {
    "vanilla": FlowMethod("vanilla"),
    "minimum-time": FlowMethod("minimum-time", steps=12, learn=True, span_lr=0.01),
    "minimum-time-doubling": FlowMethod(
        "minimum-time, step doubling", steps=12, learn=True, span_lr=0.01, doubling=1.0
    ),
    "minimum-time-paper": FlowMethod("minimum-time, as in the paper", learn=True),
    "default-adaptive": FlowMethod("vanilla, default tsit5", steps=0),
}


def find_flow_method(name: str) -> FlowMethod:
    """The method of a name: an entry of ``FLOW_METHODS``, or ``vanilla:12`` for vanilla on [0, 1] with 12 equal steps.

    Raises:
        UsageError: there is none.
    """
    base, _, steps = name.partition(":")
    if base == "vanilla" and steps.isdigit() and int(steps) > 0:
        return FlowMethod(f"vanilla, {int(steps)} steps", steps=int(steps))
    if name not in FLOW_METHODS:
        raise UsageError(f"flows have no method {name!r}; choose among {', '.join(FLOW_METHODS)}, vanilla:STEPS")
    return FLOW_METHODS[name]


@dataclass
class FlowResult:
    """The figures of one trained flow.

    Attributes:
        t_f, steps, nfe: of the trained model; evaluations of one pass.
        nll: on fresh samples, by the steps of the training (nats).
        reference: the same, solved in float64 at tolerance 1e-7.
        training: CPU seconds of forward, backward and update over the whole training.
        sampling: CPU seconds for ``test`` samples, the median of three calls.
        failure: why training stopped early, or an empty text.
    """

    task: str
    method: str
    seed: int
    lr: float
    iterations: int
    t_f: float
    steps: int
    nfe: int
    nll: float
    reference: float
    training: float
    sampling: float
    failure: str = ""


def bare_nll(
    node: Callable[..., tuple[Tensor, Tensor]], base: Gaussian | Distribution, x: Tensor, *t_span: Tensor
) -> Tensor:
    """Mean negative log-likelihood by a NeuralODE of a CNF as torchdyn's users write it, the log-density before the state."""
    end = node(torch.cat([x.new_zeros(len(x), 1), x], 1), *t_span)[1][-1]
    return -(base.log_prob(end[:, 1:]) - end[:, 0]).mean()


class FlowRun:
    """One flow in training.

    Args:
        task, method, settings: what is trained, how, and on what.

    Attributes:
        model: the flow. Where nothing is learned of its interval it is for judging; training goes through torchdyn's
            own NeuralODE, which it shares.
        history: what happened so far; its loss is the batch's negative log-likelihood, and there are no accuracies.
        failure: why it stopped early, or an empty text.
    """

    device = torch.device("cpu")

    def __init__(self, task: FlowTask, method: FlowMethod, settings: FlowSettings):
        self.task, self.method, self.settings = task, method, settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the same start for every method
            self.model = untrained(method, settings)
        self.batches = torch.Generator().manual_seed(settings.seed + 1)  # and the same batches
        self.optimizer = self.model.configure_optimizers()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.doubling = StepDoubling(self.model, method.doubling * EVERY) if method.doubling else None
        self.history = History()
        self.failure = ""

    def _factor(self, iteration: int) -> float:
        part = iteration / self.settings.iterations
        return self.settings.decay + (1 - self.settings.decay) * (1 + math.cos(math.pi * part)) / 2

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return bool(self.failure) or len(self.history.loss) >= self.settings.iterations

    def _nll(self, x: Tensor) -> Tensor:
        if self.method.learn:
            return self.model.nll(x)
        return bare_nll(self.model.span.node, self.model.base, x)

    def step(self) -> None:
        """One iteration. Only forward, backward and update are timed."""
        x, span = self.task.draw(self.settings.batch, self.batches), self.model.span
        counter: Any = span.node.vf
        nfe, start = counter.nfe, clock(self.device)
        self.model.train()
        self.optimizer.zero_grad()
        try:
            nll = self._nll(x)
            loss = nll
            if self.method.learn:
                loss = loss + self.settings.weight * span.duration  # eq. (13)
            if self.doubling is not None and len(self.history.loss) % EVERY == 0:
                loss = loss + self.doubling.penalty()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is not finite after {len(self.history.loss)} iterations")
            loss.backward()
            self.optimizer.step()
            if self.method.learn:
                span.clip_()  # eq. (14)
        except (IntegrationError, FloatingPointError) as error:  # one method that breaks must not end a table
            self.failure = str(error)
            return
        seconds = clock(self.device) - start
        self.scheduler.step()
        history = self.history
        history.seconds.append(seconds + (history.seconds[-1] if history.seconds else 0.0))
        history.loss.append(nll.item())
        history.t_f.append(span.t_f.item())
        history.nfe.append(int(counter.nfe - nfe))

    @torch.no_grad()
    def judge(self) -> FlowResult:
        """The figures of the trained model."""
        settings, model = self.settings, self.model.eval()
        x = self.task.draw(settings.test, torch.Generator().manual_seed(10_000))
        nll = self._nll(x).item()
        model.log_prob(x[:512])
        return FlowResult(
            task=self.task.name,
            method=self.method.label,
            seed=settings.seed,
            lr=settings.lr,
            iterations=len(self.history.loss),
            t_f=model.span.t_f.item(),
            steps=model.span.steps,
            nfe=model.span.nfe,
            nll=nll,
            reference=reference_of(model).nll(x.double()).item(),
            training=self.history.seconds_at(len(self.history.seconds)),
            sampling=self._sampling(),
            failure=self.failure,
        )

    def _sampling(self) -> float:
        seconds = []
        with torch.random.fork_rng(devices=[]):
            for _ in range(3):
                start = clock(self.device)
                self.model.sample(self.settings.test)
                seconds.append(clock(self.device) - start)
        return statistics.median(seconds)

    def state_dict(self) -> dict[str, Any]:
        """All that a stopped run needs to go on as if it had not been stopped."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": asdict(self.history),
            "batches": self.batches.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a stopped run."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history = History(**state["history"])
        self.batches.set_state(state["batches"])


def untrained(method: FlowMethod, settings: FlowSettings) -> FlowModel:
    """A new flow; its initialisation follows torch's seed."""
    node = quiet_node(HyperCNF(), solver="rk4" if method.steps else "tsit5")
    node.t_span = torch.linspace(0, 1, (method.steps or 1) + 1)
    span = LearnableSpan(node, t_f=method.t_f)
    model = FlowModel(span, Gaussian(2, variance=0.1), lr=settings.lr, span_lr=method.span_lr)
    span.t_f.requires_grad_(method.learn)
    return model


def reference_of(model: FlowModel, tolerance: float = 1e-7) -> FlowModel:
    """The same ODE on the same interval, in float64 by dopri5 at ``tolerance``."""
    span = model.span
    field = copy.deepcopy(
        span.node.vf.vf.vf
    ).double()  # the module that was given to the node, without torchdyn's wrappers
    node = quiet_node(field, solver="dopri5", atol=tolerance, rtol=tolerance)
    ends = torch.tensor([span.t0.item(), span.t_f.item()], dtype=torch.float64)
    return FlowModel(LearnableSpan(node, ends), copy.deepcopy(model.base).double()).eval()
