"""The verification of a depth by itself: each bound, the figures against their own measures, and several processes."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.core.evaluation import evaluate_with_reference, mean_loss
from torchdyn_mintime.core.reference import exact_solves, reference_states, solver_error
from torchdyn_mintime.depth.verification import Verification, verify


def model(solver="midpoint", steps=2, **options):
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    return tm.wrap(NeuralODE(net, solver=solver, **options), torch.linspace(0, 1, steps + 1))


X = torch.linspace(-1, 1, 12).reshape(4, 3)


def square(z):
    return z.square().mean()


def measured(span, x=X):
    return [lambda: square(span(x)[1][-1])]


def test_the_figures_are_those_of_the_other_measures():
    span = model()
    found = verify(span, measured(span), target=1e9, solver_tol=1e9)
    assert found.passed and found.loss == mean_loss(span, [(X,)], square)[0]
    # 1e-3: the exact solves of a look have a tolerance of 1e-5 here, and the errors are of some percent.
    assert found.solver_error == pytest.approx(solver_error(span, X), rel=1e-3) and found.solver_error > 1e-3
    assert found.reference_loss == pytest.approx(evaluate_with_reference(span, [X], square)[0], rel=1e-4)
    assert found.reference_loss != found.loss


def test_each_bound_is_held_and_the_cheap_ones_first():
    span = model()
    whole = verify(span, measured(span), target=1e9, solver_tol=1e9, evaluations=4)
    loss, error, reference = whole.loss, whole.solver_error, whole.reference_loss
    # 1e-3 and less: exact solves have a tolerance that follows from that of the solver error, 3e-7 to 1e-5 here.
    fits = dict(target=1.001 * max(loss, reference), solver_tol=1.01 * error, evaluations=4, accept=lambda: True)
    assert verify(span, measured(span), **fits).passed and not verify(span, measured(span), **fits).missed

    def without(missed, **change):
        found = verify(span, measured(span), **{**fits, **change})
        assert not found.passed and found.missed == missed
        return [found.loss, found.solver_error, found.reference_loss]

    def near(*figures):
        return pytest.approx([*figures, *[math.inf] * (3 - len(figures))], rel=1e-3)

    assert without("loss", target=0.999 * loss) == near(loss)
    assert without("solver error", solver_tol=0.99 * error) == near(loss, error)
    assert without("evaluations", evaluations=3) == near(loss, error)
    assert without("accept", accept=lambda: False) == near(loss, error, reference)
    # The loss of a model may be met at its steps alone, or only where it is solved exactly.
    low, high = sorted((loss, reference))
    between = without("exact loss" if loss < reference else "loss", target=(low + high) / 2)
    assert between == (near(loss, error, reference) if loss < reference else near(loss))


def test_it_measures_in_eval_mode_and_leaves_every_module_in_its_own():
    whole = nn.Sequential(nn.BatchNorm1d(3), model(return_t_eval=False), nn.Dropout(0.5))
    whole[2].eval()
    modes, grads = [], []

    def loss():
        modes.append(whole[0].training)
        grads.append(torch.is_grad_enabled())
        return square(whole(X))

    assert verify(whole, [loss], target=1e9, solver_tol=1e9).passed
    assert modes == [False, False] and grads == [False, False]  # at the steps, and solved exactly
    with pytest.raises(ZeroDivisionError):
        verify(whole, [lambda: 1 / 0], target=1e9, solver_tol=1e9)
    assert whole.training and whole[0].training and not whole[2].training
    before = whole[1](X)
    assert before.shape[0] == 3  # nothing stands in the span's place any more


def test_evaluations_are_counted_over_all_that_is_measured():
    """An adaptive solver may take few steps for the last batch, and more for another."""
    span = tm.wrap(NeuralODE(nn.Linear(2, 2), solver="tsit5", atol=1e-3, rtol=1e-3), torch.linspace(0, 1, 2))
    layer = next(m for m in span.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 8.0], [-8.0, 0.0]]))
        layer.bias.zero_()
    fast, still = torch.ones(2, 2), torch.full((2, 2), 1e-2)
    span(still)
    few = span.nfe
    span(fast)
    assert span.nfe > few
    bounds = dict(target=1e9, solver_tol=10.0, evaluations=few)
    slow, quick = measured(span, still), measured(span, fast)
    assert verify(span, slow, **bounds).passed
    for looks in (slow + quick, quick + slow, quick):
        assert not verify(span, looks, **bounds).passed
    twice = lambda: square(span(fast)[1][-1]) + square(span(still)[1][-1])  # noqa: E731
    assert not verify(span, [twice], **bounds).passed


def test_of_several_spans_the_worst_error_counts_and_the_sum_of_evaluations():
    whole = nn.Sequential(model("euler", 1), nn.Identity())
    whole[0].node.return_t_eval = False
    other = model("rk4", 4)
    both = nn.ModuleList([whole[0], other])

    def loss():
        return square(other(whole[0](X)[-1])[1][-1])

    found = verify(both, [loss], target=1e9, solver_tol=1e9)
    assert found.solver_error == pytest.approx(solver_error(whole[0], X), rel=1e-3)
    assert not verify(both, [loss], target=1e9, solver_tol=1e9, evaluations=16).passed
    assert verify(both, [loss], target=1e9, solver_tol=1e9, evaluations=17).passed


def test_solved_exactly_a_span_ends_where_its_ode_does():
    span, x = model("euler", 1).double(), X.double()
    exact = tm.wrap(NeuralODE(span.vf, solver="dopri5", atol=1e-9, rtol=1e-9), torch.tensor([0.0, 1.0]).double())
    with torch.no_grad():
        plain = span(x)[1][-1]
        with exact_solves(span):
            inside = span(x)[1][-1]
        after = span(x)[1][-1]
        truth = exact(x)[1][-1]
    # 1e-6: the reference is solved at tolerance 1e-7.
    torch.testing.assert_close(inside, truth, atol=1e-6, rtol=1e-6)
    assert torch.equal(plain, after) and not torch.allclose(plain, truth, atol=1e-3)


def test_the_exact_solution_of_a_batch_is_solved_for_once():
    span, evaluations = model(), []
    next(m for m in span.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *_: evaluations.append(1))
    verify(span, measured(span), target=1e9, solver_tol=0.1)
    looked = len(evaluations)
    evaluations.clear()
    with torch.no_grad():
        t_eval, _ = span(X)
        reference_states(span, t_eval, share=1e-5)  # verify's own tolerance at a solver_tol of .1
    assert looked == len(evaluations)


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, t, x, args):
        return torch.tanh(self.net(x)) + args["c"] * x


@pytest.mark.parametrize("wrapped", ["two in a row", "one, twice", "times in another order", "a condition"])
def test_an_exact_solution_stands_for_no_other_call(wrapped):
    """The second span starts where the exact first one ends, or is conditioned on it; a time out of order is not the end."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = model("euler", 2), model("euler", 2)
            self.three = tm.wrap(NeuralODE(Conditioned(), solver="euler"), torch.linspace(0, 1, 3))

        def forward(self, x):
            if wrapped == "a condition":
                return self.three(x, args={"c": 2 * self.one(x)[1][-1].abs()})[1][-1]
            if wrapped == "times in another order":
                return self.one(x, save_at=[1.0, 0.5])[1].flatten(1)
            z = self.one(x)[1][-1]
            return (self.two if wrapped == "two in a row" else self.one)(z)[1][-1]

    net = Model()
    found = verify(net, [lambda: square(net(X))], target=1e9, solver_tol=1e9)
    # 1e-4: the look's tolerance is 1e-5 of the displacement; the loss at the steps differs by some percent.
    assert found.reference_loss == pytest.approx(evaluate_with_reference(net, [X], square)[0], rel=1e-4)
    assert found.reference_loss != pytest.approx(found.loss, rel=1e-3)
    # The last call of each span is what solver_error knows; a span called twice may err more in its first.
    assert found.solver_error >= (1 - 1e-3) * solver_error(net, X)


def test_a_model_without_spans_is_refused():
    with pytest.raises(ValueError, match="Linear has no LearnableSpan"):
        verify(nn.Linear(2, 2), [lambda: 0.0], target=1.0, solver_tol=1.0)


@pytest.mark.parametrize("hard_first", [True, False])
def test_the_worst_of_all_batches_counts_in_either_order(hard_first):
    span = model("euler", 1)
    easy, hard = (measured(span, factor * X) for factor in (0.01, 3.0))
    looks = hard + easy if hard_first else easy + hard
    alone = [verify(span, each, target=1e9, solver_tol=1e9) for each in (easy, hard)]
    both = verify(span, looks, target=1e9, solver_tol=1e9)
    for name in ("loss", "solver_error", "reference_loss"):
        assert getattr(both, name) == max(getattr(each, name) for each in alone)
    low, high = sorted(each.solver_error for each in alone)
    assert low < 0.9 * high and not verify(span, looks, target=1e9, solver_tol=(low + high) / 2).passed
    low, high = sorted(max(each.loss, each.reference_loss) for each in alone)
    assert low < high and not verify(span, looks, target=(low + high) / 2, solver_tol=1e9).passed
    assert verify(span, looks, target=high, solver_tol=1e9).passed


@pytest.mark.parametrize("target", [None, math.inf, 1e9])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failed_solve_of_any_batch_is_a_failure(place, target):
    def failing():
        raise tm.IntegrationError("not finite", time=0.0, step=1, solver="rk4")

    span = model()
    looks = measured(span) * 2
    looks.insert(place, failing)
    found = verify(span, looks, target=target, solver_tol=1e9)
    assert not found.passed and found.loss == math.inf


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_infinite(loss):
    assert verify(model(), [lambda: loss], target=1e9, solver_tol=1.0) == Verification(False, math.inf, missed="solve")


def test_a_target_of_none_holds_the_loss_against_nothing_but_a_failure():
    span = model()
    assert verify(span, measured(span), target=None, solver_tol=1e9).passed
    assert not verify(span, measured(span), target=None, solver_tol=1e-9).passed


@pytest.mark.parametrize(("reference", "passed"), [(1.0, True), (1.0 + 1e-9, False)])
def test_a_loss_that_is_the_target_meets_it_also_when_solved_exactly(reference, passed):
    losses = iter([1.0, reference])
    assert verify(model(), [lambda: next(losses)], target=1.0, solver_tol=1.0).passed == passed


def test_a_reference_that_fails_is_a_failure_too():
    span, losses = model(), iter([1.0, math.nan])
    found = verify(span, [lambda: next(losses)], target=None, solver_tol=1.0)
    assert found == Verification(False, 1.0, 0.0, math.inf, missed="solve")


def test_the_predictions_that_change_are_counted_over_all_batches():
    """One step of Euler of x' = -x + 1 from x < 0 passes 1 / 2 where the ODE does not, and the other way round."""
    span = tm.wrap(NeuralODE(nn.Linear(1, 1), solver="euler"), torch.tensor([0.0, 1.0]))
    layer = next(m for m in span.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight.fill_(-1.0)
        layer.bias.fill_(1.0)

    def look(x):
        def of():
            end = span(x)[1][-1]
            return end.mean(), (end[:, 0] > 0.5).long()

        return of

    # Euler ends at 1 whatever x is; the ODE at 1 + (x - 1) / e, which is above 1/2 for x > 1 - e/2 = -.36.
    above, below = torch.tensor([[0.0], [1.0], [-0.3]]), torch.tensor([[-0.4]])
    found = [verify(span, [look(x) for x in xs], target=None, solver_tol=10.0) for xs in ([above], [above, below])]
    assert [each.changed for each in found] == [0.0, 0.25]
    assert verify(span, measured(span, above), target=None, solver_tol=10.0).changed is None


def test_a_condition_of_the_users_own_is_asked_once_and_last():
    span, asked = model(), []
    seen = [lambda i=i: (asked.append(i), 1.0)[1] for i in range(2)]
    verify(span, seen, target=2.0, solver_tol=1.0, accept=lambda: asked.append("accept") or True)
    assert asked == [0, 0, 1, 1, "accept"]  # each batch at the steps and solved exactly
    del asked[:]
    verify(span, seen, target=0.5, solver_tol=1.0, accept=lambda: asked.append("accept") or True)
    assert asked == [0]


# -------------------------------------------------------------------------------------------------------------- processes


def in_two(*options):
    """What two processes find, as threads that meet at every mean: the results, or the errors."""
    meeting, said = threading.Barrier(2, timeout=60), [0.0, 0.0]

    def mean(rank, value):
        said[rank] = value
        meeting.wait()
        result = sum(said) / 2
        meeting.wait()  # nobody says the next one before both have heard this one
        return result

    def process(rank, span, look, change):
        bounds = {"target": 1e9, "solver_tol": 10.0, "evaluations": 4, **change}
        try:
            return verify(span, look, **bounds, reduce=lambda value: mean(rank, value)).passed
        except (KeyError, RuntimeError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2), *zip(*options, strict=True)))


def fine(look=None, **change):
    span = model()
    return span, [look] if look else measured(span), change


def test_it_is_decided_by_all_processes():
    """What one finds alone, a failed solve or a defect among it, all decide, and none waits for ever."""

    def failing():
        raise tm.IntegrationError("not finite", time=0.0, step=1, solver="rk4")

    def broken():
        raise KeyError("a defect")

    assert in_two(fine(), fine()) == [True, True]
    assert in_two(fine(), fine(failing)) == [False, False]
    assert in_two(fine(), fine(lambda: 1e12)) == [False, False]
    assert in_two(fine(accept=lambda: False), fine(accept=lambda: True)) == [False, False]
    assert in_two(fine(), fine(evaluations=1)) == [False, False]
    first, second = in_two(fine(), fine(broken))
    assert isinstance(second, KeyError) and "failed in another process" in str(first)


def test_a_solve_that_fails_is_an_infinite_loss():
    def failing():
        raise tm.IntegrationError("not finite", time=0.0, step=1, solver="rk4")

    assert verify(model(), [failing], target=1e9, solver_tol=1.0) == Verification(False, math.inf, missed="solve")
