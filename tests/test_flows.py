"""Continuous flows: gradients of their times, densities against closed forms and grids, both directions, bad input."""

import copy
import math

import pytest
import torch
from differences import assert_close, difference
from learners import trainer
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal
from torchdyn.core import NeuralODE
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import DataControl, DepthCat

import torchdyn_mintime as tm
from torchdyn_mintime.experiments.datasets import density_moons
from torchdyn_mintime.flows import ContextCat, FlowModel, Gaussian, HyperCNF, HyperNet
from torchdyn_mintime.lightning import MinimumTime
from torchdyn_mintime.losses.step_doubling import StepDoubling
from torchdyn_mintime.losses.trajectory import JacobianNorm, KineticEnergy

TIGHT = {"atol": 1e-8, "rtol": 1e-8, "atol_adjoint": 1e-8, "rtol_adjoint": 1e-8}


class HeldNoise:
    """A noise distribution whose every draw is the same: Hutchinson's estimate becomes a function."""

    def sample(self, shape):
        generator = torch.Generator().manual_seed(3)
        return torch.randn(*shape, 2, dtype=torch.float64, generator=generator)


def mlp(dim=2):
    return nn.Sequential(nn.Linear(dim, 8), nn.Tanh(), nn.Linear(8, dim))


def timed_mlp():
    return nn.Sequential(DepthCat(1), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def strong(net: HyperNet) -> HyperNet:
    """A hypernetwork at its start moves nothing; this one moves points by about their own size."""
    with torch.no_grad():
        net.net[-1].weight.mul_(5)
        net.net[-1].bias.mul_(5)
    return net


FIELDS = {
    "exact": lambda: CNF(mlp()),
    "exact, timed": lambda: CNF(timed_mlp()),
    "exact, hypernetwork": lambda: CNF(strong(HyperNet(2, 4, 8))),
    "closed form, hypernetwork": lambda: HyperCNF(strong(HyperNet(2, 4, 8))),
    "hutchinson": lambda: CNF(mlp(), hutch_trace, HeldNoise()),
    "hutchinson, hypernetwork": lambda: CNF(strong(HyperNet(2, 4, 8)), hutch_trace, HeldNoise()),
}


def flow(field: nn.Module, steps: int = 10, t_f: float = 0.73, **options) -> FlowModel:
    """A float64 model whose t_f lies inside a step."""
    node = NeuralODE(field.double(), **{"solver": "rk4", **options})
    span = tm.LearnableSpan(node, torch.linspace(0, 1, steps + 1, dtype=torch.float64), t_f=t_f)
    return FlowModel(span, Gaussian(2).double())


def adaptive_flow(field: nn.Module, t_f: float = 0.73, **options) -> FlowModel:
    node = NeuralODE(field.double(), solver="dopri5", **TIGHT, **options)
    return FlowModel(
        tm.LearnableSpan(node, torch.tensor([0.0, 1.0], dtype=torch.float64), t_f=t_f), Gaussian(2).double()
    )


@pytest.fixture
def x():
    return torch.randn(6, 2, dtype=torch.float64)


# ------------------------------------------------------------------------------------------ gradients of t_f


def printed_gradient(model: FlowModel, x: torch.Tensor) -> float:
    """The paper's expression below eq. (12): -E[dlog p/dz . f] + E[-Tr df/dz], at z(t_f)."""
    z = model.encode(x)[0].detach().requires_grad_()
    score = torch.autograd.grad(model.base.log_prob(z).sum(), z)[0]
    t, state = model.span.t_f.detach(), torch.cat([torch.zeros_like(z[:, :1]), z], 1).detach()
    rate = model.span.vf(t, state).detach()  # [-Tr, f], with the noise of the last solve
    return (-(score * rate[:, 1:]).sum(1) + rate[:, 0]).mean().item()


@pytest.mark.parametrize("kind", FIELDS)
def test_the_gradient_in_t_f_is_that_of_the_discrete_solution(kind, x):
    model = flow(FIELDS[kind]())
    model.nll(x).backward()
    found = model.span.t_f.grad.item()
    one = torch.ones((), dtype=torch.float64)
    assert_close(found, difference(lambda: model.nll(x), [model.span.t_f], [one]), 1.0, 1e-7, kind)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
@pytest.mark.parametrize("kind", ["exact", "closed form, hypernetwork", "hutchinson, hypernetwork"])
def test_the_gradient_in_t_f_is_the_paper_s_expression(kind, sensitivity, x):
    field = FIELDS[kind]()
    model = adaptive_flow(field, sensitivity=sensitivity)
    model.nll(x).backward()
    found = model.span.t_f.grad.item()
    # The adaptive autograd gradient holds the accepted steps, whose last one has an error of its own.
    tolerance = 1e-5 if sensitivity == "autograd" else 1e-7
    assert_close(found, printed_gradient(model, x), 1.0, tolerance, "eq. (12)")
    fine = flow(field, steps=60)  # its t_f moves within a step, so that differences of it are smooth
    one = torch.ones((), dtype=torch.float64)
    assert_close(found, difference(lambda: fine.nll(x), [fine.span.t_f], [one]), 1.0, 1e-5, "differences")


@pytest.mark.parametrize("kind", ["exact, timed", "closed form, hypernetwork", "hutchinson"])
def test_both_sensitivities_agree_on_the_field(kind, x):
    field = FIELDS[kind]()
    grads = []
    for sensitivity in ("autograd", "adjoint"):
        model = adaptive_flow(field, sensitivity=sensitivity)
        field.zero_grad()
        model.nll(x).backward()
        grads.append(torch.cat([p.grad.flatten() for p in field.parameters() if p.grad is not None]))
    assert torch.allclose(grads[0], grads[1], rtol=1e-5, atol=1e-8)


def test_the_adjoint_uses_the_noise_of_its_own_solve():
    # Another forward before backward draws new noise, which must not reach the first one's gradient.
    noise = MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    model = adaptive_flow(CNF(mlp(), hutch_trace, noise), sensitivity="adjoint")
    x = torch.randn(6, 2, dtype=torch.float64)
    found = []
    for disturbed in (False, True):
        torch.manual_seed(5)
        loss = model.nll(x)
        if disturbed:
            model.nll(2 * x)
        model.zero_grad()
        loss.backward()
        found.append(model.span.t_f.grad.item())
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------ values and directions


def test_the_closed_form_trace_is_the_exact_one(x):
    net = strong(HyperNet(2, 4, 8)).double()
    closed, exact = HyperCNF(net), CNF(net)
    state = torch.cat([torch.randn(6, 1, dtype=torch.float64), x], 1)
    weights = torch.randn(6, 3, dtype=torch.float64)
    net.t = torch.tensor(0.4, dtype=torch.float64)
    grads = []
    for module in (closed, exact):
        net.zero_grad()
        out = module(state.clone())
        (out * weights).sum().backward()
        grads.append((out.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-10, atol=1e-12)


def test_a_linear_flow_has_its_gaussian_density(x):
    # z' = A z: x = exp(-A t_f) z is Gaussian with the covariance S S', S = exp(-A t_f).
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.8, -1.5], [1.2, 0.3]]))
    model = flow(CNF(linear), steps=30)
    s = torch.linalg.matrix_exp(-linear.weight.detach() * model.span.t_f.item())
    exact = MultivariateNormal(torch.zeros(2, dtype=torch.float64), s @ s.T)
    assert torch.allclose(model.log_prob(x), exact.log_prob(x), rtol=1e-6, atol=1e-6)
    samples = model.sample(20_000)
    assert torch.allclose(samples.T.cov(), exact.covariance_matrix, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", ["exact, timed", "closed form, hypernetwork"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_there_and_back(kind, solver, x):
    model = flow(FIELDS[kind](), steps=100) if solver == "rk4" else adaptive_flow(FIELDS[kind]())
    with torch.no_grad():
        z, change = model.encode(x)
        back, change_back = model.decode(z)
    assert (z - x).abs().max() > 0.1  # the flow does move them
    # Solver tolerance: 1e-8 a step for dopri5, which its steps and the flow's stretching multiply.
    within = 1e-8 if solver == "rk4" else 1e-6
    assert torch.allclose(back, x, rtol=0, atol=within)
    assert torch.allclose(change, change_back, rtol=0, atol=within)


def test_there_and_back_with_a_learned_start(x):
    node = NeuralODE(HyperCNF(strong(HyperNet(2, 4, 8))).double(), solver="rk4")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 41, dtype=torch.float64), t_f=0.61, learn_t0=True)
    model = FlowModel(span, Gaussian(2).double())
    with torch.no_grad():
        span.t0.fill_(0.113)
        assert torch.allclose(model.decode(model.encode(x)[0])[0], x, rtol=0, atol=1e-6)
    assert span.t0.item() == 0.113 and span.t_f.item() == 0.61


def grid_of(low, high, n):
    line = torch.linspace(low, high, n, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    return points, ((high - low) / (n - 1)) ** 2


def test_the_density_integrates_to_one_and_samples_follow_it():
    model = flow(HyperCNF(strong(HyperNet(2, 4, 8))), steps=20)
    points, area = grid_of(-8, 8, 161)
    with torch.no_grad():
        log_p = model.log_prob(points)
        assert abs(log_p.exp().sum().item() * area - 1) < 0.01
        assert model.encode(points)[1].std() > 0.1  # else any sign of l would integrate to one
        entropy = -(log_p.exp() * log_p).sum().item() * area
        # The entropy from samples: its standard error is about 1 / sqrt(20,000) = 0.007 nats.
        assert model.nll(model.sample(20_000)).item() == pytest.approx(entropy, abs=0.03)


def test_a_trained_flow_integrates_to_one_and_beats_its_start():
    generator = torch.Generator().manual_seed(0)
    span = tm.LearnableSpan(NeuralODE(HyperCNF(), solver="rk4"), torch.linspace(0, 1, 41), t_f=0.2)
    model = FlowModel(span, Gaussian(2, variance=0.1), lr=0.03)
    optimizer = model.configure_optimizers()
    before = model.nll(density_moons(2000, generator)).item()
    for _ in range(40):
        optimizer.zero_grad()
        (model.nll(density_moons(256, generator)) + 0.35 * span.duration).backward()
        optimizer.step()
    model.double()
    with torch.no_grad():
        points, area = grid_of(-4, 5, 121)
        assert abs(model.log_prob(points).exp().sum().item() * area - 1) < 0.01
        assert model.nll(density_moons(2000, generator).double()).item() < before - 2


def test_wrapped_in_one_line_it_is_the_same_flow():
    noise = MultivariateNormal(torch.zeros(2), torch.eye(2))
    node = NeuralODE(CNF(mlp(), hutch_trace, noise), solver="rk4")
    state = torch.cat([torch.zeros(8, 1), torch.randn(8, 2)], 1)
    t_span = torch.linspace(0, 1, 11)
    torch.manual_seed(1)
    _, bare = node(state, t_span)
    torch.manual_seed(1)
    _, wrapped = tm.LearnableSpan(node, t_span)(state)
    assert torch.allclose(bare, wrapped, atol=1e-6)


# ------------------------------------------------------------------------------------------ sampling and composing


def test_sampling_leaves_the_learned_interval_alone():
    # Neither span nor node was given a t_span: the first one passed would fill t_f, and sampling passes one.
    model = FlowModel(tm.LearnableSpan(NeuralODE(HyperCNF(), solver="rk4")), Gaussian(2))
    with torch.no_grad():
        model.span.t_f.fill_(0.3)
    assert model.sample(7).shape == (7, 2)  # before any training
    assert model.span.t_f.item() == pytest.approx(0.3)
    assert model.span.steps == 30


def test_samples_carry_no_graph_and_take_the_field_s_dtype():
    model = flow(HyperCNF(HyperNet(2, 4, 8)))
    samples = model.sample(3)
    assert samples.dtype == torch.float64 and not samples.requires_grad


def test_inference_mode_and_exact_trace():
    model = FlowModel(tm.LearnableSpan(NeuralODE(CNF(mlp()), solver="rk4"), torch.linspace(0, 1, 5)), Gaussian(2))
    x = torch.randn(4, 2)
    expected = model.log_prob(x)
    with torch.inference_mode():
        assert torch.allclose(model.log_prob(torch.empty_like(x).copy_(x)), expected)
        assert model.sample(2).shape == (2, 2)


def test_a_running_cost_keeps_the_density(x):
    field = CNF(mlp())
    plain = flow(field)
    costly = flow(field, integral_loss=lambda t, z: z.square().sum(1))
    assert torch.allclose(plain.log_prob(x), costly.log_prob(x))
    assert torch.allclose(plain.decode(x)[0], costly.decode(x)[0])


def test_a_regularizer_sees_the_noise_of_the_last_solve():
    noise = MultivariateNormal(torch.zeros(2), torch.eye(2))
    span = tm.LearnableSpan(NeuralODE(CNF(mlp(), hutch_trace, noise), solver="rk4"), torch.tensor([0.0, 0.5, 1.0]))
    model = FlowModel(span, Gaussian(2))
    doubling = StepDoubling(model)
    model.nll(torch.randn(8, 2))
    first, again = doubling.penalty().item(), doubling.penalty().item()
    # New noise would differ in the trace by order one, and make the penalty that large.
    assert first == again < 1e-4


@pytest.mark.parametrize("kind", ["hutchinson", "closed form, hypernetwork"])
def test_regularizers_along_the_path_take_the_flow_s_own_noise_and_skip_its_first_column(kind, x):
    model = flow(FIELDS[kind]())
    kinetic, jacobian = KineticEnergy(model), JacobianNorm(model)
    nll = model.nll(x)
    (nll + kinetic.penalty() + jacobian.penalty() + 0.1 * model.span.duration).backward()
    assert model.span.t_f.grad.isfinite()
    if kind == "hutchinson":
        assert torch.equal(jacobian.noise, HeldNoise().sample((len(x),)))
    # By hand: the trapezoidal rule over the speed of z alone.
    with torch.no_grad():
        t_eval, sol = model.span(torch.cat([torch.zeros_like(x[:, :1]), x], 1))
        speed = torch.stack([model.span.vf(t, z)[:, 1:].square().mean() / 2 for t, z in zip(t_eval, sol, strict=True)])
    assert kinetic.penalty().item() == pytest.approx(torch.trapezoid(speed, t_eval.detach()).item(), rel=1e-9)


class Loader(torch.utils.data.DataLoader):
    def __init__(self, wrapped: bool):
        x = torch.randn(32, 2) + 1
        data = torch.utils.data.TensorDataset(x) if wrapped else x
        super().__init__(data, batch_size=16)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")
def test_lightning_trains_it_with_the_price_of_time(wrapped):
    node = NeuralODE(CNF(mlp()), solver="rk4")
    node.t_span = torch.linspace(0, 1, 6)
    model = FlowModel(node, Gaussian(2), lr=0.01)
    fit = trainer(3, MinimumTime(weight=50.0), log_every_n_steps=1)
    fit.fit(model, Loader(wrapped), Loader(wrapped))
    assert model.span.t_f.item() == pytest.approx(1 - 6 * 0.01, abs=2e-3)  # Adam: one lr a step, downhill
    assert {"nll", "val_nll", "t_f", "nfe"} <= set(fit.callback_metrics)


def test_the_times_do_not_decay_and_a_frozen_one_stays_out():
    model = flow(CNF(mlp()))
    groups = model.configure_optimizers().param_groups
    assert [len(g["params"]) for g in groups] == [4, 1] and groups[1]["params"][0] is model.span.t_f
    model.span.t_f.requires_grad_(False)
    assert [len(g["params"]) for g in model.configure_optimizers().param_groups] == [4]


def test_a_base_module_is_trained_and_saved():
    class Learned(Gaussian):
        def __init__(self):
            super().__init__(2)
            mean = self.mean
            del self.mean
            self.mean = nn.Parameter(mean)

    span = tm.LearnableSpan(NeuralODE(CNF(mlp()), solver="rk4"), torch.linspace(0, 1, 5))
    model = FlowModel(span, Learned())
    model.nll(torch.randn(8, 2)).backward()
    assert model.base.mean.grad.abs().sum() > 0
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.base.mean.add_(1.0)
        model.span.t_f.fill_(0.4)
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(model.log_prob(x), other.log_prob(x))


def test_a_torch_distribution_as_the_base():
    base = MultivariateNormal(torch.zeros(2), 0.1 * torch.eye(2))
    span = tm.LearnableSpan(NeuralODE(CNF(mlp()), solver="rk4"), torch.linspace(0, 1, 5))
    x = torch.randn(4, 2)
    assert torch.allclose(FlowModel(span, base)(x), FlowModel(span, Gaussian(2, variance=0.1))(x), atol=1e-5)


# ------------------------------------------------------------------------------------------ conditions


def conditional_net(width=3):
    return nn.Sequential(ContextCat(), nn.Linear(2 + width, 8), nn.Tanh(), nn.Linear(8, 2))


class Held(nn.Module):
    """The conditional net for one context, as its first layer's bias: the field that a context must amount to."""

    def __init__(self, net, context):
        super().__init__()
        first = nn.Linear(2, 8)
        first.weight = nn.Parameter(net[1].weight[:, :2].detach().clone())
        first.bias = nn.Parameter((net[1].bias + net[1].weight[:, 2:] @ context).detach())
        self.net = nn.Sequential(first, *net[2:])

    def forward(self, z):
        return self.net(z)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_context_makes_the_field_of_each_row(trace, sensitivity, x):
    more = (hutch_trace, HeldNoise()) if trace == "hutchinson" else ()
    net = conditional_net().double()
    model = flow(CNF(net, *more), sensitivity=sensitivity)
    assert model.conditional and not flow(CNF(mlp())).conditional
    context = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    found = model.log_prob(x, context)
    for i in range(2):
        alone = flow(CNF(Held(net, context[i].detach()), *more)).log_prob(x)[i]
        assert torch.allclose(found[i], alone, rtol=1e-12)
    assert torch.allclose(model.log_prob(x, context[:1]), model.log_prob(x, context[:1].expand(6, 3)))
    z, change = model.encode(x, context)
    back, other = model.decode(z, context)
    # Ten steps of rk4 there and back.
    assert torch.allclose(back, x, atol=1e-5) and torch.allclose(other, change, atol=1e-5)
    gradients = torch.autograd.grad(found.sum(), [context, model.span.t_f])
    assert all(g.abs().sum() > 0 for g in gradients)
    direction = torch.randn(6, 3, dtype=torch.float64)
    if sensitivity == "autograd":
        found = (gradients[0] * direction).sum().item()
        assert_close(
            found, difference(lambda: model.log_prob(x, context).sum(), [context], [direction]), 1.0, 1e-7, trace
        )
    assert net[0].context is None  # it is there for the length of a solve alone


def test_samples_of_a_context_and_regularizers_of_the_last_solve():
    model = flow(CNF(conditional_net()))
    model.base.sample = lambda shape: torch.ones(*shape, 2, dtype=torch.float64)
    one, two = torch.randn(2, 1, 3, dtype=torch.float64)
    samples = model.sample(4, torch.cat([one, two, one, two]))
    assert torch.allclose(samples[0], samples[2]) and not torch.allclose(samples[0], samples[1])
    assert torch.allclose(model.sample(2, one), samples[[0, 2]])
    doubling = StepDoubling(model)
    model.nll(samples, one)
    assert doubling.penalty().item() >= 0  # solved again, with the context that is no longer set


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_flow_is_made_whatever_context_is_set_on_its_field(rows):
    class Set(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.labels = nn.Linear(3, 2), torch.ones(rows, 1)

        def forward(self, z):
            return self.layer(torch.cat([z, self.labels], 1))

    model = FlowModel(tm.LearnableSpan(NeuralODE(CNF(Set()), solver="rk4"), torch.linspace(0, 1, 5)), Gaussian(2))
    assert model.log_prob(torch.randn(rows, 2)).shape == (rows,)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")
def test_lightning_trains_a_conditional_flow():
    x, context = torch.randn(32, 2), torch.randn(32, 3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, context), batch_size=16)
    model = FlowModel(NeuralODE(CNF(conditional_net()), solver="rk4"), Gaussian(2), lr=0.01)
    model.span.step_size = 0.25
    first = model.nll(x, context).item()
    trainer(5).fit(model, loader, loader)
    assert model.nll(x, context).item() < first


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda m, x: m.log_prob(x), ValueError, "conditional and has no context; pass context="),
        (lambda m, x: m.log_prob(x, [1.0]), TypeError, "context must be a tensor .* got list"),
        (lambda m, x: m.log_prob(x, torch.zeros(4, 3)), ValueError, r"a row for each of the 6 samples.*\(4, 3\)"),
        (lambda m, x: m.sample(2, torch.zeros(())), ValueError, r"a row for each of the 2 samples.*\(\)"),
        (lambda m, x: flow(CNF(mlp())).nll(x, x), ValueError, "no module of the field has an attribute `context`"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(call, error, text, x):
    model = flow(CNF(conditional_net()))
    before = model.span.vf.nfe
    with pytest.raises(error, match=text):
        call(model, x)
    assert model.span.vf.nfe == before and model.span.vf.vf.vf.net[0].context is None


# ------------------------------------------------------------------------------------------ other layouts and directions


class LastDensity(nn.Module):
    """[f, Tr(df/dz)] for a state [z, l], as the wrapper in torchcfm's examples has it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x, *args, **kwargs):
        def velocity(z):
            return self.net(z[None])[0]

        z = x[..., :-1]
        trace = torch.vmap(lambda z: torch.trace(torch.func.jacrev(velocity)(z)))(z)
        return torch.cat([self.net(z), trace[:, None]], 1)


@pytest.mark.parametrize("base_at", ["start", "end"])
@pytest.mark.parametrize("costly", [False, True])
def test_the_log_density_may_come_last(base_at, costly, x):
    net = mlp().double()
    cost = {"integral_loss": lambda t, z: z.square().sum(1)} if costly else {}

    def made(field, **options):
        node = NeuralODE(field, solver="rk4", **cost)
        span = tm.LearnableSpan(node, torch.linspace(0, 1, 11, dtype=torch.float64), t_f=0.73)
        return FlowModel(span, Gaussian(2).double(), base_at=base_at, **options)

    first, last = made(CNF(net)), made(LastDensity(net), log_density="last")
    assert torch.allclose(first.log_prob(x), last.log_prob(x), rtol=1e-12)
    for one, other in zip(first.decode(x), last.decode(x), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_the_base_at_the_start_is_the_flow_the_other_way(x):
    """z' = f from the base to data is z' = -f from data to the base."""

    class Turned(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, z):
            return -self.net(z)

    net = mlp().double()
    node = NeuralODE(CNF(net), solver="rk4")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 11, dtype=torch.float64))
    matched = FlowModel(span, Gaussian(2).double(), base_at="start")
    other = flow(CNF(Turned(net)), t_f=1.0)
    assert torch.allclose(matched.log_prob(x), other.log_prob(x), rtol=1e-12)
    assert torch.allclose(matched.decode(x)[0], other.decode(x)[0], rtol=1e-12)


# ------------------------------------------------------------------------------------------ few evaluations both ways


def lively(net):
    """A net that moves points by about their own size."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net.double()


def few_and_exact(kind):
    """A flow solved by three steps of rk4, the same to 1e-9, and a context."""
    base_at = "start" if "start" in kind else "end"
    context = torch.ones(1, 3, dtype=torch.float64) if "context" in kind else None
    torch.manual_seed(3)
    net = lively(conditional_net() if context is not None else timed_mlp() if "timed" in kind else mlp())
    log_density = "last" if "last" in kind else "first"
    field = LastDensity(net) if log_density == "last" else CNF(net)
    models = []
    for options in ({"solver": "rk4"}, {"solver": "dopri5", "atol": 1e-9, "rtol": 1e-9}):
        points = 4 if options["solver"] == "rk4" else 2
        span = tm.LearnableSpan(NeuralODE(field, **options), torch.linspace(0, 1, points, dtype=torch.float64))
        models.append(FlowModel(span, Gaussian(2).double(), base_at=base_at, log_density=log_density))
    return *models, context


@pytest.mark.parametrize("kind", ["plain", "timed, base at the start", "log-density last", "context"])
def test_solvers_are_fitted_to_both_directions_of_a_flow(kind):
    model, exact, context = few_and_exact(kind)
    x = torch.randn(200, 2, dtype=torch.float64)
    random, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    fit = model.fit_solvers(x[:100], context, evaluations=4, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    few = fit.model
    assert next(few.parameters()) is not None and few.span.vf is model.span.vf and not few.span.t_f.requires_grad
    with torch.no_grad():
        for way in ("encode", "decode"):
            (end, change), (wanted, other) = (getattr(m, way)(x[100:], context) for m in (few, exact))
            assert few.span.nfe == 4
            bounds = fit.density if way == "encode" else fit.samples
            # Of other states than those that were held out, of which there are 25.
            assert (end - wanted).square().mean() < 0.05**2 * (wanted - x[100:]).square().mean()
            assert (change - other).square().mean().sqrt() < 3 * bounds.error.log_density
        # There and back: the likelihood of the same points agrees.
        z, change = few.encode(x[100:], context)
        back, same = few.decode(z, context)
        assert (back - x[100:]).square().mean().sqrt() < 0.1 and (same - change).square().mean().sqrt() < 0.1
    assert few.sample(3, context).shape == (3, 2) and "nats" in str(fit)


def test_solvers_fitted_in_inference_mode_are_as_elsewhere():
    model, _, _ = few_and_exact("timed")
    x = torch.randn(100, 2, dtype=torch.float64)
    wanted = model.fit_solvers(x, evaluations=2, progress=False).model
    with torch.inference_mode():
        made = model.fit_solvers(x.clone(), evaluations=2, progress=False).model
    assert torch.equal(made.log_prob(x), wanted.log_prob(x))
    made.nll(x).backward()  # a tensor of inference mode would take no gradient


def test_a_tolerance_holds_for_both_directions():
    model, _, _ = few_and_exact("plain")
    fit = model.fit_solvers(torch.randn(100, 2, dtype=torch.float64), tol=0.05, progress=False)
    assert fit.density.error.rms <= 0.05 and fit.samples.error.rms <= 0.05
    assert fit.model.span.solver.stages == fit.density.evaluations
    with pytest.raises(ValueError, match="no solver of up to 1 evaluations meets tol"):
        model.fit_solvers(torch.randn(100, 2, dtype=torch.float64), tol=1e-6, evaluations=1, progress=False)


def test_a_solver_that_was_trained_on_densities_says_that_it_is_none_for_samples(x):
    model = flow(CNF(mlp()), solver=tm.LearnableSolver(3))
    model.sample(2)  # at its start it errs as midpoint does, both ways
    model.nll(x)
    model.log_prob(x)
    with pytest.warns(UserWarning, match="fitted to solves forward in time and is run backward"):
        model.sample(2)


def test_the_direction_is_written_once(x):
    """It lies in a buffer, which is written in place."""
    model = flow(CNF(mlp()), solver=tm.LearnableSolver(3))
    model.nll(x)
    settings = model.span.solver._settings
    version = settings._version
    model.nll(x)
    assert int(settings[2]) == 1 and settings._version == version


def test_the_fits_of_both_directions_stand_alone():
    model, _, _ = few_and_exact("plain")
    fit = model.fit_solvers(torch.randn(100, 2, dtype=torch.float64), evaluations=2, progress=False)
    solvers = [made.node.solver for made in (fit.density, fit.samples)]
    before = [solver.free.detach().clone() for solver in solvers]
    both = [fit.model.span.solver, fit.model.span.solver.other]
    with torch.no_grad():
        for solver in both:
            solver.free.add_(1.0)
    assert all(torch.equal(solver.free, free) for solver, free in zip(solvers, before, strict=True))
    assert {solver.direction for solver in both} == {1, -1}


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda, device = True, torch.device("cuda", 0)


def test_the_generator_of_the_data_s_gpu_stays_as_it_is(x, monkeypatch):
    def fork_rng(devices):
        raise InterruptedError(str(devices))

    model = flow(CNF(mlp()))
    monkeypatch.setattr(model, "_check", lambda *_: None)
    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with pytest.raises(InterruptedError, match="index=0"):
        model.fit_solvers(x.as_subclass(OnGPU))


class Sampler(nn.Module):
    """A flow for densities, and a second node over its net, for samples alone."""

    def __init__(self, over, **options):
        super().__init__()
        cnf = CNF(mlp())
        self.flow = NeuralODE(cnf, solver="rk4")
        self.sampler = NeuralODE(cnf if over == "flow" else cnf.net, solver="midpoint", **options)


@pytest.mark.parametrize("over", ["flow", "net"])
def test_two_nodes_over_one_flow_share_their_times(over):
    model = tm.wrap(Sampler(over), learn_t0=over == "flow")
    assert model.flow.t_f is model.sampler.t_f and (model.flow.t0 is model.sampler.t0) == (over == "flow")
    with torch.no_grad():
        model.flow.t_f.fill_(0.4)
    assert model.sampler.grid()[-1].item() == pytest.approx(0.4)
    assert len(tm.parameter_groups(model, lr=0.1)[1]["params"]) == 1 + (over == "flow")
    made = copy.deepcopy(model)
    assert made.flow.t_f is made.sampler.t_f is not model.flow.t_f
    made.load_state_dict(model.state_dict())
    for span, width in ((model.flow, 3), (model.sampler, 3 if over == "flow" else 2)):
        span(torch.zeros(2, width))  # unwrap checks with a state of this shape
    unwrapped = tm.unwrap(model)
    assert unwrapped.sampler.t_span[-1].item() == pytest.approx(0.4, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")
def test_times_that_are_shared_are_priced_once():
    ends = []
    for two in (False, True):
        torch.manual_seed(0)
        cnf = CNF(mlp())
        model = FlowModel(tm.LearnableSpan(NeuralODE(cnf, solver="rk4"), torch.linspace(0, 1, 5)), Gaussian(2))
        if two:
            model.sampler = NeuralODE(cnf.net, solver="rk4")
            model.sampler.t_span = torch.linspace(0, 1, 5)
            tm.wrap(model)
            assert model.sampler.t_f is model.span.t_f
        model.configure_optimizers = lambda model=model: torch.optim.SGD(tm.parameter_groups(model, lr=1e-4))
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        loader = torch.utils.data.DataLoader(x, batch_size=8)
        trainer(1, MinimumTime(weight=1000.0)).fit(model, loader, loader)
        ends.append(model.span.t_f.item())
    assert ends[0] == ends[1] == pytest.approx(0.9, abs=1e-2)


def test_layers_of_shared_weights_and_other_intervals_keep_times_of_their_own():
    net = mlp()
    layers = tm.wrap(nn.Sequential(NeuralODE(net, return_t_eval=False), NeuralODE(net, return_t_eval=False)))
    assert layers[0].t_f is not layers[1].t_f
    model = Sampler("net")
    model.sampler.t_span = torch.linspace(0, 2, 5)
    model = tm.wrap(model)
    assert model.flow.t_f is not model.sampler.t_f


# ------------------------------------------------------------------------------------------ bad input


def node_of(field: nn.Module, **options) -> NeuralODE:
    return NeuralODE(field, solver="rk4", **options)


def without_noise() -> NeuralODE:
    field = CNF(mlp(), hutch_trace, MultivariateNormal(torch.zeros(2), torch.eye(2)))
    field.noise_dist = None
    return node_of(field)


def wide_noise() -> NeuralODE:
    return node_of(CNF(mlp(), hutch_trace, MultivariateNormal(torch.zeros(3), torch.eye(3))))


CONSTRUCTION = {
    "no node": (lambda: FlowModel(mlp(), Gaussian(2)), TypeError, "NeuralODE over a CNF.*Sequential"),
    "no flow": (lambda: FlowModel(node_of(mlp(3)), Gaussian(2)), TypeError, "no trace.*CNF"),
    "two layouts": (
        lambda: FlowModel(node_of(CNF(mlp())), Gaussian(2), log_density="last"),
        ValueError,
        r"fields of a state \[z, l\]; CNF has \[l, z\]",
    ),
    "layout": (
        lambda: FlowModel(node_of(CNF(mlp())), Gaussian(2), log_density="middle"),
        ValueError,
        "log_density must be one of .* got 'middle'",
    ),
    "direction": (
        lambda: FlowModel(node_of(CNF(mlp())), Gaussian(2), base_at="top"),
        ValueError,
        "base_at must be one of .* got 'top'",
    ),
    "no base": (lambda: FlowModel(node_of(CNF(mlp())), None), TypeError, "NoneType has no log_prob"),
    "base of another dimension": (lambda: FlowModel(node_of(CNF(mlp())), Gaussian(3)), ValueError, "dimension 3"),
    "base of many": (
        lambda: FlowModel(node_of(CNF(mlp())), Normal(torch.zeros(2), torch.ones(2))),
        ValueError,
        r"batch_shape \(2,\).*Independent",
    ),
    "no noise": (lambda: FlowModel(without_noise(), Gaussian(2)), ValueError, "needs noise_dist"),
    "noise of another dimension": (
        lambda: FlowModel(wide_noise(), Gaussian(2)),
        ValueError,
        r"shape \(3,\).*dimension 2",
    ),
    "data control": (
        lambda: FlowModel(node_of(CNF(nn.Sequential(DataControl(), nn.Linear(4, 2)))), Gaussian(2)),
        ValueError,
        "DataControl",
    ),
    "second order": (lambda: FlowModel(node_of(CNF(mlp()), order=2), Gaussian(2)), ValueError, "order=2"),
    "learning rate": (lambda: FlowModel(node_of(CNF(mlp())), Gaussian(2), lr=-1.0), ValueError, "lr must be.*-1.0"),
    "no known trace": (lambda: HyperCNF(mlp()), TypeError, "value_and_trace.*Sequential"),
    "variance": (lambda: Gaussian(2, variance=0.0), ValueError, "variance"),
    "dimension": (lambda: Gaussian(0), ValueError, "dim must be"),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction_is_refused_clearly(case):
    make, error, text = CONSTRUCTION[case]
    with pytest.raises(error, match=f"(?s){text}"):
        make()


DATA = {
    "an array": (lambda m: m.log_prob([[0.0, 1.0]]), TypeError, "tensor.*list"),
    "whole numbers": (lambda m: m.log_prob(torch.zeros(3, 2, dtype=torch.long)), TypeError, "int64"),
    "with the column": (lambda m: m.log_prob(torch.zeros(3, 3)), ValueError, r"\(3, 3\).*column"),
    "one point": (lambda m: m.log_prob(torch.zeros(2)), ValueError, r"\[batch, 2\]"),
    "NaN": (lambda m: m.nll(torch.tensor([[0.0, 1.0], [math.nan, 0.0]])), ValueError, "1 of 2 rows, first in row 1"),
    "infinity": (lambda m: m.nll(torch.tensor([[math.inf, 1.0]])), ValueError, "NaN or infinite"),
    "NaN base points": (lambda m: m.decode(torch.full((2, 2), math.nan)), ValueError, "base points z"),
    "no samples": (lambda m: m.sample(0), ValueError, "number of draws.*0"),
    "half a sample": (lambda m: m.sample(1.5), ValueError, "1.5"),
}


@pytest.mark.parametrize("case", DATA)
def test_data_is_refused_clearly(case):
    call, error, text = DATA[case]
    model = FlowModel(node_of(CNF(mlp())), Gaussian(2))
    with pytest.raises(error, match=f"(?s){text}"):
        call(model)
    assert model.span.t_f.grad is None and model.span.nfe == 0


def test_large_finite_data_are_not_taken_for_infinite():
    big = torch.full((4, 2), 3e38)  # their sum overflows
    still = nn.Linear(2, 2)
    for parameter in still.parameters():
        nn.init.zeros_(parameter)
    model = FlowModel(node_of(CNF(still)), Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    with torch.no_grad():
        assert torch.equal(model.encode(big)[0], big)


def test_construction_leaves_nothing_behind():
    node = node_of(CNF(mlp()))
    state = torch.random.get_rng_state()
    FlowModel(node, Gaussian(2))
    assert torch.equal(state, torch.random.get_rng_state()) and node.vf.nfe == 0


def test_an_unwrapped_flow_says_so():
    model = FlowModel(tm.LearnableSpan(node_of(CNF(mlp())), torch.linspace(0, 1, 5)), Gaussian(2))
    x = torch.randn(4, 2)
    expected = model.log_prob(x)
    tm.unwrap(model, x)
    with pytest.raises(TypeError, match="wrap"):
        model.log_prob(x)
    assert torch.allclose(tm.wrap(model).log_prob(x), expected)


def test_the_likelihood_of_no_samples_is_refused():
    model = flow(CNF(mlp()))
    with pytest.raises(ValueError, match=r"nll is a mean over samples, and x of the shape \(0, 2\) has none"):
        model.nll(torch.zeros(0, 2, dtype=model.span.t_f.dtype))
    assert model.log_prob(torch.zeros(0, 2, dtype=model.span.t_f.dtype)).shape == (0,)
