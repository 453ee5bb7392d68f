"""Shallowest: the search for the fewest evaluations in a Trainer."""

import copy

import pytest
import torch
from learners import Learner, annuli, loader, make_node, trainer

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import Shallowest


class Rings(Learner):
    """Passes a span of 20 steps of its own, which the search sets aside."""

    def __init__(self, hook=None):
        node = make_node(3, 32)
        super().__init__(node, torch.linspace(0, 1, 21), lambda p: torch.optim.Adam(p, 0.03), classes=2, hook=hook)


def fit(module, callback, epochs, n=128, path=None):
    run = trainer(epochs, callback)
    run.fit(module, loader(annuli(n), n), ckpt_path=path, weights_only=True if path else None)
    return run


def test_the_fewest_evaluations_are_found_and_stay():
    torch.manual_seed(0)
    module, callback = Rings(), Shallowest(target=0.05, solver_tol=0.2)
    fit(module, callback, 1500)
    assert callback.verdict is not None and callback.verdict.feasible
    assert callback.verdict.best.evaluations <= 4
    assert "training_step" not in vars(module) and "log" not in vars(module)
    module.model(torch.randn(4, 3), module.t_span)
    assert module.model.nfe == callback.verdict.best.evaluations
    assert module.model.t_f.requires_grad
    other = Rings()
    tm.wrap(other).load_state_dict(module.state_dict())
    assert other.model.pinned
    copied = copy.deepcopy(module)
    assert copied.training_step.__self__ is copied and copied.log.__self__ is copied


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_search_that_fails_again_and_again_ends():
    def fail(learner, batch_idx):
        calls.append(batch_idx)
        raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")

    calls, callback = [], Shallowest(target=0.1, max_steps=1)
    fit(Rings(fail), callback, 40, n=16)
    assert len(calls) == 9 and not callback.verdict.feasible


class Stumbling(Rings):
    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == 2:
            return None
        if self.calls == 3:
            raise tm.IntegrationError("the state is not finite", time=0.0, step=1, solver="rk4")
        return {"loss": super().training_step(batch, batch_idx)}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_failed_solve_is_gone_back_from_and_a_step_without_loss_is_passed_over():
    torch.manual_seed(0)
    module, callback = Stumbling(), Shallowest(target=0.05, solver_tol=0.2)
    run = fit(module, callback, 5)
    assert module.calls == 5 and callback.verdict.iterations == 3
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.03 * 0.3)


class OneArgument(Rings):
    """Lightning passes the number of the batch only to a step that takes it."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


def test_a_step_that_takes_the_batch_alone_is_called_so():
    torch.manual_seed(0)
    callback = Shallowest(target=1.0, solver_tol=10.0)
    fit(OneArgument(), callback, 5)
    assert callback.verdict.feasible


def test_the_module_is_as_it_was_after_an_error():
    def fail(learner, batch_idx):
        assert not learner.model.t_f.requires_grad
        raise KeyError("a fault of the user's own")

    module = Rings(fail)
    with pytest.raises(KeyError):
        fit(module, Shallowest(target=0.1), 1)
    assert "training_step" not in vars(module) and module.model.t_f.requires_grad


def test_a_search_goes_on_from_its_checkpoint(tmp_path):
    def fitted(epochs, path=None):
        torch.manual_seed(1)
        module, callback = Rings(), Shallowest(target=0.05, solver_tol=0.2)
        return module, callback, fit(module, callback, epochs, path=path)

    whole, searched, _ = fitted(24)
    _, stopped, run = fitted(12)
    assert not stopped.search.done and not stopped.verdict.feasible
    run.save_checkpoint(tmp_path / "c.ckpt")
    second, resumed, _ = fitted(24, tmp_path / "c.ckpt")
    assert resumed.search.trials == searched.search.trials and resumed.verdict == searched.verdict
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_search_that_has_ended_is_not_started_again(tmp_path):
    torch.manual_seed(0)
    module, callback = Rings(), Shallowest(target=0.5, solver_tol=0.5, solvers=[])
    run = fit(module, callback, 1500)
    assert callback.verdict.feasible
    run.save_checkpoint(tmp_path / "c.ckpt")
    again, other = Rings(), Shallowest(target=0.5, solver_tol=0.5, solvers=[])
    fit(again, other, 1500, path=tmp_path / "c.ckpt")
    assert other.verdict == callback.verdict
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
