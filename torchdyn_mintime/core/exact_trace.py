r"""The trace of a normalizing flow's field in closed form, where the field is torchdyn's ``CNF`` over one hidden tanh layer.

For f(z) = W2 tanh(W1 z + b1) + b2, with h the tanh,

    Tr(df/dz) = sum_k (1 - h_k^2) c_k,    c_k = sum_i W1_ki W2_ik,

which takes no call of autograd, where torchdyn's ``autograd_trace`` makes one for each dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchdyn.models.cnf import CNF, autograd_trace

__all__ = ["layers_of", "rate"]


def layers_of(field: Any) -> tuple[nn.Linear, nn.Linear] | None:
    """Returns W1, b1 and W2, b2 of a flow whose trace has the closed form, as the layers that hold them; else None.

    The flow is a ``CNF``, alone or in an ``nn.Sequential``, whose net is ``nn.Sequential(Linear, Tanh, Linear)`` and whose
    trace is that of autograd. None of these modules has a hook, a parametrization or a ``forward`` of its own.

    Args:
        field: the innermost vector field.
    """
    inside = [field]
    if type(field) is nn.Sequential and len(field) == 1:
        inside.append(field[0])
    flow = inside[-1]
    if type(flow) is not CNF or flow.trace_estimator is not autograd_trace or flow.noise_dist is not None:
        return None
    net: Any = flow.net
    if flow.order != 1 or type(net) is not nn.Sequential or [type(m) for m in net] != [nn.Linear, nn.Tanh, nn.Linear]:
        return None
    layers: tuple[Any, ...] = tuple(net)
    first, _, second = layers
    plain = all(_is_plain(m) for m in (*inside, net, *layers))
    return (first, second) if plain and first.in_features == second.out_features else None


def _is_plain(module: nn.Module) -> bool:
    """Returns whether a call of the module is a call of its class's ``forward`` alone."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def rate(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    """Returns [-Tr(df/dz), f(z)] of a state ``x`` = [l, z], ``[batch, 1 + dim]``.

    Args:
        first, second: the layers of f, from :func:`layers_of`.
    """
    h = torch.tanh(F.linear(x[:, 1:], first.weight, first.bias))
    c = (first.weight * second.weight.T).sum(1, keepdim=True)
    return torch.cat([(h * h - 1) @ c, F.linear(h, second.weight, second.bias)], 1)
