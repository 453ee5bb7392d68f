"""What a span keeps of a solve, what it says when something fails, and calls from several threads or transforms."""

import gc
import inspect
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, linearize, stack_module_state, vmap
from torchdyn.core import NeuralODE
from torchdyn.models import CNF
from torchdyn.nn import DataControl, DepthCat

import torchdyn_mintime as tm
from torchdyn_mintime.core import last_solve

D = torch.float64
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
SOLVERS = ("euler", "rk4", "tsit5", "dopri5")


def span_of(field=None, solver="rk4", points=11, **options):
    torch.manual_seed(1)
    field = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)) if field is None else field
    node = NeuralODE(field.double() if isinstance(field, nn.Module) else field, solver=solver, **options)
    return tm.LearnableSpan(node, torch.linspace(0, 1, points, dtype=D), t_f=0.77)


def state(batch=4):
    return torch.randn(batch, 2, dtype=D, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_trajectory_of_a_forward_without_gradient_is_not_kept(solver, sensitivity, mode):
    span = span_of(solver=solver, sensitivity=sensitivity)
    with mode():
        sol = span(state())[1]
        held, expected = weakref.ref(sol), sol.tolist()
        assert last_solve(span).states is sol
        del sol
        assert held() is None
        # Who asks gets the same, without a trace.
        counts = span.nfe, span.vf.nfe
        assert last_solve(span).states.tolist() == expected
        assert last_solve(span).end.tolist() == expected[-1]
        assert (span.nfe, span.vf.nfe) == counts


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("learning", [False, True])
def test_a_forward_evaluates_the_field_as_often_as_it_says(solver, sensitivity, learning):
    calls, field = [], nn.Linear(2, 2)
    field.register_forward_hook(lambda *_: calls.append(1))
    span = span_of(field, solver, sensitivity=sensitivity)
    with torch.set_grad_enabled(learning):
        span(state())
    assert len(calls) == span.nfe > 0


@pytest.mark.parametrize("change", ["parameter", "input", "functional call"])
def test_states_that_are_gone_are_not_solved_for_with_another_model(change):
    span, x = span_of(), state()
    with torch.no_grad():
        if change == "functional call":
            functional_call(span, {n: p + 1 for n, p in span.named_parameters() if n != "t_f"}, (x,))
        else:
            span(x)
            (x if change == "input" else next(span.vf.parameters())).add_(1.0)
    with pytest.raises(RuntimeError, match="call the model again"):
        last_solve(span).states  # noqa: B018


def test_dropout_is_not_drawn_again():
    span = span_of(nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    with torch.no_grad():
        expected = span(state())[1].tolist()
    assert last_solve(span).states.tolist() == expected


def _fields():
    yield nn.Linear(2, 2)
    yield nn.Sequential(DepthCat(1), nn.Linear(3, 2))
    yield nn.Sequential(DataControl(), nn.Linear(4, 2))
    yield nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_a_call_leaves_no_reference_cycles(solver, sensitivity):
    gc.collect()
    gc.disable()
    gc.freeze()  # what is there already need not be looked through each time
    try:
        for field in _fields():
            span = span_of(field, solver, sensitivity=sensitivity).eval()

            def calls(span=span):
                with torch.no_grad():
                    span(state())
                span(state())[1][-1].sum().backward()
                span.trajectory(state()).sum().backward()

            def left(calls=calls) -> int:
                gc.collect()
                calls()
                return gc.collect()

            calls()
            assert min(left() for _ in range(3)) == 0  # a cycle is left by every call; another thread leaves some once
    finally:
        gc.unfreeze()
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# Properties and errors


def test_what_is_not_known_yet_is_an_attribute_error_that_keeps_its_reason():
    span = span_of(solver="tsit5")
    for name, reason in {"steps": "after a forward", "running_cost": "integral_loss", "step_size": "own steps"}.items():
        assert not hasattr(span, name)
        with pytest.raises(AttributeError, match=reason):
            getattr(span, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        span.nothing  # noqa: B018
    assert dict(inspect.getmembers(span))["sensitivity"] == "autograd"
    costly = span_of(sensitivity="adjoint", integral_loss=lambda t, z: z.square().sum(1))
    assert not hasattr(costly, "running_cost")
    costly.trajectory(state())
    with pytest.raises(AttributeError, match="trajectory"):
        costly.running_cost  # noqa: B018
    costly(state())
    assert costly.running_cost.shape == (4,)


class Failing(nn.Module):
    """A field whose evaluation raises an error."""

    def __init__(self, error):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(())), error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. size of the pool"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two; the shape is [2]"),
        RuntimeError("CUDA error: an illegal memory access was encountered; size"),
        RuntimeError("something of the field's own: an image of another size, shape and dimension"),
        KeyError("a label"),
    ],
    ids=["memory", "device", "CUDA", "own", "KeyError"],
)
def test_an_error_of_the_field_is_not_called_one_of_the_state(error, sensitivity):
    with pytest.raises(type(error)) as caught:
        span_of(Failing(error), sensitivity=sensitivity)(state())
    assert caught.value is error


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("wrong", [torch.randn(3, 7, dtype=D), torch.randn(3, 2)], ids=["shape", "dtype"])
def test_a_state_that_does_not_fit_is_still_called_so(wrong, sensitivity):
    with pytest.raises(ValueError, match="does not accept a state of shape"):
        span_of(sensitivity=sensitivity)(wrong)


def test_a_flow_that_is_given_data_alone_is_told_which_columns_it_needs():
    net = nn.Linear(2, 2, dtype=D)
    with pytest.raises(ValueError, match=r"wants \[batch, 1 \+ dim\], first the log-density"):
        span_of(CNF(net))(torch.randn(3, 2, dtype=D))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_flow_in_inference_mode_is_told_to_use_no_grad(solver):
    span = span_of(CNF(nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2))), solver)
    x = torch.cat([torch.zeros(4, 1, dtype=D), state()], 1)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"no_grad\(\)"):
        span(x)
    with torch.no_grad():
        assert torch.isfinite(span(x)[1]).all()


def train(span, optimizer, iterations, zero=None):
    for _ in range(iterations):
        (span(state())[1][-1].square().sum() + span.duration).backward()
        optimizer.step()
        (zero or optimizer.zero_grad)()


@pytest.mark.parametrize("whose", ["optimizer", "model"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_made_before_wrap_is_said_once(optimizer, whose):
    node = NeuralODE(nn.Linear(2, 2).double(), solver="rk4")
    made = optimizer(node.parameters(), lr=1e-3)
    span = tm.wrap(node, torch.linspace(0, 1, 3))
    with pytest.warns(UserWarning, match="add_param_group") as caught:
        train(span, made, 60, made.zero_grad if whose == "optimizer" else span.zero_grad)
    assert len(caught) == 1


@pytest.mark.parametrize("how", ["all", "added", "frozen", "alternating", "eval"])
def test_an_optimizer_that_has_the_times_is_not(how):
    node = NeuralODE(nn.Linear(2, 2).double(), solver="rk4")
    before = torch.optim.Adam(node.parameters(), lr=1e-3)
    span = tm.wrap(node, torch.linspace(0, 1, 3))
    if how == "added":
        before.add_param_group({"params": [span.t_f]})
    if how == "frozen":
        span.t_f.requires_grad_(False)
    if how == "eval":
        span.eval()
    optimizer = torch.optim.Adam(span.parameters(), lr=1e-3) if how == "all" else before
    times = torch.optim.SGD([span.t_f], lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            train(span, optimizer, 10)
            if how == "alternating":
                train(span, times, 1, span.zero_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.norm, self.condition = nn.Linear(2, 2), nn.BatchNorm1d(2), None

    def forward(self, x):
        return F.dropout(self.norm(self.net(x)), 0.1, self.training) + self.condition


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_a_trajectory_has_the_gradient_of_autograd_whatever_the_sensitivity(solver, sensitivity):
    found = []
    for chosen in ("autograd", sensitivity):
        torch.manual_seed(4)
        span, x = span_of(Stateful(), solver, sensitivity=chosen), state().requires_grad_()
        field = next(m for m in span.modules() if isinstance(m, Stateful))
        encoder = nn.Linear(2, 2).double()
        field.condition = encoder(x)
        torch.manual_seed(3)
        span.trajectory(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in (x, span.t_f, *encoder.parameters(), field.net.weight)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("timed", [False, True])
def test_forward_mode_in_t_f_is_reverse_mode(solver, timed):
    span, x = span_of(nn.Sequential(DepthCat(1), nn.Linear(3, 2)) if timed else None, solver), state()
    out = lambda t: functional_call(span, {"t_f": t}, (x,))[1][-1].square().sum()  # noqa: E731
    t = span.t_f.detach()
    reverse = grad(out)(t)
    torch.testing.assert_close(jvp(out, (t,), (torch.ones_like(t),))[1], reverse, rtol=1e-10, atol=0)
    torch.testing.assert_close(jacfwd(out)(t), reverse, rtol=1e-10, atol=0)
    with forward_ad.dual_level():
        dual = out(forward_ad.make_dual(t, torch.ones_like(t)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, reverse, rtol=1e-10, atol=0)


def test_a_batch_of_times_is_refused_in_words():
    span, x = span_of(), state()
    with pytest.raises(ValueError, match="t_f is a batch of times"):
        vmap(lambda t: functional_call(span, {"t_f": t}, (x,))[1][-1])(torch.tensor([0.5, 0.7], dtype=D))


def test_what_a_transform_hides_is_said_in_words():
    spans, x = [span_of(), span_of()], state()
    parameters, buffers = stack_module_state(spans)
    parameters.pop("t_f")
    with pytest.raises(ValueError, match="batch of intervals"):
        vmap(lambda p, b: functional_call(spans[0], (p, b), (x,))[1][-1])(parameters, buffers)
    ends = vmap(lambda p: functional_call(spans[0], p, (x,))[1][-1])(parameters)
    torch.testing.assert_close(ends[1], spans[1](x)[1][-1])
    adaptive = span_of(solver="tsit5")
    with pytest.raises(ValueError, match="tsit5 chooses its steps by the values of the state"):
        vmap(lambda z: adaptive(z[None])[1][-1])(x)
    with pytest.raises(ValueError, match="t_f is traced"):
        linearize(lambda t: functional_call(spans[0], {"t_f": t}, (x,))[1][-1], spans[0].t_f.detach())


def test_a_functional_call_with_a_state_dict_is_told_what_to_pass():
    span = span_of()
    with pytest.raises(AttributeError, match="named_parameters"):
        functional_call(span, span.state_dict(), (state(),))
    assert torch.equal(functional_call(span, dict(span.named_parameters()), (state(),))[1], span(state())[1])


def test_a_running_cost_is_that_of_the_whole_interval_or_none():
    for sensitivity in SENSITIVITIES:
        span = span_of(sensitivity=sensitivity, integral_loss=lambda t, z: z.square().sum(1))
        x = state() if sensitivity != "autograd" else torch.cat([torch.zeros(4, 1, dtype=D), state()], 1)
        span(x)
        whole = span.running_cost.detach()
        span(x, save_at=[0.5, 0.77])
        assert torch.equal(span.running_cost, whole)
        span(x, save_at=[0.5])
        if sensitivity != "autograd":
            assert torch.equal(span.running_cost, whole)
            continue
        with pytest.raises(AttributeError, match="asked for no state at the end"):
            _ = span.running_cost


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint", "checkpoint"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "dual"])
def test_transforms_of_what_has_a_backward_of_its_own_are_refused_in_words(sensitivity, transform):
    span = span_of(sensitivity="autograd" if sensitivity == "checkpoint" else sensitivity)
    if sensitivity == "checkpoint":
        span = tm.LearnableSpan(span.node, span.t_span, checkpoint=True)
    out, x = lambda x: span(x)[1][-1].sum(), state()

    def dual():
        with forward_ad.dual_level():
            return out(forward_ad.make_dual(x, x))

    transforms = {
        "grad": lambda: grad(out)(x),
        "jvp": lambda: jvp(out, (x,), (x,)),
        "vmap": lambda: vmap(out)(torch.stack([x, x])),
        "dual": dual,
    }
    with pytest.raises(ValueError, match="sensitivity='autograd'"):
        transforms[transform]()


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("kind", ["control", "time", "neither"])
def test_inference_from_several_threads_is_that_from_one(kind, solver):
    head = {
        "control": [DataControl(), nn.Linear(4, 2)],
        "time": [DepthCat(1), nn.Linear(3, 2)],
        "neither": [nn.Linear(2, 2)],
    }
    span = span_of(nn.Sequential(*head[kind]), solver).eval()
    inputs = [torch.randn(8, 2, dtype=D, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    start = threading.Barrier(4)

    def solve(x):
        with torch.no_grad():
            return span(x)[1][-1]

    expected = [solve(x) for x in inputs]
    with ThreadPoolExecutor(4, initializer=start.wait) as pool:
        found = list(pool.map(solve, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
