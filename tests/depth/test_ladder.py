"""Which depth comes next: the ladder against a world in which a solver passes from some number of steps on."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdyn_mintime.depth.ladder import evaluations_of, first_depth, next_depth
from torchdyn_mintime.depth.trials import Trial


def climb(solver, enough, **options):
    """All trials of a search that begins with ``solver``, where ``enough`` says how many steps each solver needs."""
    trials, depth = [], first_depth(solver)
    while depth is not None:
        name, steps = depth
        passed = steps >= enough.get(name, math.inf)
        trials.append(Trial(name, steps, evaluations_of(name, steps), passed=passed))
        depth = next_depth(trials, **options)
    return trials


def steps_of(trials, solver):
    return [trial.steps for trial in trials if trial.solver == solver]


def test_upward_one_step_at_a_time_and_then_by_two_fifths():
    """Each number that is skipped may be the one that is enough; each that is tried costs a training."""
    assert steps_of(climb("rk4", {}), "rk4") == [1, 2, 3, 4, 6, 9, 13, 19, 27, 38, 54]
    assert steps_of(climb("euler", {}, max_steps=5), "euler") == [1, 2, 3, 4]
    assert steps_of(climb("euler", {}, max_steps=1), "euler") == [1]


def test_an_adaptive_solver_begins_with_two_steps():
    assert first_depth("tsit5") == ("tsit5", 2) and first_depth("midpoint") == ("midpoint", 1)
    assert steps_of(climb("tsit5", {"tsit5": 4}), "tsit5") == [2, 3, 4]


@pytest.mark.parametrize(
    ("solver", "steps", "evaluations"),
    [("rk4", 3, 12), ("midpoint", 3, 6), ("euler", 3, 3), ("tsit5", 2, 14), ("dopri5", 3, 20)],
)
def test_evaluations(solver, steps, evaluations):
    assert evaluations_of(solver, steps) == evaluations


@given(rk4=st.integers(1, 30), midpoint=st.integers(1, 80))
def test_downward_the_fewest_steps_of_the_cheaper_solver_are_found(rk4, midpoint):
    trials = climb("rk4", {"rk4": rk4, "midpoint": midpoint})
    tried = steps_of(trials, "midpoint")
    passed = [trial for trial in trials if trial.passed]
    first = passed[0]
    assert first.solver == "rk4" and not any(trial.passed for trial in trials[: trials.index(first)])
    assert tried[0] == min(first.steps, (first.evaluations - 1) // 2)
    assert len(set(tried)) == len(tried) and max(tried) < 2 * first.steps
    # Down to the fewest, or to one evaluation below rk4's where midpoint needs as many.
    best = min(passed, key=lambda trial: trial.evaluations)
    assert best.evaluations == (2 * midpoint if 2 * midpoint < first.evaluations else first.evaluations)
    assert len(tried) <= 2 + math.log2(2 * first.steps)  # by bisection


def test_downward_by_bisection():
    assert steps_of(climb("rk4", {"rk4": 9}), "midpoint") == [9, 13, 15, 16, 17]
    assert steps_of(climb("rk4", {"rk4": 9, "midpoint": 11}), "midpoint") == [9, 13, 11, 10]
    assert steps_of(climb("rk4", {"rk4": 9, "midpoint": 1}), "midpoint") == [9, 4, 2, 1]


def test_the_solvers_to_try_can_be_given_and_go_in_their_order():
    enough = {"rk4": 3, "midpoint": 4, "euler": 5}
    assert {trial.solver for trial in climb("rk4", enough)} == {"rk4", "midpoint"}
    assert {trial.solver for trial in climb("rk4", enough, solvers=[])} == {"rk4"}
    trials = climb("rk4", enough, solvers=["midpoint", "euler"])
    assert list(dict.fromkeys(trial.solver for trial in trials)) == ["rk4", "midpoint", "euler"]
    assert min((t for t in trials if t.passed), key=lambda t: t.evaluations).evaluations == 5
    assert {trial.solver for trial in climb("midpoint", enough)} == {"midpoint"}


def test_what_is_tried_is_always_cheaper_than_the_best_so_far():
    trials = climb("rk4", {"rk4": 9, "midpoint": 2, "euler": 3}, solvers=["midpoint", "euler"])
    best = math.inf
    for trial in trials:
        assert trial.evaluations < best
        best = trial.evaluations if trial.passed else best
