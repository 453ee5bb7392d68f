"""The next depth to try: a pure function of what was tried.

The search goes down. The first depth solves nearly any field well. If its solver error is too large, the search goes on with
twice the steps. After the first depth that passed, each trial has fewer evaluations than the best one so far. It follows the
main way first. After a failure it lies between the fewest evaluations that passed and the most that failed. Where a stock
solver failed, learned ones of fewer evaluations are tried first.

Several spans go down together until that fails, and then one after the other.
"""

from collections.abc import Collection, Sequence

from torchdyn_mintime.depth.trials import Depth, Trial, fewest
from torchdyn_mintime.numerics import Stepper, make_stepper

__all__ = ["DEFAULT", "first_depth", "next_depths", "rungs"]

DEFAULT = ("rk4", "learned", "euler")
"""The solvers that a search may take by default. Euler is taken for one step only."""

MAIN_WAY = (16, 8, 4, 3, 2, 1)
"""The numbers of evaluations that are tried first."""

# For so many evaluations, what to take first, of what is allowed.
_CHOICES: dict[int, tuple[Depth, ...]] = {
    16: (Depth("rk4", 4), Depth("midpoint", 8), Depth("euler", 16)),
    12: (Depth("rk4", 3), Depth("midpoint", 6), Depth("euler", 12)),
    8: (Depth("rk4", 2), Depth("midpoint", 4), Depth("euler", 8)),
    6: (Depth("learned-6", 1), Depth("midpoint", 3), Depth("euler", 6)),
    5: (Depth("learned-5", 1), Depth("euler", 5)),
    4: (Depth("learned-4", 1), Depth("midpoint", 2), Depth("rk4", 1), Depth("euler", 4)),
    3: (Depth("learned-3", 1), Depth("euler", 3)),
    2: (Depth("learned-2", 1), Depth("midpoint", 1), Depth("euler", 2)),
    1: (Depth("euler", 1),),
}
STOCK = ("rk4", "midpoint", "euler")
"""Solvers of fixed steps. A search may replace one of them by another."""


def rungs(own: str, allowed: Collection[str] | None = None) -> list[Depth]:
    """Returns the depths of a span below its first one, from the most evaluations to the fewest.

    Args:
        own: name of the span's solver. A LearnableSolver is searched as rk4 is; another solver that is not in ``STOCK`` is
            not replaced by others.
        allowed: names of solvers, "learned" for LearnableSolvers; default ``DEFAULT``. The span's own solver is always allowed.

    Example:
        >>> [str(depth) for depth in rungs("rk4")]
        ['4 x rk4', '3 x rk4', '2 x rk4', 'learned-6', 'learned-5', 'learned-4', 'learned-3', 'learned-2', '1 x euler']
        >>> [str(depth) for depth in rungs("rk4", [])]
        ['4 x rk4', '3 x rk4', '2 x rk4', '1 x rk4']
    """
    mine = {"rk4", "learned"} if own.startswith("learned-") else {own}
    if not mine & set(STOCK):
        return [Depth(own, steps) for steps in (16, 8, 4, 3, 2, 1)]
    names = {*mine, *(DEFAULT if allowed is None else allowed)}

    def permitted(depth: Depth) -> bool:
        return ("learned" if depth.stages else depth.solver) in names

    found = (next(filter(permitted, choices), None) for choices in _CHOICES.values())
    return [depth for depth in found if depth is not None]


def first_depth(own: str, allowed: Collection[str] | None = None) -> Depth:
    """Returns the depth that a span begins with. An adaptive solver begins with two steps, the fewest it can take.

    To take the whole way in its first step, an adaptive solver would have to find next to no movement.
    """
    return Depth(own, 2) if _adaptive(own) else rungs(own, allowed)[0]


def next_depths(
    trials: Sequence[Trial], own: Sequence[str], allowed: Collection[str] | None = None, max_steps: int = 64
) -> tuple[Depth, ...] | None:
    """Returns the depths to try next, one for each span, or None at the end.

    Args:
        trials: what was tried, one at least.
        own: names of the spans' own solvers.
        allowed: names of solvers that may be taken.
        max_steps: of a solve, at most.

    Example:
        >>> first = Trial.at([Depth("rk4", 4)])
        >>> str(next_depths([first], ["rk4"])[0])
        '8 x rk4'
        >>> first.passed = True
        >>> str(next_depths([first], ["rk4"])[0])
        '2 x rk4'
    """
    best = fewest(trials)
    if best is None:
        more = tuple(
            first_depth(name, allowed) if depth.stages else Depth(depth.solver, 2 * depth.steps)
            for depth, name in zip(trials[-1].every, own, strict=True)
        )
        return more if all(depth.steps <= max_steps for depth in more) else None
    if any(_adaptive(name) for name in own):
        return None  # it began with the fewest steps
    failed = [trial.every for trial in trials if not trial.passed]
    present = best.every
    together = tuple(_below(depth, rungs(name, allowed), ()) or depth for depth, name in zip(present, own, strict=True))
    if _differing(together, present) > 1 and not any(_differing(trial, present) > 1 for trial in failed):
        return together
    order = sorted(range(len(own)), key=lambda i: -present[i].evaluations)
    for i in order:
        # What failed beside deeper spans fails beside shallower ones.
        alone = [trial[i] for trial in failed if _as_deep(trial, present, i)]
        lower = _below(present[i], rungs(own[i], allowed), alone)
        if lower is not None:
            return (*present[:i], lower, *present[i + 1 :])
    return None


def _below(present: Depth, candidates: Sequence[Depth], failed: Collection[Depth]) -> Depth | None:
    """Returns the next depth below the present one: on the main way, or in the middle of what may lie above a failure.

    What a LearnableSolver failed at is too few evaluations for all. What a stock solver failed at is not for learned ones.
    """
    below = [depth for depth in failed if depth.evaluations < present.evaluations]
    most = max((depth.evaluations for depth in below), default=-1)
    most_learned = max((depth.evaluations for depth in below if depth.stages), default=-1)
    between = [
        depth
        for depth in candidates
        if (most_learned if depth.stages else most) < depth.evaluations < present.evaluations
    ]
    if not between:
        return None
    if not below:
        return next((depth for depth in between if _on_main_way(depth)), between[0])
    learned = [depth for depth in between if depth.stages]
    among = learned if most > most_learned and learned else between
    return among[(len(among) - 1) // 2]


def _differing(one: Sequence[Depth], other: Sequence[Depth]) -> int:
    """Returns how many spans have another depth."""
    return sum(a != b for a, b in zip(one, other, strict=True))


def _as_deep(one: Sequence[Depth], other: Sequence[Depth], left_out: int) -> bool:
    """Returns whether no span of the one has fewer evaluations than in the other, but for that left out."""
    pairs = enumerate(zip(one, other, strict=True))
    return all(a.evaluations >= b.evaluations for i, (a, b) in pairs if i != left_out)


def _on_main_way(depth: Depth) -> bool:
    return depth.evaluations in MAIN_WAY


def _adaptive(name: str) -> bool:
    stepper: Stepper | None = None if name.startswith("learned-") else make_stepper(name)
    return stepper is not None and stepper.adaptive
