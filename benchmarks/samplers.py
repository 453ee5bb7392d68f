"""Measures samplers of few evaluations of flow matching: ``python -m benchmarks.samplers planes,digits,densities 5 10``.

The arguments are the tables, the number of seeds and the first seed. Each field carries one distribution of the plane to
another, along straight lines between independent draws. The tables have the error of the end over the displacement, on new
states, and its share of the error of midpoint with as many evaluations. The control is midpoint on the best of a family of
time grids.
``distances`` has the distance W2 of samples to the data, by fitted solvers and with trained weights (``compress_sampler``).
Seconds are those of one core.
"""

import copy
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF

import torchdyn_mintime as tm
from torchdyn_mintime.experiments import datasets
from torchdyn_mintime.experiments.models import tutorial_flow_parts
from torchdyn_mintime.experiments.samplers import Velocity, distance, eight_gaussians, exact_ends, matched, moons
from torchdyn_mintime.flows import Gaussian, HyperCNF
from torchdyn_mintime.numerics.step_control import rms

EVALUATIONS = (4, 6, 8, 10)
"""Numbers of evaluations of the fitted solvers."""
FLOW_ITERATIONS = 200
"""Iterations of the training of a flow."""


def rings(n: int) -> Tensor:
    """Returns draws from two circles of radius 1.5 and 4, ``[n, 2]``."""
    angle, radius = 2 * math.pi * torch.rand(n), torch.where(torch.rand(n) < 0.5, 1.5, 4.0)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * torch.randn(n, 2)


def checkerboard(n: int) -> Tensor:
    """Returns draws from every second cell of a board of 4 by 4, ``[n, 2]``."""
    column = torch.randint(4, (n,))
    row = 2 * torch.randint(2, (n,)) + column % 2
    return 2 * (torch.stack([column, row], 1) - 2 + torch.rand(n, 2))


def pinwheel(n: int) -> Tensor:
    """Returns draws from five bent arms, ``[n, 2]``."""
    arm, radius = torch.randint(5, (n,)), 1.2 + 0.5 * torch.randn(n)
    angle = arm * (2 * math.pi / 5) + 0.25 * torch.randn(n) / radius.abs().clamp_min(0.3) + 0.5 * radius
    return 2 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def normal(n: int) -> Tensor:
    """Returns draws from the standard normal distribution, ``[n, 2]``."""
    return torch.randn(n, 2)


TASKS: dict[str, tuple[Callable[[int], Tensor], Callable[[int], Tensor]]] = {
    "8 gaussians to moons": (eight_gaussians, moons),
    "8 gaussians to rings": (eight_gaussians, rings),
    "normal to checkerboard": (normal, checkerboard),
    "normal to pinwheel": (normal, pinwheel),
    "normal to 8 gaussians": (normal, eight_gaussians),
}


def trained(name: str, seed: int) -> nn.Module:
    """Returns the field of a task, which is trained once and kept in ``results/samplers``. Seeds torch in either case."""
    path = Path("results/samplers") / f"{name.replace(' ', '-')}-{seed}.pt"
    torch.manual_seed(seed)
    field = Velocity()
    if path.exists():
        field.load_state_dict(torch.load(path))
    else:
        begun = time.process_time()
        matched(*TASKS[name], field)
        print(f"{name}, seed {seed}: trained in {time.process_time() - begun:.0f} s", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(field.state_dict(), path)
    torch.manual_seed(1000 + seed)
    return field.eval()


def end_of(solver: str | nn.Module, field: nn.Module, x0: Tensor, times: Tensor) -> Tensor:
    """Returns the end of a solve whose steps lie between the given times."""
    with torch.no_grad():
        return tm.LearnableSpan(NeuralODE(field, solver=solver), times)(x0)[1][-1]


def relative(end: Tensor, exact: Tensor, x0: Tensor) -> float:
    """Returns the error of ends, over the displacement."""
    return float(rms(end - exact) / rms(exact - x0))


def fresh_error(solver: str | nn.Module, field: nn.Module, x0: Tensor, exact: Tensor, steps: int = 1) -> float:
    """Returns the error of equal steps, over the displacement."""
    return relative(end_of(solver, field, x0, torch.linspace(0, 1, steps + 1)), exact, x0)


def best_grid(field: nn.Module, x0: Tensor, exact: Tensor, steps: int) -> Tensor:
    """Returns the times 1 - (1 - s^a)^b at which midpoint has the least error on the states, of 169 pairs (a, b).

    s are the points of equal steps on [0, 1].
    """
    equal, powers = torch.linspace(0, 1, steps + 1), torch.logspace(-1, 1, 13, base=3)
    grids = [1 - (1 - equal**a) ** b for a in powers for b in powers]
    return min(grids, key=lambda times: relative(end_of("midpoint", field, x0, times), exact, x0))


def planes(seeds: range) -> None:
    """Prints the errors of fitted solvers, midpoint and the control, for fields of the plane."""
    shares: dict[str, dict[int, list[float]]] = {which: {n: [] for n in EVALUATIONS} for which in ("fitted", "grid")}
    for name, (start, _) in TASKS.items():
        for seed in seeds:
            field = trained(name, seed)
            states, fresh = start(1280), start(4096)
            known, exact = exact_ends(field, states), exact_ends(field, fresh)
            for n in EVALUATIONS:
                begun = time.process_time()
                fit = tm.fit_solver(NeuralODE(field), states, evaluations=n, progress=False)
                seconds = time.process_time() - begun
                error = fresh_error(fit.node.solver, field, fresh, exact)
                midpoint = fresh_error("midpoint", field, fresh, exact, n // 2)
                times = best_grid(field, states, known, n // 2)
                control = relative(end_of("midpoint", field, fresh, times), exact, fresh)
                shares["fitted"][n].append(error / midpoint)
                shares["grid"][n].append(control / midpoint)
                print(
                    f"{name}, seed {seed}, {n:2d} evaluations: error {error:.4f} (held out {fit.error.rms:.4f}), midpoint "
                    f"{midpoint:.4f}, share {error / midpoint:.2f}, best grid's {control / midpoint:.2f}, fit {seconds:.0f} s",
                    flush=True,
                )
    for which, found in shares.items():
        for n, values in found.items():
            print(
                f"{which}, {n:2d} evaluations: median share of midpoint's error {statistics.median(values):.2f}, "
                f"{min(values):.2f} to {max(values):.2f}"
            )


def digits(seeds: range) -> None:
    """Prints the errors of fitted solvers and midpoint, for a field from a normal distribution to digits of 8 by 8 pixels."""
    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    for seed in seeds:
        torch.manual_seed(seed)
        begin = lambda n: torch.randn(n, 1, 8, 8)  # noqa: E731
        field = matched(begin, lambda n: images[torch.randint(len(images), (n,))], Velocity(64, 256))
        states, fresh = begin(512), begin(1024)
        exact = exact_ends(field, fresh)
        for n in (4, 8):
            begun = time.process_time()
            fit = tm.fit_solver(NeuralODE(field), states, evaluations=n, progress=False)
            error, midpoint = (
                fresh_error(fit.node.solver, field, fresh, exact),
                fresh_error("midpoint", field, fresh, exact, n // 2),
            )
            print(
                f"digits, seed {seed}, {n} evaluations: error {error:.4f}, midpoint {midpoint:.4f}, share "
                f"{error / midpoint:.2f}, fit {time.process_time() - begun:.0f} s",
                flush=True,
            )


def nll_of(field: nn.Module, solver: str | nn.Module, base: Any, x: Tensor, steps: int = 1, tol: float = 1e-6) -> float:
    """Returns the negative log-likelihood of data (nats) by a flow's field."""
    node = NeuralODE(field, solver=solver, atol=tol, rtol=tol)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, steps + 1))
    return tm.FlowModel(span, base).nll(x).item()


def train(
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Callable[[], Tensor],
    iterations: int,
    clip: float = math.inf,
) -> None:
    """Minimises a loss of fresh batches, with a learning rate that falls to 0 as a cosine, and the gradient's norm clipped."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss(batch()).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        optimizer.step()
        schedule.step()


def trained_flow(data: Callable[..., Tensor], generator: torch.Generator) -> tm.FlowModel:
    """Returns the paper's flow, trained as in ``table flows`` but with 8 steps."""
    span = tm.LearnableSpan(NeuralODE(HyperCNF(), solver="rk4"), torch.linspace(0, 1, 9))
    span.t_f.requires_grad_(False)
    model = tm.FlowModel(span, Gaussian(2, variance=0.1))
    optimizer = torch.optim.Adam(span.vf.parameters(), lr=0.05)
    train(model.nll, optimizer, partial(data, 512, generator), FLOW_ITERATIONS)
    return model


@torch.no_grad()
def densities(seeds: range) -> None:
    """Prints the negative log-likelihood of the paper's flows by fitted solvers, with the fields as they are.

    Also prints the error of the log-density of samples, solved from the base: the exact one is that of the same points.
    """
    for name, data in (("moons", datasets.density_moons), ("circles", datasets.density_circles)):
        for seed in seeds:
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            fresh = data(4096, generator)
            begun = time.process_time()
            with torch.enable_grad():
                model = trained_flow(data, generator)
            seconds = time.process_time() - begun
            field, base = model.span.vf.vf.vf, model.base
            exact_model = tm.FlowModel(tm.LearnableSpan(NeuralODE(field, solver="dopri5", atol=1e-7, rtol=1e-7)), base)
            print(
                f"density of {name}, seed {seed}: 32 evaluations nll {model.nll(fresh):.3f}, exact "
                f"{exact_model.nll(fresh):.3f}, field {seconds:.0f} s",
                flush=True,
            )
            for n in (4, 6, 8):
                begun = time.process_time()
                fit = model.fit_solvers(data(1024, generator), evaluations=n, progress=False)
                seconds = time.process_time() - begun
                z = base.sample((2048,))
                one_way = tm.FlowModel(tm.LearnableSpan(fit.density.node), base)
                off = {}
                with warnings.catch_warnings(action="ignore", category=UserWarning):  # run against its direction
                    for which, sampler in {"fitted": fit.model, "fitted to densities alone": one_way}.items():
                        points, change = sampler.decode(z)
                        off[which] = exact_model.log_prob(points) - base.log_prob(z) + change
                nats = ", ".join(f"{which} {v.square().mean().sqrt():.3f}" for which, v in off.items())
                print(
                    f"  frozen, {n} evaluations: nll {fit.model.nll(fresh):.3f}, midpoint "
                    f"{nll_of(field, 'midpoint', base, fresh, n // 2):.3f}; log-density of samples, rms error: {nats} nats; "
                    f"both fits {seconds:.0f} s",
                    flush=True,
                )


@torch.no_grad()
def likelihoods(few: tm.FlowModel, model: tm.FlowModel, x: Tensor) -> str:
    """Returns the nll of data by few evaluations, by the 32 that a flow was trained with, and by the exact solution."""
    exact = nll_of(model.span.vf.vf.vf, "dopri5", model.base, x, tol=1e-7)
    return f"{few.nll(x):.3f}, with 32 {model.nll(x):.3f}, exact {exact:.3f}"


def cotrained(seeds: range, evaluations: int = 6, iterations: int = 800, weight: float = 10.0) -> None:
    """Prints the likelihood of the paper's flows that are trained on together with a fitted solver of few evaluations.

    The loss is the nll by the steps that the flow was trained with, and ``weight`` times the mean squared difference of the two
    log-densities. A solver error in the states says little here: the base's gradient multiplies it. The control, ``alone``,
    is the same training of the field without that difference.
    """
    for name, data in (("moons", datasets.density_moons), ("circles", datasets.density_circles)):
        for seed in seeds:
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            fresh = data(4096, generator)
            model = trained_flow(data, generator)
            begun = time.process_time()
            few = model.fit_solvers(data(1024, generator), evaluations=evaluations, progress=False).model
            few.span.solver.requires_grad_(True)  # the field is the same as that of `model`
            print(
                f"density of {name}, seed {seed}: {evaluations} evaluations, fitted {likelihoods(few, model, fresh)}",
                flush=True,
            )
            optimizer = torch.optim.Adam([p for p in few.parameters() if p.requires_grad], lr=0.005)

            def loss(x: Tensor, few: tm.FlowModel = few, model: tm.FlowModel = model) -> Tensor:
                log_prob = model.log_prob(x)
                return weight * (few.log_prob(x) - log_prob).square().mean() - log_prob.mean()

            train(loss, optimizer, partial(data, 512, generator), iterations, clip=1.0)
            seconds = time.process_time() - begun
            print(f"  trained on {likelihoods(few, model, fresh)}; {seconds:.0f} s", flush=True)


def tutorial(seeds: range) -> None:
    """Prints the negative log-likelihood of the tutorial's flow, by dopri5 and by fitted solvers, with the exact trace."""
    for seed in seeds:
        torch.manual_seed(seed)
        data, parts, base = datasets.spiral(seed, 4000), tutorial_flow_parts(), Gaussian(2)
        generator = torch.Generator().manual_seed(seed)
        draw: Any = data.draw
        span = tm.LearnableSpan(
            NeuralODE(parts["field"], solver="dopri5", atol=1e-4, rtol=1e-4), torch.tensor([0.0, 1.0])
        )
        span.t_f.requires_grad_(False)
        model = tm.FlowModel(span, base)
        optimizer = torch.optim.AdamW(parts["field"].parameters(), lr=5e-3)
        begun = time.process_time()
        train(model.nll, optimizer, partial(draw, 512, generator), 500)
        print(f"tutorial, seed {seed}: trained in {time.process_time() - begun:.0f} s", flush=True)
        field, fresh, x = CNF(parts["field"].net), data.x_test, draw(640, generator)
        with torch.no_grad():
            for tol in (1e-4, 1e-7):
                taken = tm.LearnableSpan(NeuralODE(field, solver="dopri5", atol=tol, rtol=tol))
                value = tm.FlowModel(taken, base).nll(fresh).item()
                print(f"  dopri5 at {tol:g}: {taken.nfe} evaluations, nll {value:.3f}", flush=True)
            states = torch.nn.functional.pad(x, (1, 0))
            for n in (8, 12):
                begun = time.process_time()
                fit = tm.fit_solver(NeuralODE(field), states, evaluations=n, progress=False)
                print(
                    f"  fitted, {n} evaluations: nll {nll_of(field, fit.node.solver, base, fresh):.3f}, midpoint "
                    f"{nll_of(field, 'midpoint', base, fresh, n // 2):.3f}, fit {time.process_time() - begun:.0f} s",
                    flush=True,
                )


def distilled(field: nn.Module, solver: nn.Module, x0: Tensor, exact: Tensor, iterations: int = 500) -> nn.Module:
    """Returns a copy of a field that is trained with its solver to the ends, without a penalty: its ODE may end elsewhere."""
    made = copy.deepcopy(field)
    span = tm.LearnableSpan(NeuralODE(made, solver=solver))
    solver.requires_grad_(True)
    optimizer = torch.optim.Adam([*made.parameters(), *solver.parameters()], lr=1e-3)

    def loss(rows: Tensor) -> Tensor:
        return (span(x0[rows])[1][-1] - exact[rows]).square().mean()

    train(loss, optimizer, lambda: torch.randint(len(x0), (256,)), iterations)
    return made


def distances(seeds: range, draws: int = 5, points: int = 1000) -> None:
    """Prints W2 to the data as means over draws, and the spread of W2 between draws of the exact sampler."""
    for name, (start, end) in TASKS.items():
        for seed in seeds:
            field = trained(name, seed)
            node, states = NeuralODE(field), start(4096)
            fresh, data = start(draws * points), end(draws * points)

            def mean(ends: Tensor, data: Tensor = data) -> tuple[float, float]:
                found = [distance(a, b) for a, b in zip(ends.split(points), data.split(points), strict=True)]
                return statistics.mean(found), statistics.stdev(found)

            known = exact_ends(field, fresh)
            exact, noise = mean(known)
            print(f"{name}, seed {seed}: exact {exact:.3f}, within {exact + 2 * noise:.3f}", flush=True)
            for n in (4, 6, 8, 16):
                ends = end_of("midpoint", field, fresh, torch.linspace(0, 1, n // 2 + 1))
                print(f"  midpoint, {n} evaluations: {mean(ends)[0]:.3f}", flush=True)
            for n in (3, 4, 5, 6):
                fit = tm.fit_solver(node, states[:1280], evaluations=n, progress=False)
                ends = end_of(fit.node.solver, field, fresh, torch.tensor([0.0, 1.0]))
                print(f"  frozen, {n} evaluations: {mean(ends)[0]:.3f}", flush=True)
            for tol in (0.1, 0.03):
                begun = time.process_time()
                sampler, verdict = tm.compress_sampler(node, states, tol=tol, progress=False)
                seconds = time.process_time() - begun
                with torch.no_grad():
                    moved = sampler(fresh)[1][-1]
                print(
                    f"  weights moving, tol {tol:g}: {verdict.best.evaluations} evaluations (a fitted solver alone "
                    f"{verdict.trials[0].evaluations}), W2 {mean(moved)[0]:.3f}, error {relative(moved, known, fresh):.3f}, "
                    f"solver error {verdict.best.solver_error:.3f}, {seconds:.0f} s",
                    flush=True,
                )
            few = tm.fit_solver(node, states[:1280], evaluations=3, progress=False).node.solver
            network = distilled(field, few, states, exact_ends(field, states))
            end_of_network, own = end_of(few, network, fresh, torch.tensor([0.0, 1.0])), exact_ends(network, fresh)
            print(
                f"  control, no penalty, 3 evaluations: W2 {mean(end_of_network)[0]:.3f}, error "
                f"{relative(end_of_network, known, fresh):.3f}, solver error {relative(end_of_network, own, fresh):.3f}",
                flush=True,
            )


TABLES = {
    "distances": distances,
    "planes": planes,
    "digits": digits,
    "densities": densities,
    "cotrained": cotrained,
    "alone": partial(cotrained, weight=0.0),
    "tutorial": tutorial,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    tables = sys.argv[1].split(",") if len(sys.argv) > 1 else list(TABLES)
    count, first = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((2, 1), (3, 0)))
    for table in tables:
        TABLES[table](range(first, first + count))
