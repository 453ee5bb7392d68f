"""A trained model made shallow: a copy of it, and the model as it was."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.core.reference import exact_solves, solver_error

X = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
TURNED = torch.stack([-X[:, 1], X[:, 0]], 1)


class Whole(nn.Module):
    """An encoder, a NeuralODE and a head."""

    def __init__(self, **options):
        super().__init__()
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.encoder, self.node, self.head = (
            nn.Linear(2, 2),
            NeuralODE(net, **{"solver": "rk4", **options}),
            nn.Linear(2, 2),
        )

    def forward(self, x):
        return self.head(self.node(self.encoder(x), torch.linspace(0, 1, 11))[1][-1])


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Whole()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        mse_loss(model(X), TURNED).backward()
        optimizer.step()
    return model


def test_a_copy_is_made_shallow_and_the_model_itself_stays_as_it_is(trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    out = trained(X)
    shallow, verdict = tm.compress(trained, [(X, TURNED)], mse_loss, target=0.02, progress=False, max_iterations=600)
    assert torch.equal(out, trained(X)) and isinstance(trained.node, NeuralODE)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert verdict.feasible and verdict.best.evaluations <= 4
    (span,) = tm.spans(shallow)
    with torch.no_grad():
        assert mse_loss(shallow(X), TURNED) <= 0.02 and span.nfe == verdict.best.evaluations
        with exact_solves(shallow):
            assert mse_loss(shallow(X), TURNED) <= 0.02
    assert solver_error(shallow, X) <= 0.1
    assert not any(p is q for p, q in itertools.product(trained.parameters(), shallow.parameters()))


def test_a_model_far_below_its_target_is_not_said_to_explode(trained):
    """Fewer steps are another network at first: a loss of a thousand times the first one is still below the target."""
    search_from = copy.deepcopy(trained.state_dict())
    _, verdict = tm.compress(trained, [(X, TURNED)], mse_loss, target=0.5, progress=False, max_iterations=600)
    assert verdict.best.evaluations <= 3
    assert all(t.iterations > 12 or t.passed for t in verdict.trials)
    assert all(torch.equal(value, search_from[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_without_a_target_the_loss_may_rise_by_a_share_of_what_the_ode_is_worth(trained, slack):
    hard = (X[:8], TURNED[:8] + 0.1)
    batches = [(X, TURNED), hard]
    with torch.no_grad():
        own = max(mse_loss(trained(x), y).item() for x, y in batches)
        skipped = max(mse_loss(trained.head(trained.encoder(x)), y).item() for x, y in batches)
    _, verdict = tm.compress(trained, batches, mse_loss, slack=slack, progress=False, max_iterations=1)
    assert verdict.target == pytest.approx(own + slack * (skipped - own), rel=1e-4)


def test_bare_nodes_wrapped_ones_and_nodes_under_an_adjoint():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    square = lambda z: z.square().mean()  # noqa: E731
    bare = NeuralODE(copy.deepcopy(net), solver="rk4", sensitivity="adjoint")
    wrapped = tm.wrap(NeuralODE(net, solver="midpoint"), torch.linspace(0, 1, 6))
    for model in (bare, wrapped):
        shallow, verdict = tm.compress(model, [X], square, target=5.0, solver_tol=0.5, progress=False, solvers=[])
        assert verdict.feasible and isinstance(shallow, tm.LearnableSpan) and shallow is not model
        assert verdict.best.evaluations == (4 if model is bare else 2)
    assert shallow.node.sensitivity == "autograd" and bare.sensitivity == "adjoint"
    assert wrapped.steps == 5 and wrapped.t_f.requires_grad


def test_what_is_held_out_must_pass_too(trained):
    far = (5 * X, 5 * TURNED)
    _, verdict = tm.compress(
        trained, [(X, TURNED)], mse_loss, target=0.02, held_out=[far], progress=False, max_iterations=60
    )
    assert not verdict.feasible
    # The training loss is met: the verdict says which loss is not.
    failed = verdict.trials[-1]
    assert failed.training_loss <= 0.02 < failed.held_out_loss < math.inf and failed.missed == "held-out loss"
    assert ", the loss on held-out batches missed the target, lowest loss in training" in str(verdict)
    assert f"at most {failed.held_out_loss:.4g} on held-out batches" in str(verdict)


def test_a_condition_is_asked_of_the_copy_as_it_is_then(trained):
    asked = []

    def accept(copy):
        assert copy is not trained and not copy.training and not torch.is_grad_enabled()
        copy(X)
        asked.append(next(tm.spans(copy)).nfe)
        return asked[-1] > 4

    _, verdict = tm.compress(
        trained, [(X, TURNED)], mse_loss, target=0.5, accept=accept, solvers=["rk4"], progress=False, max_iterations=60
    )
    assert verdict.feasible and verdict.best.evaluations == 8 and {4, 8, 16} <= set(asked)
    assert next(t for t in verdict.trials if t.evaluations == 4).missed == "accept"


def test_a_condition_that_is_no_function_is_an_error(trained):
    with pytest.raises(TypeError, match="accept must be a function of the copy; got 0.9"):
        tm.compress(trained, [(X, TURNED)], mse_loss, accept=0.9, progress=False)


def test_an_error_of_the_loss_says_how_it_is_called(trained):
    with pytest.raises(AttributeError) as raised:
        tm.compress(trained, [(X, TURNED)], lambda out, batch: batch.targets, progress=False)
    assert raised.value.__notes__ == [
        "compress calls loss(output, *target), where (x, *target) is an element of batches"
    ]


def test_a_slack_counts_from_what_is_held_out_too(trained):
    hard = (X[:8], TURNED[:8] + 0.1)
    _, both = tm.compress(trained, [(X, TURNED), hard], mse_loss, progress=False, max_iterations=1)
    _, held = tm.compress(trained, [(X, TURNED)], mse_loss, held_out=[hard], progress=False, max_iterations=1)
    assert held.target == both.target


def test_nothing_found_leaves_the_copys_steps_as_they_were(trained):
    shallow, verdict = tm.compress(trained, [(X, TURNED)], mse_loss, target=-1.0, progress=False, max_iterations=3)
    assert not verdict.feasible
    shallow(X)
    assert next(tm.spans(shallow)).nfe == 40


@pytest.mark.parametrize(
    ("model", "batches", "error", "match"),
    [
        (lambda: nn.Linear(2, 2), [(X, TURNED)], ValueError, "no LearnableSpan"),
        (Whole, [], ValueError, "batches is empty"),
        (Whole, X, TypeError, r"pass \[x\] for one"),
    ],
)
def test_what_cannot_be_made_shallow(model, batches, error, match):
    with pytest.raises(error, match=match):
        tm.compress(model(), batches, mse_loss, progress=False)
