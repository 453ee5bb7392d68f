"""Fields of flow matching, and samplers of few evaluations: ``python -m benchmarks.samplers planes,digits,densities 5 10``.

Named are the tables, the number of seeds and the first one. Each field carries one distribution of the plane to another along
straight lines between independent draws. Printed are the error of the end relative to the displacement, on fresh states, and
its share of midpoint's with as many evaluations. The control is midpoint on the best of a family of time grids.
``distances`` prints the distance W2 of samples to the data, of fitted solvers and with the weights free (``compress_sampler``).
Seconds are those of one core.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF

import torchdyn_mintime as tm
from torchdyn_mintime.experiments.samplers import Velocity, distance, eight_gaussians, exact_ends, matched, moons
from torchdyn_mintime.flows import Gaussian

EVALUATIONS = (4, 6, 8, 10)


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
    """Returns the field of a task, trained once and kept in ``results/samplers``; torch's random state is then the seed's."""
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
    """Returns the end of a solve by steps between these times."""
    with torch.no_grad():
        return tm.LearnableSpan(NeuralODE(field, solver=solver), times)(x0)[1][-1]


def relative(end: Tensor, exact: Tensor, x0: Tensor) -> float:
    """Returns the error of ends relative to the displacement."""
    return ((end - exact).square().mean() / (exact - x0).square().mean()).sqrt().item()


def fresh_error(solver: str | nn.Module, field: nn.Module, x0: Tensor, exact: Tensor, steps: int = 1) -> float:
    """Returns the error of equal steps, relative to the displacement."""
    return relative(end_of(solver, field, x0, torch.linspace(0, 1, steps + 1)), exact, x0)


def best_grid(field: nn.Module, x0: Tensor, exact: Tensor, steps: int) -> Tensor:
    """Returns the times 1 - (1 - s^a)^b, s equal steps, at which midpoint errs least on the states: of 169 pairs (a, b)."""
    equal, powers = torch.linspace(0, 1, steps + 1), torch.logspace(-1, 1, 13, base=3)
    grids = [1 - (1 - equal**a) ** b for a in powers for b in powers]
    return min(grids, key=lambda times: relative(end_of("midpoint", field, x0, times), exact, x0))


def planes(seeds: range) -> None:
    """Prints the table of the fields of the plane."""
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
    """Prints the same of digits of 8 by 8 pixels, from a normal distribution."""
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


def densities(seeds: range) -> None:
    """Prints the negative log-likelihood (nats) of flows of the plane by fitted solvers, beside the exact one."""
    for name, data in (("moons", lambda n: moons(n) / 3), ("rings", lambda n: rings(n) / 3)):
        for seed in seeds:
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
            node = NeuralODE(CNF(net), solver="rk4")
            model = tm.FlowModel(tm.LearnableSpan(node, torch.linspace(0, 1, 5)), Gaussian(2))
            model.span.t_f.requires_grad_(False)
            optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
            for _ in range(300):
                loss = model.nll(data(256))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            x, fresh = (torch.nn.functional.pad(data(n), (1, 0)) for n in (1280, 2048))

            def nll(solver, nodes, tolerance=1e-3, net=net, fresh=fresh, base=model.base):
                solved = NeuralODE(CNF(net), solver=solver, atol=tolerance, rtol=tolerance)
                with torch.no_grad():
                    end = tm.LearnableSpan(solved, torch.linspace(0, 1, nodes + 1))(fresh)[1][-1]
                return (end[:, 0] - base.log_prob(end[:, 1:])).mean().item()

            exact = nll("dopri5", 1, 1e-6)
            for n in (4, 6, 8):
                fit = tm.fit_solver(node, x, evaluations=n, progress=False)
                print(
                    f"density of {name}, seed {seed}, {n} evaluations: nll {nll(fit.node.solver, 1):.4f}, midpoint "
                    f"{nll('midpoint', n // 2):.4f}, exact {exact:.4f}",
                    flush=True,
                )


def distances(seeds: range, draws: int = 5, points: int = 1000) -> None:
    """Prints W2 to the data: means over draws, and how far the exact sampler's own draws are apart."""
    for name, (start, end) in TASKS.items():
        for seed in seeds:
            torch.manual_seed(seed)
            field = matched(start, end, Velocity())
            node, states = NeuralODE(field), start(4096)
            fresh, data = start(draws * points), end(draws * points)

            def mean(ends: Tensor, data: Tensor = data) -> tuple[float, float]:
                found = [distance(a, b) for a, b in zip(ends.split(points), data.split(points), strict=True)]
                return statistics.mean(found), statistics.stdev(found)

            def ends(solver: str | nn.Module, steps: int = 1, field: nn.Module = field, x: Tensor = fresh) -> Tensor:
                with torch.no_grad():
                    return tm.LearnableSpan(NeuralODE(field, solver=solver), torch.linspace(0, 1, steps + 1))(x)[1][-1]

            exact, noise = mean(exact_ends(field, fresh))
            print(f"{name}, seed {seed}: exact {exact:.3f}, within {exact + 2 * noise:.3f}", flush=True)
            for n in (4, 6, 8, 16):
                print(f"  midpoint, {n} evaluations: {mean(ends('midpoint', n // 2))[0]:.3f}", flush=True)
            for n in (3, 4, 5, 6):
                fit = tm.fit_solver(node, states[:1280], evaluations=n, progress=False)
                print(f"  frozen, {n} evaluations: {mean(ends(fit.node.solver))[0]:.3f}", flush=True)
            begun = time.process_time()
            sampler, verdict = tm.compress_sampler(node, states, tol=0.1, progress=False)
            with torch.no_grad():
                moved = mean(sampler(fresh)[1][-1])[0]
            print(
                f"  weights moving, {verdict.best.evaluations} evaluations: {moved:.3f}, solver error "
                f"{verdict.best.solver_error:.3f}, {time.process_time() - begun:.0f} s of CPU time",
                flush=True,
            )


TABLES = {"distances": distances, "planes": planes, "digits": digits, "densities": densities}

if __name__ == "__main__":
    torch.set_num_threads(1)
    tables = sys.argv[1].split(",") if len(sys.argv) > 1 else list(TABLES)
    count, first = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((2, 1), (3, 0)))
    for table in tables:
        TABLES[table](range(first, first + count))
