"""The interval of a span for whoever knows tensors alone: averages, broadcasts, checkpoints.

An average of models has its parameters' average t_f. It must be solved up to it: with the template and the bounds of the
model, whenever the copy was made.
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm

X = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))


def make(t_span=None, solver="rk4", **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    return tm.LearnableSpan(NeuralODE(net, solver=solver), t_span, **options)


def put(span, t_f):
    with torch.no_grad():
        span.t_f.fill_(t_f)


def walk(source, target, decay=0.8):
    """Averages as training scripts do that know nothing of modules: through two state_dicts."""
    own, others = source.state_dict(), target.state_dict()
    for key, value in own.items():
        others[key].data.copy_(others[key].data * decay + value.data * (1 - decay))


def averaged(span, kind):
    """Returns (the average, what takes the model into it)."""
    if kind == "state_dicts":
        copied = copy.deepcopy(span)
        return copied, lambda: walk(span, copied)
    options = {
        "parameters": {},
        "buffers too": {"use_buffers": True},
        "moving, buffers too": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    }[kind]
    average = AveragedModel(span, **options)
    return average.module, lambda: average.update_parameters(span)


KINDS = ("state_dicts", "parameters", "buffers too", "moving, buffers too")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("when", ["before the first span", "after it"])
@pytest.mark.parametrize("end", [1.0, 5.0])
def test_an_average_is_solved_to_its_own_t_f(kind, solver, when, end):
    span, passed = make(solver=solver), torch.linspace(0, end, 21)
    if when == "after it":
        span(X, passed)
    average, update = averaged(span, kind)
    for share in (0.9, 0.8, *[0.6] * 40):
        span(X, passed)
        put(span, share * end)
        update()
    average.eval()
    t_eval, sol = average(X, passed)
    t_f = average.t_f.item()
    assert 0.59 * end < t_f < 0.95 * end
    assert t_eval[-1].item() == pytest.approx(t_f, rel=1e-4)
    # The same as a span that was made with that interval; the averaged template comes to within .8^42 of the model's.
    other = make(passed, solver, t_f=t_f).eval()
    torch.testing.assert_close(sol[-1], other(X)[1][-1], rtol=1e-3, atol=1e-3)
    average.requires_grad_(False)  # as many averages are
    assert average(X, passed)[0][-1].item() == pytest.approx(t_f, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("t_f", [0.4, 1.6])
@pytest.mark.parametrize("passed", [None, torch.linspace(0, 2, 9)], ids=["no span", "a span"])
def test_an_average_of_parameters_alone_made_before_the_first_span_is_solved_to_its_own_t_f(training, t_f, passed):
    average = make().train(training)
    put(average, t_f)  # as a loop over two lists of parameters does: it knows of no buffers
    t_eval, _ = average(X, passed)
    assert t_eval[-1].item() == average.t_f.item() == pytest.approx(t_f)
    t_eval[-1].backward()
    assert average.t_f.grad == 1.0


def test_an_average_that_is_outside_the_bounds_it_was_copied_with_is_said(caplog):
    average = make(torch.linspace(0, 1, 6)).eval()
    put(average, 1.6)
    for _ in range(2):
        assert average(X)[0][-1] == 1.0
    assert caplog.text.count("t_f = 1.6 lies outside its bounds, and is taken as 1") == 1


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_nothing_is_said_of_a_t_f_that_a_step_of_the_optimizer_has_left_outside_its_bounds(caplog, solver):
    span = make(torch.linspace(0, 1, 6), solver).eval()
    put(span, 1.04)
    assert span(X)[0][-1] == 1.0
    assert not caplog.text


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("t_span", [None, torch.tensor([0.0, 0.1, 0.5, 1.0])], ids=["even", "uneven"])
def test_a_state_loads_into_a_model_without_data(assign, t_span):
    """As where a large model is made on the device "meta", and its weights are loaded or shared out later."""
    span = make(t_span, bounds=(0.2, 3.0), t_f=0.7)
    empty = make(t_span).to("meta")
    empty = empty if assign else empty.to_empty(device="cpu")
    for buffer in empty.buffers():
        if not buffer.is_meta:
            buffer.fill_(float("nan"))
    empty.load_state_dict(span.state_dict(), assign=assign)
    assert torch.equal(empty(X)[1], span(X)[1]) and empty.bounds == span.bounds


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_that_were_raised_after_the_copy(kind):
    span = make(torch.linspace(0, 1, 21))
    average, update = averaged(span, kind)
    tm.TargetLoss(span, target=1e-4)  # raises the upper bound to the default of what may grow
    for t_f in (1.2, *[1.6] * 40):
        put(span, t_f)
        update()
    assert average.t_f.item() > 1.4 and average.interval.given_bounds is not None
    assert average.eval()(X)[0][-1].item() == pytest.approx(average.t_f.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [[0.0, 1.0, 9.0], [0.0, 0.1, 0.5, 1.0], [0.0, 0.1, 0.5, 0.8, 1.0]], ids=len)
def test_uneven_points_do_not_fit_into_a_copy_made_before_and_are_never_taken_for_others(kind, points):
    span = make()
    average, update = averaged(span, kind)
    span(X, torch.tensor(points))
    with pytest.raises(RuntimeError, match="shape"):
        update()
    assert len(average.t_span) == 101
    late, update = averaged(span, kind)
    update()
    assert torch.equal(late.t_span, torch.tensor(points))


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_a_copy_of_buffers_carries_the_pinned_steps(solver):
    span = make(torch.linspace(0, 1, 4), solver)
    average = AveragedModel(span)
    span.lay([0.0, 0.2, 0.5, 0.9])
    average.update_parameters(span)
    assert average.module.pinned and average.module.grid().tolist() == pytest.approx([0.0, 0.2, 0.5, 0.9])


@pytest.mark.parametrize("points", [2, 21, 301])
def test_the_buffers_stay_the_same_tensors(points):
    """DDP broadcasts the tensors that it has found at its start, and a compiled or sharded model has others in no place."""
    for span in (make(), make(torch.linspace(0, 1, points))):
        before = {name: (b.data_ptr(), b.shape) for name, b in span.named_buffers()}
        span(X, torch.linspace(0, 1, points))
        span.bounds = (0.2, 0.9)
        put(span, 0.5)
        span(X, torch.linspace(0, 1, points))
        assert {name: (b.data_ptr(), b.shape) for name, b in span.named_buffers()} == before


def test_what_another_process_broadcasts_is_used():
    first, second = make(torch.linspace(0, 1, 11)), make(torch.linspace(0, 1, 11))
    first.t_span = torch.linspace(0, 2, 11)
    first.bounds = (0.3, 1.8)
    for mine, other in zip(second.buffers(), first.buffers(), strict=True):
        mine.copy_(other)
    assert second.bounds == pytest.approx((0.3, 1.8)) and torch.equal(second.t_span, first.t_span)


def test_a_state_holds_the_buffers_themselves_and_loads_into_either_kind_of_span():
    made, filled = make(torch.linspace(0, 2, 21)), make()
    filled(X, torch.linspace(0, 2, 21))
    for source in (made, filled):
        put(source, 0.7)
        state = source.state_dict()
        assert state["template"].data_ptr() in [b.data_ptr() for b in source.buffers()]
        for target in (make(), make(torch.linspace(0, 1, 5)), make(torch.linspace(0, 1, 5), bounds=(0.3, 1.0))):
            target.load_state_dict(state)
            assert torch.equal(target.t_span, source.t_span) and target.bounds == pytest.approx(source.bounds)
            with torch.no_grad():
                assert torch.equal(target(X)[1], source(X)[1])
            put(target, 9.0)
            target(X, torch.linspace(0, 2, 21))
            assert target.t_f.item() == pytest.approx(2.0)  # settled: a later span does not fill t_f


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_model_of_any_type_keeps_its_interval(kind):
    span = make(torch.linspace(0, 1, 101, dtype=torch.float64), bounds=(0.1, 1.7))
    before = span.interval
    span.to(kind)
    assert span.interval == before
    assert all(b.dtype == torch.float64 for name, b in span.named_buffers() if name != "t0")
