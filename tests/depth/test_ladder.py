"""Which depth comes next: the ladder against worlds in which some depths pass and others do not."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdyn_mintime.depth.ladder import first_depth, next_depths, rungs
from torchdyn_mintime.depth.trials import Depth, Trial, fewest

NAMES = ("rk4", "midpoint", "euler", "learned-3", "alf")
ALLOWED = st.none() | st.lists(st.sampled_from(["rk4", "midpoint", "euler", "learned"]), max_size=3)


def search(own, passes, allowed=None, max_steps=64):
    """All trials of a search over spans with these solvers, where ``passes`` says of the depths whether they do."""
    trials, depths = [], tuple(first_depth(name, allowed) for name in own)
    while depths is not None:
        trials.append(Trial.at(depths))
        trials[-1].passed = passes(depths)
        depths = next_depths(trials, own, allowed, max_steps)
        assert len(trials) < 200
    return trials


def labels(own, need, **options):
    """What is tried for one span that passes from so many evaluations on."""
    return [t.label for t in search([own], lambda depths: depths[0].evaluations >= need, **options)]


FIRST = ["4 x rk4", "2 x rk4"]


def test_below_a_first_depth_of_more_steps_four_are_next():
    given = Trial.at([Depth("rk4", 8)])
    given.passed = True
    assert next_depths([given], ["rk4"]) == (Depth("rk4", 4),)


@pytest.mark.parametrize(
    ("need", "below"),
    [
        (1, ["learned-4", "learned-3", "learned-2", "1 x euler"]),
        (2, ["learned-4", "learned-3", "learned-2", "1 x euler"]),
        (3, ["learned-4", "learned-3", "learned-2"]),
        (4, ["learned-4", "learned-3"]),
        (5, ["learned-4", "learned-6", "learned-5"]),
        (6, ["learned-4", "learned-6", "learned-5"]),
        (7, ["learned-4", "learned-6"]),
        (8, ["learned-4", "learned-6"]),
        (9, ["learned-4", "learned-6", "3 x rk4"]),
        (13, ["learned-4", "learned-6", "3 x rk4"]),
    ],
)
def test_down_the_main_way_and_between_a_pass_and_a_failure_after_it(need, below):
    assert labels("rk4", need) == FIRST + below
    assert labels("learned-2", need) == FIRST + below  # a span that has a learned solver is searched like any other


def test_learned_solvers_are_tried_where_steps_of_a_stock_solver_failed():
    def tried(passes):
        return [t.label for t in search(["rk4"], lambda depths: passes(depths[0]))]

    way = [*FIRST, "learned-4", "learned-3", "learned-2", "1 x euler"]
    assert tried(lambda depth: depth.stages or depth.evaluations > 8) == way
    assert tried(lambda depth: depth.stages == 6 or depth.evaluations > 12) == [
        *FIRST,
        "learned-4",
        "learned-6",
        "learned-5",
    ]


def test_up_by_twice_the_steps_until_it_passes():
    learned = ["learned-4", "learned-6"]  # what four steps of rk4 failed at may not be too few for these
    assert labels("rk4", 17) == labels("rk4", 32) == ["4 x rk4", "8 x rk4", *learned]
    assert labels("rk4", 100) == ["4 x rk4", "8 x rk4", "16 x rk4", "32 x rk4", *learned]
    assert labels("rk4", 17, allowed=[]) == ["4 x rk4", "8 x rk4"]
    assert labels("rk4", math.inf) == ["4 x rk4", "8 x rk4", "16 x rk4", "32 x rk4", "64 x rk4"]
    assert labels("rk4", math.inf, max_steps=15) == ["4 x rk4", "8 x rk4"]
    assert labels("rk4", math.inf, max_steps=8) == ["4 x rk4", "8 x rk4"]
    assert labels("rk4", math.inf, max_steps=7) == ["4 x rk4"]


@pytest.mark.parametrize(
    ("own", "allowed", "expected"),
    [
        ("rk4", [], ["4 x rk4", "2 x rk4", "1 x rk4"]),
        ("midpoint", [], ["8 x midpoint", "4 x midpoint", "2 x midpoint", "1 x midpoint"]),
        ("euler", [], ["16 x euler", "8 x euler", "4 x euler", "3 x euler", "2 x euler", "1 x euler"]),
        ("rk4", ["midpoint"], ["4 x rk4", "2 x rk4", "2 x midpoint", "1 x midpoint"]),
        ("rk4", ["euler"], ["4 x rk4", "2 x rk4", "1 x rk4", "3 x euler", "2 x euler", "1 x euler"]),
        ("rk4", ["learned"], ["4 x rk4", "2 x rk4", "learned-4", "learned-3", "learned-2"]),
        ("midpoint", None, [*FIRST, "learned-4", "learned-3", "learned-2", "1 x euler"]),
        ("learned-3", [], ["4 x rk4", "2 x rk4", "learned-4", "learned-3", "learned-2"]),
        ("alf", None, ["16 x alf", "8 x alf", "4 x alf", "3 x alf", "2 x alf", "1 x alf"]),
    ],
)
def test_the_solvers_that_may_be_taken_are_the_spans_own_and_those_allowed(own, allowed, expected):
    assert labels(own, 0, allowed=allowed) == expected


def test_the_depths_in_between():
    def names(own, allowed=None):
        return [str(depth) for depth in rungs(own, allowed)]

    assert names("rk4") == ["4 x rk4", "3 x rk4", "2 x rk4", *(f"learned-{s}" for s in (6, 5, 4, 3, 2)), "1 x euler"]
    assert names("rk4", []) == ["4 x rk4", "3 x rk4", "2 x rk4", "1 x rk4"]
    assert names("midpoint", []) == [f"{n} x midpoint" for n in (8, 6, 4, 3, 2, 1)]
    assert names("euler", []) == [f"{n} x euler" for n in (16, 12, 8, 6, 5, 4, 3, 2, 1)]
    assert names("midpoint", ["rk4", "learned"]) == names("rk4")[:-1]


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
def test_an_adaptive_solver_begins_with_two_steps_and_ends_with_the_first_that_pass(solver):
    first = first_depth(solver)
    assert first == Depth(solver, 2)
    assert labels(solver, 0) == labels(solver, 0, allowed=["euler"]) == [f"2 x {solver}"]
    assert labels(solver, first.evaluations + 1) == [f"2 x {solver}", f"4 x {solver}"]


def test_several_spans_go_down_together_until_that_fails_and_then_one_after_the_other():
    tried = [t.label for t in search(["rk4", "rk4"], lambda d: d[0].evaluations >= 3 and d[1].evaluations >= 1)]
    assert tried == [
        "4 x rk4 + 4 x rk4",
        "2 x rk4 + 2 x rk4",
        "learned-4 + learned-4",
        "learned-3 + learned-3",
        "learned-2 + learned-2",  # fails for the first of them
        "learned-2 + learned-3",
        "learned-3 + learned-2",
        "learned-3 + 1 x euler",
    ]


def test_the_span_of_the_most_evaluations_goes_first():
    trial = Trial.at([Depth("rk4", 2), Depth("rk4", 4)])
    failed = Trial.at([Depth("learned-4", 1), Depth("rk4", 2)])
    trial.passed = True
    assert next_depths([trial, failed], ["rk4", "rk4"]) == (Depth("rk4", 2), Depth("rk4", 2))


@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), ALLOWED, st.integers(0, 10**6), st.floats(0, 1))
def test_whatever_passes_no_depth_is_tried_twice_and_each_is_cheaper_than_the_best(own, allowed, seed, share):
    """Where what passes has no order at all, too."""
    world: dict = {}

    def passes(depths):
        return world.setdefault(depths, random.Random(f"{seed} {depths}").random() < share)

    trials = search(own, passes, allowed)
    tried = [trial.every for trial in trials]
    assert len(set(tried)) == len(tried)
    best = math.inf
    for trial in trials:
        assert trial.evaluations < best or not any(t.passed for t in trials)
        best = trial.evaluations if trial.passed else best
        for name, depth in zip(own, trial.every, strict=True):
            mine = {"rk4", "learned"} if name == "learned-3" else {name}
            others = set() if name == "alf" else {"rk4", "learned", "euler"} if allowed is None else set(allowed)
            assert ("learned" if depth.stages else depth.solver) in mine | others


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 16)), min_size=1, max_size=3), ALLOWED)
def test_each_span_ends_at_the_fewest_evaluations_that_are_enough_for_it(spans, allowed):
    own, needs = zip(*spans, strict=True)
    trials = search(own, lambda d: all(a.evaluations >= b for a, b in zip(d, needs, strict=True)), allowed)
    for name, need, depth in zip(own, needs, fewest(trials).every, strict=True):
        assert depth == min(
            (d for d in rungs(name, allowed) if d.evaluations >= need), key=lambda depth: depth.evaluations
        )
    if len(own) == 1:
        assert len(trials) <= 6


@given(st.integers(1, 40), st.sampled_from(["rk4", "midpoint"]))
def test_several_spans_end_at_the_fewest_whatever_it_takes_to_begin(need, second):
    own = ["rk4", second]
    trials = search(own, lambda d: d[0].evaluations >= need, [])
    best = fewest(trials)
    assert best is not None and best.every[1].steps == 1


@pytest.mark.parametrize("name", ["rk4", "learned-8"])
def test_a_learned_first_depth_that_fails_is_followed_by_the_usual_one(name):
    first = Trial.at([Depth("learned-8", 1)])
    assert [str(depth) for depth in next_depths([first], [name])] == ["4 x rk4"]
    first.passed = True
    assert [str(depth) for depth in next_depths([first], [name])] == ["learned-4"]
