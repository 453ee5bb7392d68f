"""torchdyn's tutorial on continuous normalizing flows, wrapped: the ``run flow-tutorial`` command.

Its model: CNF with Hutchinson's trace on four layers of softplus, dopri5 at 1e-4 under the adjoint, a Gaussian spiral as
data. Likelihoods are those of the ODE, by the exact trace, on samples kept aside.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.datasets import ToyDataset
from torchdyn.models.cnf import CNF, autograd_trace, hutch_trace

from torchdyn_mintime.experiments.data import seeded
from torchdyn_mintime.experiments.flows import bare_nll
from torchdyn_mintime.experiments.models import quiet_node
from torchdyn_mintime.experiments.training import single_thread
from torchdyn_mintime.span import LearnableSpan

__all__ = ["TutorialResult", "run_tutorial"]

BATCH, TEST, LR, ITERATIONS = 512, 4000, 5e-3, 500
WAYS = {"vanilla": 0.0, "minimum-time": 1.0}
"""The price of time, chosen on seed 0."""


@dataclass
class TutorialResult:
    """What one model came to.

    Attributes:
        nfe: evaluations of one pass over the test samples at the tolerance of the training.
        nll: negative log-likelihood at that tolerance; ``reference`` at 1e-7 (nats, exact trace).
        cpu: seconds of training.
    """

    way: str
    seed: int
    t_f: float
    nfe: int
    nll: float
    reference: float
    cpu: float


def run_tutorial(
    seeds: Sequence[int], iterations: int | None, out: Path, say: Callable[[str], None]
) -> list[TutorialResult]:
    """Trains the tutorial's model bare and wrapped, and says what each is worth.

    Args:
        seeds: of initialisation, noise and batches.
        iterations: optimizer steps; default 500.
        out: a folder for ``flow-tutorial.json``.
        say: what to call with each line of the report.
    """
    results = []
    with single_thread():
        for seed in seeds:
            for way in WAYS:
                results.append(_train(way, seed, iterations or ITERATIONS))
                r = results[-1]
                say(
                    f"flow-tutorial seed {seed} {way}: t_f {r.t_f:.3f}, {r.nfe} evaluations, nll {r.nll:.4f} "
                    f"(at 1e-7: {r.reference:.4f}), training {r.cpu:.1f} s CPU"
                )
    for way in WAYS:
        own = [r for r in results if r.way == way]
        nfe, nll, reference = (statistics.fmean(getattr(r, k) for r in own) for k in ("nfe", "nll", "reference"))
        say(f"{way}: {nfe:.1f} evaluations, nll {nll:.4f}, at 1e-7 {reference:.4f}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "flow-tutorial.json").write_text(json.dumps([asdict(r) for r in results], indent=1), encoding="utf-8")
    return results


def _train(way: str, seed: int, iterations: int) -> TutorialResult:
    weight = WAYS[way]
    with torch.random.fork_rng(devices=[]):
        x = _spiral(seed)
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Linear(2, 64), nn.Softplus()]
        for _ in range(2):
            layers += [nn.Linear(64, 64), nn.Softplus()]
        base = MultivariateNormal(torch.zeros(2), torch.eye(2))
        cnf = CNF(nn.Sequential(*layers, nn.Linear(64, 2)), trace_estimator=hutch_trace, noise_dist=base)
        node = quiet_node(cnf, solver="dopri5", sensitivity="adjoint", atol=1e-4, rtol=1e-4)
        t_span = torch.tensor([0.0, 1.0])
        span = None if way == "vanilla" else LearnableSpan(node, t_span)  # the one line
        groups: list[dict[str, Any]] = [{"params": list(cnf.parameters())}]
        if span is not None:
            groups.append({"params": [span.t_f], "lr": LR, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=1e-5)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        start = time.process_time()
        for _ in track(range(iterations), f"flow-tutorial {seed}: {way}", transient=True):
            batch = x[torch.randint(len(x) - TEST, (BATCH,))]
            if span is None:
                loss = bare_nll(node, base, batch, t_span)
            else:
                loss = bare_nll(span, base, batch)
                loss = loss + weight * span.duration
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if span is not None:
                span.clip_()
        cpu = time.process_time() - start
    t_f = 1.0 if span is None else span.t_f.item()
    nll, nfe = _judge(cnf, t_f, x[-TEST:], 1e-4)
    return TutorialResult(way, seed, t_f, nfe, nll, _judge(cnf, t_f, x[-TEST:], 1e-7)[0], cpu)


def _spiral(seed: int) -> Tensor:
    """The tutorial's data, ``[16384, 2]``, scaled to unit size."""
    with seeded(seed):
        spread = {"std_gaussians_start": 0.05, "std_gaussians_end": 0.02}
        x, _ = ToyDataset().generate(1 << 14, "gaussians_spiral", n_gaussians=7, n_gaussians_per_loop=4, **spread)
        x = x[torch.randperm(len(x))].float()
    return (x - x.mean(0)) / x.std(0)


@torch.no_grad()
def _judge(cnf: CNF, t_f: float, x: Tensor, tolerance: float) -> tuple[float, int]:
    """Negative log-likelihood by the exact trace in float64, and the evaluations that it took."""
    exact = copy.deepcopy(cnf).double()
    exact.trace_estimator = autograd_trace
    node = quiet_node(exact, solver="dopri5", atol=tolerance, rtol=tolerance)
    span = LearnableSpan(node, torch.tensor([0.0, t_f], dtype=torch.float64))
    base = MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    return bare_nll(span, base, x.double()).item(), span.nfe
