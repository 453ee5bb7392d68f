"""A long run: t_f moves through both bounds again and again; memory stays flat, no step gets slower, no point is lost."""

import gc
import itertools
import time
import tracemalloc

import pytest
import torch
from conftest import PROFILE
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.nn import DepthCat

import torchdyn_mintime as tm

STEPS = 20_000 if PROFILE == "thorough" else 2_000
WARM_UP = 1_000 if PROFILE == "thorough" else 500
PERIOD = 40  # steps of a swing of t_f from beyond one bound to beyond the other and back


def objects():
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize(
    "solver, sensitivity, timed", [("rk4", "autograd", True), ("tsit5", "autograd", False), ("euler", "adjoint", False)]
)
def test_a_long_run_keeps_its_memory_and_its_pace(solver, sensitivity, timed):
    torch.manual_seed(0)
    net = nn.Sequential(DepthCat(1), nn.Linear(2, 1)) if timed else nn.Linear(1, 1)
    span = tm.LearnableSpan(
        NeuralODE(net, solver=solver, sensitivity=sensitivity), torch.linspace(0, 1, 3), bounds=(0.2, 1.7)
    )
    lower, upper = span.bounds
    optimizer = torch.optim.SGD(tm.parameter_groups(span, lr=1e-3, span_lr=0.1), lr=1e-3)
    x, reached, seconds = torch.ones(2, 1), set(), []
    counts, sizes = [], []
    tracemalloc.start()
    try:
        for step in range(STEPS):
            start = time.process_time()
            t_eval, sol = span(x)
            # The price of time changes its sign: t_f runs beyond one bound, is clipped, and comes back.
            price = 1.0 if step // (PERIOD // 2) % 2 else -1.0
            (1e-3 * sol[-1].square().mean() + price * t_eval[-1]).backward()
            optimizer.step()
            optimizer.zero_grad()
            span.clip_()
            seconds.append(time.process_time() - start)
            t_f = span.t_f.item()
            assert lower - 1e-6 <= t_f <= upper + 1e-6
            reached |= {name for name, bound in (("lower", lower), ("upper", upper)) if abs(t_f - bound) < 1e-6}
            times = t_eval.tolist()
            assert len(times) == len(sol) and all(b - a > 2e-5 for a, b in itertools.pairwise(times))
            # Every point of the template before t_f is there; beyond the template fixed steps go on with its spacing.
            # A point closer to t_f than a thousandth of a step (5e-4) goes; rounding decides within 1e-6 of that.
            inner = (0.5, 1.0) if span.adaptive else (0.5, 1.0, 1.5)
            least, most = (sum(t < times[-1] - gap for t in inner) for gap in (5.01e-4, 4.99e-4))
            assert least <= len(times) - 2 <= most
            # At whole swings, so that the same moments are compared.
            if step >= WARM_UP and step % (PERIOD * 10) == 0:
                counts.append(objects())
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert reached == {"lower", "upper"}
    # 1 % is asked. The test's own list of seconds grows by 32 bytes a step, which is less than 1 % of some 10 MB.
    assert max(counts[1:]) <= 1.01 * counts[0], counts
    assert max(sizes[1:]) <= 1.01 * sizes[0] + 64 * STEPS, sizes
    # Medians of processor time over whole swings: another process on the machine moves them by a third, a list that
    # is walked or a graph that is kept alive by much more in so many steps.
    first, last = (sorted(part)[len(part) // 2] for part in (seconds[WARM_UP : 2 * WARM_UP], seconds[-WARM_UP:]))
    assert last < 1.5 * first, (first, last)
    # What the last forward left is one forward's; what was said of the bounds was said once each.
    assert len(span._said) <= 2
