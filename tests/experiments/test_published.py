"""The settings of the paper's appendix F, and of its code where the appendix is silent, each asserted."""

import pytest
from torch import nn

from torchdyn_mintime.experiments import comparison, datasets, tables
from torchdyn_mintime.experiments.methods import METHODS
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import Run


def layers(task: str, part: str) -> list[tuple[int, int]]:
    own = TASKS[task]
    parts = own.parts(own.settings)
    return [(m.in_features, m.out_features) for m in parts[part].modules() if isinstance(m, nn.Linear)]


def row(number: str, task: str, **wanted) -> comparison.Row:
    """The one row of a table that is as published and has these fields."""
    rows = [r for r in tables.TABLES[number][1][task] if r.published or r.method == "vanilla"]
    (found,) = [r for r in rows if all(getattr(r, name) == value for name, value in wanted.items())]
    return found


@pytest.mark.parametrize("task", ["moons", "annuli", "mnist", "fashion-mnist", "cifar10", "flow-moons", "flow-circles"])
def test_vanilla_takes_steps_of_a_hundredth_of_rk4_on_0_to_1(task):
    own = TASKS[task]
    assert own.node.get("solver", "rk4") == "rk4"
    assert len(own.t_span) == 101 and own.t_span[0] == 0 and own.t_span[-1] == 1


def test_two_moons_are_as_in_appendix_f():
    assert layers("moons", "field") == [(2, 16), (16, 2)]
    own = TASKS["moons"].settings
    assert (own.optimizer, own.lr, own.iterations, own.weight, own.decay) == ("adam", 0.1, 500, 1.0, 1.0)
    assert datasets.moons().x.shape == (512, 2)


def test_minimum_time_on_two_moons_has_one_rate_for_all():
    """A rate of its own for t_f is another row."""
    paper = row("1", "moons", method="minimum-time")
    assert dict(paper.settings) == {"lr": 0.1, "span_lr": 0.1} and paper.published
    ours = [r for r in tables.TABLES["1"][1]["moons"] if r.method == "minimum-time" and not r.published]
    assert [dict(r.settings) for r in ours] == [{"span_lr": 0.01}]


def test_the_lyapunov_method_on_two_moons_is_pre_trained_on_0_to_a_tenth_at_a_rate_of_a_tenth():
    paper = row("1", "moons", method="convergence-rate-longer")
    method = TASKS["moons"].method(paper.method)
    assert dict(paper.settings) == {"lr": 0.1}
    assert method.t_span.tolist() == pytest.approx([0.01 * i for i in range(11)])
    assert (method.rate, method.terminal) == (20.0, 0.0)


def test_annuli_are_as_in_appendix_f():
    assert layers("annuli", "field") == [(3, 32), (32, 3)]
    own = TASKS["annuli"].settings
    assert (own.optimizer, own.lr, own.iterations, own.weight) == ("adam", 0.01, 800, 1.0)
    assert (own.schedule, own.decay) == ("exponential", 0.999)
    assert dict(row("1", "annuli", method="minimum-time").settings) == {"lr": 0.01, "span_lr": 0.01}


def test_the_lyapunov_method_on_annuli_is_pre_trained_on_0_to_a_twentieth_and_grows_to_a_hundredth():
    paper = row("1", "annuli", method="convergence-rate")
    method = TASKS["annuli"].method(paper.method)
    assert dict(paper.settings) == {"lr": 0.03}
    assert method.t_span.tolist() == pytest.approx([0.01 * i for i in range(6)])
    assert (method.rate, method.terminal, TASKS["annuli"].settings.target) == (20.0, 0.0, 0.01)
    growth = Run(TASKS["annuli"], method, TASKS["annuli"].settings, datasets.annuli(0)).driver.growth
    assert (growth.increment, growth.patience) == (pytest.approx(0.01), 0)


def test_the_combined_method_keeps_the_bounds_of_the_paper_s_code():
    method, own = METHODS["combined-paper"], TASKS["annuli"]
    assert method.span["bounds"] == (0.01001, 1.0)
    assert dict(row("3", "annuli", method="combined-paper").settings) == {"lr": 0.03, "span_lr": 0.03}
    terms = method.loss_terms(own.model(method, own.settings), own.settings)
    assert len(terms) == 2 and method.terminal == 1  # Lyapunov, price of time, and the terminal loss


@pytest.mark.parametrize(("task", "images"), [("mnist", 60_000), ("fashion-mnist", 60_000), ("cifar10", 50_000)])
def test_images_are_trained_as_in_appendix_f(task, images):
    own = TASKS[task].settings
    assert (own.optimizer, own.lr, own.batch, own.width, own.subset) == ("sgd", 0.1, 128, 64, None)
    assert METHODS["vanilla"].optimizers(nn.Linear(1, 1), own)[1].defaults["momentum"] == 0.9
    per_epoch = images / 128
    assert own.iterations / per_epoch == pytest.approx(160, abs=1)
    for epoch, factor in ((59, 1.0), (61, 0.1), (99, 0.1), (101, 0.01), (139, 0.01), (141, 0.001)):
        assert own.rate_factor(round(epoch * per_epoch)) == pytest.approx(factor)


def test_one_rate_for_all_is_a_row_of_images_too():
    for task, weights in (("mnist", [None]), ("fashion-mnist", [None]), ("cifar10", [1.0, 0.5, 0.1])):
        rows = [dict(r.settings) for r in tables.TABLES["2"][1][task] if r.published]
        assert [(r["lr"], r["span_lr"], r.get("weight")) for r in rows] == [(0.1, 0.1, weight) for weight in weights]


def test_flows_are_trained_as_in_appendix_f_but_shorter():
    own = TASKS["flow-moons"].settings
    assert (own.optimizer, own.lr, own.batch, own.weight) == ("adam", 0.05, 512, 0.35)
    paper = TASKS["flow-moons"].method("minimum-time-paper")
    assert paper.span_lr is None and paper.t_span is None  # from 1, at the network's rate


def test_no_table_has_a_seed_on_which_settings_were_chosen():
    assert all(min(part.options.seeds) >= tables.FIRST_SEED == 200 for part in tables.ALL)
    assert comparison.TRIAL_SEED not in {seed for part in tables.ALL for seed in part.options.seeds}
