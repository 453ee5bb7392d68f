"""The records of a search: what a depth costs, and how a verdict says what was found."""

import math
from dataclasses import replace

import pytest

from torchdyn_mintime.depth.trials import Depth, Trial, Verdict, fewest


@pytest.mark.parametrize(
    ("solver", "steps", "evaluations"),
    [
        ("rk4", 3, 12),
        ("midpoint", 3, 6),
        ("euler", 3, 3),
        ("learned-3", 1, 3),
        ("learned-12", 1, 12),
        # Six new evaluations a step, since the last one is the first of the next, and two for the size of the first step.
        ("tsit5", 2, 14),
        ("dopri5", 3, 20),
    ],
)
def test_evaluations(solver, steps, evaluations):
    assert Depth(solver, steps).evaluations == evaluations


def passed(*depths, **figures):
    trial = Trial.at(depths)
    trial.passed = True
    for name, value in figures.items():
        setattr(trial, name, value)
    return trial


def test_a_trial_counts_all_spans_and_names_each():
    trial = Trial.at([Depth("rk4", 2), Depth("learned-3", 1)])
    assert (trial.solver, trial.steps, trial.evaluations, trial.label) == ("rk4", 2, 11, "2 x rk4 + learned-3")
    assert trial.every == (Depth("rk4", 2), Depth("learned-3", 1))
    assert Trial("rk4", 2, 8).every == (Depth("rk4", 2),)  # a trial of an older version has no depths


def test_the_fewest_are_those_that_passed_and_the_last_of_equals():
    trials = [passed(Depth("rk4", 2)), passed(Depth("midpoint", 4)), Trial.at([Depth("euler", 1)])]
    assert fewest(trials) is trials[1] and fewest(trials[2:]) is None


def test_a_verdict_shows_its_front_and_says_everything_in_words():
    first = passed(Depth("rk4", 4), solver_error=0.001, iterations=50, seconds=1.25, loss=0.1, reference_loss=0.11)
    best = passed(Depth("learned-3", 1), solver_error=0.05, loss=0.12, reference_loss=0.13, changed=0.01)
    failed = Trial.at([Depth("learned-2", 1)])
    verdict = Verdict(True, best, [best, failed, first], 0.15, 0.1, 321)
    assert verdict.front == [first, best]
    assert str(verdict).splitlines() == [
        "found 3 evaluations (learned-3): loss 0.12 and 0.13 solved exactly (target 0.15), solver error 0.05 of the "
        "displacement (tolerance 0.1), 1.0% of predictions change when solved exactly, 321 iterations",
        "  learned-3: passed after 0 iterations, 0.0 s, loss 0.12 / 0.13, solver error 0.05",
        "  learned-2: not tried any more",
        "  4 x rk4: passed after 50 iterations, 1.2 s, loss 0.1 / 0.11, solver error 0.001",
    ]
    nothing = Verdict(False, failed, [failed], None, 0.1, 0)
    assert "(target none)" in str(replace(nothing, target=math.inf))  # a metric whose target is not known yet
    assert str(nothing).startswith("NOT found: the last trial was 2 evaluations (learned-2): loss not measured (target")
    half = Verdict(False, Trial("rk4", 4, 16, loss=0.5), [Trial("rk4", 4, 16, 7, loss=0.5)], 0.1, 0.1, 7)
    assert str(half).splitlines() == [
        "NOT found: the last trial was 16 evaluations (4 x rk4): loss 0.5 (target 0.1), solver error not measured "
        "(tolerance 0.1), 7 iterations",
        "  4 x rk4: failed after 7 iterations, 0.0 s, loss 0.5",
    ]
    assert "(target none)" in str(nothing) and "predictions" not in str(nothing) and nothing.front == []


def test_a_loss_that_was_measured_on_held_out_batches_alone_is_shown_in_words():
    trial = Trial.at([Depth("rk4", 4)])
    trial.held_out_loss = 0.25
    shown = str(Verdict(False, trial, [trial], 0.02, 0.1, 7))
    assert "(4 x rk4): loss not measured, at most 0.25 on held-out batches (target 0.02), " in shown


def test_a_metric_is_shown_under_its_name_and_without_the_sign_that_makes_it_smaller():
    best = passed(Depth("euler", 1), solver_error=0.09, loss=-0.75, reference_loss=-0.76)
    failed = Trial.at([Depth("learned-2", 1)])
    failed.training_loss, failed.missed = 0.54, "loss"
    looked = replace(failed, loss=-0.7)
    assert str(Verdict(True, best, [best, failed, looked], -0.73, 0.1, 9, "accuracy", -1.0)).splitlines() == [
        "found 1 evaluation (1 x euler): accuracy 0.75 and 0.76 solved exactly (target 0.73), solver error 0.09 of the "
        "displacement (tolerance 0.1), 9 iterations",
        "  1 x euler: passed after 0 iterations, 0.0 s, accuracy 0.75 / 0.76, solver error 0.09",
        "  learned-2: failed after 0 iterations, 0.0 s, the accuracy missed the target, lowest loss in training 0.54",
        "  learned-2: failed after 0 iterations, 0.0 s, the accuracy missed the target, accuracy 0.7",
    ]
