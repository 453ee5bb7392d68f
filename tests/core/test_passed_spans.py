"""What happens to a span that is passed, and to the times that are asked for."""

import contextlib
import copy
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import Decay, random_model
from torch import nn
from torch.func import functional_call, grad, vmap
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm

SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
SOLVERS = ("euler", "midpoint", "rk4", "tsit5", "dopri5")
X = torch.tensor([[1.0, -2.0], [0.5, 0.25]], dtype=torch.float64)
UNIT = torch.linspace(0, 1, 21, dtype=torch.float64)


def make(t_span=UNIT, solver="rk4", sensitivity="autograd", dtype=torch.float64, **options):
    """Makes a span around x' = -x."""
    exact = {"atol": 1e-8, "rtol": 1e-8} if solver in ("tsit5", "dopri5") and dtype == torch.float64 else {}
    node = NeuralODE(Decay(dtype=dtype), solver=solver, sensitivity=sensitivity, **exact)
    return tm.LearnableSpan(node, t_span, **options)


def put(span, t_f):
    with torch.no_grad():
        span.t_f.fill_(t_f)


def linspace(a, b, n=11, dtype=torch.float64):
    return torch.linspace(a, b, n, dtype=dtype)


# --------------------------------------------------------------------------------------------------- a learned interval


@given(
    st.sampled_from(SOLVERS),
    st.sampled_from(SENSITIVITIES),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 85).map(lambda k: k / 100),
    st.integers(4, 90).map(lambda k: k / 100),
    st.integers(2, 12),
    st.booleans(),
)
def test_the_part_inside_is_solved_at_the_spans_own_points(solver, sensitivity, dtype, start, length, n, descending):
    span = make(UNIT.to(dtype), solver, sensitivity, dtype)
    put(span, 0.9)
    t_f, asked = span.t_f.item(), linspace(start, min(start + length, 1.0), n, dtype)
    t_eval, sol = span(X.to(dtype), asked.flip(0) if descending else asked)
    # Points within a thousandth of a step of t_f give way to it; all others are there.
    inside = [t for t in asked.tolist() if t < t_f - 1e-3 * (asked[1] - asked[0]).item()]
    cut = asked[-1].item() >= t_f
    ascending = t_eval.detach().flip(0) if descending else t_eval.detach()
    assert ascending[: len(inside)].tolist() == inside
    assert ascending[-1].item() == (t_f if cut else asked[-1].item())
    assert len(t_eval) == len(sol)
    # Each row is the state at its time, from the span's own start. Euler's step is up to .9 long: a state of size 2.
    loose = {"euler": 0.7, "midpoint": 0.4, "rk4": 2e-2}.get(solver, 5e-3)
    for t, z in zip(t_eval.detach(), sol, strict=True):
        torch.testing.assert_close(z, X.to(dtype) * torch.exp(t_eval[0].detach() - t), rtol=0, atol=loose)
    sol[0 if descending and not cut else -1].sum().backward()
    assert (span.t_f.grad is not None and span.t_f.grad.item() != 0) == cut


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_whole_interval_ends_at_t_f_wherever_that_is(solver):
    span = make(solver=solver, bounds=(0.1, 3.0))
    for t_f in (0.4, 1.0, 1.7):
        put(span, t_f)
        t_eval, sol = span(X, linspace(0, 1, 5))
        assert t_eval[-1].item() == t_f
        sol[-1].sum().backward()
        assert span.t_f.grad.item() != 0
        assert span(X, linspace(1, 0, 5))[0][0].item() == t_f
    # Beyond the template's end a span ends where it ends.
    assert span(X, linspace(0, 1.3, 5))[0][-1].item() == 1.3


def test_a_descending_span_starts_where_it_says():
    span = make()
    t_eval, sol = span(X, linspace(0.7, 0))
    assert torch.equal(t_eval, linspace(0.7, 0))
    torch.testing.assert_close(sol[-1], X * math.exp(0.7), rtol=1e-6, atol=0)


def test_a_part_that_is_empty_is_refused_and_changes_nothing():
    span = make()
    put(span, 0.5)
    before = copy.deepcopy(span.state_dict())
    for asked in (linspace(0.5, 1), linspace(0.7, 0.9), linspace(-2, -1), linspace(0.9, 0.6), linspace(5, 6)):
        with pytest.raises(ValueError, match=r"no part in the learned interval: t0 = 0, t_f = 0\.5"):
            span(X, asked)
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items()) and span.node.vf.nfe == 0


def test_what_is_cut_beyond_the_template_is_said_once():
    span = make()
    with pytest.warns(
        UserWarning, match=r"from -1 to 2, reaches beyond the template's, from 0 to 1: .* cut to \[0, 1\]"
    ):
        t_eval, _ = span(X, linspace(-1, 2, 7))
    assert t_eval.tolist() == [0.0, 0.5, 1.0]
    span(X, linspace(0, 3))  # no second warning: in these tests one would be an error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_start_is_where_a_whole_span_starts(dtype):
    span = make(learn_t0=True)
    for t0 in (-0.3, 0.2):
        with torch.no_grad():
            span.t0.fill_(t0)
        t_eval, sol = span(X, linspace(0, 1, dtype=dtype))
        assert t_eval[0].item() == t0
        sol[-1].sum().backward()
        assert span.t0.grad.item() != 0
    assert span(X, linspace(0.5, 1, dtype=dtype))[0][0].item() == 0.5


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_pinned_span_takes_its_own_steps_whatever_is_passed(solver):
    span = make(solver=solver)
    span.lay([0.0, 0.3, 0.8])
    for asked in (linspace(0, 1), linspace(0.25, 0.5), linspace(5, 6)):
        assert span(X, asked)[0].tolist() == pytest.approx([0.0, 0.3, 0.8])
    assert span(X, linspace(1, 0))[0].tolist() == pytest.approx([0.8, 0.3, 0.0])


# --------------------------------------------------------------------------------- points of steps that were laid


@given(st.lists(st.floats(0.01, 0.79), max_size=5, unique=True), st.booleans(), st.sampled_from([0.8, 1.0, 2.0]))
def test_a_trajectory_of_laid_steps_has_a_state_for_each_time_asked_for(inner, descending, end):
    """z' = -z along four steps of rk4 over [0, 0.8], and the points between."""
    span = make(linspace(0, 0.8, 9))
    span.lay([0.0, 0.2, 0.4, 0.6, 0.8], "rk4")
    times = [0.0, *sorted(t for t in set(inner) if all(abs(t - u) > 1e-6 for u in inner if u != t)), end]
    asked = torch.tensor(times, dtype=torch.float64).unique()
    sol = span.trajectory(X, asked.flip(0) if descending else asked)
    reached = asked.clamp_max(0.8)
    factors = torch.exp(0.8 - reached.flip(0)) if descending else torch.exp(-reached)
    assert sol.shape == (len(asked), *X.shape)
    # Steps of 0.2 of fourth order err by about 1e-5.
    torch.testing.assert_close(sol, factors[:, None, None].to(X) * X, rtol=1e-4, atol=1e-5)


def test_a_trajectory_that_has_no_states_to_give_is_refused_in_words():
    span = make(linspace(0, 0.8, 9))
    span.lay([0.0, 0.4, 0.8], "rk4")
    with pytest.raises(ValueError, match=r"the span passed starts at 0\.25, .* from 0 to 0\.8; start there"):
        span.trajectory(X, linspace(0.25, 0.8))
    span.lay([0.0, 0.8], tm.LearnableSolver(3))
    assert span.trajectory(X, linspace(0, 0.8, 2)).shape[0] == 2
    assert torch.equal(span.trajectory(X), span.trajectory(X, linspace(0, 5, 2)))
    with pytest.raises(
        ValueError, match=r"asks for times between 0 and 0\.8, but learned-3 takes the whole interval in one"
    ):
        span.trajectory(X, linspace(0, 0.8, 100))


# -------------------------------------------------------------------------------- points that cut an adaptive solve


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
@pytest.mark.parametrize("way", ["span", "save_at", "trajectory"])
def test_an_adaptive_solve_in_many_pieces_says_so_once(solver, way):
    span, many = make(linspace(0, 1, 2), solver=solver), linspace(0, 1, 101)
    calls = {
        "span": lambda: span(X, many),
        "save_at": lambda: span(X, save_at=many),
        "trajectory": lambda: span.trajectory(X, many),
    }
    with pytest.warns(
        UserWarning, match=rf"the 101 times asked for have cut .* {solver} .* 100 steps .* dense=True"
    ) as said:
        calls[way]()
    quiet = make(linspace(0, 1, 2), solver=solver)
    quiet(X, many, dense=True)
    assert quiet.steps < span.steps / 2
    if way != "trajectory":
        assert said[0].filename == __file__
    calls[way]()  # a second warning would be an error


@pytest.mark.parametrize(
    "span, points",
    [
        (lambda: make(linspace(0, 1, 2), solver="dopri5"), 21),  # few pieces
        (lambda: make(linspace(0, 1, 101), solver="rk4"), 101),  # its own steps
        (lambda: make(linspace(0, 1, 101), solver="tsit5"), 101),  # those of the template
    ],
)
def test_few_pieces_and_fixed_steps_are_not_worth_a_warning(span, points):
    span()(X, linspace(0, 1, points))


def test_steps_that_the_tolerance_asks_for_are_not_worth_a_warning():
    node = NeuralODE(lambda t, x, args=None: 40 * torch.cos(400 * t) * x, solver="dopri5", atol=1e-6, rtol=1e-6)
    span = tm.LearnableSpan(node, linspace(0, 1, 2))
    span(X, linspace(0, 1, 61))
    assert span.steps >= 120


# ------------------------------------------------------------------------------------------------------ a frozen one


@given(
    st.sampled_from(["euler", "midpoint", "tsit5", "dopri5"]),
    st.floats(-2.0, 2.0),
    st.floats(0.1, 2.0),
    st.integers(2, 9),
    st.booleans(),
)
def test_frozen_at_the_templates_end_every_span_is_solved_as_torchdyn_does(solver, start, length, n, descending):
    model = random_model("keyword", solver=solver)
    span = tm.LearnableSpan(model.node, UNIT)
    span.t_f.requires_grad_(False)
    asked = linspace(start, start + length, n)
    asked = asked.flip(0) if descending else asked
    with torch.no_grad():
        want, (t_eval, sol) = model.node.trajectory(model.x, asked), span(model.x, asked)
    assert torch.equal(t_eval, asked)
    assert len(sol) == len(asked)
    assume(len(want) == len(asked))  # torchdyn's adaptive solvers lose the final point of some spans (U2)
    # Adaptive steps may be chosen otherwise, within torchdyn's default tolerance of 1e-3.
    near = 2e-2 if span.adaptive else 1e-6
    torch.testing.assert_close(sol, want, rtol=near, atol=near)


def test_a_new_span_in_every_call_of_a_frozen_one():
    span = tm.LearnableSpan(NeuralODE(Decay(), solver="euler"))
    span.t_f.requires_grad_(False)
    for n in (1, 3, 1, 5):
        asked = linspace(0, 0.1 * n, n + 1)
        assert torch.equal(span(X, asked)[0], asked.to(span.t_f.dtype))


def test_a_t_f_that_depth_growth_moves_cuts_from_the_start():
    span = make(linspace(0, 0.05, 6))
    growth = tm.DepthGrowth(span, threshold=1e-9)
    for t_f in (0.05, 0.06, 0.07):
        with pytest.warns(UserWarning, match="reaches beyond") if t_f == 0.05 else contextlib.nullcontext():
            assert span(X, linspace(0, 1, 101))[0][-1].item() == pytest.approx(t_f)
        growth.step(1.0)


def test_a_learned_t_f_still_cuts_once_it_is_frozen():
    span = make()
    put(span, 0.4)
    before = span(X, linspace(0, 1))
    span.requires_grad_(False)
    for a, b in zip(before, span(X, linspace(0, 1)), strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-14, atol=0)  # a step's size is a tensor or a number


# ------------------------------------------------------------------------------------- what is returned belongs together


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("learning", [True, False], ids=["gradients", "no gradients"])
def test_a_first_look_in_eval_mode_returns_the_times_of_its_states_and_decides_nothing(solver, sensitivity, learning):
    span = make(None, solver, sensitivity).eval()
    before = copy.deepcopy(span.state_dict())
    with torch.set_grad_enabled(learning):
        t_eval, sol = span(X, linspace(0, 4, 41))
    torch.testing.assert_close(t_eval.detach(), linspace(0, 4, 41).to(t_eval.dtype))
    torch.testing.assert_close(
        sol[-1].detach(), make(linspace(0, 4, 41), solver)(X)[1][-1].detach(), rtol=1e-5, atol=1e-6
    )
    if learning:
        sol[-1].sum().backward()
        assert span.t_f.grad.item() != 0
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items())
    span.train()(X, linspace(0, 2, 5))
    assert span.t_f.item() == 2.0 and len(span.t_span) == 5


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_every_asked_time_has_its_row_in_the_order_asked(solver, sensitivity, descending):
    span = make(solver=solver, sensitivity=sensitivity)
    asked = [0.7, 0.2, 0.2 + 1e-9, 0.25, 0.25, 1.0, 0.0, 1 - 1e-7, 0.7]
    t_eval, sol = span(X, linspace(1, 0, 21) if descending else None, save_at=asked)
    assert t_eval.tolist() == asked
    start = 1.0 if descending else 0.0
    # Twenty steps and those to the asked times; tsit5 and dopri5 are at 1e-8.
    near = {"euler": 0.1, "midpoint": 2e-3}.get(solver, 1e-5)
    torch.testing.assert_close(sol, X * torch.exp(start - t_eval.detach())[:, None, None], rtol=near, atol=near)
    assert torch.equal(sol[3], sol[4]) and torch.equal(sol[0], sol[8])
    weights = torch.randn(sol.shape, dtype=sol.dtype)
    (sol * weights).sum().backward()
    assert torch.isfinite(span.t_f.grad) and torch.isfinite(span.node.vf.vf.rate.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_asked_for_in_another_type_are_the_ends(dtype):
    span = make(linspace(0.1, 0.7), dtype=torch.float64)
    t_eval, sol = span(X, save_at=torch.tensor([0.1, 0.3, 0.7], dtype=dtype))
    assert t_eval[0].item() == 0.1 and t_eval[-1].item() == 0.7
    sol[-1].sum().backward()
    assert span.t_f.grad.item() != 0  # the last one is t_f itself
    with pytest.raises(ValueError, match=r"save_at=\[0.05\] must lie within the interval solved, from 0.1 to 0.7"):
        span(X, save_at=[0.05])
    with pytest.raises(ValueError, match="from 0.2 to 0.5"):
        span(X, linspace(0.2, 0.5), save_at=[0.1])


@pytest.mark.parametrize("learned", [-0.75, 0.35])
def test_a_functional_call_has_the_grid_of_a_plain_one(learned):
    span = make(linspace(0, 1, 6), "euler", learn_t0=True)
    with torch.no_grad():
        span.t0.fill_(learned)
    plain = span(X)
    functional = functional_call(span, {k: v.detach() for k, v in span.named_parameters()}, (X,))
    for a, b in zip(plain, functional, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-14, atol=0)  # a step's size is a tensor or a number


# ------------------------------------------------------------------------------------------- a loss on an observed series


def series(loss_of, steps=4, **options):
    """Trains t_f to fall under a loss of the rows of a passed span."""
    span = make(linspace(0, 1, 21), **options)
    optimizer = torch.optim.SGD([span.t_f], lr=0.004)
    for _ in range(steps):
        loss = loss_of(*span(X, linspace(0, 1, 21))) + 5 * span.duration
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return span


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_a_series_is_not_compared_with_states_at_other_times(solver, sensitivity):
    data = X * torch.exp(-linspace(0, 1, 21))[:, None, None]
    with pytest.raises(ValueError, match=r"t_f = 0\.9\d* has cut the span passed, 0 to 1"):
        series(lambda t, sol: (sol - data).square().mean(), solver=solver, sensitivity=sensitivity)


def test_a_price_on_the_last_time_makes_it_no_other_series():
    """It may be a length of the path, or a penalty at points of a field without time: it goes on, and says so once."""
    with pytest.warns(UserWarning, match="has cut the span passed, 0 to 1: .* between the ends") as said:
        assert series(lambda t, sol: sol.square().mean() + 0.1 * t[-1]).t_f.item() < 1
    assert len(said) == 1


def test_a_series_of_a_trajectory_is_not_compared_either():
    span = make(linspace(0, 1, 21))
    optimizer = torch.optim.SGD([span.t_f], lr=0.004)
    (span.trajectory(X, linspace(0, 1, 21)).square().mean() + 5 * span.duration).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="has cut the span passed"):
        span.trajectory(X, linspace(0, 1, 21))


@pytest.mark.parametrize("frozen", [False, True])
def test_times_that_would_lose_their_gradient_are_refused(frozen):
    span = make(linspace(0, 1, 5))
    span.t_f.requires_grad_(not frozen)
    end = torch.tensor(1.0, dtype=X.dtype, requires_grad=True)
    with pytest.raises(ValueError, match="t_span requires a gradient"):
        span(X, end * linspace(0, 1, 5))
    with pytest.raises(ValueError, match="save_at requires a gradient"):
        span(X, save_at=[0.5 * end])
    with torch.no_grad():
        span(X, end * linspace(0, 1, 5))
    t_eval = span(X)[0]
    span(X, t_eval.flip(0), save_at=[t_eval[-1]])  # of its own times


@pytest.mark.parametrize("learn_t0", [False, True])
def test_the_times_of_one_span_are_passed_to_another(learn_t0):
    span = make(linspace(0, 1, 5), learn_t0=learn_t0)
    average, chained = copy.deepcopy(span).eval(), make(linspace(0, 1, 5))
    t_eval, sol = span(X)
    torch.testing.assert_close(average(X, t_eval)[1], sol)
    torch.testing.assert_close(chained(X, t_eval, save_at=average.t_f[None])[1][-1], sol[-1])
    with pytest.raises(ValueError, match="is no time of a span"):
        average(X, t_eval * nn.Parameter(torch.tensor(1.0, dtype=X.dtype)))


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda t, sol: sol[-1].square().sum(),
        lambda t, sol: torch.trapezoid(sol.square().sum((1, 2)), t),
        lambda t, sol: (sol - X * torch.exp(-t)[:, None, None]).square().mean(),
        lambda t, sol: tm.LyapunovRegularizer(
            NeuralODE(Decay(), solver="rk4"), lambda z: z.square().sum(1), rate=9.0
        ).penalty(t, sol, reduction="points"),
    ],
    ids=["the end", "an integral over t_eval", "data at the times of t_eval", "a penalty at its points"],
)
def test_other_losses_go_on(loss_of):
    assert series(loss_of).t_f.item() < 1


def test_of_a_descending_series_the_first_row_is_said_to_move():
    span = make(linspace(0, 1, 21))
    for t_f in (1.0, 0.97):
        put(span, t_f)
        with pytest.raises(ValueError, match="its first state is now z") if t_f < 1 else contextlib.nullcontext():
            span(X, linspace(0, 1, 21).flip(0))[1].square().mean().backward()


class Unused(torch.autograd.Function):
    """Passes None back, as DistributedDataParallel does for what a loss does not use."""

    @staticmethod
    def forward(ctx, t_eval, sol):
        ctx.set_materialize_grads(False)
        return t_eval.clone(), sol.clone()

    @staticmethod
    def backward(ctx, in_times, in_states):
        return in_times, in_states


@pytest.mark.parametrize("row", [-1, 3])
def test_a_series_is_seen_where_a_gradient_is_none(row):
    span = make(linspace(0, 1, 21))
    _, sol = Unused.apply(*span(X, linspace(0, 1, 21)))
    (sol[row].square().sum() + span.duration).backward()
    put(span, 0.97)
    with pytest.raises(ValueError, match="has cut the span passed") if row == 3 else contextlib.nullcontext():
        span(X, linspace(0, 1, 21))


def test_a_passed_span_has_the_batched_gradients_of_its_own():
    span = make(linspace(0, 1, 21))
    own, passed = (
        torch.autograd.functional.jacobian(lambda x, t=t: span(x, t)[1][-1], X, vectorize=True)
        for t in (None, linspace(0, 1, 21))
    )
    assert torch.equal(own, passed)
    each = vmap(grad(lambda x: span(x[None], linspace(0, 1, 21))[1][-1].sum()))(X)
    torch.testing.assert_close(each, own.sum((0, 1)))


def test_a_frozen_t_f_fits_a_series():
    span = make(linspace(0, 1, 21))
    span.t_f.requires_grad_(False)
    for _ in range(3):
        t_eval, sol = span(X, linspace(0, 1, 21))
        sol.square().mean().backward()
        assert torch.equal(t_eval, linspace(0, 1, 21))


def test_a_node_that_returns_states_alone_has_every_asked_row():
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), return_t_eval=False, solver="rk4"), torch.linspace(0, 1, 11))
    assert len(span(X.float(), save_at=[0.2, 0.20001, 0.5, 0.5])) == 4
