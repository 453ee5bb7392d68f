"""Compares a span with a LearnableSolver and the same arithmetic by hand: ``python -m benchmarks.learned``.

The network is 2-64-2, the batch 64, and torch has one thread. By hand is a loop over the stages. Its coefficients are numbers
in inference, and tensors that require a gradient in training. Prints medians in microseconds.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from benchmarks.timing import Run, alternate


def one_step(net: nn.Module, x: Tensor, a, b, h) -> Tensor:
    """Returns the state after one step with the matrix ``a`` and the weights ``b``."""
    stages: list[Tensor] = []
    for row in (*a, b):
        state = x
        for j, k in enumerate(stages):
            state = state + h * row[j] * k
        if len(stages) < len(b):
            stages.append(net(state))
    return state


def _end(span: tm.LearnableSpan, x: Tensor) -> Tensor:
    return span(x)[1][-1]


def _train(solve: Callable[[], Tensor]) -> None:
    solve().square().mean().backward()


def main() -> None:
    """Prints a line for each number of stages."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for stages in (1, 2, 4, 8):
        net, x = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2)), torch.randn(64, 2)
        solver = tm.LearnableSolver(stages)
        span = tm.LearnableSpan(NeuralODE(net, solver=solver))
        a, b = (v.detach().float().requires_grad_() for v in (solver.a, solver.b))
        rows, weights, h = a.tolist(), b.tolist(), torch.ones((), requires_grad=True)
        span_end, hand = partial(_end, span, x), partial(one_step, net, x)
        runs: list[Run] = [
            torch.no_grad()(span_end),
            torch.no_grad()(partial(hand, rows, weights, 1.0)),
            partial(_train, span_end),
            partial(_train, partial(hand, a, b, h)),
        ]
        one, two, three, four = (1e6 * statistics.median(t) for t in alternate(runs, 5))
        print(
            f"{stages} stages: inference {one:.0f}, by hand {two:.0f} ({one / two:.2f}); forward and backward {three:.0f}, "
            f"by hand {four:.0f} ({three / four:.2f})"
        )


if __name__ == "__main__":
    main()
