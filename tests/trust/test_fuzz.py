"""Bad arguments at random: `TypeError`, `ValueError` or `IntegrationError`, the argument named, no hang, nothing changed.

Every call starts from arguments that work, one or two of which are replaced by something that a tired user, a
configuration file or a diverged training might hand over.
"""

import math
import random
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from profiles import PROFILE
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import GrowDepth, MinimumTime
from torchdyn_mintime.lightning import Shallowest as ShallowestCallback
from torchdyn_mintime.numerics.integrate import integrate

CASES = 10_000 if PROFILE == "thorough" else 320
LIMIT = 20  # seconds for one call; they take milliseconds, but the machine may be busy

NUMBERS = [
    math.nan, math.inf, -math.inf, 0, -0.0, -1, -3.5, 1e-300, 1e300, 2**70, 1e-9, 0.5, 1, 3, True, False, 1j,
    10**400, -(10**400), np.float32(0.5),
]  # fmt: skip
OTHERS = [
    None, "", "0.5", "rk4", "nonsense", b"1", [], [1.0], [0.0, 1.0], (0.2, 0.1), (0.5, 0.5), (-1.0, 2.0), (1, 2, 3),
    (math.nan, 1.0), (0.1, math.inf), ("a", "b"), {}, {"a": 1}, set(), object(), int, print, lambda *a: a, ...,
    range(3), np.float64(0.5), np.array([0.0, 1.0]), np.nan,
]  # fmt: skip
TENSORS = [
    lambda: torch.tensor(0.5), lambda: torch.tensor(math.nan), lambda: torch.tensor([]), lambda: torch.tensor([1.0]),
    lambda: torch.linspace(0, 1, 5), lambda: torch.linspace(1, 0, 5), lambda: torch.linspace(2, 3, 4),
    lambda: torch.linspace(-1, 1, 4), lambda: torch.tensor([0.0, 1.0, 1.0]), lambda: torch.tensor([0.0, math.nan]),
    lambda: torch.tensor([0.0, math.inf]), lambda: torch.tensor([0, 1]), lambda: torch.tensor([True, False]),
    lambda: torch.zeros(3, 2), lambda: torch.full((3, 2), math.nan), lambda: torch.full((3, 2), math.inf),
    lambda: torch.full((3, 2), 1e38), lambda: torch.zeros(3, 5), lambda: torch.zeros(0, 2), lambda: torch.zeros(3, 0),
    lambda: torch.zeros(2), lambda: torch.zeros(()), lambda: torch.zeros(2, 3, 2), lambda: torch.zeros(3, 2).double(),
    lambda: torch.zeros(3, 2).half(), lambda: torch.zeros(3, 2, dtype=torch.complex64), lambda: torch.zeros(3, 2).long(),
    lambda: torch.zeros(3, 2).to_sparse(), lambda: torch.zeros(3, 2, device="meta"), lambda: torch.eye(2),
]  # fmt: skip
MODULES = [lambda: nn.Linear(2, 2), lambda: nn.Sequential(), lambda: nn.Identity(), lambda: make_span()]


def bad(chance):
    kind = chance.random()
    if kind < 0.4:
        return chance.choice(NUMBERS)
    if kind < 0.65:
        return chance.choice(OTHERS)
    return chance.choice(TENSORS)() if kind < 0.95 else chance.choice(MODULES)()


def make_node(solver="rk4", sensitivity="autograd"):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    return NeuralODE(net, solver=solver, sensitivity=sensitivity)


def make_span(solver="rk4", **options):
    return tm.LearnableSpan(make_node(solver, **options), torch.linspace(0, 1, 5))


def x():
    return torch.ones(3, 2)


def end(out, *_):
    return (out[1][-1] if isinstance(out, tuple) else out).square().mean()


def potential(z):
    return z.square().sum(-1)


def set_to(name):
    return lambda target, value: setattr(target, name, value)


# name: (the call, its arguments as they work). The first argument, if it is a span, must be left as it was.
CALLS = {
    "LearnableSpan": (
        lambda node, **k: tm.LearnableSpan(node, **k),
        dict(node=make_node, t_span=lambda: torch.linspace(0, 1, 5), t_f=0.8, bounds=(0.2, 1.5), step_size=0.25),
    ),
    "LearnableSpan, adaptive": (
        lambda node, **k: tm.LearnableSpan(node, **k),
        dict(node=lambda: make_node("tsit5"), t_span=lambda: torch.linspace(0, 1, 3), t_f=0.8, bounds=(0.2, 1.5)),
    ),
    "forward": (lambda span, **k: span(**k), dict(span=make_span, x=x, t_span=None, save_at=(), args=None)),
    "forward, adaptive": (
        lambda span, **k: span(**k),
        dict(span=lambda: make_span("dopri5"), x=x, t_span=None, save_at=()),
    ),
    "forward, adjoint": (
        lambda span, **k: span(**k),
        dict(span=lambda: make_span("tsit5", sensitivity="adjoint"), x=x, t_span=None),
    ),
    "trajectory": (lambda span, **k: span.trajectory(**k), dict(span=make_span, x=x, t_span=None)),
    "grid": (lambda span, t_span: span.grid(t_span), dict(span=make_span, t_span=None)),
    "span.t_span": (set_to("t_span"), dict(span=make_span, t_span=lambda: torch.linspace(0, 1, 5))),
    "span.bounds": (set_to("bounds"), dict(span=make_span, bounds=(0.25, 1.0))),
    "span.step_size": (set_to("step_size"), dict(span=make_span, step_size=0.25)),
    "span.solver": (set_to("solver"), dict(span=make_span, solver="rk4")),
    "wrap": (lambda model, **k: tm.wrap(model, **k), dict(model=make_node, t_span=None, t_f=None, bounds=None)),
    "unwrap": (lambda model, x: tm.unwrap(model, x), dict(model=make_span, x=x)),
    "spans": (lambda model: list(tm.spans(model)), dict(model=make_span)),
    "parameter_groups": (
        lambda model, **k: tm.parameter_groups(model, **k),
        dict(model=make_span, lr=0.1, span_lr=0.1, weight_decay=0.0),
    ),
    "DepthGrowth": (
        lambda span, **k: tm.DepthGrowth(span, **k),
        dict(span=make_span, threshold=0.1, increment=0.1, max_t_f=1.5, patience=0, improvement=0.01),
    ),
    "DepthGrowth.step": (
        lambda growth, metric: growth.step(metric),
        dict(growth=lambda: tm.DepthGrowth(make_span(), 0.1), metric=1.0),
    ),
    "TargetLoss": (lambda model, **k: tm.TargetLoss(model, **k), dict(model=make_span, target=0.1, max_t_f=1.5)),
    "TargetLoss.step": (
        lambda price, loss: price.step(loss),
        dict(price=lambda: tm.TargetLoss(make_span(), 0.1), loss=1.0),
    ),
    "Shallowest": (
        lambda **k: tm.Shallowest(**k),
        dict(target=0.1, slack=0.02, solver_tol=0.1, budget=None, solvers=None, accept=None),
    ),
    "StepCount": (
        lambda model, **k: tm.StepCount(model, **k),
        dict(model=lambda: make_span(solver="tsit5"), steps=2, weight=1.0),
    ),
    "StepDoubling": (lambda model, **k: tm.StepDoubling(model, **k), dict(model=make_span, weight=1.0, refinement=2)),
    "LyapunovRegularizer": (
        lambda model, **k: tm.LyapunovRegularizer(model, **k),
        dict(model=make_span, potential=lambda: potential, rate=1.0),
    ),
    "trim": (
        lambda model, **k: tm.trim(model, **k),
        dict(model=make_span, batches=lambda: [x()], loss=lambda: end, threshold=100.0, slack=0.02, solver_tol=None),
    ),
    "MinimumTime": (lambda **k: MinimumTime(**k), dict(weight=None, target=None, monitor=None)),
    "GrowDepth": (
        lambda **k: GrowDepth(**k),
        dict(threshold=0.1, monitor=None, increment=0.1, patience=0, max_t_f=None, pretraining=0),
    ),
    "lightning.Shallowest": (lambda **k: ShallowestCallback(**k), dict(target=0.1, solver_tol=0.1)),
}
# Calls of a method: the object itself is not replaced.
METHODS = ("forward", "trajectory", "grid", "span.", "DepthGrowth.step", "TargetLoss.step")
# Functions of the user's own, which may raise what they like; one that is no function must be refused as any argument.
CALLED = {("trim", "loss")}
# Counts, such as of steps to wait: no float is made of them.
HUGE = {
    ("DepthGrowth", "patience"),
    ("GrowDepth", "patience"),
    ("GrowDepth", "pretraining"),
    ("StepDoubling", "refinement"),
    ("StepCount", "steps"),
}


# Warnings are errors here: of a span that reaches beyond what is learned, for one.
ALLOWED = (TypeError, ValueError, UserWarning, tm.IntegrationError)


def value_of(given):
    # The arguments that work are made anew for each case; a function that is itself an argument comes in a function.
    return given() if callable(given) else given


@contextmanager
def limited(seconds):
    """An error where the call does not end. By a signal where there is one, else by the clock afterwards."""
    start = time.monotonic()
    alarm = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def stop(*_):
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop) if alarm else None
    if alarm:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 2 * seconds


def state_of(model):
    """All of a span or a node that a refused call must leave alone."""
    if isinstance(model, tm.DepthGrowth):
        return {}, tuple(model.state_dict().items()), state_of(model.span)[1]
    if isinstance(model, tm.TargetLoss):
        return {}, {name: value for name, value in model.state_dict().items() if name != "state"}, None
    if not isinstance(model, nn.Module):
        return None
    found = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    span = model if isinstance(model, tm.LearnableSpan) else None
    rest = (span.interval, span.t_span.tolist(), span.training, type(span.solver)) if span else None
    return found, rest, model.training


def same(a, b):
    if a is None:
        return b is None
    parameters = a[0].keys() == b[0].keys() and all(
        torch.equal(p, b[0][n][0]) and r == b[0][n][1] and g is b[0][n][2] for n, (p, r, g) in a[0].items()
    )
    return parameters and a[1:] == b[1:]


def names_it(message, changed, values):
    """Whether the text points at one of the arguments that were replaced: by name, or by what was received."""
    text = message.lower()
    for name in changed:
        value = values[name]
        words = {name.lower(), name.replace("_", " ").lower(), type(value).__name__.lower(), *WORDS.get(name, ())}
        if isinstance(value, torch.Tensor):
            words |= {str(tuple(value.shape)), str(value.dtype)}
        elif value is not None:
            words.add(repr(value).lower()[:40])
        if any(word in text for word in words):
            return True
    return False


# What else an argument goes by in a message.
WORDS = {
    "x": ("state", "field", "shape"),
    "t_span": ("span", "template", "t0"),
    "t_f": ("t_f", "bounds"),
    "bounds": ("bound", "template", "t_f"),
    "save_at": ("save_at", "time"),
    "args": ("args",),
    "node": ("neuralode",),
    "span": ("learnablespan", "module", "span"),
    "model": ("learnablespan", "neuralode", "module", "span"),
    "step_size": ("step", "span"),
    "solver": ("solver", "step"),
    "metric": ("metric",),
    "loss": ("loss",),
    "lr": ("rate",),
    "batches": ("batch",),
    "threshold": ("threshold", "loss"),
    "weight": ("weight",),
    "max_t_f": ("max_t_f",),
}


def cases():
    chance = random.Random(2024)
    for number in range(CASES):
        name = list(CALLS)[number % len(CALLS)]
        yield number, name, chance.randrange(2**32)


def apply(name, values):
    """The call: its first argument by place where the function names it otherwise."""
    call, names = CALLS[name][0], list(values)
    if name.startswith("span."):
        return call(*values.values())
    if names[0] in ("span", "node", "model", "growth", "price"):
        return call(values[names[0]], **{k: values[k] for k in names[1:]})
    return call(**values)


def one_case(name, seed):
    chance = random.Random(seed)
    given = CALLS[name][1]
    names = list(given)
    open_to_change = names[1:] if name.startswith(METHODS) else names
    changed = chance.sample(open_to_change, min(len(open_to_change), 1 if chance.random() < 0.8 else 2))
    values = {key: bad(chance) if key in changed else value_of(value) for key, value in given.items()}
    unchecked = any(name == call and key in changed and callable(values[key]) for call, key in CALLED)
    first = values[names[0]]
    before = state_of(first)
    what = f"{name}({', '.join(f'{k}={values[k]!r}' for k in changed)})"
    try:
        with limited(LIMIT):
            apply(name, values)
    except ALLOWED as error:
        assert str(error), what  # noqa: PT017
        if unchecked:
            return
        message = " ".join([str(error), *getattr(error, "__notes__", ())])
        assert names_it(message, changed, values), f"{what}: {error}"  # noqa: PT017
        assert same(before, state_of(first)), f"{what} was refused and changed the model"
    except Exception as error:
        if unchecked and not isinstance(error, AssertionError):
            return
        raise AssertionError(f"{what} ended in {type(error).__name__}: {error}") from error
    else:
        if name.startswith(("forward", "grid", "trajectory")):
            # A call that works: t_f may be filled from a first span or clipped, the weights stay.
            after = state_of(first)
            assert before is None or all(
                torch.equal(p, after[0][n][0]) for n, (p, _, _) in before[0].items() if "." in n
            )


def test_bad_arguments_at_random(monkeypatch):
    # A solve that never ends is refused at a limit of steps, lowered here for time's sake.
    monkeypatch.setitem(integrate.__kwdefaults__, "max_steps", 500)
    failures = []
    for number, name, seed in cases():
        try:
            one_case(name, seed)
        except AssertionError as error:
            failures.append(f"{number} (seed {seed}): {error}")
    assert not failures, f"{len(failures)} of {CASES}:\n" + "\n".join(failures[:60])


NUMERIC = [
    (name, key)
    for name, (_, arguments) in CALLS.items()
    for key, value in arguments.items()
    if isinstance(value, int | float) or key in ("slack", "solver_tol", "span_lr", "target")
]


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["large", "small", "beyond its own text"])
@pytest.mark.parametrize("name, key", NUMERIC, ids=[", ".join(case) for case in NUMERIC])
def test_an_integer_beyond_a_float_is_named(name, key, value):
    if (name, key) in HUGE and value > 0:
        pytest.skip("a whole number as large as one likes is fine here")
    values = {k: value_of(v) for k, v in CALLS[name][1].items()} | {key: value}
    with pytest.raises(ValueError, match=f"{key}|{key.replace('_', ' ')}"):
        apply(name, values)


@pytest.mark.parametrize("name", CALLS)
def test_the_arguments_that_work_do(name):
    apply(name, {key: value_of(value) for key, value in CALLS[name][1].items()})
