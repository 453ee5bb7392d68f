"""compress_sampler: a copy that reaches the same ends with fewer evaluations, and the sampler as it was."""

import math

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace
from torchdyn.nn import DepthCat

import torchdyn_mintime as tm
from torchdyn_mintime.depth import sampler as rooms
from torchdyn_mintime.depth.compress import copied


def field(seed=0, timed=True):
    """A lively network of the plane."""
    torch.manual_seed(seed)
    layers = [DepthCat(1), nn.Linear(3, 16)] if timed else [nn.Linear(2, 16)]
    net = nn.Sequential(*layers, nn.Tanh(), nn.Linear(16, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.5)
    return net


def states(n=256, seed=1):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def exact(model, x, t_span=(0.0, 1.0), args=None, down=False):
    node, times = NeuralODE(copied(model).vf.vf, solver="dopri5", atol=1e-7, rtol=1e-7), torch.tensor(t_span)
    with torch.no_grad():
        return tm.LearnableSpan(node, times)(x, times.flip(0) if down else None, args=args or {})[1][-1]


def relative(found, wanted, start):
    return ((found - wanted).square().mean() / (wanted - start).square().mean()).sqrt().item()


class Turned(nn.Module):
    """A velocity that turns with the first entry of its args."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t, x, args):
        return 2 * self.net(torch.cat([x, args["label"]], 1)) * args["speed"]


def test_the_copy_reaches_the_ends_in_fewer_evaluations_than_a_fitted_solver_needs():
    node = NeuralODE(field(), solver="tsit5", sensitivity="adjoint")  # which play no part
    model = tm.LearnableSpan(node, torch.tensor([0.0, 1.0]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, random, nfe = [m.training for m in model.modules()], torch.get_rng_state(), node.vf.nfe
    sampler, verdict = tm.compress_sampler(model, states(), tol=0.05, lr=0.003, progress=False, max_iterations=400)
    assert verdict.feasible and verdict.best.evaluations <= 4
    with pytest.raises(ValueError, match="no solver of up to"):
        tm.fit_solver(model, states(), tol=0.05, evaluations=verdict.best.evaluations, progress=False)

    fresh = states(500, seed=9)
    with torch.no_grad():
        _, sol = sampler(fresh)
    # Fresh states, and 1,000 numbers: the verdict's own figure is the worst of batches.
    assert relative(sol[-1], exact(model, fresh), fresh) < 1.5 * 0.05
    assert sampler.nfe == verdict.best.evaluations
    assert relative(exact(sampler, fresh), sol[-1], fresh) < 1.5 * 0.1  # it is its own ODE
    assert not sampler.t_f.requires_grad and (sampler.t0.item(), sampler.t_f.item()) == (0.0, 1.0)

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes and node.vf.nfe == nfe
    assert torch.equal(torch.get_rng_state(), random)
    assert node.sensitivity == "adjoint"


def test_the_times_that_are_asked_for_keep_their_meaning():
    sampler, verdict = tm.compress_sampler(
        NeuralODE(field()), states(96), tol=0.2, solvers=["midpoint"], progress=False, max_iterations=1
    )
    x = states(8)
    with pytest.raises(
        ValueError, match=f"asks for times between 0 and 1, but {verdict.best.label} takes the whole interval in one"
    ):
        sampler.trajectory(x, torch.linspace(0, 1, 100))
    assert sampler.trajectory(x, torch.linspace(0, 1, 100), dense=True).shape == (100, 8, 2)
    assert torch.equal(sampler.trajectory(x, torch.linspace(0, 1, 2))[-1], sampler(x, torch.linspace(0, 1, 100))[1][-1])


def test_the_generator_of_the_states_gpu_stays_as_it_is(monkeypatch):
    class OnGPU(torch.Tensor):
        """A tensor that says it is on a GPU."""

        is_cuda, device = True, torch.device("cuda", 0)

    def fork_rng(devices):
        raise InterruptedError(str(devices))

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    with pytest.raises(InterruptedError, match="index=0"):
        rooms._States(NeuralODE(field()), states().as_subclass(OnGPU), None, 0.0)


def test_conditions_in_args_go_with_their_states():
    node = NeuralODE(Turned(), solver="rk4")
    x, label = states(96), torch.randn(96, 1, generator=torch.Generator().manual_seed(2))
    args = {"label": label, "speed": 1.5}
    sampler, verdict = tm.compress_sampler(node, x, args=args, tol=0.1, progress=False, max_iterations=60)
    assert verdict.feasible
    with torch.no_grad():
        end = sampler(x, args=args)[1][-1]
    assert relative(end, exact(node, x, args=args), x) < 0.1
    # With another row's label the end is another one.
    with torch.no_grad():
        assert relative(sampler(x, args={**args, "label": label.flip(0)})[1][-1], end, x) > 0.2


@pytest.mark.parametrize("shape", [(3, 2, 2), (2,)])
def test_states_of_any_shape_and_intervals_of_a_node(shape):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, t, x, args=None):
            return torch.tanh(self.layer(x)) + t

    torch.manual_seed(0)
    node = NeuralODE(Scaled())
    node.t_span = torch.tensor([0.5, 2.0])
    x = torch.randn(96, *shape)
    sampler, verdict = tm.compress_sampler(node, x, tol=0.2, progress=False, max_iterations=20)
    assert verdict.feasible and sampler.t0.item() == 0.5 and sampler.t_f.item() == 2.0
    assert relative(sampler(x)[1][-1], exact(node, x, (0.5, 2.0)), x) < 0.2


def test_a_log_density_is_trained_on_its_own_scale():
    torch.manual_seed(0)
    node = NeuralODE(CNF(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))), solver="rk4")
    x = torch.nn.functional.pad(states(64), (1, 0))
    sampler, verdict = tm.compress_sampler(node, x, tol=0.1, progress=False, max_iterations=20)
    assert verdict.feasible
    end, wanted = sampler(x)[1][-1], exact(node, x)
    for columns in ([0], [1, 2]):
        assert relative(end[:, columns], wanted[:, columns], x[:, columns]) < 0.2


@pytest.mark.parametrize("tol", [0.02, 0.1])
def test_it_is_never_worse_than_the_solver_that_is_fitted_alone_and_leaves_the_field_where_that_is_enough(tol):
    node, x = NeuralODE(field(2)), states(400)
    alone = tm.fit_solver(node, x, tol=tol, progress=False)
    sampler, verdict = tm.compress_sampler(node, x, tol=tol, progress=False, max_iterations=2)
    # The same states are held out; a quarter of the others is held out once more of the solver's own fit.
    assert verdict.feasible and verdict.best.evaluations <= alone.evaluations + 1
    assert verdict.best.iterations == 0 and verdict.best.loss <= tol and verdict.best is verdict.trials[0]
    assert all(torch.equal(p, q) for p, q in zip(sampler.vf.parameters(), node.vf.parameters(), strict=True))
    fresh = states(400, seed=9)
    with torch.no_grad():
        assert relative(sampler(fresh)[1][-1], exact(node, fresh), fresh) < 1.5 * tol  # of fresh states


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_whatever_mode_it_is_called_in(mode):
    node, options = NeuralODE(field()), {"tol": 0.02, "max_iterations": 20, "progress": False}
    wanted = tm.compress_sampler(node, states(), **options)[0]
    with mode():
        sampler = tm.compress_sampler(node, states(), **options)[0]
    assert all(map(torch.equal, sampler.parameters(), wanted.parameters()))
    sampler(states())[1][-1].sum().backward()  # a tensor of inference mode would take no gradient


def test_the_inverse_carries_ends_to_starts():
    node = NeuralODE(field())
    ends = exact(node, states())
    sampler, verdict = tm.compress_sampler(node, ends, tol=0.1, inverse=True, progress=False, max_iterations=40)
    back = torch.tensor([1.0, 0.0])
    assert verdict.feasible
    with torch.no_grad():
        found = sampler(ends, back)[1][-1]
    assert relative(found, states(), ends) < 0.1
    assert torch.equal(sampler.trajectory(ends, back)[-1], found)


class Labelled(nn.Module):
    """A velocity that waves with a label of each row."""

    def __init__(self, labels, how):
        super().__init__()
        self.net = field(timed=False)
        if how == "attribute":
            self.labels = labels
        else:
            self.register_buffer("labels", labels)

    def forward(self, t, x, args=None):
        return self.net(x) + torch.sin(3 * t + self.labels)[:, None]


@pytest.mark.parametrize("how", ["attribute", "buffer"])
def test_labels_on_the_field_go_with_their_states(how):
    labels, x = torch.linspace(0, 2, 96), states(96)
    node = NeuralODE(Labelled(labels, how))
    sampler, verdict = tm.compress_sampler(node, x, tol=0.1, progress=False, max_iterations=20)
    assert verdict.feasible
    with torch.no_grad():
        assert relative(sampler(x)[1][-1], exact(node, x), x) < 0.1
    copy = sampler.vf.vf
    assert torch.equal(copy.labels, labels) and copy.labels is not labels
    assert ("labels" in dict(copy.named_buffers())) == (how == "buffer")
    copy.labels = labels[:8] + 1  # others, in use
    assert sampler(x[:8])[1][-1].shape == (8, 2)


def test_a_buffer_with_as_many_rows_by_chance_stays_whole():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("frequencies", torch.linspace(0, 2, 96))
            self.net = nn.Linear(96, 2)

        def forward(self, t, x, args=None):
            return self.net(torch.sin(x[:, :1] * self.frequencies)) - x

    node, x = NeuralODE(Waves()), states(96)
    sampler, verdict = tm.compress_sampler(node, x, tol=0.1, progress=False, max_iterations=20)
    assert verdict.feasible and relative(sampler(x)[1][-1], exact(node, x), x) < 0.1


@pytest.mark.parametrize("inverse", [False, True])
def test_a_node_that_is_solved_down_is_refused_with_what_to_do(inverse):
    torch.manual_seed(0)
    node, x = NeuralODE(field()), states(96)
    node.t_span = torch.tensor([1.0, 0.0])
    call = "without a span" if inverse else r"as sampler\(x, torch.tensor\(\[1.0, 0.0\]\)\)"
    with pytest.raises(
        ValueError, match=rf"set node.t_span = torch.tensor\(\[0.0, 1.0\]\), .*={not inverse}, .* {call}"
    ):
        tm.compress_sampler(node, x, inverse=inverse, progress=False)
    node.t_span = torch.tensor([0.0, 1.0])  # as it says
    sampler, _ = tm.compress_sampler(node, x, tol=0.1, inverse=not inverse, progress=False, max_iterations=40)
    end = (sampler(x) if inverse else sampler(x, torch.tensor([1.0, 0.0])))[1][-1]
    assert relative(end, exact(node, x, down=not inverse), x) < 0.1


def test_the_noise_of_a_trace_is_held():
    node = flow_with_noise()
    noise, random = node.vf.vf.vf.noise_dist, torch.get_rng_state()
    x = torch.nn.functional.pad(states(96), (1, 0))
    sampler, verdict = tm.compress_sampler(node, x, tol=0.05, progress=False, max_iterations=20)
    assert verdict.feasible and torch.equal(torch.get_rng_state(), random)
    made = sampler.vf.vf.vf
    assert made.noise_dist is not None and node.vf.vf.vf.noise_dist is noise  # new draws in use
    # With one noise held in both, the log-density is that of the ODE.
    made.noise_dist = node.vf.vf.vf.noise_dist = None
    made.noise = node.vf.vf.vf.noise = torch.randn(96, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        end, wanted = sampler(x)[1][-1], exact(node, x)
    for columns in ([0], [1, 2]):
        assert relative(end[:, columns], wanted[:, columns], x[:, columns]) < 0.1


def test_what_finds_nothing_gives_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(rooms, "FIRST", 2)  # fits that cannot be enough
    node = NeuralODE(field(), solver="midpoint")
    sampler, verdict = tm.compress_sampler(
        node, states(96), tol=1e-6, solver_tol=1e-6, solvers=[], progress=False, max_iterations=2
    )
    assert not verdict.feasible
    x, t_span = states(8), torch.linspace(0, 1, 5)
    assert sampler.stepper.name == "midpoint" and not sampler.t_f.requires_grad
    assert torch.allclose(sampler(x, t_span)[1], node(x, t_span)[1], atol=1e-6)


def flow_with_noise():
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    return NeuralODE(CNF(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), hutch_trace, noise))


@pytest.mark.parametrize(
    "model, x, options, error, text",
    [
        (lambda: nn.Linear(2, 2), states(), {}, TypeError, "takes a NeuralODE or a LearnableSpan; got Linear"),
        (lambda: NeuralODE(field()), 3.0, {}, TypeError, "x0 must be a tensor"),
        (lambda: NeuralODE(field()), states()[:, :1], {}, ValueError, "does not accept a state of shape"),
        (lambda: NeuralODE(field()), states() / 0, {}, ValueError, "x0 holds NaN"),
        (lambda: NeuralODE(field()), states(1), {}, ValueError, "give more states"),
        (lambda: NeuralODE(field()), states(), {"tol": 0.0}, ValueError, "tol must be positive"),
        (lambda: NeuralODE(field()), states(), {"solver_tol": -1.0}, ValueError, "solver_tol must be positive"),
        (lambda: NeuralODE(field()), states(), {"lr": math.nan}, ValueError, "lr must be positive"),
        (lambda: NeuralODE(field()), states(), {"solvers": ["rk5"]}, ValueError, "solvers="),
        (lambda: NeuralODE(field()), states(), {"args": {"a": 1}}, ValueError, "takes no `args`"),
        (
            lambda: NeuralODE(nn.Sequential(nn.Dropout(), nn.Linear(2, 2))),
            states(),
            {},
            ValueError,
            "Dropout in training",
        ),
        (
            lambda: NeuralODE(field().requires_grad_(False)),
            states(),
            {},
            ValueError,
            "no parameter of the field requires a gradient",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused_and_left_alone(model, x, options, error, text):
    made = model()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with pytest.raises(error, match=text):
        tm.compress_sampler(made, x, progress=False, **options)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
