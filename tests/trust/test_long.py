"""A long run: t_f moves through both bounds again and again; memory stays flat, no step gets slower, no point is lost."""

import gc
import itertools
import resource
import statistics
import time
import tracemalloc

import pytest
import torch
from profiles import PROFILE
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


def resident():
    """Peak memory of this process, in the system's unit."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def training(solver, sensitivity, timed):
    torch.manual_seed(0)
    net = nn.Sequential(DepthCat(1), nn.Linear(2, 1)) if timed else nn.Linear(1, 1)
    node = NeuralODE(net, solver=solver, sensitivity=sensitivity)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 3), bounds=(0.2, 1.7))
    return span, torch.optim.SGD(tm.parameter_groups(span, lr=1e-3, span_lr=0.1), lr=1e-3)


def train_once(span, optimizer, step):
    t_eval, sol = span(torch.ones(2, 1))
    # The price of time changes its sign: t_f runs beyond one bound, is clipped, and comes back.
    price = 1.0 if step // (PERIOD // 2) % 2 else -1.0
    (1e-3 * sol[-1].square().mean() + price * t_eval[-1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    span.clip_()
    return t_eval.detach(), sol.detach()


def pace(old, new):
    """Processor time of a step of the old training over one of the new, medians of alternating steps at equal t_f."""
    seconds = ([], [])
    for step in range(2 * PERIOD):
        for (span, optimizer), taken in zip((old, new), seconds, strict=True):
            with torch.no_grad():
                span.t_f.fill_(1.2)
            start = time.process_time()
            train_once(span, optimizer, step)
            taken.append(time.process_time() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


@pytest.mark.parametrize(
    "solver, sensitivity, timed", [("rk4", "autograd", True), ("tsit5", "autograd", False), ("euler", "adjoint", False)]
)
def test_a_long_run_keeps_its_memory_and_its_pace(solver, sensitivity, timed, caplog):
    span, optimizer = training(solver, sensitivity, timed)
    lower, upper = span.bounds
    reached, counts, sizes, held = set(), [], [], 0
    tracemalloc.start()
    try:
        for step in range(STEPS):
            t_eval, sol = train_once(span, optimizer, step)
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
                held = held or resident()
                counts.append(objects())
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert reached == {"lower", "upper"}
    # 1 % is asked, of the objects and of the process. What Python has allocated is next to nothing: its free lists of
    # floats and tuples fill up by some 40 KB, a single tensor kept at every step would be more than ten times that.
    assert max(counts[1:]) <= 1.01 * counts[0], counts
    assert max(sizes[1:]) <= sizes[0] + 64 * 1024, sizes
    assert resident() <= 1.01 * held, (resident(), held)
    # The pace is that of a new training, a step of each in turn: a busy machine slows both alike, a list that is walked
    # or a graph that is kept alive slows the old one by much more in so many steps.
    new = training(solver, sensitivity, timed)
    ratios = [pace((span, optimizer), new) for _ in range(3)]
    assert min(ratios) < 1.2, ratios
    # That a bound was met is said once for each.
    assert len([record for record in caplog.records if "was clipped" in record.message]) == 2
