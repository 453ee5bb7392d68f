"""Spans, potentials and checks of gradients that several tests of the losses use."""

import math

import torch
from differences import assert_close, difference, directions_like
from problems import random_model

import torchdyn_mintime as tm

FIXED, ADAPTIVE = ("euler", "midpoint", "rk4"), ("dopri5", "tsit5")
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
# Five-point differences of a value that may be as small as 1e-6 itself: its rounding error, 1e-16 of the states, is
# 1e-12 over a step of 1e-4.
EXACT = 1e-5

T_SPAN = torch.linspace(0, 1, 6, dtype=torch.float64)


def make_span(kind, solver, seed=0, steps=4, t_f=0.75, **options):
    model = random_model(kind, seed=seed, solver=solver, **options)
    points = 2 if solver in ADAPTIVE else steps + 1
    template = torch.linspace(0, 1, points, dtype=torch.float64)
    span = tm.LearnableSpan(model.node, template, t_f=t_f, bounds=(0.01, 2.0), learn_t0=True).eval()
    return span, model


def assert_gradients(value, held, tensors, rtol=EXACT):
    """value().backward() against differences of held(), for every group of tensors; held() keeps what is detached."""
    flat = [t for group in tensors.values() for t in group]
    for tensor in flat:
        tensor.grad = None
    value().backward()
    norm = math.sqrt(sum(float(t.grad.square().sum()) for t in flat if t.grad is not None))
    for name, group in tensors.items():
        directions = directions_like(group, 1)
        analytic = sum(float((t.grad * d).sum()) for t, d in zip(group, directions, strict=True) if t.grad is not None)
        assert_close(analytic, difference(held, group, directions), norm, rtol, name)


def square(z, *target):
    return z.square().reshape(z.shape[0], -1).sum(1)
