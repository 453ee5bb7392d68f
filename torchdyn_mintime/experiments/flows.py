r"""Minimum-time flows: section 4.2 and appendix E.4 of the paper, with the controls beside them.

Every method trains the same field from the same start on the same batches: the hypernetwork of the Neural ODEs
example, base N(0, 0.1 I), Adam. Each trained model is then judged on fresh samples, by the steps it was trained with
and once more by a solve in float64 at tolerance 1e-7: that of the ODE itself.
"""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchdyn.core import NeuralODE

from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.training import single_thread
from torchdyn_mintime.flows import FlowModel, Gaussian, HyperCNF
from torchdyn_mintime.regularizers import StepDoubling
from torchdyn_mintime.span import LearnableSpan

__all__ = ["FLOW_METHODS", "FLOW_TASKS", "FlowMethod", "FlowSettings", "circles", "moons", "run_flow"]

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


FLOW_TASKS: dict[str, Callable[..., Tensor]] = {"flow-moons": moons, "flow-circles": circles}

FLOW_WEIGHT = {"flow-moons": 0.35, "flow-circles": 0.1}
"""The price of time. The paper's is .35, at which circles give up .04 nats; .1 was chosen on seeds 0 to 2."""

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
    """

    iterations: int = 200
    batch: int = 512
    lr: float = 0.05
    decay: float = 0.02
    test: int = 20_000


@dataclass(frozen=True)
class FlowMethod:
    """One way to train.

    Attributes:
        label: as printed.
        steps: number of equal steps on [0, 1] that the interval is laid with; 0 is an adaptive solver's choice.
        learn: whether t_f is learned. Else torchdyn's bare NeuralODE is trained.
        t_f: where it starts.
        weight: the price of time, eq. (13); None is the task's ``FLOW_WEIGHT``.
        span_lr: Adam's learning rate of t_f; None is the field's, one group as in the paper.
        doubling: weight of the step-doubling penalty, taken at every fifth iteration.
    """

    label: str
    steps: int = 100
    learn: bool = False
    t_f: float = 1.0
    weight: float | None = None
    span_lr: float | None = None
    doubling: float = 0.0


FLOW_METHODS: dict[str, FlowMethod] = {
    "vanilla": FlowMethod("vanilla"),
    "minimum-time": FlowMethod("minimum-time", steps=12, learn=True, span_lr=0.01),
    "minimum-time-doubling": FlowMethod(
        "minimum-time, step doubling", steps=12, learn=True, span_lr=0.01, doubling=1.0
    ),
    "minimum-time-paper": FlowMethod("minimum-time, as in the paper", learn=True, weight=0.35),
    "adaptive": FlowMethod("vanilla, tsit5 at 1e-3", steps=0),
}


def vanilla_with(steps: int) -> FlowMethod:
    """The control: vanilla on [0, 1] with as many steps."""
    return FlowMethod(f"vanilla, {steps} steps", steps=steps)


@dataclass
class FlowResult:
    """What one run gave.

    Attributes:
        t_f, steps, nfe: of the trained model; evaluations of one pass.
        nll: on fresh samples, by the steps of the training (nats).
        reference: the same, solved in float64 at tolerance 1e-7.
        cpu, wall: seconds of forward, backward and update over the whole training.
        sampling: CPU seconds for ``test`` samples.
        history: [nll of the batch, t_f] at every iteration.
    """

    task: str
    method: str
    seed: int
    iterations: int
    t_f: float = math.nan
    steps: int = 0
    nfe: int = 0
    nll: float = math.nan
    reference: float = math.nan
    cpu: float = 0.0
    wall: float = 0.0
    sampling: float = math.nan
    history: list[list[float]] = field(default_factory=list)


def bare_nll(
    node: Callable[..., tuple[Tensor, Tensor]], base: Gaussian | Distribution, x: Tensor, *t_span: Tensor
) -> Tensor:
    """Mean negative log-likelihood by a NeuralODE of a CNF as torchdyn's users write it, the log-density before the state."""
    end = node(torch.cat([x.new_zeros(len(x), 1), x], 1), *t_span)[1][-1]
    return -(base.log_prob(end[:, 1:]) - end[:, 0]).mean()


class FlowRun:
    """One model in training.

    Attributes:
        model: the flow. Where nothing is learned of its interval it is for judging; training goes through torchdyn's
            own NeuralODE, which it shares.
        result: what was measured.
    """

    def __init__(self, task: str, name: str, method: FlowMethod, settings: FlowSettings, seed: int):
        self.draw, self.method, self.settings = FLOW_TASKS[task], method, settings
        self.weight = FLOW_WEIGHT[task] if method.weight is None else method.weight
        torch.manual_seed(seed)  # the same start for every method
        self.batches = torch.Generator().manual_seed(seed + 1)  # and the same batches
        self.node = NeuralODE(HyperCNF(), solver="rk4" if method.steps else "tsit5")
        self.node.t_span = torch.linspace(0, 1, (method.steps or 1) + 1)
        self.base = Gaussian(2, variance=0.1)
        self.model = FlowModel(
            LearnableSpan(self.node, t_f=method.t_f), self.base, lr=settings.lr, span_lr=method.span_lr
        )
        if not method.learn:
            self.model.span.t_f.requires_grad_(False)
        self.optimizer = self.model.configure_optimizers()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.doubling = StepDoubling(self.model, method.doubling, every=5) if method.doubling else None
        self.result = FlowResult(task, name, seed, settings.iterations)

    def _factor(self, iteration: int) -> float:
        part = iteration / self.settings.iterations
        return self.settings.decay + (1 - self.settings.decay) * (1 + math.cos(math.pi * part)) / 2

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return len(self.result.history) >= self.settings.iterations

    def _nll(self, x: Tensor) -> Tensor:
        if self.method.learn:
            return self.model.nll(x)
        return bare_nll(self.node, self.base, x)

    def step(self) -> None:
        """One iteration. Only forward, backward and update are timed."""
        x = self.draw(self.settings.batch, self.batches)
        cpu, wall = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        nll = self._nll(x)
        loss = nll
        if self.method.learn:
            loss = loss + self.weight * self.model.span.duration  # eq. (13)
        if self.doubling is not None:
            loss = loss + self.doubling.penalty()
        loss.backward()
        self.optimizer.step()
        if self.method.learn:
            self.model.span.clip_()
        self.result.cpu += time.process_time() - cpu
        self.result.wall += time.perf_counter() - wall
        self.scheduler.step()
        self.result.history.append([nll.item(), self.model.span.t_f.item()])

    @torch.no_grad()
    def judge(self) -> FlowResult:
        """The figures of the trained model."""
        x = self.draw(self.settings.test, torch.Generator().manual_seed(10_000))
        result, model = self.result, self.model.eval()
        result.nll = self._nll(x).item()
        model.log_prob(x[:512])
        result.t_f, result.steps, result.nfe = model.span.t_f.item(), model.span.steps, model.span.nfe
        cpu = time.process_time()
        model.sample(self.settings.test)
        result.sampling = time.process_time() - cpu
        result.reference = reference_of(model).nll(x.double()).item()
        return result


def reference_of(model: FlowModel, tolerance: float = 1e-7) -> FlowModel:
    """The same ODE on the same interval, in float64 by dopri5 at ``tolerance``."""
    span = model.span
    node = NeuralODE(copy.deepcopy(_field(span.node)).double(), solver="dopri5", atol=tolerance, rtol=tolerance)
    ends = torch.tensor([span.t0.item(), span.t_f.item()], dtype=torch.float64)
    return FlowModel(LearnableSpan(node, ends), copy.deepcopy(model.base).double()).eval()


def _field(node: NeuralODE) -> nn.Module:
    """The module that was given to the node, without torchdyn's wrappers."""
    return node.vf.vf.vf


# --------------------------------------------------------------------------------------------------------------- runs


def run_flow(
    task: str = "flow-moons",
    method: str = "compare",
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: FlowSettings | None = None,
    out: "Path | str | None" = None,
    pictures: bool = True,
    say: Callable[[str], None] = print,
) -> list[FlowResult]:
    """Trains flows and says what they are worth.

    Args:
        task: "flow-moons" or "flow-circles".
        method: one of ``FLOW_METHODS``; "compare" trains vanilla, minimum-time and the adaptive control side by side
            (one iteration of each in turn, so that a busy machine slows all alike), then vanilla with as many steps as
            minimum-time ended with.
        seeds: of initialisation and batches.
        settings: of all methods.
        out: a folder for ``<task>.json`` (written after every seed), the models ``<task>-<method>-<seed>.pt``, a
            picture and a GIF; None writes nothing.
        pictures: whether to draw the first seed's models.
        say: what to call with each line of the report.

    Returns:
        One result per method and seed.

    Raises:
        UsageError: an unknown task or method.
    """
    if task not in FLOW_TASKS:
        raise UsageError(f"unknown task {task!r}; the flows are {', '.join(FLOW_TASKS)}")
    if method != "compare" and method not in FLOW_METHODS:
        raise UsageError(f"unknown method {method!r}; the methods are compare, {', '.join(FLOW_METHODS)}")
    settings = settings or FlowSettings()
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    results: list[FlowResult] = []
    shown: dict[str, FlowModel] = {}
    with single_thread():
        for seed in seeds:
            names = ["vanilla", "minimum-time", "adaptive"] if method == "compare" else [method]
            runs = _race([FlowRun(task, name, FLOW_METHODS[name], settings, seed) for name in names])
            if method == "compare":
                control = vanilla_with(runs[1].result.steps)
                runs += _race([FlowRun(task, "vanilla, as many steps", control, settings, seed)])
            for run in runs:
                say(_line(run.result))
                results.append(run.result)
                if folder is not None:
                    torch.save(run.model.state_dict(), folder / f"{task}-{_slug(run.result.method)}-{seed}.pt")
            if folder is not None:
                (folder / f"{task}.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
            shown = shown or {run.method.label: run.model for run in runs[:2]}
    for line in summary(results):
        say(line)
    if folder is not None and pictures:
        from torchdyn_mintime.experiments.flow_pictures import draw_flows

        for path in draw_flows(shown, FLOW_TASKS[task], folder / task):
            say(f"wrote {path}")
    return results


def _race(runs: list[FlowRun]) -> list[FlowRun]:
    while not all(run.done for run in runs):
        for run in runs:
            run.step()
    for run in runs:
        run.judge()
    return runs


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _line(r: FlowResult) -> str:
    return (
        f"{r.task} seed {r.seed} {r.method}: t_f {r.t_f:.3f}, {r.steps} steps, {r.nfe} evaluations, "
        f"nll {r.nll:.4f} (at 1e-7: {r.reference:.4f}), training {r.cpu:.1f} s CPU, {r.wall:.1f} s wall"
    )


def summary(results: Sequence[FlowResult]) -> list[str]:
    """Means over the seeds, one line a method, with the gain over vanilla of the same run where there is one."""
    by_method: dict[str, list[FlowResult]] = {}
    for r in results:
        by_method.setdefault(r.method, []).append(r)
    vanilla = by_method.get("vanilla")
    lines = []
    for name, group in by_method.items():
        steps, cpu, nll, reference = (
            statistics.fmean(getattr(r, key) for r in group) for key in ("steps", "cpu", "nll", "reference")
        )
        line = f"{name}: {steps:.1f} steps, training {cpu:.1f} s CPU, nll {nll:.4f}, at 1e-7 {reference:.4f}"
        if vanilla and group is not vanilla:
            fewer = statistics.fmean(r.steps for r in vanilla) / steps
            faster = statistics.fmean(r.cpu for r in vanilla) / cpu
            line += f"; {fewer:.1f} times fewer steps, {faster:.1f} times faster"
        lines.append(line)
    return lines
