"""The training at one depth, on figures that are written down: no model is trained here.

The numbers in these tests are the rules themselves, not the module's constants: a constant that is changed fails here.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdyn_mintime.depth.stage import Stage
from torchdyn_mintime.depth.trials import Trial

TARGET, BOUND = 0.1, 0.01


def stage(**state):
    return Stage(Trial("rk4", 1, 4), **{"weight": TARGET / BOUND, **state})


def observe(one, loss, penalty, *, unit=TARGET, spent=0, **options):
    """One iteration; loss and penalty over their bounds."""
    one.trial.iterations += 1
    one.trial.spent += spent
    return one.observe(loss * TARGET, penalty * BOUND, target=TARGET, unit=unit, bound=BOUND, **options)


def until(condition, one, loss, penalty, most=2000, **options):
    """After how many iterations of these figures the condition holds. A figure may be a function of the iteration."""
    for i in range(1, most):
        observe(one, *(figure(i) if callable(figure) else figure for figure in (loss, penalty)), **options)
        if condition():
            return i
    return math.inf


# ------------------------------------------------------------------------------------------------------------- the weight


@pytest.mark.parametrize(("loss", "penalty", "iterations", "end"), [(1, 9, 231, 100.0), (9, 1, 196, 0.02)])
def test_the_weight_moves_by_2_percent_an_iteration_between_a_fiftieth_and_a_hundred_times_its_first(
    loss, penalty, iterations, end
):
    one, first = stage(), TARGET / BOUND
    assert until(lambda: one.weight == pytest.approx(end * first, rel=1e-12), one, loss, penalty) == iterations
    observe(one, loss, penalty)
    assert one.weight == pytest.approx(end * first, rel=1e-12)


def test_the_weight_moves_by_less_where_the_constraints_are_nearly_even():
    one = stage()
    observe(one, 1.0, 1.1)
    assert one.weight == pytest.approx(10 * 1.1**0.02, rel=1e-9)
    assert until(lambda: False, one, 0.5, 0.5, 50) == math.inf
    assert one.weight == pytest.approx(10 * 1.1**0.02, rel=1e-9)  # both as far from their bounds


@pytest.mark.parametrize(("loss", "moves"), [(9.9, True), (10.1, False)])
def test_the_weight_stays_until_the_loss_is_near_its_target(loss, moves):
    one = stage()
    observe(one, loss, 1000.0)
    assert (one.weight != TARGET / BOUND) == moves


@given(st.floats(-5, 5), st.floats(1e-3, 10), st.floats(0.1, 8), st.floats(0.01, 100))
def test_what_a_loss_is_measured_in_is_its_unit_whatever_the_target_is(target, unit, distance, penalty):
    """A loss of target + unit is as far as a penalty of twice its bound, for targets of any sign."""
    one, like = stage(weight=unit / BOUND), stage()
    for each, t, u in ((one, target, unit), (like, TARGET, TARGET)):
        each.trial.iterations += 1
        each.observe(t + (distance - 1) * u, penalty * BOUND, target=t, unit=u, bound=BOUND)
    assert one.weight / unit == pytest.approx(like.weight / TARGET, rel=1e-6)
    assert one.smooth == pytest.approx(like.smooth, abs=1e-6)


def test_figures_of_zero_and_below_are_fine():
    one = stage()
    for loss in (0.0, 0.0, -100.0):
        observe(one, loss, 0.0)
    one.trial.solver_error = 0.0
    assert one.weight == TARGET / BOUND and not one.misled(0.0, 0.1)
    assert one.smooth == pytest.approx(math.log(1e-3))


# ----------------------------------------------------------------------------------------------------------- the progress


def test_about_twenty_iterations_are_remembered():
    """The mean follows a loss that has fallen by a factor of ten, and is progress as long as it moves."""
    one = stage()
    observe(one, 100.0, 0.0)
    last = 0
    for i in range(1, 200):
        observe(one, 10.0, 0.0)
        last = i if one.since == 0 else last
    # 0.95^n ln 10 of the way is left after n iterations: less than 0.02 from the 93rd on.
    assert last == 111
    assert one.smooth == pytest.approx(math.log(10), abs=1e-3)


@pytest.mark.parametrize(("total", "counts"), [(0.015, False), (0.03, True)])
def test_progress_is_a_fall_by_2_percent(total, counts):
    one = stage()
    observe(one, 5.0, 0.0)
    observe(one, 5.0, 0.0)
    until(lambda: False, one, 5.0 * math.exp(-total), 0.0, 200)
    assert (one.best < math.log(5.0)) == counts


def test_a_slow_fall_is_progress_every_so_often():
    """A fall by a thousandth an iteration is progress every 20 of them, in the long run."""
    one = stage()
    until(lambda: one.trial.iterations == 200, one, lambda i: 5 * math.exp(-1e-3 * i), 0.0)
    longest = 0
    for i in range(201, 400):
        observe(one, 5 * math.exp(-1e-3 * i), 0.0)
        longest = max(longest, one.since)
    assert longest in (19, 20)


def test_the_further_constraint_is_the_progress():
    one = stage()
    until(lambda: False, one, lambda i: 5 * 0.9**i, 2.0, 100)
    assert one.best > math.log(2.0) - 0.1
    assert until(lambda: one.best < math.log(0.5), one, 0.1, lambda i: 2 * 0.9**i) < 60


def test_below_a_thousandth_of_the_bounds_nothing_counts_as_progress():
    """A loss that falls by 5 % an iteration for ever, at a penalty of 0, makes progress until the mean is there."""
    one, last = stage(), 0
    for i in range(1, 400):
        observe(one, 0.95**i, 0.0)
        last = i if one.since == 0 else last
    # ln(1000) / -ln(0.95) = 134.7 iterations, and those in which the mean catches up.
    assert last == 229
    assert one.smooth == pytest.approx(math.log(1e-3), abs=1e-4)


def test_near_is_below_ten_times_the_bounds():
    assert stage(best=math.log(9.9)).near and not stage(best=math.log(10.1)).near


@pytest.mark.parametrize(("loss", "penalty", "short"), [(3.0, 3.1, True), (3.0, 2.9, False)])
def test_the_steps_are_short_where_the_solver_error_is_the_further_constraint(loss, penalty, short):
    one = stage()
    observe(one, loss, penalty)
    assert one.short is short


def test_back_at_the_beginning_everything_but_the_cost_is_forgotten():
    one = stage(reference=8, drops=1, next_check=30)
    until(lambda: False, one, 0.5, 2.0, 50)
    one.trial.solver_error = 0.15
    assert not one.misled(0.02, 0.1)
    assert one.short
    one.restart(7.0)
    assert not one.short
    assert (one.weight, one.failed_looks, one.smooth, one.best, one.since, one.mean_loss) == (
        7,
        0,
        None,
        math.inf,
        0,
        None,
    )
    assert (one.reference, one.drops, one.next_check) == (8, 1, 30)


# --------------------------------------------------------------------------------------------------------------- the hope


def given_up_at(loss, budget=1000, most=400):
    """The share of its budget at which a depth is given up whose loss, over its target, follows this function."""
    one = stage(budget=budget)
    until(lambda: one.hopeless, one, loss, 0.0, most, spent=10)
    return one.trial.spent / budget


def test_a_depth_is_judged_at_a_quarter_or_half_of_its_budget_and_ends_with_it():
    assert given_up_at(3.1) == 0.25  # no progress at all, far from the bounds
    assert given_up_at(2.9) == 0.5  # and near them
    assert given_up_at(lambda i: 5 * math.exp(-i)) == 1.0  # its bounds were met long ago, and it did not pass
    assert given_up_at(lambda i: 5 * math.exp(-i), budget=5000, most=1000) == 1.0


@pytest.mark.parametrize("spent", [10, 30, 50, 70, 130, 300, 1100])
def test_a_budget_of_a_few_iterations_is_no_fault(spent):
    one = stage(budget=1000)
    assert until(lambda: one.hopeless, one, 0.5, 0.5, 400, spent=spent) == max(math.ceil(1000 / spent), 10)


def test_without_a_budget_nothing_is_hopeless_and_no_path_is_kept():
    one = stage()
    assert until(lambda: one.hopeless, one, 5.0, 0.0, 300, spent=10) == math.inf
    assert one.path == []


@pytest.mark.parametrize(("share", "hopeless"), [(1.45, False), (1.55, True)])
@pytest.mark.parametrize(("over", "fall"), [(0.25, 0.2), (0.125, 0.2)])
def test_hope_is_to_reach_the_bounds_within_one_and_a_half_times_the_budget(over, fall, share, hopeless):
    """``best`` falls by ``fall`` over a quarter of the budget near the bounds, by half as much far from them."""
    left = (share - 2 * over) * fall / over
    assert (left < math.log(3)) == (over == 0.25)
    path = [(0.9 * over, 99.0), (over, left + fall), (1.3 * over, left + fall / 2), (1.9 * over, left)]
    one = stage(budget=1000, best=left, path=path)
    one.trial.spent = round(2000 * over) - 1
    assert not one.hopeless  # it is not judged before
    one.trial.spent += 1
    assert one.hopeless == hopeless


def test_the_path_is_written_down_at_every_tenth_iteration():
    one = stage(budget=1000)
    until(lambda: False, one, 5.0, 0.0, 36, spent=10)
    assert [share for share, _ in one.path] == [0.1, 0.2, 0.3]
    assert {best for _, best in one.path} == {one.best}


# --------------------------------------------------------------------------------------------------------------- the look


def looks(losses, penalties, **options):
    one = stage()
    figures = zip(losses, penalties, strict=True)
    return [i for i, (loss, penalty) in enumerate(figures, 1) if observe(one, loss, penalty, **options)]


def test_a_model_within_both_bounds_is_looked_at_every_tenth_iteration():
    assert looks([0.9] * 45, [0.9] * 45) == [1, 11, 21, 31, 41]
    assert looks([0.9] * 45, [0.9] * 45, batches=17) == [1, 18, 35]
    assert looks([1.1] * 20, [0.9] * 20) == looks([0.9] * 20, [1.1] * 20) == []
    assert looks([1.0], [1.0]) == [1]


def test_one_lucky_batch_is_no_proof():
    """The mean of a pass must be below the target, and the last loss too."""
    assert looks([1.5, 0.9] * 50, [0.5] * 100, batches=2) == []
    assert looks([1.5, 0.2] * 8, [0.5] * 16, batches=2) == [2, 12]
    lucky = [2.0, *[0.9] * 30]
    assert looks(lucky, [0.5] * 31, batches=1)[0] == 2
    first = looks(lucky, [0.5] * 31, batches=8)[0]
    assert 0.9 + 1.1 * (7 / 8) ** (first - 1) <= 1 < 0.9 + 1.1 * (7 / 8) ** (first - 2)


@pytest.mark.parametrize(
    ("error", "ratio", "misled"),
    [
        (0.15, 1.68, False),
        (0.15, 1.70, True),  # 1.3 times the error that the penalty shows
        (0.10, 100.0, False),  # the error is within its bound: something else has failed
        (0.101, 100.0, True),
    ],
)
def test_a_reference_hides_an_error_of_more_than_1_3_times_what_it_shows(error, ratio, misled):
    one = stage()
    one.trial.solver_error = error
    assert one.misled(error**2 / ratio, 0.1) == misled
    assert one.failed_looks == (0 if misled else 1)


def test_the_fourth_look_that_fails_in_a_row_is_the_references_fault_too():
    one = stage()
    one.trial.solver_error = 0.05
    assert [one.misled(0.01, 0.1) for _ in range(8)] == [False, False, False, True] * 2
