"""Derivatives along the flow in closed form."""

import torch

from torchdyn_mintime.losses.trajectory import differentiable, gradients, rate_of_change


def test_the_rate_of_change_and_its_own_by_hand(float64):
    """For z' = -2 z and g = t z^2: dg/dt = z^2 - 4 t z^2, and d^2g/dt^2 = -8 z^2 + 16 t z^2."""
    t, z = torch.tensor(0.7, requires_grad=True), torch.randn(5, requires_grad=True)
    velocity = -2 * z
    first = rate_of_change(t * z**2, t, z, velocity)
    second = rate_of_change(first, t, z, velocity)
    assert torch.allclose(first, z**2 - 4 * t * z**2)
    assert torch.allclose(second, -8 * z**2 + 16 * t * z**2)


def test_what_does_not_depend_on_an_input_has_no_rate():
    t, z = torch.tensor(0.7, requires_grad=True), torch.randn(5, requires_grad=True)
    assert torch.equal(rate_of_change(torch.ones(5), t, z, z), torch.zeros(5))
    by_t, by_z = gradients(z.sum(), (t, z))
    assert by_t == 0 and torch.equal(by_z, torch.ones(5))


def test_a_tensor_that_carries_a_gradient_is_taken_as_it_is():
    plain = torch.ones(2)
    own = differentiable(plain)
    assert own.requires_grad and not plain.requires_grad
    assert differentiable(own) is own
