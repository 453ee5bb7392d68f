"""torchdyn's tutorial on continuous normalizing flows, wrapped: the ``run flow-tutorial`` command.

Its model: CNF with Hutchinson's trace on four layers of softplus, dopri5 at 1e-4 under the adjoint, a Gaussian spiral as
data. Likelihoods are those of the ODE, by the exact trace, on samples kept aside.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE
from torchdyn.datasets import ToyDataset
from torchdyn.models.cnf import CNF, autograd_trace, hutch_trace

from torchdyn_mintime.experiments.data import seeded
from torchdyn_mintime.experiments.flows import LikelihoodRun, bare_nll
from torchdyn_mintime.experiments.lines import Kind, Line, failures, save, show
from torchdyn_mintime.experiments.models import quiet_node
from torchdyn_mintime.experiments.runner import side_by_side
from torchdyn_mintime.experiments.store import JudgedStore, Plan
from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.span import LearnableSpan

__all__ = ["TutorialResult", "TutorialRun", "TutorialSettings", "run_tutorial"]

BATCH, TEST, LR = 512, 4000, 5e-3
T_SPAN = torch.tensor([0.0, 1.0])


@dataclass(frozen=True)
class TutorialMethod:
    """Bare or wrapped.

    Attributes:
        label: as printed.
        weight: the price of time, eq. (13); None is torchdyn's bare NeuralODE.
    """

    label: str
    weight: float | None = None


METHODS = {"vanilla": TutorialMethod("vanilla"), "minimum-time": TutorialMethod("minimum-time", 1.0)}
"""The price of time was chosen on seed 0."""


@dataclass(frozen=True)
class TutorialSettings:
    """What both share.

    Attributes:
        iterations: optimizer steps.
        seed: of the initialisation, the noise and the batches.
    """

    iterations: int = 500
    seed: int = 0


@dataclass
class TutorialResult:
    """What one model came to.

    Attributes:
        nfe: evaluations of one pass over the test samples at the tolerance of the training.
        nll: negative log-likelihood at that tolerance; ``reference`` at 1e-7 (nats, exact trace).
        training: CPU seconds.
        failure: why training stopped early, or an empty text.
    """

    method: str
    seed: int
    iterations: int
    t_f: float
    nfe: int
    nll: float
    reference: float
    training: float
    failure: str = ""


class TutorialRun(LikelihoodRun):
    """One model in training: the NeuralODE, or its span."""

    def __init__(self, method: TutorialMethod, settings: TutorialSettings):
        self.method, self.x = method, _spiral(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model, random = _untrained(method), torch.get_rng_state()
        groups: list[dict[str, Any]] = [{"params": list(model.vf.parameters())}]
        if isinstance(model, LearnableSpan):
            groups.append({"params": [model.t_f], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=1e-5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
        super().__init__(model, optimizer, scheduler, settings, random)

    @property
    def node(self) -> Any:
        """The model itself."""
        return self.model

    @property
    def t_f(self) -> float:
        """Where the interval ends."""
        return self.model.t_f.item() if isinstance(self.model, LearnableSpan) else T_SPAN[-1].item()

    def batch(self) -> Tensor:
        """Samples of the training data."""
        return self.x[torch.randint(len(self.x) - TEST, (BATCH,))]

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The negative log-likelihood, and with it the price of time where t_f is learned."""
        if not isinstance(self.model, LearnableSpan):
            nll = bare_nll(self.node, _base(), x, T_SPAN)
            return nll, nll
        nll = bare_nll(self.model, _base(), x)
        return nll, nll + (self.method.weight or 0.0) * self.model.duration  # eq. (13)

    def judge(self) -> TutorialResult:
        """The figures of the trained model. What cannot be solved has NaN figures, and failed."""
        nll = reference = math.nan
        nfe, failure = 0, self.failure
        try:
            if not failure:
                (nll, nfe), (reference, _) = (self._judged(tolerance) for tolerance in (1e-4, 1e-7))
        except IntegrationError as error:
            failure = f"the trained model cannot be solved: {error}"
        return TutorialResult(
            method=self.method.label,
            seed=self.settings.seed,
            iterations=len(self.history.loss),
            t_f=self.t_f,
            nfe=nfe,
            nll=nll,
            reference=reference,
            training=self.history.seconds_at(len(self.history.seconds)),
            failure=failure,
        )

    @torch.no_grad()
    def _judged(self, tolerance: float) -> tuple[float, int]:
        """Negative log-likelihood by the exact trace in float64, and the evaluations that it took."""
        exact = copy.deepcopy(self.node.vf.vf.vf).double()
        exact.trace_estimator = autograd_trace
        node = quiet_node(exact, solver="dopri5", atol=tolerance, rtol=tolerance)
        span = LearnableSpan(node, torch.tensor([0.0, self.t_f], dtype=torch.float64))
        return bare_nll(span, _base(torch.float64), self.x[-TEST:].double()).item(), span.nfe


def _base(dtype: torch.dtype = torch.float32) -> MultivariateNormal:
    """The distribution at t_f, and that of Hutchinson's noise."""
    return MultivariateNormal(torch.zeros(2, dtype=dtype), torch.eye(2, dtype=dtype))


def _untrained(method: TutorialMethod) -> NeuralODE | LearnableSpan:
    """A new model; its initialisation follows torch's seed."""
    layers: list[nn.Module] = [nn.Linear(2, 64), nn.Softplus()]
    for _ in range(2):
        layers += [nn.Linear(64, 64), nn.Softplus()]
    cnf = CNF(nn.Sequential(*layers, nn.Linear(64, 2)), trace_estimator=hutch_trace, noise_dist=_base())
    node = quiet_node(cnf, solver="dopri5", sensitivity="adjoint", atol=1e-4, rtol=1e-4)
    return node if method.weight is None else LearnableSpan(node, T_SPAN)  # the one line


def _spiral(seed: int) -> Tensor:
    """The tutorial's data, ``[16384, 2]``, scaled to unit size."""
    with seeded(seed):
        spread = {"std_gaussians_start": 0.05, "std_gaussians_end": 0.02}
        x, _ = ToyDataset().generate(1 << 14, "gaussians_spiral", n_gaussians=7, n_gaussians_per_loop=4, **spread)
        x = x[torch.randperm(len(x))].float()
    return (x - x.mean(0)) / x.std(0)


class _TutorialStore(JudgedStore):
    result_type = TutorialResult


def run_tutorial(seeds: Sequence[int], iterations: int | None, folder: Path, console: Console) -> list[TutorialResult]:
    """Trains the tutorial's model bare and wrapped, side by side, and prints what each is worth.

    What an earlier call has finished is not trained again; what it was stopped at goes on.

    Args:
        seeds: of initialisation, noise and batches.
        iterations: optimizer steps; default 500.
        folder: for the table and the runs.
        console: where to print.
    """
    store = _TutorialStore(folder / "runs")
    found: dict[str, list[TutorialResult]] = {name: [] for name in METHODS}
    for seed in seeds:
        settings = TutorialSettings(iterations or TutorialSettings.iterations, seed)
        plans = [Plan("flow-tutorial", name, settings) for name in METHODS]
        for plan, result in zip(plans, side_by_side(plans, _begun, store, console), strict=True):
            found[plan.method].append(result)
    lines = [Line(own[0].method, "", own, found["vanilla"], failures(own)) for own in found.values()]
    title = "torchdyn's tutorial on continuous normalizing flows"
    text = show(title, title, lines, KIND, console)
    results = [r for own in found.values() for r in own]
    save(results, [text], folder, "run-flow-tutorial", console)
    return results


def _begun(plan: Plan) -> TutorialRun:
    return TutorialRun(METHODS[plan.method], plan.settings)


KIND = Kind(
    columns={
        "t_f": lambda line: line.figure(lambda r: r.t_f, "{:.3g}"),
        "evals": lambda line: line.figure(lambda r: r.nfe, "{:g}", ratio=True),
        "training s": lambda line: line.figure(lambda r: r.training, "{:.1f}", ratio=True),
        "nll": lambda line: line.figure(lambda r: r.nll, "{:.3f}"),
        "nll at 1e-7": lambda line: line.figure(lambda r: r.reference, "{:.3f}"),
    },
    gains={"evaluations": lambda r: r.nfe, "training": lambda r: r.training},
    honest=lambda line: f"nll at 1e-7 at most {max(r.reference for r in line.finished):.3f}",
    caption="Medians over seeds (and ranges); ratios to vanilla, by seed. nll: negative log-likelihood of samples kept aside, "
    "nats, at the tolerance of the training, 1e-4; at 1e-7: of the same model, its ODE solved at that tolerance.",
)
