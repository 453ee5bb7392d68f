"""Speed and memory, side by side in one process: a plain Python loop, torchdiffeq, bare NeuralODE and LearnableSpan.

All contestants of a case solve the same network from the same state over [0, 1]. They take turns, round by round, and
the ratio to the reference is taken within each round before the median over rounds: a machine that is busy for a while
slows a whole round, and the ratio hardly at all. With one thread the clock is the process's own, which stands still while
others have the processor. Milliseconds are shown for orientation; ratios are what to quote.

    python -m torchdyn_mintime bench                       # one thread, all parts
    python -m torchdyn_mintime bench --threads all
    python -m torchdyn_mintime bench --only shallow memory --rounds 30
"""

import argparse
import contextlib
import csv
import gc
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.span import LearnableSpan

__all__ = ["Result", "alternate", "main", "plain_rk4", "saved_bytes"]

MIB = 2**20
PARTS = ("fixed", "adaptive", "shallow", "memory", "time-gradient", "scaling", "linearity", "final-state", "compile")
USUAL = PARTS[:-1]

_PART_HELP = f"of {', '.join(PARTS)}; all but compile, which takes minutes, by default"

Run = Callable[[], Any]


@dataclass
class Contestant:
    """One way to do a case's work. ``evaluations`` says how many evaluations of the field its last run took."""

    name: str
    run: Run
    evaluations: Callable[[], int | None] = lambda: None


@dataclass
class Result:
    """One line of the table.

    Attributes:
        part, case, contestant: what was measured.
        ratio: to the case's reference, the first contestant: the median over rounds of the ratio within a round.
        milliseconds: median over rounds.
        evaluations: of the field, in a forward solve.
        mebibytes: kept for backward, or by the result.
    """

    part: str
    case: str
    contestant: str
    ratio: float
    milliseconds: float | None = None
    evaluations: int | None = None
    mebibytes: float | None = None


# ------------------------------------------------------------------------------------------------------- measuring


def alternate(runs: Sequence[Run], rounds: int, seconds_a_round: float = 0.05) -> list[list[float]]:
    """Seconds of every call of each run. They take turns call by call; short ones get up to 100 times the rounds."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    longest = 1e-6
    for run in runs:
        run()
        start = clock()
        run()
        longest = max(longest, clock() - start)
    rounds *= max(1, min(100, int(seconds_a_round / longest)))
    seconds: list[list[float]] = [[] for _ in runs]
    gc.collect()
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        for k in range(rounds):
            order = range(len(runs)) if k % 2 == 0 else range(len(runs) - 1, -1, -1)
            for i in order:
                start = clock()
                runs[i]()
                seconds[i].append(clock() - start)
            if k % 50 == 49:
                gc.collect()
    finally:
        gc.enable()
    return seconds


def compare(part: str, case: str, contestants: Sequence[Contestant], rounds: int) -> list[Result]:
    """Times the contestants of a case; the first is the reference."""
    seconds = alternate([c.run for c in contestants], rounds)
    return [
        Result(
            part,
            case,
            c.name,
            statistics.median(a / b for a, b in zip(own, seconds[0], strict=True)),
            1e3 * statistics.median(own),
            c.evaluations(),
        )
        for c, own in zip(contestants, seconds, strict=True)
    ]


def saved_bytes(run: Run, held: Sequence[Tensor] = ()) -> int:
    """Bytes alive between forward and backward: what autograd saved and what ``run`` returned, each storage once.

    ``held`` are tensors that live anyway (parameters, the input), and are left out.
    """
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        # Held to the end, so that no address is given out twice.
        alive.append(tensor.detach())
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    pack(result)
    for tensor in held:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


# ---------------------------------------------------------------------------------------------------- contestants


def plain_rk4(net: Callable[[Tensor], Tensor], x: Tensor, steps: int, t0: float = 0.0, t_f: float = 1.0) -> Tensor:
    """Classical Runge-Kutta as one writes it by hand for a field without time: nothing kept, nothing checked."""
    dt = (t_f - t0) / steps
    for _ in range(steps):
        k1 = net(x)
        k2 = net(x + dt / 2 * k1)
        k3 = net(x + dt / 2 * k2)
        k4 = net(x + dt * k3)
        x = x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def mlp(size: int, width: int, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """Linear, tanh, Linear. A larger gain makes a field that needs more adaptive steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, size))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(gain)
    return net


def state(batch: int, size: int) -> Tensor:
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(1))


def node_of(net: nn.Module, **options: Any) -> NeuralODE:
    with contextlib.redirect_stdout(io.StringIO()):  # torchdyn prints that it wraps the field
        return NeuralODE(net, **options)


def contestants(
    net: nn.Module, x: Tensor, steps: int, *, solver: str = "rk4", backward: bool, plain: bool = True
) -> list[Contestant]:
    """The same solve by everyone; with ``backward``, the gradient of a loss on the last state too."""
    grid = torch.linspace(0, 1, steps + 1)
    node, wrapped = (node_of(net, solver=solver, atol=1e-3, rtol=1e-3) for _ in range(2))
    span = LearnableSpan(wrapped, grid)

    def finish(final: Tensor) -> None:
        if backward:
            net.zero_grad(set_to_none=True)
            final.square().mean().backward()

    def by_hand() -> None:
        finish(plain_rk4(net, x, steps))

    def by_node() -> None:
        node.vf.nfe = 0
        finish(node(x, grid)[1][-1])

    def by_span() -> None:
        span.t_f.grad = None
        finish(span(x)[1][-1])

    def scoped(run: Run) -> Run:
        def within() -> None:
            with torch.set_grad_enabled(backward):
                run()

        return within

    found = [Contestant("LearnableSpan", scoped(by_span), lambda: span.nfe)]
    found.append(Contestant("NeuralODE", scoped(by_node), lambda: int(node.vf.nfe)))
    with contextlib.suppress(ImportError):
        from torchdiffeq import odeint

        counted = _Counted(net)
        other = {"tsit5": "dopri5"}.get(solver, solver)  # its own tsit5 is not among its documented methods

        def by_torchdiffeq() -> None:
            counted.count = 0
            finish(odeint(counted, x, grid, method=other, rtol=1e-3, atol=1e-3)[-1])

        found.append(Contestant(f"torchdiffeq {other}", scoped(by_torchdiffeq), lambda: counted.count))
    if plain:
        found.insert(0, Contestant("plain loop", scoped(by_hand), lambda: 4 * steps))
    return found


def _training(span: LearnableSpan, x: Tensor) -> Run:
    return lambda: span(x)[1][-1].square().mean().backward()


def _nfe(span: LearnableSpan) -> int:
    return span.nfe


class _Counted(nn.Module):
    """A field as torchdiffeq calls it, with a count."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.count = net, 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        return self.net(x)


# ----------------------------------------------------------------------------------------------------------- parts


def fixed(rounds: int) -> Iterator[Result]:
    """rk4, 100 steps: the issue's two cases, and a larger state where the network itself counts for more."""
    net, x = mlp(2, 64), state(64, 2)
    yield from compare("fixed", "forward, 2-64-2, batch 64", contestants(net, x, 100, backward=False), rounds)
    net, x = mlp(3, 32), state(512, 3)
    yield from compare(
        "fixed", "forward + backward, 3-32-3, batch 512", contestants(net, x, 100, backward=True), rounds
    )
    net, x = mlp(64, 128), state(512, 64)
    case = "forward + backward, 64-128-64, batch 512"
    yield from compare("fixed", case, contestants(net, x, 100, backward=True), max(3, rounds // 5))


def adaptive(rounds: int) -> Iterator[Result]:
    """tsit5 and dopri5 at 1e-3 on [0, 1]; the reference is bare NeuralODE. Mind the evaluations beside the ratios."""
    for gain, what in ((1.0, "as initialised"), (6.0, "weights times 6")):
        for solver in ("tsit5", "dopri5"):
            for backward in (False, True):
                net, x = mlp(3, 32, gain=gain), state(512, 3)
                ours, node, *other = contestants(net, x, 1, solver=solver, backward=backward, plain=False)
                if solver == "tsit5":
                    other = []
                case = f"{solver}, {what}, {'forward + backward' if backward else 'forward'}"
                yield from compare("adaptive", case, [node, ours, *other], rounds)


def shallow(rounds: int) -> Iterator[Result]:
    """1, 2 and 4 steps of rk4: what a trained model ends with, where the cost of a call shows."""
    net, x = mlp(2, 64), state(64, 2)
    for steps in (1, 2, 4):
        for backward in (False, True):
            case = f"{steps} step{'s' * (steps > 1)}, {'forward + backward' if backward else 'forward'}"
            yield from compare("shallow", case, contestants(net, x, steps, backward=backward), rounds)


def memory(rounds: int) -> Iterator[Result]:
    """What is alive between forward and backward, 512 x 64 state, 100 steps of rk4, and the time of both."""
    net, x, grid = mlp(64, 128), state(512, 64), torch.linspace(0, 1, 101)
    autograd = LearnableSpan(node_of(net, solver="rk4"), grid)
    options: dict[str, Callable[[], LearnableSpan]] = {
        "autograd": lambda: autograd,
        "checkpoint=True": lambda: LearnableSpan(node_of(net, solver="rk4"), grid, checkpoint=True),
        "adjoint": lambda: LearnableSpan(node_of(net, solver="rk4", sensitivity="adjoint"), grid),
    }
    held = [x, *net.parameters()]
    runs, sizes = [], []
    for make in options.values():
        span = make()
        sizes.append(saved_bytes(partial(span.trajectory, x), held) / MIB)
        runs.append(_training(span, x))

    def twice() -> None:
        with torch.no_grad():
            autograd(x)
        runs[0]()

    # What recomputation costs at the least: autograd's own work and one more forward solve.
    names = [*options, "autograd, forward twice"]
    seconds = alternate([*runs, twice], max(3, rounds // 5))
    for name, own, size in zip(names, seconds, [*sizes, None], strict=True):
        ratio = statistics.median(a / b for a, b in zip(own, seconds[0], strict=True))
        yield Result("memory", "512 x 64, 100 steps", name, ratio, 1e3 * statistics.median(own), None, size)


def time_gradient(rounds: int) -> Iterator[Result]:
    """The same training step with t_f frozen and learned: the difference is what the time gradient costs."""
    for solver in ("rk4", "tsit5"):
        net, x = mlp(3, 32, gain=3.0), state(512, 3)
        found = []
        for learned in (False, True):
            span = LearnableSpan(node_of(net, solver=solver), torch.linspace(0, 1, 101 if solver == "rk4" else 2))
            span.t_f.requires_grad_(learned)
            found.append(
                Contestant("learned t_f" if learned else "frozen t_f", _training(span, x), partial(_nfe, span))
            )
        yield from compare("time-gradient", solver, found, rounds)


def scaling(rounds: int) -> Iterator[Result]:
    """Batch, state size and parameters: the ratio to the plain loop as the network grows (20 steps, forward + backward)."""
    rounds = max(3, rounds // 3)
    cases = [("batch", 2, 64, b) for b in (16, 256, 4096)]
    cases += [("state size", s, 64, 256) for s in (2, 32, 512)]
    cases += [("width", 16, w, 256) for w in (16, 256, 2048)]
    for what, size, width, batch in cases:
        value = {"batch": batch, "state size": size, "width": width}[what]
        net, x = mlp(size, width), state(batch, size)
        found = [
            c for c in contestants(net, x, 20, backward=True) if c.name in ("plain loop", "LearnableSpan", "NeuralODE")
        ]
        yield from compare("scaling", f"{what} {value} ({size}-{width}-{size}, batch {batch})", found, rounds)


def linearity(rounds: int) -> Iterator[Result]:
    """Forward without gradient from 10 to 10,000 steps. NeuralODE stops at 1,000: its checks grow quadratically."""
    net, x = mlp(2, 64), state(64, 2)
    for steps in (10, 30, 100, 300, 1000, 3000, 10000):
        found = contestants(net, x, steps, backward=False)
        if steps > 1000:
            found = [c for c in found if c.name != "NeuralODE"]
        yield from compare("linearity", str(steps), found, max(3, min(rounds, 1000 // steps)))


def final_state(rounds: int) -> Iterator[Result]:
    """Inference that needs z(t_f) alone: what the returned states keep in memory, and the time."""
    net, x = mlp(64, 128), state(512, 64)
    span = LearnableSpan(node_of(net, solver="rk4"), torch.linspace(0, 1, 101)).eval()
    with torch.no_grad():
        end = [span.t_f.item()]
        runs: dict[str, Callable[[], Tensor]] = {
            "all points": lambda: span(x)[1],
            "save_at t_f only": lambda: span(x, save_at=end)[1],
        }
        seconds = alternate(list(runs.values()), max(3, rounds // 5))
        for (name, run), own in zip(runs.items(), seconds, strict=True):
            size = run().untyped_storage().nbytes() / MIB
            ratio = statistics.median(a / b for a, b in zip(own, seconds[0], strict=True))
            yield Result("final-state", "512 x 64, 100 steps", name, ratio, 1e3 * statistics.median(own), None, size)


def compiled(rounds: int) -> Iterator[Result]:
    """torch.compile on a step by hand, with the step size as a tensor, and on the field inside a LearnableSpan.

    The graphs are those of a first solve, and what fewer steps (60, 30, 7, 2) add to them.
    """
    from torch._dynamo.utils import counters

    for size, width, batch, backward in ((2, 64, 64, False), (3, 32, 512, True)):
        net, x = mlp(size, width), state(batch, size)
        counters.clear()
        torch._dynamo.reset()
        step = torch.compile(lambda x, dt, net=net: _rk4_step(net, x, dt), dynamic=False)
        solve = partial(_compiled_solve, net, step, x, backward)
        start = time.perf_counter()
        solve(2)  # the second step's state carries a gradient: a graph of its own
        first = time.perf_counter() - start
        graphs = counters["stats"]["unique_graphs"]
        for steps in (100, 60, 30, 7, 2):
            solve(steps)
        again = counters["stats"]["unique_graphs"] - graphs
        case = f"{'forward + backward' if backward else 'forward'}, {size}-{width}-{size}, batch {batch}, 100 steps"
        plain, ours, *_ = contestants(net, x, 100, backward=backward)
        compiled_net = cast(nn.Module, torch.compile(net, dynamic=False))
        field = contestants(compiled_net, x, 100, backward=backward, plain=False)[0]
        field.name = "LearnableSpan, compiled field"
        case += f"; first call {first:.0f} s, graphs {graphs} + {again}"
        yield from compare(
            "compile", case, [plain, ours, Contestant("compiled step", partial(solve, 100)), field], rounds
        )


def _rk4_step(net: nn.Module, x: Tensor, dt: Tensor) -> Tensor:
    k1 = net(x)
    k2 = net(x + dt / 2 * k1)
    k3 = net(x + dt / 2 * k2)
    k4 = net(x + dt * k3)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def _compiled_solve(net: nn.Module, step: Callable, x: Tensor, backward: bool, steps: int) -> None:
    with torch.set_grad_enabled(backward):
        dt = torch.tensor(1 / steps)
        for _ in range(steps):
            x = step(x, dt)
        if backward:
            net.zero_grad(set_to_none=True)
            x.square().mean().backward()


_PARTS: dict[str, Callable[[int], Iterator[Result]]] = dict(
    zip(
        PARTS, (fixed, adaptive, shallow, memory, time_gradient, scaling, linearity, final_state, compiled), strict=True
    )
)


# ---------------------------------------------------------------------------------------------------------- output


def _plot(results: Sequence[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[int, float]]] = {}
    for r in results:
        if r.part == "linearity" and r.milliseconds is not None:
            lines.setdefault(r.contestant, []).append((int(r.case), r.milliseconds))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, points in lines.items():
        steps, spent = zip(*points, strict=True)
        axes[0].loglog(steps, spent, "o-", label=name)
        axes[1].semilogx(steps, [1e3 * s / n for n, s in points], "o-", label=name)
    axes[0].set(xlabel="steps", ylabel="ms a solve", title="forward, rk4, 2-64-2, batch 64")
    axes[1].set(xlabel="steps", ylabel="microseconds a step", title="flat is linear", ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _table(results: Sequence[Result], threads: int):
    from rich.table import Table

    table = Table(
        title=f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}: ratios, medians over rounds"
    )
    for column in ("part", "case", "by", "ratio", "ms", "evaluations", "MiB kept"):
        text = column in ("part", "case", "by")
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "case")
    previous = None
    for r in results:
        if previous is not None and (r.part, r.case) != previous:
            table.add_section()
        first = (r.part, r.case) != previous
        previous = r.part, r.case
        table.add_row(
            r.part if first else "",
            r.case if first else "",
            r.contestant,
            f"{r.ratio:.2f}",
            "" if r.milliseconds is None else f"{r.milliseconds:.3g}",
            "" if r.evaluations is None else str(r.evaluations),
            "" if r.mebibytes is None else f"{r.mebibytes:.1f}",
        )
    return table


def _write(results: Sequence[Result], folder: Path, threads: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"bench-{threads}-thread{'s' * (threads > 1)}"
    rows = [vars(r) for r in results]
    written = [stem.with_suffix(".csv"), stem.with_suffix(".json")]
    with written[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "machine": platform.machine(),
    }
    written[1].write_text(json.dumps({"about": about, "results": rows}, indent=1))
    if any(r.part == "linearity" for r in results):
        written.append(folder / f"linearity-{threads}-thread{'s' * (threads > 1)}.png")
        _plot(results, written[-1])
    return written


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """The command ``python -m torchdyn_mintime bench``."""
    parser = argparse.ArgumentParser(prog="python -m torchdyn_mintime bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", choices=("1", "all"), default="1", help="threads of torch (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of a case (default 15)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=USUAL, metavar="PART", help=_PART_HELP)
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of the CSV, JSON and PNG")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {options.rounds}")

    from rich.console import Console
    from rich.progress import track

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if options.threads == "1" else len(os.sched_getaffinity(0)))
    threads = torch.get_num_threads()
    results: list[Result] = []
    try:
        for part in track(options.only, "measuring", console=console):
            results += _PARTS[part](options.rounds)
            written = _write(results, options.out, threads)  # after each part: an interrupted run leaves what it has
    finally:
        torch.set_num_threads(before)
    console.print(_table(results, threads))
    for path in written:
        console.print(f"wrote {path}")
    return results


if __name__ == "__main__":
    main()
