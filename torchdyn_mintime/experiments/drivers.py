"""Who moves t_f, and when training is over."""

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchdyn_mintime.numerics.integrate import IntegrationError

if TYPE_CHECKING:
    from torchdyn_mintime.experiments.training import Run

__all__ = ["Driver", "Grow", "GrowAlone", "KeepTarget", "Search"]

SEARCH_ITERATIONS = 20
"""How many times the iterations of other methods a search may take; each of its own is far cheaper."""


class Driver:
    """The plain one: so many iterations, and the optimizer moves t_f if it is a parameter.

    Attributes:
        first_stage: iterations of the first of two stages; None where there is one stage.
        owns_rates: whether it sets the learning rates, so that nobody else must.
    """

    first_stage: int | None = None
    owns_rates = False

    def start(self, run: "Run") -> None:
        """Before the first iteration."""

    def penalty(self, run: "Run") -> Tensor | float:
        """A term of the loss that the driver sets itself."""
        return 0.0

    def before_step(self, run: "Run", loss: Tensor) -> bool:
        """Between backward and the optimizer's step, with the terminal loss. Returns whether the step is taken."""
        return True

    def after_step(self, run: "Run", loss: Tensor) -> None:
        """After the optimizer's step."""

    def recovers(self, run: "Run", error: Exception) -> bool:
        """After an iteration that failed: whether another state was found to go on from, or to end with."""
        return False

    def done(self, run: "Run") -> bool:
        """Whether training is over."""
        return len(run.history.loss) >= run.settings.iterations

    def finish(self, run: "Run") -> None:
        """After the last iteration."""

    def structure(self, run: "Run") -> dict[str, Any]:
        """What of the model its state_dict does not hold."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a stopped run needs to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a stopped run."""


class KeepTarget(Driver):
    """Minimum-time with the price of time found for a target loss."""

    def start(self, run: "Run") -> None:
        from torchdyn_mintime.weighting import TargetLoss

        self.price = TargetLoss(run.model, run.settings.target)

    def before_step(self, run: "Run", loss: Tensor) -> bool:
        self.price.step(loss)
        return True

    def finish(self, run: "Run") -> None:
        self.price.restore_best()

    def state_dict(self) -> dict[str, Any]:
        return self.price.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.price.load_state_dict(state)


class Grow(Driver):
    """Algorithm 2: after the iterations of pre-training, t_f grows until the loss is met.

    Looked at is the loss of each iteration, or its mean over each pass where the data comes in batches. With
    ``patience=0`` it is the paper's code: t_f grows at every look, and the optimizer starts afresh with each growth. With
    patience t_f grows when the loss has not improved for so many looks, and the optimizer goes on.
    """

    def __init__(self, patience: int = 0):
        self.patience = patience

    def start(self, run: "Run") -> None:
        from torchdyn_mintime.growth import DepthGrowth

        self.growth = DepthGrowth(run.model.node, run.settings.target, patience=self.patience)
        self.first_stage = run.settings.iterations

    def after_step(self, run: "Run", loss: Tensor) -> None:
        since = len(run.history.loss) - (self.first_stage or 0)
        if since < 0 or since % run.per_pass:
            return
        value = fmean(run.history.loss[-run.per_pass :])
        grew = self.growth.step(value)
        if grew and self.patience == 0:
            run.renew_optimizer()
        elif not grew and self.growth.exhausted and not self.growth.done:
            run.failure = f"t_f grew to {self.growth.max_t_f:g} and the loss is still {value:.3g}"

    def done(self, run: "Run") -> bool:
        return self.growth.done

    def state_dict(self) -> dict[str, Any]:
        return self.growth.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.growth.load_state_dict(state)


class GrowAlone(Grow):
    """Growth without pre-training, on the terminal loss.

    With all data at once, a loss that explodes is gone back from, at half the rate.
    """

    owns_rates = True

    def __init__(self, patience: int = 20):
        super().__init__(patience)

    def start(self, run: "Run") -> None:
        from torchdyn_mintime.growth import Rescue

        super().start(run)
        self.first_stage = None
        self.rescue = Rescue(run.model, run.optimizer)

    def before_step(self, run: "Run", loss: Tensor) -> bool:
        # A batch's loss says too little to go back for.
        if run.per_pass == 1 and self.rescue.look(loss.item()):
            self.growth.restart()
            return False
        return True

    def recovers(self, run: "Run", error: Exception) -> bool:
        if run.per_pass > 1 or not isinstance(error, IntegrationError | FloatingPointError):
            return False
        self.rescue.look(math.inf)
        self.growth.restart()
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**self.growth.state_dict(), "rescue": self.rescue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "rescue" in state:  # not in those of older versions
            self.rescue.load_state_dict(state["rescue"])


class Search(Driver):
    """The fewest evaluations at which the loss is met and the model is its own ODE.

    Attributes:
        limit: iterations, at most.
    """

    owns_rates = True

    def start(self, run: "Run") -> None:
        from torchdyn_mintime.shallow import Shallowest

        self.limit = SEARCH_ITERATIONS * run.settings.iterations
        self.search = Shallowest(target=run.settings.target)
        self.search.batches_seen_together = run.per_pass
        self.search.start(run.model, run.optimizer)

    def penalty(self, run: "Run") -> Tensor:
        return self.search.penalty()

    def after_step(self, run: "Run", loss: Tensor) -> None:
        self.search.step(loss, run.loss_again)

    def recovers(self, run: "Run", error: Exception) -> bool:
        if not isinstance(error, IntegrationError | FloatingPointError):
            return False
        self.search.diverged(str(error))
        return True

    def done(self, run: "Run") -> bool:
        return self.search.done or len(run.history.loss) >= self.limit

    def finish(self, run: "Run") -> None:
        if not self.search.finish().feasible:
            run.failure = "no number of steps met the target as a true ODE"

    def structure(self, run: "Run") -> dict[str, Any]:
        return {"steps": run.model.node.steps, "solver": run.model.node._stepper.name}

    def state_dict(self) -> dict[str, Any]:
        return self.search.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.search.load_state_dict(state)
