"""States in float16 and bfloat16: the field is evaluated in their type, and the state is summed in float32."""

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.nn import DepthCat

import torchdyn_mintime as tm

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place, relative."""


def make(dtype, solver="rk4", points=101, timed=False, checkpoint=False, sensitivity="autograd"):
    torch.manual_seed(0)
    first = [DepthCat(1), nn.Linear(3, 16)] if timed else [nn.Linear(2, 16)]
    net = nn.Sequential(*first, nn.Tanh(), nn.Linear(16, 2))
    node = NeuralODE(net, solver=solver, sensitivity=sensitivity)
    return tm.LearnableSpan(node, torch.linspace(0, 1, points), checkpoint=checkpoint).to(dtype)


# An adaptive solver that lands on each of many points says so.
@pytest.mark.filterwarnings("ignore:the .* times asked for have cut the solve:UserWarning")
@pytest.mark.parametrize("half", UNIT)
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "tsit5", "dopri5"])
@pytest.mark.parametrize("points", [11, 101, 1001])
def test_the_end_is_as_exact_as_the_field_however_many_the_steps(half, solver, points):
    x = torch.randn(64, 2)
    ends = [make(dtype, solver, points)(x.to(dtype))[1][-1] for dtype in (torch.float64, half)]
    assert ends[1].dtype == half
    # The state is rounded as it comes, in every evaluation and as it goes.
    assert (ends[1].double() - ends[0]).abs().max().item() <= 3 * UNIT[half] * ends[0].abs().max().item()


@pytest.mark.parametrize("half", UNIT)
def test_a_small_increment_is_not_lost(half):
    node = NeuralODE(lambda t, z: torch.ones_like(z), solver="rk4")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 1001))
    _, sol = span(torch.full((1, 1), 8.0, dtype=half))
    assert sol[-1].item() == 9.0  # in half precision 8 + .001 is 8


@pytest.mark.parametrize("half", UNIT)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("way", ["autograd", "checkpoint", "adjoint", "interpolated_adjoint"])
@pytest.mark.parametrize("timed", [False, True])
def test_gradients_have_the_types_of_what_they_belong_to(half, solver, way, timed):
    gradients = []
    x0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float64, half):
        sensitivity = "autograd" if way == "checkpoint" else way
        span = make(dtype, solver, 21, timed, way == "checkpoint", sensitivity)
        x = x0.to(dtype).requires_grad_()
        span(x)[1][-1].float().square().sum().backward()
        parameters = list(span.node.vf.parameters())
        assert x.grad.dtype == dtype and all(p.grad.dtype == dtype for p in parameters)
        assert span.t_f.grad.dtype.itemsize >= 4
        gradients.append(
            torch.cat([g.double().flatten() for g in (span.t_f.grad, x.grad, *[p.grad for p in parameters])])
        )
    # Autograd adds up the parameters' gradients of all evaluations in their own type: 20 steps of 4 to 6 roundings.
    assert (gradients[1] - gradients[0]).norm() <= 40 * UNIT[half] * gradients[0].norm()


@pytest.mark.parametrize("half", UNIT)
def test_a_state_too_large_for_its_type_is_an_error(half):
    largest = torch.finfo(half).max
    node = NeuralODE(lambda t, z: torch.zeros_like(z) + largest / 2, solver="euler")
    span = tm.LearnableSpan(node, torch.linspace(0, 4, 5))
    # bfloat16 ends where float32 does, so that the sum itself overflows.
    reason = "too large for torch.float16" if half == torch.float16 else "not finite after step 3"
    with pytest.raises(tm.IntegrationError, match=reason):
        span(torch.zeros(1, 1, dtype=half))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_the_default_type_does_not_round_the_template(default, solver):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver=solver))
        assert span.t_f.dtype == torch.float32
        assert torch.equal(span.t_span, torch.linspace(0, 1, 2 if span.adaptive else 101, dtype=torch.float32))
        assert torch.equal(span(torch.ones(1, 2))[0].detach(), span.t_span)
    finally:
        torch.set_default_dtype(before)
