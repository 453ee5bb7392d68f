r"""Minimum-time flows: section 4.2 and appendix E.4 of the paper, with the controls beside them.

Every method trains the same field from the same start on the same batches: the hypernetwork of the Neural ODEs
example, base N(0, 0.1 I), Adam. Each trained model is then judged on fresh samples, by the steps it was trained with
and once more by a solve in float64 at tolerance 1e-7: that of the ODE itself.
"""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.models import quiet_node
from torchdyn_mintime.experiments.training import History, check_gradients, clock, single_thread
from torchdyn_mintime.flows import FlowModel, Gaussian, HyperCNF
from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.regularizers import StepDoubling
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import spans

__all__ = [
    "FLOW_METHODS",
    "FLOW_TASKS",
    "FlowMethod",
    "FlowResult",
    "FlowRun",
    "FlowSettings",
    "FlowTask",
    "LikelihoodRun",
    "bare_nll",
    "circles",
    "find_flow_method",
    "moons",
    "untrained",
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
        seed: of the initialisation and the batches.
        weight: the price of time, eq. (13).
    """

    iterations: int = 200
    batch: int = 512
    lr: float = 0.05
    decay: float = 0.02
    test: int = 20_000
    seed: int = 0
    weight: float = field(kw_only=True)


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
    if base == "vanilla" and steps.isdecimal() and int(steps) > 0:
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


class LikelihoodRun:
    """One model in training on the negative log-likelihood of batches; subclasses say of which and how it is judged.

    Args:
        model: what is trained.
        optimizer, scheduler: stepped once an iteration.
        settings: with ``iterations`` and ``seed``.
        random: the state of torch's generator to draw from: what one draws must not depend on which others train beside it.

    Attributes:
        history: what happened so far; its loss is the batch's negative log-likelihood, and there are no accuracies.
        failure: why it stopped early, or an empty text.
    """

    device = torch.device("cpu")

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, settings: Any, random: Tensor):
        self.model, self.optimizer, self.scheduler, self.settings = model, optimizer, scheduler, settings
        self.history, self.failure = History(), ""
        self._random = random

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return bool(self.failure) or len(self.history.loss) >= self.settings.iterations

    def step(self) -> None:
        """One iteration. Only forward, backward and update are timed."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            self._iterate()
        except (IntegrationError, FloatingPointError) as error:  # one method that breaks must not end a table
            self.failure = str(error)
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outside)

    def _iterate(self) -> None:
        x, counter, history = self.batch(), self.node.vf, self.history
        nfe, start = counter.nfe, clock(self.device)
        self.optimizer.zero_grad()
        nll, loss = self.losses(x)
        if not torch.isfinite(loss):  # torchdyn's adjoint, too, does not return from a NaN
            raise FloatingPointError(f"the loss is not finite after {len(history.loss)} iterations")
        loss.backward()
        paused = clock(self.device)
        check_gradients(self.model, len(history.loss))
        start += clock(self.device) - paused
        self.optimizer.step()
        for span in spans(self.model):
            span.clip_()  # eq. (14)
        seconds = clock(self.device) - start
        self.scheduler.step()
        history.seconds.append(seconds + (history.seconds[-1] if history.seconds else 0.0))
        history.loss.append(nll.item())
        history.t_f.append(self.t_f)
        history.nfe.append(int(counter.nfe - nfe))

    @property
    def node(self) -> Any:
        """The NeuralODE or its span."""
        raise NotImplementedError

    @property
    def t_f(self) -> float:
        """Where the interval ends."""
        raise NotImplementedError

    def batch(self) -> Tensor:
        """The samples of the next iteration."""
        raise NotImplementedError

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood of a batch, and what is descended on."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that a stopped run needs to go on as if it had not been stopped."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": asdict(self.history),
            "random": self._random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a stopped run."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.history, self._random = History(**state["history"]), state["random"]


class FlowRun(LikelihoodRun):
    """One flow in training.

    Args:
        task, method, settings: what is trained, how, and on what.

    Attributes:
        model: the flow. Where nothing is learned of its interval it is for judging; training goes through torchdyn's
            own NeuralODE, which it shares.
    """

    model: FlowModel

    def __init__(self, task: FlowTask, method: FlowMethod, settings: FlowSettings):
        self.task, self.method = task, method
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the same start for every method
            model, random = untrained(method, settings), torch.get_rng_state()
        optimizer = model.configure_optimizers()

        def factor(iteration: int) -> float:
            part = iteration / settings.iterations
            return settings.decay + (1 - settings.decay) * (1 + math.cos(math.pi * part)) / 2

        super().__init__(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor), settings, random)
        self.batches = torch.Generator().manual_seed(settings.seed + 1)  # the same batches for every method
        self.doubling = StepDoubling(model, method.doubling * EVERY) if method.doubling else None

    @property
    def node(self) -> LearnableSpan:
        """Of the flow."""
        return self.model.span

    @property
    def t_f(self) -> float:
        """Where the interval ends."""
        return self.node.t_f.item()

    def batch(self) -> Tensor:
        """Fresh samples."""
        self.model.train()
        return self.task.draw(self.settings.batch, self.batches)

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood, and with it the price of time and the penalty where there are such."""
        loss = nll = self._nll(x)
        if self.method.learn:
            loss = loss + self.settings.weight * self.node.duration  # eq. (13)
        if self.doubling is not None and len(self.history.loss) % EVERY == 0:
            loss = loss + self.doubling.penalty()
        return nll, loss

    def _nll(self, x: Tensor) -> Tensor:
        return self.model.nll(x) if self.method.learn else bare_nll(self.node.node, self.model.base, x)

    @torch.no_grad()
    def judge(self) -> FlowResult:
        """The figures of the trained model. What cannot be solved has NaN figures, and failed."""
        settings, model, failure = self.settings, self.model.eval(), self.failure
        x = self.task.draw(settings.test, torch.Generator().manual_seed(10_000))
        nll = reference = sampling = math.nan
        steps = nfe = 0
        try:
            if not failure:
                nll = self._nll(x).item()
                model.log_prob(x[:512])
                steps, nfe = model.span.steps, model.span.nfe
                reference, sampling = reference_of(model).nll(x.double()).item(), self._sampling()
        except IntegrationError as error:
            failure = f"the trained model cannot be solved: {error}"
        return FlowResult(
            task=self.task.name,
            method=self.method.label,
            seed=settings.seed,
            lr=settings.lr,
            iterations=len(self.history.loss),
            t_f=self.t_f,
            steps=steps,
            nfe=nfe,
            nll=nll,
            reference=reference,
            training=self.history.seconds_at(len(self.history.seconds)),
            sampling=sampling,
            failure=failure,
        )

    def _sampling(self) -> float:
        seconds = []
        with torch.random.fork_rng(devices=[]), single_thread():
            for _ in range(4):
                start = clock(self.device)
                self.model.sample(self.settings.test)
                seconds.append(clock(self.device) - start)
        return statistics.median(seconds[1:])  # the first one warms up

    def state_dict(self) -> dict[str, Any]:
        """All that a stopped run needs to go on as if it had not been stopped."""
        return {**super().state_dict(), "batches": self.batches.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a stopped run."""
        super().load_state_dict(state)
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
