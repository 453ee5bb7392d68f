r"""The training at one depth: the weight of its penalty, its progress, and when a look at the exact solution pays.

A depth has two constraints: the loss against its target, and the penalty (the square of the solver error, or the count
of steps) against its bound. What is trained is

    loss + w * penalty,    with w = target / bound at first, so that both terms reach their bounds together.

Once the loss is near its target, w follows the two constraints: it grows while the penalty is further from its bound than
the loss is from its own, and falls in the other case. Before that it stays: a weight that falls early lets the model leave
the ODE while it learns.
"""

import math
from dataclasses import dataclass

from torchdyn_mintime.depth.trials import Trial

__all__ = ["Stage"]

WEIGHT_RATE = 0.02
"""The weight changes by this share of itself an iteration, at most: with 2 % the network can follow."""
WEIGHT_RANGE = (0.25, 100.0)
"""The least and the largest weight, over its first value."""
NEAR = 10.0
"""The weight moves where the loss is below this many times its target."""
SMOOTHING = 0.95
"""The share of the last mean in the next one: about twenty iterations are remembered."""
PROGRESS = 0.02
"""A stage makes progress when its further constraint falls by this share (2 %) below its best."""
SOLVED = 1e-3
"""A constraint below this share of its bound counts as one at it: to fall further is no progress."""
LOOK_EVERY = 10
"""Iterations between two looks at the exact solution, at least; a pass over the batches, where that is more."""
MOST_HIDDEN = 4.0
"""The penalty is corrected where the squared solver error is up to this many times as large; beyond it is misled."""
TINY = 1e-12
"""Keeps the logarithm of zero finite; its size decides nothing."""


@dataclass
class Stage:
    """The training at one depth, so far.

    Attributes:
        trial: what it has reached.
        weight: of the penalty, in units of loss.
        smooth: logarithm of the further constraint over its bound, the mean of about twenty iterations.
        best: the lowest ``smooth`` that counted as progress.
        since: iterations since then.
        drops: how often the learning rate was lowered.
        next_check: the iteration from which a look at the exact solution is worth it again.
        mean_loss: of about as many iterations as there are batches.
        refinement: into how many parts the penalty splits each step.
        scale: the squared solver error over the penalty, where a look at the exact solution has shown that it is more.
    """

    trial: Trial
    weight: float = math.nan
    smooth: float | None = None
    best: float = math.inf
    since: int = 0
    drops: int = 0
    next_check: int = 0
    mean_loss: float | None = None
    refinement: int = 0
    scale: float = 1.0

    @property
    def near(self) -> bool:
        """Whether both constraints have been near their bounds."""
        return self.best < math.log(NEAR)

    def restart(self, weight: float) -> None:
        """Forgets the progress, as the model goes back to where it began."""
        self.smooth, self.best, self.since, self.mean_loss = None, math.inf, 0, None
        self.scale, self.weight = 1.0, weight

    def observe(self, loss: float, penalty: float, *, target: float, bound: float, batches: int = 1) -> bool:
        """Takes in the figures of one iteration, and moves the weight.

        Args:
            loss, penalty: of the iteration.
            target, bound: theirs.
            batches: how many a pass has. One lucky batch is no proof: the mean of a pass must meet the target too.

        Returns:
            Whether a look at the exact solution is worth it: loss and penalty are within their bounds.
        """
        trial = self.trial
        trial.loss = min(trial.loss, loss)
        gap, error_gap = loss / target, self.scale * penalty / bound
        if gap < NEAR:
            low, high = (share * (target / bound) for share in WEIGHT_RANGE)
            pull = math.log((error_gap + TINY) / (gap + TINY))
            wanted = self.weight * math.exp(WEIGHT_RATE * min(max(pull, -1.0), 1.0))
            self.weight = min(max(wanted, low), high)
        score = math.log(max(gap, error_gap, SOLVED))
        self.smooth = score if self.smooth is None else SMOOTHING * self.smooth + (1 - SMOOTHING) * score
        self.since += 1
        if self.smooth < self.best - PROGRESS:
            self.best, self.since = self.smooth, 0
        beta = 1.0 - 1.0 / batches
        self.mean_loss = loss if self.mean_loss is None else beta * self.mean_loss + (1 - beta) * loss
        met = max(loss, self.mean_loss) <= target and error_gap <= 1.0 and trial.iterations >= self.next_check
        if met:
            self.next_check = trial.iterations + max(LOOK_EVERY, batches)
        return met

    def misled(self, penalty: float) -> bool:
        """Corrects the penalty by the solver error that a look has shown; returns whether it hid too much of it.

        The steps and their parts then agree on something that is not the ODE, and training does not find back from there.
        """
        ratio = self.trial.solver_error**2 / max(penalty, 1e-30)
        self.scale = min(max(ratio, 1.0), MOST_HIDDEN)
        return ratio > MOST_HIDDEN
