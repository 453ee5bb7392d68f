"""Two optimizers stepped as one: the network's, and another rule for the times."""

from typing import Any

from torch.optim import Optimizer

__all__ = ["Together"]


class Together:
    """Both take a step at every iteration. In turn instead: ``torchdyn_mintime.optim.CoordinateDescent``."""

    def __init__(self, parameters: Optimizer, times: Optimizer):
        self.parameters, self.times = parameters, times

    def zero_grad(self) -> None:
        """Of both."""
        self.parameters.zero_grad()
        self.times.zero_grad()

    def step(self) -> None:
        """Of both."""
        self.parameters.step()
        self.times.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"parameters": self.parameters.state_dict(), "times": self.times.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up both."""
        self.parameters.load_state_dict(state["parameters"])
        self.times.load_state_dict(state["times"])
