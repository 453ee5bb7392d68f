"""trim and early_exit: on closed forms, on a trained network, inside a larger model, and with what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import closed_form, random_model
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace
from torchdyn.nn import DataControl

import torchdyn_mintime as tm
from torchdyn_mintime.depth.early_exit import early_exit
from torchdyn_mintime.depth.trim import trim


def decay(points=101, end=2.0, solver="rk4", **options):
    """z' = -z on [0, end]."""
    node, _, _ = closed_form("decay", solver=solver)
    return tm.LearnableSpan(node, torch.linspace(0, end, points, dtype=torch.float64), **options)


ONES = torch.ones(4, 2, dtype=torch.float64)


def size(z):
    return z.square().mean()


# ---------------------------------------------------------------------------------------------------------------------
# trim


def test_trim_finds_the_earliest_time_of_a_closed_form():
    """|z|^2 = exp(-2 t) is below 0.2 from t = ln(5) / 2 on: at the grid's next point, the steps kept."""
    span = decay()
    result = trim(span, [ONES], size, 0.2, keep_step=True)
    earliest = math.log(5) / 2
    assert earliest <= span.t_f.item() < earliest + 0.02
    assert result.spans[0].steps == (100, round(span.t_f.item() / 0.02))
    assert span.step_size == pytest.approx(0.02)
    span(ONES)
    assert span.nfe == result.spans[0].nfe[1]


@pytest.mark.parametrize("keep_step", [False, True])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_trim_refuses_a_model_that_asks_for_a_part_of_the_interval(solver, keep_step):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.span = decay(solver=solver)

        def forward(self, x):
            return self.span(x, torch.linspace(0.5, 1.0, 6, dtype=torch.float64))[1][-1]

    model = Part()
    before = model.span.interval, model.span.t_f.item(), model(ONES)
    with pytest.raises(ValueError, match=r"\[0.5, 1\], a part of its interval \[0, 2\]"):
        trim(model, [ONES], size, 0.9, keep_step=keep_step)
    assert (model.span.interval, model.span.t_f.item()) == before[:2] and torch.equal(model(ONES), before[2])


class Gaps(nn.Module):
    """As an ODE-RNN between its observations: the state goes on for as long as each gap is."""

    def __init__(self, gaps, span=None):
        super().__init__()
        node, _, _ = closed_form("decay", solver="rk4")
        self.span, self.gaps = tm.LearnableSpan(node, span), gaps

    def forward(self, x):
        for gap in self.gaps:
            x = self.span(x, gap and torch.tensor([0.0, gap], dtype=torch.float64))[1][-1]
        return x


@pytest.mark.filterwarnings("ignore:the span passed, from 0 to 2, reaches beyond")  # the way to the error
@pytest.mark.parametrize(
    ("gaps", "span", "match"),
    [
        (
            [0.25, 2.0],
            None,
            r"different intervals: the first call says that it is \[0, 0.25\], and another .* \[0, 2\]",
        ),
        ([2.0, 0.25], None, r"\[0, 0.25\], a part of its interval \[0, 2\]"),
        ([0.25, 2.0], 2.0, r"\[0, 0.25\], a part of its interval \[0, 2\]"),
    ],
)
def test_trim_refuses_a_node_that_is_called_over_different_intervals(gaps, span, match):
    model = Gaps(gaps, span and torch.linspace(0, span, 41, dtype=torch.float64))
    before = model.span.interval, model.span.t_f.item(), model.eval()(ONES)
    with pytest.raises(ValueError, match=match):
        trim(model, [ONES], size, 1.0)
    assert (model.span.interval, model.span.t_f.item()) == before[:2] and torch.equal(model(ONES), before[2])


def test_trim_takes_a_node_that_is_called_twice_over_the_same_interval():
    model = Gaps([None, None], torch.linspace(0, 0.5, 11, dtype=torch.float64))
    result = trim(model, [ONES], size, 0.2)
    assert result.spans[0].steps == (10, 1) and result.loss[1] <= 0.2
    assert trim(Gaps([0.5, 0.5]), [ONES], size, 0.2).spans[0].t_f == (0.5, 0.5)


def test_trim_takes_a_t_f_outside_its_bounds_as_eval_mode_does():
    inside, outside = decay(), decay()
    with torch.no_grad():
        outside.t_f.fill_(2.2)  # an optimizer has made its last step
    results = [trim(span, [ONES], size, 0.02) for span in (inside, outside)]
    assert str(results[1]) == str(results[0]) and results[0].saved > 1
    assert torch.equal(outside.eval()(ONES)[0], inside.eval()(ONES)[0])


@pytest.mark.parametrize("end", [0.5, 2.0])
def test_trim_of_a_span_without_a_template_trims_what_the_model_asks_for(end):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.span = tm.LearnableSpan(closed_form("decay", solver="rk4")[0]).double()

        def forward(self, x):
            return self.span(x, torch.linspace(0, end, 9, dtype=torch.float64))[1][-1]

    model = Asks().eval()
    before = size(model(ONES)).item()
    result = trim(model, [ONES], size, 1.5 * before)
    assert result.spans[0].t_f == (end, end) and result.spans[0].steps[0] == 8 > result.spans[0].steps[1]
    assert size(model(ONES)).item() == pytest.approx(result.loss[1]) and not model.span.training


def test_trim_takes_fewer_steps_and_says_what_it_saved():
    span = decay()
    result = trim(span, [ONES[:1], ONES[1:]], size, 0.2)
    assert result.spans[0].nfe[0] == 400
    assert result.saved == 400 / result.spans[0].nfe[1] >= 50
    t_eval, sol = span(ONES)
    assert span.nfe == result.spans[0].nfe[1]
    assert result.loss[0] == pytest.approx(math.exp(-4), rel=1e-6)
    assert result.loss[1] == pytest.approx(size(sol[-1]).item())
    assert result.loss[1] <= 0.2
    assert t_eval[-1].item() == 2  # an earlier end would save nothing
    assert "evaluations" in str(result)
    assert span.training
    # It can be trained on: t_f is a parameter with a gradient and bounds around it.
    span(ONES)[1][-1].sum().backward()
    assert span.t_f.grad is not None
    assert span.bounds[0] < span.t_f.item() <= span.bounds[1]


def test_trim_with_slack_takes_a_short_interval():
    span = decay()
    result = trim(span, [ONES], size, 0.2, slack=0.02)
    assert result.spans[0].nfe[1] == 4
    assert math.log(5) / 2 <= span.t_f.item() <= 1.02 * (math.log(5) / 2 + 0.02)


@settings(max_examples=10)
@given(threshold=st.floats(0.02, 0.9), solver=st.sampled_from(["euler", "midpoint", "rk4", "tsit5"]))
def test_an_earlier_end_saves_evaluations_or_is_not_taken(threshold, solver):
    span = decay(points=2 if solver == "tsit5" else 21, solver=solver)
    (found,) = trim(span, [ONES], size, threshold).spans
    assert found.t_f[1] == found.t_f[0] or found.nfe[1] < found.nfe[0]
    if solver != "tsit5" and found.steps[1] > 1:  # nor does a later one with as few steps keep the loss
        (row,) = [row for row in found.tried if row.steps == found.steps[1]]
        assert row.t_f == pytest.approx(found.t_f[1])


@pytest.mark.parametrize("options", [{}, {"slack": 0.02}, {"keep_step": True}])
def test_trim_says_what_each_number_of_steps_would_have_cost(options):
    """(1 - h)^(2 n) is the loss of n steps of Euler of the size h."""
    span = decay(points=21, solver="euler")
    result = trim(span, [ONES], size, 0.1, **options)
    (found,) = result.spans
    rows = {row.steps: row for row in found.tried}
    assert list(rows) == sorted(rows) and {1, found.steps[1], 20} <= set(rows)
    for row in found.tried:
        assert row.loss == pytest.approx((1 - row.t_f / row.steps) ** (2 * row.steps), rel=1e-9, abs=1e-12)
    assert rows[20].t_f == 2
    assert rows[found.steps[1]].loss == pytest.approx(result.loss[1])
    assert result.loss[1] <= 0.1
    assert f"{found.steps[1]:4d} steps: loss {result.loss[1]:.4g}" in str(result)


class Series(nn.Module):
    """An ODE whose states at some times are all that a loss is about."""

    def __init__(self, span, **asks):
        super().__init__()
        self.span, self.asks = span, asks

    def forward(self, x):
        return self.span(x, **self.asks)[1]


@pytest.mark.parametrize("asked", [(0.5, 2.0), (0.31, 1.1, 1.9), ()])
def test_trim_keeps_the_end_of_a_loss_on_a_trajectory(asked):
    times = torch.tensor(asked or (2.0,), dtype=torch.float64)
    model = Series(decay(points=41), **({"save_at": asked} if asked else {}))

    def distance(sol, *_):
        exact = torch.exp(-times)[:, None, None] * ONES
        return (sol[-len(times) :] - exact).square().mean() + 0.0 * sol.sum()

    result = trim(model, [ONES], distance, 1e-6)
    (found,) = result.spans
    assert found.t_f == (2.0, 2.0) and found.steps[1] < found.steps[0] == 40 + sum(t * 20 % 1 > 1e-9 for t in asked)
    assert result.loss[1] <= 1e-6 and distance(model(ONES)).item() == pytest.approx(result.loss[1])
    assert [row.t_f for row in found.tried] == [2.0] * len(found.tried)


class Asking(nn.Module):
    """A model that looks at the last state alone, at times that it asks for by itself."""

    def __init__(self, field, **asks):
        super().__init__()
        times = torch.linspace(0, 1, 101, dtype=torch.float64)
        self.span, self.asks = tm.LearnableSpan(NeuralODE(field, solver="rk4"), times), asks

    def forward(self, x):
        return self.span(x, **self.asks)[1][-1]


@pytest.mark.parametrize("options", [{}, {"keep_step": True}, {"slack": 0.0}])
@pytest.mark.parametrize("asked", [[1.0], [0.25, 1.0], [0.5]])
def test_trim_keeps_the_end_of_a_model_that_asks_for_its_times(asked, options):
    model = Asking(lambda t, z: -5 * z, save_at=asked)
    result = trim(model, [ONES], size, 0.05, **options)
    assert size(model(ONES)).item() == pytest.approx(result.loss[1]) and result.loss[1] <= 0.05
    assert model.span.t_f == 1 and (result.saved == 1) == ("keep_step" in options)


@pytest.mark.parametrize("how", ["passed", "laid"])
def test_trim_of_a_model_that_solves_backward_takes_fewer_steps_to_the_same_end(how):
    """z' = -z (1 + 2 t) from 1 to 0: z(0) = e^2 z(1)."""
    down = torch.linspace(1, 0, 101 if how == "passed" else 2, dtype=torch.float64)
    model = Asking(lambda t, z: -z * (1 + 2 * t), t_span=down)
    if how == "laid":
        model.span.lay(model.span.nodes)

    def distance(z):
        return (z - math.exp(2)).square().mean()

    (found,) = trim(model, [ONES], distance, 1e-2).spans
    assert found.steps == (100, 2) and found.t_f == (1, 1) and distance(model(ONES)) <= 1e-2
    for row in found.tried[:-1]:  # what it says is what as many steps give
        model.span.lay([k / row.steps for k in range(row.steps + 1)])
        assert distance(model(ONES)).item() == pytest.approx(row.loss, rel=1e-9)


def test_trim_that_fails_puts_every_span_back():
    model = Stacked()
    before = [(span.interval, span.t0.item(), span.t_f.item()) for span in tm.spans(model)]

    def size_of_known(out):
        if model.second.pinned:  # by then the first one has its few steps
            raise ValueError("not with these steps")
        return size(out)

    with pytest.raises(ValueError, match="not with these steps"):
        trim(model, [ONES], size_of_known, 0.5)
    assert [(span.interval, span.t0.item(), span.t_f.item()) for span in tm.spans(model)] == before
    assert model(ONES).shape == ONES.shape


def test_trim_refuses_a_loss_on_the_points_of_a_span_that_the_model_passes():
    model = Series(decay(points=41), t_span=torch.linspace(0, 2, 41, dtype=torch.float64))
    before = model.span.interval, model.span.vf.nfe
    with pytest.raises(
        ValueError, match=r"span of 41 points, which are the steps too, .* ask for these times by save_at="
    ):
        trim(model, [ONES], lambda sol: sol.square().mean(), 1.0)
    assert (model.span.interval, model.span.vf.nfe) == before
    # Of an adaptive solver the points are no steps, and neither they nor the end are taken away.
    model = Series(decay(points=2, solver="tsit5"), t_span=torch.linspace(0, 2, 41, dtype=torch.float64))
    result = trim(model, [ONES], lambda sol: sol.square().mean(), 1.0)
    assert result.saved == 1 and model(ONES).shape[0] == 41


@settings(max_examples=10)
@given(share=st.floats(0.02, 0.9), solver=st.sampled_from(["euler", "midpoint", "rk4"]), seed=st.integers(0, 50))
def test_trim_keeps_the_loss_and_never_adds_evaluations(share, solver, seed):
    model = random_model("mlp", seed=seed, solver=solver)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 17, dtype=torch.float64))
    first, last = model.x, span(model.x)[1][-1].detach()

    def distance(z):
        return (z - last).square().mean()

    threshold = share * distance(first).item()
    result = trim(span, [model.x], distance, threshold)
    assert distance(span(model.x)[1][-1]).item() <= threshold
    assert result.saved >= 1
    assert result.spans[0].t_f[1] <= result.spans[0].t_f[0]


def test_trim_with_a_solver_tolerance_takes_the_steps_that_it_needs():
    loose, tight = decay(), decay()
    first = trim(loose, [ONES], size, 0.2)
    second = trim(tight, [ONES], size, 0.2, solver_tol=1e-4)
    assert second.solver_error[1] <= 1e-4 < first.solver_error[1]
    assert second.spans[0].steps[1] > first.spans[0].steps[1]
    # A march of all 100 steps takes 400 evaluations: the ladder of numbers is short enough for some twenty such marches.
    assert second.evaluations == 8752


def test_trim_of_an_adaptive_solver_moves_t_f():
    span = decay(points=2, solver="tsit5")
    result = trim(span, [ONES], size, 0.2)
    assert math.log(5) / 2 <= span.t_f.item() < 2
    assert result.spans[0].nfe[1] < result.spans[0].nfe[0]
    short = decay(points=2, solver="tsit5")
    trim(short, [ONES], size, 0.2, slack=0.0)
    assert short.t_f.item() == pytest.approx(math.log(5) / 2, abs=0.02)


def test_trim_respects_given_bounds():
    span = decay(bounds=(1.5, 2.0))
    trim(span, [ONES], size, 0.5)
    assert span.t_f.item() >= 1.5
    assert span.bounds == (1.5, 2.0)


class Stacked(nn.Module):
    """A stem, two ODEs and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second = decay(21), decay(21)
        for span in (self.first, self.second):
            span.node.return_t_eval = False
        self.head = nn.BatchNorm1d(2).double()

    def forward(self, x):
        return self.head(self.second(self.first(2 * x)[-1])[-1])


def test_trim_of_two_spans_in_a_model():
    model = Stacked()
    statistics = model.head.running_mean.clone()
    result = trim(model, [(ONES, 0.0)], lambda out, y: (out - y).square().mean(), 0.5)
    assert [s.name for s in result.spans] == ["first", "second"]
    assert result.saved > 5
    model.eval()
    assert model(ONES).square().mean() <= 0.5
    assert torch.equal(model.head.running_mean, statistics)


def test_trim_leaves_a_model_that_needs_all_it_has():
    span = decay(points=2, end=0.5)
    before = span.state_dict()
    result = trim(span, [ONES], size, 1.0001 * size(span(ONES)[1][-1]).item())
    assert result.saved == 1
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items())


@pytest.mark.parametrize(
    "change, kind, text",
    [
        ({"model": 3.0}, TypeError, "model must be a module that holds LearnableSpans; got float"),
        ({"model": nn.Linear(2, 2)}, ValueError, "Linear has no LearnableSpan; wrap it first"),
        ({"batches": 3}, TypeError, "batches must be a list, .* got int"),
        ({"batches": ONES}, TypeError, r"batches must be a list, .* pass \[x\] for one"),
        ({"batches": (ONES, ONES)}, TypeError, r"got a tuple of 2 tensors: pass \[\(x, y\)\] for one batch"),
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": [ONES[:0]]}, ValueError, r"must have rows, .* got x of the shape \(0, 2\)"),
        ({"batches": [torch.tensor(1.0)]}, ValueError, r"must have rows, .* got x of the shape \(\)"),
        ({"loss": 0.5}, TypeError, "loss must be callable .* got 0.5"),
        ({"loss": lambda z: None}, TypeError, "the loss must be a number; got None"),
        ({"loss": lambda z: math.nan}, ValueError, "the loss is nan as the model is"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite; got nan"),
        ({"threshold": math.inf}, ValueError, "threshold must be finite; got inf"),
        ({"threshold": "low"}, TypeError, "threshold must be a number; got 'low'"),
        ({"slack": math.nan}, ValueError, "slack must be a share of the duration, .* got nan"),
        ({"slack": -0.1}, ValueError, "slack must be a share of the duration, .* got -0.1"),
        ({"slack": "long"}, TypeError, "slack must be a number; got 'long'"),
        ({"solver_tol": 0.0}, ValueError, "solver_tol must be positive and finite; got 0"),
        ({"solver_tol": math.nan}, ValueError, "solver_tol must be positive and finite; got nan"),
        ({"solver_tol": "1"}, TypeError, "solver_tol must be a number; got '1'"),
    ],
)
def test_trim_refuses_a_bad_argument_before_anything_is_changed(change, kind, text):
    span = decay()
    before = (span.t_f.item(), span.t_span.tolist(), span.bounds, span.training, span.vf.nfe)
    arguments = {"model": span, "batches": [ONES], "loss": size, "threshold": 0.2} | change
    with pytest.raises(kind, match=text):
        trim(**arguments)
    # A loss is only known once it was called: the model has been evaluated then, and nothing else.
    after = (span.t_f.item(), span.t_span.tolist(), span.bounds, span.training, span.vf.nfe)
    assert after == before


def test_trim_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"above threshold=0\.001 already"):
        trim(decay(), [ONES], size, 0.001)
    with pytest.raises(ValueError, match="solver error is"):
        trim(decay(points=3), [ONES], size, 0.2, solver_tol=1e-9)


def annuli(seed=0):
    """A vanilla model of two annuli, 3-32-3, trained on a hundred steps' worth of time with ten (which is quicker)."""
    torch.manual_seed(seed)
    angle, y = 2 * math.pi * torch.rand(256), torch.arange(256) % 2
    radius = torch.where(y == 0, 0.5, 1.0) + 0.01 * torch.randn(256)
    x = torch.stack([radius * angle.cos(), radius * angle.sin(), 0 * radius], 1)
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3))
    span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 11))
    span.t_f.requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(span(x)[1][-1][:, :2], y)
        loss.backward()
        optimizer.step()
    assert loss < 1e-2
    span.t_f.requires_grad_(True)
    span.step_size = 0.01
    return span.eval(), x, y


def test_trim_and_early_exit_of_a_trained_model():
    span, x, y = annuli()

    def cross_entropy(z, y):
        return F.cross_entropy(z[:, :2], y)

    exits = early_exit(span, x, lambda z: z[:, :2].softmax(1).amax(1) > 0.9)
    result = trim(span, [(x, y)], cross_entropy, 1e-2)
    assert result.saved >= 8
    assert result.spans[0].t_f[1] == 1
    assert (span(x)[1][-1][:, :2].argmax(1) == y).all()
    assert exits.mean_nfe < 0.7 * result.spans[0].nfe[0]
    assert (exits.output[:, :2].argmax(1) == y).double().mean() > 0.95


# ---------------------------------------------------------------------------------------------------------------------
# early_exit


@given(st.lists(st.floats(0.1, 8.0), min_size=1, max_size=6))
def test_early_exit_takes_each_sample_out_at_its_own_time(starts):
    """|z| = exp(-t) |z0| is below 0.5 from ln(2 |z0|) on."""
    span = decay(points=41)
    x = torch.tensor(starts, dtype=torch.float64)[:, None]
    found = early_exit(span, x, lambda z: z[:, 0] < 0.5)
    exact = torch.log(2 * x[:, 0]).clamp_min(0)
    assert torch.equal(found.met, exact < 2)
    assert (found.times >= exact.clamp_max(2) - 1e-6).all()
    assert (found.times <= exact.clamp_max(2) + 0.05 + 1e-6).all()
    assert torch.equal(found.nfe, (found.times / 0.05).round().long() * 4)
    assert torch.allclose(found.output[:, 0], x[:, 0] * torch.exp(-found.times), rtol=1e-5)
    assert found.mean_nfe == pytest.approx(found.nfe.double().mean().item())


@pytest.mark.parametrize("every", [1, 3, 100])
def test_early_exit_that_never_holds_is_the_whole_solve(every):
    model = random_model("depthcat", solver="rk4", batch=5)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11, dtype=torch.float64), t_f=0.73)
    whole = span(model.x)[1][-1]
    found = early_exit(span, model.x, lambda z: torch.zeros(len(z), dtype=torch.bool), every=every)
    assert torch.allclose(found.output, whole, rtol=1e-12)
    assert (found.nfe == span.nfe).all()
    assert not found.met.any()


def test_data_control_and_noise_follow_the_samples(float64):
    """Each sample's result is what it would be alone."""
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    controlled = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    flow = CNF(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), hutch_trace, noise)
    for field, width in ((controlled, 2), (flow, 3)):
        span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 11))
        x, numbers = torch.randn(6, width), torch.arange(6)
        steps_left = [3, 7, 1, 10, 5, 2]  # sample i leaves after so many steps
        calls = iter(range(100))

        def criterion(z, calls=calls, numbers=numbers, steps_left=steps_left):
            # Samples still there, in order: those whose time has not come.
            step = next(calls)
            here = [n for n in numbers.tolist() if steps_left[n] >= step]
            return torch.tensor([steps_left[n] == step for n in here])

        torch.manual_seed(1)
        found = early_exit(span, x, criterion)
        torch.manual_seed(1)
        sol = span(x)[1]
        expected = torch.stack([sol[n, i] for i, n in enumerate(steps_left)])
        assert torch.allclose(found.output, expected, rtol=1e-9)
        assert found.nfe.tolist() == [4 * n for n in steps_left]


class Conditional(nn.Module):
    """A model that gives its field two columns of its input as rates: by args, or as an attribute."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.node = tm.LearnableSpan(NeuralODE(Rates(), solver="rk4"), torch.linspace(0, 3, 31))

    def forward(self, x):
        self.node.vf.vf.rates = x[:, 2:]
        return self.node(x[:, :2], args={"rates": x[:, 2:]} if self.how == "args" else None)[1][-1]


class Rates(nn.Module):
    def __init__(self):
        super().__init__()
        self.rates, self.matrix = None, torch.tensor([[0.0, 0.3], [-0.3, 0.0]])

    def forward(self, t, x, args=None):
        return x @ self.matrix - x * (args["rates"] if args else self.rates)


@pytest.mark.parametrize("batch", [1, 2, 7])  # the matrix of the field has as many rows as a batch of two
@pytest.mark.parametrize("how", ["args", "attribute"])
def test_labels_follow_the_samples(how, batch):
    model = Conditional(how)
    x = torch.cat([torch.randn(batch, 2) + 2, torch.rand(batch, 1) + 0.2], 1)
    found = early_exit(model, x, lambda z: z.norm(dim=1) < 1.0)
    alone = [early_exit(model, row[None], lambda z: z.norm(dim=1) < 1.0) for row in x]
    assert torch.equal(found.times, torch.cat([one.times for one in alone]))
    assert torch.allclose(found.output, torch.cat([one.output for one in alone]))
    assert model.node.vf.vf.matrix.shape == (2, 2)


def test_early_exit_applies_the_rest_of_the_model():
    model = Stacked().eval()
    whole = model(ONES)
    found = early_exit(model, ONES, lambda out: out[:, 0] < 0.1, span=model.second)
    # 2 exp(-2) exp(-t) < 0.1, with the batch norm of fresh statistics
    assert found.times[0].item() == pytest.approx(math.log(20) - 2, abs=0.11)
    assert (found.output[:, 0] < 0.1).all()
    assert found.output.shape == whole.shape
    with pytest.raises(ValueError, match="pass span="):
        early_exit(model, ONES, lambda out: out[:, 0] < 0.1)


def test_early_exit_refuses_what_couples_samples():
    with pytest.raises(ValueError, match="tsit5 chooses its steps for the whole batch"):
        early_exit(decay(points=2, solver="tsit5"), ONES, lambda z: z[:, 0] < 0)
    model = Stacked()
    with pytest.raises(ValueError, match=r"BatchNorm1d in training mode .* call model.eval"):
        early_exit(model, ONES, lambda out: out[:, 0] < 0.1, span=model.second)
    with pytest.raises(ValueError, match=r"booleans \[4\].*got \(4, 2\)"):
        early_exit(decay(), ONES, lambda z: z < 0.1)
    with pytest.raises(ValueError, match="every must be"):
        early_exit(decay(), ONES, lambda z: z[:, 0] < 0.1, every=0)


class Shifted(nn.Module):
    """With a weight of as many rows as the batch, which does nothing at t = 0."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([3.0, -3.0], dtype=torch.float64))

    def forward(self, t, x, args=None):
        if self.shift.shape != (2,):
            raise ValueError(f"two dimensions, not {len(self.shift)}")
        return -x + t * self.shift


def test_a_weight_of_as_many_rows_stays_whole_where_it_does_nothing_at_first():
    span = tm.LearnableSpan(NeuralODE(Shifted(), solver="rk4"), torch.linspace(0, 1, 21, dtype=torch.float64))
    x = torch.tensor([[0.1, 0.1], [2.0, 2.0]], dtype=torch.float64)
    found = early_exit(span, x, lambda z: z[:, 1] < 0.05)
    assert found.met.tolist() == [True, True] and found.times[0] < found.times[1]
    for row, output in zip(x, found.output, strict=True):
        alone = early_exit(span, row[None], lambda z: z[:, 1] < 0.05).output[0]
        torch.testing.assert_close(output, alone, rtol=1e-12, atol=0)


def test_many_weights_of_as_many_rows_as_the_batch_stay_whole():
    torch.manual_seed(0)
    normed = torch.nn.utils.parametrizations.spectral_norm
    layers = [layer for _ in range(5) for layer in (normed(nn.Linear(8, 8)), nn.Tanh())]
    span = tm.LearnableSpan(NeuralODE(nn.Sequential(*layers[:-1]), solver="rk4"), torch.linspace(0, 1, 11)).eval()
    x = torch.randn(8, 8)
    with torch.no_grad():
        whole = span(x)[1][-1]
    first = x[:, 0].argmin().item()
    found = early_exit(span, x, lambda z: z[:, 0] < x[first, 0] + 1e-6)
    assert found.met[first] and not found.met.all()
    staying = ~found.met
    torch.testing.assert_close(found.output[staying], whole[staying], rtol=1e-5, atol=1e-6)  # two sizes of batches
