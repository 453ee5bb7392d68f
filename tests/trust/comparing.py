"""A model of torchdyn's built twice from one seed, and what the bare and the wrapped one return held side by side."""

import torch
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.numerics.solvers.ode import str_to_solver

import torchdyn_mintime as tm

ADAPTIVE = ("tsit5", "dopri5")
TOLERANCE = 1e-8
POINTS = (5, 2)


class Last(nn.Module):
    """z(t_f) of what a node returns, as in torchdyn's tutorials."""

    def forward(self, out):
        return out[1][-1] if isinstance(out, tuple) else out[-1]


def mlp(inputs, outputs, width=8):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def solver_of(name):
    return str_to_solver(name, torch.float64) if isinstance(name, str) else name


def node_of(field, solver, span=None, **options):
    node = NeuralODE(
        field, solver=solver_of(solver), **{"atol": TOLERANCE, "rtol": TOLERANCE, "atol_adjoint": TOLERANCE,
                                            "rtol_adjoint": TOLERANCE, **options}
    )  # fmt: skip
    # torchdyn gives a fixed-step solver one single step by default, the wrapper 100: the interval is set for both.
    node.t_span = span if span is not None else torch.linspace(0, 1, 2 if solver in ADAPTIVE else 6)
    return node


def build(make, solver, seed=0):
    torch.manual_seed(seed)
    model = make(solver)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)  # some of torchdyn's layers start at zero
    return model


def frozen(model):
    model = tm.wrap(model)
    for span in tm.spans(model):
        span.t_f.requires_grad_(False)
    return model


def state(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def weights(model):
    return [p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] not in ("t_f", "t0")]


def run(model, x, call=lambda model, x: model(x)):
    """Outputs, and the gradients of a loss that weighs every entry differently."""
    torch.manual_seed(7)  # Hutchinson's noise
    out = call(model, x)
    parts = list(out) if isinstance(out, tuple) else [out]
    sol = parts[-1]
    loss = (sol * torch.cos(torch.arange(sol.numel(), dtype=sol.dtype)).reshape(sol.shape)).sum()
    return out, torch.autograd.grad(loss, [x, *weights(model)], allow_unused=True)


def compare(bare, wrapped, x, rtol, atol, call=lambda model, x: model(x)):
    out, gradients = run(bare, x, call)
    ours, our_gradients = run(wrapped, x.detach().clone().requires_grad_(), call)
    assert type(ours) is type(out)
    parts, our_parts = (o if isinstance(o, tuple) else (o,) for o in (out, ours))
    assert len(parts) == len(our_parts)
    for theirs, mine in zip(parts, our_parts, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)
    assert any(g is not None and g.any() for g in gradients), "no gradient: the comparison would say nothing"
    for theirs, mine in zip(gradients, our_gradients, strict=True):
        # Of a parameter that plays no part, such as an energy's last bias, torchdyn's adjoint gives zeros, ours None.
        if theirs is None or (mine is None and not theirs.any()):
            assert mine is None
        else:
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def tolerances(solver):
    # Fixed steps: the same sums in another order, a few hundred operations of 1e-16 each. Adaptive: the step control
    # sees the same error to rounding, but an accepted step may differ by that, and tolerance 1e-8 bounds the rest.
    return (1e-6, 1e-7) if solver in ADAPTIVE else (1e-11, 1e-12)
