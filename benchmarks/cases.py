"""The parts of the benchmark. Each takes the number of rounds and yields lines of the table."""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchdyn.models.cnf import CNF, autograd_trace

from benchmarks.contestants import contestants, mlp, node_of, plain_rk4, rk4_step, state, task
from benchmarks.deployed import deployed
from benchmarks.learned import one_step
from benchmarks.timing import MIB, Row, Run, compare, saved_bytes
from torchdyn_mintime.core import LearnableSpan
from torchdyn_mintime.depth.searched_model import SearchedModel
from torchdyn_mintime.losses.step_doubling import StepDoubling
from torchdyn_mintime.numerics import LearnableSolver

__all__ = ["PARTS"]

PASS = {False: "forward", True: "forward + backward"}


def _side_by_side(
    part: str, case: str, sizes: tuple[int, int, int], steps: int, backward: bool, rounds: int, without: str = ""
) -> list[Row]:
    """Returns the lines of a case in which all contestants take equal steps of rk4.

    Args:
        part, case: names of what is measured.
        sizes: of the state, of the hidden layer and of the batch.
        steps: number of steps from 0 to 1.
        backward: whether gradients are taken too.
        rounds: the least number of rounds.
        without: a contestant that is left out.
    """
    size, width, batch = sizes
    net = mlp(size, width)
    runs = contestants(net, state(batch, size), steps, backward=backward)
    runs.pop(without, None)
    return compare(part, case, runs, rounds, net)


def fixed(rounds: int) -> Iterator[Row]:
    """Measures 100 steps of rk4: two small states, and a larger one whose network takes a larger share of the time."""
    for size, width, batch, backward in ((2, 64, 64, False), (3, 32, 512, True), (64, 128, 512, True)):
        case = f"{PASS[backward]}, {size}-{width}-{size}, batch {batch}"
        fewer = rounds if size < 64 else max(3, rounds // 5)
        yield from _side_by_side("fixed", case, (size, width, batch), 100, backward, fewer)


def adaptive(rounds: int) -> Iterator[Row]:
    """Measures tsit5 and dopri5 at a tolerance of 1e-3, against bare NeuralODE. Read the evaluations beside the ratios."""
    fields = ((1.0, "as initialised"), (6.0, "weights times 6"))
    for (gain, what), solver, backward in product(fields, ("tsit5", "dopri5"), (False, True)):
        net = mlp(3, 32, gain=gain)
        found = contestants(net, state(512, 3), 1, backward=backward, solver=solver)
        named = ("NeuralODE", "LearnableSpan", f"torchdiffeq {solver}", f"torchode {solver}")
        runs = {name: found[name] for name in named if name in found}
        yield from compare("adaptive", f"{solver}, {what}, {PASS[backward]}", runs, rounds, net)


def _loop_to(t_f: Tensor) -> Callable[[Any, Tensor, int], Tensor]:
    """Returns a plain loop of equal steps of rk4 up to a learned t_f."""

    def loop(net: Any, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = rk4_step(net, x, t_f / steps)
        return x

    return loop


def shallow(rounds: int) -> Iterator[Row]:
    """Measures 1, 2 and 4 steps of rk4, as a trained model may end with. There the cost of a call shows.

    The plain loop has a learned t_f too: its step is t_f over the number of steps.
    """
    for steps, backward in product((1, 2, 4), (False, True)):
        net, x = mlp(2, 64), state(64, 2)
        runs = contestants(net, x, steps, backward=backward, plain=_loop_to(nn.Parameter(torch.tensor(1.0))))
        case = f"{steps} step{'s' * (steps > 1)}, {PASS[backward]}"
        yield from compare("shallow", case, runs, rounds, net)


def penalty(rounds: int) -> Iterator[Row]:
    """Measures a training step with step doubling, against the same two solves and their relative difference by hand."""
    t_f = nn.Parameter(torch.tensor(1.0))
    loop = _loop_to(t_f)
    for (size, width, batch), steps in product(((2, 64, 64), (3, 32, 512)), (1, 4)):
        net, x = mlp(size, width), state(batch, size)
        span = LearnableSpan(node_of(net), torch.linspace(0, 1, steps + 1))
        doubling = StepDoubling(span)

        def ours(span: LearnableSpan = span, x: Tensor = x, doubling: StepDoubling = doubling) -> Tensor:
            return span(x)[1][-1].square().mean() + doubling.penalty()

        def by_hand(net: Any = net, x: Tensor = x, steps: int = steps) -> Tensor:
            end, finer = loop(net, x, steps), loop(net, x, 2 * steps)
            return end.square().mean() + (end - finer).square().mean() / end.detach().square().mean()

        wanted = list(net.parameters())
        runs = {"by hand": task(by_hand, [*wanted, t_f]), "StepDoubling": task(ours, [*wanted, span.t_f])}
        case = f"{steps} step{'s' * (steps > 1)}, {size}-{width}-{size}, batch {batch}"
        yield from compare("penalty", case, runs, rounds, net)
    for stages in (2, 4):
        net, x = mlp(2, 64), state(64, 2)
        runs = _of_the_search(net, x, stages)
        yield from compare("penalty", f"the search, {stages} learned stages, 2-64-2, batch 64", runs, rounds, net)


def _of_the_search(net: nn.Module, x: Tensor, stages: int) -> dict[str, Run]:
    """Returns runs of an iteration of the search without its optimizer: both losses, and the penalty against 4 steps of rk4."""
    solver = LearnableSolver(stages)
    span = LearnableSpan(node_of(net, solver=solver), torch.linspace(0, 1, 2))
    searched = SearchedModel(span, torch.optim.SGD(net.parameters(), lr=0.0))
    a, b = (v.detach().float().requires_grad_() for v in (solver.a, solver.b))

    def by_hand() -> Tensor:
        end, exact = one_step(net, x, a, b, 1.0), plain_rk4(net, x, 4)
        apart = (end - exact).square().mean() / (exact - x).detach().square().mean()
        return end.square().mean() + exact.square().mean() + 2 * apart

    def loss() -> Tensor:
        return span(x)[1][-1].square().mean()

    def ours() -> Tensor:
        return loss() + searched.objective(1.0, 4, loss)

    weights = list(net.parameters())
    return {"by hand": task(by_hand, [*weights, a, b]), "Shallowest": task(ours, [*weights, solver.free])}


def dense(rounds: int) -> Iterator[Row]:
    """Measures solves with states at many times: 200 with 20 steps of rk4, 1,000 with dopri5; a step for each, or dense."""
    for solver, points, asked in (("rk4", 21, 200), ("dopri5", 2, 1000)):
        net, x = mlp(2, 64, gain=1.0 if solver == "rk4" else 6.0), state(64, 2)
        span = LearnableSpan(node_of(net, solver=solver), torch.linspace(0, 1, points)).eval()
        times = torch.linspace(0, 1, asked)
        solves = {
            "the ends alone": partial(_end, span, x),
            "dense=True": partial(_end, span, x, t_span=times, dense=True),
        }
        solves["landing on each"] = partial(_end, span, x, t_span=times)
        runs = {name: task(solve, []) for name, solve in solves.items()}
        with warnings.catch_warnings():  # the slow way is meant here
            warnings.filterwarnings("ignore", message="the .* times asked for have cut the solve")
            rows = compare("dense", f"{solver}, {asked} times", runs, max(3, rounds // 5), net)
        yield from rows


def trace(rounds: int) -> Iterator[Row]:
    """Measures a normalizing flow over Linear, Tanh, Linear: its exact trace by autograd, and in closed form."""
    for size, backward in product((2, 16), (False, True)):
        net, x = mlp(size, 64), state(64, 1 + size)
        runs = {}
        # Inside another function the trace by autograd is not recognised, and so not replaced by the closed form.
        for name, estimator in (
            ("by autograd", lambda *args, **kw: autograd_trace(*args, **kw)),
            ("closed form", None),
        ):
            span = LearnableSpan(node_of(CNF(net, trace_estimator=estimator)), torch.linspace(0, 1, 11))
            runs[name] = _training(span, x) if backward else task(partial(_end, span, x), [])
        yield from compare("trace", f"dimension {size}, {PASS[backward]}", runs, max(3, rounds // 3))


def memory(rounds: int) -> Iterator[Row]:
    """Measures the memory held between forward and backward, and the time of both: a state of 512 x 64, 100 steps of rk4."""
    net, x, grid = mlp(64, 128), state(512, 64), torch.linspace(0, 1, 101)
    spans = {
        "autograd": LearnableSpan(node_of(net), grid),
        "checkpoint=True": LearnableSpan(node_of(net), grid, checkpoint=True),
        "adjoint": LearnableSpan(node_of(net, sensitivity="adjoint"), grid),
    }
    held = [x, *net.parameters()]
    kept = {name: saved_bytes(partial(_end, span, x), held) / MIB for name, span in spans.items()}
    runs = {name: _training(span, x) for name, span in spans.items()}
    forward, training = task(partial(_end, spans["autograd"], x), []), runs["autograd"]
    # The least that recomputation can cost: autograd's own work and one more forward solve.
    runs["autograd, forward twice"] = lambda: (forward(), training())
    for row in compare("memory", "512 x 64, 100 steps", runs, max(3, rounds // 5)):
        yield {**row, "mebibytes": kept.get(row["contestant"])}


def _end(span: LearnableSpan, x: Tensor, **options: Any) -> Tensor:
    return span(x, **options)[1][-1]


def _training(span: LearnableSpan, x: Tensor) -> Run:
    return task(partial(_end, span, x), [p for p in span.parameters() if p.requires_grad])


def time_gradient(rounds: int) -> Iterator[Row]:
    """Measures a training step with t_f frozen and with t_f learned: the difference is the cost of the time gradient."""
    for solver, points in (("rk4", 101), ("tsit5", 2)):
        net = mlp(3, 32, gain=3.0)
        frozen, learned = (LearnableSpan(node_of(net, solver=solver), torch.linspace(0, 1, points)) for _ in range(2))
        frozen.t_f.requires_grad_(False)
        runs = {"frozen t_f": _training(frozen, state(512, 3)), "learned t_f": _training(learned, state(512, 3))}
        yield from compare("time-gradient", solver, runs, rounds, net)


def scaling(rounds: int) -> Iterator[Row]:
    """Measures the ratio to the plain loop as batch, state and width grow (20 steps, forward + backward)."""
    cases = [
        *(("batch", b, 2, 64, b) for b in (16, 256, 4096)),
        *(("state size", s, s, 64, 256) for s in (2, 32, 512)),
        *(("width", w, 16, w, 256) for w in (16, 256, 2048)),
    ]
    for what, value, size, width, batch in cases:
        case, fewer = f"{what} {value} ({size}-{width}-{size}, batch {batch})", max(3, rounds // 3)
        yield from _side_by_side("scaling", case, (size, width, batch), 20, True, fewer, without="torchdiffeq rk4")


def linearity(rounds: int) -> Iterator[Row]:
    """Measures forward without gradient from 10 to 10,000 steps; NeuralODE, whose checks grow quadratically, to 1,000."""
    for steps in (10, 30, 100, 300, 1000, 3000, 10000):
        fewer, without = max(3, min(rounds, 1000 // steps)), "NeuralODE" if steps > 1000 else ""
        yield from _side_by_side("linearity", str(steps), (2, 64, 64), steps, False, fewer, without)


def final_state(rounds: int) -> Iterator[Row]:
    """Measures inference that needs only z(t_f): the memory of the returned states, and the time."""
    span = LearnableSpan(node_of(mlp(64, 128)), torch.linspace(0, 1, 101)).eval()
    whole = partial(_end, span, state(512, 64))
    solves = {"all points": whole, "save_at t_f only": partial(whole, save_at=[span.t_f.item()])}
    runs = {name: task(solve, []) for name, solve in solves.items()}
    for row in compare("final-state", "512 x 64, 100 steps", runs, max(3, rounds // 5)):
        yield {**row, "mebibytes": runs[row["contestant"]]().untyped_storage().nbytes() / MIB}


def compiled(rounds: int) -> Iterator[Row]:
    """Measures torch.compile on a step by hand, with the step size as a tensor, and on the field inside a LearnableSpan.

    The case names the graphs of the first solve, and how many more other numbers of steps (60, 30, 7, 2) need.
    """
    from torch._dynamo.utils import counters

    for size, width, batch, backward in ((2, 64, 64, False), (3, 32, 512, True)):
        net, x = mlp(size, width), state(batch, size)
        counters.clear()
        torch._dynamo.reset()
        step = torch.compile(rk4_step, dynamic=False)
        wanted = list(net.parameters()) if backward else []
        graphs = []
        start = time.perf_counter()
        # A solve of two steps first: the state of the second step carries a gradient, which needs a graph of its own.
        for steps in (2, 60, 30, 7, 2, 100):
            by_step = task(partial(plain_rk4, net, x, steps, step), wanted)
            by_step()
            graphs.append((counters["stats"]["unique_graphs"], time.perf_counter() - start))
        (first, spent), (last, _) = graphs[0], graphs[-1]
        plain, ours, *_ = contestants(net, x, 100, backward=backward).items()
        quick = contestants(cast(nn.Module, torch.compile(net, dynamic=False)), x, 100, backward=backward)
        runs = dict(
            [plain, ours, ("compiled step", by_step), ("LearnableSpan, compiled field", quick["LearnableSpan"])]
        )
        case = (
            f"{PASS[backward]}, {size}-{width}-{size}, batch {batch}, 100 steps; "
            f"first call {spent:.0f} s, graphs {first} + {last - first}"
        )
        yield from compare("compile", case, runs, rounds)


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "fixed": fixed,
    "adaptive": adaptive,
    "shallow": shallow,
    "deployed": deployed,
    "penalty": penalty,
    "dense": dense,
    "trace": trace,
    "memory": memory,
    "time-gradient": time_gradient,
    "scaling": scaling,
    "linearity": linearity,
    "final-state": final_state,
    "compile": compiled,
}
