r"""Optimizers of times.

SNOpt (Liu, Chen and Theodorou, 2021) minimises Phi(t_f) + (c/2) t_f^2 by a Gauss-Newton step. With g = dPhi/dt_f, which
is <f(t_f, z(t_f)), dPhi/dz(t_f)>, and averages E over the iterations,

    t_f <- t_f - lr * E[g + c t_f] / E[g^2 + c].

TO-FLOW (Du et al., 2022) takes the parameters and the time in turn, each by its own optimizer: coordinate descent.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchdyn_mintime.core import checks

__all__ = ["CoordinateDescent", "GaussNewtonTime"]


class GaussNewtonTime(torch.optim.Optimizer):
    """Updates times as SNOpt does: by a Gauss-Newton step on averaged gradients, every so many iterations.

    It reads the gradient that backward left at the times, that of the loss without any price of time: the price here is
    that of (c/2) t^2. It costs no evaluation. Give the other parameters to another optimizer, and call ``step`` and
    ``zero_grad`` of both in every iteration. A LearnableSpan clips t_f to its bounds by itself; SNOpt's floor is a lower
    bound of 0.1.

    Args:
        params: times: ``span.t_f``, and ``span.t0`` with ``learn_t0``.
        lr: share of the Gauss-Newton step that is taken.
        price: c, loss per unit of time squared.
        decay: of the exponential averages.
        every: iterations between two updates, 50 to 100 in the paper.

    Raises:
        ValueError: a value that cannot be used, or a parameter that is not a scalar.

    Example:
        >>> t_f = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = GaussNewtonTime([t_f], lr=0.1, price=0.0, every=1)
        >>> (2 * t_f).backward()  # g = 2
        >>> optimizer.step()
        >>> round(t_f.item(), 4)  # 1 - 0.1 * 2 / 4
        0.95
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        price: float = 6e-4,
        decay: float = 0.99,
        every: int = 50,
    ):
        for name, value in (("lr", lr), ("price", price)):
            checks.number(value, name, least=0)
        checks.number(decay, "decay", least=0, below=1)
        checks.count(every, "every", 1)
        super().__init__(params, {"lr": lr, "price": price, "decay": decay, "every": every})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.numel() != 1:
                raise ValueError(f"GaussNewtonTime updates times, which are scalars; got the shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Averages the gradients; at every ``every``-th call, updates the times."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, c = self.state[p], group["price"]
        slope = gradient + c * p
        curvature = gradient.square() + c
        if not state:
            # The first values stand for the averages, which are then of one scale and need no correction.
            state["step"], state["slope"], state["curvature"] = 0, slope.clone(), curvature.clone()
        else:
            state["slope"].lerp_(slope, 1 - group["decay"])
            state["curvature"].lerp_(curvature, 1 - group["decay"])
        state["step"] += 1
        due = state["step"] % group["every"] == 0 and state["curvature"].item() > 0
        # Written in any case: a span sees by it that an optimizer has its time, which may not move for long.
        p.sub_(group["lr"] * state["slope"] / state["curvature"] if due else 0.0)


class CoordinateDescent:
    """Takes two optimizers in turn (TO-FLOW): the parameters for some iterations, then the times for some.

    Args:
        parameters: the optimizer of everything but the times.
        times: that of the times.
        turns: iterations of each before the other's turn.

    Example:
        >>> net, t_f = torch.nn.Linear(1, 1), torch.nn.Parameter(torch.tensor(1.0))
        >>> first, second = torch.optim.Adam(net.parameters()), torch.optim.SGD([t_f], lr=0.1)
        >>> optimizer = CoordinateDescent(first, second, turns=(2, 1))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     (net(torch.ones(1, 1)).sum() + t_f).backward()
        ...     optimizer.step()
        >>> round(t_f.item(), 2)  # one iteration of three
        0.9
    """

    def __init__(
        self, parameters: torch.optim.Optimizer, times: torch.optim.Optimizer, turns: tuple[int, int] = (10, 1)
    ):
        if len(turns) != 2 or not all(isinstance(n, int) and n >= 1 for n in turns):
            raise ValueError(f"turns must be two whole numbers, 1 or more; got {turns!r}")
        self.parameters, self.times, self.turns = parameters, times, turns
        self._count = 0

    def zero_grad(self) -> None:
        """Clears the gradients of both."""
        self.parameters.zero_grad()
        self.times.zero_grad()

    def step(self) -> None:
        """Takes a step of the one whose turn it is."""
        if self._count % sum(self.turns) < self.turns[0]:
            self.parameters.step()
            with torch.no_grad():
                for p in (p for group in self.times.param_groups for p in group["params"]):
                    p.add_(0.0)  # a span sees by it that an optimizer has its time
        else:
            self.times.step()
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both, and whose turn it is."""
        return {"parameters": self.parameters.state_dict(), "times": self.times.state_dict(), "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.parameters.load_state_dict(state_dict["parameters"])
        self.times.load_state_dict(state_dict["times"])
        self._count = state_dict["count"]
