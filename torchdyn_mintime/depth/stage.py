r"""The training at one depth: the weight of its penalty, its progress, and when a look at the exact solution pays.

A depth has two constraints: the loss against its target, and the penalty (the square of the solver error, or the count
of steps) against its bound. What is trained is

    loss + w * penalty,    with w = unit / bound at first, so that both terms reach their bounds together,

where the loss is the mean of the loss at the steps taken and the loss at the end of a finer reference. ``unit`` is the unit
of the loss: the target itself, or the slack if the target was made from it.

Once the loss is near its target, w follows the two constraints. It grows while the penalty is further from its bound than
the loss is from its target, and falls otherwise. Before that w stays as it is: with a weight that falls early the model
leaves the ODE while it learns.
"""

import math
from dataclasses import dataclass, field

from torchdyn_mintime.depth.trials import Trial

__all__ = ["Stage"]

WEIGHT_RATE = 0.02
"""The weight changes by this share of itself an iteration, at most: with 2 % the network can follow."""
WEIGHT_RANGE = (0.02, 100.0)
"""The least and the largest weight, over its first value."""
NEAR = 10.0
"""The weight moves where the loss is below this many times its target."""
SMOOTHING = 0.95
"""The share of the last mean in the next one: about twenty iterations are remembered."""
PROGRESS = 0.02
"""A stage makes progress when the constraint that is further from its bound falls by this share (2 %) below its best."""
SOLVED = 1e-3
"""A constraint below this share of its bound counts as one at it: to fall further is no progress."""
LOOK_EVERY = 10
"""The fewest iterations between two checks against the exact solution; a pass over the batches, if that is more."""
HIDDEN = 1.3**2
"""The reference is too coarse where the squared solver error is this many times the penalty, or more."""
FAILED_LOOKS = 4
"""The reference is refined after this many looks in a row that failed for another reason."""
JUDGED_OVER, CLOSE = 1 / 4, 3.0
"""The progress over this share of the budget is judged, from twice that share on. The share is half as large while the
constraint that is further from its bound is still above CLOSE times that bound."""
HOPE = 1.5
"""A depth ends if, at its recent speed, it would reach its bounds only after this many times its budget."""
TINY = 1e-12
"""Keeps the logarithm of zero finite; its size decides nothing."""


@dataclass
class Stage:
    """The training at one depth, so far.

    Attributes:
        trial: what it has reached.
        weight: of the penalty, in units of loss.
        first: its first loss.
        smooth: logarithm of (constraint / bound), for the one that is further from its bound; mean of about 20 iterations.
        best: the lowest ``smooth`` that counted as progress.
        since: iterations since then.
        drops: how often the learning rate was lowered.
        next_check: the iteration from which a look at the exact solution is worth it again.
        mean_loss: of about as many iterations as there are batches.
        reference: steps of rk4 in the solution that the steps are compared with.
        failed_looks: at the exact solution, in a row.
        short: whether the steps are too few: the solver error is further from its bound than the loss is from its target.
        pull: positive if that was so over the last 20 iterations or so; a mean of the same sign.
        budget: forward evaluations of the field, after which the depth is given up.
        path: the share of the budget that was spent, and ``best``, at every tenth iteration.
    """

    trial: Trial
    weight: float = math.nan
    first: float | None = None
    smooth: float | None = None
    best: float = math.inf
    since: int = 0
    drops: int = 0
    next_check: int = 0
    mean_loss: float | None = None
    reference: int = 4
    failed_looks: int = 0
    short: bool = False
    pull: float = 0.0
    budget: float = math.inf
    path: list[tuple[float, float]] = field(default_factory=list)

    @property
    def near(self) -> bool:
        """Whether both constraints have been near their bounds."""
        return self.best < math.log(NEAR)

    @property
    def hopeless(self) -> bool:
        """Whether the budget is spent, or the recent progress is too slow to reach the bounds."""
        share = self.trial.spent / self.budget
        # Near the bounds the batches' noise hides the progress for a while.
        over = JUDGED_OVER if self.best < math.log(CLOSE) else JUDGED_OVER / 2
        if share < 2 * over or not self.path:
            return False
        before = next((best for spent, best in self.path if spent >= share - over), self.path[-1][1])
        gain = max(before - self.best, TINY) / over
        return share >= 1.0 or share + self.best / gain > HOPE

    def restart(self, weight: float) -> None:
        """Forgets the progress, as the model goes back to where it began."""
        self.smooth, self.best, self.since, self.mean_loss = None, math.inf, 0, None
        self.failed_looks, self.short, self.pull, self.weight = 0, False, 0.0, weight

    def observe(
        self, loss: float, penalty: float, *, target: float, unit: float, bound: float, batches: int = 1
    ) -> bool:
        """Takes in the figures of one iteration, and moves the weight.

        Args:
            loss, penalty: of the iteration.
            target, bound: theirs.
            unit: of the loss; a loss of ``target + unit`` is as far from its target as twice the bound is from the bound.
            batches: how many a pass has. One lucky batch is no proof: the mean of a pass must meet the target too.

        Returns:
            Whether a look at the exact solution is worth it: loss and penalty are within their bounds.
        """
        trial = self.trial
        trial.training_loss = min(trial.training_loss, loss)
        gap, error_gap = max(1.0 + (loss - target) / unit, 0.0), penalty / bound
        pull = min(max(math.log((error_gap + TINY) / (gap + TINY)), -1.0), 1.0)
        self.pull = SMOOTHING * self.pull + (1 - SMOOTHING) * pull
        if gap < NEAR:
            low, high = (share * (unit / bound) for share in WEIGHT_RANGE)
            wanted = self.weight * math.exp(WEIGHT_RATE * pull)
            self.weight = min(max(wanted, low), high)
        self.short = error_gap > gap
        score = math.log(max(gap, error_gap, SOLVED))
        self.smooth = score if self.smooth is None else SMOOTHING * self.smooth + (1 - SMOOTHING) * score
        self.since += 1
        if self.smooth < self.best - PROGRESS:
            self.best, self.since = self.smooth, 0
        if trial.iterations % 10 == 0 and math.isfinite(self.budget):
            self.path.append((trial.spent / self.budget, self.best))
        beta = 1.0 - 1.0 / batches
        self.mean_loss = loss if self.mean_loss is None else beta * self.mean_loss + (1 - beta) * loss
        met = max(loss, self.mean_loss) <= target and error_gap <= 1.0 and trial.iterations >= self.next_check
        if met:
            self.next_check = trial.iterations + max(LOOK_EVERY, batches)
        return met

    def misled(self, penalty: float, solver_tol: float) -> bool:
        """Counts a look that failed; returns whether the reference hides what it shows, and must be refined."""
        self.failed_looks += 1
        error = self.trial.solver_error
        hidden = error > solver_tol and error**2 > HIDDEN * penalty
        if not (hidden or self.failed_looks >= FAILED_LOOKS):
            return False
        self.failed_looks = 0
        return True
